"""How quantised layers lie in a model folder: as plain integers, scales and minima, which know the layout of no kernel.

For a linear layer ``name`` the tensors are ``name.number`` (uint8; of int4 two in a byte, the one of the even column in the low half),
``name.scale`` and, of int4, ``name.least`` (float16), and ``name.bias``; for a pool the same under ``name.w13`` and ``name.w2``. They are
packed when the model is loaded, which loses nothing. The table ``quantization`` of ``config.json`` says what there is:

    {"scheme": "int4", "group": 32, "modules": {"blocks.0.attention.qkv": "int4", ..., "head": "int8"}}
"""
# Shapes: E matrices of a stack (1 for a linear layer), N rows, K columns, G groups of a row

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from anabranch.errors import CheckpointError, ConfigError
from anabranch.lm.tensors import FLOATS, Piece, TensorSource, fill, state_once
from anabranch.nn.packed import Packed
from anabranch.nn.pool import ExpertPool
from anabranch.nn.quantize import QuantizedLinear, QuantizedPool, replace

__all__ = [
    "SCHEMES",
    "check_integers",
    "check_scheme",
    "describe",
    "fill_quantized",
    "is_table",
    "stored_state",
    "weights_of",
]

Scheme = Literal["int8", "int4"]
SCHEMES = ("int8", "int4")


def describe(model: nn.Module) -> dict[str, Any] | None:
    """The table ``quantization`` of a model, see `is_table`; None for one without quantised layers.

    ``scheme`` is the fewest bits in it; ``group`` how many weights share a scale in most of such layers, null for one scale per row.
    """
    modules = dict(_quantized(model))
    if not modules:
        return None
    kinds = {name: _packed(module)[0][1].kind for name, module in modules.items()}
    scheme = "int4" if "int4" in kinds.values() else "int8"
    packed = [part for name, module in modules.items() if kinds[name] == scheme for _, part in _packed(module)]
    groups = [None if part.group == part.depth and scheme == "int8" else part.group for part in packed]
    return {"scheme": scheme, "group": max(groups, key=groups.count), "modules": kinds}


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


def stored_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a model as they are saved: `state_once` where nothing is quantised."""
    modules = dict(_quantized(model))
    owner = {f"{name}.{key}" for name, module in modules.items() for key in module.state_dict()}
    tensors = {name: tensor for name, tensor in state_once(model).items() if name not in owner}
    for name, module in modules.items():
        for part, packed in _packed(module):
            tensors |= _integers(f"{name}{part}", packed, is_stack=isinstance(module, QuantizedPool))
        if isinstance(module, QuantizedLinear) and module.bias is not None:
            tensors[f"{name}.bias"] = module.bias
    return tensors


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
        module.to(device)
        if name == "head":
            model.head = module
        else:
            replace(model, name, module)


def _quantized(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear | QuantizedPool]]:
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear | QuantizedPool):
            yield name, module


def _packed(module: QuantizedLinear | QuantizedPool) -> list[tuple[str, Packed]]:
    """The matrices of a module, with what is put behind its name."""
    if isinstance(module, QuantizedLinear):
        return [("", module.packed)]
    return list(zip((".w13", ".w2"), module.packed, strict=True))


def _integers(name: str, packed: Packed, *, is_stack: bool) -> dict[str, Tensor]:
    number, scale, least = packed.integers()
    if packed.kind == "int4":
        low, high = number.unflatten(-1, (-1, 2)).unbind(-1)
        number = low | (high << 4)
    tensors = {f"{name}.number": number, f"{name}.scale": scale}
    if packed.kind == "int4":
        tensors[f"{name}.least"] = least
    return tensors if is_stack else {key: tensor[0] for key, tensor in tensors.items()}


def _made(
    model: nn.Module,
    source: TensorSource,
    name: str,
    kind: str,
    where: Path,
    dtype: torch.dtype | None,
    used: list[str],
) -> QuantizedLinear | QuantizedPool:
    """The quantised layer ``name``; notes the tensors it is made of in ``used``."""
    module: Any = dict(model.named_modules()).get(name)
    # The head was the embedding until it was quantised.
    if name == "head" and module is None:
        embedding = cast(nn.Embedding, model.embedding)
        module = nn.Linear(embedding.embedding_dim, embedding.num_embeddings, bias=False, device="meta")
    is_odd = isinstance(module, ExpertPool) and not module.is_plain
    if kind not in SCHEMES or is_odd or not isinstance(module, nn.Linear | ExpertPool):
        raise CheckpointError(
            f"quantization in {where / 'config.json'} says {name} is {kind}; the model has no such layer"
        )
    if isinstance(module, ExpertPool):
        w13, w2 = (
            _read(source, f"{name}.{part}", kind, tuple(getattr(module, part).shape), where, used)
            for part in ("w13", "w2")
        )
        return QuantizedPool(w13, w2)
    packed = _read(source, name, kind, (module.out_features, module.in_features), where, used)
    bias = None
    if module.bias is not None:
        _check(source, f"{name}.bias", (module.out_features,), FLOATS, where)
        used.append(f"{name}.bias")
        stored = source.read(f"{name}.bias")
        bias = stored if dtype is None else stored.to(dtype)
    return QuantizedLinear(packed, bias)


def check_integers(source: TensorSource, name: str, kind: str, shape: tuple[int, ...], where: Path) -> list[str]:
    """Names of the tensors (number, scale and, of int4, least) of matrices ``[N, K]`` or ``[E, N, K]``.

    Raises CheckpointError if one is not there, or is not as it must be.
    """
    if kind not in SCHEMES:
        raise CheckpointError(f"quantization in {where / 'config.json'} says {name} is {kind}; it must be int8 or int4")
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


def weights_of(number: Tensor, scale: Tensor, least: Tensor | None) -> Tensor:
    """The float32 weights ``[..., N, K]`` that stored integers stand for; those without minima are int8."""
    value = number if least is None else _nibbles(number)
    grouped = value.float().unflatten(-1, (scale.shape[-1], -1))
    if least is None:
        return ((grouped - 128) * scale.float().unsqueeze(-1)).flatten(-2)
    return (grouped * scale.float().unsqueeze(-1) + least.float().unsqueeze(-1)).flatten(-2)


def _nibbles(number: Tensor) -> Tensor:
    return torch.stack((number & 15, number >> 4), dim=-1).flatten(-2)


def _read(source: TensorSource, name: str, kind: str, shape: tuple[int, ...], where: Path, used: list[str]) -> Packed:
    """The matrices of a layer."""
    names = check_integers(source, name, kind, shape, where)
    used += names
    number, scale, *least = map(source.read, names)
    try:
        return Packed.of_integers(
            _nibbles(number) if least else number, scale, least[0] if least else None, "int4" if least else "int8"
        )
    except ConfigError as error:
        raise CheckpointError(f"{name} in {where}: {error}") from None


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
