"""`expert_mlp`: a SwiGLU expert on each routed row, the one fast path that every pool of stacked experts stands on.

    y_n = sum_k weight_nk  w2_e (silu(gate_e x_n) * up_e x_n)        with e = the destination of place (n, k)

Back ends, all equal to `reference_expert_mlp` (the naive loop) in values and gradients:

    native       compiled kernels for the CPU (see `kernels/expert_mlp.cpp`), float32 and bfloat16
    torch        a loop over the experts that have rows; any dtype, any device
    grouped_mm   `torch.nn.functional.grouped_mm`: one launch for all experts; what a GPU wants
    bmm          rows padded to the fullest expert; for capacity-limited routing, where loads are even
    reference    the naive loop under autograd

The first two share an operator with its own backward. It keeps the pre-activations ``z`` for it, or only its inputs with
``recompute=True``; rows are gathered again and the activation is computed again either way, since both are cheaper than
their memory. Experts without rows are neither computed nor differentiated: their gradient is exactly zero.
"""
# Shapes: N items, E experts, K places per item, R = N K rows (used ones first), D width, F hidden (2F: gate, then up)

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from anabranch.errors import BackendError, ConfigError
from anabranch.nn.kernels import expert_mlp as native
from anabranch.routing.dispatch import DispatchPlan, combine, dispatch, pad_rows, unpad_rows

__all__ = ["BACKENDS", "expert_mlp", "reference_expert_mlp"]

BACKENDS = ("auto", "native", "torch", "grouped_mm", "bmm", "reference")


def expert_mlp(
    x_ND: Tensor,
    plan: DispatchPlan,
    weight_NK: Tensor,
    w13_EFD: Tensor,
    w2_EDF: Tensor,
    *,
    weight_on: Literal["output", "input"] = "output",
    backend: str = "auto",
    recompute: bool = False,
) -> Tensor:
    """Send each item through its experts and join the results; differentiable in x, weight, w13 and w2.

    Args:
        x_ND: the items.
        plan: where they go, from `plan_dispatch`. Rows of unused places are not computed.
        weight_NK: weight of each place; 0 where the place is unused.
        w13_EFD: [E, 2F, D], the gate projection's rows, then the up projection's.
        w2_EDF: [E, D, F], the down projection.
        weight_on: weigh each expert's ``output`` (the usual), or its ``input`` (Llama 4).
        backend: one of `BACKENDS`; ``auto`` chooses by device, dtype and shape.
        recompute: keep nothing but the inputs for the backward pass, which then repeats the first matmul.

    Returns:
        y_ND in the dtype of x, or in the autocast dtype inside autocast. Places are summed in fp32, in order, so the
        result does not depend on the number of threads.

    Raises:
        ConfigError: shapes that do not fit together, or an unknown backend.
        BackendError: ``native`` was asked for and cannot be had; the message says why.
    """
    _check(x_ND, plan, weight_NK, w13_EFD, w2_EDF, weight_on, backend)
    device = "cpu" if x_ND.is_meta else x_ND.device.type  # autocast knows no meta device
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_ND.dtype
    aligned = x_ND.shape[1] % 8 == 0 and w2_EDF.shape[2] % 8 == 0  # grouped_mm wants rows of whole 16 bytes
    if backend == "auto" and device == "cuda" and dtype in (torch.bfloat16, torch.float16) and aligned:
        backend = "grouped_mm"  # a GPU wants one launch for all experts
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (x_ND, weight_NK, w13_EFD, w2_EDF))
    on_input = weight_on == "input"
    with torch.autocast(device, enabled=False):
        if backend in ("auto", "native", "torch") or x_ND.shape[0] == 0:
            arguments = (x_ND, plan.place_R, plan.offset_E, weight_NK, w13_EFD, w2_EDF, on_input, dtype, backend)
            if not learns and type(x_ND) is Tensor and not x_ND.is_meta and not torch.compiler.is_compiling():
                return _forward(*arguments, False)[0]  # what the operator does, without the cost of dispatching it
            return _expert_mlp(*arguments, learns and not recompute)[0]
        plain = {"grouped_mm": _grouped_mm, "bmm": _bmm, "reference": _reference}[backend]
        inputs = (x_ND.to(dtype), plan, weight_NK, w13_EFD.to(dtype), w2_EDF.to(dtype), on_input)
        if recompute and learns:
            return checkpoint(plain, *inputs, use_reentrant=False)
        return plain(*inputs)


