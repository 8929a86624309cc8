"""Layers behind a gate of what they take, g = sigmoid(v . x + c), one number for each token.

    GatedLowRank      y + g scale B A x                    PHATGOOSE (arXiv 2402.05859), without c; UniPELT (arXiv 2110.07577)
    GatedBottleneck   y + g (U act(D y + e) + f)           UniPELT; the gate is of y

Gates start as 1/2. UniPELT's code takes their mean over a sequence; a decoder has not seen its end when it computes its beginning, so here
each token has its own.
"""
# Shapes: C inputs, O outputs, R rank

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.adapters.after import SerialBottleneck
from anabranch.adapters.low_rank import LowRank, Pair
from anabranch.adapters.numbers import Numbers
from anabranch.config import configclass
from anabranch.errors import ConfigError
from anabranch.nn import BuildContext, Count
from anabranch.nn.linear import Projection, Rows

__all__ = ["GatedBottleneck", "GatedLowRank"]


class GatedLowRank(LowRank, kind="gated_low_rank"):
    """g scale B A x.

    Attributes:
        gate: parameter [C], v; 0 at first.
        gate_bias: parameter [1], c, where there is one.
    """

    @configclass
    class Config(LowRank.Config):
        """As of `LowRank`, and ``biased``: whether the gate has a c."""

        biased: bool = False

        def count(self, projection: Projection, context: BuildContext) -> Count:
            """R (C + O) weights, and C of the gate, with its c."""
            weights = self.rank * (projection.in_dim + projection.out_dim) + projection.in_dim
            return Count.dense(weights) + Count(self.biased, self.biased, 0)

    def __init__(self, config: Config, projection: Projection, context: BuildContext) -> None:
        super().__init__(config, projection, context)
        self.gate = nn.Parameter(torch.zeros(projection.in_dim))
        self.gate_bias = nn.Parameter(torch.zeros(1)) if config.biased else None

    def forward(self, x: Tensor, context: Any = None) -> Tensor:
        """What is added to y."""
        gate = F.linear(x.to(self.gate.dtype), self.gate.unsqueeze(0), self.gate_bias).sigmoid()
        return gate * self.product(self.dropped(x))

    def numbers(self) -> Numbers:
        """There are none that peft, or a matrix, could have. Raises ConfigError."""
        raise ConfigError("LoRA behind a gate is in no matrix, and in no adapter of peft's; leave it beside")

    def put(self, pair: Pair, device: torch.device | None = None, *, trainable: bool = False) -> None:
        """Take over the numbers of a pair; the gate is 0 and learns, the pair does so if ``trainable``."""
        super().put(pair, device, trainable=trainable)
        self.gate = nn.Parameter(torch.zeros(self.a.shape[1], device=device))
        if self.gate_bias is not None:
            self.gate_bias = nn.Parameter(torch.zeros(1, device=device))


class GatedBottleneck(SerialBottleneck, kind="gated_bottleneck"):
    """y + g (U act(D y + e) + f).

    Attributes:
        gate: parameter [O], v; 0 at first.
        gate_bias: parameter [1], c.
    """

    @configclass
    class Config(SerialBottleneck.Config):
        """As of `SerialBottleneck`."""

        def count(self, projection: Projection, context: BuildContext) -> Count:
            """As of `SerialBottleneck`, and O + 1 of the gate."""
            weights = 2 * self.width * projection.out_dim + projection.out_dim
            biases = self.width + projection.out_dim + 1
            return Count.dense(weights) + Count(biases, biases, 0)

    def __init__(self, config: Config, projection: Projection, context: BuildContext) -> None:
        super().__init__(config, projection, context)
        self.gate = nn.Parameter(torch.zeros(projection.out_dim))
        self.gate_bias = nn.Parameter(torch.zeros(1))

    def around(self, rows: Rows, context: Any = None) -> Tensor:
        """y. It is computed in the adapter's type, which may be wider than that of the matrix."""
        y = rows.y.to(self.down.dtype)
        gate = F.linear(y, self.gate.unsqueeze(0), self.gate_bias).sigmoid()
        return (y + gate * self.made(y)).to(rows.y.dtype)
