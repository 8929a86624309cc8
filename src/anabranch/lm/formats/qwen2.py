"""Qwen2 (arXiv 2407.10671): like Llama, with biases on queries, keys and values alone."""

from collections.abc import Collection
from typing import Any

from anabranch.lm.decoder import Decoder
from anabranch.lm.formats.common import (
    Foreign,
    Pieces,
    mixture,
    read_attention,
    read_body,
    write_body,
    write_head_dim,
)
from anabranch.nn import SwiGLU

MODEL_TYPE = "qwen2"
ARCHITECTURE = "Qwen2ForCausalLM"
IS_DENSE = True


def read(foreign: Foreign) -> Decoder.Config:
    """config.json as ours."""
    attention = read_attention(foreign, qkv_bias=True, head_dim=foreign.get("head_dim"))
    return Decoder.Config(
        **read_body(foreign, attention), feed_forward=SwiGLU.Config(hidden_dim=foreign["intermediate_size"])
    )


def write(config: Decoder.Config) -> dict[str, Any]:
    """Ours as config.json."""
    feed_forward: Any = config.feed_forward
    return {
        **write_body(config),
        **write_head_dim(config),
        "intermediate_size": feed_forward.hidden_dim,
        "use_sliding_window": False,
    }


def sanitize(config: Decoder.Config, names: Collection[str]) -> Pieces:
    """Their tensors in ours."""
    return mixture(config, names)
