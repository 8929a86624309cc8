"""`segmented`: the product of routed rows with the low-rank adapters that they use, adapter by adapter, on a CPU.

    z_r = A_e x_n,    y_n += w_r B_e z_r          for each row r = (n, k) of adapter e

The grouped product of experts (`anabranch.nn.grouped`) makes a row of outputs for each choice, and then sums those of an item. An adapter's
outputs are wide and what is between is narrow, so here each row is added to its item's output at once: nothing as large as the outputs of
all choices is ever written, and choices that name nobody cost nothing. The forward pass is one call of a compiled kernel where there is
one (`anabranch.nn.kernels.low_rank`), in bfloat16 too where nothing learns.
"""
# Shapes: N items, E adapters, K choices per item, R = rows of used choices, C inputs, O outputs, Q greatest rank

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from anabranch.nn.derivatives import asks_for_plain, plain_gradients
from anabranch.nn.kernels.low_rank import can_add, low_rank
from anabranch.nn.kernels.operands import is_transformed, takes
from anabranch.precision import autocast_dtype
from anabranch.routing.dispatch import DispatchPlan

__all__ = ["add_adapter", "add_segmented", "can_add_segmented", "can_segment", "segmented"]


def can_segment(x_NC: Tensor, weight_NK: Tensor, a_EQC: Tensor, b_EOQ: Tensor) -> bool:
    """Whether it computes these: on a CPU, eagerly, in one type of at least 32 bits, or in bfloat16 by the kernel and without gradients."""
    if torch.compiler.is_compiling() or is_transformed() or autocast_dtype("cpu") is not None or x_NC.dim() != 2:
        return False
    values = x_NC, weight_NK, a_EQC, b_EOQ
    if any(value.device.type != "cpu" for value in values) or not x_NC.dtype == a_EQC.dtype == b_EOQ.dtype:
        return False
    if x_NC.dtype in (torch.float32, torch.float64):
        return True
    learns = torch.is_grad_enabled() and any(value.requires_grad for value in values)
    return not learns and can_add(x_NC, a_EQC, b_EOQ)


def segmented(
    x_NC: Tensor,
    plan: DispatchPlan,
    weight_NK: Tensor,
    a_EQC: Tensor,
    b_EOQ: Tensor,
    ranks: Sequence[int] | None = None,
) -> Tensor:
    """y_NO = sum_k weight_nk B_e A_e x_n, differentiable in all but the plan; adapters without rows get gradients that are exactly zero.

    ``ranks`` are of each adapter where A and B are zero beyond, which need not be looked at then.
    """
    return _Segmented.apply(x_NC, weight_NK, a_EQC, b_EOQ, plan, ranks)


def can_add_segmented(y_NO: Tensor, x_NC: Tensor, weight_NK: Tensor, a_EQC: Tensor, b_EOQ: Tensor) -> bool:
    """Whether `add_segmented` takes these: as `can_segment`, by the kernel and without gradients."""
    if torch.is_grad_enabled() or not can_segment(x_NC, weight_NK, a_EQC, b_EOQ) or not can_add(x_NC, a_EQC, b_EOQ):
        return False
    return takes(y_NO) and y_NO.dtype in (torch.float32, x_NC.dtype)


def add_segmented(
    y_NO: Tensor,
    x_NC: Tensor,
    plan: DispatchPlan,
    weight_NK: Tensor,
    a_EQC: Tensor,
    b_EOQ: Tensor,
    ranks: Sequence[int] | None = None,
) -> None:
    """Add what `segmented` makes to ``y_NO`` in place, whose rows may be parts of wider ones; in float32 it is written nowhere else."""
    into_NO = y_NO if y_NO.dtype == torch.float32 else None
    made_NO, _ = _sums(x_NC, weight_NK, a_EQC, b_EOQ, plan, ranks, keep=False, into=into_NO)
    if into_NO is None:
        # Rounded once, with what is there already.
        y_NO.add_(made_NO)


