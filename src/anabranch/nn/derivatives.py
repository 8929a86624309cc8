"""Second derivatives of operators whose backward pass is written by hand.

A backward pass by hand computes numbers, not a graph. Where a graph of the gradients is asked for (``create_graph=True``, which autograd
tells by computing gradients with grad mode on), they are computed once more by a plain twin of the operator, which torch differentiates
as often as one likes. All else goes the quick way.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["plain_gradients", "with_plain_gradients"]


def plain_gradients(
    plain: Callable[..., Tensor], inputs: Sequence[Tensor], gradient: Tensor, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of ``plain(*inputs)``, themselves differentiable; None where not ``needed``.

    Args:
        plain: made of operators that torch differentiates twice.
        inputs: what it takes, as they entered the operator (copies of them would not be differentiated).
        gradient: of its output.
        needed: which inputs' gradients, in their order.
    """
    # Aliases, because an input may be made of another one: each gradient is through this operator alone.
    aliases = [value.view_as(value) if need else value for value, need in zip(inputs, needed, strict=True)]
    wanted = [alias for alias, need in zip(aliases, needed, strict=True) if need]
    found = iter(torch.autograd.grad(plain(*aliases), wanted, gradient, create_graph=True, allow_unused=True))
    return tuple(next(found) if need else None for need in needed)


def with_plain_gradients(plain: Callable[..., Tensor], y: Tensor, inputs: Sequence[Tensor]) -> Tensor:
    """``y``, which an operator of torch that has no second derivative made of ``inputs``; with those of ``plain(*inputs)``, its equal."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or not y.requires_grad:
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
