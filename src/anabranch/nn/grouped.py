"""`expert_mlp`: an expert on each routed row, the one fast path that every pool of stacked experts stands on.

    y_n = sum_k weight_nk  w2_e (silu(gate_e x_n) * up_e x_n)        with e = the destination of choice (n, k)

That is SwiGLU, the default; `anabranch.nn.activation` has the others, which the compiled kernels leave to torch.

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
# Shapes: N items, E experts, K choices per item, R = N K rows (used ones first), D width, F hidden (2F: gate, then up; F without a gate)

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from anabranch.errors import ConfigError
from anabranch.nn.activation import activation_of
from anabranch.nn.expert_call import ExpertCall, WeightOn
from anabranch.nn.expert_loop import plain_experts
from anabranch.nn.operator import expert_operator
from anabranch.nn.sums import GradientSums
from anabranch.precision import autocast_dtype, full_precision
from anabranch.routing.dispatch import DispatchPlan, combine, dispatch, pad_rows, unpad_rows

__all__ = ["BACKENDS", "dense_mlp", "expert_mlp", "reference_expert_mlp"]

BACKENDS = ("auto", "native", "torch", "grouped_mm", "bmm", "reference")


def expert_mlp(
    x_ND: Tensor,
    plan: DispatchPlan,
    weight_NK: Tensor,
    w13_EFD: Tensor,
    w2_EDF: Tensor,
    *,
    weight_on: WeightOn = "output",
    backend: str = "auto",
    recompute: bool = False,
    sums: GradientSums | None = None,
    activation: str = "swiglu",
) -> Tensor:
    """Send each item through its experts and join the results; differentiable in x, weight, w13 and w2.

    Args:
        x_ND: the items.
        plan: where they go, from `plan_dispatch`. Rows of unused choices are not computed.
        weight_NK: weight of each choice; 0 where the choice is unused.
        w13_EFD: [E, 2F, D], the gate projection's rows, then the up projection's; [E, F, D] for an activation without a gate.
        w2_EDF: [E, D, F], the down projection; [E, O, F] with the activation ``identity``, which gives y_NO.
        weight_on: weigh each expert's ``output`` (the usual), or its ``input`` (Llama 4).
        backend: one of `BACKENDS`; ``auto`` chooses by device, dtype and shape.
        recompute: keep nothing but the inputs for the backward pass, which then repeats the first matmul.
        sums: where the weights' gradients gather when they are the outputs of `gather_gradients`.
        activation: a name of `anabranch.nn.activation`.

    Returns:
        y_ND in the dtype of x, or in the autocast dtype inside autocast. Choices are summed in fp32, in order, so the
        result does not depend on the number of threads.

    Raises:
        ConfigError: shapes or devices that do not fit together, or an unknown backend or activation.
        BackendError: ``native`` was asked for and cannot be had; the message says why.
    """
    _check(x_ND, plan, weight_NK, w13_EFD, w2_EDF, weight_on, backend, activation)
    device = x_ND.device.type
    dtype = autocast_dtype(device) or x_ND.dtype
    # A GPU wants one launch for all experts, and grouped_mm rows whose bytes are a multiple of 16.
    aligned = all(width % 8 == 0 for width in (x_ND.shape[1], *w2_EDF.shape[1:]))
    if backend == "auto" and device == "cuda" and dtype in (torch.bfloat16, torch.float16) and aligned:
        backend = "grouped_mm"
    learns = torch.is_grad_enabled() and any(t.requires_grad for t in (x_ND, weight_NK, w13_EFD, w2_EDF))
    call = ExpertCall(
        x_ND, plan.choice_R, plan.offset_E, weight_NK, w13_EFD, w2_EDF, weight_on == "input", dtype, backend, activation
    )
    with full_precision(device):
        if backend in ("auto", "native", "torch") or x_ND.shape[0] == 0:
            return expert_operator(call, learns=learns, recompute=recompute, sums=sums)
        plain = {"grouped_mm": _grouped_mm, "bmm": _bmm, "reference": plain_experts}[backend]
        if recompute and learns:
            # Flat, because a checkpoint looks for tensors among its arguments alone.
            return checkpoint(lambda *flat: plain(ExpertCall(*flat)), *call.cast(), use_reentrant=False)
        return plain(call.cast())


def dense_mlp(x_ND: Tensor, w13_FD: Tensor, w2_DF: Tensor) -> Tensor:
    """W2 (silu(gate x) * up x) for every row: one expert that all items go to, weight 1. Quicker to train on a CPU than its parts."""
    num_items = x_ND.shape[0]
    offset_E = torch.tensor([num_items], dtype=torch.int32, device=x_ND.device)
    plan = DispatchPlan(torch.arange(num_items, device=x_ND.device), offset_E, num_items, 1)
    return expert_mlp(x_ND, plan, x_ND.new_ones(num_items, 1), w13_FD.unsqueeze(0), w2_DF.unsqueeze(0))


def reference_expert_mlp(
    x_ND: Tensor,
    plan: DispatchPlan,
    weight_NK: Tensor,
    w13_EFD: Tensor,
    w2_EDF: Tensor,
    *,
    weight_on: WeightOn = "output",
    activation: str = "swiglu",
) -> Tensor:
    """The naive loop under autograd, in any dtype: the twin that every back end is tested against."""
    on_input = weight_on == "input"
    return plain_experts(
        ExpertCall(
            x_ND,
            plan.choice_R,
            plan.offset_E,
            weight_NK,
            w13_EFD,
            w2_EDF,
            on_input,
            x_ND.dtype,
            "reference",
            activation,
        )
    )


def _check(
    x_ND: Tensor,
    plan: DispatchPlan,
    weight_NK: Tensor,
    w13_EFD: Tensor,
    w2_EDF: Tensor,
    weight_on: str,
    backend: str,
    activation: str,
) -> None:
    form = activation_of(activation)
    num_parts = len(form.parts)
    if backend not in BACKENDS:
        raise ConfigError(f"backend is {backend!r}; use one of {', '.join(BACKENDS)}")
    if weight_on not in ("output", "input"):
        raise ConfigError(f"weight_on is {weight_on!r}; use 'output' or 'input'")
    for name, part in (("weight", weight_NK), ("w13", w13_EFD), ("w2", w2_EDF), ("the plan", plan.choice_R)):
        if part.device != x_ND.device:
            raise ConfigError(f"x is on {x_ND.device} and {name} on {part.device}; they must be on one device")
    if x_ND.dim() != 2 or x_ND.shape[0] != plan.num_items:
        raise ConfigError(f"x has shape {list(x_ND.shape)}; this plan needs [{plan.num_items}, D]")
    if weight_NK.shape != (plan.num_items, plan.num_choices):
        raise ConfigError(
            f"weight has shape {list(weight_NK.shape)}; it must be [{plan.num_items}, {plan.num_choices}]"
        )
    experts, width = plan.offset_E.shape[0], x_ND.shape[1]
    if w13_EFD.dim() != 3 or w13_EFD.shape[0] != experts or w13_EFD.shape[1] % num_parts or w13_EFD.shape[2] != width:
        hidden = "F" if num_parts == 1 else f"{num_parts} F"
        raise ConfigError(f"w13 has shape {list(w13_EFD.shape)}; it must be [{experts}, {hidden}, {width}]")
    hidden_dim = w13_EFD.shape[1] // num_parts
    out_dim = width if form.keeps_width or w2_EDF.dim() != 3 else w2_EDF.shape[1]
    if w2_EDF.shape != (experts, out_dim, hidden_dim):
        raise ConfigError(f"w2 has shape {list(w2_EDF.shape)}; it must be {[experts, out_dim, hidden_dim]}")


# Back ends that autograd differentiates.


def _grouped_mm(call: ExpertCall) -> Tensor:
    plan, rows_RD = call.plan, _rows(call)
    used_R1 = plan.used_R.unsqueeze(-1)
    # grouped_mm leaves what stands behind the last offset uninitialised, forward and backward: masked on both sides.
    z_R2F = F.grouped_mm(rows_RD.masked_fill(~used_R1, 0.0), call.w13_EFD.transpose(1, 2), offs=plan.offset_E)
    a_RF = activation_of(call.activation).apply(z_R2F.masked_fill(~used_R1, 0.0))
    y_RD = F.grouped_mm(a_RF, call.w2_EDF.transpose(1, 2), offs=plan.offset_E)
    return combine(y_RD, plan, None if call.on_input else call.weight_NK)


def _bmm(call: ExpertCall) -> Tensor:
    plan, rows_RD = call.plan, _rows(call)
    rows_ECD = pad_rows(rows_RD, plan, max(1, int(plan.load_E.max())))
    a_ECF = activation_of(call.activation).apply(torch.bmm(rows_ECD, call.w13_EFD.transpose(1, 2)))
    y_ECD = torch.bmm(a_ECF, call.w2_EDF.transpose(1, 2))
    return combine(unpad_rows(y_ECD, plan), plan, None if call.on_input else call.weight_NK)


def _rows(call: ExpertCall) -> Tensor:
    """rows_RD: what experts read."""
    return dispatch(call.x_ND, call.plan, call.weight_NK if call.on_input else None)
