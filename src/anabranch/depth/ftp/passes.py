"""One pass of tokens through the blocks of a stack, where each block computes some of them: gather, run, scatter."""
# Shapes: B sequences, L positions, K of them that a block computes, I blocks, D width

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from anabranch.depth.ftp.cache import Attending, BlockCache
from anabranch.depth.ftp.features import ScoreTable
from anabranch.depth.gathered import GatheredBlocks, keys_of
from anabranch.depth.stack import BlockStack

__all__ = ["Kept", "Meter", "Tokens", "dense_work", "gather_places", "run_blocks"]

# What happens to keys and values of tokens that a block passes over: there are none, or they are made all the same.
Kept = Literal["drop", "keep"]
# (number of a block, x_BLD that goes into it, table of attention) -> bool [B, L], the tokens that it computes.
Decide = Callable[[int, Tensor, ScoreTable], Tensor]


@dataclass(frozen=True)
class Tokens:
    """What goes through the blocks.

    Attributes:
        token_BL: int64.
        real_BL: False at padding.
        position_BL: int64, places in the sequences, from 0 at the first real token.
    """

    token_BL: Tensor
    real_BL: Tensor
    position_BL: Tensor


@dataclass
class Meter:
    """Multiply-adds as they are done, counted by what the stack says of its blocks.

    Attributes:
        stack: whose blocks.
        blocks: of each block.
        overhead: of what decides: queries and keys of the scores, the router.
    """

    stack: BlockStack
    blocks: list[int] = field(default_factory=list)
    overhead: int = 0

    def __post_init__(self) -> None:
        layers = range(self.stack.num_blocks)
        self.blocks = self.blocks or [0] * len(layers)
        # What one position more to see costs, and what a token costs that sees none.
        self._pair = [self.stack.count(layer, 1, 2) - self.stack.count(layer, 1, 1) for layer in layers]
        self._token = [self.stack.count(layer, 1, 1) - self._pair[layer] for layer in layers]

    def add(self, layer: int, tokens: int, pairs: int) -> None:
        """A run of a block on so many tokens, whose queries see so many keys together."""
        self.blocks[layer] += tokens * self._token[layer] + pairs * self._pair[layer]

    def add_keys(self, layer: int, cost: int) -> None:
        """Keys and values of tokens that a block passes over."""
        self.blocks[layer] += cost

    def add_scores(self, layer: int, pairs: int) -> None:
        """Queries met keys once more, without values."""
        self.overhead += pairs * self._pair[layer] // 2

    @property
    def total(self) -> int:
        """Of all blocks, without what decides."""
        return sum(self.blocks)


def dense_work(stack: BlockStack, length: int, path: Sequence[int] | None = None, *, past: int = 0) -> int:
    """Multiply-adds of the blocks of ``path`` (None: all) on one sequence of ``length`` tokens behind ``past`` others."""
    path = range(stack.num_blocks) if path is None else path
    return sum(stack.count(layer, length, past + length) for layer in path)


def gather_places(keep_BL: Tensor) -> tuple[Tensor, Tensor | None]:
    """(place_BK, real_BK): the places of the tokens to compute, in order, filled up to the most of any row with others.

    real_BK is False at what only fills a row up; None where all rows have as many.
    """
    count_B = keep_BL.sum(1)
    most = int(count_B.max())
    # Stable, so tokens stay in order; those to compute come first.
    place_BK = (~keep_BL).to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    if bool((count_B == most).all()):
        return place_BK, None
    return place_BK, torch.arange(most, device=keep_BL.device) < count_B.unsqueeze(1)