def add_adapter(
    y_NO: Tensor,
    x_NC: Tensor,
    plan: DispatchPlan,
    weight_NK: Tensor,
    adapter: int,
    a_QC: Tensor,
    b_OQ: Tensor,
    rank: int,
) -> None:
    """Add what one adapter of the plan makes to ``y_NO``, in place and without a gradient.

    Of all its adapters one after another, by their numbers, into zeros it is `segmented`: to the bit, wherever they lie, where the kernel
    computes (`can_add`), and elsewhere up to rounding. ``y_NO`` is in float32 where the kernel computes, else in the type of ``x_NC``.
    """
    start = int(plan.offset_E[adapter - 1]) if adapter else 0
    choice_R = plan.choice_R[start : int(plan.offset_E[adapter])]
    item_R = choice_R if plan.num_choices == 1 else choice_R // plan.num_choices
    weight_R = weight_NK.reshape(-1)[choice_R]
    a_1QC, b_1OQ = a_QC.unsqueeze(0), b_OQ.unsqueeze(0)
    if can_add(x_NC, a_1QC, b_1OQ):
        low_rank(x_NC, a_1QC, b_1OQ, torch.tensor([len(choice_R)]), item_R, weight_R, ranks=(rank,), into=y_NO)
        return
    z_RQ = torch.mm(x_NC.index_select(0, item_R), a_QC.t()) * weight_R.unsqueeze(1).to(x_NC.dtype)
    y_NO.index_add_(0, item_R, torch.mm(z_RQ, b_OQ.t()))


class _Segmented(torch.autograd.Function):
    """Keeps its inputs, and of each row what is between the two matrices."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NC: Tensor,
        weight_NK: Tensor,
        a_EQC: Tensor,
        b_EOQ: Tensor,
        plan: DispatchPlan,
        ranks: Sequence[int] | None,
    ) -> Tensor:
        run = _compiled if can_add(x_NC, a_EQC, b_EOQ) else _by_adapter
        y_NO, z_RQ = run(x_NC, weight_NK, a_EQC, b_EOQ, plan, ranks, keep=any(ctx.needs_input_grad))
        ctx.save_for_backward(x_NC, weight_NK, a_EQC, b_EOQ, z_RQ)
        ctx.plan = plan
        return y_NO

    @staticmethod
    def backward(ctx: Any, dy_NO: Tensor) -> tuple[Tensor | None, ...]:
        x_NC, weight_NK, a_EQC, b_EOQ, z_RQ = ctx.saved_tensors
        plan, ends = ctx.plan, ctx.plan.offset_E.tolist()
        needs_x, needs_weight, needs_a, needs_b, *_ = ctx.needs_input_grad
        if asks_for_plain(dy_NO):

            def plain(x_NC: Tensor, weight_NK: Tensor, a_EQC: Tensor, b_EOQ: Tensor) -> Tensor:
                return _plain(x_NC, weight_NK, a_EQC, b_EOQ, plan)

            return *plain_gradients(plain, (x_NC, weight_NK, a_EQC, b_EOQ), dy_NO, ctx.needs_input_grad[:4]), None, None
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
        return dx_NC, dweight_NK, da_EQC, db_EOQ, None, None


def _compiled(
    x_NC: Tensor,
    weight_NK: Tensor,
    a_EQC: Tensor,
    b_EOQ: Tensor,
    plan: DispatchPlan,
    ranks: Sequence[int] | None,
    *,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """(y_NO, z_RQ) by the kernel; z is None unless it is kept."""
    y_NO, z_RQ = _sums(x_NC, weight_NK, a_EQC, b_EOQ, plan, ranks, keep=keep)
    return y_NO.to(x_NC.dtype), z_RQ


def _sums(
    x_NC: Tensor,
    weight_NK: Tensor,
    a_EQC: Tensor,
    b_EOQ: Tensor,
    plan: DispatchPlan,
    ranks: Sequence[int] | None,
    *,
    keep: bool,
    into: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """`_compiled`, in float32, and added to ``into`` where it is given."""
    choice_R = plan.choice_R[: int(plan.offset_E[-1])]
    item_R = choice_R if plan.num_choices == 1 else choice_R // plan.num_choices
    weight_R = weight_NK.reshape(-1)[choice_R]
    return low_rank(x_NC, a_EQC, b_EOQ, plan.offset_E, item_R, weight_R, ranks=ranks, keep=keep, into=into)


def _by_adapter(
    x_NC: Tensor,
    weight_NK: Tensor,
    a_EQC: Tensor,
    b_EOQ: Tensor,
    plan: DispatchPlan,
    ranks: Sequence[int] | None,
    *,
    keep: bool,
) -> tuple[Tensor, Tensor | None]:
    """The same in torch, adapter by adapter; also the reference of the kernel."""
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
    return y_NO, z_RQ


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
