"""Weights of Hugging Face folders in few bits, shown as they are when dequantised, one at a time: FP8, GPTQ and AWQ (MXFP4: `mxfp4`).

    fp8     NAME.weight [N, K] float8_e4m3fn times NAME.weight_scale_inv, one for each block of weight_block_size, or for all
    gptq    NAME.qweight int32 [K bits / 32, N], NAME.scales [G, N], NAME.qzeros int32 [G, N bits / 32], NAME.g_idx [K]: an input's group
    awq     NAME.qweight int32 [K, N / 8], NAME.scales [G, N], NAME.qzeros int32 [G, N / 8], eight numbers in an order of their own

GPTQ and AWQ have w = s (u - z); GPTQ stores z - 1 unless ``checkpoint_format`` is ``gptq_v2``. Of four bits, in groups of inputs that stand
in order, u and s are the numbers and scales of our own int4, whose minima -s z are kept in half precision: to the bit where all z are 8
(symmetric), else within 1/2048 of them.
"""
# Shapes: N rows (outputs), K columns (inputs), G groups of a row

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from anabranch.bounds import shown
from anabranch.errors import CheckpointError
from anabranch.lm.tensors import TensorSource

__all__ = ["METHODS", "Dequantised", "dequantised"]

# Columns of the eight numbers of an int32, the lowest first (AutoAWQ's GEMM).
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


# (number_NK uint8, scale_NG, least_NG), both float16.
Integers = tuple[Tensor, Tensor, Tensor]
# Groups that kernels take, and what a scale may be so that no minimum overflows.
_SHARE, _LARGEST = 32, 65504 / 16


