"""Models that are larger than memory: everything but the routed experts is loaded, these stay in their files.

    model, tokenizer, engine = load_offloaded("runs/a", "2GiB")

Experts are read straight from the safetensors files of the folder at their offsets, ours or Hugging Face's, into slots; where a file
stores them in another type, they are converted on the way. Those of a model in int8 or int4 stay so in their slots, and so do those that
are rounded here, layer by layer, into a file of their own. Experts of a GGUF file, or in GPTQ or AWQ, are read in the bits that
they are stored in, and put in order on the way. No expert is in memory but those in slots.
"""

# Shapes: E experts, F hidden (2F: gate, then up), D width
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.adapters.pool import LowRankPool
from anabranch.data.tokenizer import Tokenizer
from anabranch.errors import CapacityError, CheckpointError, ConfigError
from anabranch.lm.checkpoint import OpenedModel, find_model, open_model, quantization_of
from anabranch.lm.decoder import Decoder
from anabranch.lm.quantized import Rounding, makes_experts, open_quantized
from anabranch.lm.quantized_form import check_integers, empty_quantized, fill_quantized, has_panels
from anabranch.lm.quantized_layers import Bits
from anabranch.lm.tensors import FLOATS, Layout, SafetensorsFiles, TensorSource, fill, read_header, read_parts
from anabranch.lm.tensors import Piece as StoredPiece
from anabranch.nn.packed import Packed
from anabranch.nn.parts import Parts
from anabranch.nn.pool import ExpertPool
from anabranch.nn.quantize import QuantizedPool, put, replace
from anabranch.places import cache_folder, make_cache
from anabranch.serving.expertflow.cache import Audit
from anabranch.serving.expertflow.expertflow import OffloadEngine, tokenizer_fingerprint
from anabranch.serving.expertflow.layout import Expert
from anabranch.serving.expertflow.policy import Policy
from anabranch.serving.expertflow.pools import Pools, pools_of
from anabranch.serving.expertflow.predictors.base import Naming, RoutePredictor
from anabranch.serving.expertflow.tiers import FileTier, IntegerTier, Piece, SourceTier, Tier, write_experts
from anabranch.sizes import parse_bytes

Table = dict[Expert, list[Piece]]
# Of a pool, by their names in it: what stays in memory.
_BIASES = ("b13", "b2")


def load_offloaded(
    path: str | Path,
    budget_bytes: int | str | None,
    *,
    policy: str | Policy = "plec",
    predictor: str | RoutePredictor | None = "router_lookahead",
    dtype: torch.dtype | None = None,
    quantize: Bits | None = None,
    device: torch.device | str | None = None,
    drop_cache: bool = False,
    naming: Naming = Naming(),  # noqa: B008
    workers: int = 3,
    audit: Audit | None = None,
    insist: bool = True,
) -> tuple[Decoder, Tokenizer | None, OffloadEngine]:
    """Load a model without its experts, which come when they are wanted.

    Args:
        path: a model folder of ours or of Hugging Face with safetensors files, a training run, or a GGUF file.
            Experts that are saved in int8 or int4 stay so in slots, and ``budget_bytes`` counts them so.
        dtype: of the weights; None keeps the stored one.
        quantize: bring linear layers and experts of a model that is not saved so into these bits, as
            `anabranch.lm.quantized.load_quantized` does. Rounded experts go to a file without a name in the cache folder, which takes the
            disk as much as they are large until the engine ends; with ``stored``, and of a GGUF file with None, they are made of the
            model's own files whenever they are wanted.
        device: of the model and of the slots.
        drop_cache: do not let the system's page cache keep what was read; not of experts that are made.

    The other arguments and the errors are those of `offload`; CheckpointError too for a folder that cannot be read so, CapacityError
    where rounded experts do not fit on the disk.
    """
    options: dict[str, Any] = {"policy": policy, "predictor": predictor, "naming": naming, "workers": workers}
    options |= {"device": device or "cpu", "audit": audit, "insist": insist}
    where = find_model(path)
    if makes_experts(where, quantize):
        check_drop_cache(drop_cache, path)
        return _as_stored(path, budget_bytes, quantize, dtype, options)
    if quantize is not None and quantize != "stored" and quantization_of(where) is None:
        return _rounded(path, budget_bytes, quantize, dtype, drop_cache, options)
    opened = open_model(path, dtype=dtype)
    if not isinstance(opened.source, SafetensorsFiles):
        raise CheckpointError(
            f"{opened.where} has no safetensors files that experts can be read from as they lie; convert it (anabranch convert)"
        )
    model = opened.model
    _retype(model, opened)
    _put_quantized(opened)
    found = pools_of(model, str(path))
    if opened.quantization is not None:
        found = _experts_of(model, path)
    names = _names(model, found)
    _bring_biases(opened.source, opened.layout, names, found, opened.where)
    is_old = [_is_in_bits(opened, name) and not has_panels(opened.source, name) for name in names]
    tier: Tier
    if all(is_old):
        tier = IntegerTier(FileTier(_table_of_integers(opened, found, names), drop_cache=drop_cache))
    else:
        tier = FileTier(_table(opened, found, names), drop_cache=drop_cache)
    # It has opened by name what is open already: the experts, and the layers around them, are of one model.
    try:
        opened.source.check_names()
    except CheckpointError:
        tier.close()
        raise
    engine = _engine(model, found, budget_bytes, tier, opened.tokenizer, options)
    try:
        _fill(opened, found, names, device)
        engine.know_routers()
    except BaseException:
        engine.close()
        raise
    return model.eval(), opened.tokenizer, engine


