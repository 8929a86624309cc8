"""What no kernel can read is computed by torch: subclasses, negative views, dual tensors, torch.func, meta."""

import pytest
import torch
from torch.autograd import forward_ad

from anabranch.errors import BackendError, InputError
from anabranch.lm import Decoder
from anabranch.nn import MoE, RMSNorm, SelfAttention, SwiGLU, kernels
from anabranch.nn.causal import causal_attention
from anabranch.nn.grouped import dense_mlp, expert_mlp
from anabranch.nn.kernels.operands import takes
from anabranch.nn.packed import Packed
from anabranch.nn.rotary import rotate
from anabranch.nn.weighted import weighted_sum
from anabranch.routing.dispatch import DispatchPlan
from anabranch.serving.fast import FastDecoder

# Torch compiles formulas of its own when it meets the first dual tensor, by a function that it has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

SHORT_KEYS = 20  # enough for the compiled attention
PLAN = DispatchPlan(torch.arange(6), torch.tensor([4, 6], dtype=torch.int32), 6, 1)
PACKED = Packed.pack(torch.randn(1, 32, 32, generator=torch.Generator().manual_seed(9)), "float32")


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def norm(x, weight_D):
    return torch.func.functional_call(RMSNorm(32), {"weight": weight_D}, (x,))


def turned(x_BHLD, cos, sin):
    return rotate(x_BHLD, (cos, sin))


def experts(x_ND, weight_NK, w13_EFD, w2_EDF):
    return expert_mlp(x_ND, PLAN, weight_NK, w13_EFD, w2_EDF)


def layer(x_BLD, w13, w2):
    """Linear layers whose parameters are no plain ones."""
    module = SwiGLU.Config(hidden_dim=32).build(32)
    return torch.func.functional_call(module, {"w13.weight": w13, "w2.weight": w2}, (x_BLD,))


angle = drawn(1, 1, 5, 16, seed=7)
ANGLES = torch.cat((angle, angle), -1)
FUNCTIONS = {
    "norm": (norm, (drawn(4, 32), drawn(32, seed=1))),
    "rotate": (turned, (drawn(2, 2, 5, 32), ANGLES.cos(), ANGLES.sin())),
    "weighted_sum": (
        lambda w, a, b: weighted_sum((a, b), w),
        (drawn(6, 2), drawn(6, 32, seed=1), drawn(6, 32, seed=2)),
    ),
    "dense_mlp": (dense_mlp, (drawn(6, 32), drawn(64, 32, seed=1) / 6, drawn(32, 32, seed=2) / 6)),
    "experts": (
        experts,
        (drawn(6, 32), drawn(6, 1, seed=1), drawn(2, 64, 32, seed=2) / 6, drawn(2, 32, 32, seed=3) / 6),
    ),
    "attention": (causal_attention, tuple(drawn(1, 2, SHORT_KEYS, 16, seed=seed) for seed in range(3))),
    "packed": (lambda x, bias: PACKED.linear(x, bias), (drawn(6, 32), drawn(32, seed=1))),
}


class Odd(torch.Tensor):
    pass


ODD = {"class": lambda value: value.as_subclass(Odd), "sign": lambda value: torch._neg_view(-value)}
CASES = [(name, place) for name, (_, values) in FUNCTIONS.items() for place in range(len(values))]
each_operand = pytest.mark.parametrize(("name", "place"), CASES)


@each_operand
@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("grad", [False, True])
def test_an_odd_operand_gives_what_a_plain_one_gives(name, place, odd, grad):
    function, values = FUNCTIONS[name]
    given = [ODD[odd](value.clone()) if at == place else value.clone() for at, value in enumerate(values)]
    assert not takes(*given)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(function(*given).as_subclass(torch.Tensor), function(*values), rtol=1e-4, atol=1e-4)


@each_operand
@pytest.mark.parametrize("odd", ODD)
def test_gradients_of_an_odd_operand_and_by_an_odd_gradient(name, place, odd):
    function, values = FUNCTIONS[name]
    if name in ("rotate", "packed") and place:
        pytest.skip("angles and packed layers do not learn")
    found = []
    for make in (lambda value: value, ODD[odd]):
        for makes_operand in (True, False):
            leaves = [value.clone().requires_grad_() for value in values]
            given = [make(leaf) if at == place and makes_operand else leaf for at, leaf in enumerate(leaves)]
            y = function(*given).as_subclass(torch.Tensor)
            gradient = drawn(*y.shape, seed=8)
            y.backward(gradient if makes_operand else make(gradient))
            found.append(leaves[place].grad.as_subclass(torch.Tensor))
    for one in found[1:]:
        torch.testing.assert_close(one, found[0], rtol=1e-4, atol=1e-4)


