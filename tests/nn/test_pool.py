import pytest
import torch
from torch import nn

from anabranch.errors import ConfigError
from anabranch.nn.grouped import BACKENDS, reference_expert_mlp
from anabranch.nn.pool import ExpertPool
from anabranch.nn.sums import PassSums
from anabranch.routing.context import RoutingContext
from anabranch.routing.decision import Routing
from anabranch.routing.dispatch import plan_dispatch


def routing_of(n, e, k, seed=0):
    g = torch.Generator().manual_seed(seed)
    score = torch.rand(n, e, generator=g)
    weight, index = score.topk(k, dim=-1)
    return Routing(index, weight, score)


def test_forward_is_the_reference():
    pool = ExpertPool(4, 8, 6, init_std=0.5, generator=torch.Generator().manual_seed(0))
    x, routing = torch.randn(10, 8, generator=torch.Generator().manual_seed(1)), routing_of(10, 4, 2)
    for weight_on in ("output", "input"):
        expected = reference_expert_mlp(
            x, plan_dispatch(routing), routing.weight_NK, pool.w13, pool.w2, weight_on=weight_on
        )
        torch.testing.assert_close(pool(x, routing, weight_on=weight_on), expected)


def test_a_pool_used_twice_sums_its_gradients():
    pool = ExpertPool(3, 8, 6, init_std=0.5, generator=torch.Generator().manual_seed(0))
    x = torch.randn(9, 8, generator=torch.Generator().manual_seed(1))
    first, second = routing_of(9, 3, 2, seed=1), routing_of(9, 3, 1, seed=2)
    pool(x + pool(x, first), second).square().sum().backward()
    ours = pool.w13.grad.clone(), pool.w2.grad.clone()
    pool.zero_grad()

    def naive(x, routing):
        return reference_expert_mlp(x, plan_dispatch(routing), routing.weight_NK, pool.w13, pool.w2)

    naive(x + naive(x, first), second).square().sum().backward()
    torch.testing.assert_close(ours, (pool.w13.grad, pool.w2.grad), rtol=1e-4, atol=1e-5)


def test_initial_weights_are_a_normal_cut_at_three_sigma_and_follow_the_generator():
    made = [
        ExpertPool(8, 64, 32, init_std=0.02, w2_scale=0.5, generator=torch.Generator().manual_seed(7)) for _ in "ab"
    ]
    assert torch.equal(made[0].w13, made[1].w13)
    assert made[0].w13.abs().max() <= 0.06
    assert made[0].w2.abs().max() <= 0.03
    assert made[0].w13.std().item() == pytest.approx(0.02, rel=0.03)  # the cut takes 1.4 % off
    assert made[0].w2.std().item() == pytest.approx(0.01, rel=0.03)


def test_meta_pool_has_shapes_and_draws_nothing():
    with torch.device("meta"):
        pool = ExpertPool(4, 8, 6)
    assert pool.w13.is_meta
    assert pool.w13.shape == (4, 12, 8)
    assert pool.w2.shape == (4, 8, 6)


def test_upcycled_pool_computes_what_the_dense_block_did():
    g = torch.Generator().manual_seed(0)
    w13, w2, x = torch.randn(12, 8, generator=g), torch.randn(8, 6, generator=g), torch.randn(5, 8, generator=g)
    pool = ExpertPool.from_dense(w13, w2, num_experts=4)
    routing = routing_of(5, 4, 2)
    even = Routing(routing.index_NK, routing.weight_NK / routing.weight_NK.sum(-1, keepdim=True), routing.score_NE)
    gate, up = (x @ w13.t()).chunk(2, dim=-1)
    torch.testing.assert_close(pool(x, even), nn.functional.silu(gate) * up @ w2.t(), rtol=1e-5, atol=1e-4)


