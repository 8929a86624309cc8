"""`Routing`, the value every router returns: which destinations each item goes to, and with what weight."""
# Shapes: N items, E destinations, K choices per item

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from anabranch.routing.renamed import Renamed

# Index of a choice that names no destination: padding, dropped by capacity, below a threshold.
UNUSED = -1


@dataclass(frozen=True)
class Routing:
    """Where N items go. A choice that names no destination has index -1 and weight 0, and nothing is computed for it.

    Attributes:
        index_NK: int64, the destinations of each item, in [0, E) or -1.
        weight_NK: the weight of each destination's output; 0 where the index is -1.
        score_NE: the scores the choice was made from, before any selection bias; used by balancers, measures, learning.
        propensity_NK: probability with which each destination was drawn, NaN where it was not drawn; None where nothing was: a choice
            that follows from the scores has no propensity.
    """

    index_NK: Tensor
    weight_NK: Tensor
    score_NE: Tensor
    propensity_NK: Tensor | None = None

    num_places = Renamed("num_choices")

    @property
    def num_items(self) -> int:
        """N."""
        return self.index_NK.shape[0]

    @property
    def num_choices(self) -> int:
        """K, the most destinations one item can have."""
        return self.index_NK.shape[1]

    @property
    def num_destinations(self) -> int:
        """E."""
        return self.score_NE.shape[1]

    @property
    def used_NK(self) -> Tensor:
        """bool: choices that name a destination."""
        return self.index_NK >= 0

    def load_E(self) -> Tensor:
        """int64 [E]: how many items go to each destination; sums to N K when every choice is used."""
        return count_destinations(self.index_NK, self.num_destinations)

    def drop(self, dropped_NK: Tensor) -> Self:
        """The same routing with some choices made unused."""
        return replace(
            self,
            index_NK=self.index_NK.masked_fill(dropped_NK, UNUSED),
            weight_NK=self.weight_NK.masked_fill(dropped_NK, 0.0),
        )


def count_destinations(index_NK: Tensor, num_destinations: int) -> Tensor:
    """int64 [E]: how often each destination is named in ``index_NK``; unused choices do not count."""
    flat = index_NK.reshape(-1)
    # One bucket more, for unused choices: keeps the shape static, which torch.compile needs.
    bucket = torch.where(flat < 0, num_destinations, flat)
    count = torch.zeros(num_destinations + 1, dtype=torch.int64, device=flat.device)
    return count.scatter_add_(0, bucket, torch.ones_like(bucket))[:num_destinations]
