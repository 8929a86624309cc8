"""Linear layers that several test files put into models."""

from typing import Any

import torch
from torch import nn

from anabranch.config import configclass
from anabranch.nn import Count, Linear


class LowRank(Linear):
    """What stands beside a matrix: B A x, with the name it was built by and the (x, context) it was given. B is zero at first."""

    @configclass
    class Config(Linear.Config):
        is_added = True
        rank: int = 2

        def count(self, projection, context):
            return Count.dense(self.rank * (projection.in_dim + projection.out_dim))

    def __init__(self, config: Any, projection, context) -> None:
        nn.Module.__init__(self)
        self.name = projection.name
        self.seen: list[tuple[Any, Any]] = []
        self.a = nn.Parameter(torch.empty(config.rank, projection.in_dim))
        self.b = nn.Parameter(torch.zeros(projection.out_dim, config.rank))
        nn.init.normal_(self.a, std=0.3, generator=context.generator)

    def forward(self, x, context=None):
        self.seen.append((x, context))
        return x @ self.a.T @ self.b.T


class Beside(LowRank):
    """The same, whose B is drawn too."""

    @configclass
    class Config(LowRank.Config):
        pass

    def __init__(self, config: Any, projection, context) -> None:
        super().__init__(config, projection, context)
        nn.init.normal_(self.b, std=0.3, generator=context.generator)
