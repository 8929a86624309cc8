"""The expert operator: opaque to autograd and torch.compile, with its own backward pass, in compiled kernels or a loop.

`anabranch.nn.grouped.expert_mlp` is its public face. Everything here passes an `ExpertCall` on; only operators of torch, which take flat
arguments, see it spread out: those at the end of this file, and the autograd functions.
"""
# Shapes: N items, E experts, K choices per item, R = N K rows (used ones first), D width, F hidden (2F: gate, then up; F without a gate)

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from anabranch.errors import BackendError
from anabranch.nn import expert_loop
from anabranch.nn.derivatives import asks_for_graph, asks_for_plain, plain_gradients
from anabranch.nn.expert_call import ExpertCall, Gradients, Needed
from anabranch.nn.kernels import expert_mlp as native
from anabranch.nn.kernels.operands import is_transformed, why_refused
from anabranch.nn.sums import GradientSums
from anabranch.precision import full_precision

__all__ = ["expert_operator"]


def expert_operator(call: ExpertCall, *, learns: bool, recompute: bool, sums: GradientSums | None = None) -> Tensor:
    """y_ND in the dtype of the call.

    Args:
        call: what to compute; its backend is ``native``, ``torch`` or ``auto``.
        learns: whether any gradient may be asked for.
        recompute: keep nothing but the call for the backward pass.
        sums: where the gradients of w13 and w2 gather, instead of travelling through autograd.
    """
    is_compiling = torch.compiler.is_compiling()
    if not is_compiling and is_transformed():
        if call.backend == "native":
            raise BackendError(f"{why_refused(x=call.x_ND)}; use backend 'auto'")
        return expert_loop.plain_experts(call.cast())
    # What the operator does, without the cost of dispatching it.
    if not learns and type(call.x_ND) is Tensor and not call.x_ND.is_meta and not is_compiling:
        return _forward(call, False)[0]
    if sums is not None and learns:
        return _Gathering.apply(sums, *call, not recompute)
    return _operator(*call, learns and not recompute)[0]


def _forward(call: ExpertCall, keep: bool) -> tuple[Tensor, Tensor]:
    """y_ND and, with ``keep``, z_R2F for `_gradients`; both in the dtype of the call."""
    return (native if _is_native(call) else expert_loop).forward(call, keep)


def _gradients(
    call: ExpertCall, z_R2F: Tensor, dy_ND: Tensor, needed: Needed, sums: tuple[Tensor, Tensor] | None = None
) -> Gradients:
    """Gradients of the call. ``z_R2F`` is what `_forward` kept, or empty; with ``sums``, those of w13 and w2 are added to them."""
    return (native if _is_native(call, dy_ND) else expert_loop).backward(call, z_R2F, dy_ND, needed, sums)


def _is_native(call: ExpertCall, dy_ND: Tensor | None = None) -> bool:
    """Whether the kernels compute it. Asked inside the operator, so that a compiled graph does not freeze the answer."""
    if call.activation != "swiglu":
        if call.backend == "native":
            raise BackendError(f"the compiled kernels compute swiglu, not {call.activation}; use backend 'auto'")
        return False
    if call.backend == "torch" or call.choice_R.shape[0] == 0:
        return False
    others = {"choice": call.choice_R, "offset": call.offset_E, "weight": call.weight_NK}
    if dy_ND is not None:
        others["dy"] = dy_ND
    obstacle = native.why_not(call.x_ND, call.w13_EFD, call.w2_EDF, call.dtype, **others)
    if call.backend == "native" and obstacle:
        raise BackendError(f"{obstacle}; use backend 'auto'")
    return not obstacle


# Autograd: it sees the flat arguments of a call, saves the tensors, and is answered with as many gradients.


def _saved(ctx: Any) -> tuple[ExpertCall, Tensor]:
    """The call, and what its forward pass kept."""
    *tensors, z_R2F = ctx.saved_tensors
    return ExpertCall(*tensors, *ctx.options), z_R2F


def _save(ctx: Any, call: ExpertCall, z_R2F: Tensor) -> None:
    ctx.save_for_backward(*call.tensors, z_R2F)
    ctx.options = call.options


def _needed(flat: Sequence[bool]) -> Needed:
    """Of what autograd says of each argument of a call, whether it needs a gradient."""
    x, _, _, weight, w13, w2, *_ = flat
    return Needed(x, weight, w13, w2)


