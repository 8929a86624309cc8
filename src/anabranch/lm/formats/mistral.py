"""Mistral (arXiv 2310.06825): like Llama, in its first version with windows of attention in all layers."""

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
from anabranch.lm.formats.positions import window_of
from anabranch.nn import SwiGLU

MODEL_TYPE = "mistral"
ARCHITECTURE = "MistralForCausalLM"
IS_DENSE = True


def read(foreign: Foreign) -> Decoder.Config:
    """config.json as ours."""
    # The defaults of transformers, of files that leave them out.
    foreign = foreign.with_usual(sliding_window=4096, max_position_embeddings=131072)
    attention = read_attention(foreign, head_dim=foreign.get("head_dim"))
    body = read_body(foreign, attention, local=range(foreign.num_layers))
    return Decoder.Config(**body, feed_forward=SwiGLU.Config(hidden_dim=foreign["intermediate_size"]))


def write(config: Decoder.Config) -> dict[str, Any]:
    """Ours as config.json."""
    feed_forward = dense_of(config)
    return {
        **write_body(config),
        **write_head_dim(config),
        "intermediate_size": feed_forward.hidden_dim,
        "sliding_window": window_of(config),
    }


def sanitize(config: Decoder.Config, names: Collection[str]) -> Pieces:
    """Their tensors in ours."""
    return mixture(config, names)
