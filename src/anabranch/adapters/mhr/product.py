"""The product of rows with the adapters of their tasks: skills mixed once for each task, and a backward pass written by hand.

    A_u = sum_k alpha_uk A_k,  B_u = sum_k alpha_uk B_k        once for each of the U tasks of a pass, head by head
    z_b = x_b A_u(b),  y_b + scale z_b B_u(b)                  for each row b, where y is given, or W x_b + bias of a frozen matrix

    dz = dy B^T;  dx = W^T dy + scale dz A^T;  dA_u = scale sum_b x_b^T dz_b;  dB_u = scale sum_b z_b^T dy_b
    dalpha_uk = <dA_u, A_k> + <dB_u, B_k>;  dA_k = sum_u alpha_uk dA_u;  dB_k = sum_u alpha_uk dB_u

What is kept for it is what is as narrow as a rank, and the inputs. What a frozen matrix makes is added to where it lies, and so is the
gradient that goes back through it: nothing as large as x or y is written twice. Some hundred items are gone through at a time, so that
what is read twice is in the cache the second time, and a type wider than the model's is never that of all items.
"""
# Shapes: B rows, L positions, N = B L items, U tasks, q heads, K skills, C inputs, O outputs, R rank

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.adapters.together import ITEMS, add_product
from anabranch.nn.derivatives import asks_for_plain, plain_gradients

__all__ = ["add_rows", "add_to_rows", "merged_halves", "rows_through"]

# Rows as long as this are taken as they lie; shorter ones of a task are gathered.
_LONG = 32


def merged_halves(alpha_UqK: Tensor, a_qKCR: Tensor, b_qKRO: Tensor) -> tuple[Tensor, Tensor]:
    """(a_UCR, b_URO): the halves of one adapter for each row of weights, whose heads stand side by side."""
    rank = a_qKCR.shape[3]
    alpha_qUK = alpha_UqK.to(a_qKCR.dtype).transpose(0, 1)
    a_qUX = torch.bmm(alpha_qUK, a_qKCR.flatten(2))
    b_qUX = torch.bmm(alpha_qUK, b_qKRO.flatten(2))
    a_UCR = a_qUX.unflatten(2, (-1, rank)).transpose(0, 1).flatten(1, 2)
    b_URO = b_qUX.unflatten(2, (rank, -1)).permute(1, 2, 0, 3).flatten(2)
    return a_UCR, b_URO


def add_rows(
    y_BLO: Tensor, x_BLC: Tensor, alpha_UqK: Tensor, a_qKCR: Tensor, b_qKRO: Tensor, place_B: Tensor, scale: float
) -> Tensor:
    """y_BLO + scale (x A) B with the halves of each row's task; differentiable as often as is asked.

    Args:
        y_BLO: what is added to, and left as it is.
        x_BLC: rows.
        alpha_UqK: weights of skills, of each task.
        a_qKCR, b_qKRO: skills.
        place_B: int64, the task of each row among the U.
        scale: see above.
    """
    made: Tensor = _AddRows.apply(y_BLO, x_BLC, alpha_UqK, a_qKCR, b_qKRO, place_B, scale, None, None)
    return made


def rows_through(
    weight_OC: Tensor,
    bias_O: Tensor | None,
    x_BLC: Tensor,
    alpha_UqK: Tensor,
    a_qKCR: Tensor,
    b_qKRO: Tensor,
    place_B: Tensor,
    scale: float,
) -> Tensor:
    """`add_rows` to what a matrix makes of x, that gets no gradient itself."""
    made: Tensor = _AddRows.apply(None, x_BLC, alpha_UqK, a_qKCR, b_qKRO, place_B, scale, weight_OC, bias_O)
    return made


def add_to_rows(
    y_BLO: Tensor, x_BLC: Tensor, alpha_UqK: Tensor, a_qKCR: Tensor, b_qKRO: Tensor, place_B: Tensor, scale: float
) -> None:
    """`add_rows` in place, without a gradient; rows of y may be parts of wider ones."""
    a_UCR, b_URO = merged_halves(alpha_UqK, a_qKCR, b_qKRO)
    _add(y_BLO, x_BLC, a_UCR, b_URO, _pieces(place_B, x_BLC.shape[1]), scale)


