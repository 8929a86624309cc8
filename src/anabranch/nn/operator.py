"""The expert operator: opaque to autograd and torch.compile, with its own backward pass, in compiled kernels or a loop.

`anabranch.nn.grouped.expert_mlp` is its public face.
"""
# Shapes: N items, E experts, K places per item, R = N K rows (used ones first), D width, F hidden (2F: gate, then up; F without a gate)

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.bounds import shown
from anabranch.errors import BackendError, InputError
from anabranch.nn.activation import ACTIVATIONS
from anabranch.nn.derivatives import asks_for_graph, asks_for_plain, plain_gradients
from anabranch.nn.kernels import expert_mlp as native
from anabranch.nn.kernels.operands import is_transformed, why_refused
from anabranch.nn.sums import GradientSums
from anabranch.precision import full_precision
from anabranch.routing.dispatch import DispatchPlan, combine, dispatch

__all__ = ["expert_operator", "plain_experts"]


def expert_operator(
    x_ND: Tensor,
    place_R: Tensor,
    offset_E: Tensor,
    weight_NK: Tensor,
    w13_EFD: Tensor,
    w2_EDF: Tensor,
    *,
    on_input: bool,
    dtype: torch.dtype,
    backend: str,
    learns: bool,
    recompute: bool,
    sums: GradientSums | None = None,
    activation: str = "swiglu",
) -> Tensor:
    """y_ND in ``dtype``, by back end ``native``, ``torch`` or the better of them (``auto``); arguments as in `expert_mlp`."""
    if not torch.compiler.is_compiling() and is_transformed():
        if backend == "native":
            raise BackendError(f"{why_refused(x=x_ND)}; use backend 'auto'")
        plan = DispatchPlan(place_R, offset_E, *weight_NK.shape)
        return plain_experts(x_ND.to(dtype), plan, weight_NK, w13_EFD.to(dtype), w2_EDF.to(dtype), on_input, activation)
    arguments = (x_ND, place_R, offset_E, weight_NK, w13_EFD, w2_EDF, on_input, dtype, backend)
    if not learns and type(x_ND) is Tensor and not x_ND.is_meta and not torch.compiler.is_compiling():
        return _forward(*arguments, False, activation)[0]  # what the operator does, without the cost of dispatching it
    if sums is not None and learns:
        return _Gathering.apply(sums, *arguments, not recompute, activation)
    return _expert_mlp(*arguments, learns and not recompute, activation)[0]


def _resolve(
    backend: str,
    x_ND: Tensor,
    w13_EFD: Tensor,
    w2_EDF: Tensor,
    dtype: torch.dtype,
    place_R: Tensor,
    activation: str,
    **others: Tensor,
) -> str:
    """``native`` or ``torch``. Called inside the operator, so that a compiled graph does not freeze the choice."""
    num_rows = place_R.shape[0]
    if activation != "swiglu":
        if backend == "native":
            raise BackendError(f"the compiled kernels compute swiglu, not {activation}; use backend 'auto'")
        return "torch"
    if backend == "torch" or num_rows == 0:
        return "torch"
    obstacle = native.why_not(x_ND, w13_EFD, w2_EDF, dtype, place=place_R, **others)
    if backend == "native" and obstacle:
        raise BackendError(f"{obstacle}; use backend 'auto'")
    return "torch" if obstacle else "native"


def plain_experts(
    x_ND: Tensor,
    plan: DispatchPlan,
    weight_NK: Tensor,
    w13_EFD: Tensor,
    w2_EDF: Tensor,
    on_input: bool,
    activation: str = "swiglu",
) -> Tensor:
    """The naive loop under autograd: what the operator computes, and the graph of its gradients where one is asked for."""
    apply = ACTIVATIONS[activation].apply
    weight_R1 = weight_NK.reshape(-1)[plan.place_R].unsqueeze(-1)
    rows_RD = dispatch(x_ND, plan)
    if on_input:
        rows_RD = rows_RD * weight_R1.to(rows_RD.dtype)
    ends = [0, *_ends(plan.offset_E, rows_RD.shape[0]), rows_RD.shape[0]]
    parts = [
        F.linear(apply(F.linear(rows_RD[start:end], w13_e)), w2_e)
        for start, end, w13_e, w2_e in zip(ends[:-2], ends[1:-1], w13_EFD.unbind(0), w2_EDF.unbind(0), strict=True)
    ]
    parts.append(rows_RD.new_zeros(ends[-1] - ends[-2], x_ND.shape[1]))
    return combine(torch.cat(parts), plan, None if on_input else weight_NK)


