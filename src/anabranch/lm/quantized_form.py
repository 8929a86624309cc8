"""How quantised layers lie in a model folder.

Linear layers in int8 or int4 are there as plain integers, scales and minima, which know the layout of no kernel: ``name.number`` (uint8;
of int4 two in a byte, the one of the even column in the low half), ``name.scale`` and, of int4, ``name.least`` (float16), and
``name.bias``. They are packed when the model is loaded, which loses nothing. Pools are there as they are computed with, so that an expert
can be read from its file straight to where it is used: ``name.w13.panels`` and ``name.w2.panels``, uint8 ``[E, P, bytes]`` of
`anabranch.nn.packed`; so are linear layers of `anabranch.nn.superblocks` (``name.panels``, E = 1), and each part of matrices whose rows are
of several kinds (``name.part0.panels``, ``name.w13.part0.panels``, ...). Folders of schema 2 have pools as integers too. The table
``quantization`` of ``config.json`` says what there is, of a pool whose matrices are of two kinds both, of a matrix in parts the kind of
each:

    {"scheme": "int4", "group": 32, "modules": {"blocks.0.attention.qkv": ["q4_k", "q6_k"],
     "blocks.0.feed_forward.experts": [["q4_k", "q5_k"], "q6_k"], ..., "head": "int8"}}
"""
# Shapes: E matrices of a stack (1 for a linear layer), N rows, K columns, G groups of a row, P panels of 16 rows

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from anabranch.errors import CheckpointError, ConfigError
from anabranch.lm.shards import Later
from anabranch.lm.tensors import FLOATS, Piece, SafetensorsFiles, TensorSource, fill, state_once
from anabranch.nn.nf4 import Nf4Linear
from anabranch.nn.packed import SIDE, WIDE, Packed, check_depth, panel_bytes
from anabranch.nn.parted import PartedLinear
from anabranch.nn.parts import Form, Matrices, Parts, can_be_parts, empty_of, form_of, parts_of
from anabranch.nn.pool import ExpertPool
from anabranch.nn.quantize import PackedEmbedding, QuantizedLinear, QuantizedPool, module_of, put, replace
from anabranch.nn.superblocks import BITS_OF, BLOCK

__all__ = [
    "SCHEMES",
    "Quantized",
    "check_integers",
    "check_panels",
    "check_scheme",
    "describe",
    "empty_quantized",
    "fill_quantized",
    "has_panels",
    "is_table",
    "kinds_of_pool",
    "packed_of",
    "stored_state",
]

Scheme = Literal["int8", "int4"]
Quantized = QuantizedLinear | PartedLinear | QuantizedPool
# What is made of a file: these, or its table of vectors.
Made = Quantized | PackedEmbedding
SCHEMES = ("int8", "int4")
# Those that only files are made of, which lie as they are computed with.
KEPT = {*BITS_OF, "fp4"}
KINDS = {*SCHEMES, *KEPT}


def describe(model: nn.Module) -> dict[str, Any] | None:
    """The table ``quantization`` of a model, see `is_table`; None for one without quantised layers.

    ``scheme`` is the fewest bits in it; ``group`` how many weights share a scale in most of such layers, null for one scale per row.
    """
    modules = dict(_quantized(model))
    if not modules:
        return None
    kinds = {name: _kind_of(module) for name, module in modules.items()}
    packed = [part for module in modules.values() for _, part in _packed(module)]
    scheme = "int8" if all(part.kind == "int8" for part in packed) else "int4"
    packed = [part for part in packed if part.kind == scheme] or packed
    groups = [None if part.group == part.depth and scheme == "int8" else part.group for part in packed]
    return {"scheme": scheme, "group": max(groups, key=groups.count), "modules": kinds}


def _kind_of(module: Quantized) -> Any:
    """The kind of its matrix; of a pool whose two are of several kinds both, of a layer in parts that of each."""
    if isinstance(module, PartedLinear):
        return [part.kind for part in module.parts]
    matrices: Any = module.packed if isinstance(module, QuantizedPool) else [module.packed]
    kinds = [_kind_of_matrices(each) for each in matrices]
    return kinds[0] if isinstance(kinds[0], str) and kinds.count(kinds[0]) == len(kinds) else kinds


