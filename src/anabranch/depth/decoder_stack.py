"""Our decoder as a stack of blocks. Each method is a part of `Decoder.forward`; visits and rows are `anabranch.nn.visits`."""
# Shapes: B sequences, L new positions, D width

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from anabranch.depth.fingerprint import fingerprint_of
from anabranch.depth.seen import check_mask, check_padding, check_positions, seen_pairs
from anabranch.errors import ConfigError
from anabranch.lm.cache import KeyValueCache
from anabranch.lm.decoder import Decoder
from anabranch.lm.token_ids import check_batch
from anabranch.nn.attention import distinct
from anabranch.nn.context import ForwardContext
from anabranch.nn.visits import on_rows

__all__ = ["DecoderPass", "DecoderStack"]


@dataclass
class DecoderPass:
    """The state of a pass.

    Attributes:
        context: what travels down the blocks.
        length: L.
        cache: of the pass; None for none.
        is_ended: whether the new positions have been counted in the cache.
    """

    context: ForwardContext
    length: int
    cache: KeyValueCache | None = None
    is_ended: bool = False


class DecoderStack:
    """See `anabranch.depth.BlockStack`.

    Raises ConfigError for a decoder with streams, whose rows of a sequence would have to be decided on together.
    """

    def __init__(self, model: Decoder) -> None:
        if model.streams is not None:
            raise ConfigError(
                "depth routing decides for each sequence, and this decoder runs each in parallel streams; give one without streams"
            )
        self.module: Decoder = model

    @property
    def layers(self) -> nn.ModuleList:
        """The blocks."""
        return self.module.blocks

    @property
    def num_blocks(self) -> int:
        """How many there are, numbered from 0."""
        return len(self.module.blocks)

    @property
    def width(self) -> int:
        """D, of the residual stream."""
        return self.module.config.dim

    @property
    def vocabulary(self) -> int:
        """Tokens that there are."""
        return self.module.config.vocab_size

    @property
    def max_positions(self) -> int:
        """Longest sequence that the model is meant for."""
        return self.module.config.max_positions

    @property
    def device(self) -> torch.device:
        """Of the embedding."""
        return self.module.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the embedding."""
        return self.module.embedding.weight.dtype

    def embed(
        self,
        token_BL: Tensor,
        attention_mask: Tensor | None = None,
        *,
        position_BL: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> tuple[Tensor, DecoderPass]:
        """See `BlockStack.embed`."""
        check_batch(token_BL, self.module.config.vocab_size)
        mask_BL = check_mask(attention_mask, token_BL)
        if cache is not None:
            config = self.module.config
            windows = [getattr(config.attention_of(layer), "window", None) for layer in range(self.num_blocks)]
            check_padding(mask_BL, cache.length, has_window=any(windows))
        context = self.module.context(token_BL, cache=cache, token_mask_BL=mask_BL)
        if position_BL is not None:
            context.position_BL = check_positions(position_BL, token_BL)
            angles = self.module.rotary(distinct(context.position_BL), self.module._dtype(token_BL.device))
            context.rotary = angles
        return self.module.embed(token_BL), DecoderPass(context, token_BL.shape[1], cache)

    def block(self, layer: int, x_BLD: Tensor, state: DecoderPass, *, rows: Sequence[int] | None = None) -> Tensor:
        """See `BlockStack.block`."""
        run = partial(self.module._run, self.module.blocks[layer])
        return run(x_BLD, state.context) if rows is None else on_rows(run, x_BLD, state.context, rows)

    def fork(self, state: DecoderPass) -> DecoderPass:
        """See `BlockStack.fork`. Raises ConfigError for a pass with a cache, which has one past."""
        if state.cache is not None:
            raise ConfigError("a pass with a key-value cache cannot be forked; run the branches without a cache")
        return replace(state, context=state.context.fork())

    def head(self, x_BLD: Tensor, state: DecoderPass, *, last_only: bool = False) -> Tensor:
        """See `BlockStack.head`."""
        keep_L = torch.tensor([state.length - 1], device=x_BLD.device) if last_only else None
        normed = self.module.norm(x_BLD if keep_L is None else x_BLD[:, keep_L])
        logits_BLV = self.module.logits(normed, state.context, keep_L=keep_L)
        if not state.is_ended:
            state.is_ended = True
            if state.cache is not None:
                state.cache.advance(state.length)
            state.context.commit()
        return logits_BLV

    def count(self, layer: int, length: int, context: int) -> int:
        """See `BlockStack.count`; of routed feed-forward layers, what a token uses."""
        by_token, by_pair = self._costs[layer]
        window = getattr(self.module.config.attention_of(layer), "window", None)
        return by_token * length + by_pair * seen_pairs(length, context, window)

    @cached_property
    def _costs(self) -> list[tuple[int, int]]:
        """(multiply-adds of a token, of a token and a position that it sees) of each block."""
        config = self.module.config
        # Attention is counted over half of the length that it is told, and a multiply-add as 2. Blocks are counted in order, as some share.
        one, two = ([config.block.count(at, length).flops for at in config.contexts()] for length in (1, 2))
        return [((2 * first - second) // 2, second - first) for first, second in zip(one, two, strict=True)]

    def new_cache(self, max_length: int) -> KeyValueCache:
        """See `BlockStack.new_cache`. Raises ConfigError where routing of experts depends on later tokens."""
        return self.module.new_cache(max_length)

    def fingerprint(self) -> str:
        """See `BlockStack.fingerprint`."""
        sizes = {"num_blocks": self.num_blocks, "vocabulary": self.vocabulary, "width": self.width}
        return fingerprint_of(self.module, self.module.embedding, **sizes)
