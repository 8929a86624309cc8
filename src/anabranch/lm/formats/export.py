"""Which Hugging Face family can express a model of ours, and writing it as one.

A family can if its config.json, written from our config and read back, gives the same function. What comes back different is
what the family lacks, and the error says so.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from anabranch.config import to_dict
from anabranch.data.tokenizer import SPECIAL_IDS, Tokenizer
from anabranch.errors import CheckpointError, ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.lm.folder import MARK
from anabranch.lm.formats import deepseek, qwen2_moe
from anabranch.lm.formats.common import Foreign
from anabranch.lm.formats.families import FAMILIES
from anabranch.lm.shards import MAX_SHARD_BYTES, write_tensors
from anabranch.lm.tensors import some, state_once
from anabranch.nn import MLP, MoE, PreNorm, Rotary, SelfAttention, SwiGLU
from anabranch.nn.block import Sandwich
from anabranch.nn.latent_attention import LatentAttention

logger = logging.getLogger(__name__)

# Behind what a family of mixtures lacks beside a dense model, or the other way round.
_IN_ALL = " in all layers"


def export(
    folder: Path,
    model: Decoder,
    tokenizer: Tokenizer | None = None,
    *,
    family: str | None = None,
    prefer: str | None = None,
    ids: Mapping[str, Any] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write ``model`` into ``folder`` as transformers reads it: config.json, weights with one tensor per expert, tokenizer.

    Args:
        folder: a folder that is being filled, see `anabranch.files.atomic_folder`.
        model: a model of ours; one whose layers share experts (ReXMoE) is expanded first.
        tokenizer: saved beside it.
        family: a Hugging Face ``model_type``; None takes the first that can express the model.
        prefer: the ``model_type`` to try first then.
        ids: ``bos_token_id``, ``eos_token_id`` (one or several) and ``pad_token_id`` as the source of the model has them; None takes
            those of the tokenizer.
        max_shard_bytes: larger models are split into files of at most this size.

    Raises:
        CheckpointError: no family, or not the one asked for, can express the model.
        ConfigError: there is no such family.
    """
    shared, model = sum(map(Tensor.numel, model.parameters())), model.config.feed_forward.expand_decoder(model)
    alone = sum(map(Tensor.numel, model.parameters()))
    if alone > shared:
        logger.warning(
            "layers of the model share experts, which Hugging Face's do not: each gets its own copy (%s parameters become %s), "
            "and nothing shares them again when it is read back",
            f"{shared:,}",
            f"{alone:,}",
        )
    chosen, model = choose(model, family, prefer)
    if chosen is deepseek:
        _say_what_transformers_lacks(model)
    if getattr(chosen, "NOTE", ""):
        logger.warning("%s", chosen.NOTE)
    layout = chosen.sanitize(model.config, ())
    state = state_once(model)
    homeless = [name for name in state if name not in layout]
    if homeless:
        raise CheckpointError(
            f"the model has {some(homeless)}, which Hugging Face's {chosen.MODEL_TYPE} has no place for"
        )
    tensors = {piece.name: piece.write(state[name]) for name in state for piece in layout[name]}
    write_tensors(folder, tensors, max_shard_bytes)
    if tokenizer is not None:
        tokenizer.save(folder)
    _write_configs(folder, chosen, model, tokenizer, ids)


def _say_what_transformers_lacks(model: Decoder) -> None:
    """That it reads the first version of DeepSeekMoE only with code that is not ours to write, and which family it reads without."""
    try:
        choose(model, qwen2_moe.MODEL_TYPE)
        instead = f"; family {qwen2_moe.MODEL_TYPE} (--family) writes the same model as one that it has a class for"
    except CheckpointError:
        instead = ""
    logger.warning(
        "transformers has no class for model_type deepseek: it reads this folder only with the modeling_deepseek.py, "
        "configuration_deepseek.py and auto_map of a DeepSeek model, which are not written%s",
        instead,
    )


