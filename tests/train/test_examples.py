"""Tensors as a stream: every example once an epoch, the same for any number of processes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import ConfigError, DataError
from anabranch.train import Examples


@given(st.integers(1, 9), st.integers(1, 5), st.integers(1, 3), st.integers(0, 3), st.integers(0, 6))
@settings(max_examples=60, deadline=None)
def test_processes_together_see_what_one_sees_from_any_place(num, batch, ranks, seed, skipped):
    number_N = torch.arange(num)
    one = Examples(number_N, -number_N, seed=seed)
    seen = torch.cat([one.next_batch(batch * ranks)[0] for _ in range(skipped + num)])
    for epoch in seen[: len(seen) // num * num].view(-1, num):
        assert epoch.sort().values.tolist() == number_N.tolist()
    parts = [Examples(number_N, -number_N, seed=seed, rank=rank, world_size=ranks) for rank in range(ranks)]
    states = set()
    for part in parts:
        for _ in range(skipped):
            part.next_batch(batch)
        states.add(tuple(part.state_dict().items()))
    assert len(states) == 1
    for rank, part in enumerate(parts):
        again = Examples(number_N, -number_N, seed=seed, rank=rank, world_size=ranks)
        again.load_state_dict(part.state_dict())
        first_B, second_B = again.next_batch(batch)
        start = (skipped * ranks + rank) * batch
        assert first_B.tolist() == seen[start : start + batch].tolist() or start + batch > len(seen)
        assert torch.equal(second_B, -first_B)


def test_orders_differ_between_epochs_and_seeds():
    one, other = (Examples(torch.arange(50), seed=seed) for seed in (0, 1))
    orders = [stream.next_batch(50)[0].tolist() for stream in (one, one, other)]
    assert len({tuple(order) for order in orders}) == 3


def test_other_examples_or_another_seed_are_refused():
    state = Examples(torch.arange(5), seed=0).state_dict()
    for other, what in (
        (Examples(torch.arange(5), seed=1), "their seed was 0 and is now 1"),
        (Examples(torch.arange(5).float(), seed=0), "they, or what a tokenizer makes of them"),
    ):
        with pytest.raises(DataError, match=f"cannot resume the examples: {what}"):
            other.load_state_dict(state)
    with pytest.raises(DataError, match=r"tensors of \[2, 3\] examples; they must all have as many"):
        Examples(torch.ones(2), torch.ones(3), seed=0)
    with pytest.raises(DataError, match=r"tensors of \[0\] examples"):
        Examples(torch.ones(0), seed=0)
    with pytest.raises(ConfigError, match="rank is 2; it must be 0 to 1"):
        Examples(torch.ones(2), seed=0, rank=2, world_size=2)
