"""`Bottleneck`: a small network beside a matrix, y = W x + s (U act(D x + e) + f): the parallel adapter (He et al., arXiv 2110.04366).

    Decoder.Config(linears={"blocks.*.down": Bottleneck.Config(width=16)})

Beside each linear layer that a pattern names, where the paper puts one beside a whole attention or feed-forward layer. U and f are zero at
first, so nothing is added. What is between its matrices bends, so that no matrix computes it: it cannot be merged.
"""
# Shapes: C inputs, O outputs, M width; x is [..., C], y is [..., O]

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.adapters.low_rank import draw_a
from anabranch.bounds import Size
from anabranch.config import Field, configclass
from anabranch.nn import BuildContext, Count, Linear
from anabranch.nn.linear import Projection

__all__ = ["ACTIVATIONS", "Bottleneck"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class Bottleneck(Linear, kind="bottleneck"):
    """s (U act(D x + e) + f), which stands beside the matrix that it adapts."""

    @configclass
    class Config(Linear.Config):
        """Its numbers.

        Attributes:
            width: M.
            activation: what is between the two matrices.
            scale: s, 4 in the paper's best settings.
        """

        is_added: ClassVar[bool] = True

        width: Size = Field(default=16, ge=1)
        activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"
        scale: float = 4.0

        def count(self, projection: Projection, context: BuildContext) -> Count:
            """M (C + O) weights, and M + O of biases."""
            biases = self.width + projection.out_dim
            return Count.dense(self.width * (projection.in_dim + projection.out_dim)) + Count(biases, biases, 0)

    def __init__(self, config: Config, projection: Projection, context: BuildContext) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.down = nn.Parameter(torch.empty(config.width, projection.in_dim))
        self.down_bias = nn.Parameter(torch.zeros(config.width))
        self.up = nn.Parameter(torch.zeros(projection.out_dim, config.width))
        self.up_bias = nn.Parameter(torch.zeros(projection.out_dim))
        draw_a(self.down.data, context.generator)

    def forward(self, x: Tensor, context: Any = None) -> Tensor:
        """What is added to y. It is computed in the adapter's type, which may be wider than that of ``x``."""
        low = ACTIVATIONS[self.config.activation](F.linear(x.to(self.down.dtype), self.down, self.down_bias))
        return F.linear(low, self.up, self.up_bias) * self.config.scale

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        width, in_dim = self.down.shape
        return (
            f"in={in_dim}, out={self.up.shape[0]}, width={width}, {self.config.activation}, scale={self.config.scale:g}"
        )
