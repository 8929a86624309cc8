"""LoRA beside parts of one frozen matrix, multiplied with it, and a backward pass written by hand.

    y = W x + bias,  y_p += scale_p B_p A_p x               for each part p, in its rows of y
    z = [A_1; A_2; ...] x                                   one product over the ranks of all parts

    dz_p = scale_p B_p^T dy_p;  dx = W^T dy + [A_1; A_2; ...]^T dz;  d[A_1; A_2; ...] = dz x^T;  dB_p = scale_p dy_p z_p^T

What is added is added where it lies, in y and in the gradient of x, so nothing as wide as they is written twice, and x and z alone are
kept. Some hundred items are gone through at a time: what is read twice is in the cache the second time, and where adapters are of a wider
type than the model, as float32 beside bfloat16, x, y and their gradients are never whole in it.
"""
# Shapes: N items, P parts, C inputs, O outputs of all parts, R rank of a part, S ranks of all parts

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.nn.derivatives import asks_for_plain, plain_gradients
from anabranch.nn.kernels.operands import PLAIN, is_transformed
from anabranch.precision import autocast_dtype

__all__ = ["ITEMS", "Adapted", "add_product", "can_go_together", "together"]

# Items that are gone through at a time: some hundred KiB of them.
ITEMS = 256


class Adapted(NamedTuple):
    """One part: its rows of y, the scale of what is added, and the rank."""

    first: int
    size: int
    scale: float
    rank: int


def can_go_together(x: Tensor, beside: Tensor, a: Tensor) -> bool:
    """Whether products of x with A are made as this file says: eagerly on a CPU, without autocast, x in the type of what they stand beside.

    ``beside`` is the matrix or what it made. A may be of a wider type, in which the product is then made.
    """
    if torch.compiler.is_compiling() or is_transformed() or autocast_dtype(x.device.type) is not None:
        return False
    if not x.is_cpu or type(beside) not in PLAIN or not x.is_floating_point():
        return False
    return x.dtype == beside.dtype and torch.promote_types(x.dtype, a.dtype) == a.dtype


def together(
    x: Tensor,
    weight_OC: Tensor,
    bias_O: Tensor | None,
    parts: Sequence[Adapted],
    halves: Sequence[tuple[Tensor, Tensor]],
) -> Tensor:
    """W x + bias, and in the rows of each part scale B A x, differentiable in x and in the halves, as often as is asked.

    Args:
        x: ``[..., C]``.
        weight_OC, bias_O: of the matrix, in which nothing learns.
        parts: in the order of their rows.
        halves: (a_RC, b_OR) of each part.
    """
    made: Tensor = _Together.apply(x, weight_OC, bias_O, tuple(parts), *(half for pair in halves for half in pair))
    return made


def add_product(y_NO: Tensor, z_NR: Tensor, b_RO: Tensor, scale: float) -> None:
    """y += scale z b in place, in the wider type of both, and rounded once."""
    if y_NO.dtype == z_NR.dtype:
        y_NO.addmm_(z_NR, b_RO, alpha=scale)
    else:
        y_NO.add_(torch.mm(z_NR, b_RO), alpha=scale)


class _Together(torch.autograd.Function):
    """Keeps x and z."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OC: Tensor, bias_O: Tensor | None, parts: tuple[Adapted, ...], *halves: Tensor
    ) -> Tensor:
        y = F.linear(x, weight_OC, bias_O)
        x_NC, y_NO = x.flatten(0, -2), y.view(-1, y.shape[-1])
        a_SC = torch.cat(halves[::2])
        z_NS = a_SC.new_empty(len(x_NC), len(a_SC))
        for begin in range(0, len(x_NC), ITEMS):
            items, start = slice(begin, begin + ITEMS), 0
            z_NS[items] = torch.mm(x_NC[items].to(a_SC.dtype), a_SC.t())
            for part, b_OR in zip(parts, halves[1::2], strict=True):
                own_NO, low_NR = y_NO[items].narrow(1, part.first, part.size), z_NS[items].narrow(1, start, part.rank)
                add_product(own_NO, low_NR, b_OR.t(), part.scale)
                start += part.rank
        ctx.save_for_backward(x, weight_OC, z_NS, *halves)
        ctx.parts = parts
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_OC, z_NS, *halves = ctx.saved_tensors
        parts, (needs_x, _, _, _, *needs) = ctx.parts, ctx.needs_input_grad
        if asks_for_plain(dy):

            def plain(x: Tensor, *halves: Tensor) -> Tensor:
                return _plain(x, weight_OC, parts, halves)

            dx, *found = plain_gradients(plain, (x, *halves), dy, (needs_x, *needs))
            return dx, None, None, None, *found
        x_NC, dy_NO = x.flatten(0, -2), dy.flatten(0, -2)
        a_SC = torch.cat(halves[::2])
        dx_NC = torch.mm(dy_NO, weight_OC) if needs_x else None
        da_SC = torch.zeros_like(a_SC) if any(needs[::2]) else None
        db = [torch.zeros_like(b_OR) if need else None for b_OR, need in zip(halves[1::2], needs[1::2], strict=True)]
        for begin in range(0, len(x_NC), ITEMS):
            items, start = slice(begin, begin + ITEMS), 0
            wide_NO = dy_NO[items].to(a_SC.dtype)
            dz_NS = wide_NO.new_empty(len(wide_NO), len(a_SC))
            for part, b_OR, db_OR in zip(parts, halves[1::2], db, strict=True):
                own_NO, ranks = wide_NO.narrow(1, part.first, part.size), slice(start, start + part.rank)
                torch.mul(torch.mm(own_NO, b_OR), part.scale, out=dz_NS[:, ranks])
                if db_OR is not None:
                    db_OR.addmm_(own_NO.t(), z_NS[items, ranks], alpha=part.scale)
                start += part.rank
            if da_SC is not None:
                da_SC.addmm_(dz_NS.t(), x_NC[items].to(a_SC.dtype))
            if dx_NC is not None:
                add_product(dx_NC[items], dz_NS, a_SC, 1.0)
        da = [None] * len(parts) if da_SC is None else da_SC.split([part.rank for part in parts])
        found = [half for pair in zip(da, db, strict=True) for half in pair]
        return None if dx_NC is None else dx_NC.view(x.shape), None, None, None, *found


def _plain(x: Tensor, weight_OC: Tensor, parts: tuple[Adapted, ...], halves: Sequence[Tensor]) -> Tensor:
    """The same but for the bias, by operators that autograd differentiates."""
    y, made, end = F.linear(x, weight_OC), [], 0
    for part, a_RC, b_OR in zip(parts, halves[::2], halves[1::2], strict=True):
        own = y.narrow(-1, part.first, part.size)
        added = F.linear(F.linear(x.to(a_RC.dtype), a_RC), b_OR) * part.scale
        made += [y.narrow(-1, end, part.first - end), own + added.to(y.dtype)]
        end = part.first + part.size
    return torch.cat([*made, y.narrow(-1, end, y.shape[-1] - end)], -1)
