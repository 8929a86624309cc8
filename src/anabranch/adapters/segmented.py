"""`segmented`: the product of routed rows with the low-rank adapters that they use, adapter by adapter, on a CPU.

    z_r = A_e x_n,    y_n += w_r B_e z_r          for each row r = (n, k) of adapter e

The grouped product of experts (`anabranch.nn.grouped`) makes a row of outputs for each choice, and then sums those of an item. An adapter's
outputs are wide and what is between is narrow, so here each row is added to its item's output at once: nothing as large as the outputs of
all choices is ever written, and choices that name nobody cost nothing.
"""
# Shapes: N items, E adapters, K choices per item, R = rows of used choices, C inputs, O outputs, Q greatest rank

from typing import Any

import torch
from torch import Tensor

from anabranch.nn.derivatives import asks_for_plain, plain_gradients
from anabranch.nn.kernels.operands import is_transformed
from anabranch.precision import autocast_dtype
from anabranch.routing.dispatch import DispatchPlan

__all__ = ["can_segment", "segmented"]


def can_segment(x_NC: Tensor, weight_NK: Tensor, a_EQC: Tensor, b_EOQ: Tensor) -> bool:
    """Whether it computes these: on a CPU, eagerly, in one type of at least 32 bits."""
    if torch.compiler.is_compiling() or is_transformed():
        return False
    is_here = all(value.device.type == "cpu" for value in (x_NC, weight_NK, a_EQC, b_EOQ))
    is_wide = x_NC.dtype in (torch.float32, torch.float64) and x_NC.dtype == a_EQC.dtype == b_EOQ.dtype
    return is_here and is_wide and autocast_dtype("cpu") is None and x_NC.dim() == 2


def segmented(x_NC: Tensor, plan: DispatchPlan, weight_NK: Tensor, a_EQC: Tensor, b_EOQ: Tensor) -> Tensor:
    """y_NO = sum_k weight_nk B_e A_e x_n, differentiable in all but the plan; adapters without rows get gradients that are exactly zero."""
    return _Segmented.apply(x_NC, weight_NK, a_EQC, b_EOQ, plan)


class _Segmented(torch.autograd.Function):
    """Keeps its inputs, and of each row what is between the two matrices."""

    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, weight_NK: Tensor, a_EQC: Tensor, b_EOQ: Tensor, plan: DispatchPlan) -> Tensor:
        ends = plan.offset_E.tolist()
        item_R = plan.item_R[: ends[-1]]
        active = _active(ends)
        # Taken apart at once: each piece that is cut out alone costs as much as its product.
        items = item_R.split([end - start for _, start, end in active])
        rows_RC, z_RQ = x_NC.index_select(0, item_R), x_NC.new_empty(ends[-1], a_EQC.shape[1])
        for expert, start, end in active:
            torch.mm(rows_RC[start:end], a_EQC[expert].t(), out=z_RQ[start:end])
        weighed_RQ = z_RQ * _of_rows(weight_NK, plan, ends[-1]).to(x_NC.dtype)
        y_NO = x_NC.new_zeros(plan.num_items, b_EOQ.shape[1])
        for (expert, start, end), item in zip(active, items, strict=True):
            y_NO.index_add_(0, item, torch.mm(weighed_RQ[start:end], b_EOQ[expert].t()))
        ctx.save_for_backward(x_NC, weight_NK, a_EQC, b_EOQ, z_RQ)
        ctx.plan, ctx.ends = plan, ends
        return y_NO

    @staticmethod
    def backward(ctx: Any, dy_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_NC, weight_NK, a_EQC, b_EOQ, z_RQ = ctx.saved_tensors
        plan, ends = ctx.plan, ctx.ends
        needs_x, needs_weight, needs_a, needs_b, _ = ctx.needs_input_grad
        if asks_for_plain(dy_NO):

            def plain(x_NC: Tensor, weight_NK: Tensor, a_EQC: Tensor, b_EOQ: Tensor) -> Tensor:
                return _plain(x_NC, weight_NK, a_EQC, b_EOQ, plan)

            return *plain_gradients(plain, (x_NC, weight_NK, a_EQC, b_EOQ), dy_NO, ctx.needs_input_grad[:4]), None
        item_R, weight_R1 = plan.item_R[: ends[-1]], _of_rows(weight_NK, plan, ends[-1]).to(x_NC.dtype)
        dx_NC = torch.zeros_like(x_NC) if needs_x else None
        da_EQC = torch.zeros_like(a_EQC) if needs_a else None
        db_EOQ = torch.zeros_like(b_EOQ) if needs_b else None
        dweight_R = z_RQ.new_empty(ends[-1])
        for expert, start, end in _active(ends):
            item, z = item_R[start:end], z_RQ[start:end]
            dy = dy_NO[item]
            back = torch.mm(dy, b_EOQ[expert])
            dweight_R[start:end] = (back * z).sum(-1)
            if db_EOQ is not None:
                torch.mm(dy.t(), z * weight_R1[start:end], out=db_EOQ[expert])
            dz = back * weight_R1[start:end]
            if da_EQC is not None:
                torch.mm(dz.t(), x_NC[item], out=da_EQC[expert])
            if dx_NC is not None:
                dx_NC.index_add_(0, item, torch.mm(dz, a_EQC[expert]))
        dweight_NK = None
        if needs_weight:
            flat = weight_NK.new_zeros(weight_NK.numel())
            dweight_NK = flat.index_copy_(0, plan.choice_R[: ends[-1]], dweight_R.to(flat.dtype)).view_as(weight_NK)
        return dx_NC, dweight_NK, da_EQC, db_EOQ, None


def _plain(x_NC: Tensor, weight_NK: Tensor, a_EQC: Tensor, b_EOQ: Tensor, plan: DispatchPlan) -> Tensor:
    """The same by operators that autograd differentiates, as often as is asked."""
    ends = plan.offset_E.tolist()
    weight_R1 = _of_rows(weight_NK, plan, ends[-1]).to(x_NC.dtype)
    y_NO = x_NC.new_zeros(plan.num_items, b_EOQ.shape[1])
    for expert, start, end in _active(ends):
        item = plan.item_R[start:end]
        z = x_NC[item] @ a_EQC[expert].t()
        y_NO = y_NO.index_add(0, item, (z * weight_R1[start:end]) @ b_EOQ[expert].t())
    return y_NO


def _of_rows(weight_NK: Tensor, plan: DispatchPlan, num_rows: int) -> Tensor:
    """weight_R1 of the used choices, in the order of the plan."""
    return weight_NK.reshape(-1)[plan.choice_R[:num_rows]].unsqueeze(-1)


def _active(ends: list[int]) -> list[tuple[int, int, int]]:
    """(adapter, first row, end row) of the adapters that have rows."""
    return [(e, start, end) for e, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)) if end > start]