def _experts_of(model: Decoder, path: str | Path) -> Pools:
    """The experts of a model in few bits. Raises ConfigError for one that has but adapters of a mixture."""
    found = pools_of(model, str(path))
    if not found.predicts:
        raise ConfigError(
            f"the experts of {path} are {found.what}, which come when they are wanted where the model is in floating point; leave out the "
            "budget, or the few bits (--quantize none)"
        )
    return found


def check_drop_cache(drop_cache: bool, path: str | Path) -> None:
    """Raise ConfigError for ``drop_cache`` where experts are made of what files store."""
    if drop_cache:
        raise ConfigError(f"drop_cache is set, but experts of {path} are read through the page cache; leave it out")


def _rounded(
    path: str | Path, budget: int | str | None, bits: Bits, dtype: torch.dtype | None, drop_cache: bool, options: Any
) -> tuple[Decoder, Tokenizer | None, OffloadEngine]:
    """A model whose layers are rounded here: experts to a file, the others in memory."""
    opened = open_quantized(path, bits, dtype=dtype)
    found = _experts_of(opened.model, path)
    names = _names(opened.model, found)
    if not all(name in opened.makers for name in names):
        raise ConfigError(f"quantize is {bits!r}, and not all experts of {path} can be in {bits}; leave it out")
    _check_budget(found, budget, options["policy"])
    tier = _spill(opened, names, found.layout.total_bytes)
    tier.drop_cache = drop_cache
    _bring_biases(opened.source, opened.layout, names, found, Path(path))
    return _with_rest(opened, found, names, tier, budget, options)


def _as_stored(
    path: str | Path, budget: int | str | None, bits: Bits | None, dtype: torch.dtype | None, options: Any
) -> tuple[Decoder, Tokenizer | None, OffloadEngine]:
    """A model whose experts are made of what its files store, one by one."""
    opened = open_quantized(path, bits, dtype=dtype, pools_apart=True)
    found = _experts_of(opened.model, path)
    names = _names(opened.model, found)
    _check_budget(found, budget, options["policy"])
    _bring_biases(opened.source, opened.layout, names, found, Path(path))
    parts = {
        Expert(number, index): [(read, weight, ()) for weight, read in enumerate(reads)]
        for number, (name, pool) in enumerate(zip(names, found.pools, strict=True))
        for index, reads in enumerate(opened.layers.experts(name, pool))
    }
    return _with_rest(opened, found, names, SourceTier(parts), budget, options)


