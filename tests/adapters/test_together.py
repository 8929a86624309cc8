"""LoRA with the frozen matrix that it stands beside: against the layers one by one, finite differences, and what it must leave to them."""

import pytest
import torch
from torch import nn

from anabranch.adapters.low_rank import LowRank
from anabranch.adapters.together import Adapted, can_go_together, together
from anabranch.nn import BuildContext, Dense
from anabranch.nn.linear import Added, Linear, Projection

PARTS = {"q": 6, "k": 3, "v": 4}


def added(names=("q", "v"), *, dropout=0.0, bias=True, dtype=torch.float64, of=torch.float64):
    """A frozen matrix of three parts, with LoRA beside some."""
    generator = torch.Generator().manual_seed(0)
    context = BuildContext(8, generator=generator)
    projection = Projection("blocks.0.attention.qkv", 8, sum(PARTS.values()), bias=bias, parts=PARTS)
    ranks = {"q": 2, "k": 1, "v": 3}
    layers = {
        name: LowRank.Config(rank=ranks[name], alpha=3.0, dropout=dropout).build(projection.part(name), context)
        for name in names
    }
    for layer in layers.values():
        layer.b.data.normal_(generator=generator)
    matrix = Dense(Dense.Config(), projection, context).requires_grad_(False)
    if bias:
        matrix.bias.normal_(generator=generator)
    made = Added(matrix, layers, PARTS)
    made.matrix.to(of)
    made.beside.to(dtype)
    return made


def one_by_one(layer, x):
    """What the matrix makes, and each part's `forward`, put together."""
    parts = layer.matrix(x).split(list(PARTS.values()), -1)
    made = [
        part + layer.beside[name](x).to(part.dtype) if name in layer.beside else part
        for name, part in zip(PARTS, parts, strict=True)
    ]
    return torch.cat(made, -1)


def inputs(*shape, dtype=torch.float64):
    return torch.randn(*shape, 8, generator=torch.Generator().manual_seed(1), dtype=dtype)


def is_together(y):
    return "Together" in type(y.grad_fn).__name__


