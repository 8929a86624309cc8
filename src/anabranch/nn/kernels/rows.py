"""The compiled passes over rows behind tensors: RMSNorm, rotary positions, weighted sums, in float32 and bfloat16 on a CPU."""
# Shapes: N rows, D width; B sequences, H heads, L positions, W head width; C parts of a sum

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from anabranch.nn.kernels import load
from anabranch.routing.score import cast

__all__ = ["can_norm", "can_sum", "can_turn", "norm", "norm_gradients", "sum_gradients", "turn", "weighted_sum"]

STEP = 16  # vectors of floats that widths must be multiples of

_pointer, _int, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


def _can(x: Tensor) -> bool:
    if x.dtype not in (torch.float32, torch.bfloat16) or x.device.type != "cpu" or type(x) is not Tensor:
        return False
    return not torch.compiler.is_compiling() and load() is not None


def can_norm(x: Tensor) -> bool:
    """Whether the kernels take these rows: their width is a multiple of 16, and no graph is being made of them."""
    return x.shape[-1] % STEP == 0 and x.numel() > 0 and _can(x)


def can_turn(x_BHLD: Tensor, cos: Tensor) -> bool:
    """Whether the kernels take these heads: their halves are multiples of 16 wide, and the angles are of their type."""
    return x_BHLD.shape[-1] % (2 * STEP) == 0 and x_BHLD.numel() > 0 and cos.dtype == x_BHLD.dtype and _can(x_BHLD)


def can_sum(parts: Sequence[Tensor]) -> bool:
    """Whether the kernels take these [N, D]: as rows for `norm`, all of one type."""
    return all(part.dtype == parts[0].dtype and can_norm(part) for part in parts)


def norm(x: Tensor, weight_D: Tensor, eps: float, *, keep: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """(x in one piece, y, the factor of each row in x's order in memory). Rows are independent, so their order does not matter."""
    x, weight_D = _dense(x), cast(weight_D, torch.float32).contiguous()
    y = torch.empty_like(x)
    width = x.shape[-1]
    scale_N = torch.empty(x.numel() // width) if keep else None
    _library().anabranch_norm_forward(
        int(x.dtype == torch.bfloat16), *_pointers(x, weight_D, y, scale_N),
        _int(x.numel() // width), _int(width), _float(eps), torch.get_num_threads(),
    )  # fmt: skip
    return x, y, scale_N


def norm_gradients(gradient: Tensor, x: Tensor, weight_D: Tensor, scale_N: Tensor) -> tuple[Tensor, Tensor]:
    """(dx in x's type, dweight in float32); ``x`` and ``scale_N`` are what `norm` gave."""
    if gradient.stride() != x.stride() or gradient.dtype != x.dtype:
        gradient = torch.empty_like(x).copy_(gradient)
    dx, dweight_D = torch.empty_like(x), torch.empty(weight_D.shape)
    weight_D = cast(weight_D, torch.float32).contiguous()
    width = x.shape[-1]
    _library().anabranch_norm_backward(
        int(x.dtype == torch.bfloat16), *_pointers(gradient, x, weight_D, scale_N, dx, dweight_D),
        _int(x.numel() // width), _int(width), torch.get_num_threads(),
    )  # fmt: skip
    return dx, dweight_D


def turn(x_BHLD: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """Each pair (x_i, x_{i + W/2}) turned by its angle, or back where ``sign`` is -1. The angles are [B or 1, 1, L, W]."""
    if x_BHLD.stride(-1) != 1:
        x_BHLD = x_BHLD.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    y_BHLD = torch.empty_like(x_BHLD)
    batch, heads, length, width = x_BHLD.shape
    of_sequence = 0 if cos.shape[0] == 1 else length * width
    strides = (ctypes.c_int64 * 7)(*x_BHLD.stride()[:3], *y_BHLD.stride()[:3], of_sequence)
    _library().anabranch_turn(
        int(x_BHLD.dtype == torch.bfloat16), *_pointers(x_BHLD, y_BHLD, cos, sin), strides,
        _int(batch), _int(heads), _int(length), _int(width), _float(sign), torch.get_num_threads(),
    )  # fmt: skip
    return y_BHLD


def weighted_sum(parts: Sequence[Tensor], weight_NC: Tensor) -> Tensor:
    """y_ND = sum_c weight_nc part_c; the parts are contiguous, the weights float32."""
    y_ND = torch.empty_like(parts[0])
    _library().anabranch_sum_forward(
        int(y_ND.dtype == torch.bfloat16), _table(parts), *_pointers(weight_NC, y_ND),
        *map(_int, (*y_ND.shape, len(parts))), torch.get_num_threads(),
    )  # fmt: skip
    return y_ND


def sum_gradients(gradient_ND: Tensor, parts: Sequence[Tensor], weight_NC: Tensor) -> tuple[list[Tensor], Tensor]:
    """(dpart_ND of each part, dweight_NC)."""
    made, dweight_NC = [torch.empty_like(part) for part in parts], torch.empty_like(weight_NC)
    gradient_ND = cast(gradient_ND, parts[0].dtype).contiguous()
    _library().anabranch_sum_backward(
        int(gradient_ND.dtype == torch.bfloat16), *_pointers(gradient_ND), _table(parts), *_pointers(weight_NC),
        _table(made), *_pointers(dweight_NC), *map(_int, (*gradient_ND.shape, len(parts))), torch.get_num_threads(),
    )  # fmt: skip
    return made, dweight_NC


def _table(parts: Sequence[Tensor]) -> ctypes.Array:
    return (_pointer * len(parts))(*(part.data_ptr() for part in parts))


def _library() -> ctypes.CDLL:
    library = load()
    assert library is not None, "callers ask first"
    return library


def _pointers(*tensors: Tensor | None) -> list[ctypes.c_void_p]:
    return [_pointer(None if part is None else part.data_ptr()) for part in tensors]


def _dense(x: Tensor) -> Tensor:
    """The tensor with its rows one after the other in some order, without a copy where they are."""
    if x.is_contiguous():
        return x
    is_dense = x.stride(-1) == 1 and torch.empty_like(x, device="meta").stride() == x.stride()
    return x if is_dense else x.contiguous()
