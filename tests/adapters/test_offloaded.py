"""Adapters of a pool that come when they are wanted: by the kernel the same to the bit as those in memory, however few have a place."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.adapters import LowRankPool, RoutedLowRank
from anabranch.adapters.offloaded import OffloadedLowRank
from anabranch.adapters.side_by_side import is_mostly_used
from anabranch.errors import ConfigError
from anabranch.nn import BuildContext, kernels
from anabranch.nn.kernels import low_rank
from anabranch.nn.linear import Projection
from anabranch.routing.decision import Routing

C, OUT, RANKS = 24, 40, (2, 5, 1, 4, 3, 5, 2, 1, 4)


class Slots:
    """Places that adapters of a pool take, the last one first; who asks for more at once than there are is told."""

    packed = None

    def __init__(self, pool, number):
        self.pool, self.asked, self.used = pool, [], []
        self.w13_SFD, self.w2_SDF = (stack.detach()[:number].clone().fill_(float("nan")) for stack in pool.stacks)

    def mark_used(self, numbers):
        self.used.append(sorted(numbers))

    def waves(self, layer, experts, x, index, carry, together=False):
        most = len(self.w13_SFD)
        assert not together or len(experts) <= most
        for at in range(0, len(experts), most):
            slot_of = {expert: most - 1 - place for place, expert in enumerate(experts[at : at + most])}
            for expert, slot in slot_of.items():
                self.w13_SFD[slot], self.w2_SDF[slot] = self.pool.a[expert], self.pool.b[expert]
            self.asked.append(sorted(slot_of))
            yield slot_of
            # Nobody may read them any more.
            self.w13_SFD.fill_(float("nan")), self.w2_SDF.fill_(float("nan"))


def made(number, dtype=torch.float32, ranks=RANKS, **options):
    """(the pool in memory, places, the one whose adapters come)."""
    generator = torch.Generator().manual_seed(0)
    pool = LowRankPool(C, OUT, ranks, alphas=[3.0] * len(ranks), generator=generator, dtype=dtype, **options)
    for adapter, rank in enumerate(ranks):
        pool.b.data[adapter, :, :rank] = torch.randn(OUT, rank, generator=generator).to(dtype)
    slots = Slots(pool.requires_grad_(False), number)
    return pool, slots, OffloadedLowRank(0, pool, slots, slots.waves)


def routed(items, choices, seed=0, dtype=torch.float32):
    """Some choices name nobody, and an item may name one twice."""
    generator, adapters = torch.Generator().manual_seed(seed), len(RANKS)
    index_NK = torch.randint(-1, adapters, (items, choices), generator=generator)
    weight_NK = torch.rand(items, choices, generator=generator).to(dtype) * (index_NK >= 0)
    return torch.randn(items, C, generator=generator).to(dtype), Routing(
        index_NK, weight_NK, torch.zeros(items, adapters)
    )


KINDS = [torch.float32, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("is_compiled", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_each_budget_gives_what_all_in_memory_give(kind, is_compiled, monkeypatch):
    if not is_compiled:
        monkeypatch.setattr(low_rank, "load", lambda: None)
    elif kernels.load() is None:
        pytest.skip("no compiler")
    for items, choices in ((1, 1), (5, 1), (40, 2), (3, 0)):
        x_NC, routing = routed(items, choices, seed=items, dtype=kind)
        assert not is_mostly_used(routing, is_compiled=is_compiled)
        for number in range(1, len(RANKS) + 1):
            pool, slots, offloaded = made(number, kind)
            found, wanted = offloaded(x_NC, routing), pool(x_NC, routing)
            if kind == torch.bfloat16 and not is_compiled:
                # In memory too the grouped product computes it then, whose rows are added up in float32 here.
                torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
                continue
            if is_compiled and kind != torch.float64:
                assert torch.equal(found, wanted)
            else:
                # Products of a library, whose rounding depends on where in memory the matrices lie, on some processors.
                bound = {torch.float32: 1e-5, torch.float64: 1e-13}[kind]
                torch.testing.assert_close(found, wanted, rtol=bound, atol=bound)
            assert len(slots.used) == len(slots.asked)


@given(
    items=st.integers(0, 9),
    choices=st.integers(1, 2),
    number=st.integers(1, 9),
    seed=st.integers(0, 99),
    kind=st.sampled_from([torch.float32, torch.bfloat16]),
    wide=st.booleans(),
)
@torch.no_grad()
def test_it_adds_to_rows_as_the_pool_does(items, choices, number, seed, kind, wide):
    pool, _, offloaded = made(number, kind)
    x_NC, routing = routed(items, choices, seed=seed, dtype=kind)
    y_NZ = torch.randn(items, OUT + 8).to(torch.float32 if wide else kind)
    found = []
    for one in (pool, offloaded):
        y = y_NZ.clone()
        # Columns of wider rows.
        one.add_to(y[:, 3 : 3 + OUT], x_NC, routing)
        found.append(y)
    if kernels.load() is not None:
        assert torch.equal(*found)
    torch.testing.assert_close(*found, rtol=2e-2, atol=2e-2)


@torch.no_grad()
def test_where_most_are_used_all_at_once_is_the_same_and_one_by_one_nearly():
    x_NC, routing = routed(6, 8)
    assert is_mostly_used(routing, is_compiled=True)
    pool, slots, offloaded = made(len(RANKS))
    assert torch.equal(offloaded(x_NC, routing), pool(x_NC, routing))
    assert slots.asked == [list(range(len(RANKS)))]
    pool, slots, offloaded = made(2)
    torch.testing.assert_close(offloaded(x_NC, routing), pool(x_NC, routing), rtol=1e-4, atol=1e-5)
    assert max(map(len, slots.asked)) == 2


@torch.no_grad()
def test_only_what_is_used_is_asked_for_each_once():
    _, slots, offloaded = made(2)
    index_NK = torch.tensor([[5, 0], [3, 5], [-1, 0]])
    offloaded(torch.ones(3, C), Routing(index_NK, (index_NK >= 0).float(), torch.zeros(3, len(RANKS))))
    assert slots.asked == [[0, 3], [5]]
    slots.asked.clear()
    none = Routing(torch.full((2, 1), -1), torch.zeros(2, 1), torch.zeros(2, len(RANKS)))
    assert torch.equal(offloaded(torch.ones(2, C), none), torch.zeros(2, OUT))
    assert slots.asked == []


@pytest.mark.parametrize("backend", ["auto", "reference", "torch"])
@pytest.mark.parametrize("number", [1, 3, 9])
def test_gradients_of_items_and_weights_are_those_of_the_pool_in_memory(backend, number):
    pool, _, offloaded = made(number, torch.float64, backend=backend)
    x_NC, routing = routed(8, 3, dtype=torch.float64)
    found = []
    for one in (pool, offloaded):
        leaves = x_NC.clone().requires_grad_(), routing.weight_NK.clone().requires_grad_()
        y_NO = one(leaves[0], Routing(routing.index_NK, leaves[1], routing.score_NE))
        found.append((y_NO.detach(), *torch.autograd.grad(y_NO.square().sum(), leaves)))
    (y, dx, dw), (got_y, got_dx, got_dw) = found
    used = routing.index_NK >= 0
    for wanted, got in ((y, got_y), (dx, got_dx), (dw[used], got_dw[used])):
        torch.testing.assert_close(got, wanted)


def test_it_owns_no_numbers_and_says_its_sizes():
    pool, _, offloaded = made(2)
    assert list(offloaded.parameters()) == []
    assert (offloaded.num_experts, offloaded.dim, offloaded.out_dim, offloaded.dtype) == (9, C, OUT, pool.dtype)
    assert sum(offloaded.num_weights) == sum(stack.numel() for stack in pool.stacks)
    assert "num_adapters=9" in repr(offloaded)


def test_what_a_matrix_lacks_is_told_of_adapters_in_memory():
    config = RoutedLowRank.Config(ranks=RANKS, router=None)
    layer = config.build(Projection("q", C, OUT), BuildContext(C, generator=torch.Generator().manual_seed(0)))
    layer.pool.a.data[3] = 0
    assert layer.lacking == (3,)
    layer.pool = made(2)[2]
    with pytest.raises(ConfigError, match="adapters are offloaded, so which of them a matrix lacks cannot be told"):
        _ = layer.lacking
