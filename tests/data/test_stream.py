import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.data.store import Segment
from anabranch.data.stream import Lane, TokenStream
from anabranch.errors import ConfigError, DataError


class Numbers:
    """A store whose tokens are 0, 1, 2, ...: a window shows where it was cut."""

    def __init__(self, length):
        self._tokens_T = np.arange(length, dtype=np.uint32)

    def tokens(self, split):
        assert split == "train"
        return self._tokens_T


def stream(lengths=(100,), *, length=4, seed=0, weights=None, **options):
    """A stream over one store cut into domains of these lengths: one lane, or one a domain where there are weights."""
    store, starts = Numbers(sum(lengths)), np.cumsum([0, *lengths])
    parts = [(store, Segment(f"d{i}", int(starts[i]), size, size, 1), i) for i, size in enumerate(lengths)]
    lanes = (
        [Lane(weight, (part,)) for weight, part in zip(weights, parts, strict=True)]
        if weights
        else [Lane(1.0, tuple(parts))]
    )
    return TokenStream(lanes, [f"d{i}" for i in range(len(lengths))], sequence_length=length, seed=seed, **options)


def rows(batch):
    return torch.cat([batch.token_BL, batch.target_BL[:, -1:]], dim=1).tolist()


def test_a_batch_holds_tokens_and_their_successors():
    batch = stream().next_batch(3)
    assert batch.token_BL.shape == batch.target_BL.shape == (3, 4)
    assert batch.token_BL.dtype == batch.target_BL.dtype == batch.domain_B.dtype == torch.int64
    assert torch.equal(batch.target_BL, (batch.token_BL + 1) % 100)
    assert batch.token_BL.is_contiguous()
    assert batch.target_BL.is_contiguous()
    assert batch.byte_length_BL is None


