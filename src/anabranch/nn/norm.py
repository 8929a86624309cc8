"""RMSNorm (Zhang and Sennrich 2019, arXiv 1910.07467): x / sqrt(mean(x^2) + eps) * weight, computed in fp32."""
# Shapes: N rows (all leading dimensions), D width

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.nn.derivatives import asks_for_plain, plain_gradients
from anabranch.nn.kernels import rows as native
from anabranch.nn.kernels.operands import takes
from anabranch.precision import cast, wide


class RMSNorm(nn.Module):
    """Normalise the last dimension (size ``dim``) by its root mean square; the factor starts at 1.

    Factors are ``offset`` + weight; with an offset of 1 a weight of 0 changes nothing (Gemma).
    """

    def __init__(self, dim: int, eps: float = 1e-5, offset: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((dim,), 1.0 - offset))
        self.eps, self.offset = eps, offset

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as ``x``."""
        weight_D: Tensor = self.weight
        if self.offset:
            # In float32: half types lose what a weight adds to 1.
            weight_D = wide(weight_D) + self.offset
        is_compiled = native.can_norm(x, weight_D)
        if not torch.is_grad_enabled():
            return native.norm(x, weight_D, self.eps, keep=False)[1] if is_compiled else _norm(x, weight_D, self.eps)
        if is_compiled:
            return _CompiledRMSNorm.apply(x, weight_D, self.eps)
        if x.device.type == "cpu" and takes():
            return _RMSNorm.apply(x, weight_D, self.eps)
        return _norm(x, weight_D, self.eps)


def _norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """The same by torch."""
    wide_x = wide(x)
    return cast(F.rms_norm(wide_x, weight_D.shape, cast(weight_D, wide_x.dtype), eps), x.dtype)


def _norm_gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Differentiable gradients of x and its weight, of a context that saved both first."""
    inputs, needed = ctx.saved_tensors[:2], ctx.needs_input_grad[:2]
    return *plain_gradients(lambda x, weight_D: _norm(x, weight_D, ctx.eps), inputs, gradient, needed), None


class _CompiledRMSNorm(torch.autograd.Function):
    """Two passes over memory, one each way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        dense, y, scale_N = native.norm(x, weight_D, eps, keep=True)
        # A copy in one piece has no graph: second derivatives start from what came in.
        ctx.save_for_backward(x, weight_D, scale_N, None if dense is x else dense)
        ctx.eps = eps
        return y

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if asks_for_plain(gradient):
            return _norm_gradients(ctx, gradient)
        x, weight_D, scale_N, dense = ctx.saved_tensors
        dx, dweight_D = native.norm_gradients(gradient, x if dense is None else dense, weight_D, scale_N)
        return dx, dweight_D.to(weight_D.dtype), None


class _RMSNorm(torch.autograd.Function):
    """The same in torch with a backward pass by hand, where there is no compiled one: torch composes both of a dozen passes over memory.

    With r = 1 / sqrt(mean(x^2) + eps):  dx = r (g w) - x r^3 mean(g w x),  dw = sum over rows of g x r.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        # To the bit what F.rms_norm computes.
        scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_D, scale)
        ctx.eps = eps
        return (wide * scale).mul_(weight_D).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if asks_for_plain(gradient):
            return _norm_gradients(ctx, gradient)
        x, weight_D, scale = ctx.saved_tensors
        wide_x, wide_gradient, wide_D = x.to(scale.dtype), gradient.to(scale.dtype), weight_D.to(scale.dtype)
        product_ND, scale_N = (wide_gradient * wide_x).reshape(-1, x.shape[-1]), scale.reshape(-1)
        dweight_D = torch.mv(product_ND.t(), scale_N)
        inner_N = torch.mv(product_ND, wide_D).mul_(scale_N.pow(3)).div_(-x.shape[-1])
        dx = (wide_gradient * wide_D).mul_(scale).addcmul_(wide_x, inner_N.view_as(scale))
        return dx.to(x.dtype), dweight_D.to(weight_D.dtype), None
