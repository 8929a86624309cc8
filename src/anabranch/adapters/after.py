"""Layers behind a matrix: what comes out of it goes through them.

    SerialBottleneck   y <- y + U act(D y + e) + f       an adapter in series (Houlsby et al. 2019, arXiv 1902.00751)
    ScaleShift         y <- g * y + b                    SSF (Lian et al. 2022, arXiv 2210.08823)
    Shift              y <- y + b                        a bias, be the matrix with or without one (BitFit in S4)

Behind the last matrix of attention or of a feed-forward layer (``o``, ``down``), a bottleneck is the adapter of its papers: of the
sublayer's output, before it is added to the stream.
"""
# Shapes: C inputs, O outputs, M width; y is [..., O]

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.adapters.bottleneck import ACTIVATIONS
from anabranch.adapters.low_rank import draw_a
from anabranch.bounds import Size
from anabranch.config import Field, configclass
from anabranch.errors import ConfigError
from anabranch.nn import BuildContext, Count, Linear
from anabranch.nn.linear import Projection, Rows

__all__ = ["ScaleShift", "SerialBottleneck", "Shift"]


class SerialBottleneck(Linear, kind="serial_bottleneck"):
    """y + U act(D y + e) + f of what comes out of the matrix. U and f are zero at first, so it is y."""

    @configclass
    class Config(Linear.Config):
        """Its numbers.

        Attributes:
            width: M.
            activation: what is between the two matrices.
        """

        is_added: ClassVar[bool] = True

        width: Size = Field(default=64, ge=1)
        activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"

        def count(self, projection: Projection, context: BuildContext) -> Count:
            """2 M O weights, and M + O of biases."""
            biases = self.width + projection.out_dim
            return Count.dense(2 * self.width * projection.out_dim) + Count(biases, biases, 0)

    def __init__(self, config: Config, projection: Projection, context: BuildContext) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.down = nn.Parameter(torch.empty(config.width, projection.out_dim))
        self.down_bias = nn.Parameter(torch.zeros(config.width))
        self.up = nn.Parameter(torch.zeros(projection.out_dim, config.width))
        self.up_bias = nn.Parameter(torch.zeros(projection.out_dim))
        draw_a(self.down.data, context.generator)

    def around(self, rows: Rows, context: Any = None) -> Tensor:
        """y. It is computed in the adapter's type, which may be wider than that of the matrix."""
        y = rows.y.to(self.down_bias.dtype)
        return (y + self.made(y)).to(rows.y.dtype)

    def made(self, y: Tensor) -> Tensor:
        """U act(D y + e) + f."""
        low = ACTIVATIONS[self.config.activation](F.linear(y, self.down, self.down_bias))
        return F.linear(low, self.up, self.up_bias)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"out={self.up.shape[0]}, width={self.config.width}, {self.config.activation}"


class ScaleShift(Linear, kind="scale_shift"):
    """g * y + b of what comes out of the matrix. It starts as y."""

    @configclass
    class Config(Linear.Config):
        """Nothing to choose."""

        is_added: ClassVar[bool] = True

        def count(self, projection: Projection, context: BuildContext) -> Count:
            """A factor and a shift for each output."""
            return Count(2 * projection.out_dim, 2 * projection.out_dim, 2 * projection.out_dim)

    def __init__(self, config: Config, projection: Projection, context: BuildContext) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.factor = nn.Parameter(torch.ones(projection.out_dim))
        self.shift = nn.Parameter(torch.zeros(projection.out_dim))

    def around(self, rows: Rows, context: Any = None) -> Tensor:
        """y, computed in the adapter's type for the moment."""
        return torch.addcmul(self.shift, rows.y.to(self.factor.dtype), self.factor).to(rows.y.dtype)

    def merged(self, weight_OC: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What the matrix and its bias are with it in. Raises ConfigError for a shift where there is no bias."""
        if bias_O is None and bool(self.shift.any()):
            raise ConfigError("a shift was learned, and the matrix has no bias to take it in; leave it beside")
        kind = torch.promote_types(weight_OC.dtype, self.factor.dtype)
        made_OC = (weight_OC.to(kind) * self.factor.unsqueeze(1)).to(weight_OC.dtype)
        if bias_O is None:
            return made_OC, None
        return made_OC, torch.addcmul(self.shift.to(kind), bias_O.to(kind), self.factor.to(kind)).to(bias_O.dtype)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"out={len(self.factor)}"


class Shift(Linear, kind="shift"):
    """y + b of what comes out of the matrix. It starts as y."""

    @configclass
    class Config(Linear.Config):
        """Nothing to choose."""

        is_added: ClassVar[bool] = True

        def count(self, projection: Projection, context: BuildContext) -> Count:
            """A number for each output."""
            return Count(projection.out_dim, projection.out_dim, projection.out_dim)

    def __init__(self, config: Config, projection: Projection, context: BuildContext) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.shift = nn.Parameter(torch.zeros(projection.out_dim))

    def around(self, rows: Rows, context: Any = None) -> Tensor:
        """y, computed in the adapter's type for the moment."""
        return (rows.y.to(self.shift.dtype) + self.shift).to(rows.y.dtype)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"out={len(self.shift)}"
