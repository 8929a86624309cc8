"""How much each block changes what goes through it: the block influence of ShortGPT (Men et al. 2024, arXiv 2403.03853).

    BI_i = 1 - mean over tokens of cos(x_i, x_{i+1})

where x_i goes into block i. Blocks of small influence are the ones that ShortGPT removes.
"""
# Shapes: B batch, L positions, D width, I blocks

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.errors import ConfigError, DataError

if TYPE_CHECKING:
    from anabranch.depth.stack import BlockStack

__all__ = ["Batch", "batches_of", "block_cosines", "block_influence", "least_influence_first", "without_least"]

# Tokens, or tokens and a mask that is False (0) at padding.
Batch = Tensor | tuple[Tensor, Tensor | None]


def batches_of(batches: Iterable[Batch]) -> Iterator[tuple[Tensor, Tensor | None]]:
    """(token_BL, mask_BL or None) of each batch. Raises DataError for tokens that are no int64 ``[B, L]`` with at least one position."""
    for batch in batches:
        token_BL, mask_BL = (batch, None) if isinstance(batch, Tensor) else batch
        if token_BL.ndim != 2 or not token_BL.numel() or token_BL.is_floating_point():
            raise DataError(
                f"a batch of tokens has shape {tuple(token_BL.shape)}; give integers [sequences, positions]"
            )
        if mask_BL is not None and mask_BL.shape != token_BL.shape:
            raise DataError(f"a mask has shape {tuple(mask_BL.shape)} and its tokens {tuple(token_BL.shape)}")
        yield token_BL, None if mask_BL is None else mask_BL.bool()


@torch.no_grad()
def block_cosines(stack: "BlockStack", token_BL: Tensor, mask_BL: Tensor | None = None) -> Tensor:
    """cos(x_i, x_{i+1}) of each block and token, ``[I, B, L]`` in float32, NaN at padding.

    Args:
        stack: each of its blocks runs once, in order.
        token_BL: int64.
        mask_BL: False at padding; None for none.
    """
    x_BLD, state = stack.embed(token_BL.to(stack.device), None if mask_BL is None else mask_BL.to(stack.device))
    found: list[Tensor] = []
    for layer in range(stack.num_blocks):
        y_BLD = stack.block(layer, x_BLD, state)
        found.append(F.cosine_similarity(x_BLD.float(), y_BLD.float(), dim=-1))
        x_BLD = y_BLD
    cosine_IBL = torch.stack(found)
    return cosine_IBL if mask_BL is None else cosine_IBL.masked_fill(~mask_BL.bool().to(cosine_IBL.device), torch.nan)


def block_influence(stack: "BlockStack", batches: Iterable[Batch]) -> list[float]:
    """BI of each block, a mean over all tokens that are no padding.

    Args:
        stack: of the model.
        batches: token_BL, or (token_BL, mask_BL).

    Raises DataError where there is no token, or a block gives what is not finite.
    """
    total_I = torch.zeros(stack.num_blocks, dtype=torch.float64)
    count = 0
    for token_BL, mask_BL in batches_of(batches):
        cosine_IBL = block_cosines(stack, token_BL, mask_BL).double().cpu()
        real_BL = torch.ones_like(cosine_IBL[0], dtype=torch.bool) if mask_BL is None else mask_BL.cpu()
        total_I += cosine_IBL[:, real_BL].sum(1)
        count += int(real_BL.sum())
    if not count:
        raise DataError("there are no tokens to measure the influence of blocks on; give at least one")
    influence = (1 - total_I / count).tolist()
    broken = [layer for layer, value in enumerate(influence) if value != value]
    if broken:
        raise DataError(f"block {broken[0]} gives numbers that are not finite; is the model broken?")
    return influence


def least_influence_first(influence: Iterable[float]) -> list[int]:
    """Blocks in the order in which ShortGPT removes them; of equals the earlier first."""
    values: list[Any] = list(influence)
    return sorted(range(len(values)), key=lambda layer: (values[layer], layer))


def without_least(influence: Iterable[float], count: int) -> tuple[int, ...]:
    """The path of ShortGPT: all blocks in order but the ``count`` of least influence. Raises ConfigError for more than there are."""
    order = least_influence_first(influence)
    if not 0 <= count <= len(order):
        raise ConfigError(f"{count} blocks are to be removed of {len(order)}; give 0 to {len(order)}")
    gone = set(order[:count])
    return tuple(layer for layer in range(len(order)) if layer not in gone)
