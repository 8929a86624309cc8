"""What the families of Hugging Face checkpoints have in common: a Llama-style body, with other feed-forwards in it.

A family is a module with

    MODEL_TYPE, ARCHITECTURE          its names in config.json
    read(foreign) -> Decoder.Config   its config.json as ours; refuses what ours cannot compute
    write(config) -> dict             ours as its config.json, as well as it can (see `anabranch.lm.formats.export`)
    sanitize(config, names)           which of its tensors make up which of ours (the only place that knows their names);
                                      ``names`` are those in the file, where there are several ways to store a thing
    IS_DENSE                          True where it has no mixture of experts
and where it needs them
    prepared(model)                   the same function in the form that the family has, before `write`
    NOTE                              what to say when a model is written as it
"""
# Shapes: E experts, D width, F hidden

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from anabranch.errors import CheckpointError
from anabranch.lm.decoder import Decoder
from anabranch.lm.formats.few_bits import METHODS
from anabranch.lm.formats.foreign import Foreign
from anabranch.lm.formats.positions import read_rotary, read_windows, write_rotary
from anabranch.lm.tensors import Piece, TensorSource
from anabranch.nn import MLP, MoE, Rotary, SelfAttention, SwiGLU
from anabranch.nn.attention import Attention
from anabranch.routing import LinearScore, Router, SwitchLoss, TopK

logger = logging.getLogger(__name__)

Pieces = dict[str, list[Piece]]
# Of attention of one layer: (config, our name of it, theirs).
AttentionPieces = Callable[[Decoder.Config, str, str], Pieces]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def read_body(
    foreign: Foreign,
    attention: Attention.Config,
    *,
    default_theta: float = 10000.0,
    local: Iterable[int] | None = None,
    switch: bool = False,
    activations: Collection[str] = ("silu", "swish"),
    quantized: Collection[str] = (),
    rotary: Rotary.Config | None = None,
) -> dict[str, Any]:
    """The fields of `Decoder.Config` that all families have, but for the feed-forward.

    ``local`` and ``switch`` as for `read_windows`; ``quantized`` are forms of weights in few bits that are read beside those of all
    families; ``rotary`` where a family reads it.
    """
    foreign.require("hidden_act", activations)
    foreign.require("mlp_bias", (False,))
    # Where transformers 5 looks for weights that do not lie under their usual names.
    foreign.require("transformers_weights", ("model.safetensors", "model.safetensors.index.json"))
    table = foreign.get("quantization_config", {})
    if not isinstance(table, dict):
        foreign.refuse("quantization_config", table, "a table with a quant_method")
    method = table.get("quant_method", "unknown")
    known = (*METHODS, *quantized)
    if table and method not in known:
        foreign.refuse(
            "quantization_config.quant_method", method, f"{', '.join(known)}, or weights that are not quantised"
        )
    return {
        "vocab_size": foreign["vocab_size"],
        "dim": foreign["hidden_size"],
        "num_layers": foreign.num_layers,
        **read_windows(foreign, attention, local, switch=switch),
        "rotary": rotary or read_rotary(foreign, default_theta),
        "norm_eps": foreign.get("rms_norm_eps", attention.norm_eps),  # type: ignore[attr-defined]
        "tie_embeddings": foreign.get("tie_word_embeddings", False),
        "max_positions": foreign.get("max_position_embeddings", 2048),
        "init_std": foreign.get("initializer_range", 0.02),
        "depth_scaled_init": False,
    }


def read_attention(
    foreign: Foreign,
    *,
    qk_norm: Literal["none", "head", "full"] = "none",
    qkv_bias: bool = False,
    out_bias: bool = False,
    head_dim: int | None = None,
    default_eps: float = 1e-6,
) -> SelfAttention.Config:
    """The attention config; what differs between families is passed in."""
    return SelfAttention.Config(
        num_heads=foreign["num_attention_heads"],
        num_kv_heads=foreign.get("num_key_value_heads"),
        head_dim=head_dim,
        qk_norm=qk_norm,
        qkv_bias=qkv_bias,
        out_bias=out_bias,
        norm_eps=foreign.get("rms_norm_eps", default_eps),
    )


def read_moe(
    foreign: Foreign,
    *,
    num_experts: int,
    hidden_dim: int,
    renormalize: bool,
    default_alpha: float,
    jitter: float = 0.0,
    shared_hidden_dim: int = 0,
    shared_experts: int = 0,
    shared_gate: bool = False,
) -> MoE.Config:
    """A softmax top-k mixture, the routing of all families."""
    return MoE.Config(
        num_experts=num_experts,
        hidden_dim=hidden_dim,
        router=Router.Config(
            score=LinearScore.Config(jitter=jitter),
            select=TopK.Config(top_k=foreign["num_experts_per_tok"], normalize="sum" if renormalize else "none"),
            balance=(SwitchLoss.Config(alpha=foreign.get("router_aux_loss_coef", default_alpha)),),
        ),
        shared_experts=shared_experts,
        shared_hidden_dim=shared_hidden_dim or None,
        shared_gate=shared_gate,
    )


