"""DeepSeek-V3 and R1 (arXiv 2412.19437): latent attention, sigmoid scores with a bias to select by, groups of experts, shared experts.

Layers behind the last one, which predict further tokens, are left out.
"""

from collections.abc import Collection, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from anabranch.errors import CheckpointError
from anabranch.lm.decoder import Decoder
from anabranch.lm.formats.common import (
    AttentionPieces,
    Foreign,
    Pieces,
    mixture,
    read_body,
    with_dense_layers,
    write_body,
)
from anabranch.lm.formats.routers import read_biased_moe, write_biased_moe
from anabranch.lm.tensors import Change, Piece
from anabranch.nn.latent_attention import LatentAttention

MODEL_TYPE = "deepseek_v3"
ARCHITECTURE = "DeepseekV3ForCausalLM"
HAS_DRAFT_LAYERS = True
# What transformers takes where a file says nothing; both versions have the others.
USUAL = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}


def read(foreign: Foreign) -> Decoder.Config:
    """config.json as ours."""
    foreign = Foreign({**USUAL, "max_position_embeddings": 4096, **foreign.table}, foreign.path)
    foreign.require("scoring_func", ("sigmoid",))
    foreign.require("topk_method", ("noaux_tc",))
    foreign.require("moe_layer_freq", (1,))
    usual = {"n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5, "n_shared_experts": 1}
    moe = read_biased_moe(Foreign({**usual, **foreign.table}, foreign.path))
    dense = range(min(foreign.get("first_k_dense_replace", 3), foreign.num_layers))
    return with_dense_layers(read_latent_body(foreign), moe, foreign["intermediate_size"], dense)


def write(config: Decoder.Config) -> dict[str, Any]:
    """Ours as config.json."""
    return {**write_latent(config), **write_biased_moe(config), "num_nextn_predict_layers": 0}


def sanitize(config: Decoder.Config, names: Collection[str]) -> Pieces:
    """Their tensors in ours."""
    return mixture(
        config, names, shared="shared_experts", attention=latent_pieces(names), bias="gate.e_score_correction_bias"
    )


def read_latent_body(foreign: Foreign) -> dict[str, Any]:
    """The fields of `Decoder.Config` but for the feed-forward."""
    return read_body(foreign, read_latent(foreign))


def read_latent(foreign: Foreign) -> LatentAttention.Config:
    """The attention config."""
    if foreign.get("rope_interleave") is False:
        foreign.refuse("rope_interleave", False, "true, the order of DeepSeek's files")
    name = "rope_parameters" if foreign.get("rope_parameters") else "rope_scaling"
    scaling = foreign.get(name, {})
    is_longer = scaling.get("rope_type", scaling.get("type", "default")) != "default" and scaling.get("mscale_all_dim")
    return LatentAttention.Config(
        num_heads=foreign["num_attention_heads"],
        kv_rank=foreign["kv_lora_rank"],
        q_rank=foreign.get("q_lora_rank"),
        head_dim=foreign["qk_nope_head_dim"],
        rotary_dim=foreign["qk_rope_head_dim"],
        value_dim=foreign["v_head_dim"],
        bias=foreign.get("attention_bias", False),
        mscale=float(scaling["mscale_all_dim"]) if is_longer else 0.0,
        mscale_factor=float(scaling["factor"]) if is_longer else 1.0,
    )


def write_latent(config: Decoder.Config) -> dict[str, Any]:
    """The fields that `read_latent_body` reads."""
    attention = latent_attention(config)
    fields = write_body(config, heads=attention.num_heads)
    if fields["rope_scaling"] is not None and attention.mscale:
        fields["rope_scaling"] |= {"mscale_all_dim": attention.mscale, "factor": attention.mscale_factor}
    return {
        **fields,
        "kv_lora_rank": attention.kv_rank,
        "q_lora_rank": attention.q_rank,
        "qk_nope_head_dim": attention.head_dim,
        "qk_rope_head_dim": attention.rotary_dim,
        "v_head_dim": attention.value_dim,
        "attention_bias": attention.bias,
    }


def latent_attention(config: Decoder.Config) -> LatentAttention.Config:
    """The attention of a model of these families. Raises CheckpointError if it is of another kind."""
    if not isinstance(config.attention, LatentAttention.Config):
        raise CheckpointError(f"attention.kind={config.attention.owner.kind!r}")
    return config.attention


def latent_pieces(names: Collection[str]) -> AttentionPieces:
    """Attention of one layer of a file with these ``names``. Rotated numbers stand in pairs there and in halves here.

    Keys and values of all heads come from one matrix, or from two for each head as llama.cpp stores them.
    """
    return partial(_latent_pieces, names)


def _latent_pieces(stored_names: Collection[str], config: Decoder.Config, ours: str, theirs: str) -> Pieces:
    attention = latent_attention(config)
    head, turned = attention.head_dim + attention.rotary_dim, attention.rotary_dim
    queries = Change(lambda x: _halved(x, head, turned), lambda x: _paired(x, head, turned))
    rows = attention.kv_rank + turned
    keys = Change(lambda x: _halved(x, rows, turned), lambda x: _paired(x, rows, turned))
    names: dict[str, tuple[str, Change | None]] = {
        "kv_down": ("kv_a_proj_with_mqa", keys),
        "kv_norm": ("kv_a_layernorm", None),
        "kv_up": ("kv_b_proj", None),
        "out": ("o_proj", None),
    }
    if attention.q_rank is None:
        names["q"] = ("q_proj", queries)
    else:
        names |= {"q_down": ("q_a_proj", None), "q_norm": ("q_a_layernorm", None), "q_up": ("q_b_proj", queries)}
    pieces = {
        f"{ours}.{name}.weight": [Piece(f"{theirs}.{stored}.weight", change=change)]
        for name, (stored, change) in names.items()
    }
    if f"{theirs}.k_b_proj.0.weight" in stored_names:
        pieces[f"{ours}.kv_up.weight"] = list(_of_heads(attention, theirs))
    for name in ("kv_down", "out", *(() if attention.q_rank is None else ("q_down",))) if attention.bias else ():
        stored, change = names[name]
        pieces[f"{ours}.{name}.bias"] = [Piece(f"{theirs}.{stored}.bias", change=change)]
    return pieces


def _of_heads(attention: LatentAttention.Config, theirs: str) -> Iterator[Piece]:
    """Keys' and values' rows of each head. Those of keys are stored with the latent first."""
    turned = Change(lambda x: x.transpose(-1, -2), lambda x: x.transpose(-1, -2))
    rows = attention.head_dim + attention.value_dim
    for head in range(attention.num_heads):
        first = head * rows
        last = first + attention.head_dim
        yield Piece(f"{theirs}.k_b_proj.{head}.weight", (slice(first, last),), turned)
        yield Piece(f"{theirs}.v_b_proj.{head}.weight", (slice(last, first + rows),))


def _halved(stored: Tensor, head: int, turned: int) -> Tensor:
    """The last ``turned`` rows of each ``head`` rows from pairs side by side to first halves, then second ones."""
    heads = stored.unflatten(0, (-1, head))
    rest, pairs = heads[:, : head - turned], heads[:, head - turned :]
    return torch.cat((rest, pairs[:, ::2], pairs[:, 1::2]), dim=1).flatten(0, 1)


def _paired(ours: Tensor, head: int, turned: int) -> Tensor:
    heads = ours.unflatten(0, (-1, head))
    first, second = heads[:, head - turned :].chunk(2, dim=1)
    pairs = torch.stack((first, second), dim=2).flatten(1, 2)
    return torch.cat((heads[:, : head - turned], pairs), dim=1).flatten(0, 1)
