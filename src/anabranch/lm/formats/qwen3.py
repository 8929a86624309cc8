"""Qwen3 (arXiv 2505.09388), dense: each head's queries and keys are normalised; some versions have windows in the upper layers."""

from collections.abc import Collection
from typing import Any

from anabranch.lm.decoder import Decoder
from anabranch.lm.formats.common import (
    Foreign,
    Pieces,
    dense_of,
    mixture,
    read_attention,
    read_body,
    self_attention,
    write_body,
    write_head_dim,
)
from anabranch.lm.formats.qwen2 import upper_layers, write_upper_windows
from anabranch.nn import SwiGLU

MODEL_TYPE = "qwen3"
ARCHITECTURE = "Qwen3ForCausalLM"
IS_DENSE = True


def read(foreign: Foreign) -> Decoder.Config:
    """config.json as ours."""
    foreign = foreign.with_usual(max_position_embeddings=32768)
    bias = foreign.get("attention_bias", False)
    head_dim = foreign.get("head_dim", 128)
    attention = read_attention(foreign, qk_norm="head", qkv_bias=bias, out_bias=bias, head_dim=head_dim)
    return Decoder.Config(
        **read_body(foreign, attention, local=upper_layers(foreign), switch=True),
        feed_forward=SwiGLU.Config(hidden_dim=foreign["intermediate_size"]),
    )


def write(config: Decoder.Config) -> dict[str, Any]:
    """Ours as config.json."""
    feed_forward = dense_of(config)
    return {
        **write_body(config),
        **write_head_dim(config),
        **write_upper_windows(config),
        "intermediate_size": feed_forward.hidden_dim,
        "attention_bias": self_attention(config).qkv_bias,
    }


def sanitize(config: Decoder.Config, names: Collection[str]) -> Pieces:
    """Their tensors in ours."""
    return mixture(config, names)
