"""Second derivatives, and many gradients at once, of operators whose backward pass is written by hand.

A backward pass by hand computes numbers, not a graph, and of one gradient. Where a graph of the gradients is asked for
(``create_graph=True``, which autograd tells by computing gradients with grad mode on) or a batch of them (``is_grads_batched=True``), they
come from a plain twin of the operator, which torch differentiates as often as one likes. All else goes the quick way.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from anabranch.nn.kernels.operands import PLAIN, takes

__all__ = ["asks_for_graph", "asks_for_plain", "plain_gradients", "with_plain_gradients"]


def asks_for_plain(gradient: Tensor) -> bool:
    """Whether a backward pass that gets this gradient must answer with `plain_gradients`: also of one that no kernel could read."""
    return asks_for_graph(gradient) or type(gradient) not in PLAIN or gradient.is_neg()


def asks_for_graph(gradient: Tensor) -> bool:
    """The same of an operator that torch's compilers trace, and that takes any kind of tensor."""
    is_batch = torch._C._functorch.is_legacy_batchedtensor(gradient) or torch._C._functorch.is_batchedtensor(gradient)
    return torch.is_grad_enabled() or is_batch


def plain_gradients(
    plain: Callable[..., Tensor], inputs: Sequence[Tensor], gradient: Tensor, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of ``plain(*inputs)``, themselves differentiable if grad mode is on; None where not ``needed``.

    Args:
        plain: made of operators that torch differentiates twice.
        inputs: what it takes, as they entered the operator (copies of them would not be differentiated).
        gradient: of its output.
        needed: which inputs' gradients, in their order.
    """
    # Aliases, because an input may be made of another one: each gradient is through this operator alone.
    with torch.enable_grad():
        aliases = [value.view_as(value) if need else value for value, need in zip(inputs, needed, strict=True)]
        y = plain(*aliases)
    wanted = [alias for alias, need in zip(aliases, needed, strict=True) if need]
    has_graph = torch.is_grad_enabled()
    found = iter(torch.autograd.grad(y, wanted, gradient, create_graph=has_graph, allow_unused=True))
    return tuple(next(found) if need else None for need in needed)


def with_plain_gradients(plain: Callable[..., Tensor], y: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """``y``, which an operator of torch that has no second derivative made of ``inputs``; with those of ``plain(*inputs)``, its equal."""
    if not takes() or not torch.is_grad_enabled() or not y.requires_grad:
        return y
    return _WithPlainGradients.apply(plain, y, *inputs)


class _WithPlainGradients(torch.autograd.Function):
    """The gradient of y goes on to the operator that made it, or past it."""

    @staticmethod
    def forward(ctx: Any, plain: Callable[..., Tensor], y: Tensor, *inputs: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs)
        ctx.plain = plain
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        _, _, *needed = ctx.needs_input_grad
        if not torch.is_grad_enabled():
            return None, gradient, *(None for _ in needed)
        return None, None, *plain_gradients(ctx.plain, ctx.saved_tensors, gradient, needed)
