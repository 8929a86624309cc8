"""Hugging Face folders, read and written without transformers: one file per family.

A family is chosen by ``model_type`` when reading, and by what the model needs when writing.
"""

from pathlib import Path
from typing import Any

import torch

from anabranch.bounds import shown
from anabranch.errors import CheckpointError, ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.lm.formats.common import Foreign, place_embedding, spare, tied_as_stored
from anabranch.lm.formats.export import choose, export
from anabranch.lm.formats.families import FAMILIES
from anabranch.lm.formats.few_bits import METHODS, dequantised
from anabranch.lm.formats.mxfp4 import Unpacked
from anabranch.lm.tensors import Layout, TensorSource, build_empty, check_amount, fill

__all__ = [
    "FAMILIES",
    "choose",
    "export",
    "load",
    "prepare",
    "read_config",
    "tied_as_stored",
    "type_of_embedding",
    "unpacked",
]


def read_config(table: dict[str, Any], path: Path) -> Decoder.Config:
    """Our config for the foreign config.json ``table``, which lies at ``path``.

    Raises CheckpointError, with the field and its value, for what we cannot compute.
    """
    kind = table.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise CheckpointError(f"model_type in {path} is {shown(kind)}; supported: {', '.join(FAMILIES)}")
    try:
        return FAMILIES[kind].read(Foreign(table, path))
    except ConfigError as error:
        raise CheckpointError(f"{path} does not describe a model that can be built: {error}") from None
    except (
        TypeError,
        ValueError,
        AttributeError,
        ArithmeticError,
        LookupError,
    ) as error:
        # A field may hold a value of any kind.
        raise CheckpointError(
            f"{path} does not describe a model that can be built: {type(error).__name__}: {error}"
        ) from error


def load(
    source: TensorSource,
    table: dict[str, Any],
    path: Path,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Decoder:
    """The model of the foreign config ``table``, which lies at ``path``, with the tensors of ``source``.

    ``dtype`` None keeps that of each stored tensor. Raises CheckpointError as `read_config`, and if tensors do not fit.
    """
    source = unpacked(source, table)
    model, layout, _, ignore = prepare(source, table, path, dtype=dtype)
    where = path.parent if path.suffix == ".json" else path
    fill(model, source, layout, where=where, dtype=dtype, device=device, ignore=ignore)
    return model


def unpacked(source: TensorSource, table: dict[str, Any]) -> TensorSource:
    """``source`` with tensors in few bits as they are when dequantised, where ``quantization_config`` tells of any."""
    given = table.get("quantization_config")
    if not isinstance(given, dict) or not isinstance(method := given.get("quant_method"), str):
        return source
    if method == "mxfp4":
        return Unpacked(source)
    return dequantised(source, given) if method in METHODS else source


def prepare(
    source: TensorSource, table: dict[str, Any], path: Path, *, dtype: torch.dtype | None = None
) -> tuple[Decoder, Layout, torch.dtype | None, list[str]]:
    """(empty model, layout, ``dtype`` or that of the stored embedding, names to ignore) of what `load` loads."""
    config = tied_as_stored(read_config(table, path), source, path)
    check_amount(config.count(1).parameters, source, path)
    family = FAMILIES[table["model_type"]]
    ignore = spare(source.names, config, has_drafts=getattr(family, "HAS_DRAFT_LAYERS", False))
    # Shared experts of no width, which transformers stores where there are none.
    ignore += [name for name in source.names if 0 in source.shape(name)]
    layout = place_embedding(family.sanitize(config, source.names), config, source.names)
    return build_empty(config), layout, type_of_embedding(source, layout, dtype), ignore


def type_of_embedding(source: TensorSource, layout: Layout, dtype: torch.dtype | None) -> torch.dtype | None:
    """``dtype``, where that is None the type of the stored embedding; None for one that torch has not."""
    embedding = layout["embedding.weight"][0].name
    stored = source.dtype(embedding) if embedding in source.names else torch.float32
    return dtype or (stored if isinstance(stored, torch.dtype) else None)
