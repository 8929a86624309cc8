"""Second derivatives of every operator with a backward pass of its own: in double precision by differences, in single by its plain twin."""

import pytest
import torch

from anabranch.nn import RMSNorm, kernels
from anabranch.nn.causal import attention, causal_attention
from anabranch.nn.grouped import expert_mlp, reference_expert_mlp
from anabranch.nn.pool import ExpertPool
from anabranch.nn.rotary import Rotary, rotate
from anabranch.nn.weighted import weighted_sum
from anabranch.routing.context import RoutingContext
from anabranch.routing.decision import Routing
from anabranch.routing.dispatch import plan_dispatch

SEEN = torch.tril(torch.ones(5, 5, dtype=torch.bool)) & (torch.arange(5) != 2)
SEEN[2, 2] = True


def drawn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def routing_of(num_items, num_experts, seed=0):
    score = torch.rand(num_items, num_experts, generator=torch.Generator().manual_seed(seed))
    index_NK = score.topk(2, dim=-1).indices
    index_NK[0, 1] = -1
    return Routing(index_NK, torch.ones(index_NK.shape), score)


def norm(x, weight_D):
    module = RMSNorm(x.shape[-1])
    return torch.func.functional_call(module, {"weight": weight_D}, x)


def plain_norm(x, weight_D):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight_D


def sums(weight_NC, *parts):
    return weighted_sum(parts, weight_NC)


def plain_sums(weight_NC, *parts):
    return sum(part * weight_N1 for part, weight_N1 in zip(parts, weight_NC.split(1, 1), strict=True))


def turned(x):
    return rotate(x, Rotary.Config().build(x.shape[-1])(torch.tensor([[0, 3, 900, 5, 6]]), x.dtype))


def plain_turned(x):
    cos, sin = Rotary.Config().build(x.shape[-1])(torch.tensor([[0, 3, 900, 5, 6]]), x.dtype)
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def plain_causal(query, key, value):
    front, shared = key.shape[2] - query.shape[2], query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    hidden = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(front + 1)
    logit = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    return logit.masked_fill(hidden, -torch.inf).softmax(-1) @ value


def masked(query, key, value):
    return attention(query, key, value, attn_mask=SEEN)


def plain_masked(query, key, value):
    logit = query @ key.transpose(2, 3) / query.shape[-1] ** 0.5
    return logit.masked_fill(~SEEN, -torch.inf).softmax(-1) @ value


def experts(**options):
    def run(x, weight, w13, w2):
        return expert_mlp(x, plan_dispatch(routing_of(x.shape[0], w2.shape[0])), weight, w13, w2, **options)

    return run


def plain_experts(weight_on="output"):
    def run(x, weight, w13, w2):
        plan = plan_dispatch(routing_of(x.shape[0], w2.shape[0]))
        return reference_expert_mlp(x, plan, weight, w13, w2, weight_on=weight_on)

    return run


def shared_pool(x, w13, w2):
    """Two layers with one pool."""
    pool, context = ExpertPool(w2.shape[0], x.shape[1], w2.shape[2], is_shared=True), RoutingContext()
    for seed in (1, 2):
        arguments = (x, routing_of(x.shape[0], w2.shape[0], seed))
        x = x + torch.func.functional_call(pool, {"w13": w13, "w2": w2}, arguments, {"context": context})
    return x


def plain_shared_pool(x, w13, w2):
    for seed in (1, 2):
        routing = routing_of(x.shape[0], w2.shape[0], seed)
        x = x + reference_expert_mlp(x, plan_dispatch(routing), routing.weight_NK.to(x.dtype), w13, w2)
    return x


def expert_shapes(width, hidden):
    return (6, width), (6, 2), (3, 2 * hidden, width), (3, width, hidden)


ON_INPUT = {"weight_on": "input"}
CASES = {  # ours, its twin, shapes for double precision, shapes that the kernels take
    "norm": (norm, plain_norm, [(2, 3, 5), (5,)], [(2, 3, 32), (32,)]),
    "weighted_sum": (sums, plain_sums, [(4, 2), (4, 3), (4, 3)], [(4, 2), (4, 32), (4, 32)]),
    "rotary": (turned, plain_turned, [(1, 2, 5, 4)], [(1, 2, 5, 32)]),
    "causal": (
        causal_attention,
        plain_causal,
        [(1, 2, 3, 4), *[(1, 1, 5, 4)] * 2],
        [(1, 2, 20, 16), *[(1, 1, 23, 16)] * 2],
    ),
    "masked": (masked, plain_masked, [(1, 2, 5, 4)] * 3, [(1, 2, 5, 16)] * 3),
    "experts": (experts(), plain_experts(), expert_shapes(3, 2), expert_shapes(16, 16)),
    "experts_on_input": (experts(**ON_INPUT), plain_experts(**ON_INPUT), expert_shapes(3, 2), expert_shapes(16, 16)),
    "experts_recomputed": (experts(recompute=True), plain_experts(), expert_shapes(3, 2), expert_shapes(16, 16)),
    "experts_bmm": (experts(backend="bmm"), plain_experts(), expert_shapes(3, 2), expert_shapes(16, 16)),
    "experts_torch": (experts(backend="torch"), plain_experts(), expert_shapes(3, 2), expert_shapes(16, 16)),
    "shared_pool": (
        shared_pool,
        plain_shared_pool,
        [(6, 3), (3, 4, 3), (3, 3, 2)],
        [(6, 16), (3, 32, 16), (3, 16, 16)],
    ),
}
each = pytest.mark.parametrize("name", CASES)


