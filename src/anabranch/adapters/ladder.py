"""`Ladder`: a narrow network beside a whole model, fed by the hidden states of its blocks (LST, Sung et al. 2022, arXiv 2206.06522).

    s_0 = down_0(x_0)                                            x_0: what goes into the first block
    s_i = side_i(mu_i down_i(x_i) + (1 - mu_i) s_{i-1})          mu_i = sigmoid(alpha_i / 0.1), alpha_i = 0 at first
    x_n <- x_n + up(norm(s_n))                                   behind the last block

No gradient goes through the model: its hidden states are taken as they are, so that of a training the activations of the side alone are
kept. ``up`` begins with zeros, and the whole as the model.

Departure: a side block is a gated feed-forward layer of the narrow width; the paper's are narrow transformer blocks, pruned out of the
model's. What a position knows of others comes with the model's hidden states, and a cache needs nothing more.
"""
# Shapes: B sequences, L positions, D width of the model, S of the side, F of the side's feed-forward layers

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.config import Field, Size, configclass
from anabranch.nn.block import Block, PreNorm
from anabranch.nn.context import BuildContext, Count, ForwardContext

__all__ = ["LADDERED", "Ladder"]

# In the names of a model's own parameters where it has a ladder.
LADDERED = ".laddered."
_CARRIED = "ladder"
# T of the gates in the paper, section 3.
_TEMPERATURE = 0.1


class Ladder(Block, kind="ladder"):
    """A block of the model, and the rung beside it.

    Args:
        config: of both.
        context: of the block.
        laddered: the model's block; None builds one.
    """

    @configclass
    class Config(Block.Config):
        """The block, and how narrow the side is.

        Attributes:
            inner: the model's block.
            reduction: D / S, 8 in the paper.
            expansion: F / S.
        """

        passes_gradient: ClassVar[bool] = False

        inner: Block.Config = PreNorm.Config()
        reduction: Size = Field(default=8, ge=1)
        expansion: Size = Field(default=4, ge=1)

        def width(self, dim: int) -> int:
            """S."""
            return max(1, dim // self.reduction)

        def rung(self, dim: int, layer: int, num_layers: int) -> int:
            """Numbers of the rung beside one block."""
            width = self.width(dim)
            own = dim * width + 1 + 3 * width * self.expansion * width + width
            return own + (dim * width) * (layer == 0) + (width * dim + width) * (layer == num_layers - 1)

        def count(self, context: BuildContext, sequence_length: int) -> Count:
            """Those of the block, and of its rung."""
            rung = self.rung(context.dim, context.layer, context.num_layers)
            return self.inner.count(context, sequence_length) + Count.dense(rung)

    def __init__(self, config: Config, context: BuildContext, laddered: nn.Module | None = None) -> None:
        super().__init__()
        self.config = config
        self.laddered: Any = config.inner.build(context) if laddered is None else laddered
        dim, width, hidden = context.dim, config.width(context.dim), config.expansion * config.width(context.dim)
        self.rung = nn.ModuleDict()
        if context.layer == 0:
            self.rung["start"] = nn.Linear(dim, width, bias=False)
        self.rung["down"] = nn.Linear(dim, width, bias=False)
        self.rung["norm"] = context.norm(width)
        self.rung["wide"] = nn.Linear(width, 2 * hidden, bias=False)
        self.rung["narrow"] = nn.Linear(hidden, width, bias=False)
        # With an axis, as shards need one.
        self.alpha = nn.Parameter(torch.zeros(1))
        self.is_last = context.layer == context.num_layers - 1
        if self.is_last:
            self.rung["end_norm"] = context.norm(width)
            self.rung["up"] = nn.Linear(width, dim, bias=False)
        self._draw(context)

    def _draw(self, context: BuildContext) -> None:
        for name, module in self.rung.items():
            if isinstance(module, nn.Linear) and not module.weight.is_meta:
                if name == "up":
                    nn.init.zeros_(module.weight)
                else:
                    # As wide a spread as keeps sizes through a layer.
                    nn.init.normal_(module.weight, std=module.in_features**-0.5, generator=context.generator)

    def forward(self, x_BLD: Tensor, context: ForwardContext) -> Tensor:
        """x_BLD of the next layer, which is the model's but behind the last block."""
        before = context.carry.get(_CARRIED)
        if before is None and "start" in self.rung:
            before = self._linear("start", x_BLD)
        y_BLD = self.laddered(x_BLD, context)
        side_BLS = self._linear("down", y_BLD)
        if before is not None:
            mu = (self.alpha / _TEMPERATURE).sigmoid()
            side_BLS = mu * side_BLS + (1 - mu) * before
        gate, value = self.rung["wide"](self.rung["norm"](side_BLS)).chunk(2, -1)
        side_BLS = side_BLS + self.rung["narrow"](F.silu(gate) * value)
        context.carry[_CARRIED] = side_BLS
        if not self.is_last:
            return y_BLD
        added_BLD = self.rung["up"](self.rung["end_norm"](side_BLS))
        return y_BLD.detach() + added_BLD.to(y_BLD.dtype)

    def _linear(self, name: str, x_BLD: Tensor) -> Tensor:
        """In the type of the side; the model is not learned through it."""
        module: Any = self.rung[name]
        return module(x_BLD.detach().to(self.alpha.dtype))
