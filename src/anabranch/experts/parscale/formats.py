"""Qwen2-ParScale, the family of the released weights: a Qwen2 body, prefixes beside each attention, one gate.

    self_attn.prefix_k, self_attn.prefix_v      [P, h_kv, m, d_h]       ours: streams.prefix.key.LAYER, .value.LAYER
    model.aggregate_layer.0, model.aggregate_layer.2                    ours: streams.gates.P.0, .2

`load_model` and ``anabranch convert`` read and write it, as every family of `anabranch.lm.formats`. With one stream it is a plain Qwen2
folder. The released weights carry a licence of their own; look at it before you use them.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from anabranch.data.tokenizer import Tokenizer
from anabranch.errors import CheckpointError
from anabranch.experts.parscale.recipe import fold, remove_streams
from anabranch.experts.parscale.streams import ParScale
from anabranch.files import read_json
from anabranch.lm import formats
from anabranch.lm.checkpoint import load_model
from anabranch.lm.decoder import Decoder
from anabranch.lm.folder import check_no_adapter, model_folder
from anabranch.lm.formats import qwen2
from anabranch.lm.formats.common import Foreign, Pieces, self_attention
from anabranch.lm.tensors import Piece, build_empty, state_once
from anabranch.nn import SwiGLU

__all__ = ["export_parscale", "load_parscale"]

MODEL_TYPE = "qwen2_parscale"
ARCHITECTURE = "Qwen2ParScaleForCausalLM"
IS_DENSE = True
NOTE = (
    "transformers has no class for model_type qwen2_parscale: it reads this folder only with the code of the released models, which is "
    "not written; load_model and anabranch serve read it"
)


def read(foreign: Foreign) -> Decoder.Config:
    """config.json as ours."""
    config, num_streams = qwen2.read(foreign), foreign.get("parscale_n", 1)
    if num_streams == 1:
        return config
    streams = ParScale.Config(
        num_streams=num_streams,
        prefix_len=foreign.get("parscale_n_tokens", 48),
        smoothing=foreign.get("parscale_attn_smooth", 0.01),
        prefix="direct",
    )
    return config.replace(streams=streams)


def write(config: Decoder.Config) -> dict[str, Any]:
    """Ours as config.json."""
    streams, table = config.streams, qwen2.write(config)
    if not isinstance(streams, ParScale.Config) or streams.num_streams == 1:
        return {**table, "parscale_n": 1}
    return {
        **table,
        "parscale_n": streams.num_streams,
        "parscale_n_tokens": streams.prefix_len,
        "parscale_attn_smooth": streams.smoothing,
    }


def sanitize(config: Decoder.Config, names: Collection[str]) -> Pieces:
    """Their tensors in ours."""
    pieces, streams = qwen2.sanitize(config, names), config.streams
    if not isinstance(streams, ParScale.Config) or streams.num_streams == 1:
        return pieces
    for layer in range(config.num_layers if streams.has_prefix else 0):
        for ours, theirs in (("key", "prefix_k"), ("value", "prefix_v")):
            pieces[f"streams.prefix.{ours}.{layer}"] = [Piece(f"model.layers.{layer}.self_attn.{theirs}")]
    for place in (0, 2):
        for name in ("weight", "bias"):
            ours = f"streams.gates.{streams.num_streams}.{place}.{name}"
            pieces[ours] = [Piece(f"model.aggregate_layer.{place}.{name}")]
    return pieces


def prepared(model: Decoder) -> Decoder:
    """The same function in the family's form: prefixes folded, biases of zero where there are none, no streams where there is one."""
    streams: Any = model.config.streams
    if isinstance(streams, ParScale.Config):
        if streams.num_streams == 1 and not streams.has_prefix:
            model = remove_streams(model)
        elif streams.has_prefix and streams.prefix != "direct":
            model = fold(model)
    return _with_biases(model)


def _with_biases(model: Decoder) -> Decoder:
    attention = self_attention(model.config)
    if attention.qkv_bias:
        return model
    made: Decoder = build_empty(model.config.replace(attention=attention.replace(qkv_bias=True)))
    state, weight = state_once(model), model.embedding.weight
    for name, empty in state_once(made).items():
        if name not in state:
            state[name] = torch.zeros(empty.shape, dtype=weight.dtype, device=weight.device)
    made.load_state_dict(state, assign=True)
    return made.to(weight.device).train(model.training)


def export_parscale(folder: str | Path, model: Decoder, tokenizer: Tokenizer | None = None) -> None:
    """Write ``model`` as this family, or with one stream as plain Qwen2, all or nothing; prefixes are folded.

    ``anabranch convert --to huggingface --family qwen2_parscale`` does it too. With more than one stream config.json has no code beside
    it: it is for the released model class, or for `load_model`.

    Raises CheckpointError for what Qwen2 cannot express, and for a model that holds several gates.
    """
    _check(model.config)
    ready = prepared(model)
    family = qwen2.MODEL_TYPE if ready.config.streams is None else MODEL_TYPE
    with model_folder(folder) as temporary:
        formats.export(temporary, ready, tokenizer, family=family)


def load_parscale(
    folder: str | Path, *, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> tuple[Decoder, Tokenizer | None]:
    """`load_model` of a Qwen2 or Qwen2-ParScale folder. Raises CheckpointError for another kind of model."""
    folder = Path(folder)
    check_no_adapter(folder)
    foreign = Foreign(read_json(folder / "config.json"), folder / "config.json")
    if foreign["model_type"] not in (MODEL_TYPE, qwen2.MODEL_TYPE):
        foreign.refuse("model_type", foreign["model_type"], f"{qwen2.MODEL_TYPE!r} or {MODEL_TYPE!r}")
    return load_model(folder, dtype=dtype, device=device)


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