def _kind_of_matrices(matrices: Matrices) -> Any:
    kinds = [kind for _, kind, _ in form_of(matrices)]
    return kinds[0] if len(kinds) == 1 else kinds


def is_table(given: Any) -> bool:
    """Whether this is a table ``quantization``: a scheme, and the kind of each module."""
    return isinstance(given, dict) and given.get("scheme") in SCHEMES and isinstance(given.get("modules"), dict)


def check_scheme(table: dict[str, Any], scheme: Scheme, group: int | None, where: Path) -> None:
    """Raise ConfigError if a saved model has other bits, or another group, than are asked for; ``group`` None takes any."""
    saved = table.get("scheme")
    if saved != scheme:
        raise ConfigError(
            f"{where} is saved in {saved}, and {scheme} is asked for; leave it out, or quantise the model it was made from"
        )
    if group is not None and group != table.get("group"):
        shared = table.get("group") or "a row"
        raise ConfigError(f"in {where} {shared} weights share a scale, and group is {group}; leave it out")


def stored_state(model: nn.Module, makers: Mapping[str, Callable[[], Made]] | None = None) -> dict[str, Tensor | Later]:
    """The tensors of a model as they are saved: `state_once` where nothing is quantised.

    ``makers`` make quantised layers that only tell their sizes so far (on the device ``meta``), by name, one after the other as they are
    written.
    """
    odd = next((name for name, module in model.named_modules() if isinstance(module, Nf4Linear)), None)
    if odd is not None:
        raise ConfigError(f"{odd} is in NF4, in which models are adapted and not saved; dequantize the model first")
    odd = next((name for name, module in model.named_modules() if _has_layers(module)), None)
    if odd is not None:
        raise ConfigError(
            f"experts of {odd} are in few bits and have layers beside them, which are saved as an adapter and not in one with them; take "
            "them off, or dequantize the model first"
        )
    modules = dict(_quantized(model))
    owner = {f"{name}.{key}" for name, module in modules.items() for key in module.state_dict()}
    tensors: dict[str, Tensor | Later] = {
        name: tensor for name, tensor in state_once(model).items() if name not in owner
    }
    for name, module in model.named_modules():
        # A table in few bits is only ever that of a file; folders have none.
        if isinstance(module, PackedEmbedding):
            table = (makers or {}).get(name, partial(_itself, module))()
            assert isinstance(table, PackedEmbedding)
            tensors[f"{name}.weight"] = table.packed.unpack(table.weight.dtype)[0]
            tensors.pop(f"{name}.data", None)
    for name, module in modules.items():
        make = partial(_tensors, name, (makers or {}).get(name, partial(_itself, module)))
        tensors |= {key: Later(shape, dtype, make) for key, (shape, dtype) in _sizes(name, module).items()}
    return tensors


def _has_layers(module: nn.Module) -> bool:
    """Whether this is a pool in few bits with layers beside its experts."""
    return isinstance(module, QuantizedPool) and module.layers is not None


def _itself(module: Made) -> Made:
    return module


def _sizes(name: str, module: Quantized) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """(shape, type) of the tensors that `_tensors` makes."""
    sizes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for key, bias in _biases(name, module).items():
        sizes[key] = tuple(bias.shape), bias.dtype
    if not isinstance(module, QuantizedLinear) or module.packed.kind in KEPT:
        return sizes | {
            f"{name}{part}.panels": (tuple(packed.data.shape), torch.uint8) for part, packed in _packed(module)
        }
    packed = module.packed
    groups, columns = packed.depth // packed.group, packed.depth // (2 if packed.kind == "int4" else 1)
    sizes[f"{name}.number"] = (packed.rows, columns), torch.uint8
    sizes[f"{name}.scale"] = (packed.rows, groups), torch.float16
    if packed.kind == "int4":
        sizes[f"{name}.least"] = sizes[f"{name}.scale"]
    return sizes


