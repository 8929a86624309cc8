"""Models that are larger than memory: everything but the routed experts is loaded, these stay in their files.

    model, tokenizer, engine = load_offloaded("runs/a", "2GiB")

Experts are read straight from the safetensors files of the folder at their offsets, ours or Hugging Face's, into slots; where a file
stores them in another type, they are converted on the way. Those of a model in int8 or int4 stay so in their slots, and so do those that
are rounded here, layer by layer, into a file of their own. No expert is in memory but those in slots.
"""

# Shapes: E experts, F hidden (2F: gate, then up), D width
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from anabranch.data.tokenizer import Tokenizer
from anabranch.errors import CapacityError, CheckpointError, ConfigError
from anabranch.lm.checkpoint import OpenedModel, find_model, open_model, quantization_of
from anabranch.lm.decoder import Decoder
from anabranch.lm.quantized import Rounding, open_quantized
from anabranch.lm.quantized_form import check_integers, empty_quantized, fill_quantized, has_panels
from anabranch.lm.tensors import FLOATS, SafetensorsFiles, fill, read_header
from anabranch.lm.tensors import Piece as StoredPiece
from anabranch.nn.pool import ExpertPool
from anabranch.nn.quantize import QuantizedPool, put, replace
from anabranch.places import cache_folder, make_cache
from anabranch.serving.expertflow.cache import Audit
from anabranch.serving.expertflow.expertflow import OffloadEngine, Pools, find_pools, tokenizer_fingerprint
from anabranch.serving.expertflow.layout import Expert
from anabranch.serving.expertflow.policy import Policy, make_policy
from anabranch.serving.expertflow.predictors.base import Naming, RoutePredictor
from anabranch.serving.expertflow.tiers import FileTier, IntegerTier, Piece, Tier, write_experts
from anabranch.sizes import parse_bytes

Table = dict[Expert, list[Piece]]
Bits = Literal["int8", "int4"]


def load_offloaded(
    path: str | Path,
    budget_bytes: int | str | None,
    *,
    policy: str | Policy = "plec",
    predictor: str | RoutePredictor | None = "router_lookahead",
    dtype: torch.dtype | None = None,
    quantize: Literal["int8", "int4"] | None = None,
    device: torch.device | str | None = None,
    drop_cache: bool = False,
    naming: Naming = Naming(),  # noqa: B008
    workers: int = 3,
    audit: Audit | None = None,
    insist: bool = True,
) -> tuple[Decoder, Tokenizer | None, OffloadEngine]:
    """Load a model without its experts, which come when they are wanted.

    Args:
        path: a model folder of ours or of Hugging Face with safetensors files, or a training run; with ``quantize`` a GGUF file too.
            Experts that are saved in int8 or int4 stay so in slots, and ``budget_bytes`` counts them so.
        dtype: of the weights; None keeps the stored one.
        quantize: round linear layers and experts of a model that is not saved so, as `anabranch.lm.quantized.load_quantized` does. The
            experts go to a file without a name in the cache folder, which takes the disk as much as they are large until the engine ends.
        device: of the model and of the slots.
        drop_cache: do not let the system's page cache keep what was read.

    The other arguments and the errors are those of `offload`; CheckpointError too for a folder that cannot be read so, CapacityError
    where rounded experts do not fit on the disk.
    """
    options: dict[str, Any] = {"policy": policy, "predictor": predictor, "naming": naming, "workers": workers}
    options |= {"device": device or "cpu", "audit": audit, "insist": insist}
    if quantize is not None and quantization_of(find_model(path)) is None:
        return _rounded(path, budget_bytes, quantize, dtype, drop_cache, options)
    opened = open_model(path, dtype=dtype)
    if not isinstance(opened.source, SafetensorsFiles):
        raise CheckpointError(
            f"{opened.where} has no safetensors files that experts can be read from as they lie; convert it (anabranch convert)"
        )
    model = opened.model
    _retype(model, opened)
    _put_quantized(opened)
    found = find_pools(model, str(path))
    names = _names(model, found)
    is_old = [_is_in_bits(opened, name) and not has_panels(opened.source, name) for name in names]
    tier: Tier
    if all(is_old):
        tier = IntegerTier(FileTier(_table_of_integers(opened, found, names), drop_cache=drop_cache))
    else:
        tier = FileTier(_table(opened, found, names), drop_cache=drop_cache)
    engine = _engine(model, found, budget_bytes, tier, opened.tokenizer, options)
    try:
        _fill(opened, names, device)
        engine.know_routers()
    except BaseException:
        engine.close()
        raise
    return model.eval(), opened.tokenizer, engine


