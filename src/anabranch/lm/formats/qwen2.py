"""Qwen2 (arXiv 2407.10671): like Llama, with biases on queries, keys and values alone; some versions have windows in the upper layers."""

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
    write_body,
    write_head_dim,
)
from anabranch.lm.formats.positions import local_layers, write_windows
from anabranch.nn import SwiGLU

MODEL_TYPE = "qwen2"
ARCHITECTURE = "Qwen2ForCausalLM"
IS_DENSE = True


def read(foreign: Foreign) -> Decoder.Config:
    """config.json as ours."""
    foreign = foreign.with_usual(max_position_embeddings=32768)
    attention = read_attention(foreign, qkv_bias=True, head_dim=foreign.get("head_dim"))
    return Decoder.Config(
        **read_body(foreign, attention, local=upper_layers(foreign), switch=True),
        feed_forward=SwiGLU.Config(hidden_dim=foreign["intermediate_size"]),
    )


def upper_layers(foreign: Foreign) -> list[int]:
    """The layers that have the window where ``use_sliding_window`` is on: those from ``max_window_layers`` on."""
    return local_layers(foreign, range(foreign.get("max_window_layers", 28), foreign.num_layers))


def write_upper_windows(config: Decoder.Config) -> dict[str, Any]:
    """What `upper_layers` and its switch read."""
    windows = write_windows(config)
    return {"use_sliding_window": windows["sliding_window"] is not None, **windows}


def write(config: Decoder.Config) -> dict[str, Any]:
    """Ours as config.json."""
    feed_forward = dense_of(config)
    return {
        **write_body(config),
        **write_head_dim(config),
        "intermediate_size": feed_forward.hidden_dim,
        **write_upper_windows(config),
    }


def sanitize(config: Decoder.Config, names: Collection[str]) -> Pieces:
    """Their tensors in ours."""
    return mixture(config, names)