def _biases(name: str, module: Quantized) -> dict[str, Tensor]:
    """The biases of a module, by the names that they are stored under."""
    given = {"b13": module.b13, "b2": module.b2} if isinstance(module, QuantizedPool) else {"bias": module.bias}
    return {f"{name}.{key}": bias for key, bias in given.items() if bias is not None}


def _tensors(name: str, make: Callable[[], Made]) -> dict[str, Tensor]:
    module = make()
    assert not isinstance(module, PackedEmbedding)
    bias = _biases(name, module)
    if not isinstance(module, QuantizedLinear) or module.packed.kind in KEPT:
        # Parts of a stack lie apart.
        return bias | {f"{name}{part}.panels": packed.data.contiguous() for part, packed in _packed(module)}
    number, scale, least = (part[0] for part in module.packed.integers())
    if module.packed.kind == "int4":
        low, high = number.unflatten(-1, (-1, 2)).unbind(-1)
        number = low | (high << 4)
    tensors = {f"{name}.number": number, f"{name}.scale": scale}
    if module.packed.kind == "int4":
        tensors[f"{name}.least"] = least
    return tensors | bias


def fill_quantized(
    model: nn.Module,
    source: TensorSource,
    table: dict[str, Any],
    *,
    where: Path,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    elsewhere: Collection[str] = (),
    hint: str = "",
) -> None:
    """`anabranch.lm.tensors.fill` for a model of ``quantization`` ``table``: its layers become quantised ones.

    Those that are ``elsewhere``, and their tensors, are left alone. Raises CheckpointError too for a table that does not fit the model,
    or integers of another shape.
    """
    kinds = table["modules"]
    used = [stored for stored in source.names if any(stored.startswith(f"{name}.") for name in elsewhere)]
    made = {
        name: _made(model, source, name, kind, where, dtype, used)
        for name, kind in kinds.items()
        if name not in elsewhere
    }
    for name in made:
        if name != "head" or getattr(model, "head", None) is not None:
            # With no parameters there, filling leaves it alone.
            replace(model, name, nn.Identity())
    layout = {name: [Piece(name)] for name in state_once(model)}
    fill(model, source, layout, where=where, dtype=dtype, device=device, ignore=used, hint=hint)
    for name, module in made.items():
        put(model, name, module.to(device))


def empty_quantized(
    model: nn.Module,
    source: TensorSource,
    table: dict[str, Any],
    *,
    where: Path,
    dtype: torch.dtype | None = None,
    pools_only: bool = False,
) -> dict[str, Quantized]:
    """The quantised layers of ``quantization`` ``table`` by name, without weights (on the device ``meta``): they tell their sizes.

    Raises CheckpointError as `fill_quantized`.
    """
    made: dict[str, Quantized] = {}
    for name, kind in table["modules"].items():
        module: Any = module_of(model, name)
        is_pool = isinstance(module, ExpertPool)
        if pools_only and not is_pool:
            continue
        _check_module(module, name, kind, where)
        if is_pool:
            kinds = zip(("w13", "w2"), kinds_of_pool(kind), strict=True)
            sizes = {part: tuple(getattr(module, part).shape) for part in ("w13", "w2")}
            w13, w2 = (_empty_stack(source, f"{name}.{part}", own, sizes[part], where) for part, own in kinds)
            b13, b2 = _empty_biases(source, name, module, where, dtype)
            made[name] = QuantizedPool(w13, w2, b13, b2, activation=module.activation)
            continue
        bias = None
        if module.bias is not None:
            _check(source, f"{name}.bias", (module.out_features,), FLOATS, where)
            stored: Any = source.dtype(f"{name}.bias")
            bias = torch.empty(module.out_features, dtype=dtype or stored, device="meta")
        shape = (module.out_features, module.in_features)
        if isinstance(kind, list):
            likes = [like for _, like in _likes_of_parts(source, name, kind, (1, *shape), where)]
            made[name] = PartedLinear(likes, bias)
        else:
            made[name] = QuantizedLinear(_empty(source, name, kind, shape, where), bias)
    return made


