"""Hugging Face folders, read and written without transformers: one file per family.

A family is chosen by ``model_type`` when reading, and by what the model needs when writing.
"""

from pathlib import Path
from typing import Any

import torch

from anabranch.bounds import shown
from anabranch.errors import CheckpointError, ConfigError
from anabranch.lm.decoder import Decoder
from anabranch.lm.formats.common import Foreign
from anabranch.lm.formats.export import FAMILIES, choose, export
from anabranch.lm.tensors import Layout, TensorSource, build_empty, check_amount, fill

__all__ = ["FAMILIES", "choose", "export", "load", "read_config"]


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
    ) as error:  # a field holds a value of a kind that none should
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

    ``dtype`` None takes that of the stored embedding. Raises CheckpointError as `read_config`, and if tensors do not fit.
    """
    model, layout, kind, ignore = prepare(source, table, path, dtype=dtype)
    where = path.parent if path.suffix == ".json" else path
    fill(model, source, layout, where=where, dtype=kind, device=device, ignore=ignore)
    return model


def prepare(
    source: TensorSource, table: dict[str, Any], path: Path, *, dtype: torch.dtype | None = None
) -> tuple[Decoder, Layout, torch.dtype | None, list[str]]:
    """(empty model, layout, type of its weights, names to ignore) of what `load` loads."""
    config = read_config(table, path)
    check_amount(config.count(1).parameters, source, path)
    layout = FAMILIES[table["model_type"]].sanitize(config, source.names)
    embedding = layout["embedding.weight"][0].name
    stored = source.dtype(embedding) if embedding in source.names else torch.float32
    kind = dtype or (stored if isinstance(stored, torch.dtype) else None)
    return build_empty(config), layout, kind, [name for name in source.names if _is_spare(name, config)]


def _is_spare(name: str, config: Decoder.Config) -> bool:
    """Tables that older versions of transformers stored, and a head that is the embedding."""
    return name.endswith(".rotary_emb.inv_freq") or (config.tie_embeddings and name == "lm_head.weight")