@each_operand
@pytest.mark.parametrize("grad", [False, True])
def test_tangents_are_the_slope(name, place, grad):
    function, values = FUNCTIONS[name]
    tangent = drawn(*values[place].shape, seed=5)
    if name == "rotate" and place:
        tangent = torch.cat((tangent[..., :16],) * 2, -1)  # as angles, both halves are the same
    with torch.set_grad_enabled(grad), forward_ad.dual_level():
        given = [forward_ad.make_dual(v, tangent) if at == place else v for at, v in enumerate(values)]
        y, slope = forward_ad.unpack_dual(function(*given))
    assert slope is not None
    step = 1e-2
    near = [function(*(v + s * tangent if at == place else v for at, v in enumerate(values))) for s in (step, -step)]
    torch.testing.assert_close(y, function(*values), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(slope, (near[0] - near[1]) / (2 * step), rtol=2e-2, atol=2e-2)


@each_operand
def test_torch_func_differentiates(name, place):
    function, values = FUNCTIONS[name]
    if name in ("rotate", "packed") and place:
        pytest.skip("angles and packed layers do not learn")

    def total(value):
        return function(*(value if at == place else other for at, other in enumerate(values))).square().sum()

    leaf = values[place].clone().requires_grad_()
    (expected,) = torch.autograd.grad(total(leaf), leaf)
    torch.testing.assert_close(torch.func.grad(total)(values[place]), expected, rtol=1e-4, atol=1e-4)
    _, slope = torch.func.jvp(total, (values[place],), (torch.ones_like(expected),))
    torch.testing.assert_close(slope, expected.sum(), rtol=1e-3, atol=1e-3)


@each_operand
def test_torch_func_batches(name, place):
    function, values = FUNCTIONS[name]
    two = torch.stack((values[place], values[place] + 1))
    found = torch.vmap(function, tuple(0 if at == place else None for at in range(len(values))))(
        *(two if at == place else value for at, value in enumerate(values))
    )
    for one, value in zip(found, two, strict=True):
        expected = function(*(value if at == place else other for at, other in enumerate(values)))
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", sorted(FUNCTIONS.keys() - {"packed", "experts"}))
def test_on_meta_there_are_shapes_alone(name):
    function, values = FUNCTIONS[name]
    y = function(*(value.to("meta") for value in values))
    assert y.is_meta
    assert y.shape == function(*values).shape


@pytest.mark.parametrize("feed_forward", [MoE.Config(num_experts=4, hidden_dim=32), SwiGLU.Config(hidden_dim=32)])
def test_a_whole_model_of_such_parameters(feed_forward):
    config = Decoder.Config(
        vocab_size=64, dim=32, num_layers=2, attention=SelfAttention.Config(num_heads=2), feed_forward=feed_forward
    )
    token_BL = torch.arange(20)[None]
    model = config.build(seed=0).eval()
    expected = model(token_BL).logits_BLV.detach()

    def loss(parameters):
        return torch.func.functional_call(model, parameters, (token_BL,)).logits_BLV.square().mean()

    parameters = dict(model.named_parameters())
    gradients = torch.func.grad(loss)({name: value.detach() for name, value in parameters.items()})
    wanted = torch.autograd.grad(loss(parameters), list(parameters.values()))
    for one, other in zip(gradients.values(), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    if kernels.load() is not None:
        assert FastDecoder.supports(model) is None
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(parameter.detach().as_subclass(Odd)))
    assert "is a Odd of float32" in FastDecoder.supports(model)
    torch.testing.assert_close(model(token_BL).logits_BLV.detach().as_subclass(torch.Tensor), expected)
    assert model.to("meta")(token_BL.to("meta")).logits_BLV.shape == expected.shape


def test_native_says_why_it_cannot():
    _, (x, weight, w13, w2) = FUNCTIONS["experts"]
    with pytest.raises(BackendError, match="take plain tensors, and w13 is a Odd of float32"):
        expert_mlp(x, PLAN, weight, w13.as_subclass(Odd), w2, backend="native")
    with forward_ad.dual_level(), pytest.raises(BackendError, match="are not differentiated forward"):
        expert_mlp(forward_ad.make_dual(x, x), PLAN, weight, w13, w2, backend="native")


def test_odd_sizes_are_told():
    with pytest.raises(InputError, match="0 parts and weights"):
        weighted_sum([], drawn(6, 2))
    with pytest.raises(InputError, match="1 parts and weights"):
        weighted_sum([drawn(6, 32)], drawn(6, 2))
    for queries in (4, 20):
        with pytest.raises(InputError, match=f"{queries} queries and 3 keys"):
            causal_attention(drawn(1, 2, queries, 16), drawn(1, 2, 3, 16), drawn(1, 2, 3, 16))
    assert causal_attention(*(drawn(1, 2, 20, 0) for _ in range(3))).shape == (1, 2, 20, 0)
