"""The compiled kernels behind tensors: the ``native`` back end of `anabranch.nn.grouped`."""
# Shapes: N items, E experts, K places per item, R = N K rows, D width, F hidden

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from anabranch.errors import CapacityError
from anabranch.nn.kernels import load
from anabranch.nn.kernels.memory import empty_gradient
from anabranch.routing.score import cast

__all__ = ["backward", "forward", "why_not"]

STEP = 16  # widths must be multiples of a vector of floats
_TYPES = {
    (torch.float32, torch.float32): 0,
    (torch.bfloat16, torch.bfloat16): 1,
    (torch.bfloat16, torch.float32): 2,  # autocast: weights are rounded as they are read, gradients stay fp32
}


def why_not(x_ND: Tensor, w13_EFD: Tensor, w2_EDF: Tensor, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot take this, or None if they can."""
    if x_ND.device.type != "cpu":
        return f"the native kernels run on the CPU, and x is on {x_ND.device}"
    if w13_EFD.dtype != w2_EDF.dtype or (dtype, w13_EFD.dtype) not in _TYPES:
        return f"the native kernels compute in float32 or bfloat16; here in {dtype} with weights in {w13_EFD.dtype}"
    for name, width in (("dim", x_ND.shape[1]), ("hidden_dim", w2_EDF.shape[2])):
        if width % STEP:
            return f"the native kernels need a {name} that is a multiple of {STEP}; it is {width}"
    if load() is None:
        return "the native kernels could not be compiled here, or ANABRANCH_NO_KERNELS is set"
    return None


def forward(
    x_ND: Tensor,
    place_R: Tensor,
    offset_E: Tensor,
    weight_NK: Tensor,
    w13_EFD: Tensor,
    w2_EDF: Tensor,
    on_input: bool,
    dtype: torch.dtype,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    """y_ND and, with ``keep``, z_R2F."""
    operands = _contiguous(cast(x_ND, dtype), place_R, offset_E, cast(weight_NK, torch.float32), w13_EFD, w2_EDF)
    y_ND = torch.empty(x_ND.shape, dtype=dtype)
    z_R2F = torch.empty((place_R.shape[0], w13_EFD.shape[1]) if keep else 0, dtype=dtype)
    _call("anabranch_expert_forward", [*operands, y_ND, z_R2F], weight_NK, w13_EFD, w2_EDF, on_input)
    return y_ND, z_R2F


def backward(
    dy_ND: Tensor,
    x_ND: Tensor,
    place_R: Tensor,
    offset_E: Tensor,
    weight_NK: Tensor,
    w13_EFD: Tensor,
    w2_EDF: Tensor,
    z_R2F: Tensor,
    on_input: bool,
    dtype: torch.dtype,
    need_x: bool,
    need_w13: bool,
    need_w2: bool,
    sums: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, w13, w2; empty where not needed. ``sums`` are contiguous gradients of w13 and w2 to add to."""
    weight_NK32 = weight_NK.to(torch.float32)
    operands = _contiguous(dy_ND.to(dtype), x_ND.to(dtype), place_R, offset_E, weight_NK32, w13_EFD, w2_EDF, z_R2F)
    dx_ND = torch.empty(x_ND.shape if need_x else 0, dtype=dtype)
    dweight_NK = torch.empty(weight_NK.shape, dtype=torch.float32)
    if sums is None:
        dw13_EFD = empty_gradient(w13_EFD) if need_w13 else w13_EFD.new_empty(0)
        dw2_EDF = empty_gradient(w2_EDF) if need_w2 else w2_EDF.new_empty(0)
    else:
        dw13_EFD, dw2_EDF = sums
    results = [dx_ND, dweight_NK, dw13_EFD, dw2_EDF]
    tensors, add = [*operands, *results], int(sums is not None)
    _call("anabranch_expert_backward", tensors, weight_NK, w13_EFD, w2_EDF, on_input, add)
    return dx_ND.to(x_ND.dtype), dweight_NK.to(weight_NK.dtype), dw13_EFD, dw2_EDF


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    return [tensor.contiguous() for tensor in tensors]


def _call(
    name: str,
    tensors: Sequence[Tensor],
    weight_NK: Tensor,
    w13_EFD: Tensor,
    w2_EDF: Tensor,
    on_input: bool,
    *options: int,
) -> None:
    """Call a kernel on tensors in its order (an empty one is a null pointer); the types are those of x and the weights."""
    library = load()
    assert library is not None, "callers ask why_not first"
    types = _TYPES[tensors[0].dtype, w13_EFD.dtype]
    sizes = (weight_NK.shape[0], w2_EDF.shape[0], weight_NK.shape[1], w2_EDF.shape[1], w2_EDF.shape[2])
    pointers = (ctypes.c_void_p(tensor.data_ptr() or None) for tensor in tensors)
    threads = torch.get_num_threads()
    if getattr(library, name)(types, *pointers, *map(ctypes.c_int64, sizes), int(on_input), threads, *options):
        raise CapacityError("not enough memory for the expert kernels' workspace; use smaller batches")
