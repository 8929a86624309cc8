"""An adapter or a row whose numbers are NaN or infinite changes nothing for those that do not use it, whichever way products are made."""

import pytest
import torch

from anabranch.adapters import LowRankPool
from anabranch.adapters.mhr.product import add_rows, add_to_rows
from anabranch.adapters.offloaded import OffloadedLowRank
from anabranch.adapters.side_by_side import is_mostly_used
from anabranch.errors import InputError
from anabranch.nn.grouped import BACKENDS
from anabranch.routing import Routing

C, OUT, HOSTILE = 16, 24, 1
# The hostile one is used by the second and fifth.
MOSTLY = [[0, 2], [1, 2], [2, 0], [0, 2], [0, 1], [-1, 2]]
FEW = [[0], [1], [-1], [-1], [1], [-1], [-1], [-1]]
WAYS = [
    *(pytest.param({"backend": backend}, id=backend) for backend in BACKENDS if backend != "native"),
    pytest.param({"recompute": True}, id="recompute"),
]


def spoil_a(pool, x):
    pool.a.data[HOSTILE, 0, 3] = float("nan")


def spoil_b(pool, x):
    pool.b.data[HOSTILE, 2, 1] = float("inf")


def overflow(pool, x):
    """Each number is finite, and what is between the matrices is not."""
    pool.a.data[HOSTILE] = 3e38
    x.add_(8.0)


def spoil_row(pool, x):
    x[1] = float("nan")


HARM = [spoil_a, spoil_b, overflow, spoil_row]


def made(index, harm, **options):
    """(the pool, inputs, routing, dy, whether an item is of those that nothing may happen to)."""
    generator = torch.Generator().manual_seed(0)
    pool = LowRankPool(C, OUT, [8, 8, 8], alphas=12.0, generator=generator, **options)
    pool.b.data.normal_(generator=generator)
    index = torch.tensor(index)
    x, dy = (torch.randn(len(index), width, generator=generator) for width in (C, OUT))
    weight = torch.rand(index.shape, generator=generator) * (index >= 0)
    harm(pool, x)
    routing = Routing(index, weight.requires_grad_(), torch.zeros(len(index), 3))
    return pool, x.requires_grad_(), routing, dy, ~(index == HOSTILE).any(1)


def wanted_of(pool, x, routing, others):
    """A loop of the items that are not hostile's."""
    rows = []
    for n in others.nonzero().flatten().tolist():
        y = x.new_zeros(OUT)
        for k, e in enumerate(routing.index_NK[n].tolist()):
            if e >= 0:
                y = y + routing.weight_NK[n, k] * 1.5 * (pool.b[e] @ (pool.a[e] @ x[n]))
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.parametrize("index", [MOSTLY, FEW], ids=["most are used", "few are used"])
@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("options", WAYS)
def test_of_a_pool_in_values_and_gradients(options, harm, index):
    pool, x, routing, dy, others = made(index, harm, **options)
    assert is_mostly_used(routing) == is_mostly_used(routing, is_compiled=True) == (index is MOSTLY)
    leaves = [x, routing.weight_NK, pool.a, pool.b]
    y = pool(x, routing)
    wanted = wanted_of(pool, x, routing, others)
    torch.testing.assert_close(y[others], wanted, rtol=1e-4, atol=1e-4)
    assert not y[1].isfinite().all()
    dx, dweight, *halves = torch.autograd.grad(y, leaves, dy)
    dx_wanted, dweight_wanted = torch.autograd.grad(wanted, leaves[:2], dy[others], retain_graph=True)
    torch.testing.assert_close(dx[others], dx_wanted[others], rtol=1e-4, atol=1e-4)
    used = routing.used_NK & others.unsqueeze(1)
    torch.testing.assert_close(dweight[used], dweight_wanted[used], rtol=1e-4, atol=1e-4)
    for half in halves:
        # What the third makes of a row that is NaN itself is NaN.
        assert half[0].isfinite().all()
        assert half[2].isfinite().all() or (harm is spoil_row and index is MOSTLY)


@pytest.mark.parametrize("index", [MOSTLY, FEW], ids=["most are used", "few are used"])
@pytest.mark.parametrize("harm", HARM)
@torch.no_grad()
def test_of_a_pool_added_in_place_and_offloaded(harm, index):
    pool, x, routing, _, others = made(index, harm)
    pool.requires_grad_(False)

    class Slots:
        packed, w13_SFD, w2_SDF = None, pool.a.detach().clone(), pool.b.detach().clone()

        def mark_used(self, numbers):
            pass

    def waves(layer, experts, x, index, carry, together=False):
        yield {expert: expert for expert in experts}

    wanted = wanted_of(pool, x, routing, others)
    for each in (pool, OffloadedLowRank(0, pool, Slots(), waves)):
        y = torch.ones(len(x), OUT)
        each.add_to(y, x, routing)
        for found in (y - 1, each(x, routing)):
            torch.testing.assert_close(found[others], wanted, rtol=1e-4, atol=1e-4)
            assert not found[1].isfinite().all()


@pytest.mark.parametrize("length", [3, 40], ids=["gathered", "as they lie"])
@pytest.mark.parametrize("harm", ["the weights of a task", "a row"])
def test_of_rows_by_task(harm, length):
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, length, OUT), (4, length, C), (3, 2, 5), (2, 5, C // 2, 4), (2, 5, 4, OUT // 2)]
    y, x, alpha, a, b = (torch.randn(shape, generator=generator) for shape in shapes)
    place = torch.tensor([0, HOSTILE, 2, 0])
    clean = add_rows(y, x, alpha, a, b, place, 0.5)
    (alpha if harm == "the weights of a task" else x)[HOSTILE] = float("nan")
    others, x = place != HOSTILE, x.requires_grad_()
    found = add_rows(y, x, alpha, a, b, place, 0.5)
    torch.testing.assert_close(found[others], clean[others])
    assert found[1].isnan().all()
    assert torch.autograd.grad(found, x, torch.ones_like(found))[0][others].isfinite().all()
    add_to_rows(y, x.detach(), alpha, a, b, place, 0.5)
    torch.testing.assert_close(y[others], clean[others])


@pytest.mark.parametrize(
    "index", [[[3]] * 4, [[0, 7, -1], [2, -1, -1], [1, 1, 0], [-1, -1, -1]], [[3], [-1], [-1], [-1]]]
)
@pytest.mark.parametrize("options", WAYS)
def test_an_adapter_that_there_is_not(options, index):
    pool = LowRankPool(C, OUT, [8, 8, 8], **options)
    routing = Routing(torch.tensor(index), torch.ones(4, len(index[0])), torch.zeros(4, 3))
    with pytest.raises(InputError, match=rf"adapter {max(map(max, index))} is chosen; there are 0 to 2"):
        pool(torch.randn(4, C), routing)


@pytest.mark.parametrize("options", WAYS)
def test_whoever_is_negative_is_nobody(options):
    pool, x, routing, _, _ = made([[0, -2], [2, -5], [-3, -1], [-1, -1]], lambda pool, x: None, **options)
    named = Routing(routing.index_NK.clamp_min(-1), routing.weight_NK, routing.score_NE)
    torch.testing.assert_close(pool(x, routing), pool(x, named))
