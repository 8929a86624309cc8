"""The ``torch`` back end of `anabranch.nn.grouped`: a loop over the experts that have rows, with a backward pass by hand or by autograd."""
# Shapes: N items, E experts, K choices per item, R = N K rows (used ones first), D width, F hidden (2F: gate, then up; F without a gate)

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.bounds import shown
from anabranch.errors import InputError
from anabranch.nn.activation import ACTIVATIONS
from anabranch.nn.expert_call import ExpertCall, Gradients, Needed
from anabranch.routing.decision import Routing
from anabranch.routing.dispatch import combine, dispatch, plan_dispatch, weigh

__all__ = ["backward", "biased_experts", "experts_in_turn", "forward", "plain_experts"]


def plain_experts(call: ExpertCall) -> Tensor:
    """y_ND by the naive loop under autograd, in the dtypes of the operands: the twin of every back end, at any order of derivative."""
    plan, apply = call.plan, ACTIVATIONS[call.activation].apply
    rows_RD = dispatch(call.x_ND, plan, call.weight_NK if call.on_input else None)
    ends = [0, *_ends(plan.offset_E, rows_RD.shape[0]), rows_RD.shape[0]]
    matrices = zip(ends[:-2], ends[1:-1], call.w13_EFD.unbind(0), call.w2_EDF.unbind(0), strict=True)
    parts = [F.linear(apply(F.linear(rows_RD[start:end], w13)), w2) for start, end, w13, w2 in matrices]
    parts.append(rows_RD.new_zeros(ends[-1] - ends[-2], call.out_dim))
    return combine(torch.cat(parts), plan, None if call.on_input else call.weight_NK)


def experts_in_turn(
    first: Callable[[int, Tensor], Tensor],
    second: Callable[[int, Tensor], Tensor],
    rows_RD: Tensor,
    offset_E: Sequence[int],
    *,
    activation: str,
) -> Tensor:
    """y_RD in the dtype of the rows: expert e on those that end at ``offset_E[e]``, zeros behind the last.

    ``first`` and ``second`` give the product with the first and the second matrix of an expert, by its number and the rows.
    """
    y_RD, apply = torch.zeros_like(rows_RD), ACTIVATIONS[activation].apply
    start = 0
    for expert, end in enumerate(offset_E):
        if end > start:
            y_RD[start:end] = second(expert, apply(first(expert, rows_RD[start:end])))
        start = end
    return y_RD


def biased_experts(
    x_ND: Tensor,
    routing: Routing,
    w13_EZD: Tensor,
    b13_EZ: Tensor,
    w2_EDF: Tensor,
    b2_ED: Tensor,
    *,
    activation: str,
    on_input: bool = False,
) -> Tensor:
    """y_ND of experts with biases, ``w2_e act(w13_e x + b13_e) + b2_e``, under autograd, in the dtypes of the operands."""
    plan, apply = plan_dispatch(routing), ACTIVATIONS[activation].apply
    rows_RD = dispatch(x_ND, plan)
    if on_input:
        rows_RD = rows_RD * routing.weight_NK.reshape(-1)[plan.choice_R].unsqueeze(-1).to(rows_RD.dtype)
    ends = [*_ends(plan.offset_E, len(rows_RD)), len(rows_RD)]
    # Taken apart at once: indexed one by one, each would get a gradient of the size of all.
    stacks = zip(*(stack.unbind(0) for stack in (w13_EZD, b13_EZ, w2_EDF, b2_ED)), strict=True)
    made, start = [], 0
    for end, (w13, b13, w2, b2) in zip(ends[:-1], stacks, strict=True):
        made.append(F.linear(apply(F.linear(rows_RD[start:end], w13, b13)), w2, b2))
        start = end
    made.append(rows_RD.new_zeros(ends[-1] - start, x_ND.shape[1]))
    return combine(torch.cat(made), plan, None if on_input else routing.weight_NK)


def forward(call: ExpertCall, keep: bool) -> tuple[Tensor, Tensor]:
    """y_ND and, with ``keep``, z_R2F for `backward`; both in the dtype of the call."""
    num_items, num_choices = call.weight_NK.shape
    ends = _ends(call.offset_E, len(call.choice_R))
    choice_R, dtype = call.choice_R[: ends[-1]], call.dtype
    rows_RD = _gather_rows(call.x_ND.to(dtype), choice_R, call.weight_NK if call.on_input else None, num_choices)
    z_R2F = rows_RD.new_empty((num_items * num_choices if keep else ends[-1], call.w13_EFD.shape[1]))
    y_RD, apply = rows_RD.new_empty(len(rows_RD), call.out_dim), ACTIVATIONS[call.activation].apply
    for expert, start, end in _active(ends):
        torch.mm(rows_RD[start:end], call.w13_EFD[expert].to(dtype).t(), out=z_R2F[start:end])
        torch.mm(apply(z_R2F[start:end]), call.w2_EDF[expert].to(dtype).t(), out=y_RD[start:end])
    y_ND = _join(y_RD, choice_R, None if call.on_input else call.weight_NK, num_items, num_choices)
    return y_ND, z_R2F if keep else z_R2F.new_empty(0)


