"""`HybridEntropy`: all destinations where an item's scores are undecided, the few that hold the mass where they are decided.

The routing of DynMoLE (arXiv 2504.00661):

    p    = scores as shares of the open destinations, c_j their cumulative sum in falling order
    keep   rank j if c_j <= top_p, and always the first keep_top_k
    keep   all, where the entropy of p is above the threshold

Weights are the kept scores, not made to sum to 1: a sparse item's output is scaled by the mass that was kept. ``normalize="sum"`` divides.
"""
# Shapes: N items, E destinations, K = E choices per item

from typing import Literal

import torch
from torch import Tensor

from anabranch.config import Field, configclass
from anabranch.errors import ConfigError
from anabranch.routing.decision import UNUSED, Routing
from anabranch.routing.select import Select, stable_top_k
from anabranch.routing.uncertainty import EntropyKind, shares, uncertainty

__all__ = ["HybridEntropy"]

# Sums of shares are compared with it to spare: 0.25 + 0.2 + 0.15 + 0.15 must not exceed 0.75 by rounding.
_SLACK = 1e-6


class HybridEntropy(Select, kind="hybrid_entropy"):
    """Sparse or soft, item by item, by how undecided its scores are; see the top of this file."""

    @configclass
    class Config(Select.Config):
        """When and what to drop.

        Attributes:
            top_p: mass that sparse items keep, in (0, 1].
            keep_top_k: destinations that every item keeps.
            entropy_threshold: above it an item keeps all; 1 or more: none does.
            entropy: kind of `uncertainty`.
            entropy_index: q of it, in (0, 2].
            nucleus: ``exclusive`` drops the destination with which the sum crosses ``top_p``, as the paper's code does; ``inclusive``
                keeps it, as nucleus sampling does.
        """

        top_p: float = Field(default=0.75, gt=0, le=1)
        keep_top_k: int = Field(default=2, ge=1)
        entropy_threshold: float = Field(default=0.9, gt=0)
        entropy: EntropyKind = "tsallis"
        entropy_index: float = Field(default=1.1, gt=0, le=2)
        nucleus: Literal["exclusive", "inclusive"] = "exclusive"

        def most_choices(self, num_destinations: int) -> int:
            """All of them."""
            return num_destinations

        def check(self, num_destinations: int) -> None:
            """At most all are kept."""
            if self.keep_top_k > num_destinations:
                raise ConfigError(
                    f"keep_top_k is {self.keep_top_k}, but there are {num_destinations} destinations; use 1 to {num_destinations}"
                )

    config: Config

    def forward(
        self,
        score_NE: Tensor,
        *,
        logit_NE: Tensor | None = None,
        bias_E: Tensor | None = None,
        open_NE: Tensor | None = None,
    ) -> Routing:
        """As `Select`. A bias changes the order alone: mass and entropy are of the scores."""
        value_NE = score_NE.detach()
        share_NE = shares(value_NE, open_NE)
        value_NE = value_NE if bias_E is None else value_NE + bias_E
        if open_NE is not None:
            value_NE = value_NE.masked_fill(~open_NE, -torch.inf)
        return self.weigh(self._kept(value_NE, share_NE), score_NE, logit_NE)

    def choose(self, value_NE: Tensor) -> Tensor:
        """index_NE in falling order of the values, which are scores, what is dropped left unused."""
        return self._kept(value_NE, shares(value_NE.clamp_min(0.0)))

    def _kept(self, value_NE: Tensor, share_NE: Tensor) -> Tensor:
        config = self.config
        index_NE = stable_top_k(value_NE, self.num_destinations)
        share_NK = share_NE.gather(-1, index_NE)
        through_NK = share_NK.cumsum(-1)
        if config.nucleus == "exclusive":
            keep_NK = through_NK <= config.top_p + _SLACK
        else:
            keep_NK = through_NK - share_NK < config.top_p - _SLACK
        keep_NK = keep_NK | (torch.arange(self.num_destinations, device=value_NE.device) < config.keep_top_k)
        is_open_NE = value_NE > -torch.inf
        if config.entropy_threshold < 1:
            entropy_N = uncertainty(share_NE, config.entropy, config.entropy_index, is_open_NE.sum(-1))
            keep_NK = keep_NK | (entropy_N > config.entropy_threshold).unsqueeze(-1)
        return index_NE.masked_fill(~(keep_NK & is_open_NE.gather(-1, index_NE)), UNUSED)
