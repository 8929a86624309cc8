"""ReLU routing: every destination whose logit is above 0 is chosen, and weighs as much as its logit (ReMoE, arXiv 2412.14711; ReMoH of
PVChat, arXiv 2503.17069).

    z = W x + b,    g = min(max(z, 0), cap)

No number of choices is set: how many destinations an item goes to follows from z, and `anabranch.routing.rate` keeps that from drifting to
all or to none.
"""
# Shapes: N items, E destinations, D width

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.config import Field, configclass
from anabranch.precision import cast, full_precision, wide
from anabranch.routing.context import RoutingContext
from anabranch.routing.decision import UNUSED
from anabranch.routing.score import Score
from anabranch.routing.select import Select

__all__ = ["Positive", "ReluScore"]


class ReluScore(Score, kind="relu"):
    """z = W x + b and g = min(max(z, 0), cap). Meant for `Positive`; ``activation`` says nothing here."""

    @configclass
    class Config(Score.Config):
        """Settings.

        Attributes:
            start: b at the start. With ``zero`` weights every item weighs every destination by it.
            zero: W is 0 at the start, and not N(0, init_std).
            noisy_start: b is drawn as W is, around ``start``.
            cap: the largest weight; above it there is no gradient.
            floor: z is clamped to it, so that logits below have no gradient any more (PVChat's code: -1); None for no such floor.
        """

        start: float = 0.0
        zero: bool = False
        noisy_start: bool = False
        cap: float = Field(default=10.0, gt=0)
        floor: float | None = Field(default=None, le=0)

        def num_parameters(self, dim: int, num_destinations: int) -> int:
            """E D, and E of the bias."""
            return num_destinations * (dim + 1)

    config: Config

    def __init__(
        self, config: Config, dim: int, num_destinations: int, *, generator: torch.Generator | None = None
    ) -> None:
        super().__init__(config)
        self.weight = nn.Parameter(torch.zeros(num_destinations, dim))
        self.bias = nn.Parameter(torch.full((num_destinations,), config.start))
        if not config.zero:
            nn.init.normal_(self.weight, std=config.init_std, generator=generator)
        if config.noisy_start:
            nn.init.normal_(self.bias, mean=config.start, std=config.init_std, generator=generator)

    def project(self, x_ND: Tensor, context: RoutingContext) -> Tensor:
        """z_NE."""
        x_ND = wide(x_ND)
        with full_precision(x_ND.device.type):
            logit_NE = F.linear(x_ND, cast(self.weight, x_ND.dtype), cast(self.bias, x_ND.dtype))
        return logit_NE if self.config.floor is None else logit_NE.clamp(self.config.floor, self.config.cap)

    def activate(self, logit_NE: Tensor) -> Tensor:
        """g_NE."""
        return logit_NE.clamp(max=self.config.cap).relu()


class Positive(Select, kind="positive"):
    """Every destination whose selection value is above 0: none, some or all of them."""

    @configclass
    class Config(Select.Config):
        """Nothing more to choose."""

        def most_choices(self, num_destinations: int) -> int:
            """All."""
            return num_destinations

    config: Config

    def choose(self, value_NE: Tensor) -> Tensor:
        """index_NE: destination e is choice e of the items that take it."""
        index_NE = torch.arange(self.num_destinations, device=value_NE.device).expand_as(value_NE)
        return index_NE.masked_fill(~(value_NE > 0), UNUSED)
