"""gpt-oss (arXiv 2508.10925): sinks in every head, windows in every second layer, experts with biases and clamped SwiGLUs, in MXFP4."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from anabranch.lm.decoder import Decoder
from anabranch.lm.formats.common import (
    Foreign,
    Pieces,
    body,
    experts,
    mixture_of,
    read_attention,
    read_body,
    self_attention,
    write_body,
    write_head_dim,
    write_moe,
)
from anabranch.lm.formats.positions import local_layers, rotary_table, write_windows
from anabranch.lm.tensors import Change, Piece
from anabranch.nn import MoE
from anabranch.nn.activation import LIMIT, SLOPE
from anabranch.routing import LinearScore, Router, SwitchLoss, TopK

MODEL_TYPE = "gpt_oss"
ARCHITECTURE = "GptOssForCausalLM"
# What transformers takes where a file says nothing.
YARN = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def read(foreign: Foreign) -> Decoder.Config:
    """config.json as ours."""
    usual = {"max_position_embeddings": 131072, "sliding_window": 128, "attention_bias": True}
    if not foreign.get("rope_parameters") and not foreign.get("rope_scaling"):
        usual["rope_scaling"] = YARN  # type: ignore[assignment]
    table = {**usual, **{name: value for name, value in foreign.table.items() if value is not None or name in usual}}
    foreign = Foreign(table, foreign.path)
    foreign.require("swiglu_alpha", (SLOPE,))
    foreign.require("swiglu_limit", (LIMIT,))
    bias = foreign["attention_bias"]
    attention = read_attention(
        foreign, qkv_bias=bias, out_bias=bias, head_dim=foreign.get("head_dim"), default_eps=1e-5
    ).replace(sinks=True)
    moe = MoE.Config(
        num_experts=foreign.get("num_local_experts", foreign.get("num_experts")),
        hidden_dim=foreign["intermediate_size"],
        activation="clamped_swiglu",
        bias=True,
        router=Router.Config(
            score=LinearScore.Config(bias=True),
            select=TopK.Config(top_k=foreign["num_experts_per_tok"], normalize="softmax"),
            balance=(SwitchLoss.Config(alpha=foreign.get("router_aux_loss_coef", 0.001)),),
        ),
    )
    local = local_layers(foreign, range(0, foreign.num_layers, 2))
    return Decoder.Config(
        **read_body(foreign, attention, default_theta=150000.0, local=local, quantized=("mxfp4",)), feed_forward=moe
    )


def write(config: Decoder.Config) -> dict[str, Any]:
    """Ours as config.json, in floating point."""
    moe = mixture_of(config)
    fields = {**write_body(config), **write_head_dim(config), **write_moe(config), **write_windows(config)}
    for name in ("norm_topk_prob", "rope_theta", "rope_scaling"):
        del fields[name]
    return {
        **fields,
        "num_local_experts": moe.num_experts,
        "intermediate_size": moe.hidden_dim,
        "attention_bias": self_attention(config).qkv_bias,
        "swiglu_alpha": SLOPE,
        "swiglu_limit": LIMIT,
        # In any other spelling plain positions would be taken for YaRN, the default.
        "rope_parameters": rotary_table(config.rotary),
    }


def sanitize(config: Decoder.Config, names: Collection[str]) -> Pieces:
    """Their tensors in ours. Stacked experts stand with inputs first, and gate and up alternate; those that stand alone do neither."""
    pieces = body(config)
    turned = Change(_turned, _turned)
    for layer in range(config.num_layers):
        ours, theirs = f"blocks.{layer}.feed_forward", f"model.layers.{layer}.mlp"
        pieces[f"blocks.{layer}.attention.sink_H"] = [Piece(f"model.layers.{layer}.self_attn.sinks")]
        for kind in ("weight", "bias"):
            pieces[f"{ours}.router.score.{kind}"] = [Piece(f"{theirs}.router.{kind}")]
        stored = f"{theirs}.experts"
        if f"{stored}.gate_up_proj" not in names and f"{stored}.0.gate_proj.weight" in names:
            moe = mixture_of(config)
            pieces |= experts(f"{ours}.experts", stored, moe, names) | _biases(f"{ours}.experts", stored, moe)
            continue
        pieces[f"{ours}.experts.w13"] = [Piece(f"{stored}.gate_up_proj", change=Change(_parted, _mingled))]
        pieces[f"{ours}.experts.b13"] = [Piece(f"{stored}.gate_up_proj_bias", change=Change(_apart, _together))]
        pieces[f"{ours}.experts.w2"] = [Piece(f"{stored}.down_proj", change=turned)]
        pieces[f"{ours}.experts.b2"] = [Piece(f"{stored}.down_proj_bias")]
    return pieces


def _biases(ours: str, theirs: str, moe: MoE.Config) -> Pieces:
    """Of experts that stand alone."""
    hidden_dim, first, second = moe.hidden_dim, [], []
    for expert in range(moe.num_experts):
        first.append(Piece(f"{theirs}.{expert}.gate_proj.bias", (expert, slice(0, hidden_dim))))
        first.append(Piece(f"{theirs}.{expert}.up_proj.bias", (expert, slice(hidden_dim, 2 * hidden_dim))))
        second.append(Piece(f"{theirs}.{expert}.down_proj.bias", (expert,)))
    return {f"{ours}.b13": first, f"{ours}.b2": second}


def _turned(weight: Tensor) -> Tensor:
    return weight.transpose(-1, -2)


def _apart(alternating: Tensor) -> Tensor:
    """``[..., 2F]`` gate, up, gate, up, ... as all gates, then all ups."""
    return torch.cat((alternating[..., ::2], alternating[..., 1::2]), dim=-1)


def _together(parts: Tensor) -> Tensor:
    return torch.stack(parts.chunk(2, dim=-1), dim=-1).flatten(-2)


def _parted(stored_ED2F: Tensor) -> Tensor:
    return _turned(_apart(stored_ED2F))


def _mingled(ours_E2FD: Tensor) -> Tensor:
    return _together(_turned(ours_E2FD))
