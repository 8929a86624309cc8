"""Which tokens of a prompt a block passes over by their place alone: FTP's static router, and random tokens, its control.

The priority is (first token, last, last but one, ..., second): attention rests on the first token, and the latest ones matter most. With
sparsity s a block passes over the floor(s N) tokens of lowest priority, which are those at 1, 2, ...
"""
# Shapes: B prompts, L positions, padding among them

import math

import torch
from torch import Tensor

__all__ = ["first_of", "places_of", "random_keep", "skip_count", "static_keep"]

# What products of decimals like 0.29 * 100 fall short of the integer that they mean.
_ROUNDING = 1e-9


def skip_count(sparsity: float, count: int) -> int:
    """How many of ``count`` tokens a block with this sparsity passes over.

    floor(s N), and never the first token, so at most N - 1; all of them only where s is 1, which means that the block does not run at all.
    A prompt of one token is never pruned.
    """
    if count <= 1:
        return 0
    if sparsity >= 1:
        return count
    return min(math.floor(sparsity * count + _ROUNDING), count - 1)


def places_of(real_BL: Tensor) -> Tensor:
    """int64: the place of each token among the real ones of its prompt, from 0; 0 at padding in front of them."""
    return (real_BL.long().cumsum(1) - 1).clamp_min(0)


def first_of(real_BL: Tensor) -> Tensor:
    """bool: the first real token of each prompt."""
    return real_BL & (real_BL.long().cumsum(1) == 1)


def static_keep(real_BL: Tensor, sparsity: float) -> Tensor:
    """bool: the tokens that a block computes.

    Args:
        real_BL: False at padding, which is never kept.
        sparsity: of the block.
    """
    skip_B1 = _skip_counts(real_BL, sparsity)
    place_BL = places_of(real_BL)
    if sparsity >= 1:
        return real_BL & (skip_B1 == 0)
    return real_BL & ((place_BL == 0) | (place_BL > skip_B1))


def random_keep(real_BL: Tensor, sparsity: float, generator: torch.Generator, *, keep_first: bool = True) -> Tensor:
    """bool: as many tokens as `static_keep` keeps, drawn at random.

    Args:
        real_BL: False at padding.
        sparsity: of the block.
        generator: on the CPU.
        keep_first: keep the first token whatever is drawn.
    """
    draw_BL = torch.rand(real_BL.shape, generator=generator).to(real_BL.device)
    return keep_best(draw_BL, real_BL, sparsity, keep_first=keep_first)


def keep_best(value_BL: Tensor, real_BL: Tensor, sparsity: float, *, keep_first: bool = True) -> Tensor:
    """bool: the ceil((1 - s) N) tokens of the highest values of each prompt, of equals the earlier; the first token in any case."""
    skip_B1 = _skip_counts(real_BL, sparsity)
    value_BL = value_BL.float()
    if keep_first:
        value_BL = value_BL.masked_fill(first_of(real_BL), torch.inf)
    # Behind everything real, also behind values of -inf.
    order_BL = value_BL.argsort(dim=1, descending=True, stable=True)
    real_in_order_BL = real_BL.gather(1, order_BL)
    number_BL = real_in_order_BL.long().cumsum(1) - 1
    kept_in_order_BL = real_in_order_BL & (number_BL < real_BL.sum(1, keepdim=True) - skip_B1)
    return torch.zeros_like(real_BL).scatter(1, order_BL, kept_in_order_BL)


def _skip_counts(real_BL: Tensor, sparsity: float) -> Tensor:
    """int64 ``[B, 1]``: `skip_count` of each prompt."""
    counts = [[skip_count(sparsity, count)] for count in real_BL.sum(1).tolist()]
    return torch.tensor(counts, device=real_BL.device, dtype=torch.int64).reshape(-1, 1)
