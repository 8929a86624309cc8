"""Activations of experts: every back end against a naive loop written here, in values and in all gradients."""

import math
import warnings

import pytest
import torch

from anabranch.errors import BackendError, ConfigError
from anabranch.nn.activation import ACTIVATIONS, activation_of
from anabranch.nn.grouped import BACKENDS, expert_mlp
from anabranch.nn.sums import gather_gradients
from anabranch.routing.decision import Routing
from anabranch.routing.dispatch import plan_dispatch

ITEMS, EXPERTS, PLACES, DIM, HIDDEN = 13, 5, 3, 16, 8
OTHERS = [name for name in ACTIVATIONS if name != "swiglu"]
TORCH = [name for name in BACKENDS if name != "native"]


def make(activation, dtype=torch.float64):
    """x, routing, w13, w2; some choices are unused, and the last expert is never chosen."""
    g = torch.Generator().manual_seed(0)
    score = torch.rand(ITEMS, EXPERTS, generator=g)
    score[:, -1] = -1.0
    index = score.topk(PLACES, dim=-1).indices
    routing = Routing(index, torch.rand(ITEMS, PLACES, generator=g, dtype=dtype), score)
    routing = routing.drop(torch.rand(ITEMS, PLACES, generator=g) < 0.2)
    rows = len(activation_of(activation).parts) * HIDDEN
    shapes = ((ITEMS, DIM), (EXPERTS, rows, DIM), (EXPERTS, DIM, HIDDEN))
    x, w13, w2 = (torch.randn(*shape, generator=g, dtype=dtype) for shape in shapes)
    return x, routing, w13, w2


def gelu(value):
    """u (1 + erf(u / sqrt 2)) / 2, from its definition."""
    return 0.5 * value * (1 + torch.erf(value / math.sqrt(2)))


def gelu_by_tanh(value):
    """As Hendrycks and Gimpel approximate it."""
    return 0.5 * value * (1 + torch.tanh(math.sqrt(2 / math.pi) * (value + 0.044715 * value**3)))


def clamped(gate, up):
    gate, up = torch.minimum(gate, gate.new_tensor(7.0)), up.maximum(up.new_tensor(-7.0)).minimum(up.new_tensor(7.0))
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


GATED = {
    "swiglu": lambda gate, up: gate * torch.sigmoid(gate) * up,
    "geglu": lambda gate, up: gelu(gate) * up,
    "geglu_tanh": lambda gate, up: gelu_by_tanh(gate) * up,
    "clamped_swiglu": clamped,
}
ALONE = {"gelu": gelu, "identity": lambda z: z}


def naive(x_ND, routing, weight_NK, w13, w2, activation, weight_on):
    """Item by item and choice by choice."""
    rows = []
    for n in range(len(x_ND)):
        y = x_ND.new_zeros(w2.shape[1])
        for k, expert in enumerate(routing.index_NK[n].tolist()):
            if expert < 0:
                continue
            weight = weight_NK[n, k]
            z = w13[expert] @ (x_ND[n] * weight if weight_on == "input" else x_ND[n])
            a = ALONE[activation](z) if activation in ALONE else GATED[activation](z[:HIDDEN], z[HIDDEN:])
            y = y + (w2[expert] @ a) * (1 if weight_on == "input" else weight)
        rows.append(y)
    return torch.stack(rows)


def gradients(y, leaves):
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("weight_on", ["output", "input"])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("backend", TORCH)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_a_naive_loop(activation, backend, recompute, weight_on):
    dtype = torch.float32 if backend == "grouped_mm" else torch.float64
    x, routing, w13, w2 = make(activation, dtype)
    leaves = [value.clone().requires_grad_() for value in (x, routing.weight_NK, w13, w2)]
    y = expert_mlp(
        leaves[0],
        plan_dispatch(routing),
        *leaves[1:],
        weight_on=weight_on,
        backend=backend,
        recompute=recompute,
        activation=activation,
    )
    ours = gradients(y, leaves)
    leaves = [value.double().clone().requires_grad_() for value in (x, routing.weight_NK, w13, w2)]
    expected = gradients(naive(leaves[0], routing, *leaves[1:], activation, weight_on), leaves)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-11
    for found, wanted in zip(ours, expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=tolerance, atol=tolerance)
    assert not ours[3][-1].any()
    assert not ours[4][-1].any()


