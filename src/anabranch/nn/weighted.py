"""`weighted_sum`: y_n = sum_c w_nc part_c[n], each row with weights of its own, in one pass over memory each way."""
# Shapes: N rows, D width, C parts

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from anabranch.errors import InputError
from anabranch.nn.derivatives import asks_for_plain, plain_gradients
from anabranch.nn.kernels import rows as native

__all__ = ["weighted_sum"]


def weighted_sum(parts: Sequence[Tensor], weight_NC: Tensor) -> Tensor:
    """y_ND in the dtype of the parts, summed in at least float32.

    Args:
        parts: C tensors [N, D] of one dtype.
        weight_NC: column c weighs ``parts[c]``.

    Raises InputError where there are no parts, or not a column for each.
    """
    if not parts or weight_NC.shape[-1] != len(parts):
        raise InputError(
            f"weighted_sum was given {len(parts)} parts and weights {list(weight_NC.shape)}; it takes at least one part, and a column "
            "of weights for each"
        )
    if native.can_sum(parts, weight_NC):
        return _Sum.apply(weight_NC.to(torch.float32).contiguous(), *(part.contiguous() for part in parts))
    return _sum(weight_NC, *parts)


def _sum(weight_NC: Tensor, *parts: Tensor) -> Tensor:
    """The same by torch."""
    wide = torch.promote_types(parts[0].dtype, torch.float32)
    total_ND = sum(
        part.to(wide) * weight_N1.to(wide) for part, weight_N1 in zip(parts, weight_NC.split(1, 1), strict=True)
    )
    return total_ND.to(parts[0].dtype)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_NC: Tensor, *parts: Tensor) -> Tensor:
        ctx.save_for_backward(weight_NC, *parts)
        return native.weighted_sum(parts, weight_NC)

    @staticmethod
    def backward(ctx: Any, gradient_ND: Tensor) -> tuple[Tensor | None, ...]:
        if asks_for_plain(gradient_ND):
            return plain_gradients(_sum, ctx.saved_tensors, gradient_ND, ctx.needs_input_grad)
        weight_NC, *parts = ctx.saved_tensors
        made, dweight_NC = native.sum_gradients(gradient_ND, parts, weight_NC)
        return dweight_NC, *made
