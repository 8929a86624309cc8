"""Models that are larger than memory: everything but the routed experts is loaded, these stay in their files.

    model, tokenizer, engine = load_offloaded("runs/a", "2GiB")

Experts are read straight from the safetensors files of the folder at their offsets, ours or Hugging Face's, into slots; where a file
stores them in another type, or in int8 or int4, they are converted on the way. No expert is in memory but those in slots.
"""

# Shapes: E experts, F hidden (2F: gate, then up), D width
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from anabranch.data.tokenizer import Tokenizer
from anabranch.errors import CheckpointError
from anabranch.lm.checkpoint import OpenedModel, open_model
from anabranch.lm.decoder import Decoder
from anabranch.lm.quantized_form import check_integers, fill_quantized
from anabranch.lm.tensors import FLOATS, SafetensorsFiles, fill, read_header
from anabranch.lm.tensors import Piece as StoredPiece
from anabranch.nn.pool import ExpertPool
from anabranch.serving.config import parse_bytes
from anabranch.serving.expertflow.cache import Audit
from anabranch.serving.expertflow.expertflow import OffloadEngine, Pools, find_pools, tokenizer_fingerprint
from anabranch.serving.expertflow.layout import Expert
from anabranch.serving.expertflow.policy import Policy, make_policy
from anabranch.serving.expertflow.predictors.base import Naming, RoutePredictor
from anabranch.serving.expertflow.tiers import FileTier, Piece, QuantizedTier, Tier

Table = dict[Expert, list[Piece]]


def load_offloaded(
    path: str | Path,
    budget_bytes: int | str | None,
    *,
    policy: str | Policy = "plec",
    predictor: str | RoutePredictor | None = "router_lookahead",
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    drop_cache: bool = False,
    naming: Naming = Naming(),  # noqa: B008
    workers: int = 3,
    audit: Audit | None = None,
) -> tuple[Decoder, Tokenizer | None, OffloadEngine]:
    """Load a model without its experts, which come when they are wanted.

    Args:
        path: a model folder of ours or of Hugging Face with safetensors files, or a training run. Experts that are saved in int8 or
            int4 are read so, and unpacked into slots of ``dtype``.
        dtype: of the weights; None keeps the stored one.
        device: of the model and of the slots.
        drop_cache: do not let the system's page cache keep what was read.

    The other arguments and the errors are those of `offload`; CheckpointError too for a folder that cannot be read so.
    """
    opened = open_model(path, dtype=dtype)
    if not isinstance(opened.source, SafetensorsFiles):
        raise CheckpointError(
            f"{opened.where} has no safetensors files, which experts are read from; convert it (anabranch convert)"
        )
    model = opened.model
    _retype(model, opened)
    found = find_pools(model)
    tier: Tier
    names = _names(model, found)
    is_quantized = opened.quantization is not None and all(name in opened.quantization["modules"] for name in names)
    if is_quantized:
        tier = QuantizedTier(FileTier(_table_of_integers(opened, found, names), drop_cache=drop_cache))
    else:
        tier = FileTier(_table(opened, found, names), drop_cache=drop_cache)
    budget = found.layout.total_bytes if budget_bytes is None else parse_bytes(budget_bytes)
    found.layout.slots(budget, per_layer=make_policy(policy).per_layer)
    engine = OffloadEngine(
        model, found, budget, tier, policy=policy, predictor=predictor,
        fingerprint=found.fingerprint(tokenizer_fingerprint(opened.tokenizer, model)),
        naming=naming, workers=workers, device=device or "cpu", audit=audit,
    )  # fmt: skip
    try:
        _fill(opened, names, device)
    except BaseException:
        engine.close()
        raise
    return model.eval(), opened.tokenizer, engine


