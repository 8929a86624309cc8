"""`convert`: a model from any format to another, in as many bits as it had or in fewer."""

from pathlib import Path
from typing import Any, Literal

import torch

from anabranch.data.tokenizer import SPECIAL_IDS
from anabranch.errors import ConfigError
from anabranch.files import read_json
from anabranch.lm import formats
from anabranch.lm.checkpoint import (
    check_exportable,
    find_model,
    is_foreign,
    load_stored,
    quantization_of,
    write_model,
)
from anabranch.lm.folder import carry, check_apart, check_replaceable, model_folder
from anabranch.lm.quantized import load_quantized, open_quantized
from anabranch.lm.shards import MAX_SHARD_BYTES
from anabranch.nn.quantize import check_bits

__all__ = ["convert"]


def convert(
    src: str | Path,
    dst: str | Path,
    to: Literal["native", "huggingface"] = "native",
    *,
    family: str | None = None,
    dtype: torch.dtype | None = None,
    quantize: Literal["int8", "int4"] | None = None,
    group: int | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    force: bool = False,
) -> None:
    """Load a model from anywhere and save it in another format, all or nothing.

    What lies beside the weights of a folder (tokenizer, chat template, generation_config.json, licence, model card) goes along as it is.

    Args:
        src: as for `load_model`.
        dst: the new folder: one that is not there, is empty, or holds a model that we saved and nothing else, which is replaced.
        to: ``native`` or ``huggingface``.
        family: Hugging Face ``model_type`` to write; None for the first that fits, beginning with that of ``src`` if it is, or
            was made from, a Hugging Face folder.
        dtype: of the saved weights; None keeps the stored one.
        quantize: save linear layers and experts in so many bits, see `load_quantized`; only ``native`` folders hold them. Weights are
            rounded to ``dtype`` first, as when a model is quantised while it is loaded in that type. None keeps what is there.
        group: with ``quantize``, weights that share a scale.
        max_shard_bytes: larger models are split into files of at most this size.
        force: let ``dst`` hold other files, which stay there; those that have the name of a new one, or would be read as parts of the
            new model, are renamed ``NAME.old``. The folder of a training run, and a ``dst`` that shares
            files with ``src``, are refused nevertheless.

    Raises:
        ConfigError: ``to`` or ``family`` is unknown, ``quantize`` or ``group`` cannot be, ``src`` is saved in other bits, or it has no
            layer that can be quantised.
        CheckpointError: ``src`` cannot be read, no family can express it, ``dst`` holds something else or is ``src``.
    """
    _check(to, quantize, group)
    found, target = find_model(src), Path(dst)
    check_apart(Path(src), target)
    check_apart(found, target)
    before = check_replaceable(target, force=force, advice="choose a new folder, or keep what is there with --force")
    table = read_json(found / "config.json") if found.is_dir() else {}
    origin = table.get("model_type") if is_foreign(table) else table.get("family")
    # What we made ourselves has only the ids of its tokenizer.
    ids = None if origin is None else _special_ids(table)
    makers = None
    if quantize is None:
        model, tokenizer = load_stored(found, dtype=dtype)
    elif quantization_of(found) is not None:
        model, tokenizer = load_quantized(found, quantize, dtype=dtype, group=group)
    else:
        # Layers are rounded as they are written: no more than one of them is in memory.
        opened = open_quantized(found, quantize, dtype=dtype, group=group)
        model, tokenizer, makers = opened.model, opened.tokenizer, opened.makers
    if to == "huggingface":
        check_exportable(model)
    with model_folder(target, before=before, force=force) as temporary:
        if to == "native":
            write_model(
                temporary, model, tokenizer, family=origin, ids=ids, makers=makers, max_shard_bytes=max_shard_bytes
            )
        else:
            formats.export(
                temporary, model, tokenizer, family=family, prefer=origin, ids=ids, max_shard_bytes=max_shard_bytes
            )
        if found.is_dir():
            carry(found, temporary)


def _special_ids(table: dict[str, Any]) -> dict[str, Any]:
    """The ids of begin, end and padding in a config.json, as they stand there: one, a list or null; none of another form."""
    found = {name: table[name] for name in SPECIAL_IDS if name in table}
    return {
        name: value
        for name, value in found.items()
        if value is None or all(type(one) is int for one in (value if isinstance(value, list) else [value]))
    }


def _check(to: str, quantize: str | None, group: int | None) -> None:
    if to not in ("native", "huggingface"):
        raise ConfigError(f"to is {to!r}; it must be 'native' or 'huggingface'")
    if quantize is not None and to != "native":
        raise ConfigError(
            f"quantize is {quantize!r}, but only 'native' folders hold quantised weights, and to is {to!r}"
        )
    if group is not None and quantize is None:
        raise ConfigError(f"group is {group}, but there is no quantize to use it; say int8 or int4")
    if quantize is not None:
        check_bits(quantize, group)