def test_recompute_gives_the_same_gradients():
    gradients = []
    for recompute in (False, True):
        pool = ExpertPool(4, 8, 6, init_std=0.5, generator=torch.Generator().manual_seed(0), recompute=recompute)
        x = torch.randn(10, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
        pool(x, routing_of(10, 4, 2)).square().sum().backward()
        gradients.append((x.grad, pool.w13.grad, pool.w2.grad))
    torch.testing.assert_close(*gradients)


def test_says_what_size_is_wrong():
    with pytest.raises(ConfigError, match="hidden_dim is 0; it must be at least 1"):
        ExpertPool(4, 8, 0)


def two_calls(pool, x, context):
    """A forward pass in which two layers use one pool."""
    first, second = routing_of(len(x), pool.num_experts, 2, seed=1), routing_of(len(x), pool.num_experts, 1, seed=2)
    return pool(x + pool(x, first, context=context), second, context=context)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_of_a_shared_pool_gather_in_place(backend, recompute):
    options = {"init_std": 0.5, "backend": backend, "recompute": recompute}
    pools = [
        ExpertPool(5, 16, 32, is_shared=shared, generator=torch.Generator().manual_seed(0), **options)
        for shared in (False, True)
    ]
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
    results = []
    for pool in pools:
        y = two_calls(pool, x, RoutingContext())
        inputs = (x, pool.w13, pool.w2)
        twice = [torch.autograd.grad(y.square().sum(), inputs, retain_graph=True) for _ in "ab"]
        for again, once in zip(*twice, strict=True):
            assert torch.equal(again, once)  # nothing is left over from the first
        results.append((y, *twice[0]))
    for shared, plain in zip(*results, strict=True):
        torch.testing.assert_close(shared, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_a_shared_pool_holds_one_gradient_of_its_size(backend, monkeypatch):
    pool = ExpertPool(5, 16, 32, is_shared=True, backend=backend)
    context = RoutingContext()
    y = two_calls(pool, torch.randn(40, 16), context)
    seen = []
    take = PassSums.take

    def watched(self):
        seen.append([gradient.data_ptr() for gradient in self.pair] if self.pair else None)
        return take(self)

    monkeypatch.setattr(PassSums, "take", watched)
    y.sum().backward()
    ours = [pool.w13.grad.data_ptr(), pool.w2.grad.data_ptr()]
    assert seen == [ours]  # the sums themselves, no copies


def test_a_shared_pool_under_autocast_gathers_in_the_dtype_of_its_weights():
    pools = [
        ExpertPool(5, 16, 32, init_std=0.5, is_shared=s, generator=torch.Generator().manual_seed(0)) for s in (0, 1)
    ]
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(1))
    for pool in pools:
        with torch.autocast("cpu", torch.bfloat16):
            y = two_calls(pool, x, RoutingContext())
        y.float().square().sum().backward()
    assert pools[1].w13.grad.dtype == torch.float32
    torch.testing.assert_close(pools[1].w13.grad, pools[0].w13.grad, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(pools[1].w2.grad, pools[0].w2.grad, rtol=1e-3, atol=1e-3)


def test_a_shared_pool_that_is_partly_or_wholly_frozen():
    x = torch.randn(12, 8, generator=torch.Generator().manual_seed(1), requires_grad=True)
    pool = ExpertPool(3, 8, 6, init_std=0.5, is_shared=True, generator=torch.Generator().manual_seed(0))
    two_calls(pool, x, RoutingContext()).sum().backward()
    whole, of_x = pool.w2.grad.clone(), x.grad.clone()
    for frozen in (["w13"], ["w13", "w2"]):
        pool.zero_grad()
        x.grad = None
        for name in ("w13", "w2"):
            getattr(pool, name).requires_grad_(name not in frozen)
        two_calls(pool, x, RoutingContext()).sum().backward()
        assert pool.w13.grad is None
        torch.testing.assert_close(x.grad, of_x)
        if "w2" not in frozen:
            torch.testing.assert_close(pool.w2.grad, whole)


def test_asking_for_one_gradient_of_a_shared_pool():
    pool = ExpertPool(3, 8, 6, init_std=0.5, is_shared=True, generator=torch.Generator().manual_seed(0))
    x = torch.randn(12, 8, generator=torch.Generator().manual_seed(1))
    both = torch.autograd.grad(two_calls(pool, x, RoutingContext()).sum(), (pool.w13, pool.w2))
    for weight, expected in zip((pool.w13, pool.w2), both, strict=True):
        (only,) = torch.autograd.grad(two_calls(pool, x, RoutingContext()).sum(), (weight,))
        torch.testing.assert_close(only, expected)


def test_one_expert_of_one_number_is_a_pool():
    """The least sizes that are allowed: y = w2 (silu(g) u), by hand."""
    pool = ExpertPool(1, 1, 1, init_std=0.5)
    gate, up = pool.w13[0, :, 0].tolist()
    routing = Routing(torch.tensor([[0]]), torch.tensor([[0.5]]), torch.tensor([[0.5]]))
    expected = 0.5 * pool.w2.item() * torch.nn.functional.silu(torch.tensor(2 * gate)) * 2 * up
    torch.testing.assert_close(pool(torch.tensor([[2.0]]), routing), expected.view(1, 1))


@pytest.mark.parametrize("weight_on", ["output", "input"])
@pytest.mark.parametrize("recompute", [False, True])
def test_biases_of_experts_are_added_behind_both_matrices(weight_on, recompute):
    generator = torch.Generator().manual_seed(0)
    pool = ExpertPool(
        4, 6, 5, activation="clamped_swiglu", bias=True, recompute=recompute, generator=generator
    ).double()
    for parameter in pool.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    x = torch.randn(7, 6, generator=generator, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[0, 1], [1, 2], [0, -1], [2, 1], [1, 0], [-1, -1], [2, 0]])  # none to the last
    weight = torch.rand(7, 2, generator=generator, dtype=torch.float64) * (index >= 0)
    routing = Routing(index, weight, torch.zeros(7, 4))
    y = pool(x, routing, weight_on=weight_on)
    rows = []
    for n in range(7):
        row = torch.zeros(6, dtype=torch.float64)
        for k, expert in enumerate(index[n].tolist()):
            if expert < 0:
                continue
            z = pool.w13[expert] @ (x[n] * (weight[n, k] if weight_on == "input" else 1)) + pool.b13[expert]
            gate, up = z[:5].clamp(max=7), z[5:].clamp(-7, 7)
            out = pool.w2[expert] @ ((up + 1) * gate * torch.sigmoid(1.702 * gate)) + pool.b2[expert]
            row = row + out * (1 if weight_on == "input" else weight[n, k])
        rows.append(row)
    expected = torch.stack(rows)
    torch.testing.assert_close(y, expected)
    leaves = [x, *pool.parameters()]
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64)
    for ours, wanted in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True):
        torch.testing.assert_close(ours, wanted)
    assert not pool.is_plain
