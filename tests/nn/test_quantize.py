"""Quantised modules: what is replaced, how far results may move, and the way back."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from anabranch.errors import ConfigError
from anabranch.experts.rexmoe import ReXMoE
from anabranch.lm.decoder import Decoder
from anabranch.nn import Dense, ExpertPool, MoE, SelfAttention, SwiGLU
from anabranch.nn.activation import ACTIVATIONS
from anabranch.nn.kernels import packed as native
from anabranch.nn.quantize import QuantizedLinear, QuantizedPool, dequantize, quantizable, quantize
from anabranch.routing import Router, TopK
from anabranch.routing.context import RoutingContext
from anabranch.routing.decision import Routing


def decoder(feed_forward=None, **fields):
    config = Decoder.Config(
        vocab_size=64,
        dim=64,
        num_layers=2,
        attention=SelfAttention.Config(num_heads=2, qkv_bias=True),
        feed_forward=feed_forward or SwiGLU.Config(hidden_dim=96),
        **fields,
    )
    model = config.build(seed=3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)  # initial weights are so small that nothing shows
    return model


MODELS = {
    "dense": lambda: decoder(),
    "tied": lambda: decoder(tie_embeddings=True),
    "moe": lambda: decoder(MoE.Config(num_experts=4, hidden_dim=32, shared_experts=1, shared_gate=True)),
    "shared pool": lambda: decoder(ReXMoE.Config(num_experts=4, hidden_dim=32, reuse=2)),
}
TOKENS = torch.arange(40).view(2, 20)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("bits", "most"), [("int8", 0.03), ("int4", 0.2)])
@torch.no_grad()
def test_logits_stay_near(name, bits, most):
    model = MODELS[name]()
    before = model(TOKENS).logits_BLV
    replaced = quantize(model, bits)
    assert "head" in replaced
    assert not any(isinstance(module, ExpertPool) for module in model.modules())
    found = model(TOKENS).logits_BLV
    assert 0 < (found - before).norm() / before.norm() < most


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_the_way_back(name):
    model = MODELS[name]()
    names = {name: parameter.shape for name, parameter in model.named_parameters()}
    quantize(model, "int4", head=None)
    found = model(TOKENS).logits_BLV
    dequantize(model)
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == names
    again = model(TOKENS).logits_BLV
    assert (again - found).norm() / found.norm() < 0.02  # activations are no longer rounded


def test_what_stays():
    model = decoder(MoE.Config(num_experts=4, hidden_dim=40, shared_experts=1, shared_gate=True))
    replaced = quantize(model, "int4", head=None, skip=("blocks.0.attention",))
    block = model.blocks[1]
    parts = [
        "attention.out",
        "attention.qkv",
        "feed_forward.shared.w13",
    ]  # the others have 40 inputs, no multiple of 32
    assert sorted(replaced) == ["blocks.0.feed_forward.shared.w13", *(f"blocks.1.{part}" for part in parts)]
    assert type(block.feed_forward.experts) is ExpertPool
    assert type(block.feed_forward.shared.w2) is Dense
    assert type(block.feed_forward.shared_gate) is Dense
    assert type(block.feed_forward.router.score.weight) is nn.Parameter
    assert type(model.head) is Dense


def test_a_group_that_does_not_divide_becomes_smaller():
    model = nn.Sequential(nn.Linear(128, 16), nn.Linear(96, 16))
    quantize(model, "int4", group=64)
    assert [layer.packed.group for layer in model] == [64, 32]


@pytest.mark.parametrize(("bits", "group", "message"), [("int3", None, "int3"), ("int4", 40, "multiple of 32")])
def test_errors(bits, group, message):
    with pytest.raises(ConfigError, match=message):
        quantize(nn.Linear(64, 64), bits, group=group)


def test_casts_leave_quantised_weights_alone():
    layer = QuantizedLinear.of(nn.Linear(64, 32), "int4", group=32)
    before = layer.data.clone()
    layer.to(torch.bfloat16)
    assert layer.data.dtype == torch.uint8
    assert torch.equal(layer.data, before)
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert layer(x).shape == (3, 5, 32)
    assert layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize(("bits", "group"), [("int8", None), ("int8", 32), ("int4", 32), ("int4", 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_plain_torch_computes_with_the_same_weights(bits, group, dtype, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    linear = nn.Linear(128, 48)
    layer = QuantizedLinear.of(linear, bits, group=group)
    x = torch.randn(7, 128, generator=generator).to(dtype)
    monkeypatch.setattr(native, "load", lambda: None)
    wanted = nn.functional.linear(x.float(), layer.packed.unpack()[0], layer.bias)
    assert torch.allclose(layer(x).float(), wanted, atol=1e-4 if dtype == torch.float32 else 0.03)


def test_gradients_reach_inputs():
    layer = QuantizedLinear.of(nn.Linear(64, 32), "int8")
    x = torch.randn(4, 64, requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, layer.packed.unpack()[0].sum(0).expand(4, -1), atol=1e-5)


@pytest.mark.parametrize("weight_on", ["output", "input"])
@torch.no_grad()
def test_a_pool_is_its_dequantised_self(weight_on):
    generator = torch.Generator().manual_seed(2)
    pool = ExpertPool(4, 64, 96, init_std=0.1, generator=generator)
    model = nn.ModuleDict({"pool": pool})
    router = Router.Config(select=TopK.Config(top_k=2)).build(64, 4, generator=generator)
    x_ND = torch.randn(9, 64, generator=generator)
    routing = router(x_ND, RoutingContext())
    quantize(model, "int8")
    assert isinstance(model["pool"], QuantizedPool)
    assert (model["pool"].num_experts, model["pool"].dim, model["pool"].hidden_dim) == (4, 64, 96)
    found = model["pool"](x_ND, routing, weight_on=weight_on)
    dequantize(model)
    assert torch.allclose(found, model["pool"](x_ND, routing, weight_on=weight_on), atol=0.02)


@pytest.mark.parametrize(
    ("bits", "group", "expected"), [("int8", None, 96), ("int4", None, 32), ("int8", 32, 32), ("int4", 96, 96)]
)
def test_groups_that_share_a_scale(bits, group, expected):
    """int8 has one scale a row and int4 one for 32 weights, if nothing else is asked for."""
    model = nn.Sequential(nn.Linear(96, 16))
    quantize(model, bits, group=group)
    assert model[0].packed.group == expected


@pytest.mark.parametrize("bits", ["int8", "int4"])
@torch.no_grad()
def test_without_kernels_each_type_of_activations_has_its_form(bits, monkeypatch):
    monkeypatch.setattr(native, "can", lambda *_: False)
    model = nn.Sequential(nn.Linear(64, 32))
    quantize(model, bits)
    x = torch.randn(5, 64)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        expected = nn.functional.linear(x.to(dtype).float(), model[0].packed.unpack()[0], model[0].bias.float())
        found = model(x.to(dtype))
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)


@given(st.sampled_from([32, 64, 96, 10**9 // 32 * 32, 2**62]) | st.integers(1, 12).map(lambda part: 32 * part))
def test_a_group_is_the_widest_that_divides_every_depth(group):
    with torch.device("meta"):
        model = nn.ModuleDict({"linear": nn.Linear(96, 16), "pool": ExpertPool(2, 192, 320)})
    found = quantizable(model, "int4", group=group)
    for name, depths in (("linear", (96,)), ("pool", (192, 320))):
        parts = [part for part in range(32, min(group, *depths) + 1, 32) if not any(depth % part for depth in depths)]
        assert found[name] == ("int4", max(parts))


@pytest.mark.parametrize("group", [0, 16, 48])
def test_a_group_is_a_multiple_of_what_kernels_take_at_once(group):
    with pytest.raises(ConfigError, match=f"group is {group}; it must be a multiple of 32"):
        quantize(nn.Sequential(nn.Linear(96, 16)), "int4", group=group)


@pytest.mark.parametrize("is_compiled", [True, False])
@pytest.mark.parametrize("bits", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_no_rows_give_none_in_the_shape_of_rows(dtype, bits, is_compiled, monkeypatch):
    layer = QuantizedLinear.of(nn.Linear(64, 48), bits, group=32 if bits == "int4" else None)
    pool = QuantizedPool.of(ExpertPool(4, 64, 32), bits, group=32)
    if not is_compiled:
        monkeypatch.setattr(native, "load", lambda: None)
    assert layer(torch.empty(1, 0, 64, dtype=dtype)).shape == (1, 0, 48)
    assert layer(torch.empty(0, 64, dtype=dtype)).shape == (0, 48)
    index_NK = torch.empty(0, 2, dtype=torch.int64)
    routing = Routing(index_NK, torch.empty(0, 2, dtype=dtype), torch.empty(0, 4, dtype=dtype))
    assert pool(torch.empty(0, 64, dtype=dtype), routing).shape == (0, 64)


@given(
    st.sampled_from(sorted(ACTIVATIONS)),
    st.booleans(),
    st.sampled_from(["int8", "int4"]),
    st.sampled_from(["input", "output"]),
    st.integers(1, 4),
)
def test_a_pool_of_any_kind_is_rounded_in_its_matrices_alone(activation, has_bias, bits, weight_on, num_experts):
    generator = torch.Generator().manual_seed(num_experts)
    pool = ExpertPool(
        num_experts, 64, 32, activation=activation, bias=has_bias, init_std=0.3, generator=generator
    ).requires_grad_(False)
    for bias in (pool.b13, pool.b2) if has_bias else ():
        bias.normal_(generator=generator)
    rounded = QuantizedPool.of(pool, bits)
    assert (rounded.num_experts, rounded.dim, rounded.hidden_dim) == (num_experts, 64, 32)
    assert rounded.is_plain == pool.is_plain
    index_NK = torch.arange(5).view(5, 1) % num_experts
    routing = Routing(index_NK, torch.rand(5, 1, generator=generator), torch.empty(5, num_experts))
    # Of a gradient, weights are unpacked and activations are not rounded.
    x_ND = torch.randn(5, 64, generator=generator).requires_grad_()
    found = rounded(x_ND, routing, weight_on=weight_on)
    pool.w13, pool.w2 = (nn.Parameter(packed.unpack()) for packed in rounded.packed)
    torch.testing.assert_close(found, pool(x_ND, routing, weight_on=weight_on), rtol=1e-4, atol=1e-4)
    # What is rounded has biases of its own.
    assert not has_bias or rounded.b13.data_ptr() != pool.b13.data_ptr()


def with_layers(pool):
    pool.layers = object()


def elsewhere(pool):
    pool.exchange = object()


@pytest.mark.parametrize(("change", "message"), [(with_layers, "linears of their own"), (elsewhere, "other processes")])
def test_a_pool_of_more_than_its_matrices_is_not_rounded(change, message):
    pool = ExpertPool(3, 64, 32)
    change(pool)
    with pytest.raises(ConfigError, match=message):
        QuantizedPool.of(pool, "int8")
