"""All adapters of a pool at once: two products with their matrices side by side, and zeros between them where an item uses one not.

    y = B_cat (w * (A_cat x)),     A_cat [E R, C], B_cat [O, E R]

It computes E adapters for each item where the grouped product computes those that are used, but in two large products, without sorting or
gathering rows. So it is the quicker of the two where items use most of the adapters, as soft routing does.
"""
# Shapes: N items, E adapters, K choices per item, C inputs, O outputs, R greatest rank

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.nn.kernels.operands import is_transformed
from anabranch.routing.decision import Routing

__all__ = ["is_mostly_used", "side_by_side"]

# Of all pairs of item and adapter, from which on computing all costs less, as `benchmarks/adapter_dispatch.py` measures: than going adapter
# by adapter in torch, and than the compiled product.
MOSTLY, MOSTLY_COMPILED = 0.25, 0.6


def is_mostly_used(routing: Routing, *, is_compiled: bool = False) -> bool:
    """Whether items use so many of the adapters that computing all is quicker; never where looking would make anyone wait.

    ``is_compiled``: the other way is the compiled product.
    """
    index_NK, mostly = routing.index_NK, MOSTLY_COMPILED if is_compiled else MOSTLY
    if index_NK.shape[1] < mostly * routing.num_destinations:
        return False
    if not index_NK.is_cpu or torch.compiler.is_compiling() or is_transformed():
        return False
    return int((index_NK >= 0).sum()) >= mostly * routing.num_items * routing.num_destinations > 0


def side_by_side(x_NC: Tensor, routing: Routing, weight_NK: Tensor, a_ERC: Tensor, b_EOR: Tensor) -> Tensor | None:
    """y_NO = sum_k weight_nk B_e A_e x_n with e = index_nk; an adapter that an item names twice counts twice.

    None where the sum of all is not finite. A NaN or infinity of one adapter or item, which are multiplied by 0 for all others, would be
    theirs too, in values and gradients, so that whoever calls goes adapter by adapter then.
    """
    num_adapters, rank, _ = a_ERC.shape
    used_NK = routing.index_NK >= 0
    index_NK = routing.index_NK.clamp_min(0)
    weight_NE = weight_NK.new_zeros(routing.num_items, num_adapters).scatter_add(1, index_NK, weight_NK * used_NK)
    middle_NER = F.linear(x_NC, a_ERC.flatten(0, 1).to(x_NC.dtype)).unflatten(-1, (num_adapters, rank))
    middle_NER = middle_NER * weight_NE.unsqueeze(-1).to(middle_NER.dtype)
    y_NO = F.linear(middle_NER.flatten(1), b_EOR.transpose(0, 1).flatten(1).to(x_NC.dtype))
    # Each number of A, B and x goes into y: where this is finite they all are. One sum costs less than to look at each number.
    return y_NO if math.isfinite(float(y_NO.detach().sum())) else None
