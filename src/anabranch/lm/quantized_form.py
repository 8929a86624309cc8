"""How quantised layers lie in a model folder: as plain integers, scales and minima, which know the layout of no kernel.

For a linear layer ``name`` the tensors are ``name.number`` (uint8; of int4 two in a byte, the one of the even column in the low half),
``name.scale`` and, of int4, ``name.least`` (float16), and ``name.bias``; for a pool the same under ``name.w13`` and ``name.w2``. They are
packed when the model is loaded, which loses nothing. The table ``quantization`` of ``config.json`` says what there is:

    {"scheme": "int4", "group": 32, "modules": {"blocks.0.attention.qkv": "int4", ..., "head": "int8"}}
"""
# Shapes: E matrices of a stack (1 for a linear layer), N rows, K columns, G groups of a row

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from anabranch.errors import CheckpointError, ConfigError
from anabranch.lm.tensors import FLOATS, Piece, TensorSource, fill, some, state_once
from anabranch.nn.packed import Packed
from anabranch.nn.pool import ExpertPool
from anabranch.nn.quantize import QuantizedLinear, QuantizedPool, replace

__all__ = ["SCHEMES", "check_scheme", "describe", "fill_quantized", "stored_state"]

Scheme = Literal["int8", "int4"]
SCHEMES = ("int8", "int4")


def describe(model: nn.Module) -> dict[str, Any] | None:
    """The table ``quantization`` of a model; None for one without quantised layers.

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
    hint: str = "",
) -> None:
    """`anabranch.lm.tensors.fill` for a model of ``quantization`` ``table``: its layers become quantised ones.

    Raises CheckpointError too for a table that does not fit the model, or integers of another shape.
    """
    kinds = table.get("modules")
    if table.get("scheme") not in SCHEMES or not isinstance(kinds, dict):
        raise CheckpointError(
            f"quantization in {where / 'config.json'} is no table of a scheme ({', '.join(SCHEMES)}) and of modules"
        )
    used: list[str] = []
    made = {name: _made(model, source, name, kind, where, dtype, used) for name, kind in kinds.items()}
    for name in made:
        if name != "head" or getattr(model, "head", None) is not None:
            replace(model, name, nn.Identity())  # so that filling leaves it alone
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
    if name == "head" and module is None:  # a head that was the embedding until it was quantised
        embedding = cast(nn.Embedding, model.embedding)
        module = nn.Linear(embedding.embedding_dim, embedding.num_embeddings, bias=False, device="meta")
    if kind not in SCHEMES or not isinstance(module, nn.Linear | ExpertPool):
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
        stored = _tensor(source, f"{name}.bias", (module.out_features,), FLOATS, where, used)
        bias = stored if dtype is None else stored.to(dtype)
    return QuantizedLinear(packed, bias)


def _read(source: TensorSource, name: str, kind: str, shape: tuple[int, ...], where: Path, used: list[str]) -> Packed:
    """The matrices ``[N, K]`` or ``[E, N, K]`` of a layer."""
    *rows, depth = shape
    columns = depth // 2 if kind == "int4" else depth
    number = _tensor(source, f"{name}.number", (*rows, columns), (torch.uint8,), where, used)
    scale = _tensor(source, f"{name}.scale", (*rows, None), (torch.float16,), where, used)
    least = None
    if kind == "int4":
        least = _tensor(source, f"{name}.least", tuple(scale.shape), (torch.float16,), where, used)
        number = torch.stack((number & 15, number >> 4), dim=-1).flatten(-2)
    groups = scale.shape[-1]
    if not groups or depth % groups:
        raise CheckpointError(f"{name}.scale in {where} has {groups} groups of a row of {depth} weights")
    try:
        return Packed.of_integers(number, scale, least, kind)  # type: ignore[arg-type]  # one of SCHEMES
    except ConfigError as error:
        raise CheckpointError(f"{name} in {where}: {error}") from None


def _tensor(
    source: TensorSource,
    name: str,
    shape: tuple[int | None, ...],
    kinds: tuple[torch.dtype, ...],
    where: Path,
    used: list[str],
) -> Tensor:
    if name not in source.names:
        raise CheckpointError(f"{where} lacks {some([name])}, which its quantization tells of")
    used.append(name)
    given = source.shape(name)
    if len(given) != len(shape) or any(want not in (None, have) for want, have in zip(shape, given, strict=True)):
        wanted = ["any" if size is None else size for size in shape]
        raise CheckpointError(f"{name} in {where} has shape {list(given)}, the model needs {wanted}")
    if source.dtype(name) not in kinds:
        names = ", ".join(str(kind).removeprefix("torch.") for kind in kinds)
        raise CheckpointError(f"{name} in {where} is stored as {source.dtype(name)}; it must be {names}")
    return source.read(name)
