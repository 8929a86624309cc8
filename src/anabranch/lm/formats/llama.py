"""Llama (arXiv 2302.13971) and what is built like it, SmolLM among them: dense, optionally with biases in attention."""

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
from anabranch.nn import SwiGLU

MODEL_TYPE = "llama"
ARCHITECTURE = "LlamaForCausalLM"
IS_DENSE = True


def read(foreign: Foreign) -> Decoder.Config:
    """config.json as ours."""
    bias = foreign.get("attention_bias", False)
    attention = read_attention(foreign, qkv_bias=bias, out_bias=bias, head_dim=foreign.get("head_dim"))
    return Decoder.Config(
        **read_body(foreign, attention), feed_forward=SwiGLU.Config(hidden_dim=foreign["intermediate_size"])
    )


def write(config: Decoder.Config) -> dict[str, Any]:
    """Ours as config.json."""
    feed_forward = dense_of(config)
    return {
        **write_body(config),
        **write_head_dim(config),
        "intermediate_size": feed_forward.hidden_dim,
        "attention_bias": self_attention(config).qkv_bias,
        "mlp_bias": False,
    }


def sanitize(config: Decoder.Config, names: Collection[str]) -> Pieces:
    """Their tensors in ours."""
    return mixture(config, names)