def _with_rest(
    opened: Rounding, found: Pools, names: Sequence[str], tier: Tier, budget: int | str | None, options: Any
) -> tuple[Decoder, Tokenizer | None, OffloadEngine]:
    """A model whose experts come from a ``tier``, and everything else in its place."""
    model = opened.model
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
    found.slots(budget, policy)
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


def _bring_biases(source: TensorSource, layout: Layout, names: Sequence[str], found: Pools, where: Path) -> None:
    """Give pools without memory the biases of their experts, which stay in memory. Raises CheckpointError where a file lacks them."""
    for name, pool in zip(names, found.pools, strict=True):
        likes = {f"{name}.{part}": like for part in _BIASES if (like := getattr(pool, part, None)) is not None}
        for key, value in read_parts(source, layout, likes, where=where).items():
            is_learned = isinstance(pool, ExpertPool)
            setattr(pool, key.rpartition(".")[2], nn.Parameter(value, False) if is_learned else value)


def _is_in_bits(opened: OpenedModel, pool: str) -> bool:
    return opened.quantization is not None and pool in opened.quantization["modules"]


def _put_quantized(opened: OpenedModel) -> None:
    """In place of the pools that are saved in few bits, ones that tell their sizes."""
    if opened.quantization is None:
        return
    made = empty_quantized(opened.model, opened.source, opened.quantization, where=opened.where, pools_only=True)
    for name, pool in made.items():
        replace(opened.model, name, pool)


def _fill(opened: OpenedModel, found: Pools, pools: Sequence[str], device: torch.device | str | None) -> None:
    """Load everything but the pools."""
    if opened.quantization is not None:
        fill_quantized(
            opened.model,
            opened.source,
            opened.quantization,
            where=opened.where,
            dtype=opened.dtype,
            device=device,
            elsewhere=pools,
        )
        return
    stored = [f"{name}.{part}" for name in pools for part in (*found.parts, *_BIASES)]
    kept = [piece.name for name in stored for piece in opened.layout.get(name, ())]
    fill(
        opened.model,
        opened.source,
        opened.layout,
        where=opened.where,
        dtype=opened.dtype,
        device=device,
        ignore=[*opened.ignore, *kept],
    )


def _retype(model: Decoder, opened: OpenedModel) -> None:
    """Give the pools, which are still without memory, the type that their slots shall have."""
    for name, module in model.named_modules():
        if isinstance(module, ExpertPool | LowRankPool):
            like = opened.layout[f"{name}.{'w13' if isinstance(module, ExpertPool) else 'a'}"][0].name
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
        for weight, part in enumerate(found.parts):
            pool, key = found.pools[number], f"{name}.{part}"
            if isinstance(pool, QuantizedPool) and isinstance(pool.packed[weight], Parts):
                _add_parts(table, opened.source, headers, key, pool.packed[weight], number, weight)
                continue
            stored: Sequence[StoredPiece] = opened.layout[key]
            for piece in [StoredPiece(f"{key}.panels")] if is_in_bits else stored:
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
            assert isinstance(packed, Packed), "integers are of one kind"
            shape = (packed.num_experts, packed.rows, packed.depth)
            stored = check_integers(opened.source, f"{name}.{part}", packed.kind, shape, opened.where)
            for offset, tensor in enumerate(stored):
                _add(table, opened.source, headers, StoredPiece(tensor), number, place + offset, pool.num_experts)
    return table


def _add_parts(
    table: Table, source: SafetensorsFiles, headers: dict, key: str, matrices: Any, pool: int, weight: int
) -> None:
    """Each part of stacked matrices is a tensor, and of an expert its bytes are a piece of the slot's."""
    begin = 0
    for number, like in enumerate(matrices.likes):
        stored: Table = {}
        _add(stored, source, headers, StoredPiece(f"{key}.part{number}.panels"), pool, weight, matrices.num_experts)
        size = like.data[0].numel()
        for expert, [piece] in stored.items():
            where = (slice(begin, begin + size),)
            table.setdefault(expert, []).append(Piece(piece.path, piece.offset, (size,), piece.dtype, weight, where))
        begin += size


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
