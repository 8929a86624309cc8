"""`causal_attention`: attention of a sequence on itself and on what stands in front of it, by the quickest way that computes it."""
# Shapes: B sequences, H query heads, G key heads, L queries, M entries in front, S = M + L keys, D head width

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from anabranch.errors import InputError
from anabranch.nn.derivatives import asks_for_plain, plain_gradients, with_plain_gradients
from anabranch.nn.kernels import attention as native
from anabranch.nn.kernels.operands import is_transformed

__all__ = ["attention", "causal_attention"]

# Queries; for fewer, launching is what costs.
SHORT = 16


def causal_attention(query_BHLD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor) -> Tensor:
    """y_BHLD: query l sees the first M + l + 1 of the S keys. Key heads are shared by H / G query heads each.

    Compiled kernels on a CPU in float32 and bfloat16, `scaled_dot_product_attention` elsewhere.

    Raises InputError for more queries than keys.
    """
    if query_BHLD.shape[2] > key_BGSD.shape[2]:
        raise InputError(
            f"causal_attention was given {query_BHLD.shape[2]} queries and {key_BGSD.shape[2]} keys; every query has a key of its own"
        )
    if query_BHLD.shape[2] >= SHORT and native.can(query_BHLD, key_BGSD, value_BGSD):
        return _Causal.apply(query_BHLD, key_BGSD, value_BGSD)
    return _causal(query_BHLD, key_BGSD, value_BGSD)


def _causal(query_BHLD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor) -> Tensor:
    """The same by torch."""
    front = key_BGSD.shape[2] - query_BHLD.shape[2]
    # Queries that nobody asks for make it square, and half as much work as a mask, which hides but does not spare.
    square_BHSD = F.pad(query_BHLD, (0, 0, front, 0)) if front else query_BHLD
    return attention(square_BHSD, key_BGSD, value_BGSD, is_causal=True)[:, :, front:]


def attention(query_BHLD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor, **options: Any) -> Tensor:
    """`scaled_dot_product_attention`, which has second derivatives whatever torch computes it with. Key heads are shared.

    Args:
        query_BHLD, key_BGSD, value_BGSD: as for `causal_attention`.
        options: ``attn_mask`` or ``is_causal``.
    """
    options["enable_gqa"] = query_BHLD.shape[1] != key_BGSD.shape[1]

    def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # The one of them that torch differentiates twice.
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(query, key, value, **options)

    # The quick ones have no tangents.
    if not torch.compiler.is_compiling() and is_transformed():
        return plain(query_BHLD, key_BGSD, value_BGSD)
    y_BHLD = F.scaled_dot_product_attention(query_BHLD, key_BGSD, value_BGSD, **options)
    return with_plain_gradients(plain, y_BHLD, (query_BHLD, key_BGSD, value_BGSD))


class _Causal(torch.autograd.Function):
    """Keeps what goes in and comes out; scores are made again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, query_BHLD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor) -> Tensor:
        y_BHLD, log_sum_BHL = native.forward(query_BHLD, key_BGSD, value_BGSD)
        ctx.save_for_backward(query_BHLD, key_BGSD, value_BGSD, y_BHLD, log_sum_BHL)
        return y_BHLD

    @staticmethod
    def backward(ctx: Any, dy_BHLD: Tensor) -> tuple[Tensor | None, ...]:
        if asks_for_plain(dy_BHLD):
            return plain_gradients(_causal, ctx.saved_tensors[:3], dy_BHLD, ctx.needs_input_grad)
        return native.backward(dy_BHLD, *ctx.saved_tensors)
