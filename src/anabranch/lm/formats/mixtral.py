"""Mixtral (arXiv 2401.04088): softmax over all experts, top-k, renormalised; expert matrices are called w1, w3, w2."""

from collections.abc import Collection
from typing import Any

from anabranch.lm.decoder import Decoder
from anabranch.lm.formats.common import (
    Foreign,
    Pieces,
    body,
    experts,
    mixture_of,
    read_attention,
    read_body,
    read_moe,
    write_body,
    write_head_dim,
    write_moe,
)
from anabranch.lm.formats.positions import window_of
from anabranch.lm.tensors import Piece

MODEL_TYPE = "mixtral"
ARCHITECTURE = "MixtralForCausalLM"


def read(foreign: Foreign) -> Decoder.Config:
    """config.json as ours."""
    foreign = foreign.with_usual(max_position_embeddings=131072)
    attention = read_attention(foreign, head_dim=foreign.get("head_dim"), default_eps=1e-5)
    moe = read_moe(
        foreign,
        num_experts=foreign["num_local_experts"],
        hidden_dim=foreign["intermediate_size"],
        renormalize=True,
        default_alpha=0.001,
        jitter=foreign.get("router_jitter_noise", 0.0),
    )
    return Decoder.Config(
        **read_body(foreign, attention, default_theta=1e6, local=range(foreign.num_layers)), feed_forward=moe
    )


def write(config: Decoder.Config) -> dict[str, Any]:
    """Ours as config.json."""
    moe = mixture_of(config)
    fields = {**write_body(config), **write_head_dim(config), **write_moe(config)}
    del fields["norm_topk_prob"]
    return {
        **fields,
        "num_local_experts": moe.num_experts,
        "intermediate_size": moe.hidden_dim,
        "router_jitter_noise": getattr(moe.router.score, "jitter", 0.0),
        "sliding_window": window_of(config),
    }


def sanitize(config: Decoder.Config, names: Collection[str]) -> Pieces:
    """Their tensors in ours. transformers 5 calls the block ``mlp`` in memory, and files ``block_sparse_moe``."""
    pieces = body(config)
    block = "mlp" if "model.layers.0.mlp.gate.weight" in names else "block_sparse_moe"
    moe = mixture_of(config)
    for layer in range(config.num_layers):
        ours, theirs = f"blocks.{layer}.feed_forward", f"model.layers.{layer}.{block}"
        pieces[f"{ours}.router.score.weight"] = [Piece(f"{theirs}.gate.weight")]
        pieces |= experts(f"{ours}.experts", f"{theirs}.experts", moe, names, ("w1", "w3", "w2"))
    return pieces
