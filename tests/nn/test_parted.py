"""Rows in several forms, each in its own: what the parts give alone, in torch and in kernels."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from anabranch.errors import ConfigError, InputError
from anabranch.nn import kernels
from anabranch.nn.kernels import packed as native
from anabranch.nn.packed import Packed
from anabranch.nn.parted import PartedLinear
from anabranch.nn.quantize import QuantizedLinear, dequantize
from packed_parts import DEPTH, FORMS, part_of

needs_kernels = pytest.mark.skipif(kernels.load() is None, reason="no compiler")


def test_by_hand():
    """Two parts of one weight that is not 0, of 2 and of 3; 16 rows each."""
    weights = torch.zeros(2, 16, 32)
    weights[0, 5, 7], weights[1, 2, 9] = 2.0, 3.0
    layer = PartedLinear([Packed.pack(weights[0], "int8"), Packed.pack(weights[1], "int8")], torch.arange(32.0))
    x = torch.zeros(1, 32)
    x[0, 7], x[0, 9] = 10.0, 10.0
    wanted = torch.arange(32.0)
    wanted[5] += 20
    wanted[16 + 2] += 30
    assert (layer.in_features, layer.out_features, len(layer.parts)) == (32, 32, 2)
    torch.testing.assert_close(layer(x)[0], wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
@torch.inference_mode()
def test_each_part_gives_what_it_gives_alone(has_bias, dtype):
    parts = [part_of(16 * (1 + number), form, number) for number, form in enumerate(FORMS)]
    bias = torch.randn(sum(part.rows for part in parts)) if has_bias else None
    x = torch.randn(2, 3, DEPTH).to(dtype)
    biases = [None] * len(parts) if bias is None else bias.split([part.rows for part in parts])
    alone = [QuantizedLinear(part, own)(x) for part, own in zip(parts, biases, strict=True)]
    assert torch.equal(PartedLinear(parts, bias)(x), torch.cat(alone, dim=-1))


@needs_kernels
@given(
    rows=st.lists(st.tuples(st.integers(1, 4), st.sampled_from(FORMS)), min_size=1, max_size=4),
    last=st.integers(1, 16),
    count=st.integers(1, 30),
    threads=st.integers(1, 3),
)
def test_a_chain_of_parts_is_computed_as_the_parts_are(rows, last, count, threads):
    """By the kernel of one matrix that is told of all; the last part may end within a panel."""
    parts = [part_of(16 * panels, form, number) for number, (panels, form) in enumerate(rows)]
    parts.append(part_of(last, "int8", 9))
    x = torch.randn(count, DEPTH, generator=torch.Generator().manual_seed(1))
    alone = torch.cat([native.linear(part, x) for part in parts], dim=-1)
    was = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(native.linear_of_parts(parts, x), alone)
    finally:
        torch.set_num_threads(was)


def test_gradients_reach_the_inputs_and_plain_weights_come_back():
    parts = [part_of(16, "q4_k"), part_of(32, "int8", 1)]
    model = nn.Sequential(PartedLinear(parts, torch.randn(48)))
    x = torch.randn(3, DEPTH, requires_grad=True)
    model(x).sum().backward()
    weight = model[0].weight_in(torch.float32)
    torch.testing.assert_close(x.grad, weight.sum(0).expand(3, -1))
    dequantize(model)
    assert torch.equal(model[0].weight, weight)


@pytest.mark.parametrize(
    "parts",
    [
        [part_of(16, "int8")],
        [part_of(8, "int8"), part_of(16, "int8")],
        [part_of(16, "int8"), part_of(16, "int8", depth=256)],
        [part_of(16, "int8"), part_of(16, "float32")],
    ],
    ids=["one", "half a panel", "other columns", "floats"],
)
def test_what_cannot_be_parts(parts):
    with pytest.raises(ConfigError, match="the parts of a matrix are"):
        PartedLinear(parts)
    if len(parts) > 1 and kernels.load() is not None:
        with pytest.raises(InputError, match="a part is"):
            native.matrix_of_parts(parts)