def reference_expert_mlp(
    x_ND: Tensor,
    plan: DispatchPlan,
    weight_NK: Tensor,
    w13_EFD: Tensor,
    w2_EDF: Tensor,
    *,
    weight_on: Literal["output", "input"] = "output",
) -> Tensor:
    """The naive loop under autograd, in any dtype: the twin that every back end is tested against."""
    return _reference(x_ND, plan, weight_NK, w13_EFD, w2_EDF, weight_on == "input")


def _check(
    x_ND: Tensor, plan: DispatchPlan, weight_NK: Tensor, w13_EFD: Tensor, w2_EDF: Tensor, weight_on: str, backend: str
) -> None:
    if backend not in BACKENDS:
        raise ConfigError(f"backend is {backend!r}; use one of {', '.join(BACKENDS)}")
    if weight_on not in ("output", "input"):
        raise ConfigError(f"weight_on is {weight_on!r}; use 'output' or 'input'")
    if x_ND.dim() != 2 or x_ND.shape[0] != plan.num_items:
        raise ConfigError(f"x has shape {list(x_ND.shape)}; this plan needs [{plan.num_items}, D]")
    if weight_NK.shape != (plan.num_items, plan.num_places):
        raise ConfigError(f"weight has shape {list(weight_NK.shape)}; it must be [{plan.num_items}, {plan.num_places}]")
    experts, width = plan.offset_E.shape[0], x_ND.shape[1]
    if w13_EFD.dim() != 3 or w13_EFD.shape[0] != experts or w13_EFD.shape[1] % 2 or w13_EFD.shape[2] != width:
        raise ConfigError(f"w13 has shape {list(w13_EFD.shape)}; it must be [{experts}, 2 F, {width}]")
    if w2_EDF.shape != (experts, width, w13_EFD.shape[1] // 2):
        raise ConfigError(f"w2 has shape {list(w2_EDF.shape)}; it must be {[experts, width, w13_EFD.shape[1] // 2]}")


def _resolve(backend: str, x_ND: Tensor, w13_EFD: Tensor, w2_EDF: Tensor, dtype: torch.dtype, num_rows: int) -> str:
    """``native`` or ``torch``. Called inside the operator, so that a compiled graph does not freeze the choice."""
    if backend == "torch" or num_rows == 0:
        return "torch"
    obstacle = native.why_not(x_ND, w13_EFD, w2_EDF, dtype)
    if backend == "native" and obstacle:
        raise BackendError(f"{obstacle}; use backend 'auto'")
    # Where matrix units (AMX) multiply bf16 tiles, the library's matmul beats our vector kernels on full blocks of rows.
    matrix_unit = dtype == torch.bfloat16 and num_rows >= 16 * w2_EDF.shape[0] and torch.cpu._is_amx_tile_supported()
    return "torch" if obstacle or (backend == "auto" and matrix_unit) else "native"


def _swiglu(z_R2F: Tensor) -> Tensor:
    gate_RF, up_RF = z_R2F.chunk(2, dim=-1)
    return F.silu(gate_RF) * up_RF


# Back ends that autograd differentiates.


def _reference(x: Tensor, plan: DispatchPlan, weight: Tensor, w13: Tensor, w2: Tensor, on_input: bool) -> Tensor:
    weight_R1 = weight.reshape(-1)[plan.place_R].unsqueeze(-1)
    rows_RD = dispatch(x, plan)
    if on_input:
        rows_RD = rows_RD * weight_R1.to(rows_RD.dtype)
    ends = [0, *plan.offset_E.tolist(), rows_RD.shape[0]]
    parts = [
        F.linear(_swiglu(F.linear(rows_RD[start:end], w13_e)), w2_e)
        for start, end, w13_e, w2_e in zip(ends[:-2], ends[1:-1], w13.unbind(0), w2.unbind(0), strict=True)
    ]
    parts.append(rows_RD.new_zeros(ends[-1] - ends[-2], x.shape[1]))
    return combine(torch.cat(parts), plan, None if on_input else weight)


def _grouped_mm(x: Tensor, plan: DispatchPlan, weight: Tensor, w13: Tensor, w2: Tensor, on_input: bool) -> Tensor:
    rows_RD = dispatch(x, plan)
    if on_input:
        rows_RD = rows_RD * weight.reshape(-1)[plan.place_R].unsqueeze(-1).to(x.dtype)
    used_R1 = plan.used_R.unsqueeze(-1)
    # grouped_mm leaves what stands behind the last offset uninitialised, forward and backward: masked on both sides.
    z_R2F = F.grouped_mm(rows_RD.masked_fill(~used_R1, 0.0), w13.transpose(1, 2), offs=plan.offset_E)
    a_RF = _swiglu(z_R2F.masked_fill(~used_R1, 0.0))
    y_RD = F.grouped_mm(a_RF, w2.transpose(1, 2), offs=plan.offset_E)
    return combine(y_RD, plan, None if on_input else weight)


def _bmm(x: Tensor, plan: DispatchPlan, weight: Tensor, w13: Tensor, w2: Tensor, on_input: bool) -> Tensor:
    rows_RD = dispatch(x, plan)
    if on_input:
        rows_RD = rows_RD * weight.reshape(-1)[plan.place_R].unsqueeze(-1).to(x.dtype)
    rows_ECD = pad_rows(rows_RD, plan, max(1, int(plan.load_E.max())))
    y_ECD = torch.bmm(_swiglu(torch.bmm(rows_ECD, w13.transpose(1, 2))), w2.transpose(1, 2))
    return combine(unpad_rows(y_ECD, plan), plan, None if on_input else weight)


# The operator: opaque to autograd and torch.compile, with its own backward.


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
) -> tuple[Tensor, Tensor]:
    """y_ND and, with ``keep``, z_R2F for the backward pass; both in ``dtype``, the dtype to compute in."""
    if _resolve(backend, x_ND, w13_EFD, w2_EDF, dtype, place_R.shape[0]) == "native":
        return native.forward(x_ND, place_R, offset_E, weight_NK, w13_EFD, w2_EDF, on_input, dtype, keep)
    num_items, num_places = weight_NK.shape
    ends = offset_E.tolist()
    place_R = place_R[: ends[-1]]
    rows_RD = _gather_rows(x_ND.to(dtype), place_R, weight_NK if on_input else None, num_places)
    z_R2F = rows_RD.new_empty((num_items * num_places if keep else ends[-1], w13_EFD.shape[1]))
    y_RD = torch.empty_like(rows_RD)
    for expert, start, end in _active(ends):
        torch.mm(rows_RD[start:end], w13_EFD[expert].to(dtype).t(), out=z_R2F[start:end])
        torch.mm(_swiglu(z_R2F[start:end]), w2_EDF[expert].to(dtype).t(), out=y_RD[start:end])
    y_ND = _join(y_RD, place_R, None if on_input else weight_NK, num_items, num_places)
    return y_ND, z_R2F if keep else z_R2F.new_empty(0)