def with_dense_layers(
    body: dict[str, Any], moe: MoE.Config | None, dense_dim: int, dense_layers: Iterable[int]
) -> Decoder.Config:
    """A mixture in all layers but ``dense_layers``; a dense model if that is all of them."""
    layers, dense = tuple(dense_layers), SwiGLU.Config(hidden_dim=dense_dim)
    if moe is None or len(layers) == body["num_layers"]:
        return Decoder.Config(**body, feed_forward=dense)
    if not layers:
        return Decoder.Config(**body, feed_forward=moe)
    return Decoder.Config(**body, feed_forward=moe, dense_feed_forward=dense, dense_layers=layers)


def tied_as_stored(config: Decoder.Config, source: TensorSource, where: Path) -> Decoder.Config:
    """``config`` with a head of its own, with a warning, where one is stored that is not the embedding. So transformers 5 reads it too."""
    if not config.tie_embeddings or not {EMBEDDING, HEAD} <= set(source.names):
        return config
    if source.shape(EMBEDDING) == source.shape(HEAD):
        embedding, head = source.read(EMBEDDING), source.read(HEAD)
        if torch.equal(head.to(embedding.dtype), embedding):
            return config
    logger.warning(
        "%s says tie_word_embeddings, but %s and %s differ, so the model has both; set it to false to be clear",
        where,
        EMBEDDING,
        HEAD,
    )
    return config.replace(tie_embeddings=False)


def place_embedding(pieces: Mapping[str, list[Piece]], config: Decoder.Config, names: Collection[str]) -> Pieces:
    """``pieces`` with the embedding of a tied model where it is: safetensors' ``save_model`` keeps it under the name of the head alone."""
    if config.tie_embeddings and EMBEDDING not in names and HEAD in names:
        return {**pieces, "embedding.weight": [Piece(HEAD)]}
    return dict(pieces)


def spare(names: Collection[str], config: Decoder.Config, *, has_drafts: bool = False) -> list[str]:
    """Names that a model has no need of: tables that older versions of transformers stored, and a head that is the embedding.

    With ``has_drafts`` also layers behind the last one, which predict further tokens.
    """
    is_doubled = config.tie_embeddings and EMBEDDING in names
    found = [name for name in names if name.endswith(".rotary_emb.inv_freq") or (is_doubled and name == HEAD)]
    drafts = [name for name in names if has_drafts and _layer_of(name) >= config.num_layers]
    return [*found, *(name for name in drafts if name not in found)]


def _layer_of(name: str) -> int:
    """The number of the layer that a tensor is of; -1 for none."""
    start, _, rest = name.partition("model.layers.")
    number = rest.partition(".")[0]
    return int(number) if not start and number.isdecimal() else -1


def write_body(config: Decoder.Config, heads: int | None = None) -> dict[str, Any]:
    """The fields that `read_body` and `read_attention` read; ``heads`` of attention that is another."""
    attention = None if heads else self_attention(config)
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.dim,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": attention.num_heads if attention else heads,
        "num_key_value_heads": attention.kv_heads if attention else heads,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "initializer_range": config.init_std,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "attention_dropout": 0.0,
        **write_rotary(config.rotary),
    }


def write_head_dim(config: Decoder.Config) -> dict[str, Any]:
    """``head_dim``, for the families that have it."""
    return {"head_dim": config.attention.width(config.dim)}


def write_moe(config: Decoder.Config) -> dict[str, Any]:
    """The fields of a mixture that most families spell alike."""
    moe = mixture_of(config)
    select, balance = moe.router.select, moe.router.balance
    alpha = next((part.alpha for part in balance if isinstance(part, SwitchLoss.Config)), 0.0)
    return {
        "num_experts_per_tok": select.exact_choices or 1,
        "norm_topk_prob": select.normalize != "none",
        "router_aux_loss_coef": alpha,
    }


def body(config: Decoder.Config, attention: AttentionPieces | None = None) -> Pieces:
    """Embedding, head, norms and attention under the names of Llama; ``attention`` gives that of another kind."""
    place = attention or _attention
    pieces = {"embedding.weight": [Piece(EMBEDDING)], "norm.weight": [Piece("model.norm.weight")]}
    if not config.tie_embeddings:
        pieces["head.weight"] = [Piece(HEAD)]
    for layer in range(config.num_layers):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        pieces[f"{ours}.attention_norm.weight"] = [Piece(f"{theirs}.input_layernorm.weight")]
        pieces[f"{ours}.feed_forward_norm.weight"] = [Piece(f"{theirs}.post_attention_layernorm.weight")]
        pieces |= place(config, f"{ours}.attention", f"{theirs}.self_attn")
    return pieces


def mixture_of(config: Decoder.Config) -> MoE.Config:
    """The mixture of a model that a family of Hugging Face can be. Raises CheckpointError if its layers are of another kind."""
    if not isinstance(config.feed_forward, MoE.Config):
        raise CheckpointError(f"feed_forward.kind={config.feed_forward.owner.kind!r}")
    return config.feed_forward


