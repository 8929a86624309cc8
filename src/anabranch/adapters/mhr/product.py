"""The product of rows with the adapters of their tasks: skills mixed once for each task, and a backward pass written by hand.

    A_u = sum_k alpha_uk A_k,  B_u = sum_k alpha_uk B_k        once for each of the U tasks of a pass, head by head
    z_b = x_b A_u(b),  y_b + scale z_b B_u(b)                  for each row b

    dz = scale dy B^T;  dx = dz A^T;  dA_u = sum_b x_b^T dz_b;  dB_u = scale sum_b z_b^T dy_b
    dalpha_uk = <dA_u, A_k> + <dB_u, B_k>;  dA_k = sum_u alpha_uk dA_u;  dB_k = sum_u alpha_uk dB_u

What is kept for it is what is as narrow as a rank, and the inputs; scaling, adding to y, and gathering of adapters by row cost no pass
over anything as large as y.
"""
# Shapes: B rows, L positions, U tasks, q heads, K skills, C inputs, O outputs, R rank

from typing import Any

import torch
from torch import Tensor

from anabranch.nn.derivatives import asks_for_plain, plain_gradients
from anabranch.nn.kernels.low_rank import can_add, low_rank
from anabranch.nn.kernels.operands import is_transformed
from anabranch.precision import autocast_dtype

__all__ = ["add_rows", "can_add_rows", "merged_halves"]


def merged_halves(alpha_UqK: Tensor, a_qKCR: Tensor, b_qKRO: Tensor) -> tuple[Tensor, Tensor]:
    """(a_UCR, b_URO): the halves of one adapter for each row of weights, whose heads stand side by side."""
    rank = a_qKCR.shape[3]
    alpha_qUK = alpha_UqK.to(a_qKCR.dtype).transpose(0, 1)
    a_qUX = torch.bmm(alpha_qUK, a_qKCR.flatten(2))
    b_qUX = torch.bmm(alpha_qUK, b_qKRO.flatten(2))
    a_UCR = a_qUX.unflatten(2, (-1, rank)).transpose(0, 1).flatten(1, 2)
    b_URO = b_qUX.unflatten(2, (rank, -1)).permute(1, 2, 0, 3).flatten(2)
    return a_UCR, b_URO


def can_add_rows(x_BLC: Tensor, y_BLO: Tensor, a_qKCR: Tensor) -> bool:
    """Whether `add_rows` takes these: eagerly, in one type, without autocast."""
    if torch.compiler.is_compiling() or is_transformed() or autocast_dtype(x_BLC.device.type) is not None:
        return False
    return x_BLC.dtype == y_BLO.dtype == a_qKCR.dtype


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
    made: Tensor = _AddRows.apply(y_BLO, x_BLC, alpha_UqK, a_qKCR, b_qKRO, place_B, scale)
    return made


def _plain(x_BLC: Tensor, alpha_UqK: Tensor, a_qKCR: Tensor, b_qKRO: Tensor, place_B: Tensor, scale: float) -> Tensor:
    """What is added to y, by operators that autograd differentiates."""
    a_UCR, b_URO = merged_halves(alpha_UqK, a_qKCR, b_qKRO)
    return torch.bmm(torch.bmm(x_BLC, a_UCR[place_B]), b_URO[place_B]) * scale