def run_blocks(
    blocks: GatheredBlocks,
    x_BLD: Tensor,
    tokens: Tokens,
    decide: Decide,
    *,
    caches: Sequence[BlockCache] | None = None,
    kv: Kept = "drop",
    meter: Meter | None = None,
    wants_scores: Callable[[int], bool] = lambda layer: False,
    own_only: bool = False,
    removed: Callable[[int], bool] = lambda layer: False,
) -> tuple[Tensor, Tensor]:
    """(x_BLD behind the last block, keep_IBL: what each block computed).

    Args:
        blocks: of the stack.
        x_BLD: what goes into the first one.
        tokens: of the pass, which come behind those in the caches.
        decide: called once for each block, in order.
        caches: of each block, which are extended; None for a pass that nothing follows.
        kv: what happens to keys and values of tokens that a block passes over.
        meter: counts what is done.
        wants_scores: whether the table is made anew after a block.
        own_only: of scores, see `column_means`.
        removed: whether a block is not there at all, so that not even keys are made in it.
    """
    table, kept = ScoreTable(), []
    for layer in range(blocks.stack.num_blocks):
        keep_BL = decide(layer, x_BLD, table) & tokens.real_BL
        cache = BlockCache() if caches is None else caches[layer]
        kept.append(keep_BL)
        if kv == "keep" and not removed(layer):
            _keep_keys(blocks, layer, x_BLD, tokens, tokens.real_BL & ~keep_BL, cache, meter)
        if not bool(keep_BL.any()):
            continue
        x_BLD, score_BL = _visit(blocks, layer, x_BLD, tokens, keep_BL, cache, meter, wants_scores(layer), own_only)
        if score_BL is not None:
            table.update(score_BL, keep_BL)
    return x_BLD, torch.stack(kept)


def _visit(
    blocks: GatheredBlocks,
    layer: int,
    x_BLD: Tensor,
    tokens: Tokens,
    keep_BL: Tensor,
    cache: BlockCache,
    meter: Meter | None,
    wants_scores: bool,
    own_only: bool,
) -> tuple[Tensor, Tensor | None]:
    """(x_BLD behind the block, new scores of the tokens it computed at their places, if wanted)."""
    is_whole = bool(keep_BL.all())
    place_BK, real_BK = (None, None) if is_whole else gather_places(keep_BL)
    position_BK = tokens.position_BL if place_BK is None else tokens.position_BL.gather(1, place_BK)
    attend = Attending(cache, position_BK, real_BK, wants_scores=wants_scores, own_only=own_only)
    if place_BK is None:
        y_BLD = blocks.run(layer, x_BLD, position_BK, attend)
        score_BL = attend.score_BK
    else:
        place_BKD = place_BK.unsqueeze(2).expand(-1, -1, x_BLD.shape[2])
        x_BKD = x_BLD.gather(1, place_BKD)
        y_BKD = blocks.run(layer, x_BKD, position_BK, attend, real_BK=real_BK).to(x_BLD.dtype)
        if real_BK is not None:
            y_BKD = torch.where(real_BK.unsqueeze(2), y_BKD, x_BKD)
        y_BLD = x_BLD.scatter(1, place_BKD, y_BKD)
        score_BL = None
        if attend.score_BK is not None:
            score_BL = torch.zeros_like(keep_BL, dtype=torch.float32).scatter(1, place_BK, attend.score_BK)
    if meter is not None:
        meter.add(layer, int(keep_BL.sum()), attend.pairs)
        if wants_scores:
            meter.add_scores(layer, attend.pairs)
    return y_BLD, score_BL


def _keep_keys(
    blocks: GatheredBlocks,
    layer: int,
    x_BLD: Tensor,
    tokens: Tokens,
    skipped_BL: Tensor,
    cache: BlockCache,
    meter: Meter | None,
) -> None:
    """Store keys and values of tokens that a block passes over."""
    if not bool(skipped_BL.any()):
        return
    place_BK, real_BK = gather_places(skipped_BL)
    x_BKD = x_BLD.gather(1, place_BK.unsqueeze(2).expand(-1, -1, x_BLD.shape[2]))
    position_BK = tokens.position_BL.gather(1, place_BK)
    cache.append(*keys_of(blocks, layer, x_BKD, position_BK), position_BK, real_BK)
    if meter is not None:
        meter.add_keys(layer, int(skipped_BL.sum()) * blocks.count_keys(layer))