def _in_order(
    x_ND: Tensor | None, weight_NK: Tensor | None, w13_EFD: Tensor | None, w2_EDF: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of the arguments of a call, flat."""
    return x_ND, None, None, weight_NK, w13_EFD, w2_EDF, None, None, None, None


def _plain_backward(call: ExpertCall, needed: Needed, dy_ND: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of the arguments of a call, flat and differentiable."""

    def plain(x_ND: Tensor, weight_NK: Tensor, w13_EFD: Tensor, w2_EDF: Tensor) -> Tensor:
        alias = call._replace(x_ND=x_ND, weight_NK=weight_NK, w13_EFD=w13_EFD, w2_EDF=w2_EDF)
        return expert_loop.plain_experts(alias.cast())

    inputs = call.x_ND, call.weight_NK, call.w13_EFD, call.w2_EDF
    with full_precision(call.x_ND.device.type):
        return _in_order(*plain_gradients(plain, inputs, dy_ND, needed))


class _Gathering(torch.autograd.Function):
    """The operator of weights from `gather_gradients`, whose gradients do not travel through autograd but gather in ``sums``."""

    @staticmethod
    def forward(ctx, sums, *flat):
        call, keep = ExpertCall(*flat[:-1]), flat[-1]
        y_ND, z_R2F = _forward(call, keep)
        _save(ctx, call, z_R2F)
        ctx.sums = sums
        return y_ND

    @staticmethod
    def backward(ctx, dy_ND):
        call, z_R2F = _saved(ctx)
        needed = _needed(ctx.needs_input_grad[1:])
        if asks_for_plain(dy_ND):
            return None, *_plain_backward(call, needed, dy_ND), None
        sums = ctx.sums.of_pass()
        gathered = None if sums is None else sums.pair
        found = _gradients(call, z_R2F, dy_ND, needed._replace(w13=True, w2=True), gathered)
        pair: tuple[Tensor | None, Tensor | None] = found.w13_EFD, found.w2_EDF
        if sums is not None:
            sums.pair, pair = (found.w13_EFD, found.w2_EDF), (None, None)
        flat = _in_order(found.x_ND if needed.x else None, found.weight_NK if needed.weight else None, *pair)
        return None, *flat, None


# Operators of torch, whose schemas are the fields of the records in their order.

_IN_SCHEMA = {Tensor: "Tensor", bool: "bool", torch.dtype: "ScalarType", str: "str"}
_CALL, _NEEDED = (
    ", ".join(f"{_IN_SCHEMA[kind]} {name}" for name, kind in record.__annotations__.items())
    for record in (ExpertCall, Needed)
)
_NUM_FIELDS = len(ExpertCall._fields)


@torch.library.custom_op(
    "anabranch::expert_mlp", mutates_args=(), schema=f"({_CALL}, bool keep) -> (Tensor y_ND, Tensor z_R2F)"
)
def _operator(*flat):
    return _forward(ExpertCall(*flat[:-1]), flat[-1])


@_operator.register_fake
def _(*flat):
    call, keep = ExpertCall(*flat[:-1]), flat[-1]
    z_shape = (call.choice_R.shape[0], call.w13_EFD.shape[1]) if keep else (0,)
    y_ND = call.x_ND.new_empty((call.x_ND.shape[0], call.out_dim), dtype=call.dtype)
    return y_ND, call.x_ND.new_empty(z_shape, dtype=call.dtype)


@torch.library.custom_op(
    "anabranch::expert_mlp_backward",
    mutates_args=(),
    schema=f"({_CALL}, Tensor z_R2F, Tensor dy_ND, {_NEEDED}) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _backward_operator(*flat):
    call, (z_R2F, dy_ND, *needed) = ExpertCall(*flat[:_NUM_FIELDS]), flat[_NUM_FIELDS:]
    return tuple(_gradients(call, z_R2F, dy_ND, Needed(*needed)))


@_backward_operator.register_fake
def _(*flat):
    call, (_, _, need_x, _, *others) = ExpertCall(*flat[:_NUM_FIELDS]), flat[_NUM_FIELDS:]
    likes = zip((call.x_ND, call.w13_EFD, call.w2_EDF), (need_x, *others), strict=True)
    dx, dw13, dw2 = (like.new_empty(like.shape if need else (0,)) for like, need in likes)
    return dx, call.weight_NK.new_empty(call.weight_NK.shape), dw13, dw2


def _setup_context(ctx, inputs, output):
    _save(ctx, ExpertCall(*inputs[:-1]), output[1])
    # z is not differentiated; do not make a gradient of its size.
    ctx.set_materialize_grads(False)


def _backward(ctx, dy_ND, _):
    call, z_R2F = _saved(ctx)
    needed = _needed(ctx.needs_input_grad)
    # Nothing downstream depends on y.
    if dy_ND is None:
        return *_in_order(None, None, None, None), None
    if asks_for_graph(dy_ND):
        return *_plain_backward(call, needed, dy_ND), None
    gradients = _backward_operator(*call, z_R2F, dy_ND, *needed)
    found = [gradient if need else None for gradient, need in zip(gradients, needed, strict=True)]
    return *_in_order(*found), None


_operator.register_autograd(_backward, setup_context=_setup_context)
