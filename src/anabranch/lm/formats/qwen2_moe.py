"""Qwen2-MoE (arXiv 2407.10671): softmax, top-k, raw weights unless ``norm_topk_prob``; a shared expert behind a sigmoid gate.

`gated` turns any plain mixture into one with such a gate that computes the same, so this is also the family that takes what
none of the others has, in a form that transformers loads.
"""

from collections.abc import Collection
from typing import Any

import torch

from anabranch.lm.decoder import Decoder
from anabranch.lm.formats.common import (
    Foreign,
    Pieces,
    dense_of,
    mixture,
    mixture_of,
    read_attention,
    read_body,
    read_moe,
    self_attention,
    with_dense_layers,
    write_body,
    write_head_dim,
    write_moe,
)
from anabranch.lm.formats.positions import local_layers
from anabranch.lm.formats.qwen2 import write_upper_windows
from anabranch.lm.tensors import build_empty, state_once

MODEL_TYPE = "qwen2_moe"
ARCHITECTURE = "Qwen2MoeForCausalLM"
# Width of a shared expert that is there only because the family has one.
_SPARE_DIM = 16


def read(foreign: Foreign) -> Decoder.Config:
    """config.json as ours."""
    foreign = foreign.with_usual(max_position_embeddings=32768)
    attention = read_attention(foreign, qkv_bias=foreign.get("qkv_bias", True), head_dim=foreign.get("head_dim"))
    moe = read_moe(
        foreign,
        num_experts=foreign["num_experts"],
        hidden_dim=foreign["moe_intermediate_size"],
        renormalize=foreign.get("norm_topk_prob", False),
        default_alpha=0.001,
        shared_hidden_dim=foreign["shared_expert_intermediate_size"],
        shared_experts=1,
        shared_gate=True,
    )
    lower = range(0, min(foreign.get("max_window_layers", 28), foreign.num_layers), 2)
    body = read_body(foreign, attention, local=local_layers(foreign, lower), switch=True)
    return with_dense_layers(body, moe, foreign["intermediate_size"], dense_layers(foreign))


def dense_layers(foreign: Foreign) -> list[int]:
    """Layers in ``mlp_only_layers``, and those whose number, from 1, is no multiple of ``decoder_sparse_step``."""
    listed, step = foreign.get("mlp_only_layers", []), foreign.get("decoder_sparse_step", 1)
    return [layer for layer in range(foreign.num_layers) if layer in listed or (layer + 1) % step]


def write(config: Decoder.Config) -> dict[str, Any]:
    """Ours as config.json."""
    moe = mixture_of(config)
    return {
        **write_body(config),
        **write_head_dim(config),
        **write_moe(config),
        **write_layers(config),
        **write_upper_windows(config),
        "shared_expert_intermediate_size": moe.shared_width,
        "qkv_bias": self_attention(config).qkv_bias,
    }


def write_layers(config: Decoder.Config) -> dict[str, Any]:
    """Experts and dense layers, in the spelling of both Qwen families."""
    moe = mixture_of(config)
    dense = dense_of(config) if config.dense_layers else moe
    return {
        "num_experts": moe.num_experts,
        "moe_intermediate_size": moe.hidden_dim,
        "intermediate_size": dense.hidden_dim,
        "decoder_sparse_step": 1,
        "mlp_only_layers": sorted(config.dense_layers),
    }


def sanitize(config: Decoder.Config, names: Collection[str]) -> Pieces:
    """Their tensors in ours."""
    return mixture(config, names, shared="shared_expert")


def gated_config(config: Decoder.Config) -> Decoder.Config:
    """``config`` with a gated shared expert in each mixture."""
    moe = mixture_of(config)
    width = moe.shared_width or _SPARE_DIM
    return config.replace(feed_forward=moe.replace(shared_experts=1, shared_hidden_dim=width, shared_gate=True))


def gated(model: Decoder) -> Decoder:
    """A model of `gated_config` that computes what ``model`` does; tensors that need not change are the model's own.

    A gate of zeros is sigmoid(0) = 1/2 exactly, and the second matrix of the shared expert is doubled to make up for it. Where
    there is no shared expert, one of zeros is added.
    """
    made = build_empty(gated_config(model.config))
    state, like = state_once(model), model.embedding.weight
    for name, empty in state_once(made).items():
        if name not in state:
            state[name] = torch.zeros(empty.shape, dtype=like.dtype, device=like.device)
        elif name.endswith(".feed_forward.shared.w2.weight"):
            state[name] = state[name].detach() * 2
    made.load_state_dict(state, assign=True)
    return made.to(like.device).train(model.training)
