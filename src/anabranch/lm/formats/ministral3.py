"""Ministral 3: like Mistral, with longer positions by YaRN and queries that grow with their position, as Llama 4's do."""

from collections.abc import Collection
from typing import Any

from anabranch.lm.decoder import Decoder
from anabranch.lm.formats.common import (
    Foreign,
    Pieces,
    mixture,
    read_attention,
    read_body,
    self_attention,
    write_body,
    write_head_dim,
)
from anabranch.lm.formats.positions import rotary_table, window_of
from anabranch.nn import SwiGLU

MODEL_TYPE = "ministral3"
ARCHITECTURE = "Ministral3ForCausalLM"
IS_DENSE = True
BETA, LENGTH = "llama_4_scaling_beta", "original_max_position_embeddings"
# What transformers takes where a file says nothing.
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    LENGTH: 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    BETA: 0.1,
}


def read(foreign: Foreign) -> Decoder.Config:
    """config.json as ours. ``llama_4_scaling``, as Mistral's own params.json has it, goes before what rotary positions say."""
    foreign = foreign.with_usual(max_position_embeddings=262144, head_dim=128)
    if not foreign.get("rope_parameters") and not foreign.get("rope_scaling") and not foreign.get("llama_4_scaling"):
        foreign = Foreign({**foreign.table, "rope_parameters": YARN}, foreign.path)
    rotary = Foreign(foreign.get("rope_parameters") or foreign.get("rope_scaling", {}), foreign.path)
    own = foreign.get("llama_4_scaling")
    said = rotary if own is None else Foreign(own, foreign.path)
    scale = said.get(BETA if own is None else "beta", 0.0)
    grows = {"temperature_scale": float(scale), "temperature_length": said[LENGTH]} if scale else {}
    attention = read_attention(foreign, head_dim=foreign.get("head_dim"), default_eps=1e-5).replace(**grows)
    body = read_body(foreign, attention, default_theta=1e6, local=range(foreign.num_layers))
    return Decoder.Config(**body, feed_forward=SwiGLU.Config(hidden_dim=foreign["intermediate_size"]))


def write(config: Decoder.Config) -> dict[str, Any]:
    """Ours as config.json."""
    attention, feed_forward = self_attention(config), config.feed_forward
    fields: dict[str, Any] = {**write_body(config), **write_head_dim(config)}
    for name in ("rope_theta", "rope_scaling"):
        del fields[name]
    grows = {BETA: attention.temperature_scale, LENGTH: attention.temperature_length}
    return {
        **fields,
        "intermediate_size": feed_forward.hidden_dim,  # type: ignore[attr-defined]
        "sliding_window": window_of(config),
        "rope_parameters": {**rotary_table(config.rotary), **grows},
    }


def sanitize(config: Decoder.Config, names: Collection[str]) -> Pieces:
    """Their tensors in ours."""
    return mixture(config, names)
