"""A decoder that runs its blocks in another order in every call: skipped, repeated, as depth routing would have them."""
# Shapes: B sequences, L positions

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from anabranch.lm.decoder import Decoder, DecoderOutput
from anabranch.nn.visits import check_path

__all__ = ["OnPath"]


class OnPath(nn.Module):
    """What `evaluate` and others call like a decoder.

    Args:
        model: is not copied.
        path: the blocks to run, in order.
        chunk: give the model so many positions at a time, with a key-value cache; None gives it the whole sequence at once.
        num_streams: of every pass, see `Decoder.forward`.

    Raises:
        ConfigError: a block that the model does not have.
    """

    def __init__(
        self,
        model: Decoder,
        path: Sequence[int] | None = None,
        *,
        chunk: int | None = None,
        num_streams: int | None = None,
    ) -> None:
        super().__init__()
        self.model, self.chunk, self.num_streams = model, chunk, num_streams
        self.path = None if path is None else check_path(path, len(model.blocks), 1)

    def forward(self, token_BL: Tensor, target_BL: Tensor | None = None, **options: Any) -> DecoderOutput:
        """As the decoder's. A target needs ``chunk`` None."""
        if self.chunk is None or target_BL is not None:
            return self.model(token_BL, target_BL, path=self.path, num_streams=self.num_streams, **options)
        cache = self.model.new_cache(token_BL.shape[1], self.num_streams)
        parts = [
            self.model(part_BL, cache=cache, path=self.path, num_streams=self.num_streams, **options).logits_BLV
            for part_BL in token_BL.split(self.chunk, dim=1)
        ]
        return DecoderOutput(torch.cat(parts, dim=1))
