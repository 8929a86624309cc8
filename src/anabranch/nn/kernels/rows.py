"""The compiled passes over rows behind tensors: RMSNorm, rotary positions, weighted sums, in float32 and bfloat16 on a CPU."""
# Shapes: N rows, D width; B sequences, H heads, L positions, W head width; C parts of a sum

from collections.abc import Sequence

import torch
from torch import Tensor

from anabranch.nn.kernels import load
from anabranch.nn.kernels.binding import Kernel
from anabranch.nn.kernels.operands import is_dense, takes
from anabranch.precision import cast

__all__ = ["can_norm", "can_rotate", "can_sum", "norm", "norm_gradients", "rotate", "sum_gradients", "weighted_sum"]

# Vectors of floats that widths must be multiples of.
STEP = 16

_TYPES: dict[tuple[str, ...], int] = {("float32",): 0, ("bfloat16",): 1}

NORM_FORWARD = Kernel(
    "anabranch_norm_forward",
    "types, x: item[N.., D], weight: float32[D], y: item[N.., D] out, scale: float32[N]? out, N, D, eps: float, threads",
    types=_TYPES,
    where=("D % 16 == 0",),
)
NORM_BACKWARD = Kernel(
    "anabranch_norm_backward",
    """types, gradient: item[N.., D], x: item[N.., D], weight: float32[D], scale: float32[N], dx: item[N.., D] out,
    dweight: float32[D] out, N, D, threads""",
    types=_TYPES,
    where=("D % 16 == 0",),
    result="status",
)
ROTATE = Kernel(
    "anabranch_turn",
    """types, x: item[B, H, L, W] rows, y: item[B, H, L, W] rows out, cos: item[B, 1, L, W] rows, sin: item[B, 1, L, W] rows,
    strides(x, y, cos, sin), B, H, L, W, sign: float, threads""",
    types=_TYPES,
    where=("W % 32 == 0",),
)
SUM_FORWARD = Kernel(
    "anabranch_sum_forward",
    "types, parts: item[N, D] * C, weight: float32[N, C], y: item[N, D] out, N, D, C, threads",
    types=_TYPES,
    where=("D % 16 == 0",),
)
SUM_BACKWARD = Kernel(
    "anabranch_sum_backward",
    """types, gradient: item[N, D], parts: item[N, D] * C, weight: float32[N, C], made: item[N, D] out * C,
    dweight: float32[N, C] out, N, D, C, threads""",
    types=_TYPES,
    where=("D % 16 == 0",),
)


def _can(x: Tensor, *others: Tensor) -> bool:
    return x.dtype in (torch.float32, torch.bfloat16) and takes(x, *others) and load() is not None


def _is_rows(x: Tensor) -> bool:
    return x.dim() > 0 and x.shape[-1] % STEP == 0 and x.numel() > 0


def can_norm(x: Tensor, weight_D: Tensor) -> bool:
    """Whether the kernels take these rows: their width is a multiple of 16, and the binding `takes` both."""
    return _is_rows(x) and _can(x, weight_D)


def can_rotate(x_BHLD: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the kernels take these heads: their halves are multiples of 16 wide, and the angles are of their type."""
    if x_BHLD.shape[-1] % (2 * STEP) or x_BHLD.numel() == 0 or not cos.dtype == sin.dtype == x_BHLD.dtype:
        return False
    return _can(x_BHLD, cos, sin)


def can_sum(parts: Sequence[Tensor], weight_NC: Tensor) -> bool:
    """Whether the kernels take these [N, D]: as rows for `norm`, all of one type, and their weights."""
    return all(part.dtype == parts[0].dtype and _is_rows(part) for part in parts) and _can(*parts, weight_NC)


def norm(x: Tensor, weight_D: Tensor, eps: float, *, keep: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """(x in one piece, y, the factor of each row in x's order in memory). Rows are independent, so their order does not matter."""
    x, weight_D = _dense(x), cast(weight_D, torch.float32).contiguous()
    y = torch.empty_like(x)
    scale_N = torch.empty(x.numel() // x.shape[-1]) if keep else None
    NORM_FORWARD(x, weight_D, y, scale_N, eps)
    return x, y, scale_N


def norm_gradients(gradient: Tensor, x: Tensor, weight_D: Tensor, scale_N: Tensor) -> tuple[Tensor, Tensor]:
    """(dx in x's type, dweight in float32); ``x`` and ``scale_N`` are what `norm` gave."""
    if gradient.stride() != x.stride() or gradient.dtype != x.dtype:
        gradient = torch.empty_like(x).copy_(gradient)
    dx, dweight_D = torch.empty_like(x), torch.empty(weight_D.shape)
    NORM_BACKWARD(gradient, x, cast(weight_D, torch.float32).contiguous(), scale_N, dx, dweight_D)
    return dx, dweight_D


def rotate(x_BHLD: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """Each pair (x_i, x_{i + W/2}) rotated by its angle, or back where ``sign`` is -1. The angles are [B or 1, 1, L, W]."""
    if x_BHLD.stride(-1) != 1:
        x_BHLD = x_BHLD.contiguous()
    cos, sin, batch = cos.contiguous(), sin.contiguous(), x_BHLD.shape[0]
    if batch != 1 and cos.shape[0] == 1:
        cos, sin = cos.expand(batch, -1, -1, -1), sin.expand(batch, -1, -1, -1)
    y_BHLD = torch.empty_like(x_BHLD)
    ROTATE(x_BHLD, y_BHLD, cos, sin, sign)
    return y_BHLD


def weighted_sum(parts: Sequence[Tensor], weight_NC: Tensor) -> Tensor:
    """y_ND = sum_c weight_nc part_c; the parts are contiguous, the weights float32."""
    y_ND = torch.empty_like(parts[0])
    SUM_FORWARD(parts, weight_NC, y_ND)
    return y_ND


def sum_gradients(gradient_ND: Tensor, parts: Sequence[Tensor], weight_NC: Tensor) -> tuple[list[Tensor], Tensor]:
    """(dpart_ND of each part, dweight_NC)."""
    made, dweight_NC = [torch.empty_like(part) for part in parts], torch.empty_like(weight_NC)
    SUM_BACKWARD(cast(gradient_ND, parts[0].dtype).contiguous(), parts, weight_NC, made, dweight_NC)
    return made, dweight_NC


def _dense(x: Tensor) -> Tensor:
    """The tensor with its rows one after the other in some order, without a copy where they are."""
    return x if x.is_contiguous() or is_dense(x) else x.contiguous()
