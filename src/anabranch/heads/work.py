"""`Work`: what came by routed heads, and what of it was computed."""
# Shapes: M routed heads

from dataclasses import dataclass

import torch
from torch import Tensor

from anabranch.routing import Routing, RoutingContext

__all__ = ["Work"]


@dataclass
class Work:
    """Counts since the last `forget`; multiply-adds are those of the matrices and of scores and sums, without softmax and the gate.

    Attributes:
        fired_M: of each routed head, for how many tokens it was on; float64. None before the first pass.
        tokens: that came by, without padding; a tensor where a mask says which are real.
        needed, possible: multiply-adds that were computed, and that the plain attention computes.
        pairs, all_pairs: (head, token) pairs that were computed, counted by blocks, and all.
    """

    fired_M: Tensor | None = None
    tokens: Tensor | int = 0
    needed: int = 0
    possible: int = 0
    pairs: int = 0
    all_pairs: int = 0

    @torch.no_grad()
    def add_routing(self, routing: Routing, context: RoutingContext) -> None:
        """Count who was on; nothing waits for a device."""
        load_M, mask_N = routing.load_E().double(), context.item_mask_N
        self.fired_M = load_M if self.fired_M is None else self.fired_M.to(load_M.device) + load_M
        self.tokens = self.tokens + (routing.num_items if mask_N is None else mask_N.sum())

    def add(
        self, *, by_head: int, others: int, core: int, pairs: int, share: float = 1.0, share_by_head: float = 1.0
    ) -> None:
        """Count the work of one pass.

        Args:
            by_head: multiply-adds of the products before and behind attention that are made head by head.
            others: of keys and values, which later tokens may want whoever is off now.
            core: of scores and of sums of values.
            pairs: heads times queries.
            share: of the pairs that was computed.
            share_by_head: share of ``by_head`` that was computed.
        """
        self.possible += by_head + others + core
        self.needed += round(by_head * share_by_head + core * share) + others
        self.all_pairs += pairs
        self.pairs += round(pairs * share)

    def forget(self) -> None:
        """Start anew."""
        self.fired_M, self.tokens = None, 0
        self.needed = self.possible = self.pairs = self.all_pairs = 0
