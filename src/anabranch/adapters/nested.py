"""`NestedLowRank`: LoRA of which every lower rank works too: each step trains a random one (DyLoRA, Valipour et al., arXiv 2210.07558).

    Decoder.Config(linears={"blocks.*.attention.q": NestedLowRank.Config(rank=16)})

A step draws b and computes with the first b rows of A and columns of B, scaled by alpha / b; so `at` may cut the adapter to any rank
afterwards. Of the paper's two forms this is the one that updates all b of them.
"""
# Shapes: C inputs, O outputs, R rank; x is [..., C], y is [..., O]

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from anabranch.adapters.low_rank import LowRank, Pair, scale_of
from anabranch.bounds import Size
from anabranch.config import Field, configclass
from anabranch.errors import ConfigError
from anabranch.nn import BuildContext
from anabranch.nn.linear import Projection

__all__ = ["NestedLowRank"]


class NestedLowRank(LowRank, kind="nested_low_rank"):
    """scale_b B_b A_b x with the first b of R ranks, b drawn for each step of training."""

    @configclass
    class Config(LowRank.Config):
        """Those of `LowRank`, and ``least``, the lowest rank that is drawn."""

        least: Size = Field(default=1, ge=1)

        def __post_init__(self) -> None:
            if self.least > self.rank:
                raise ConfigError(f"least is {self.least}; it must be at most rank={self.rank}")

    def __init__(self, config: Config, projection: Projection, context: BuildContext) -> None:
        super().__init__(config, projection, context)
        self.least, self.used = config.least, config.rank

    def before_step(self, step: int, fraction: float) -> None:
        """Draw b: one for all layers, of the seed that the trainer has set for this step."""
        generator = torch.Generator().manual_seed(torch.initial_seed())
        self.used = int(torch.randint(self.least, self.config.rank + 1, (), generator=generator))

    def forward(self, x: Tensor, context: Any = None) -> Tensor:
        """What is added to y: by the rank of the step in training, by all of them otherwise."""
        rank = self.used if self.training else self.config.rank
        scale = scale_of(rank, self.config.alpha, self.config.rslora)
        return F.linear(F.linear(self.dropped(x), self.a[:rank]), self.b[:, :rank]) * scale

    def at(self, rank: int) -> Pair:
        """The adapter of a lower rank. Raises ConfigError for one that was not trained."""
        if not self.least <= rank <= self.config.rank:
            raise ConfigError(f"rank is {rank}; this adapter has {self.least} to {self.config.rank}")
        a_RC, b_OR = self.a[:rank].detach(), self.b[:, :rank].detach()
        return Pair(a_RC, b_OR, self.config.alpha, self.config.rslora)
