"""Folders in the layout of the released weights (Qwen2-ParScale): a Qwen2 body, prefixes beside each attention, one gate.

    self_attn.prefix_k, self_attn.prefix_v      [P, h_kv, m, d_h]       ours: streams.prefix.key.LAYER, .value.LAYER
    model.aggregate_layer.0, model.aggregate_layer.2                    ours: streams.gates.P.0, .2

With one stream it is a plain Qwen2 folder. The released weights carry a licence of their own; look at it before you use them.
"""

import json
from pathlib import Path
from typing import Any

import torch

from anabranch.data.tokenizer import Tokenizer, load_tokenizer
from anabranch.errors import CheckpointError
from anabranch.experts.parscale.recipe import fold
from anabranch.experts.parscale.streams import ParScale
from anabranch.lm.decoder import Decoder
from anabranch.lm.folder import MARK, check_no_adapter, model_folder
from anabranch.lm.formats.common import (
    Foreign,
    Pieces,
    mixture,
    place_embedding,
    read_attention,
    read_body,
    self_attention,
    spare,
    tied_as_stored,
    write_body,
)
from anabranch.lm.mixed_types import fit_types
from anabranch.lm.tensors import Piece, build_empty, fill, open_tensors, read_json, state_once, write_tensors
from anabranch.nn import SwiGLU

__all__ = ["export_parscale", "load_parscale"]

_TYPES = {"qwen2": "Qwen2ForCausalLM", "qwen2_parscale": "Qwen2ParScaleForCausalLM"}


def export_parscale(folder: str | Path, model: Decoder, tokenizer: Tokenizer | None = None) -> None:
    """Write ``model`` in this layout, all or nothing; prefixes are folded.

    With more than one stream config.json has no code beside it: it is for the released model class, or for `load_parscale`.

    Raises CheckpointError for what Qwen2 cannot express, and for a model that holds several gates.
    """
    streams: Any = model.config.streams
    _check(model.config)
    if isinstance(streams, ParScale.Config) and streams.prefix != "direct" and streams.has_prefix:
        model = fold(model)
    config = model.config
    state = state_once(model)
    tensors = {piece.name: state[name][piece.where] for name, pieces in _layout(config).items() for piece in pieces}
    if not self_attention(config).qkv_bias:  # Qwen2 always has these
        for layer in range(config.num_layers):
            for name in ("q_proj", "k_proj", "v_proj"):
                weight = tensors[f"model.layers.{layer}.self_attn.{name}.weight"]
                tensors[f"model.layers.{layer}.self_attn.{name}.bias"] = weight.new_zeros(weight.shape[0])
    with model_folder(folder) as temporary:
        write_tensors(temporary, tensors)
        if tokenizer is not None:
            tokenizer.save(temporary)
        table = json.dumps(_write(config, str(model.embedding.weight.dtype)), indent=2)
        (temporary / "config.json").write_text(table + "\n", encoding="utf-8")


def load_parscale(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> tuple[Decoder, Tokenizer | None]:
    """A Qwen2 or Qwen2-ParScale folder as a model of ours; arguments as `anabranch.lm.load_model`.

    Raises CheckpointError for another kind of model, an adapter beside it, or missing prefixes or gate (they would not be initialised).
    """
    folder = Path(folder)
    check_no_adapter(folder)
    foreign = Foreign(read_json(folder / "config.json"), folder / "config.json")
    kind = foreign["model_type"]
    if kind not in _TYPES:
        foreign.refuse("model_type", kind, " or ".join(repr(name) for name in _TYPES))
    source = open_tensors(folder)
    config = tied_as_stored(_read(foreign), source, folder / "config.json")
    model: Decoder = build_empty(config)
    layout = place_embedding(_layout(config), config, source.names)
    fill(model, source, layout, where=folder, dtype=dtype, device=device, ignore=spare(source.names, config))
    fit_types(model)
    return model, load_tokenizer(folder) if (folder / "tokenizer.json").is_file() else None


def _layout(config: Decoder.Config) -> Pieces:
    pieces = mixture(config, ())
    streams: Any = config.streams
    if streams is None or streams.num_streams == 1:
        return pieces
    for layer in range(config.num_layers if streams.has_prefix else 0):
        for ours, theirs in (("key", "prefix_k"), ("value", "prefix_v")):
            pieces[f"streams.prefix.{ours}.{layer}"] = [Piece(f"model.layers.{layer}.self_attn.{theirs}")]
    for place in (0, 2):
        for name in ("weight", "bias"):
            ours = f"streams.gates.{streams.num_streams}.{place}.{name}"
            pieces[ours] = [Piece(f"model.aggregate_layer.{place}.{name}")]
    return pieces


def _read(foreign: Foreign) -> Decoder.Config:
    num_streams = foreign.get("parscale_n", 1)
    streams = None
    if num_streams != 1:
        streams = ParScale.Config(
            num_streams=num_streams,
            prefix_len=foreign.get("parscale_n_tokens", 48),
            smoothing=foreign.get("parscale_attn_smooth", 0.01),
            prefix="direct",
        )
    attention = read_attention(foreign, qkv_bias=True)
    return Decoder.Config(
        **read_body(foreign, attention),
        feed_forward=SwiGLU.Config(hidden_dim=foreign["intermediate_size"]),
        streams=streams,
    )


def _write(config: Decoder.Config, dtype: str) -> dict[str, Any]:
    streams: Any = config.streams
    several = streams is not None and streams.num_streams > 1
    kind = "qwen2_parscale" if several else "qwen2"
    table = {
        "architectures": [_TYPES[kind]],
        "model_type": kind,
        "torch_dtype": dtype.removeprefix("torch."),
        **write_body(config),
        "intermediate_size": config.feed_forward.hidden_dim,  # type: ignore[attr-defined]
    }
    if several:
        table |= {
            "parscale_n": streams.num_streams,
            "parscale_n_tokens": streams.prefix_len,
            "parscale_attn_smooth": streams.smoothing,
        }
    return table | MARK


def _check(config: Decoder.Config) -> None:
    """Raise CheckpointError for what Qwen2 has not."""
    attention, streams = self_attention(config), config.streams
    lacking = {
        f"feed_forward.kind={config.feed_forward.owner.kind!r}": type(config.feed_forward) is not SwiGLU.Config
        or bool(config.dense_layers),
        f"attention.qk_norm={attention.qk_norm!r}": attention.qk_norm != "none",
        "attention.out_bias=True": attention.out_bias,
        f"attention.clip_qkv={attention.clip_qkv}": attention.clip_qkv is not None,
        f"attention.head_dim={attention.head_dim}": attention.width(config.dim) * attention.num_heads != config.dim,
    }
    if streams is not None:
        lacking[f"streams.kind={streams.owner.kind!r}"] = not isinstance(streams, ParScale.Config)
        lacking[f"streams.switchable={getattr(streams, 'switchable', ())} (several gates)"] = bool(
            getattr(streams, "switchable", ())
        )
        lacking["streams.prefix_alone=True"] = getattr(streams, "prefix_alone", False) and streams.num_streams == 1
    found = [name for name, is_lacking in lacking.items() if is_lacking]
    if found:
        raise CheckpointError(f"Qwen2-ParScale has no {', '.join(found)}")
