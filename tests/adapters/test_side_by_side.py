"""All adapters at once, against the grouped product, in values and gradients; and when it is taken."""

import pytest
import torch

from anabranch.adapters import LowRankPool
from anabranch.adapters.side_by_side import is_mostly_used, side_by_side
from anabranch.routing import Routing


def pool_of(dtype=torch.float64, **options):
    generator = torch.Generator().manual_seed(0)
    pool = LowRankPool(6, 5, [2, 4, 1], alphas=[3.0, 4.0, 2.0], generator=generator, dtype=dtype, **options)
    for number, rank in enumerate(pool.ranks):
        pool.b.data[number, :, :rank] = torch.randn(5, rank, generator=generator, dtype=dtype)
    return pool


def routing_of(index, dtype=torch.float64):
    index = torch.tensor(index)
    weight = torch.rand(index.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return Routing(index, weight * (index >= 0), torch.zeros(len(index), 3))


MOSTLY = [[0, 1, 2], [2, 0, -1], [1, 1, 0], [-1, -1, -1]]


def test_it_is_the_grouped_product():
    pool, routing = pool_of(), routing_of(MOSTLY)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    weight = routing.weight_NK.clone().requires_grad_()
    routing = Routing(routing.index_NK, weight, routing.score_NE)
    dy = torch.randn(4, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = {}
    for backend in ("auto", "torch"):
        pool.backend = backend
        y = pool(x, routing)
        found[backend] = [y, *torch.autograd.grad(y, [x, weight, pool.a, pool.b], dy)]
    for ours, theirs in zip(*found.values(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_it_is_taken_where_most_adapters_are_used(monkeypatch):
    taken = []
    monkeypatch.setattr("anabranch.adapters.pool.side_by_side", lambda *given: taken.append(1) or side_by_side(*given))
    few = [[0, -1, -1], [-1, -1, -1], [2, -1, -1], [-1, -1, -1]]
    x = torch.randn(4, 6, dtype=torch.float64)
    for index, options, expected in (
        (MOSTLY, {}, 1),
        (few, {}, 0),
        ([[0]] * 4, {}, 1),
        (MOSTLY, {"recompute": True}, 0),
        (MOSTLY, {"backend": "reference"}, 0),
    ):
        taken.clear()
        pool_of(**options)(x, routing_of(index))
        assert len(taken) == expected
    half = routing_of([[0, 1, -1], [2, -1, -1]])
    assert is_mostly_used(half)
    assert not is_mostly_used(half, is_compiled=True)
    assert is_mostly_used(routing_of([[0, 1, -1], [2, 1, 0]]), is_compiled=True)
    assert not is_mostly_used(Routing(torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3), torch.zeros(0, 3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_types_of_others_and_autocast(dtype):
    """Inputs of another type than the pool's, as the grouped product takes them."""
    pool, routing = pool_of(torch.float32), routing_of(MOSTLY, torch.float32)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(2)).to(dtype)
    outputs = []
    for backend in ("auto", "torch"):
        pool.backend = backend
        outputs.append(pool(x, routing))
        with torch.autocast("cpu", torch.bfloat16):
            outputs.append(pool(x, routing))
    assert [each.dtype for each in outputs[:2]] == [each.dtype for each in outputs[2:]]
    torch.testing.assert_close(outputs[0].float(), outputs[2].float(), rtol=0.05, atol=0.05)