def dense_of(config: Decoder.Config) -> SwiGLU.Config | MLP.Config:
    """The feed-forward of its dense layers, of which some may stand between mixtures. Raises CheckpointError as `mixture_of`."""
    layer = (config.dense_feed_forward if config.dense_layers else None) or config.feed_forward
    if not isinstance(layer, SwiGLU.Config | MLP.Config):
        raise CheckpointError(f"feed_forward.kind={layer.owner.kind!r}")
    return layer


def self_attention(config: Decoder.Config) -> SelfAttention.Config:
    """The attention of a model that a family of Hugging Face can be. Raises CheckpointError if it is of another kind."""
    if not isinstance(config.attention, SelfAttention.Config):
        raise CheckpointError(f"attention.kind={config.attention.owner.kind!r}")
    return config.attention


def _attention(config: Decoder.Config, ours: str, theirs: str) -> Pieces:
    attention = self_attention(config)
    head_dim = attention.width(config.dim)
    query, store = attention.num_heads * head_dim, attention.kv_heads * head_dim
    rows = {
        "q_proj": slice(0, query),
        "k_proj": slice(query, query + store),
        "v_proj": slice(query + store, query + 2 * store),
    }
    pieces = {}
    for kind in ("weight", "bias") if attention.qkv_bias else ("weight",):
        pieces[f"{ours}.qkv.{kind}"] = [Piece(f"{theirs}.{name}.{kind}", (part,)) for name, part in rows.items()]
    for kind in ("weight", "bias") if attention.out_bias else ("weight",):
        pieces[f"{ours}.out.{kind}"] = [Piece(f"{theirs}.o_proj.{kind}")]
    if attention.qk_norm != "none":
        pieces[f"{ours}.q_norm.weight"] = [Piece(f"{theirs}.q_norm.weight")]
        pieces[f"{ours}.k_norm.weight"] = [Piece(f"{theirs}.k_norm.weight")]
    return pieces


def swiglu(ours: str, theirs: str, hidden_dim: int) -> Pieces:
    """A dense SwiGLU."""
    return {
        f"{ours}.w13.weight": [
            Piece(f"{theirs}.gate_proj.weight", (slice(0, hidden_dim),)),
            Piece(f"{theirs}.up_proj.weight", (slice(hidden_dim, 2 * hidden_dim),)),
        ],
        f"{ours}.w2.weight": [Piece(f"{theirs}.down_proj.weight")],
    }


def experts(
    ours: str,
    theirs: str,
    moe: MoE.Config,
    names: Collection[str],
    spelling: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
) -> Pieces:
    """Stacked experts: one tensor per expert and matrix, or already stacked as transformers 5 has them in memory."""
    if f"{theirs}.gate_up_proj" in names:
        return {f"{ours}.w13": [Piece(f"{theirs}.gate_up_proj")], f"{ours}.w2": [Piece(f"{theirs}.down_proj")]}
    gate, up, down = spelling
    hidden_dim = moe.hidden_dim
    w13, w2 = [], []
    for expert in range(moe.num_experts):
        w13.append(Piece(f"{theirs}.{expert}.{gate}.weight", (expert, slice(0, hidden_dim))))
        w13.append(Piece(f"{theirs}.{expert}.{up}.weight", (expert, slice(hidden_dim, 2 * hidden_dim))))
        w2.append(Piece(f"{theirs}.{expert}.{down}.weight", (expert,)))
    return {f"{ours}.w13": w13, f"{ours}.w2": w2}


def mixture(
    config: Decoder.Config,
    names: Collection[str],
    shared: str = "",
    *,
    attention: AttentionPieces | None = None,
    bias: str = "",
) -> Pieces:
    """All of a model whose mixtures stand under ``mlp``.

    ``shared`` is the name of the shared expert there, if any, and ``bias`` that of what is added to scores to select; ``attention`` as for
    `body`.
    """
    pieces = body(config, attention)
    for layer in range(config.num_layers):
        feed_forward = config.feed_forward_of(layer)
        ours, theirs = f"blocks.{layer}.feed_forward", f"model.layers.{layer}.mlp"
        if not isinstance(feed_forward, MoE.Config):
            pieces |= swiglu(ours, theirs, dense_of(config).hidden_dim)
            continue
        pieces[f"{ours}.router.score.weight"] = [Piece(f"{theirs}.gate.weight")]
        if bias:
            pieces[f"{ours}.router.balance.0.expert_bias"] = [Piece(f"{theirs}.{bias}")]
        pieces |= experts(f"{ours}.experts", f"{theirs}.experts", feed_forward, names)
        if feed_forward.shared_experts:
            pieces |= swiglu(f"{ours}.shared", f"{theirs}.{shared}", feed_forward.shared_width)
        if feed_forward.shared_gate:
            pieces[f"{ours}.shared_gate.weight"] = [Piece(f"{theirs}.{shared}_gate.weight")]
    return pieces