def backward(
    call: ExpertCall, z_R2F: Tensor, dy_ND: Tensor, needed: Needed, sums: tuple[Tensor, Tensor] | None = None
) -> Gradients:
    """Gradients of the call. ``z_R2F`` is what `forward` kept, or empty; with ``sums``, those of w13 and w2 are added to them."""
    weight_NK, dtype = call.weight_NK, call.dtype
    num_items, num_choices = weight_NK.shape
    ends = _ends(call.offset_E, len(call.choice_R))
    choice_R = call.choice_R[: ends[-1]]
    weight_R1 = weight_NK.reshape(-1)[choice_R].unsqueeze(-1)
    wide = torch.promote_types(dtype, torch.float32)
    plain_RD = call.x_ND.to(dtype)[choice_R // num_choices]
    rows_RD = weigh(plain_RD, weight_NK, choice_R) if call.on_input else plain_RD
    dy_RD = dy_ND.to(dtype)[choice_R // num_choices]
    drows_RD = torch.empty_like(rows_RD)
    dweight_R = torch.zeros(len(choice_R), dtype=wide, device=call.x_ND.device)
    dw13_EFD, dw2_EDF = sums or _empty_gradients(call, needed, ends)
    put = Tensor.copy_ if sums is None else Tensor.add_
    linearize = ACTIVATIONS[call.activation].linearize
    for expert, start, end in _active(ends):
        w13, w2 = call.w13_EFD[expert].to(dtype), call.w2_EDF[expert].to(dtype)
        z = z_R2F[start:end] if z_R2F.numel() else torch.mm(rows_RD[start:end], w13.t())
        act, pull = linearize(z.to(wide))
        dact = torch.mm(dy_RD[start:end], w2).to(wide)
        # y_r = w_r w2 act, so dw_r = dy . (w2 act) = (w2^T dy) . act: no need to have kept w2 act.
        if not call.on_input:
            dweight_R[start:end] = (dact * act).sum(-1)
            dact, act = dact * weight_R1[start:end].to(wide), act * weight_R1[start:end].to(wide)
        dz = pull(dact).to(dtype)
        if needed.w2:
            put(dw2_EDF[expert], torch.mm(dy_RD[start:end].t(), act.to(dtype)))
        if needed.w13:
            put(dw13_EFD[expert], torch.mm(dz.t(), rows_RD[start:end]))
        torch.mm(dz, w13, out=drows_RD[start:end])
    if call.on_input:
        dweight_R = (drows_RD.to(wide) * plain_RD).sum(-1)
    dweight_NK = weight_NK.new_zeros(num_items * num_choices).index_copy_(0, choice_R, dweight_R.to(weight_NK.dtype))
    dx_ND = call.x_ND.new_empty(0)
    if needed.x:
        dx_ND = _join(drows_RD, choice_R, weight_NK if call.on_input else None, num_items, num_choices)
        dx_ND = dx_ND.to(call.x_ND.dtype)
    return Gradients(dx_ND, dweight_NK.view_as(weight_NK), dw13_EFD, dw2_EDF)


def _ends(offset_E: Tensor, num_rows: int) -> list[int]:
    """The end row of each expert. Raises InputError, as kernels do, unless they rise from 0 to ``num_rows`` at most."""
    ends: list[int] = offset_E.tolist()
    if any(start > end for start, end in itertools.pairwise([0, *ends, num_rows])):
        raise InputError(
            f"offset_E is {shown(ends)}; it must not fall, and lie between 0 and {num_rows}, the rows of the plan"
        )
    return ends


def _active(ends: list[int]) -> list[tuple[int, int, int]]:
    """(expert, first row, end row) of the experts that have rows."""
    return [(e, start, end) for e, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)) if end > start]


def _gather_rows(x_ND: Tensor, choice_R: Tensor, weight_NK: Tensor | None, num_choices: int) -> Tensor:
    rows_RD = x_ND[choice_R // num_choices]
    return rows_RD if weight_NK is None else weigh(rows_RD, weight_NK, choice_R)


def _join(rows_RD: Tensor, choice_R: Tensor, weight_NK: Tensor | None, num_items: int, num_choices: int) -> Tensor:
    """Each item's rows, weighted, summed in fp32 in the order of its choices."""
    rows_PD = rows_RD.new_zeros(num_items * num_choices, rows_RD.shape[1]).index_copy_(0, choice_R, rows_RD)
    rows_NKD = rows_PD.view(num_items, num_choices, rows_RD.shape[1])
    total_ND = rows_NKD.new_zeros(num_items, rows_RD.shape[1], dtype=torch.promote_types(rows_RD.dtype, torch.float32))
    for choice in range(num_choices):
        rows_ND = rows_NKD[:, choice].to(total_ND.dtype)
        if weight_NK is None:
            total_ND += rows_ND
        else:
            total_ND.addcmul_(rows_ND, weight_NK[:, choice : choice + 1].to(total_ND.dtype))
    return total_ND.to(rows_RD.dtype)


def _empty_gradients(call: ExpertCall, needed: Needed, ends: list[int]) -> tuple[Tensor, Tensor]:
    """Buffers of the gradients of w13 and w2: idle experts are zero, active ones still to be written; empty where not needed."""
    dw13_EFD = _empty_gradient(call.w13_EFD, ends) if needed.w13 else call.w13_EFD.new_empty(0)
    return dw13_EFD, _empty_gradient(call.w2_EDF, ends) if needed.w2 else call.w2_EDF.new_empty(0)


def _empty_gradient(weight: Tensor, ends: list[int]) -> Tensor:
    gradient = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for expert, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        if start == end:
            gradient[expert].zero_()
    return gradient