@pytest.mark.parametrize("size", [5, 100, 102])
def test_an_epoch_visits_every_window_once(size):
    # windows of 4 on a circle of 102 tokens: 25 of them, which cover 100 different tokens as inputs
    source = stream((size,))
    for _ in range(3):
        inputs = source.next_batch(size // 4).token_BL.flatten().tolist()
        assert len(inputs) == len(set(inputs)) == size // 4 * 4


def test_epochs_differ_in_order_and_in_offset():
    source = stream((100,))
    first, second = (source.next_batch(25).token_BL for _ in range(2))
    assert {row % 4 for row in first[:, 0].tolist()} != {row % 4 for row in second[:, 0].tolist()}
    assert first[:, 0].tolist() != sorted(first[:, 0].tolist())
    assert source.epoch == 2.0


def test_the_seed_decides_everything():
    assert rows(stream(seed=1).next_batch(60)) == rows(stream(seed=1).next_batch(60))
    assert rows(stream(seed=1).next_batch(60)) != rows(stream(seed=2).next_batch(60))


SHAPES = [{"lengths": (100,)}, {"lengths": (40, 7, 60)}, {"lengths": (40, 9, 60), "weights": (1.0, 2.0, 0.5)}]


@pytest.mark.parametrize("shape", SHAPES)
@given(consumed=st.integers(0, 6000), batch_size=st.integers(1, 9))
def test_resuming_anywhere_gives_the_next_sequence(shape, consumed, batch_size):
    whole = stream(**shape)
    whole.load_state_dict({**whole.state_dict(), "position": consumed})
    expected = rows(whole.next_batch(20))
    resumed = stream(**shape)
    resumed.next_batch(3)  # wherever it stood before
    resumed.load_state_dict({**whole.state_dict(), "position": consumed})
    got = [row for _ in range(-(-20 // batch_size)) for row in rows(resumed.next_batch(batch_size))]
    assert got[:20] == expected


@pytest.mark.parametrize("shape", SHAPES)
def test_resuming_in_the_middle_of_an_epoch_equals_not_stopping(shape):
    straight = stream(**shape)
    expected = [rows(straight.next_batch(4)) for _ in range(1500)]  # many epochs, and over a mixture's block of 4,096
    stopped = stream(**shape)
    got = []
    for count in (1, 6, 493, 1000):
        got += [rows(stopped.next_batch(4)) for _ in range(count)]
        state = pickle.loads(pickle.dumps(stopped.state_dict()))
        stopped = stream(**shape)
        stopped.load_state_dict(state)
    assert got == expected


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_together_see_what_one_process_sees(shape, world_size):
    single = stream(**shape)
    ranks = [stream(**shape, rank=rank, world_size=world_size) for rank in range(world_size)]
    for _ in range(30):
        joined = [row for source in ranks for row in rows(source.next_batch(5))]
        assert joined == rows(single.next_batch(5 * world_size))
        assert len({str(source.state_dict()) for source in [single, *ranks]}) == 1


def test_another_number_of_ranks_can_go_on():
    single, pair = stream(), [stream(rank=rank, world_size=2) for rank in range(2)]
    for source in pair:
        source.next_batch(4)
    single.load_state_dict(pair[0].state_dict())
    reference = stream()
    reference.next_batch(8)
    assert rows(single.next_batch(10)) == rows(reference.next_batch(10))


def test_the_domain_of_a_sequence_is_where_its_tokens_come_from():
    batch = stream((40, 7, 60)).next_batch(200)
    edges = np.array([40, 47, 107])
    for row, domain in zip(rows(batch), batch.domain_B.tolist(), strict=True):
        assert {int(np.searchsorted(edges, token, side="right")) for token in row} == {domain}


def test_without_weights_domains_come_as_often_as_they_are_large():
    # 40 // 4 = 10, 8 // 4 = 2 and 60 // 4 = 15 windows an epoch
    batch = stream((40, 8, 60)).next_batch(27 * 3)
    assert Counter(batch.domain_B.tolist()) == {0: 30, 1: 6, 2: 45}


@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=6))
def test_mixture_proportions(weights):
    batch = stream((50,) * len(weights), weights=weights).next_batch(4096)
    count = np.bincount(batch.domain_B.numpy(), minlength=len(weights))
    share = np.array(weights) / sum(weights) * 4096
    assert (np.abs(count - share) <= len(weights)).all()  # rounding to whole sequences, at least one each


def test_a_mixture_is_mixed_early_on():
    # 64 draws at one half: standard deviation 4
    batch = stream((500, 500), weights=(1.0, 1.0)).next_batch(64)
    assert 12 < batch.domain_B.sum() < 52


def test_within_a_mixture_each_domain_runs_through_its_own_epochs():
    source = stream((48, 480), weights=(1.0, 1.0))
    batch = source.next_batch(400)
    inputs = [
        row for row, domain in zip(batch.token_BL[:, 0].tolist(), batch.domain_B.tolist(), strict=True) if domain == 0
    ]
    for epoch in range(len(inputs) // 12):
        assert len(set(inputs[epoch * 12 : epoch * 12 + 12])) == 12
    assert source.num_windows == 12 + 120
    assert source.epoch == pytest.approx(400 / 2 / 12)


def test_domains_too_small_for_one_window(caplog):
    source = stream((40, 4, 60))
    assert set(source.next_batch(100).domain_B.tolist()) == {0, 2}
    assert "d1 has only 4 tokens" in caplog.text
    with pytest.raises(DataError, match="the training split of d1 has 4 tokens, but a sequence needs 5"):
        stream((40, 4), weights=(1.0, 1.0))
    with pytest.raises(DataError, match="a sequence needs 257; give more text or a sequence_length of at most 99"):
        stream((100,), length=256)
    assert stream((5,)).next_batch(2).token_BL.shape == (2, 4)


def test_a_state_of_other_data_is_refused():
    source = stream(fingerprint="a")
    for field, other in (("seed", 5), ("sequence_length", 9), ("fingerprint", "b")):
        with pytest.raises(DataError, match=f"cannot resume the data: {field} was {other!r} and is now"):
            source.load_state_dict({**source.state_dict(), field: other})


@pytest.mark.parametrize(("rank", "world_size"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_outside_the_world(rank, world_size):
    with pytest.raises(ConfigError, match=f"rank is {rank}"):
        stream(rank=rank, world_size=world_size)


def test_a_batch_moves_to_a_device():
    batch = stream().next_batch(2).to("meta")
    assert batch.token_BL.device.type == batch.domain_B.device.type == "meta"