class _AddRows(torch.autograd.Function):
    """Keeps its inputs but y, what they are mixed to, and z."""

    @staticmethod
    def forward(
        ctx: Any,
        y_BLO: Tensor,
        x_BLC: Tensor,
        alpha_UqK: Tensor,
        a_qKCR: Tensor,
        b_qKRO: Tensor,
        place_B: Tensor,
        scale: float,
    ) -> Tensor:
        a_UCR, b_URO = merged_halves(alpha_UqK, a_qKCR, b_qKRO)
        made_BLO, z_BLR = _through(x_BLC, a_UCR.transpose(1, 2), b_URO.transpose(1, 2), place_B, scale, y_BLO)
        ctx.save_for_backward(x_BLC, alpha_UqK, a_qKCR, b_qKRO, place_B, a_UCR, b_URO, z_BLR)
        ctx.scale = scale
        return made_BLO

    @staticmethod
    def backward(ctx: Any, dy_BLO: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, place_B, a_UCR, b_URO, z_BLR = ctx.saved_tensors
        needs_y, needs_x, needs_alpha, needs_a, needs_b, *_ = ctx.needs_input_grad
        dy = dy_BLO if needs_y else None
        if asks_for_plain(dy_BLO):

            def plain(x_BLC: Tensor, alpha_UqK: Tensor, a_qKCR: Tensor, b_qKRO: Tensor) -> Tensor:
                return _plain(x_BLC, alpha_UqK, a_qKCR, b_qKRO, place_B, ctx.scale)

            return dy, *plain_gradients(plain, inputs, dy_BLO, ctx.needs_input_grad[1:5]), None, None
        x_BLC, alpha_UqK, a_qKCR, b_qKRO = inputs
        dalpha_UqK = da_qKCR = db_qKRO = None
        # The same product from the other side; dz is without the scale.
        dx_BLC, dz_BLR = _through(dy_BLO, b_URO, a_UCR, place_B, ctx.scale)
        alpha_qKU = alpha_UqK.to(a_qKCR.dtype).permute(1, 2, 0)
        parts = []
        if needs_alpha or needs_a:
            # [B, C, R] -> [U, q C, R] -> [q, U, C R]
            da_UCR = _summed(torch.bmm(x_BLC.transpose(1, 2), dz_BLR), place_B, len(a_UCR)) * ctx.scale
            da_qUX = da_UCR.unflatten(1, (len(a_qKCR), -1)).flatten(2).transpose(0, 1)
            da_qKCR = torch.bmm(alpha_qKU, da_qUX).view_as(a_qKCR) if needs_a else None
            parts.append((da_qUX, a_qKCR))
        if needs_alpha or needs_b:
            db_URO = _summed(torch.bmm(z_BLR.transpose(1, 2), dy_BLO), place_B, len(b_URO)) * ctx.scale
            db_qUX = db_URO.unflatten(2, (len(b_qKRO), -1)).permute(2, 0, 1, 3).flatten(2)
            db_qKRO = torch.bmm(alpha_qKU, db_qUX).view_as(b_qKRO) if needs_b else None
            parts.append((db_qUX, b_qKRO))
        if needs_alpha:
            dalpha_qUK = sum(torch.bmm(d_qUX, skill.flatten(2).transpose(1, 2)) for d_qUX, skill in parts)
            assert isinstance(dalpha_qUK, Tensor), "there are two of them"
            dalpha_UqK = dalpha_qUK.transpose(0, 1).to(alpha_UqK.dtype)
        return dy, dx_BLC if needs_x else None, dalpha_UqK, da_qKCR, db_qKRO, None, None


def _through(
    x_BLC: Tensor, down_URC: Tensor, up_UOR: Tensor, place_B: Tensor, scale: float, into_BLO: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(into + scale z up^T, z = x down^T) of each row with the halves of its task; by the compiled kernel where there is one.

    The kernel takes all rows of a task together, where they lie.
    """
    down_URC, up_UOR = down_URC.contiguous(), up_UOR.contiguous()
    rows, length, _ = x_BLC.shape
    x_NC, out_dim = x_BLC.reshape(rows * length, -1), up_UOR.shape[1]
    if x_NC.dtype == torch.float32 and can_add(x_NC, down_URC, up_UOR):
        order_B = place_B.argsort(stable=True)
        item_N = (order_B.unsqueeze(1) * length + torch.arange(length)).flatten()
        end_U = torch.bincount(place_B, minlength=len(down_URC)).cumsum(0) * length
        into_NO = (
            None if into_BLO is None else into_BLO.reshape(-1, out_dim).clone(memory_format=torch.contiguous_format)
        )
        weight_N = torch.full((len(item_N),), scale)
        y_NO, z_NR = low_rank(x_NC, down_URC, up_UOR, end_U, item_N, weight_N, keep=True, into=into_NO)
        assert z_NR is not None, "it is kept"
        # In the order of the items again.
        z_NR = torch.empty_like(z_NR).index_copy_(0, item_N, z_NR)
        return y_NO.view(rows, length, out_dim), z_NR.view(rows, length, -1)
    z_BLR = torch.bmm(x_BLC, down_URC.index_select(0, place_B).transpose(1, 2))
    up_BRO = up_UOR.index_select(0, place_B).transpose(1, 2)
    if into_BLO is None:
        return torch.bmm(z_BLR * scale, up_BRO), z_BLR
    return torch.baddbmm(into_BLO, z_BLR * scale, up_BRO), z_BLR


def _summed(of_rows_BXY: Tensor, place_B: Tensor, tasks: int) -> Tensor:
    """What the rows of each task add up to."""
    return of_rows_BXY.new_zeros(tasks, *of_rows_BXY.shape[1:]).index_add_(0, place_B, of_rows_BXY)
