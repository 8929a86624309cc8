"""`LowRank`: one low-rank adapter beside a matrix, y = W x + scale B A x (LoRA, Hu et al. 2021, arXiv 2106.09685), and its numbers.

    Decoder.Config(linears={"blocks.*.attention.q": LowRank.Config(rank=8, alpha=16)})

The scale is alpha / rank, or alpha / sqrt(rank) where it is rank-stabilised (rsLoRA, Kalajdzievski 2023, arXiv 2312.03732).
"""
# Shapes: C inputs, O outputs, R rank; x is [..., C], y is [..., O]

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.bounds import Size
from anabranch.config import Field, configclass
from anabranch.errors import ConfigError
from anabranch.nn import BuildContext, Count, Linear
from anabranch.nn.linear import Projection

__all__ = ["LowRank", "Pair", "draw_a", "scale_of"]


def scale_of(rank: int, alpha: float, rslora: bool = False) -> float:
    """What ``B A`` is multiplied by. Raises ConfigError for a rank below 1, or an alpha that is no finite number."""
    if rank < 1:
        raise ConfigError(f"rank is {rank}; it must be at least 1")
    if not math.isfinite(alpha):
        raise ConfigError(f"alpha is {alpha}; it must be a finite number")
    return alpha / (math.sqrt(rank) if rslora else rank)


def draw_a(a: Tensor, generator: torch.Generator | None = None) -> None:
    """Fill A ``[..., C]`` as LoRA starts: uniform within +-1 / sqrt(C). B starts at zero, so that nothing is added. Meta is left alone."""
    if not a.is_meta:
        nn.init.uniform_(a, -1 / math.sqrt(a.shape[-1]), 1 / math.sqrt(a.shape[-1]), generator=generator)


@dataclass(frozen=True, eq=False)
class Pair:
    """One adapter of one linear layer: ``scale B A``.

    Attributes:
        a_RC: A.
        b_OR: B.
        alpha: see `scale_of`, as is ``rslora``.
    """

    a_RC: Tensor
    b_OR: Tensor
    alpha: float
    rslora: bool = False

    @property
    def rank(self) -> int:
        """R."""
        return self.a_RC.shape[0]

    @property
    def scale(self) -> float:
        """What ``B A`` is multiplied by."""
        return scale_of(self.rank, self.alpha, self.rslora)

    def delta(self) -> Tensor:
        """delta_OC: what it adds to the matrix, in float32 at least."""
        wide = torch.promote_types(torch.promote_types(self.a_RC.dtype, self.b_OR.dtype), torch.float32)
        return (self.b_OR.to(wide) @ self.a_RC.to(wide)) * self.scale


class LowRank(Linear, kind="low_rank"):
    """scale B A x, which stands beside the matrix that it adapts."""

    @configclass
    class Config(Linear.Config):
        """Its numbers.

        Attributes:
            rank: R.
            alpha: see `scale_of`.
            rslora: the scale is alpha / sqrt(rank).
        """

        is_added: ClassVar[bool] = True

        rank: Size = Field(default=8, ge=1)
        alpha: float = 8.0
        rslora: bool = False

        def count(self, projection: Projection, context: BuildContext) -> Count:
            """R (C + O) weights."""
            return Count.dense(self.rank * (projection.in_dim + projection.out_dim))

    def __init__(self, config: Config, projection: Projection, context: BuildContext) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.scale = scale_of(config.rank, config.alpha, config.rslora)
        self.a = nn.Parameter(torch.empty(config.rank, projection.in_dim))
        self.b = nn.Parameter(torch.zeros(projection.out_dim, config.rank))
        draw_a(self.a.data, context.generator)

    def forward(self, x: Tensor, context: Any = None) -> Tensor:
        """What is added to y. It is computed in the adapter's type, which may be wider than that of ``x``."""
        return F.linear(F.linear(x.to(self.a.dtype), self.a), self.b) * self.scale

    def delta(self) -> Tensor:
        """delta_OC: what it adds to the matrix."""
        return self.pair().delta()

    def put(self, pair: Pair, device: torch.device | None = None, *, trainable: bool = False) -> None:
        """Take over the numbers of a pair of the same rank, on ``device``; those of 16 bits are kept in float32, as peft keeps them."""
        for name, value in (("a", pair.a_RC), ("b", pair.b_OR)):
            kind = torch.promote_types(value.dtype, torch.float32)
            made = value.detach().to(device=device, dtype=kind, copy=True)
            setattr(self, name, nn.Parameter(made, requires_grad=trainable))

    def pair(self) -> Pair:
        """Its numbers as they are now."""
        return Pair(self.a.detach(), self.b.detach(), self.config.alpha, self.config.rslora)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"in={self.a.shape[1]}, out={self.b.shape[0]}, rank={self.config.rank}, scale={self.scale:g}"