class _AddRows(torch.autograd.Function):
    """Keeps its inputs but y, what they are mixed to, and z."""

    @staticmethod
    def forward(
        ctx: Any,
        y_BLO: Tensor | None,
        x_BLC: Tensor,
        alpha_UqK: Tensor,
        a_qKCR: Tensor,
        b_qKRO: Tensor,
        place_B: Tensor,
        scale: float,
        weight_OC: Tensor | None,
        bias_O: Tensor | None,
    ) -> Tensor:
        a_UCR, b_URO = merged_halves(alpha_UqK, a_qKCR, b_qKRO)
        if weight_OC is not None:
            made_BLO = F.linear(x_BLC, weight_OC, bias_O)
        else:
            assert y_BLO is not None, "there is either a matrix or what it made"
            made_BLO = y_BLO.clone(memory_format=torch.contiguous_format)
        ctx.pieces = _pieces(place_B, x_BLC.shape[1])
        z_NR = a_UCR.new_empty(x_BLC.shape[0] * x_BLC.shape[1], a_UCR.shape[2])
        _add(made_BLO, x_BLC, a_UCR, b_URO, ctx.pieces, scale, z_NR)
        ctx.save_for_backward(x_BLC, alpha_UqK, a_qKCR, b_qKRO, place_B, a_UCR, b_URO, z_NR, weight_OC)
        ctx.scale = scale
        return made_BLO

    @staticmethod
    def backward(ctx: Any, dy_BLO: Tensor) -> tuple[Tensor | None, ...]:
        x_BLC, alpha_UqK, a_qKCR, b_qKRO, place_B, a_UCR, b_URO, z_NR, weight_OC = ctx.saved_tensors
        needs_y, needs_x, needs_alpha, needs_a, needs_b, *_ = ctx.needs_input_grad
        dy = dy_BLO if needs_y else None
        if asks_for_plain(dy_BLO):

            def plain(x_BLC: Tensor, alpha_UqK: Tensor, a_qKCR: Tensor, b_qKRO: Tensor) -> Tensor:
                added_BLO = _plain(x_BLC, alpha_UqK, a_qKCR, b_qKRO, place_B, ctx.scale)
                return added_BLO if weight_OC is None else F.linear(x_BLC, weight_OC) + added_BLO

            inputs = x_BLC, alpha_UqK, a_qKCR, b_qKRO
            return dy, *plain_gradients(plain, inputs, dy_BLO, ctx.needs_input_grad[1:5]), None, None, None, None
        x_NC, dy_NO = x_BLC.flatten(0, 1), dy_BLO.flatten(0, 1)
        dx_NC = None
        if needs_x:
            dx_NC = torch.empty_like(x_NC) if weight_OC is None else torch.mm(dy_NO, weight_OC)
        da_URC = torch.zeros_like(a_UCR.transpose(1, 2)) if needs_alpha or needs_a else None
        db_URO = torch.zeros_like(b_URO) if needs_alpha or needs_b else None
        for task, items in ctx.pieces:
            dy_part = dy_NO[items].to(b_URO.dtype)
            dz_part = torch.mm(dy_part, b_URO[task].t()) * ctx.scale
            if db_URO is not None:
                db_URO[task].addmm_(z_NR[items].t(), dy_part, alpha=ctx.scale)
            if da_URC is not None:
                da_URC[task].addmm_(dz_part.t(), x_NC[items].to(a_UCR.dtype))
            if dx_NC is not None and weight_OC is None and isinstance(items, slice) and dx_NC.dtype == dz_part.dtype:
                torch.mm(dz_part, a_UCR[task].t(), out=dx_NC[items])
            elif dx_NC is not None and weight_OC is None:
                dx_NC[items] = torch.mm(dz_part, a_UCR[task].t()).to(dx_NC.dtype)
            elif dx_NC is not None:
                _add_product(dx_NC, items, dz_part, a_UCR[task].t(), 1.0)
        dx_BLC = None if dx_NC is None else dx_NC.view_as(x_BLC)
        return dy, dx_BLC, *_unmixed(ctx, alpha_UqK, a_qKCR, b_qKRO, da_URC, db_URO), None, None, None, None


