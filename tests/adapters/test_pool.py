"""`LowRankPool`: the grouped product of ragged ranks against a loop written here, in values and gradients."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from anabranch.adapters import LowRankPool, Pair
from anabranch.errors import ConfigError
from anabranch.nn.grouped import BACKENDS
from anabranch.routing.decision import Routing

TORCH = [name for name in BACKENDS if name != "native"]


def make(ranks, in_dim, out_dim, dtype=torch.float64, seed=0, **options):
    """A pool whose B is drawn too."""
    generator = torch.Generator().manual_seed(seed)
    pool = LowRankPool(in_dim, out_dim, ranks, generator=generator, dtype=dtype, **options)
    for number, rank in enumerate(ranks):
        pool.b.data[number, :, :rank] = torch.randn(out_dim, rank, generator=generator, dtype=dtype)
    return pool


def routed(num_items, num_choices, num_adapters, dtype=torch.float64, seed=0):
    """Some choices name nobody; an adapter may be named twice by one item, and the last is never chosen."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(-1, max(num_adapters - 1, 1), (num_items, num_choices), generator=generator)
    weight = torch.rand(num_items, num_choices, generator=generator, dtype=dtype) * (index >= 0)
    return Routing(index, weight, torch.zeros(num_items, num_adapters))


def naive(x_NC, routing, weight_NK, a, b, ranks, scales):
    rows = []
    for n in range(len(x_NC)):
        y = x_NC.new_zeros(b.shape[1])
        for k, e in enumerate(routing.index_NK[n].tolist()):
            if e >= 0:
                y = y + weight_NK[n, k] * scales[e] * (b[e, :, : ranks[e]] @ (a[e, : ranks[e]] @ x_NC[n]))
        rows.append(y)
    return torch.stack(rows) if rows else x_NC.new_zeros(0, b.shape[1])


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("backend", TORCH)
def test_equals_a_naive_loop_in_values_and_gradients(backend, recompute):
    dtype = torch.float32 if backend == "grouped_mm" else torch.float64
    # grouped_mm wants rows of whole 16 bytes.
    ranks, in_dim, out_dim = [4, 1, 8, 3], 16, 24
    pool = make(
        ranks,
        in_dim,
        out_dim,
        dtype,
        alphas=[8, 2, 8, -3.0],
        rslora=[False, True, True, False],
        backend=backend,
        recompute=recompute,
    )
    scales = [2.0, 2.0, 8 / 8**0.5, -1.0]
    routing = routed(11, 3, 4, dtype)
    x = torch.randn(11, in_dim, generator=torch.Generator().manual_seed(1), dtype=dtype)
    dy = torch.randn(11, out_dim, generator=torch.Generator().manual_seed(2), dtype=dtype)
    leaves = [x.clone().requires_grad_(), routing.weight_NK.clone().requires_grad_()]
    y = pool(leaves[0], Routing(routing.index_NK, leaves[1], routing.score_NE))
    ours = [y, *torch.autograd.grad(y, [*leaves, pool.a, pool.b], dy)]
    wide = [value.detach().double().requires_grad_() for value in (x, routing.weight_NK, pool.a, pool.b)]
    expected = naive(wide[0], routing, *wide[1:], ranks, scales)
    theirs = [expected, *torch.autograd.grad(expected, wide, dy.double())]
    limit = 1e-4 if dtype == torch.float32 else 1e-11
    used = (routing.index_NK >= 0).double()
    for number, (found, wanted) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(found.double(), wanted * used if number == 2 else wanted, rtol=limit, atol=limit)
    # What is beyond a rank, and an adapter that nobody chose, learn nothing.
    for gradient, beyond in ((ours[3], lambda g, e, r: g[e, r:]), (ours[4], lambda g, e, r: g[e, :, r:])):
        assert not gradient[-1].any()
        assert not any(beyond(gradient, e, rank).any() for e, rank in enumerate(ranks))


