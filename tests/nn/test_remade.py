"""Products through matrices that are made anew: the same numbers and gradients, and nothing of their size kept between the passes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from anabranch.lm import Decoder
from anabranch.nn import MoE, SelfAttention
from anabranch.nn.kernels import packed as packed_kernels
from anabranch.nn.nf4 import Nf4Linear
from anabranch.nn.packed import Packed
from anabranch.nn.parted import PartedLinear
from anabranch.nn.quantize import QuantizedLinear, dequantize, quantize
from anabranch.nn.remade import linear_remade

ROWS, DEPTH = 64, 96


def layers():
    plain = nn.Linear(DEPTH, ROWS)
    half = Packed.pack(plain.weight[: ROWS // 2], "int8"), Packed.pack(plain.weight[ROWS // 2 :], "int4", group=32)
    return {
        "int8": QuantizedLinear.of(plain, "int8"),
        "int4": QuantizedLinear.of(plain, "int4", group=32),
        "parts": PartedLinear(half, plain.bias.detach()),
        "nf4": Nf4Linear(plain.weight, plain.bias),
    }


def test_by_hand():
    weight, x = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0, 6.0]], requires_grad=True)
    asked = []
    y = linear_remade(x, lambda dtype: asked.append(dtype) or weight.to(dtype), torch.tensor([10.0, 20.0]))
    # 5 + 12 + 10, 15 + 24 + 20; and 1 + 3, 2 + 4.
    assert y.tolist() == [[27.0, 59.0]]
    y.sum().backward()
    assert x.grad.tolist() == [[4.0, 6.0]]
    assert asked == [torch.float32] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", layers())
def test_gradients_are_those_of_the_numbers_and_no_matrix_is_kept(name, dtype):
    layer, kept = layers()[name], []
    x = torch.randn(5, DEPTH).to(dtype).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one.numel()) or one, lambda one: one):
        y = layer(x)
    assert max(kept, default=0) < ROWS * DEPTH
    wanted = F.linear(x, layer.weight_in(dtype), layer.bias.to(dtype))
    assert torch.equal(y, wanted)
    (found,), (right,) = (torch.autograd.grad(one.square().sum(), x) for one in (y, wanted))
    assert torch.equal(found, right)


def test_a_bias_that_learns_has_its_gradient():
    weight, bias = torch.randn(ROWS, DEPTH), torch.randn(ROWS, requires_grad=True)
    x = torch.randn(2, 5, DEPTH, requires_grad=True)
    found, wanted = (
        torch.autograd.grad(y.square().sum(), (x, bias))
        for y in (linear_remade(x, weight.to, bias), F.linear(x, weight, bias))
    )
    torch.testing.assert_close(found, wanted)
    # Either alone, where the other is not asked for.
    (alone,) = torch.autograd.grad(linear_remade(x.detach(), weight.to, bias).square().sum(), bias)
    torch.testing.assert_close(alone, wanted[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("is_cast", [True, False])
def test_gradients_have_the_types_of_what_they_are_of(dtype, is_cast):
    weight, bias = torch.randn(ROWS, DEPTH), torch.randn(ROWS, requires_grad=True)
    x = torch.randn(5, DEPTH).to(dtype).requires_grad_()
    found, wanted = [], []
    for told, call in (
        (found, linear_remade),
        (wanted, lambda x, make, bias: F.linear(x, make(x.dtype), bias.to(x.dtype))),
    ):
        with torch.autocast("cpu", torch.bfloat16, enabled=is_cast):
            loss = call(x, weight.to, bias).float().square().sum()
        told += torch.autograd.grad(loss, (x, bias))
    assert [one.dtype for one in found] == [dtype, torch.float32]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2 if is_cast or dtype == torch.bfloat16 else 1e-5, atol=1e-3)


@pytest.mark.parametrize("has_kernels", [True, False])
@pytest.mark.parametrize("name", layers())
def test_a_bias_that_learns_behind_what_does_not_has_its_gradient(name, has_kernels, monkeypatch):
    """As in a first layer, where compiled products of few bits would do but for that."""
    if not has_kernels:
        monkeypatch.setattr(packed_kernels, "load", lambda: None)
    layer, x = layers()[name], torch.randn(2, 5, DEPTH)
    layer.bias.requires_grad_()
    (found,) = torch.autograd.grad(layer(x).square().sum(), layer.bias)
    (wanted,) = torch.autograd.grad(F.linear(x, layer.weight_in(x.dtype), layer.bias).square().sum(), layer.bias)
    torch.testing.assert_close(found, wanted)
    # Nothing is kept for a gradient that is not asked for.
    with torch.no_grad():
        assert layer(x).grad_fn is None


# Of torch's own.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("name", layers())
def test_transforms_of_functions_are_those_of_the_numbers(name):
    """Tangents, gradients by row, and gradients of gradients, as of a layer whose matrix is kept."""
    layer = layers()[name]
    x, tangent = torch.randn(4, DEPTH), torch.randn(4, DEPTH)
    plain = lambda x: F.linear(x, layer.weight_in(x.dtype), layer.bias.to(x.dtype))  # noqa: E731
    loss = lambda call: lambda x: call(x).square().sum()  # noqa: E731
    for transform in (
        lambda call: torch.func.jvp(call, (x,), (tangent,)),
        lambda call: torch.func.grad(loss(call))(x),
        lambda call: torch.func.vmap(torch.func.grad(loss(call)))(x),
        lambda call: torch.func.vmap(lambda row: torch.func.jvp(call, (row,), (tangent[0],)))(x),
        lambda call: torch.func.jvp(torch.func.grad(loss(call)), (x,), (tangent,)),
    ):
        torch.testing.assert_close(transform(layer), transform(plain))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tangents_of_a_bias_come_with_those_of_what_goes_in_and_alone(dtype):
    """The bias is kept in float32, and the product is in the type of what goes in."""
    weight, bias, of_bias = torch.randn(ROWS, DEPTH), torch.randn(ROWS), torch.randn(ROWS)
    x, tangent = torch.randn(4, DEPTH).to(dtype), torch.randn(4, DEPTH).to(dtype)
    ours = lambda x, bias: linear_remade(x, weight.to, bias)  # noqa: E731
    plain = lambda x, bias: F.linear(x, weight.to(dtype), bias.to(dtype))  # noqa: E731
    for part, given, tangents in (
        (lambda call: call, (x, bias), (tangent, of_bias)),
        (lambda call: lambda bias: call(x, bias), (bias,), (of_bias,)),
        (lambda call: lambda x: call(x, bias), (x,), (tangent,)),
    ):
        found, wanted = (torch.func.jvp(part(call), given, tangents) for call in (ours, plain))
        assert found[1].dtype == wanted[1].dtype == dtype
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_a_mixture_in_few_bits_has_the_gradients_of_its_numbers_and_keeps_no_matrix(bits):
    model = (
        Decoder.Config(
            vocab_size=64,
            dim=64,
            num_layers=2,
            attention=SelfAttention.Config(num_heads=2),
            init_std=0.2,
            feed_forward=MoE.Config(num_experts=4, hidden_dim=32),
        )
        .build(seed=0)
        .eval()
        .requires_grad_(False)
    )
    quantize(model, bits)
    tokens, kept = torch.arange(20)[None], []
    delta = torch.zeros(1, 20, 64, requires_grad=True)
    handle = model.embedding.register_forward_hook(lambda module, given, made: made + delta)
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one.shape) or one, lambda one: one):
        loss = model(tokens, tokens).loss
    (found,) = torch.autograd.grad(loss, delta)
    assert not [shape for shape in kept if shape[-2:] in ((64, 64), (192, 64), (64, 32), (32, 64))]
    dequantize(model)
    model.requires_grad_(False)
    (right,) = torch.autograd.grad(model(tokens, tokens).loss, delta)
    handle.remove()
    torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-6)