@pytest.mark.parametrize("activation", OTHERS)
def test_gradients_gathered_over_calls_and_second_derivatives(activation):
    x, routing, w13, w2 = make(activation)
    plan = plan_dispatch(routing)
    leaves = [value.clone().requires_grad_() for value in (x, w13, w2)]
    sums, *shared = gather_gradients(*leaves[1:])

    def twice(first, second, sums=None):
        options = {"activation": activation, "sums": sums}
        y = expert_mlp(leaves[0], plan, routing.weight_NK, first, second, **options)
        return expert_mlp(y, plan, routing.weight_NK, first, second, **options)

    def expected():
        y = leaves[0]
        for _ in range(2):
            y = naive(y, routing, routing.weight_NK, *leaves[1:], activation, "output")
        return y

    torch.testing.assert_close(gradients(twice(*shared, sums), leaves), gradients(expected(), leaves))
    found, wanted = (
        torch.autograd.grad(
            torch.autograd.grad(y.sum(), leaves[0], create_graph=True)[0].square().sum(),
            leaves,
            materialize_grads=True,  # of a product, the gradient of x is the same for any x
        )
        for y in (twice(*leaves[1:]), expected())
    )
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("activation", OTHERS)
def test_a_compiled_graph_is_whole(activation):
    x, routing, w13, w2 = make(activation, torch.float32)
    plan, weight = plan_dispatch(routing), routing.weight_NK

    def run(x, w13):
        return expert_mlp(x * 1.0, plan, weight, w13, w2, activation=activation).square().sum()

    leaf, other = (w13.clone().requires_grad_() for _ in range(2))
    run(x, leaf).backward()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.compile(run, fullgraph=True, backend="aot_eager")(x, other).backward()
    torch.testing.assert_close(other.grad, leaf.grad)


def test_what_there_is_not():
    x, routing, w13, w2 = make("gelu")
    arguments = (x, plan_dispatch(routing), routing.weight_NK, w13, w2)
    with pytest.raises(
        ConfigError, match="activation is 'relu'; use one of swiglu, geglu, geglu_tanh, clamped_swiglu, gelu, identity"
    ):
        expert_mlp(*arguments, activation="relu")
    with pytest.raises(BackendError, match="kernels compute swiglu, not gelu; use backend 'auto'"):
        expert_mlp(*arguments, activation="gelu", backend="native")
    with pytest.raises(ConfigError, match=r"w2 has shape \[5, 16, 8\]; it must be \[5, 16, 4\]"):
        expert_mlp(*arguments, activation="geglu")
    with pytest.raises(ConfigError, match=r"w13 has shape \[5, 8, 16\]; it must be \[5, F, 7\]"):
        expert_mlp(x[:, :7], *arguments[1:], activation="gelu")


def test_matrices_of_a_feed_forward():
    assert {name: activation.num_matrices for name, activation in ACTIVATIONS.items()} == {
        "swiglu": 3,
        "geglu": 3,
        "geglu_tanh": 3,
        "clamped_swiglu": 3,
        "gelu": 2,
        "identity": 2,
    }


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_loop_differentiates_half_types_in_float32(name):
    """The gradient of a choice's weight, of the rounded hidden units that a forward pass has: exact but for one sum in float32."""
    g = torch.Generator().manual_seed(3)
    activation = ACTIVATIONS[name]
    rows = len(activation.parts) * HIDDEN
    x, w13, w2, dy = (
        torch.randn(*shape, generator=g).to(torch.bfloat16)
        for shape in ((1, DIM), (1, rows, DIM), (1, DIM, HIDDEN), (1, DIM))
    )
    weight = torch.ones(1, 1, requires_grad=True)
    routing = Routing(torch.zeros(1, 1, dtype=torch.int64), weight, torch.ones(1, 1))
    y = expert_mlp(x, plan_dispatch(routing), weight, w13, w2, backend="torch", activation=name)
    (found,) = torch.autograd.grad(y, weight, dy)
    hidden = activation.apply(torch.mm(x, w13[0].t()).double())
    expected = (torch.mm(dy, w2[0]).double() * hidden).sum()
    torch.testing.assert_close(found.double().squeeze(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_derivatives_are_those_of_autograd_at_the_limits_too(name):
    """Gates and ups of 7, -7, a step beyond them, and 0."""
    activation = ACTIVATIONS[name]
    value = torch.tensor([0.0, 7.0, -7.0, 7.5, -7.5, 6.5, -1.0], dtype=torch.float64)
    z = torch.cartesian_prod(value, value) if len(activation.parts) == 2 else value.unsqueeze(1)
    leaf = z.clone().requires_grad_()
    (expected,) = torch.autograd.grad(activation.apply(leaf).sum(), leaf)
    found, pull = activation.linearize(z)
    torch.testing.assert_close(found, activation.apply(z))
    torch.testing.assert_close(pull(torch.ones_like(found)), expected)
