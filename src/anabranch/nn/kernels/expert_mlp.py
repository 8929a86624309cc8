"""The compiled kernels behind tensors: the ``native`` back end of `anabranch.nn.grouped`."""
# Shapes: N items, E experts, K choices per item, R = N K rows, D width, F hidden

import torch
from torch import Tensor

from anabranch.nn.expert_call import ExpertCall, Gradients, Needed
from anabranch.nn.kernels import load
from anabranch.nn.kernels.binding import Kernel
from anabranch.nn.kernels.memory import empty_gradient
from anabranch.nn.kernels.operands import DTYPES, takes, why_refused
from anabranch.precision import cast

__all__ = ["backward", "forward", "why_not"]

# Widths must be multiples of a vector of floats.
STEP = 16

# What is computed in, and the weights. The last is autocast: weights are rounded as they are read, and their gradients stay fp32.
_TYPES: dict[tuple[str, ...], int] = {
    ("float32", "float32"): 0,
    ("bfloat16", "bfloat16"): 1,
    ("bfloat16", "float32"): 2,
}
_PAIRS = {(DTYPES[dtype], DTYPES[weights]) for dtype, weights in _TYPES}

FORWARD = Kernel(
    "anabranch_expert_forward",
    """types, x: item[N, D], place: int64[N*K], offset: int32[E], weight: float32[N, K], w13: matrix[E, 2*F, D], w2: matrix[E, D, F],
    y: item[N, D] out, z: item[N*K, 2*F]? out, N, E, K, D, F, on_input: int, threads""",
    types=_TYPES,
    where=("D % 16 == 0", "F % 16 == 0", "E > 0", "K > 0"),
    result="status",
)
BACKWARD = Kernel(
    "anabranch_expert_backward",
    """types, dy: item[N, D], x: item[N, D], place: int64[N*K], offset: int32[E], weight: float32[N, K], w13: matrix[E, 2*F, D],
    w2: matrix[E, D, F], z: item[N*K, 2*F]?, dx: item[N, D]? out, dweight: float32[N, K] out, dw13: matrix[E, 2*F, D]? out,
    dw2: matrix[E, D, F]? out, N, E, K, D, F, on_input: int, threads, add: int""",
    types=_TYPES,
    where=("D % 16 == 0", "F % 16 == 0", "E > 0", "K > 0"),
    result="status",
)


def why_not(x_ND: Tensor, w13_EFD: Tensor, w2_EDF: Tensor, dtype: torch.dtype, **others: Tensor) -> str | None:
    """Why the kernels cannot take this, or None if they can. ``others`` are the plan and so on, by their names."""
    if not takes(x_ND, w13_EFD, w2_EDF, *others.values()):
        return why_refused(x=x_ND, w13=w13_EFD, w2=w2_EDF, **others)
    if w13_EFD.dtype != w2_EDF.dtype or (dtype, w13_EFD.dtype) not in _PAIRS:
        return f"the native kernels compute in float32 or bfloat16; here in {dtype} with weights in {w13_EFD.dtype}"
    for name, width in (("dim", x_ND.shape[1]), ("hidden_dim", w2_EDF.shape[2])):
        if width % STEP:
            return f"the native kernels need a {name} that is a multiple of {STEP}; it is {width}"
    if load() is None:
        return "the native kernels could not be compiled here, or ANABRANCH_NO_KERNELS is set"
    return None


def forward(call: ExpertCall, keep: bool) -> tuple[Tensor, Tensor]:
    """y_ND and, with ``keep``, z_R2F."""
    x_ND, weight_NK = cast(call.x_ND, call.dtype), cast(call.weight_NK, torch.float32)
    operands = _contiguous(x_ND, call.choice_R, call.offset_E, weight_NK, call.w13_EFD, call.w2_EDF)
    y_ND = torch.empty(call.x_ND.shape, dtype=call.dtype)
    z_R2F = torch.empty((call.choice_R.shape[0], call.w13_EFD.shape[1]) if keep else 0, dtype=call.dtype)
    FORWARD(*operands, y_ND, z_R2F if keep else None, call.on_input)
    return y_ND, z_R2F


def backward(
    call: ExpertCall, z_R2F: Tensor, dy_ND: Tensor, needed: Needed, sums: tuple[Tensor, Tensor] | None = None
) -> Gradients:
    """Gradients of the call; ``sums`` are contiguous gradients of w13 and w2 to add to."""
    dtype, weight_NK = call.dtype, call.weight_NK.to(torch.float32)
    plan_and_weights = call.choice_R, call.offset_E, weight_NK, call.w13_EFD, call.w2_EDF
    operands = _contiguous(dy_ND.to(dtype), call.x_ND.to(dtype), *plan_and_weights, z_R2F)
    dx_ND = torch.empty(call.x_ND.shape if needed.x else 0, dtype=dtype)
    dweight_NK = torch.empty(weight_NK.shape, dtype=torch.float32)
    if sums is None:
        dw13_EFD = empty_gradient(call.w13_EFD) if needed.w13 else call.w13_EFD.new_empty(0)
        dw2_EDF = empty_gradient(call.w2_EDF) if needed.w2 else call.w2_EDF.new_empty(0)
    else:
        dw13_EFD, dw2_EDF = sums
    results = (_there(dx_ND), dweight_NK, _there(dw13_EFD), _there(dw2_EDF))
    BACKWARD(*operands[:-1], _there(operands[-1]), *results, call.on_input, sums is not None)
    return Gradients(dx_ND.to(call.x_ND.dtype), dweight_NK.to(call.weight_NK.dtype), dw13_EFD, dw2_EDF)


def _contiguous(*tensors: Tensor) -> list[Tensor]:
    return [tensor.contiguous() for tensor in tensors]


def _there(part: Tensor) -> Tensor | None:
    """None for an empty one: it is not wanted, or was not kept."""
    return part if part.numel() else None