@each
def test_second_derivatives_by_differences(name):
    ours, _, shapes, _ = CASES[name]
    inputs = [drawn(*shape, seed=seed, dtype=torch.float64).requires_grad_() for seed, shape in enumerate(shapes)]
    assert torch.autograd.gradgradcheck(ours, inputs, fast_mode=True)


def second(function, inputs):
    """Gradients, and the gradients of their size."""
    first = torch.autograd.grad(function(*inputs).square().sum(), inputs, create_graph=True)
    return *first, *torch.autograd.grad(sum(part.square().sum() for part in first), inputs)


def assert_near(found, wanted, tolerance=1e-4):
    for part, wish in zip(found, wanted, strict=True):
        scale = max(1.0, wish.abs().max().item())
        torch.testing.assert_close(part.double() / scale, wish.double() / scale, rtol=0, atol=tolerance)


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_second_derivatives_are_those_of_the_twin(name, dtype):
    """Where compiled kernels run, when there are any, against double precision."""
    ours, twin, _, shapes = CASES[name]
    inputs = [(drawn(*shape, seed=seed) / 2).to(dtype).requires_grad_() for seed, shape in enumerate(shapes)]
    wanted = second(twin, [part.detach().double().requires_grad_() for part in inputs])
    assert_near(second(ours, inputs), wanted, 1e-4 if dtype == torch.float32 else 0.1)


@each
def test_first_derivatives_are_the_same_with_and_without_a_graph(name):
    ours, _, _, shapes = CASES[name]
    inputs = [drawn(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]
    loss = ours(*inputs).square().sum()
    without = torch.autograd.grad(loss, inputs, retain_graph=True)
    assert_near(torch.autograd.grad(loss, inputs, create_graph=True), without)
    assert all(torch.equal(*pair) for pair in zip(torch.autograd.grad(loss, inputs), without, strict=True))


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_batch_of_gradients_at_once(name, dtype):
    """What a vectorised Jacobian asks for."""
    ours, _, small, shapes = CASES[name]
    shapes = small if dtype == torch.float64 else shapes
    inputs = [drawn(*shape, seed=seed, dtype=dtype).requires_grad_() for seed, shape in enumerate(shapes)]
    y = ours(*inputs)
    dy = drawn(2, *y.shape, dtype=dtype)
    together = torch.autograd.grad(y, inputs, dy, is_grads_batched=True, retain_graph=True)
    assert not any(gradient.requires_grad for gradient in together)
    for number in range(2):
        alone = torch.autograd.grad(y, inputs, dy[number], retain_graph=True)
        assert_near([gradient[number] for gradient in together], alone)


def test_an_input_that_is_made_of_another_counts_once():
    x = drawn(4, 32).requires_grad_()
    results = []
    for function in (norm, plain_norm):
        y = function(x * 2, x.mean(0).exp())
        results.append(second(lambda x, y=y: y, [x]))
    assert_near(*results)


@pytest.mark.skipif(kernels.load() is None, reason="no compiler")
def test_rows_that_kernels_copy_into_one_piece():
    """What the kernel reads is not what came in; the graph must lead to what came in."""
    wide, weight_D = drawn(4, 64).requires_grad_(), drawn(32, seed=1).requires_grad_()
    assert_near(*(second(lambda x, w, f=f: f(x[:, ::2], w), [wide, weight_D]) for f in (norm, plain_norm)))
    weight_NC, part = drawn(2, 4).requires_grad_(), drawn(4, 64, seed=1).requires_grad_()
    assert_near(
        *(second(lambda w, x, f=f: f(w.t(), x[:, ::2], x[:, 1::2]), [weight_NC, part]) for f in (sums, plain_sums))
    )


def test_angles_that_learn_get_gradients():
    x, angle = drawn(1, 2, 5, 16), drawn(1, 1, 5, 16, seed=1).requires_grad_()
    y = rotate(x, (angle.cos(), angle.sin()))
    left, right = x.chunk(2, dim=-1)
    expected = x * angle.cos() + torch.cat((-right, left), dim=-1) * angle.sin()
    torch.testing.assert_close(*(torch.autograd.grad(value.sum(), angle) for value in (y, expected)))


def test_a_third_derivative():
    x, weight_D = drawn(3, 32, dtype=torch.float64).requires_grad_(), torch.ones(32, dtype=torch.float64)
    results = []
    for function in (norm, plain_norm):
        gradient = function(x, weight_D).pow(3).sum()
        for _ in range(3):
            (gradient,) = torch.autograd.grad(gradient, x, create_graph=True)
            gradient = gradient.square().sum()
        results.append((gradient,))
    assert_near(*results)