def choose(model: Decoder, family: str | None = None, prefer: str | None = None) -> tuple[Any, Decoder]:
    """The family for ``model``, and the model that it expresses: the same, or one with spare parts that computes the same.

    Raises as `export`.
    """
    if family is not None and family not in FAMILIES:
        raise ConfigError(f"family is {family!r}; it must be one of: {', '.join(FAMILIES)}")
    config = model.config
    _check_kinds(config)
    routed = isinstance(config.feed_forward, MoE.Config)
    candidates = [family] if family else sorted(FAMILIES, key=lambda name: name != prefer)
    lacking: dict[str, list[str]] = {}
    for name in candidates:
        module = FAMILIES[name]
        if getattr(module, "IS_DENSE", False) == routed:
            lacking[name] = [f"feed_forward.kind={to_dict(config.feed_forward)['kind']!r}{_IN_ALL}"]
            continue
        ready = module.prepared(model) if hasattr(module, "prepared") else model
        lacking[name] = lacks(module, ready.config)
        if not lacking[name]:
            return module, ready
        if module is qwen2_moe and not lacks(module, qwen2_moe.gated_config(config)):
            return module, qwen2_moe.gated(model)
    raise CheckpointError(_objection(lacking, family, is_dense=not routed))


def lacks(family: Any, config: Decoder.Config) -> list[str]:
    """What of ``config`` the ``family`` cannot say, as ``path=value``."""
    try:
        back = family.read(Foreign(family.write(config), Path("config.json")))
    except (ConfigError, CheckpointError) as error:
        return [str(error)]
    ours, theirs = dict(essence(config)), dict(essence(back))
    different = [path for path, value in ours.items() if theirs.get(path) != value]
    # Under a part of another kind every field differs: the kind says it all.
    kinds = tuple(path.removesuffix("kind") for path in different if path.endswith(".kind"))
    return [
        f"{path}={ours[path]!r}"
        for path in different
        if path.endswith(".kind") or not path.startswith(kinds or ("\0",))
    ]


def essence(config: Decoder.Config) -> Iterator[tuple[str, Any]]:
    """The (path, value) pairs that decide what a model computes, alike for configs that compute the same."""
    table = to_dict(config)
    _settle_attention(table["attention"], config.attention, config.dim)
    if config.local_layers:
        _settle_attention(table["local_attention"], config.local_attention, config.dim)
    else:
        del table["local_attention"]
    table["local_layers"] = sorted(config.local_layers)
    table["rotary"] = _essence_of_rotary(config.rotary)
    table["dense_layers"] = sorted(config.dense_layers)
    if not config.dense_layers:
        del table["dense_feed_forward"]
    if isinstance(config.feed_forward, MoE.Config):
        table["feed_forward"] = _essence_of_mixture(config.feed_forward)
    if config.streams is not None:
        table["streams"] = config.streams.essence()
    for training in ("init_std", "depth_scaled_init"):
        del table[training]
    yield from _flat(table, "")


def _settle_attention(table: dict[str, Any], attention: Any, dim: int) -> None:
    """Write out in ``table`` what follows from other fields, and leave out what does not count."""
    if not isinstance(attention, SelfAttention.Config):
        return
    table["num_kv_heads"], table["head_dim"] = attention.kv_heads, attention.width(dim)
    table["scale"] = None if attention.scale == attention.width(dim) ** -0.5 else attention.scale
    if attention.qk_norm == "none":
        del table["norm_eps"]
    if not attention.temperature_scale:
        del table["temperature_length"]
    if attention.rotary is not None:
        table["rotary"] = _essence_of_rotary(attention.rotary)


def _essence_of_rotary(rotary: Rotary.Config) -> dict[str, Any]:
    used = {
        "none": (),
        "linear": ("factor",),
        "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_positions"),
        "yarn": ("factor", "beta_fast", "beta_slow", "truncate", "original_positions"),
    }[rotary.scaling]
    table = {name: getattr(rotary, name) for name in ("scaling", "theta", "fraction", *used)}
    return {**table, "length_factor": rotary.length_factor}


