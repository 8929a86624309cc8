"""`Prefix`: what a model makes of a text before its first router, which no vector changes: computed once for all passes of a phase 1.

No gradient goes there either: it begins at the first router. Of a model whose every block routes that is the embedding and the first
attention; of one with dense blocks in front, those too.
"""
# Shapes: B rows, L positions, D width, C passes side by side

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.lm.cache import KeyValueCache
from anabranch.lm.decoder import Decoder
from anabranch.nn.block import PreNorm
from anabranch.nn.context import ForwardContext
from anabranch.routing.discovery import RouterLayer

__all__ = ["Prefix"]


class Prefix:
    """See above.

    Args:
        model: a decoder.
        layers: its routers that vectors turn.

    Attributes:
        is_there: whether there is anything that can be kept: not of models that run as parallel streams, whose blocks, or hidden states,
            are made in other ways, or whose blocks somebody watches.
        cache: keys and values of the layers that are run here; None where they were not asked for, or nothing is kept.
    """

    def __init__(self, model: Decoder, layers: Sequence[RouterLayer]) -> None:
        self._block = _first_routed(model, {layer.router for layer in layers})
        blocks: list[Any] = list(model.blocks)[: self._block + 1]
        last = blocks[-1]
        self.is_there = (
            type(model).hidden is Decoder.hidden
            and model.streams is None
            and type(last) is PreNorm
            and not any(_is_watched(block) for block in blocks)
            and not any(hasattr(module, "is_router") for module in (*last.attention.modules(), *_all(blocks[:-1])))
        )
        self._x_BLD: Tensor | None = None
        self.cache: KeyValueCache | None = None

    @torch.no_grad()
    def keep(self, model: Decoder, token_BL: Tensor, context: ForwardContext) -> None:
        """Compute it, of the whole text; keys and values too where the context has an empty cache."""
        x_BLD = model.embed(token_BL)
        *before, last = list(model.blocks)[: self._block + 1]
        for block in before:
            x_BLD = block(x_BLD, context)
        x_BLD = x_BLD + last.attention(last.attention_norm(x_BLD), context)  # type: ignore[operator]
        # What blocks hand on beside would be missing in the passes that do not run them.
        self.is_there = self.is_there and context.path is None and not context.carry
        self._x_BLD = x_BLD if self.is_there else None
        self.cache = context.cache if self.is_there and isinstance(context.cache, KeyValueCache) else None

    def hidden(self, model: Decoder, token_BL: Tensor, context: ForwardContext) -> Tensor:
        """`Decoder.hidden` of the text's first positions: of its rows, or of these several times, one after another."""
        if self._x_BLD is None:
            return model.hidden(token_BL, context)
        rows, length = token_BL.shape
        x_BLD = self._x_BLD[:, :length]
        if rows != len(x_BLD):
            x_BLD = x_BLD.repeat(rows // len(x_BLD), 1, 1)
        last, *others = list(model.blocks)[self._block :]
        x_BLD = last.feed_forward.add_to(x_BLD, last.feed_forward_norm, context)  # type: ignore[operator,union-attr]
        for block in others:
            # The rest of that first block is kept for the backward pass even where blocks are run again.
            x_BLD = model._run(block, x_BLD, context)
        if isinstance(context.cache, KeyValueCache):
            context.cache.advance(length)
        made: Tensor = model.norm(x_BLD)
        return made


def _first_routed(model: Decoder, routers: set[nn.Module]) -> int:
    """The number of the first block that has one of these."""
    for number, block in enumerate(model.blocks):
        if any(module in routers for module in block.modules()):
            return number
    # A pool that blocks share may have them: all of it may route.
    return 0


def _all(blocks: Sequence[nn.Module]) -> list[nn.Module]:
    return [module for block in blocks for module in block.modules()]


def _is_watched(block: nn.Module) -> bool:
    """Whether somebody listens to the block itself or to its attention, or took the place of what they compute."""
    parts = [block, *(part for name, part in block.named_children() if name == "attention")]
    return any("forward" in vars(part) or part._forward_hooks or part._forward_pre_hooks for part in parts)