def _forward(
    x_ND: Tensor,
    place_R: Tensor,
    offset_E: Tensor,
    weight_NK: Tensor,
    w13_EFD: Tensor,
    w2_EDF: Tensor,
    on_input: bool,
    dtype: torch.dtype,
    backend: str,
    keep: bool,
    activation: str = "swiglu",
) -> tuple[Tensor, Tensor]:
    """y_ND and, with ``keep``, z_R2F for the backward pass; both in ``dtype``, the dtype to compute in."""
    others = {"offset": offset_E, "weight": weight_NK}
    if _resolve(backend, x_ND, w13_EFD, w2_EDF, dtype, place_R, activation, **others) == "native":
        return native.forward(x_ND, place_R, offset_E, weight_NK, w13_EFD, w2_EDF, on_input, dtype, keep)
    num_items, num_places = weight_NK.shape
    ends = _ends(offset_E, len(place_R))
    place_R = place_R[: ends[-1]]
    rows_RD = _gather_rows(x_ND.to(dtype), place_R, weight_NK if on_input else None, num_places)
    z_R2F = rows_RD.new_empty((num_items * num_places if keep else ends[-1], w13_EFD.shape[1]))
    y_RD, apply = torch.empty_like(rows_RD), ACTIVATIONS[activation].apply
    for expert, start, end in _active(ends):
        torch.mm(rows_RD[start:end], w13_EFD[expert].to(dtype).t(), out=z_R2F[start:end])
        torch.mm(apply(z_R2F[start:end]), w2_EDF[expert].to(dtype).t(), out=y_RD[start:end])
    y_ND = _join(y_RD, place_R, None if on_input else weight_NK, num_items, num_places)
    return y_ND, z_R2F if keep else z_R2F.new_empty(0)


_expert_mlp = torch.library.custom_op("anabranch::expert_mlp", _forward, mutates_args=())


@_expert_mlp.register_fake
def _(x_ND, place_R, offset_E, weight_NK, w13_EFD, w2_EDF, on_input, dtype, backend, keep, activation="swiglu"):
    z_shape = (place_R.shape[0], w13_EFD.shape[1]) if keep else (0,)
    return torch.empty_like(x_ND, dtype=dtype).contiguous(), x_ND.new_empty(z_shape, dtype=dtype)


