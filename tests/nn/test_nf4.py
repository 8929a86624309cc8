"""NF4: the codes by the paper's formula, rounding to the nearest, sizes, gradients, and what stays as it is."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import ConfigError
from anabranch.lm import Decoder, save_model
from anabranch.nn import MoE
from anabranch.nn.nf4 import BLOCK, GROUP, NF4, Nf4Linear, quantize_nf4
from anabranch.nn.quantize import dequantize


def quantile(share):
    return math.sqrt(2) * float(torch.erfinv(torch.tensor(2 * share - 1, dtype=torch.float64)))


def test_the_values_are_the_quantiles_of_the_paper():
    """Eight of the positive half and seven of the negative one, about the mean of 1 - 1/32 and 1 - 1/30, over the largest."""
    offset = (1 - 1 / 32 + 1 - 1 / 30) / 2
    above = [quantile(offset + (0.5 - offset) * place / 8) for place in range(8)]
    below = [-quantile(offset + (0.5 - offset) * place / 7) for place in range(7)]
    values = torch.tensor(sorted([*above, 0.0, *below]), dtype=torch.float64)
    torch.testing.assert_close(values / values.max(), torch.tensor(NF4, dtype=torch.float64), rtol=0, atol=1e-6)


def test_a_block_by_hand():
    weight = torch.zeros(1, BLOCK)
    weight[0, :4] = torch.tensor([2.0, -2.0, 0.3, -0.1])
    layer = Nf4Linear(weight, double=False)
    # Over 2: 1, -1, 0.15 (nearest 0.1609), -0.05 (nearest -0.0911, half way is -0.0455).
    expected = torch.zeros(1, BLOCK)
    expected[0, :4] = 2 * torch.tensor([1.0, -1.0, NF4[9], NF4[6]])
    torch.testing.assert_close(layer.weight_in(torch.float32), expected)


@given(st.integers(1, 40), st.integers(1, 70), st.integers(0, 2**31), st.booleans())
def test_each_weight_is_the_nearest_value_of_its_block(rows, columns, seed, double):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    layer = Nf4Linear(weight, double=double)
    made = layer.weight_in(torch.float32)
    assert made.shape == weight.shape
    flat = F.pad(weight.flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK)
    most = flat.abs().amax(1, keepdim=True)
    # The widest gap of the table, halved; the scale itself is off by an eighth of a bit in E4M3 of what it is from the mean.
    spread = (most - most.mean()).abs().max() if double else torch.tensor(0.0)
    slack = 0.5 * (NF4[1] - NF4[0]) * most + spread / 16 + 1e-6
    off = F.pad((made - weight).flatten(), (0, -weight.numel() % BLOCK)).view(-1, BLOCK).abs()
    assert bool((off <= slack).all())
    if not double:
        gap = (flat[:, :, None] / most.clamp_min(1e-30)[:, :, None] - torch.tensor(NF4)).abs().amin(2) * most
        torch.testing.assert_close(
            off[off > 0].max() if (off > 0).any() else off.max(), gap.max(), rtol=1e-4, atol=1e-6
        )


def test_sizes_are_those_of_the_paper():
    numbers = 512 * 512
    single, double = (Nf4Linear(torch.randn(512, 512), double=double) for double in (False, True))
    assert single.size_bytes == numbers // 2 + 4 * numbers // BLOCK
    assert double.size_bytes == numbers // 2 + numbers // BLOCK + 4 * numbers // (BLOCK * GROUP) + 4
    assert 8 * double.size_bytes / numbers == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
def test_products_and_gradients_are_those_of_the_matrix(dtype, bias):
    plain = torch.nn.Linear(48, 20, bias=bias)
    layer = Nf4Linear(plain.weight, plain.bias)
    weight, shift = layer.weight_in(dtype), None if layer.bias is None else layer.bias.to(dtype)
    x = torch.randn(2, 3, 48, dtype=dtype, requires_grad=True)
    other = x.detach().clone().requires_grad_()
    made, wanted = layer(x), F.linear(other, weight, shift)
    torch.testing.assert_close(made, wanted)
    dy = torch.randn_like(made)
    made.backward(dy)
    wanted.backward(dy)
    torch.testing.assert_close(x.grad, other.grad)
    assert not [one for one in layer.parameters() if one.requires_grad]


def test_nothing_of_the_matrix_is_kept_between_the_passes():
    kept = []
    layer, x = Nf4Linear(torch.randn(64, 64)), torch.randn(4, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: kept.append(tensor.numel()) or tensor, lambda one: one
    ):
        layer(x).sum().backward()
    assert kept == []


def test_under_autocast_gradients_have_the_type_of_what_came_in():
    layer, x = Nf4Linear(torch.randn(32, 64)), torch.randn(4, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == torch.float32


def test_a_model_keeps_its_routers_experts_embedding_and_head():
    model = Decoder.Config(
        vocab_size=61, dim=32, num_layers=2, feed_forward=MoE.Config(num_experts=4, hidden_dim=16)
    ).build(seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    token_BL = torch.tensor([[1, 2, 3, 4]])
    names = quantize_nf4(model)
    assert names
    assert all(".attention." in name for name in names)
    logits = model(token_BL).logits_BLV
    for name, value in model.named_parameters():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)
    dequantize(model)
    torch.testing.assert_close(model(token_BL).logits_BLV, logits, rtol=1e-4, atol=1e-4)
    assert {name: value.shape for name, value in model.state_dict().items()} == {
        name: value.shape for name, value in before.items()
    }


def test_what_cannot_be(tmp_path):
    model = Decoder.Config(vocab_size=61, dim=32, num_layers=1).build(seed=0)
    with torch.no_grad():
        model.blocks[0].attention.out.weight[0, 0] = torch.nan
    with pytest.raises(ConfigError, match=r"attention\.\w+ has weights that are no numbers"):
        quantize_nf4(model)
    assert not [one for one in model.modules() if isinstance(one, Nf4Linear)]
    with pytest.raises(ConfigError, match="no linear layer that can be in NF4"):
        quantize_nf4(torch.nn.Sequential(torch.nn.Linear(32, 2)))
    model = Decoder.Config(vocab_size=61, dim=32, num_layers=1).build(seed=0)
    quantize_nf4(model)
    with pytest.raises(ConfigError, match="NF4, in which models are adapted and not saved"):
        save_model(tmp_path / "m", model)


@pytest.mark.parametrize("double", [True, False])
def test_weights_whose_sum_is_beyond_floats_are_kept(double):
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    small, large = (Nf4Linear(scale * weight, double=double).weight_in(torch.float32) / scale for scale in (1.0, 1e38))
    torch.testing.assert_close(large, small)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
def test_a_matrix_with_one_weight_that_is_no_number_is_refused(odd, double):
    weight = torch.ones(64, 256)
    # In another block than the mean of all would be made of first.
    weight[63, 255] = odd
    with pytest.raises(ConfigError, match="weights are not finite, for which NF4 has no code"):
        Nf4Linear(weight, double=double)


def test_what_is_replaced_stays_in_training_or_in_evaluation():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(64, 64), "b": torch.nn.Linear(64, 64).eval()})
    quantize_nf4(model)
    assert [model[name].training for name in "ab"] == [True, False]