def _essence_of_mixture(moe: MoE.Config) -> dict[str, Any]:
    score, select = to_dict(moe.router.score), to_dict(moe.router.select)
    if score["activation"] == "softmax" and select["normalize"] == "softmax":
        # Softmax over the chosen logits is the renormalised softmax over all.
        select["normalize"] = "sum"
    return {
        "kind": "moe",
        "num_experts": moe.num_experts,
        "hidden_dim": moe.hidden_dim,
        "weight_on": moe.weight_on,
        "activation": moe.activation,
        "bias": moe.bias,
        "shared_width": moe.shared_width,
        "shared_gate": moe.shared_gate,
        "shared_weight": moe.shared_weight,
        "router": {
            "score": {"kind": score["kind"], "activation": score["activation"], "bias": score.get("bias", False)},
            "select": select,
            # How a bias learns is of training.
            "balance": [
                (number, part["kind"], part["form"])
                for number, part in enumerate(to_dict(moe.router)["balance"])
                if part["kind"] == "bias"
            ],
        },
    }


def _flat(table: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _check_kinds(config: Decoder.Config) -> None:
    """Only plain parts can be compared with a family's."""
    fields: list[tuple[str, Any, tuple[type, ...]]] = [
        ("block", config.block, (PreNorm.Config, Sandwich.Config)),
        ("attention", config.attention, (SelfAttention.Config, LatentAttention.Config)),
        ("feed_forward", config.feed_forward, (SwiGLU.Config, MoE.Config, MLP.Config)),
    ]
    if config.dense_layers:
        fields.append(("dense_feed_forward", config.dense_feed_forward, (SwiGLU.Config,)))
    for name, part, plain in fields:
        if type(part) not in plain:
            kinds = " or ".join(repr(kind.owner.kind) for kind in plain)  # type: ignore[attr-defined]
            raise CheckpointError(
                f"no Hugging Face family has {name}.kind={type(part).owner.kind!r}; {kinds} can be exported"
            )


def _objection(lacking: dict[str, list[str]], family: str | None, *, is_dense: bool) -> str:
    if family is not None:
        return f"Hugging Face's {family} has no {some(lacking[family])}; leave the family out to take one that fits, if any does"
    # Mixtures beside dense models, and attention of another kind, of which no more is compared.
    close = {
        name: features
        for name, features in lacking.items()
        if not features[0].endswith(_IN_ALL) and not features[0].startswith("attention.kind=")
    } or lacking
    nowhere = set.intersection(*map(set, close.values()))
    if nowhere:
        where = " in a dense model" if is_dense else ""
        return f"no Hugging Face family has {some(sorted(nowhere))}{where}"
    # A part of another kind is one difference in words, and differs in all.
    kinds = {
        name: sum(feature.split("=")[0].endswith(".kind") for feature in features) for name, features in close.items()
    }
    closest = min(close, key=lambda name: (kinds[name], len(close[name])))
    return f"no Hugging Face family has all of this model; the closest, {closest}, lacks {some(close[closest])}"


def _write_configs(
    folder: Path, family: Any, model: Decoder, tokenizer: Tokenizer | None, ids: Mapping[str, Any] | None
) -> None:
    named = {} if tokenizer is None else tokenizer.special_ids
    # A key that a foreign config.json has not got stays away: the class of transformers has a default for it, null has none.
    tokens = {**(dict.fromkeys(SPECIAL_IDS) if ids is None else {}), **named, **(ids or {})}
    dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
    head = {"architectures": [family.ARCHITECTURE], "model_type": family.MODEL_TYPE, "torch_dtype": dtype}
    _write_json(folder / "config.json", {**head, **family.write(model.config), **tokens, **MARK})
    stop = list(tokenizer.stop_ids) if tokenizer is not None else []
    if stop:
        _write_json(folder / "generation_config.json", {**tokens, "eos_token_id": stop})


def _write_json(path: Path, table: dict[str, Any]) -> None:
    path.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
