"""`HashedDelta`: all adapted matrices move in one space of few dimensions, theta = theta_0 + P z (intrinsic dimension, arXiv 2012.13255).

    Decoder.Config(linears={"blocks.*.attention.*": HashedDelta.Config(size=512)})

z is one vector for the whole model, and P a fixed projection that is never stored: each entry of a matrix takes one number of z, and a
sign, by a hash of its place (one nonzero in each row of P, as in Uni-LoRA, arXiv 2506.00799; the paper has Fastfood). z is zero at first.
"""
# Shapes: C inputs, O outputs, K = size; x is [..., C], y is [..., O]

import math
import zlib
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.bounds import Size
from anabranch.config import Field, configclass
from anabranch.nn import BuildContext, Count, Linear
from anabranch.nn.context import set_unregistered
from anabranch.nn.linear import Projection

__all__ = ["HashedDelta"]

_MASK = (1 << 31) - 1


class _Shared(nn.Module):
    """z of all layers."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.z = nn.Parameter(torch.zeros(size))


class HashedDelta(Linear, kind="hashed_delta"):
    """(P z) x of one matrix, which stands beside it."""

    @configclass
    class Config(Linear.Config):
        """Its numbers.

        Attributes:
            size: K, the dimensions of all matrices of this size and seed together.
            seed: of the projection.
        """

        is_added: ClassVar[bool] = True

        size: Size = Field(default=256, ge=1)
        seed: int = Field(default=0, ge=0)

        def count(self, projection: Projection, context: BuildContext) -> Count:
            """The product of a whole matrix until it is merged; z is counted by the first layer that has it."""
            name = self.shared_name
            size = 0 if name in context.shared else self.size
            if size:
                context.shared[name] = nn.Module()
            return Count(size, size, 2 * projection.in_dim * projection.out_dim)

        @property
        def shared_name(self) -> str:
            """What the module of z is called among the model's shared ones."""
            return f"hashed_delta_{self.size}_{self.seed}"

    def __init__(self, config: Config, projection: Projection, context: BuildContext) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.in_dim, self.out_dim = projection.in_dim, projection.out_dim
        # Each matrix has its own places in z, the same in every model.
        self.salt = zlib.crc32(f"{config.seed} {projection.name}".encode()) & _MASK
        self.share(context.share(config.shared_name, lambda: _Shared(config.size)))

    shared: _Shared

    def share(self, shared: _Shared) -> None:
        """Take z from a module of the model."""
        set_unregistered(self, "shared", shared)

    def delta(self) -> Tensor:
        """delta_OC: what it adds to the matrix."""
        z_K: Tensor = self.shared.z
        place = torch.arange(self.out_dim * self.in_dim, device=z_K.device)
        # A bijection of 31 bits, mixed three times: neighbours have nothing in common.
        word = (place * 0x9E3779B1 + self.salt) & _MASK
        word = ((word ^ (word >> 15)) * 0x2C1B3C6D) & _MASK
        word = ((word ^ (word >> 12)) * 0x297A2D39) & _MASK
        word = word ^ (word >> 15)
        sign = 1 - 2 * (word & 1)
        # Columns of P have the length 1 where each number of z is in its share of a matrix.
        factor = 1 / math.sqrt(max(1.0, self.in_dim * self.out_dim / self.config.size))
        return (z_K[(word >> 1) % self.config.size] * sign * factor).view(self.out_dim, self.in_dim)

    def forward(self, x: Tensor, context: Any = None) -> Tensor:
        """What is added to y. It is computed in the adapter's type, which may be wider than that of ``x``."""
        return F.linear(x.to(self.shared.z.dtype), self.delta())

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"in={self.in_dim}, out={self.out_dim}, size={self.config.size}"