@dataclass(frozen=True)
class _Made:
    """A tensor that is made of stored ones."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]
    group: Callable[[], int | None] = lambda: None
    integers: Callable[[], Integers] | None = None


class Dequantised:
    """A `TensorSource` in which some tensors are ``made`` of others, which are ``hidden``; the rest is as it is stored."""

    def __init__(self, source: TensorSource, made: dict[str, _Made], hidden: Collection[str]) -> None:
        self._source, self._made = source, made
        gone = set(hidden)
        self._names = dict.fromkeys([*(name for name in source.names if name not in gone), *made]).keys()

    @property
    def names(self) -> Collection[str]:
        """All names."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """See `TensorSource`."""
        return self._made[name].shape if name in self._made else self._source.shape(name)

    def dtype(self, name: str) -> torch.dtype | str:
        """See `TensorSource`."""
        return self._made[name].dtype if name in self._made else self._source.dtype(name)

    def read(self, name: str) -> Tensor:
        """See `TensorSource`."""
        return self._made[name].read() if name in self._made else self._source.read(name)

    def group_of(self, name: str) -> int | None:
        """Inputs that share a scale, of a matrix that may stay in its four bits; None for another."""
        return self._made[name].group() if name in self._made else None

    def integers(self, name: str) -> Integers:
        """The numbers, scales and minima of one that `group_of` tells a group of."""
        made = self._made[name].integers
        assert made is not None, name
        return made()

    def read_one(self, name: str, index: int) -> Tensor:
        """See `TensorSource`."""
        return self.read(name)[index] if name in self._made else self._source.read_one(name, index)


def dequantised(source: TensorSource, table: dict[str, Any]) -> TensorSource:
    """``source`` as `Dequantised` by the ``quantization_config`` ``table``, whose method is one of `METHODS`.

    Raises CheckpointError for a variant that is not read, and tensors that do not fit each other.
    """
    return METHODS[table["quant_method"]](source, table)


def _fp8(source: TensorSource, table: dict[str, Any]) -> Dequantised:
    size = table.get("weight_block_size")
    if size is not None and not (isinstance(size, list) and len(size) == 2 and all(_is_size(part) for part in size)):
        raise CheckpointError(f"weight_block_size is {shown(size)}; it must be two whole numbers above 0, or null")
    made, hidden = {}, []
    for scale in [name for name in source.names if name.endswith(".weight_scale_inv")]:
        name = scale.removesuffix("_scale_inv")
        if name not in source.names:
            raise CheckpointError(f"{scale} is the scale of {name}, which is missing; copy the model folder again")
        shape, given = source.shape(name), source.shape(scale)
        blocks = tuple(-(-length // part) for length, part in zip(shape, size or shape, strict=False))
        if len(shape) != 2 or (given != blocks and math.prod(given) != 1):
            raise CheckpointError(
                f"{scale} has shape {list(given)}; a weight of {list(shape)} in blocks of {size} needs {list(blocks)}"
            )

        def read(name: str = name, scale: str = scale) -> Tensor:
            weight_NK, scale_NK = source.read(name).float(), source.read(scale).float()
            if scale_NK.numel() == 1 or size is None:
                return weight_NK.mul_(scale_NK.reshape(()))
            for dim, (part, length) in enumerate(zip(size, weight_NK.shape, strict=True)):
                scale_NK = scale_NK.repeat_interleave(part, dim).narrow(dim, 0, length)
            return weight_NK.mul_(scale_NK)

        # The type that is kept where none is asked for; what is read is exact.
        made[name] = _Made(shape, torch.bfloat16, read)
        hidden.append(scale)
    # Of activations, which are not rounded here.
    hidden += [name for name in source.names if name.endswith((".input_scale", ".activation_scale"))]
    return Dequantised(source, made, hidden)


def _gptq(source: TensorSource, table: dict[str, Any]) -> Dequantised:
    bits, added = table.get("bits"), 0 if table.get("checkpoint_format") == "gptq_v2" else 1
    if bits not in (2, 4, 8):
        raise CheckpointError(f"quantization_config.bits is {shown(bits)}; GPTQ is read with 2, 4 or 8")
    per = 32 // bits

    def parts(name: str) -> tuple[Tensor, Tensor]:
        # Kept within the bits: of z = 0, z - 1 is all ones.
        zero_GN = (_numbers(source.read(f"{name}.qzeros"), bits, 1) + added) & (2**bits - 1)
        return _numbers(source.read(f"{name}.qweight"), bits, 0), zero_GN

    def read(name: str) -> Tensor:
        number_KN, zero_GN = parts(name)
        scale_GN = source.read(f"{name}.scales").float()
        given = f"{name}.g_idx" in source.names
        group = number_KN.shape[0] // len(scale_GN)
        index_K = source.read(f"{name}.g_idx").long() if given else torch.arange(number_KN.shape[0]) // group
        if index_K.shape != number_KN.shape[:1] or int(index_K.min()) < 0 or int(index_K.max()) >= len(scale_GN):
            raise CheckpointError(
                f"{name}.g_idx does not give a group of {len(scale_GN)} for each of {number_KN.shape[0]} inputs"
            )
        return ((number_KN - zero_GN[index_K]) * scale_GN[index_K]).t()

    def size(stored: tuple[int, ...]) -> tuple[int, int]:
        return stored[1], stored[0] * per

    names = ("qweight", "qzeros", "scales", "g_idx")
    return _of_int32(source, table, size, read, names, lambda rows: rows // per, parts if bits == 4 else None)


def _awq(source: TensorSource, table: dict[str, Any]) -> Dequantised:
    for name, only in (("bits", 4), ("version", "gemm")):
        given = table.get(name, only)
        if (given.lower() if isinstance(given, str) else given) != only:
            raise CheckpointError(f"quantization_config.{name} is {shown(given)}; AWQ is read with {only!r}")

    def parts(name: str) -> tuple[Tensor, Tensor]:
        number_KN, zero_GN = (
            _reordered(_numbers(source.read(f"{name}.{part}"), 4, 1)) for part in ("qweight", "qzeros")
        )
        return number_KN, zero_GN

    def read(name: str) -> Tensor:
        number_KN, zero_GN = parts(name)
        scale_GN = source.read(f"{name}.scales").float()
        group = number_KN.shape[0] // len(scale_GN)
        grouped = number_KN.unflatten(0, (-1, group))
        return ((grouped - zero_GN.unsqueeze(1)) * scale_GN.unsqueeze(1)).flatten(0, 1).t()

    def size(stored: tuple[int, ...]) -> tuple[int, int]:
        return stored[1] * 8, stored[0]

    return _of_int32(source, table, size, read, ("qweight", "qzeros", "scales"), lambda rows: rows // 8, parts)


def _of_int32(
    source: TensorSource,
    table: dict[str, Any],
    size: Callable[[tuple[int, ...]], tuple[int, int]],
    read: Callable[[str], Tensor],
    parts: tuple[str, ...],
    packed: Callable[[int], int],
    numbers: Callable[[str], tuple[Tensor, Tensor]] | None,
) -> Dequantised:
    """``read(NAME)`` as NAME.weight of every NAME.qweight, whose shape ``size`` tells; ``packed`` is how many int32 rows of zeros take.

    ``numbers(NAME)`` gives (number_KN, zero_GN) of four bits; None for others.
    """
    made, hidden = {}, []
    for stored in [name for name in source.names if name.endswith(".qweight")]:
        name = stored.removesuffix(".qweight")
        missing = [part for part in parts[:3] if f"{name}.{part}" not in source.names]
        if missing:
            raise CheckpointError(f"{name}.{missing[0]} is missing, and {stored} is there; copy the model folder again")
        rows, depth = size(source.shape(stored)) if len(source.shape(stored)) == 2 else (0, 0)
        scales, zeros = source.shape(f"{name}.scales"), source.shape(f"{name}.qzeros")
        groups = scales[0] if scales else 0
        fits = groups and depth % groups == 0 and scales == (groups, rows) and zeros == (groups, packed(rows))
        if not fits or source.dtype(stored) != torch.int32 or source.dtype(f"{name}.qzeros") != torch.int32:
            raise CheckpointError(
                f"{stored}, scales {list(scales)} and qzeros {list(zeros)} do not fit each other; copy the model folder again"
            )
        _check_groups(table, stored, depth, groups, f"{name}.g_idx" in source.names)
        made[f"{name}.weight"] = _Made((rows, depth), torch.float32, partial(read, name))
        if numbers is not None:
            made[f"{name}.weight"] = replace(
                made[f"{name}.weight"],
                group=partial(_group_of, source, name, depth),
                integers=partial(_integers, source, name, numbers),
            )
        hidden += [f"{name}.{part}" for part in parts]
    return Dequantised(source, made, hidden)


def _check_groups(table: dict[str, Any], stored: str, depth: int, groups: int, has_index: bool) -> None:
    """Raise CheckpointError where ``group_size`` is not what the shapes say; without ``g_idx`` nothing else tells an input's group."""
    size = table.get("group_size")
    # With ``dynamic``, modules have sizes of their own.
    if size is None or table.get("dynamic"):
        return
    if size != -1 and not _is_size(size):
        raise CheckpointError(
            f"quantization_config.group_size is {shown(size)}; it must be a whole number above 0, or -1 for all inputs"
        )
    wanted = 1 if size == -1 else -(-depth // size)
    if groups != wanted:
        raise CheckpointError(
            f"{stored} has {groups} groups of its {depth} inputs, and by quantization_config.group_size={size} there are {wanted}; "
            "copy the model folder again"
        )
    if groups > 1 and depth % size and not has_index:
        raise CheckpointError(
            f"{stored} has {depth} inputs, which quantization_config.group_size={size} does not divide, and no g_idx that gives groups"
        )


def _group_of(source: TensorSource, name: str, depth: int) -> int | None:
    """See `Dequantised.group_of`: groups in order, of a width that kernels take, with scales that half precision has."""
    scale_GN = source.read(f"{name}.scales")
    group, exact = depth // len(scale_GN), scale_GN.half()
    if group % _SHARE or scale_GN.abs().max() > _LARGEST or not torch.equal(exact.to(scale_GN.dtype), scale_GN):
        return None
    if f"{name}.g_idx" in source.names:
        index_K = source.read(f"{name}.g_idx")
        if not torch.equal(index_K.long(), torch.arange(depth) // group):
            return None
    return group


def _integers(source: TensorSource, name: str, numbers: Callable[[str], tuple[Tensor, Tensor]]) -> Integers:
    number_KN, zero_GN = numbers(name)
    scale_GN = source.read(f"{name}.scales").float()
    least_GN = (-zero_GN * scale_GN).half()
    return number_KN.t().to(torch.uint8).contiguous(), scale_GN.t().half(), least_GN.t()


def _numbers(packed: Tensor, bits: int, dim: int) -> Tensor:
    """The numbers that int32s hold along ``dim``, the lowest bits first, as int32."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    parts = (packed.unsqueeze(dim + 1) >> shifts.view(-1, *[1] * (packed.dim() - dim - 1))) & (2**bits - 1)
    return parts.flatten(dim, dim + 1)


def _reordered(number_XN: Tensor) -> Tensor:
    order = torch.tensor(AWQ_ORDER).argsort()
    return number_XN.unflatten(-1, (-1, 8))[..., order].flatten(-2)


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0


METHODS: dict[str, Callable[[TensorSource, dict[str, Any]], Dequantised]] = {"fp8": _fp8, "gptq": _gptq, "awq": _awq}
