"""Qwen3-MoE (arXiv 2505.09388): softmax, top-k, renormalised if ``norm_topk_prob``; each head's queries and keys normalised."""

from collections.abc import Collection
from typing import Any

from anabranch.lm.decoder import Decoder
from anabranch.lm.formats.common import (
    Foreign,
    Pieces,
    mixture,
    read_attention,
    read_body,
    read_moe,
    self_attention,
    with_dense_layers,
    write_body,
    write_head_dim,
    write_moe,
)
from anabranch.lm.formats.positions import window_of
from anabranch.lm.formats.qwen2_moe import dense_layers, write_layers

MODEL_TYPE = "qwen3_moe"
ARCHITECTURE = "Qwen3MoeForCausalLM"


def read(foreign: Foreign) -> Decoder.Config:
    """config.json as ours."""
    foreign = foreign.with_usual(max_position_embeddings=32768)
    bias = foreign.get("attention_bias", False)
    attention = read_attention(foreign, qk_norm="head", qkv_bias=bias, out_bias=bias, head_dim=foreign.get("head_dim"))
    # transformers 5 reads and writes num_experts under the name num_local_experts too.
    num_experts = foreign.get("num_experts", foreign.get("num_local_experts", 128))
    moe = read_moe(
        foreign,
        num_experts=num_experts,
        hidden_dim=foreign["moe_intermediate_size"],
        renormalize=foreign.get("norm_topk_prob", False),
        default_alpha=0.001,
    )
    body = read_body(foreign, attention, local=range(foreign.num_layers), switch=True)
    return with_dense_layers(body, moe, foreign["intermediate_size"], dense_layers(foreign))


def write(config: Decoder.Config) -> dict[str, Any]:
    """Ours as config.json."""
    return {
        **write_body(config),
        **write_head_dim(config),
        **write_moe(config),
        **write_layers(config),
        "use_sliding_window": window_of(config) is not None,
        "sliding_window": window_of(config),
        "attention_bias": self_attention(config).qkv_bias,
    }


def sanitize(config: Decoder.Config, names: Collection[str]) -> Pieces:
    """Their tensors in ours."""
    return mixture(config, names)