def _fill(opened: OpenedModel, pools: Sequence[str], device: torch.device | str | None) -> None:
    """Load everything but the pools."""
    if opened.quantization is not None:
        fill_quantized(
            opened.model, opened.source, opened.quantization, where=opened.where, dtype=opened.dtype, device=device,
            elsewhere=pools,
        )  # fmt: skip
        return
    weights = [f"{name}.{part}" for name in pools for part in ("w13", "w2")]
    kept = [piece.name for name in weights for piece in opened.layout[name]]
    fill(
        opened.model, opened.source, opened.layout, where=opened.where, dtype=opened.dtype, device=device,
        ignore=[*opened.ignore, *kept],
    )  # fmt: skip


def _retype(model: Decoder, opened: OpenedModel) -> None:
    """Give the pools, which are still without memory, the type that their slots shall have."""
    for name, module in model.named_modules():
        if isinstance(module, ExpertPool):
            like = opened.layout[f"{name}.w13"][0].name
            # In few bits; their slots are of the type of what is not.
            if like not in opened.source.names:
                like = "embedding.weight"
            stored = opened.source.dtype(like)
            kind = opened.dtype or (stored if isinstance(stored, torch.dtype) else torch.float32)
            for weight in module.parameters():
                weight.data = weight.data.to(kind)


def _names(model: Decoder, found: Pools) -> list[str]:
    """Name of each pool in the model."""
    name_of = {id(module): name for name, module in model.named_modules()}
    return [name_of[id(pool)] for pool in found.pools]


def _table(opened: OpenedModel, found: Pools, names: Sequence[str]) -> Table:
    """The pieces of each expert."""
    headers: dict[Path, tuple[int, dict[str, Any]]] = {}
    assert isinstance(opened.source, SafetensorsFiles)
    table: Table = {}
    for number, name in enumerate(names):
        for weight, part in enumerate(("w13", "w2")):
            stored: Sequence[StoredPiece] = opened.layout[f"{name}.{part}"]
            for piece in stored:
                dtype = opened.source.dtype(piece.name)
                if dtype not in FLOATS:
                    raise CheckpointError(
                        f"{piece.name} in {opened.where} is stored as {dtype}; experts must be floating-point numbers"
                    )
                _add(table, opened.source, headers, piece, number, weight, found.layout.num_experts[number])
    return table


def _table_of_integers(opened: OpenedModel, found: Pools, names: Sequence[str]) -> Table:
    """The pieces of each expert as `QuantizedTier` wants them."""
    headers: dict[Path, tuple[int, dict[str, Any]]] = {}
    assert isinstance(opened.source, SafetensorsFiles)
    assert opened.quantization is not None
    table: Table = {}
    for number, (name, pool) in enumerate(zip(names, found.pools, strict=True)):
        for place, part, weight in ((0, "w13", pool.w13), (3, "w2", pool.w2)):
            kind = opened.quantization["modules"][name]
            stored = check_integers(opened.source, f"{name}.{part}", kind, tuple(weight.shape), opened.where)
            for offset, tensor in enumerate(stored):
                _add(table, opened.source, headers, StoredPiece(tensor), number, place + offset, pool.num_experts)
    return table


def _add(
    table: Table, source: SafetensorsFiles, headers: dict, piece: StoredPiece, pool: int, weight: int, num_experts: int
) -> None:
    """A stored tensor is all of a stacked weight, or a part of one expert's."""
    path = source.path(piece.name)
    if path not in headers:
        headers[path] = read_header(path)
    start, entries = headers[path]
    offset, shape = start + entries[piece.name]["data_offsets"][0], source.shape(piece.name)
    dtype = source.dtype(piece.name)
    assert isinstance(dtype, torch.dtype)
    if piece.where:
        index, *rest = piece.where
        assert isinstance(index, int), "layouts give an expert's number first"
        table.setdefault(Expert(pool, index), []).append(Piece(path, offset, shape, dtype, weight, tuple(rest)))
        return
    if shape[0] != num_experts:
        raise CheckpointError(f"{piece.name} in {path} holds {shape[0]} experts, the model has {num_experts}")
    for index in range(num_experts):
        one = Piece(path, 0, shape[1:], dtype, weight)
        one = Piece(path, offset + index * one.bytes, shape[1:], dtype, weight)
        table.setdefault(Expert(pool, index), []).append(one)
