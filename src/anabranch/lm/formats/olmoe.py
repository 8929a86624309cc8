"""OLMoE (arXiv 2409.02060): softmax, top-k, raw weights unless ``norm_topk_prob``; queries and keys normalised over all heads."""

from collections.abc import Collection
from typing import Any

from anabranch.lm.decoder import Decoder
from anabranch.lm.formats.common import (
    Foreign,
    Pieces,
    mixture,
    mixture_of,
    read_attention,
    read_body,
    read_moe,
    self_attention,
    write_body,
    write_moe,
)

MODEL_TYPE = "olmoe"
ARCHITECTURE = "OlmoeForCausalLM"


def read(foreign: Foreign) -> Decoder.Config:
    """config.json as ours."""
    foreign = foreign.with_usual(max_position_embeddings=4096)
    bias = foreign.get("attention_bias", False)
    attention = read_attention(foreign, qk_norm="full", qkv_bias=bias, out_bias=bias, default_eps=1e-5)
    attention = attention.replace(clip_qkv=foreign.get("clip_qkv"))
    moe = read_moe(
        foreign,
        num_experts=foreign["num_experts"],
        hidden_dim=foreign["intermediate_size"],
        renormalize=foreign.get("norm_topk_prob", False),
        default_alpha=0.01,
    )
    return Decoder.Config(**read_body(foreign, attention), feed_forward=moe)


def write(config: Decoder.Config) -> dict[str, Any]:
    """Ours as config.json."""
    moe = mixture_of(config)
    return {
        **write_body(config),
        **write_moe(config),
        "num_experts": moe.num_experts,
        "intermediate_size": moe.hidden_dim,
        "attention_bias": self_attention(config).qkv_bias,
        "clip_qkv": self_attention(config).clip_qkv,
    }


def sanitize(config: Decoder.Config, names: Collection[str]) -> Pieces:
    """Their tensors in ours."""
    return mixture(config, names)
