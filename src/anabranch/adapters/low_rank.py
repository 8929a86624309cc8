"""`LowRank`: one low-rank adapter beside a matrix, y = W x + scale B A x (LoRA, Hu et al. 2021, arXiv 2106.09685), and its numbers.

    Decoder.Config(linears={"blocks.*.attention.q": LowRank.Config(rank=8, alpha=16)})

The scale is alpha / rank, or alpha / sqrt(rank) where it is rank-stabilised (rsLoRA, Kalajdzievski 2023, arXiv 2312.03732).
"""
# Shapes: C inputs, O outputs, R rank; x is [..., C], y is [..., O]

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anabranch.adapters.numbers import Numbers, frozen_as
from anabranch.adapters.together import Adapted, can_go_together, together
from anabranch.bounds import Size
from anabranch.config import Field, configclass
from anabranch.errors import ConfigError
from anabranch.nn import BuildContext, Count, Linear
from anabranch.nn.linear import Product, Projection, Rows, is_hooked

__all__ = ["LowRank", "Pair", "draw_a", "scale_of"]


def scale_of(rank: int, alpha: float, rslora: bool = False) -> float:
    """What ``B A`` is multiplied by. Raises ConfigError for a rank below 1, or an alpha that is not a finite number."""
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
class Pair(Numbers):
    """One adapter of one linear layer: ``scale B A``.

    Attributes:
        a_RC: A.
        b_OR: B.
        alpha: see `scale_of`, as is ``rslora``.
    """

    what: ClassVar[str] = "LoRA"
    holds: ClassVar[str] = "lora_A and lora_B"

    a_RC: Tensor
    b_OR: Tensor
    alpha: float
    rslora: bool = False

    @property
    def sizes(self) -> tuple[int, int]:
        """(C, O)."""
        return self.a_RC.shape[1], self.b_OR.shape[0]

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

    def tensors(self) -> dict[str, Tensor]:
        """A and B."""
        return {"lora_A.weight": self.a_RC, "lora_B.weight": self.b_OR}

    def reordered(self, order: Callable[[Tensor], Tensor]) -> Self:
        """With the rows of B in another order."""
        return replace(self, b_OR=order(self.b_OR))

    def config(self, *, dropout: float = 0.0, learns: bool = False) -> Linear.Config:
        """A `LowRank` of this rank and scale."""
        return LowRank.Config(rank=self.rank, alpha=float(self.alpha), rslora=self.rslora, dropout=dropout)

    def merged(self, weight_OC: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W + scale B A, summed in the wider type and rounded to that of W."""
        return self.on(weight_OC).to(weight_OC.dtype), bias_O

    def on(self, weight_OC: Tensor) -> Tensor:
        """W + scale B A, in the wider type."""
        delta_OC = self.delta()
        wide = torch.promote_types(weight_OC.dtype, delta_OC.dtype)
        return weight_OC.to(wide) + delta_OC.to(weight_OC.device, wide)


class LowRank(Linear, kind="low_rank"):
    """scale B A x, which stands beside the matrix that it adapts."""

    @configclass
    class Config(Linear.Config):
        """Its numbers.

        Attributes:
            rank: R.
            alpha: see `scale_of`.
            rslora: the scale is alpha / sqrt(rank).
            dropout: share of what goes into A that is left out while it learns, the rest being as much greater.
        """

        is_added: ClassVar[bool] = True

        rank: Size = Field(default=8, ge=1)
        alpha: float = 8.0
        rslora: bool = False
        dropout: float = Field(default=0.0, ge=0, lt=1)

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
        return self.product(self.dropped(x))

    def add_to(self, y: Tensor, x: Tensor, context: Any = None) -> None:
        """See `Linear.add_to`: in one type by one product, which adds to what is there."""
        if y.dtype != self.a.dtype or x.dim() < 2 or is_hooked(self) or type(self) is not LowRank:
            return super().add_to(y, x, context)
        low = F.linear(self.dropped(x), self.a)
        if low.dtype != y.dtype:
            # Under autocast.
            y.add_(F.linear(low, self.b) * self.scale)
        else:
            y.view(-1, len(self.b)).addmm_(low.flatten(0, -2), self.b.t(), alpha=self.scale)

    @classmethod
    def together(
        cls, product: Product, beside: Mapping[str, nn.Module], rows: Mapping[str, int], context: Any
    ) -> Tensor | None:
        """See `Linear.together`: with a frozen matrix, where nothing is left out of x (`anabranch.adapters.together`)."""
        frozen, layers = Rows(product).frozen(), dict(beside.items())
        if cls is not LowRank or frozen is None or product.x.dim() < 2 or any(map(is_hooked, layers.values())):
            return None
        own = [layer for layer in layers.values() if isinstance(layer, LowRank)]
        if any(layer.training and layer.config.dropout > 0 for layer in own) or len({one.a.dtype for one in own}) > 1:
            return None
        weight_OC, bias_O = frozen
        # Where an A does not learn (LoRA-FA), x need not be kept for it.
        if not all(layer.a.requires_grad for layer in own) or not can_go_together(product.x, weight_OC, own[0].a):
            return None
        parts, halves, first = [], [], 0
        for name, size in rows.items():
            layer = layers.get(name)
            if isinstance(layer, LowRank):
                parts.append(Adapted(first, size, layer.scale, layer.config.rank))
                halves.append((layer.a, layer.b))
            first += size
        return together(product.x, weight_OC, bias_O, parts, halves)

    def dropped(self, x: Tensor) -> Tensor:
        """What goes into A, in the adapter's type: x, of which a share is left out while it learns."""
        return F.dropout(x.to(self.a.dtype), self.config.dropout, self.training)

    def product(self, x: Tensor) -> Tensor:
        """scale B A x."""
        return F.linear(F.linear(x, self.a), self.b) * self.scale

    def delta(self) -> Tensor:
        """delta_OC: what it adds to the matrix."""
        return self.pair().delta()

    def put(self, pair: Pair, device: torch.device | None = None, *, trainable: bool = False) -> None:
        """Take over the numbers of a pair of the same rank, on ``device``; those of 16 bits are kept in float32, as peft keeps them."""
        self.a, self.b = (frozen_as(half, device, trainable=trainable) for half in (pair.a_RC, pair.b_OR))

    def numbers(self) -> Numbers:
        """As `pair`."""
        return self.pair()

    def pair(self) -> Pair:
        """Its numbers as they are now."""
        return Pair(self.a.detach(), self.b.detach(), self.config.alpha, self.config.rslora)

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"in={self.a.shape[1]}, out={self.b.shape[0]}, rank={self.config.rank}, scale={self.scale:g}"
