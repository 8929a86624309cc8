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
from anabranch.lm.tensors import Layout, TensorSource, build_empty, check_amount, fill

__all__ = ["FAMILIES", "choose", "export", "load", "prepare", "read_config", "tied_as_stored", "type_of_embedding"]


def read_config(table: dict[str, Any], path: Path) -> Decoder.Config:
    """Our config for the foreign config.json ``table``, which lies at ``path``.

    Raises CheckpointError, with the field and its value, for what we cannot compute.
    """
    kind = table.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        why = " (multi-head latent attention is not built)" if kind in ("deepseek_v2", "deepseek_v3") else ""
        raise CheckpointError(f"model_type in {path} is {shown(kind)}{why}; supported: {', '.join(FAMILIES)}")
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
    model, layout, _, ignore = prepare(source, table, path, dtype=dtype)
    where = path.parent if path.suffix == ".json" else path
    fill(model, source, layout, where=where, dtype=dtype, device=device, ignore=ignore)
    return model


def prepare(
    source: TensorSource, table: dict[str, Any], path: Path, *, dtype: torch.dtype | None = None
) -> tuple[Decoder, Layout, torch.dtype | None, list[str]]:
    """(empty model, layout, ``dtype`` or that of the stored embedding, names to ignore) of what `load` loads."""
    config = tied_as_stored(read_config(table, path), source, path)
    check_amount(config.count(1).parameters, source, path)
    layout = place_embedding(FAMILIES[table["model_type"]].sanitize(config, source.names), config, source.names)
    return build_empty(config), layout, type_of_embedding(source, layout, dtype), spare(source.names, config)


def type_of_embedding(source: TensorSource, layout: Layout, dtype: torch.dtype | None) -> torch.dtype | None:
    """``dtype``, where that is None the type of the stored embedding; None for one that torch has not."""
    embedding = layout["embedding.weight"][0].name
    stored = source.dtype(embedding) if embedding in source.names else torch.float32
    return dtype or (stored if isinstance(stored, torch.dtype) else None)