def _empty_biases(
    source: TensorSource, name: str, pool: ExpertPool, where: Path, dtype: torch.dtype | None
) -> list[Tensor | None]:
    """Sizes of the biases of a pool; None for each that it has not."""
    made: list[Tensor | None] = []
    for key, given in (("b13", pool.b13), ("b2", pool.b2)):
        if given is None:
            made.append(None)
            continue
        _check(source, f"{name}.{key}", tuple(given.shape), FLOATS, where)
        stored: Any = source.dtype(f"{name}.{key}")
        made.append(torch.empty(given.shape, dtype=dtype or stored, device="meta"))
    return made


def _empty_stack(source: TensorSource, name: str, kind: Any, shape: tuple[int, ...], where: Path) -> Matrices:
    """`_empty` of the matrices of a pool."""
    if not isinstance(kind, list):
        return _empty(source, name, kind, shape, where)
    likes = [like for _, like in _likes_of_parts(source, name, kind, shape, where)]
    form: Form = tuple(part for like in likes for part in form_of(like))
    return empty_of(shape[0], shape[-1], form, device="meta")


def _empty(source: TensorSource, name: str, kind: str, shape: tuple[int, ...], where: Path) -> Packed:
    """Of the matrices ``[N, K]`` or ``[E, N, K]`` stored under this name, what tells their sizes."""
    *num, rows, depth = shape
    size = (num[0] if num else 1, rows, depth)
    if f"{name}.panels" in source.names or kind in KEPT:
        return check_panels(source, name, kind, size, where)
    check_integers(source, name, kind, shape, where)
    group = depth // source.shape(f"{name}.scale")[-1]
    return Packed.empty(*size, kind, group, device="meta")  # type: ignore[arg-type]


def _likes_of_parts(
    source: TensorSource, name: str, kinds: list[str], shape: tuple[int, ...], where: Path
) -> list[tuple[str, Packed]]:
    """(its name, what tells its sizes) of each part of the matrices ``[E, N, K]``. Raises CheckpointError unless they are their rows."""
    found, (num, rows, depth) = [], shape
    for number, kind in enumerate(kinds):
        part = f"{name}.part{number}"
        _check(source, f"{part}.panels", (num, None, None), (torch.uint8,), where)
        size = (num, source.shape(f"{part}.panels")[1] * WIDE, depth)
        found.append((part, check_panels(source, part, kind, size, where)))
    likes = [like for _, like in found]
    if not can_be_parts(likes) or sum(like.rows for like in likes) != rows:
        told = " and ".join(str(like.rows) for like in likes)
        raise CheckpointError(
            f"{name} in {where} has {told} rows in its parts, the model needs two or more that are {rows}"
        )
    return found


def _check_module(module: Any, name: str, kind: Any, where: Path) -> None:
    """Raise CheckpointError unless a model has such a layer, and the kind is one that it can be of."""
    is_odd = isinstance(module, ExpertPool) and module.layers is not None
    of_each = kinds_of_pool(kind) if isinstance(module, ExpertPool) else (kind,)
    kinds = [one for each in of_each for one in (each if isinstance(each, list) else (each,))]
    is_known = all(isinstance(one, str) and one in KINDS for one in kinds)
    if not is_known or is_odd or not isinstance(module, nn.Linear | ExpertPool):
        raise CheckpointError(
            f"quantization in {where / 'config.json'} says {name} is {kind}; the model has no such layer"
        )


def _quantized(model: nn.Module) -> Iterator[tuple[str, Quantized]]:
    for name, module in model.named_modules():
        if isinstance(module, Quantized):
            yield name, module


def _packed(module: Quantized) -> list[tuple[str, Packed]]:
    """The matrices of a module, with what is put behind its name."""
    if isinstance(module, QuantizedLinear):
        return [("", module.packed)]
    if isinstance(module, PartedLinear):
        return [(f".part{number}", packed) for number, packed in enumerate(module.parts)]
    found = []
    for name, each in zip((".w13", ".w2"), module.packed, strict=True):
        parts = parts_of(each)
        found += [(f"{name}.part{number}" if len(parts) > 1 else name, part) for number, part in enumerate(parts)]
    return found


