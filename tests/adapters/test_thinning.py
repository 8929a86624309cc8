"""Rules of single numbers, by hand: what is kept, which sign wins, how the rest adds up."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.adapters.thinning import RULES, drop, merged, trim

TIES, DARE = RULES["ties"], RULES["dare"]


def seeded(number):
    return torch.Generator().manual_seed(number)


def of(number):
    """A generator for each of so many tensors."""
    return [seeded(seed) for seed in range(number)]


def test_trim_keeps_the_greatest():
    one = torch.tensor([[3.0, -1.0, 0.5], [-4.0, 2.0, 0.0]])
    assert torch.equal(trim(one, 0.5), torch.tensor([[3.0, 0, 0], [-4.0, 2.0, 0]]))
    assert torch.equal(trim(one, 0.1), torch.zeros(2, 3))
    assert trim(one, 1.0) is one


@given(st.integers(1, 40), st.floats(0.01, 1), st.integers(0, 9))
def test_trim_keeps_so_many_and_none_that_is_less_than_one_dropped(number, density, seed):
    one = torch.randn(number, generator=seeded(seed))
    found = trim(one, density)
    kept = found != 0
    assert int(kept.sum()) == (number if density >= 1 else int(density * number))
    assert torch.equal(found[kept], one[kept])
    if kept.any() and not kept.all():
        assert one[kept].abs().min() >= one[~kept].abs().max()


def test_drop_rescales_and_its_mean_is_what_it_dropped_from():
    one = torch.tensor([2.0, -3.0, 5.0])
    draws = torch.stack([drop(one, 0.25, seeded(seed)) for seed in range(600)])
    assert set(draws[:, 0].tolist()) == {0.0, 8.0}
    torch.testing.assert_close(draws.mean(0), one, rtol=0.3, atol=0)
    assert torch.equal(drop(one, 0.5, seeded(3)), drop(one, 0.5, seeded(3)))
    assert drop(one, 1.0, seeded(0)) is one


def test_ties_by_hand():
    """Places: both positive; the greater sign wins; even, so plus; one is trimmed; nothing."""
    first = torch.tensor([4.0, 5.0, 2.0, 3.0, 0.0])
    second = torch.tensor([2.0, -7.0, -2.0, 0.0, 0.0])
    found = merged([first, second], [0.5, 2.0], TIES, 1.0, of(2))
    torch.testing.assert_close(found, torch.tensor([(2.0 + 4.0) / 2, -14.0, 1.0, 1.5, 0.0]))


def test_the_sign_that_is_more_frequent():
    tensors = [torch.tensor([1.0]), torch.tensor([1.0]), torch.tensor([-5.0])]
    by = {majority: merged(tensors, [1, 1, 1], TIES, 1.0, of(3), majority) for majority in ("total", "frequency")}
    assert by["total"].item() == -5
    assert by["frequency"].item() == 1


def test_every_tensor_is_dropped_by_its_own_generator():
    one = torch.ones(64)
    alone = drop(one, 0.5, seeded(1))
    found = merged([one, one], [0.0, 3.0], DARE, 0.5, of(2))
    torch.testing.assert_close(found, 3 * alone)
    assert not torch.equal(alone, drop(one, 0.5, seeded(0)))


@pytest.mark.parametrize("name", RULES)
def test_a_density_of_one_keeps_all(name):
    tensors = [torch.randn(5, 7, generator=seeded(seed)) for seed in range(3)]
    weights = [0.5, -1.0, 2.0]
    found = merged(tensors, weights, RULES[name], 1.0, of(3))
    if RULES[name].elects:
        each = torch.stack(tensors)
        agrees = each.sign() == torch.where(each.sum(0) >= 0, 1, -1)
        wanted = (each * torch.tensor(weights).view(3, 1, 1) * agrees).sum(0) / agrees.sum(0)
    else:
        wanted = sum(weight * tensor for weight, tensor in zip(weights, tensors, strict=True))
    torch.testing.assert_close(found, wanted)
