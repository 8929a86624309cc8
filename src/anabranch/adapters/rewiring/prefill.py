"""`Prefill`: keys and values of the last pass of a phase 1, with which phase 2 goes on: that pass has read the whole text already.

The pass that measures what a phase came to runs the text with each candidate; its rows of the vectors that were chosen are what a prefill
with these would compute.
"""
# Shapes: B rows, L positions, V vocabulary

import torch
from torch import Tensor

from anabranch.adapters.rewiring.prefix import Prefix
from anabranch.lm.cache import KeyValueCache

__all__ = ["Prefill"]


class Prefill:
    """What decoding can begin with.

    Attributes:
        cache: of the texts that were fitted, with room for nothing more; None where no pass ran on all of them whole.
        logits_BV: behind their last tokens.
    """

    def __init__(self) -> None:
        self.cache: KeyValueCache | None = None
        self.logits_BV: Tensor | None = None

    def take(self, cache: KeyValueCache, logits_BV: Tensor, row_B: Tensor, prefix: Prefix) -> None:
        """The rows ``row_B`` of a pass, and what was computed of these texts before it."""
        cache.keep_rows(row_B)
        if prefix.cache is not None:
            cache.take_layers(prefix.cache)
        self.cache, self.logits_BV = cache, logits_BV[row_B]

    def spread(self, rows: list[int]) -> None:
        """Some of the texts, or some several times."""
        if self.cache is None or self.logits_BV is None or rows == list(range(len(self.logits_BV))):
            return
        row_B = torch.tensor(rows, device=self.logits_BV.device)
        self.cache.keep_rows(row_B)
        self.logits_BV = self.logits_BV[row_B]