def _gradients(
    dy_ND: Tensor,
    x_ND: Tensor,
    place_R: Tensor,
    offset_E: Tensor,
    weight_NK: Tensor,
    w13_EFD: Tensor,
    w2_EDF: Tensor,
    z_R2F: Tensor,
    on_input: bool,
    dtype: torch.dtype,
    backend: str,
    need_x: bool,
    need_w13: bool,
    need_w2: bool,
    activation: str = "swiglu",
    sums: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, w13, w2; empty where not needed. With ``sums``, those of w13 and w2 are added to them."""
    others = {"offset": offset_E, "weight": weight_NK, "dy": dy_ND}
    if _resolve(backend, x_ND, w13_EFD, w2_EDF, dtype, place_R, activation, **others) == "native":
        saved = (x_ND, place_R, offset_E, weight_NK, w13_EFD, w2_EDF, z_R2F)
        return native.backward(dy_ND, *saved, on_input, dtype, need_x, need_w13, need_w2, sums=sums)
    num_items, num_places = weight_NK.shape
    ends = _ends(offset_E, len(place_R))
    place_R = place_R[: ends[-1]]
    weight_R1 = weight_NK.reshape(-1)[place_R].unsqueeze(-1)
    wide = torch.promote_types(dtype, torch.float32)
    plain_RD = x_ND.to(dtype)[place_R // num_places]
    rows_RD = plain_RD * weight_R1.to(dtype) if on_input else plain_RD
    dy_RD = dy_ND.to(dtype)[place_R // num_places]
    drows_RD = torch.empty_like(rows_RD)
    dweight_R = torch.zeros(len(place_R), dtype=wide, device=x_ND.device)
    if sums is None:
        dw13_EFD = _empty_gradient(w13_EFD, ends) if need_w13 else w13_EFD.new_empty(0)
        dw2_EDF = _empty_gradient(w2_EDF, ends) if need_w2 else w2_EDF.new_empty(0)
    else:
        dw13_EFD, dw2_EDF = sums
    put = Tensor.copy_ if sums is None else Tensor.add_
    linearize = ACTIVATIONS[activation].linearize
    for expert, start, end in _active(ends):
        w13, w2 = w13_EFD[expert].to(dtype), w2_EDF[expert].to(dtype)
        z = z_R2F[start:end] if z_R2F.numel() else torch.mm(rows_RD[start:end], w13.t())
        act, pull = linearize(z.to(wide))
        dact = torch.mm(dy_RD[start:end], w2).to(wide)
        if not on_input:  # y_r = w_r w2 act, so dw_r = dy . (w2 act) = (w2^T dy) . act: no need to have kept w2 act
            dweight_R[start:end] = (dact * act).sum(-1)
            dact, act = dact * weight_R1[start:end].to(wide), act * weight_R1[start:end].to(wide)
        dz = pull(dact).to(dtype)
        if need_w2:
            put(dw2_EDF[expert], torch.mm(dy_RD[start:end].t(), act.to(dtype)))
        if need_w13:
            put(dw13_EFD[expert], torch.mm(dz.t(), rows_RD[start:end]))
        torch.mm(dz, w13, out=drows_RD[start:end])
    if on_input:
        dweight_R = (drows_RD.to(wide) * plain_RD).sum(-1)
    dweight_NK = weight_NK.new_zeros(num_items * num_places).index_copy_(0, place_R, dweight_R.to(weight_NK.dtype))
    dx_ND = x_ND.new_empty(0)
    if need_x:
        dx_ND = _join(drows_RD, place_R, weight_NK if on_input else None, num_items, num_places).to(x_ND.dtype)
    return dx_ND, dweight_NK.view_as(weight_NK), dw13_EFD, dw2_EDF


@torch.library.custom_op("anabranch::expert_mlp_backward", mutates_args=())
def _expert_mlp_backward(
    dy_ND: Tensor,
    x_ND: Tensor,
    place_R: Tensor,
    offset_E: Tensor,
    weight_NK: Tensor,
    w13_EFD: Tensor,
    w2_EDF: Tensor,
    z_R2F: Tensor,
    on_input: bool,
    dtype: torch.dtype,
    backend: str,
    need_x: bool,
    need_w13: bool,
    need_w2: bool,
    activation: str = "swiglu",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    saved = (x_ND, place_R, offset_E, weight_NK, w13_EFD, w2_EDF, z_R2F)
    return _gradients(dy_ND, *saved, on_input, dtype, backend, need_x, need_w13, need_w2, activation)


@_expert_mlp_backward.register_fake
def _(dy, x_ND, place_R, offset_E, weight_NK, w13_EFD, w2_EDF, z, on_input, dtype, backend, *needed_and_activation):
    need_x, need_w13, need_w2, *_ = needed_and_activation
    needed = zip((x_ND, w13_EFD, w2_EDF), (need_x, need_w13, need_w2), strict=True)
    dx, dw13, dw2 = (like.new_empty(like.shape if need else (0,)) for like, need in needed)
    return dx, weight_NK.new_empty(weight_NK.shape), dw13, dw2


def _setup_context(ctx, inputs, output):
    x_ND, place_R, offset_E, weight_NK, w13_EFD, w2_EDF, on_input, dtype, backend, _, activation = inputs
    ctx.save_for_backward(x_ND, place_R, offset_E, weight_NK, w13_EFD, w2_EDF, output[1])
    ctx.options, ctx.activation = (on_input, dtype, backend), activation
    ctx.set_materialize_grads(False)  # z is not differentiated; do not make a gradient of its size


def _backward(ctx, dy_ND, _):
    if asks_for_graph(dy_ND):
        return *_plain_backward(ctx.saved_tensors, ctx.options, ctx.activation, ctx.needs_input_grad, dy_ND), None
    need_x, _, _, need_weight, need_w13, need_w2, *_ = ctx.needs_input_grad
    options = (*ctx.options, need_x, need_w13, need_w2, ctx.activation)
    gradients = _expert_mlp_backward(dy_ND, *ctx.saved_tensors, *options)
    dx, dweight, dw13, dw2 = (
        gradient if need else None
        for gradient, need in zip(gradients, (need_x, need_weight, need_w13, need_w2), strict=True)
    )
    return dx, None, None, dweight, dw13, dw2, None, None, None, None, None


def _plain_backward(saved, options, activation, needed, dy_ND):
    """What `_backward` gives, differentiable."""
    x_ND, place_R, offset_E, weight_NK, w13_EFD, w2_EDF, _ = saved
    on_input, dtype, _ = options
    plan = DispatchPlan(place_R, offset_E, *weight_NK.shape)

    def plain(x_ND, weight_NK, w13_EFD, w2_EDF):
        return plain_experts(x_ND.to(dtype), plan, weight_NK, w13_EFD.to(dtype), w2_EDF.to(dtype), on_input, activation)

    need_x, _, _, *others = needed[:6]
    with full_precision(x_ND.device.type):
        dx, *rest = plain_gradients(plain, (x_ND, weight_NK, w13_EFD, w2_EDF), dy_ND, (need_x, *others))
    return dx, None, None, *rest, None, None, None, None


_expert_mlp.register_autograd(_backward, setup_context=_setup_context)


class _Gathering(torch.autograd.Function):
    """`_expert_mlp` of weights from `gather_gradients`, whose gradients do not travel through autograd but gather in ``sums``."""

    @staticmethod
    def forward(ctx, sums, *arguments_and_keep):
        y_ND, z_R2F = _forward(*arguments_and_keep)
        *saved, on_input, dtype, backend, _, activation = arguments_and_keep
        ctx.save_for_backward(*saved, z_R2F)
        ctx.sums, ctx.options, ctx.activation = sums, (on_input, dtype, backend), activation
        return y_ND

    @staticmethod
    def backward(ctx, dy_ND):
        _, *needed = ctx.needs_input_grad
        if asks_for_plain(dy_ND):
            return None, *_plain_backward(ctx.saved_tensors, ctx.options, ctx.activation, needed, dy_ND), None
        need_x, _, _, need_weight, *_ = needed
        sums = ctx.sums.of_pass()
        pair = None if sums is None else sums.pair
        options = (*ctx.options, need_x, True, True, ctx.activation, pair)
        dx, dweight, *pair = _gradients(*(dy_ND, *ctx.saved_tensors, *options))
        if sums is not None:
            sums.pair, pair = tuple(pair), (None, None)
        return None, dx if need_x else None, None, None, dweight if need_weight else None, *pair, *(None,) * 5


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


def _gather_rows(x_ND: Tensor, place_R: Tensor, weight_NK: Tensor | None, num_places: int) -> Tensor:
    rows_RD = x_ND[place_R // num_places]
    return rows_RD if weight_NK is None else rows_RD * weight_NK.reshape(-1)[place_R].unsqueeze(-1).to(rows_RD.dtype)


def _join(rows_RD: Tensor, place_R: Tensor, weight_NK: Tensor | None, num_items: int, num_places: int) -> Tensor:
    """Each item's rows, weighted, summed in fp32 in place order."""
    rows_PD = rows_RD.new_zeros(num_items * num_places, rows_RD.shape[1]).index_copy_(0, place_R, rows_RD)
    rows_NKD = rows_PD.view(num_items, num_places, rows_RD.shape[1])
    total_ND = rows_NKD.new_zeros(num_items, rows_RD.shape[1], dtype=torch.promote_types(rows_RD.dtype, torch.float32))
    for place in range(num_places):
        rows_ND = rows_NKD[:, place].to(total_ND.dtype)
        if weight_NK is None:
            total_ND += rows_ND
        else:
            total_ND.addcmul_(rows_ND, weight_NK[:, place : place + 1].to(total_ND.dtype))
    return total_ND.to(rows_RD.dtype)


def _empty_gradient(weight: Tensor, ends: list[int]) -> Tensor:
    """A buffer whose idle experts are zero and whose active ones are still to be written."""
    gradient = torch.empty_like(weight, memory_format=torch.contiguous_format)
    for expert, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        if start == end:
            gradient[expert].zero_()
    return gradient