def _made(
    model: nn.Module,
    source: TensorSource,
    name: str,
    kind: str,
    where: Path,
    dtype: torch.dtype | None,
    used: list[str],
) -> Quantized:
    """The quantised layer ``name``; notes the tensors it is made of in ``used``."""
    module: Any = module_of(model, name)
    _check_module(module, name, kind, where)
    if isinstance(module, ExpertPool):
        first, second = kinds_of_pool(kind)
        read = _read_panels if has_panels(source, name) else _read
        stacks: list[Matrices] = []
        for part, own in (("w13", first), ("w2", second)):
            shape = tuple(getattr(module, part).shape)
            if isinstance(own, list):
                stacks.append(Parts.of(_read_parts(source, f"{name}.{part}", own, shape, where, used)))
            else:
                stacks.append(read(source, f"{name}.{part}", own, shape, where, used))
        biases: dict[str, Tensor | None] = {}
        for key, like in zip(("b13", "b2"), _empty_biases(source, name, module, where, dtype), strict=True):
            biases[key] = None if like is None else source.read(f"{name}.{key}").to(like.dtype)
            used += [] if like is None else [f"{name}.{key}"]
        return QuantizedPool(stacks[0], stacks[1], biases["b13"], biases["b2"], module.activation)
    size, parts = (module.out_features, module.in_features), []
    if isinstance(kind, list):
        parts += _read_parts(source, name, kind, (1, *size), where, used)
    elif kind in KEPT:
        parts.append(_read_panels(source, name, kind, (1, *size), where, used))
    else:
        parts.append(_read(source, name, kind, size, where, used))
    bias = None
    if module.bias is not None:
        _check(source, f"{name}.bias", (module.out_features,), FLOATS, where)
        used.append(f"{name}.bias")
        stored = source.read(f"{name}.bias")
        bias = stored if dtype is None else stored.to(dtype)
    return PartedLinear(parts, bias) if isinstance(kind, list) else QuantizedLinear(parts[0], bias)


def kinds_of_pool(kind: Any) -> tuple[Any, Any]:
    """Of the two matrices of a pool: what the table ``modules`` says of it is one of both, or two."""
    return (kind[0], kind[1]) if isinstance(kind, list) and len(kind) == 2 else (kind, kind)


def has_panels(source: TensorSource, pool: str) -> bool:
    """Whether the quantised pool of this name lies as it is computed with; in folders of schema 2 it does not."""
    return any(f"{pool}.w13{part}.panels" in source.names for part in ("", ".part0"))


