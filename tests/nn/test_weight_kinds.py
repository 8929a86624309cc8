"""What is counted of weights, by hand."""

import pytest
import torch
from torch import nn

from anabranch.lm import Decoder
from anabranch.nn import MoE, SelfAttention, SwiGLU
from anabranch.nn.nf4 import Nf4Linear
from anabranch.nn.offloaded import OffloadedPool
from anabranch.nn.packed import Packed
from anabranch.nn.quantize import PackedEmbedding, QuantizedLinear, QuantizedPool, quantize
from anabranch.nn.weight_kinds import numbers_of_kinds


def test_linear_layers_count_as_they_are_packed_and_their_biases_as_floats():
    model = nn.Sequential(
        nn.Linear(64, 16, dtype=torch.bfloat16),
        QuantizedLinear.of(nn.Linear(64, 32), "int4"),
        QuantizedLinear.of(nn.Linear(64, 48, bias=False), "int8"),
        Nf4Linear(torch.randn(16, 64)),
    )
    assert numbers_of_kinds(model) == {
        "int8": 64 * 48,
        "int4": 64 * 32,
        "bfloat16": 64 * 16 + 16,
        "nf4": 64 * 16,
        "float32": 32,
    }
    assert list(numbers_of_kinds(model))[:2] == ["int8", "int4"]


def test_what_several_modules_share_counts_once():
    table = Packed.pack(torch.randn(48, 64), "int8")
    model = nn.ModuleDict({"embedding": PackedEmbedding(table), "head": QuantizedLinear(table)})
    assert numbers_of_kinds(model) == {"int8": 48 * 64}
    tied = Decoder.Config(
        vocab_size=64,
        dim=64,
        num_layers=1,
        attention=SelfAttention.Config(num_heads=2),
        feed_forward=SwiGLU.Config(hidden_dim=96),
        tie_embeddings=True,
    ).build(seed=0)
    assert numbers_of_kinds(tied) == {"float32": sum(weight.numel() for weight in tied.parameters())}


@pytest.mark.parametrize(("bits", "packed"), [(None, "float32"), ("int4", "int4")])
def test_a_pool_counts_all_its_experts_also_where_few_are_in_memory(bits, packed):
    model = Decoder.Config(
        vocab_size=64,
        dim=64,
        num_layers=1,
        attention=SelfAttention.Config(num_heads=2),
        feed_forward=MoE.Config(num_experts=5, hidden_dim=32),
    ).build(seed=0)
    if bits is not None:
        quantize(model, bits)
    whole = numbers_of_kinds(model)
    layer = model.blocks[0].feed_forward
    pool = layer.experts

    class Slots:
        packed = pool.packed if isinstance(pool, QuantizedPool) else None
        w13_SFD, w2_SDF = (pool.w13[:2], pool.w2[:2]) if packed is None else (pool.data13[:2], pool.data2[:2])

    layer.experts = OffloadedPool(0, 5, 64, 32, "auto", Slots(), None, is_watched=False)
    assert numbers_of_kinds(model) == whole
    assert whole[packed] >= 5 * 3 * 64 * 32
