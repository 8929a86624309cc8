"""`linear_remade`: a product with a matrix that is made for it and made anew for its gradient, as of one that is stored in few bits.

Kept between the passes, the numbers of all matrices would take what few bits save.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["linear_remade"]


def linear_remade(x: Tensor, weight_in: Callable[[torch.dtype], Tensor], bias_N: Tensor | None = None) -> Tensor:
    """x W^T + b in the dtype of ``x``; ``weight_in`` makes W ``[N, K]`` in a dtype. Gradients and tangents are of ``x`` and b."""
    y: Tensor = _Product.apply(x, weight_in, bias_N)
    return y


class _Product(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight_in: Callable[[torch.dtype], Tensor], bias_N: Tensor | None) -> Tensor:
        return F.linear(x, weight_in(x.dtype), None if bias_N is None else bias_N.to(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.weight_in, _ = inputs
        ctx.dtype = x.dtype

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        needs_x, _, needs_bias = ctx.needs_input_grad
        # In the type of dy, which under autocast is another than x's, as b's may be: torch casts each to that of what it is of.
        dx = dy @ ctx.weight_in(dy.dtype) if needs_x else None
        dbias_N = dy.reshape(-1, dy.shape[-1]).sum(0) if needs_bias else None
        return dx, None, dbias_N

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, _: None, dbias_N: Tensor | None) -> Tensor | None:
        dy = None if dx is None else F.linear(dx, ctx.weight_in(dx.dtype))
        if dbias_N is None:
            return dy
        return dbias_N.to(ctx.dtype) if dy is None else dy + dbias_N.to(dy.dtype)