def check_panels(source: TensorSource, name: str, kind: str, shape: tuple[int, ...], where: Path) -> Packed:
    """Of the matrices ``[E, N, K]`` that lie as ``name.panels``, what tells their sizes (on the device ``meta``).

    Raises CheckpointError if they are not there, or are not as they must be.
    """
    _check_kind(name, kind, where)
    num, rows, depth = shape
    _check(source, f"{name}.panels", (num, -(-rows // WIDE), None), (torch.uint8,), where)
    given = source.shape(f"{name}.panels")[-1]
    if kind in BITS_OF:
        if depth % BLOCK or given != panel_bytes(kind, depth, BLOCK):  # type: ignore[arg-type]
            raise CheckpointError(
                f"{name} in {where}: its panels have {given} bytes, which {depth} weights in {kind} do not give"
            )
        return Packed.empty(num, rows, depth, kind, BLOCK, device="meta")  # type: ignore[arg-type]
    groups, left = divmod(given - panel_bytes(kind, depth, depth) + SIDE, SIDE)  # type: ignore[arg-type]
    try:
        if left or groups < 1 or depth % groups:
            raise ConfigError(f"its panels have {given} bytes, which no group of {depth} weights in {kind} gives")
        check_depth(depth, depth // groups)
    except ConfigError as error:
        raise CheckpointError(f"{name} in {where}: {error}") from None
    return Packed.empty(num, rows, depth, kind, depth // groups, device="meta")  # type: ignore[arg-type]


def _check_kind(name: str, kind: str, where: Path) -> None:
    if not isinstance(kind, str) or kind not in KINDS:
        known = ", ".join(sorted(KINDS))
        raise CheckpointError(
            f"quantization in {where / 'config.json'} says {name} is {kind}; it must be one of {known}"
        )


def check_integers(source: TensorSource, name: str, kind: str, shape: tuple[int, ...], where: Path) -> list[str]:
    """Names of the tensors (number, scale and, of int4, least) of matrices ``[N, K]`` or ``[E, N, K]``.

    Raises CheckpointError if one is not there, or is not as it must be.
    """
    _check_kind(name, kind, where)
    *rows, depth = shape
    columns = depth // 2 if kind == "int4" else depth
    _check(source, f"{name}.number", (*rows, columns), (torch.uint8,), where)
    _check(source, f"{name}.scale", (*rows, None), (torch.float16,), where)
    groups = source.shape(f"{name}.scale")[-1]
    if not groups or depth % groups:
        raise CheckpointError(f"{name}.scale in {where} has {groups} groups of a row of {depth} weights")
    if kind != "int4":
        return [f"{name}.number", f"{name}.scale"]
    _check(source, f"{name}.least", (*rows, groups), (torch.float16,), where)
    return [f"{name}.number", f"{name}.scale", f"{name}.least"]


def packed_of(number: Tensor, scale: Tensor, least: Tensor | None) -> Packed:
    """Stored integers as they are computed with; those without minima are int8. Raises ConfigError for groups that cannot be."""
    return Packed.of_integers(
        number if least is None else _nibbles(number), scale, least, "int8" if least is None else "int4"
    )


def _nibbles(number: Tensor) -> Tensor:
    return torch.stack((number & 15, number >> 4), dim=-1).flatten(-2)


def _read(source: TensorSource, name: str, kind: str, shape: tuple[int, ...], where: Path, used: list[str]) -> Packed:
    """The matrices of a layer."""
    names = check_integers(source, name, kind, shape, where)
    used += names
    number, scale, *least = map(source.read, names)
    try:
        return packed_of(number, scale, least[0] if least else None)
    except ConfigError as error:
        raise CheckpointError(f"{name} in {where}: {error}") from None


def _read_parts(
    source: TensorSource, name: str, kinds: list[str], shape: tuple[int, ...], where: Path, used: list[str]
) -> list[Packed]:
    """The parts of the matrices ``[E, N, K]``."""
    likes = _likes_of_parts(source, name, kinds, shape, where)
    return [
        _read_panels(source, part, like.kind, (shape[0], like.rows, like.depth), where, used) for part, like in likes
    ]


def _read_panels(
    source: TensorSource, name: str, kind: str, shape: tuple[int, ...], where: Path, used: list[str]
) -> Packed:
    """The matrices of a pool that lie as they are computed with."""
    like = check_panels(source, name, kind, shape, where)
    used.append(f"{name}.panels")
    panels = source.read(f"{name}.panels")
    # Of other files it is a view.
    return like.with_data(panels if isinstance(source, SafetensorsFiles) else panels.clone())


def _check(
    source: TensorSource, name: str, shape: tuple[int | None, ...], kinds: tuple[torch.dtype, ...], where: Path
) -> None:
    if name not in source.names:
        raise CheckpointError(f"{where} lacks {name}, which its quantization tells of")
    given = source.shape(name)
    if len(given) != len(shape) or any(want not in (None, have) for want, have in zip(shape, given, strict=True)):
        wanted = ["any" if size is None else size for size in shape]
        raise CheckpointError(f"{name} in {where} has shape {list(given)}, the model needs {wanted}")
    if source.dtype(name) not in kinds:
        names = ", ".join(str(kind).removeprefix("torch.") for kind in kinds)
        raise CheckpointError(f"{name} in {where} is stored as {source.dtype(name)}; it must be {names}")