_expert_mlp = torch.library.custom_op("anabranch::expert_mlp", _forward, mutates_args=())


@_expert_mlp.register_fake
def _(x_ND, place_R, offset_E, weight_NK, w13_EFD, w2_EDF, on_input, dtype, backend, keep):
    z_shape = (place_R.shape[0], w13_EFD.shape[1]) if keep else (0,)
    return torch.empty_like(x_ND, dtype=dtype).contiguous(), x_ND.new_empty(z_shape, dtype=dtype)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, w13, w2; empty where not needed."""
    if _resolve(backend, x_ND, w13_EFD, w2_EDF, dtype, place_R.shape[0]) == "native":
        saved = (x_ND, place_R, offset_E, weight_NK, w13_EFD, w2_EDF, z_R2F)
        return native.backward(dy_ND, *saved, on_input, dtype, need_x, need_w13, need_w2)
    num_items, num_places = weight_NK.shape
    ends = offset_E.tolist()
    place_R = place_R[: ends[-1]]
    weight_R1 = weight_NK.reshape(-1)[place_R].unsqueeze(-1)
    wide = torch.promote_types(dtype, torch.float32)
    plain_RD = x_ND.to(dtype)[place_R // num_places]
    rows_RD = plain_RD * weight_R1.to(dtype) if on_input else plain_RD
    dy_RD = dy_ND.to(dtype)[place_R // num_places]
    drows_RD = torch.empty_like(rows_RD)
    dweight_R = torch.zeros(len(place_R), dtype=wide, device=x_ND.device)
    dw13_EFD = _empty_gradient(w13_EFD, ends) if need_w13 else w13_EFD.new_empty(0)
    dw2_EDF = _empty_gradient(w2_EDF, ends) if need_w2 else w2_EDF.new_empty(0)
    for expert, start, end in _active(ends):
        w13, w2 = w13_EFD[expert].to(dtype), w2_EDF[expert].to(dtype)
        z = z_R2F[start:end] if z_R2F.numel() else torch.mm(rows_RD[start:end], w13.t())
        gate, up = z.to(wide).chunk(2, dim=-1)
        silu, sigmoid = F.silu(gate), torch.sigmoid(gate)
        act = silu * up
        dact = torch.mm(dy_RD[start:end], w2).to(wide)
        if not on_input:  # y_r = w_r w2 act, so dw_r = dy . (w2 act) = (w2^T dy) . act: no need to have kept w2 act
            dweight_R[start:end] = (dact * act).sum(-1)
            dact, act = dact * weight_R1[start:end].to(wide), act * weight_R1[start:end].to(wide)
        dz = torch.cat([dact * up * (sigmoid + silu * (1 - sigmoid)), dact * silu], dim=-1).to(dtype)
        if need_w2:
            dw2_EDF[expert] = torch.mm(dy_RD[start:end].t(), act.to(dtype))
        if need_w13:
            dw13_EFD[expert] = torch.mm(dz.t(), rows_RD[start:end])
        torch.mm(dz, w13, out=drows_RD[start:end])
    if on_input:
        dweight_R = (drows_RD.to(wide) * plain_RD).sum(-1)
    dweight_NK = weight_NK.new_zeros(num_items * num_places).index_copy_(0, place_R, dweight_R.to(weight_NK.dtype))
    dx_ND = x_ND.new_empty(0)
    if need_x:
        dx_ND = _join(drows_RD, place_R, weight_NK if on_input else None, num_items, num_places).to(x_ND.dtype)
    return dx_ND, dweight_NK.view_as(weight_NK), dw13_EFD, dw2_EDF


@_expert_mlp_backward.register_fake
def _(dy, x_ND, place_R, offset_E, weight_NK, w13_EFD, w2_EDF, z, on_input, dtype, backend, need_x, need_w13, need_w2):
    needed = zip((x_ND, w13_EFD, w2_EDF), (need_x, need_w13, need_w2), strict=True)
    dx, dw13, dw2 = (like.new_empty(like.shape if need else (0,)) for like, need in needed)
    return dx, weight_NK.new_empty(weight_NK.shape), dw13, dw2


def _setup_context(ctx, inputs, output):
    x_ND, place_R, offset_E, weight_NK, w13_EFD, w2_EDF, on_input, dtype, backend, _ = inputs
    ctx.save_for_backward(x_ND, place_R, offset_E, weight_NK, w13_EFD, w2_EDF, output[1])
    ctx.options = on_input, dtype, backend
    ctx.set_materialize_grads(False)  # z is not differentiated; do not make a gradient of its size


def _backward(ctx, dy_ND, _):
    need_x, _, _, need_weight, need_w13, need_w2, *_ = ctx.needs_input_grad
    gradients = _expert_mlp_backward(dy_ND, *ctx.saved_tensors, *ctx.options, need_x, need_w13, need_w2)
    dx, dweight, dw13, dw2 = (
        gradient if need else None
        for gradient, need in zip(gradients, (need_x, need_weight, need_w13, need_w2), strict=True)
    )
    return dx, None, None, dweight, dw13, dw2, None, None, None, None


_expert_mlp.register_autograd(_backward, setup_context=_setup_context)


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
