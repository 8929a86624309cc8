"""`causal_attention`: attention of a sequence on itself and on what stands in front of it, by the quickest way that computes it."""
# Shapes: B sequences, H query heads, G key heads, L queries, M entries in front, S = M + L keys, D head width

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from anabranch.nn.kernels import attention as native

__all__ = ["causal_attention"]

SHORT = 16  # queries; for fewer, launching is what costs


def causal_attention(query_BHLD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor) -> Tensor:
    """y_BHLD: query l sees the first M + l + 1 of the S keys. Key heads are shared by H / G query heads each.

    Compiled kernels on a CPU in float32, `scaled_dot_product_attention` elsewhere.
    """
    front = key_BGSD.shape[2] - query_BHLD.shape[2]
    if (
        not torch.compiler.is_compiling()
        and query_BHLD.shape[2] >= SHORT
        and native.can(query_BHLD, key_BGSD, value_BGSD)
    ):
        return _Causal.apply(query_BHLD, key_BGSD, value_BGSD)
    if (
        front
    ):  # Queries that nobody asks for make it square, and half as much work as a mask, which hides but does not spare.
        query_BHLD = F.pad(query_BHLD, (0, 0, front, 0))
    is_grouped = query_BHLD.shape[1] != key_BGSD.shape[1]
    y_BHSD = F.scaled_dot_product_attention(query_BHLD, key_BGSD, value_BGSD, is_causal=True, enable_gqa=is_grouped)
    return y_BHSD[:, :, front:]


class _Causal(torch.autograd.Function):
    """Keeps what goes in and comes out; scores are made again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, query_BHLD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor) -> Tensor:
        y_BHLD, log_sum_BHL = native.forward(query_BHLD, key_BGSD, value_BGSD)
        ctx.save_for_backward(query_BHLD, key_BGSD, value_BGSD, y_BHLD, log_sum_BHL)
        return y_BHLD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BHLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return native.backward(dy_BHLD, *ctx.saved_tensors)