def _unmixed(
    ctx: Any, alpha_UqK: Tensor, a_qKCR: Tensor, b_qKRO: Tensor, da_URC: Tensor | None, db_URO: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (alpha, a, b) from those of the halves that they are mixed to."""
    _, _, needs_alpha, needs_a, needs_b, *_ = ctx.needs_input_grad
    alpha_qKU = alpha_UqK.to(a_qKCR.dtype).permute(1, 2, 0)
    heads, da_qKCR, db_qKRO, parts = len(a_qKCR), None, None, []
    if da_URC is not None:
        # [U, R, q C] -> [q, U, C R]
        da_qUX = da_URC.unflatten(2, (heads, -1)).permute(2, 0, 3, 1).flatten(2)
        da_qKCR = torch.bmm(alpha_qKU, da_qUX).view_as(a_qKCR) if needs_a else None
        parts.append((da_qUX, a_qKCR))
    if db_URO is not None:
        db_qUX = db_URO.unflatten(2, (heads, -1)).permute(2, 0, 1, 3).flatten(2)
        db_qKRO = torch.bmm(alpha_qKU, db_qUX).view_as(b_qKRO) if needs_b else None
        parts.append((db_qUX, b_qKRO))
    if not needs_alpha:
        return None, da_qKCR, db_qKRO
    dalpha_qUK = sum(torch.bmm(d_qUX, skill.flatten(2).transpose(1, 2)) for d_qUX, skill in parts)
    assert isinstance(dalpha_qUK, Tensor), "there are two of them"
    return dalpha_qUK.transpose(0, 1).to(alpha_UqK.dtype), da_qKCR, db_qKRO


def _plain(x_BLC: Tensor, alpha_UqK: Tensor, a_qKCR: Tensor, b_qKRO: Tensor, place_B: Tensor, scale: float) -> Tensor:
    """What is added to y, by operators that autograd differentiates."""
    a_UCR, b_URO = merged_halves(alpha_UqK, a_qKCR, b_qKRO)
    z_BLR = torch.bmm(x_BLC.to(a_UCR.dtype), a_UCR[place_B])
    return (torch.bmm(z_BLR, b_URO[place_B]) * scale).to(x_BLC.dtype)


def _add(
    y_BLO: Tensor,
    x_BLC: Tensor,
    a_UCR: Tensor,
    b_URO: Tensor,
    pieces: Sequence[tuple[int, slice | Tensor]],
    scale: float,
    z_NR: Tensor | None = None,
) -> None:
    """y += scale (x A) B in place; x A is left in ``z_NR`` where it is given."""
    x_NC, y_NO = x_BLC.flatten(0, 1), y_BLO.view(-1, y_BLO.shape[-1])
    for task, items in pieces:
        z = torch.mm(x_NC[items].to(a_UCR.dtype), a_UCR[task])
        if z_NR is not None:
            z_NR[items] = z
        _add_product(y_NO, items, z, b_URO[task], scale)


def _add_product(y_NO: Tensor, items: slice | Tensor, z: Tensor, b_RO: Tensor, scale: float) -> None:
    """`add_product` of these items."""
    if isinstance(items, slice):
        add_product(y_NO[items], z, b_RO, scale)
    else:
        y_NO[items] = torch.add(y_NO[items], torch.mm(z, b_RO), alpha=scale).to(y_NO.dtype)


def _pieces(place_B: Tensor, length: int) -> list[tuple[int, slice | Tensor]]:
    """(task, items of it) of all items, some hundred at a time: as rows lie where they are long, else those of a task together."""
    if length >= _LONG:
        made: list[tuple[int, slice | Tensor]] = []
        first, tasks = 0, place_B.tolist()
        for row, task in enumerate(tasks):
            if row + 1 == len(tasks) or tasks[row + 1] != task:
                end = (row + 1) * length
                made += [(task, slice(begin, min(begin + ITEMS, end))) for begin in range(first, end, ITEMS)]
                first = end
        return made
    order_B, count_U = place_B.argsort(stable=True), torch.bincount(place_B) * length
    item_N = (order_B.unsqueeze(1) * length + torch.arange(length)).flatten()
    return [
        (task, items)
        for task, of_task in enumerate(item_N.split(count_U.tolist()))
        for items in of_task.split(ITEMS)
        if len(items)
    ]