@given(
    num_items=st.integers(0, 9),
    num_choices=st.integers(1, 3),
    ranks=st.lists(st.integers(1, 6), min_size=1, max_size=5),
    in_dim=st.integers(1, 7),
    out_dim=st.integers(1, 7),
    seed=st.integers(0, 99),
)
def test_any_shape(num_items, num_choices, ranks, in_dim, out_dim, seed):
    pool = make(ranks, in_dim, out_dim, seed=seed, alphas=1.0)
    routing = routed(num_items, num_choices, len(ranks), seed=seed)
    x = torch.randn(num_items, in_dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = naive(x, routing, routing.weight_NK, pool.a, pool.b, ranks, [1 / rank for rank in ranks])
    torch.testing.assert_close(pool(x, routing), expected)


def test_a_new_pool_adds_nothing_and_learning_leaves_what_is_beyond_a_rank_at_zero():
    pool = LowRankPool(6, 5, [2, 4], generator=torch.Generator().manual_seed(0))
    routing = Routing(torch.tensor([[0], [1], [0]]), torch.ones(3, 1), torch.zeros(3, 2))
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(1))
    assert not pool(x, routing).any()
    assert pool.a[0, :2].abs().max() <= 6**-0.5
    optimizer = torch.optim.AdamW(pool.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(3):
        (pool(x, routing) - 1).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert pool(x, routing).any()
    assert not pool.a[0, 2:].any()
    assert not pool.b[0, :, 2:].any()


@pytest.mark.parametrize("backend", TORCH)
@pytest.mark.parametrize("weight", [torch.tensor([[1, 2], [0, -3]]), torch.tensor([[True, True], [True, False]])])
def test_whole_numbers_as_weights_round_no_scale(backend, weight):
    pool = make([8, 4], 8, 8, torch.float32, alphas=[12.0, 2.0], backend=backend)
    index, x = torch.tensor([[0, 1], [1, 0]]), torch.randn(2, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, wanted = (pool(x, Routing(index, each, torch.zeros(2, 2))) for each in (weight, weight.float()))
    assert wanted.any()
    torch.testing.assert_close(found, wanted)


def test_pairs_go_in_and_come_out():
    pairs = [
        Pair(torch.randn(rank, 6), torch.randn(5, rank), alpha, rslora)
        for rank, alpha, rslora in ((2, 4.0, False), (3, 6.0, True))
    ]
    pool = LowRankPool.from_pairs(pairs)
    assert (pool.num_experts, pool.dim, pool.out_dim, pool.hidden_dim) == (2, 6, 5, 3)
    assert pool.stacks[0] is pool.a
    x, one = torch.randn(1, 6), torch.ones(1, 1)
    for number, pair in enumerate(pairs):
        back = pool.pair(number)
        assert torch.equal(back.a_RC, pair.a_RC)
        assert torch.equal(back.b_OR, pair.b_OR)
        assert (back.alpha, back.rslora, back.scale) == (pair.alpha, pair.rslora, pair.scale)
        y = pool(x, Routing(torch.tensor([[number]]), one, torch.zeros(1, 2)))
        torch.testing.assert_close(y, x @ pair.delta().T)
    assert "ranks=[2, 3]" in repr(pool)


@pytest.mark.parametrize("kinds", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_a_pool_has_the_wider_type_of_both_halves(kinds):
    pair = Pair(torch.randn(2, 6, dtype=kinds[0]), torch.randn(5, 2, dtype=kinds[1]), 2.0)
    pool = LowRankPool.from_pairs([pair])
    assert pool.a.dtype == pool.b.dtype == torch.float64
    assert torch.equal(pool.pair(0).b_OR, pair.b_OR.double())


def test_it_is_copied_moved_and_compiled_as_other_pools_are():
    pool = make([2, 3], 8, 8, torch.float32)
    routing = routed(5, 2, 2, torch.float32)
    x = torch.randn(5, 8)
    y = pool(x, routing)
    torch.testing.assert_close(copy.deepcopy(pool)(x, routing), y)
    torch.testing.assert_close(copy.deepcopy(pool).double()(x.double(), routing), y.double(), rtol=1e-5, atol=1e-5)
    assert pool.scales == (1.0, 1.0)
    other = make([2, 3], 8, 8, torch.float32)
    compiled = torch.compile(lambda x: other(x, routing), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), y)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0, 4, [1]), {}, "in_dim is 0; it must be at least 1"),
        ((4, 0, [1]), {}, "out_dim is 0; it must be at least 1"),
        ((4, 4, []), {}, "the number of adapters is 0; it must be at least 1"),
        ((4, 4, [2, 0]), {}, "rank is 0; it must be at least 1"),
        ((4, 4, [2, 2]), {"alphas": [1.0]}, "alphas has 1 values for 2 adapters; give one for each, or one for all"),
        ((4, 4, [2, 2]), {"rslora": [True] * 3}, "rslora has 3 values for 2 adapters"),
        ((4, 4, [2]), {"alphas": float("nan")}, "alpha is nan; it must be a finite number"),
    ],
)
def test_sizes_that_cannot_be(arguments, options, message):
    with pytest.raises(ConfigError, match=message):
        LowRankPool(*arguments, **options)


def test_pairs_of_other_layers_are_refused():
    with pytest.raises(
        ConfigError, match=r"of layers of \(inputs, outputs\) \[\(3, 5\), \(4, 5\)\]; they must be of one"
    ):
        LowRankPool.from_pairs(
            [Pair(torch.ones(2, 4), torch.ones(5, 2), 1.0), Pair(torch.ones(2, 3), torch.ones(5, 2), 1.0)]
        )
    with pytest.raises(ConfigError, match="the number of adapters is 0"):
        LowRankPool.from_pairs([])
    pool = LowRankPool(4, 4, [2], backend="native")
    with pytest.raises(Exception, match="kernels compute swiglu, not identity"):
        pool(torch.ones(1, 4), Routing(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1), torch.ones(1, 1)))


def test_with_recompute_less_is_kept_for_the_backward_pass():
    """Values and gradients are the same either way, see above."""
    kept = {}
    for recompute in (False, True):
        pool = LowRankPool(32, 32, [8, 16], recompute=recompute, backend="torch")
        sizes = []

        def keep(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            pool(
                torch.randn(64, 32, requires_grad=True),
                Routing(torch.arange(64)[:, None] % 2, torch.ones(64, 1), torch.zeros(64, 2)),
            )
        kept[recompute] = sum(sizes)
    assert kept[True] < kept[False]