def _rounded(
    path: str | Path, budget: int | str | None, bits: Bits, dtype: torch.dtype | None, drop_cache: bool, options: Any
) -> tuple[Decoder, Tokenizer | None, OffloadEngine]:
    """A model whose layers are rounded here: experts to a file, the others in memory."""
    opened = open_quantized(path, bits, dtype=dtype)
    model = opened.model
    found = find_pools(model, str(path))
    names = _names(model, found)
    if not all(name in opened.makers for name in names):
        raise ConfigError(f"quantize is {bits!r}, and not all experts of {path} can be in {bits}; leave it out")
    _check_budget(found, budget, options["policy"])
    tier = _spill(opened, names, found.layout.total_bytes)
    tier.drop_cache = drop_cache
    engine = _engine(model, found, budget, tier, opened.tokenizer, options)
    try:
        for name, make in opened.makers.items():
            if name not in names:
                put(model, name, make())
        model.to(options["device"])
        engine.know_routers()
    except BaseException:
        engine.close()
        raise
    return model.eval(), opened.tokenizer, engine


def _spill(opened: Rounding, names: Sequence[str], num_bytes: int) -> FileTier:
    """Round the pools of these names into a file that has lost its name, one after the other."""
    place = cache_folder()
    make_cache(place)
    free = shutil.disk_usage(place).free
    if free < num_bytes:
        raise CapacityError(
            f"{place} has {free:,} bytes free, and the rounded experts take {num_bytes:,}; set ANABRANCH_CACHE to a folder on another "
            "disk, or save the model in few bits (anabranch convert --quantize)"
        )

    def pools() -> Iterator[tuple[Tensor, Tensor]]:
        for name in names:
            pool = opened.makers[name]()
            assert isinstance(pool, QuantizedPool)
            yield pool.data13, pool.data2

    with tempfile.TemporaryDirectory(prefix="experts-", dir=place) as folder:
        # Open files outlive their names.
        return write_experts(Path(folder) / "experts.bin", pools())


def _check_budget(found: Pools, budget_bytes: int | str | None, policy: str | Policy) -> int:
    """The budget in bytes. Raises ConfigError for one that is too small."""
    budget = found.layout.total_bytes if budget_bytes is None else parse_bytes(budget_bytes)
    found.layout.slots(budget, per_layer=make_policy(policy).per_layer)
    return budget


def _engine(
    model: Decoder,
    found: Pools,
    budget_bytes: int | str | None,
    tier: Tier,
    tokenizer: Tokenizer | None,
    options: dict[str, Any],
) -> OffloadEngine:
    budget = _check_budget(found, budget_bytes, options["policy"])
    fingerprint = found.fingerprint(tokenizer_fingerprint(tokenizer, model))
    return OffloadEngine(model, found, budget, tier, fingerprint=fingerprint, **options)


def _is_in_bits(opened: OpenedModel, pool: str) -> bool:
    return opened.quantization is not None and pool in opened.quantization["modules"]


def _put_quantized(opened: OpenedModel) -> None:
    """In place of the pools that are saved in few bits, ones that tell their sizes."""
    if opened.quantization is None:
        return
    made = empty_quantized(opened.model, opened.source, opened.quantization, where=opened.where, pools_only=True)
    for name, pool in made.items():
        replace(opened.model, name, pool)


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
        is_in_bits = _is_in_bits(opened, name)
        for weight, part in enumerate(("w13", "w2")):
            stored: Sequence[StoredPiece] = opened.layout[f"{name}.{part}"]
            for piece in [StoredPiece(f"{name}.{part}.panels")] if is_in_bits else stored:
                dtype = opened.source.dtype(piece.name)
                if dtype not in FLOATS and not is_in_bits:
                    raise CheckpointError(
                        f"{piece.name} in {opened.where} is stored as {dtype}; experts must be floating-point numbers"
                    )
                _add(table, opened.source, headers, piece, number, weight, found.layout.num_experts[number])
    return table


def _table_of_integers(opened: OpenedModel, found: Pools, names: Sequence[str]) -> Table:
    """The pieces of each expert as `IntegerTier` wants them."""
    headers: dict[Path, tuple[int, dict[str, Any]]] = {}
    assert isinstance(opened.source, SafetensorsFiles)
    assert opened.quantization is not None
    table: Table = {}
    for number, (name, pool) in enumerate(zip(names, found.pools, strict=True)):
        assert isinstance(pool, QuantizedPool)
        for place, part, packed in zip((0, 3), ("w13", "w2"), pool.packed, strict=True):
            shape = (packed.num_experts, packed.rows, packed.depth)
            stored = check_integers(opened.source, f"{name}.{part}", packed.kind, shape, opened.where)
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