# More items than are gone through at a time, fewer, one and none.
@pytest.mark.parametrize("shape", [(2, 300), (3, 5), (1, 1), (2, 0), (7,)])
@pytest.mark.parametrize("names", [("q", "v"), ("q", "k", "v"), ("k",)])
def test_values_and_gradients_are_those_of_the_layers_one_by_one(names, shape):
    layer, x = added(names), inputs(*shape).requires_grad_()
    leaves = [x, *layer.beside.parameters()]
    found, wanted = layer(x), one_by_one(layer, x)
    assert is_together(found)
    torch.testing.assert_close(found, wanted)
    dy = torch.randn(found.shape, generator=torch.Generator().manual_seed(2), dtype=found.dtype)
    for ours, theirs in zip(
        torch.autograd.grad(found, leaves, dy), torch.autograd.grad(wanted, leaves, dy), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("learns", [("x",), ("b1",), ("a2",), ("a1", "b2"), ("x", "b1", "b2")])
def test_some_gradients_alone(learns):
    layer = added()
    halves = [half.detach() for name in ("q", "v") for half in (layer.beside[name].a, layer.beside[name].b)]
    given = dict(zip(("x", "a1", "b1", "a2", "b2"), [inputs(2, 3), *halves], strict=True))
    leaves = [given[name].requires_grad_() for name in learns]
    parts = [Adapted(0, 6, 1.5, 2), Adapted(9, 4, 1.0, 3)]
    x, a1, b1, a2, b2 = given.values()
    weight, bias = layer.matrix.weight, layer.matrix.bias
    found = together(x, weight, bias, parts, [(a1, b1), (a2, b2)])
    wanted = x @ weight.T + bias + torch.cat([1.5 * (x @ a1.T @ b1.T), x.new_zeros(2, 3, 3), x @ a2.T @ b2.T], -1)
    torch.testing.assert_close(found, wanted)
    for ours, theirs in zip(
        torch.autograd.grad(found.square().sum(), leaves),
        torch.autograd.grad(wanted.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_gradients_of_any_order():
    layer, x = added(("q", "v")), inputs(2, 2).requires_grad_()
    matrix, parts = layer.matrix, [Adapted(0, 6, 1.5, 2), Adapted(9, 4, 1.0, 3)]
    halves = [half for name in ("q", "v") for half in (layer.beside[name].a, layer.beside[name].b)]

    def run(x, a1, b1, a2, b2):
        return together(x, matrix.weight, matrix.bias, parts, [(a1, b1), (a2, b2)])

    assert torch.autograd.gradcheck(run, (x, *halves))
    assert torch.autograd.gradgradcheck(run, (x, *halves))


def test_adapters_in_float32_beside_a_model_in_bfloat16():
    """The product is made in float32 and rounded once; x is not kept in it."""
    layer = added(dtype=torch.float32, of=torch.bfloat16)
    x = inputs(2, 300, dtype=torch.bfloat16).requires_grad_()
    leaves = [x, *layer.beside.parameters()]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        found = layer(x)
    assert is_together(found)
    assert found.dtype == torch.bfloat16
    assert not any(value.dtype == torch.float32 and value.shape[-1] == 8 and len(value) > 3 for value in kept)
    wide = added()
    wide.load_state_dict(layer.state_dict())
    exact = one_by_one(wide, x.double())
    product = layer.matrix(x).double() - wide.matrix(x.double())
    # Two roundings to 8 bits: that of the matrix's product, and the last.
    torch.testing.assert_close(found.double(), exact + product, rtol=2**-8 + 1e-5, atol=1e-4)
    dy = torch.randn(found.shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    ours = torch.autograd.grad(found, leaves, dy)
    theirs = torch.autograd.grad(exact, [x, *wide.beside.parameters()], dy.double())
    assert [gradient.dtype for gradient in ours] == [torch.bfloat16, *[torch.float32] * 4]
    torch.testing.assert_close(ours[0].double(), theirs[0].double(), rtol=2**-6, atol=5e-2)
    for own, other in zip(ours[1:], theirs[1:], strict=True):
        torch.testing.assert_close(own.double(), other, rtol=1e-4, atol=1e-3)


class Half(LowRank):
    """Half of what LoRA adds."""

    def forward(self, x, context=None):
        return super().forward(x, context) / 2


def test_what_is_left_to_the_layers():
    x = inputs(2, 3)

    def check(layer):
        found = layer(x)
        assert not is_together(found)
        torch.manual_seed(0)
        wanted = one_by_one(layer, x)
        torch.manual_seed(0)
        torch.testing.assert_close(layer(x), wanted)

    check(added(dropout=0.5).train())
    assert is_together(added(dropout=0.5).eval()(x))
    learns = added()
    learns.matrix.weight.requires_grad_()
    check(learns)
    # Of an A that does not learn x is not kept.
    fixed = added()
    fixed.beside["v"].a.requires_grad_(False)
    check(fixed)
    heard, calls = added(), []
    heard.beside["v"].register_forward_hook(lambda *_: calls.append(1))
    check(heard)
    assert calls
    watched, seen = added(), []
    watched.matrix.register_forward_hook(lambda module, args, y: seen.append(y))
    check(watched)
    assert seen
    projection = Projection("q", 8, 6, parts={"q": 6})
    own = Half(LowRank.Config(rank=2), projection, BuildContext(8)).double()
    own.b.data.normal_()
    changed = added()
    changed.beside["q"] = own
    check(changed)
    alone = added(("q",))
    alone.beside["q"] = own
    check(alone)
    several = added()
    several.beside["q"] = nn.Linear(8, 6).double()
    check(several)


def test_layers_of_any_class_go_each_for_itself_unless_they_say():
    assert Linear.together(None, {}, {}, None) is None


def test_what_it_takes():
    x, y, a = inputs(5, 3), torch.zeros(5, 3, 6, dtype=torch.float64), torch.zeros(2, 3, 4, 2, dtype=torch.float64)
    assert can_go_together(x, y, a)
    assert not can_go_together(x.float(), y, a)
    assert not can_go_together(x, y.float(), a)
    assert can_go_together(x.float(), y.float(), a)
    assert not can_go_together(x, y, a.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert not can_go_together(x, y, a)
    seen = []
    torch.func.vmap(lambda row: seen.append(can_go_together(row, y, a)) or row)(x)
    assert seen == [False]
