"""What a compiled kernel can read: plain tensors on the CPU, in one piece, of memory that is there; and where they lie."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from anabranch.errors import InputError

__all__ = [
    "DTYPES",
    "LEAST_ADDRESS",
    "PLAIN",
    "address",
    "array_address",
    "described",
    "is_dense",
    "is_transformed",
    "is_wrapped",
    "lies_otherwise",
    "takes",
    "why_refused",
]

# Other classes of tensors may not lie where they say, or nowhere.
PLAIN: Final = frozenset({Tensor, nn.Parameter})

# Below it no system puts anything: a storage that was given back.
LEAST_ADDRESS: Final = 1 << 16

# Of tensors; arrays have them by the same names.
DTYPES: Final = {
    name: getattr(torch, name) for name in ("float32", "float64", "bfloat16", "bool", "uint8", "int32", "int64")
}


def takes(*values: Tensor) -> bool:
    """Whether a kernel can read these now, whatever their dtypes and shapes: plain tensors on the CPU, and no graph is made of them.

    A subclass may lie elsewhere, a negative view lies with the other sign, and the tangents of dual tensors and the batches of
    ``torch.func`` lie beside what a kernel reads. All that, torch computes by itself. Operands of which only the first is on the CPU are
    an error, which the binding tells better than torch: they are let through to it.
    """
    if torch.compiler.is_compiling() or is_transformed():
        return False
    for value in values:
        if type(value) not in PLAIN or value.is_neg():
            return False
    return not values or values[0].is_cpu


def why_refused(**values: Tensor) -> str | None:
    """Why `takes` says no to these, each by its name; None if it says yes."""
    for name, value in values.items():
        if not value.is_cpu:
            return f"the native kernels run on the CPU, and {name} is on {value.device}"
        if type(value) not in PLAIN or value.is_neg():
            return f"the native kernels take plain tensors, and {name} is {described(value)}"
    return None if takes() else "the native kernels are not differentiated forward, batched by torch.func or compiled"


def is_transformed() -> bool:
    """Whether torch carries more than values through operators now: tangents (forward mode), or the levels of ``torch.func``."""
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


def is_wrapped(value: Tensor) -> bool:
    """Whether it carries more than its values; asked where `is_transformed`."""
    if torch._C._functorch.is_functorch_wrapped_tensor(value):
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(value).tangent is not None


def address(value: Tensor, dtype: str | Sequence[str] | None = None, *sizes: int | None) -> int:
    """Where a tensor lies, for a structure that a kernel reads; ``value`` must outlive it.

    Args:
        value: a plain tensor on the CPU, in one piece.
        dtype: one it may have, or several; None for any dtype and shape.
        sizes: its shape; None for any size.

    Raises:
        InputError: it is not so.
    """
    if not _is_exactly(value, dtype, sizes):
        names = () if dtype is None else (dtype,) if isinstance(dtype, str) else dtype
        fits = dtype is None or (_has_shape(value.shape, sizes) and any(value.dtype is DTYPES[name] for name in names))
        if not fits or not _is_readable(value):
            what = f"{' or '.join(names)} {_in_words(sizes)}, " if names else "what is "
            raise InputError(f"a kernel was given {described(value)}; it takes {what}in one piece, on the CPU")
    place = value.data_ptr()
    if place < LEAST_ADDRESS and value.numel():
        raise InputError(f"a kernel was given {described(value)}, whose memory was given back")
    return place


def _is_exactly(value: Tensor, dtype: str | Sequence[str] | None, sizes: tuple[int | None, ...]) -> bool:
    """The quick answer for what steps pass: one dtype, all sizes known."""
    return _is_readable(value) and isinstance(dtype, str) and value.dtype is DTYPES[dtype] and value.shape == sizes


def _is_readable(value: Tensor) -> bool:
    """Whether all of its values stand where it lies, in one piece."""
    if type(value) not in PLAIN or not value.is_cpu or not value.is_contiguous() or value.is_neg():
        return False
    return not is_transformed() or not is_wrapped(value)


def array_address(value: np.ndarray, dtype: str, *sizes: int | None) -> int:
    """The same of a NumPy array."""
    is_right = type(value) is np.ndarray and value.dtype == dtype and value.flags.c_contiguous
    if not is_right or not _has_shape(value.shape, sizes):
        raise InputError(
            f"a kernel was given {described(value)}; it takes an array of {dtype} {_in_words(sizes)}, in one piece"
        )
    return value.ctypes.data


def _has_shape(shape: Sequence[int], sizes: Sequence[int | None]) -> bool:
    if len(shape) != len(sizes):
        return False
    for have, want in zip(shape, sizes, strict=True):
        if have != want and want is not None:
            return False
    return True


def _in_words(sizes: Sequence[int | None]) -> str:
    return f"[{', '.join('any' if size is None else str(size) for size in sizes)}]"


def described(value: Any) -> str:
    """What came, in words."""
    if isinstance(value, Tensor):
        kind = "" if type(value) in PLAIN else f"a {type(value).__name__} of "
        kind += "a negative view of " if value.is_neg() else ""
        if is_transformed() and is_wrapped(value):
            return f"{kind}{str(value.dtype).removeprefix('torch.')} {list(value.shape)} that torch differentiates forward or batches"
        gone = type(value) in PLAIN and value.is_cpu and value.numel() and value.data_ptr() < LEAST_ADDRESS
        lies = "" if value.is_meta or value.is_contiguous() else f" with strides {list(value.stride())}"
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{kind}{dtype} {list(value.shape)}{lies} on {value.device}{', its memory given back' if gone else ''}"
    if isinstance(value, np.ndarray):
        lies = "" if value.flags.c_contiguous else f" with strides {value.strides}"
        return f"an array of {value.dtype} {list(value.shape)}{lies}{'' if value.flags.writeable else ', read-only'}"
    return f"{len(value)} of them" if isinstance(value, list | tuple) else f"a {type(value).__name__}"


def is_dense(x: Tensor) -> bool:
    """Whether the last dimension is in one piece and rows follow one another without gaps, in whatever order."""
    if x.stride(-1) != 1:
        return False
    reached = x.shape[-1]
    for stride, size in sorted(zip(x.stride()[:-1], x.shape[:-1], strict=True)):
        if size == 1:
            continue
        if stride != reached:
            return False
        reached *= size
    return True


def lies_otherwise(x: Tensor, strides: Sequence[int]) -> bool:
    """Whether its strides are others, where that makes a difference."""
    return any(size > 1 and own != wanted for size, own, wanted in zip(x.shape, x.stride(), strides, strict=True))
