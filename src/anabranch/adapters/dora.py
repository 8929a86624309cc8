"""`Dora`: a low-rank adapter that turns the rows of a matrix and has their lengths apart (DoRA, Liu et al. 2024, arXiv 2402.09353).

    W' = m (W + scale B A) / ||W + scale B A||        row by row, with m_o the length of row o

What is multiplied by m / ||...|| is the product without the bias. The paper (sec. 4.3) and peft take the length of the rows for a constant
where gradients are concerned, which saves memory; here that is to be said.
"""
# Shapes: C inputs, O outputs, R rank; x is [..., C], y is [..., O]

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from anabranch.adapters.low_rank import LowRank, Pair
from anabranch.adapters.numbers import Numbers, frozen_as
from anabranch.config import configclass
from anabranch.nn import BuildContext, Count, Linear
from anabranch.nn.linear import Projection, Rows

__all__ = ["Decomposed", "Dora"]


@dataclass(frozen=True, eq=False)
class Decomposed(Numbers):
    """The numbers of one linear layer.

    Attributes:
        pair: B A.
        magnitude_O: m.
    """

    what: ClassVar[str] = "DoRA"
    holds: ClassVar[str] = "lora_A, lora_B and lora_magnitude_vector"

    pair: Pair
    magnitude_O: Tensor

    @property
    def sizes(self) -> tuple[int, int]:
        """(C, O)."""
        return self.pair.sizes

    @property
    def rank(self) -> int:
        """R."""
        return self.pair.rank

    @property
    def alpha(self) -> float:
        """See `anabranch.adapters.low_rank.scale_of`, as is ``rslora``."""
        return self.pair.alpha

    @property
    def rslora(self) -> bool:
        """Whether the scale is alpha / sqrt(rank)."""
        return self.pair.rslora

    def tensors(self) -> dict[str, Tensor]:
        """A, B and m."""
        return {**self.pair.tensors(), "lora_magnitude_vector": self.magnitude_O}

    def reordered(self, order: Callable[[Tensor], Tensor]) -> Self:
        """With the rows of B, and m, in another order."""
        magnitude_O = order(self.magnitude_O.unsqueeze(1)).squeeze(1)
        return replace(self, pair=self.pair.reordered(order), magnitude_O=magnitude_O)

    def config(self, *, dropout: float = 0.0, learns: bool = False) -> Linear.Config:
        """A `Dora` of this rank and scale, which learns as in peft."""
        pair = self.pair
        return Dora.Config(
            rank=pair.rank, alpha=float(pair.alpha), rslora=pair.rslora, dropout=dropout, constant_norm=learns
        )

    def merged(self, weight_OC: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W', in the type of W."""
        turned_OC = self.pair.on(weight_OC)
        magnitude_O = self.magnitude_O.to(turned_OC)
        return (turned_OC * (magnitude_O / lengths(turned_OC)).unsqueeze(1)).to(weight_OC.dtype), bias_O


def lengths(weight_OC: Tensor) -> Tensor:
    """The length of each row, ``[O]``."""
    return torch.linalg.vector_norm(weight_OC, dim=1)


class Dora(LowRank, kind="dora"):
    """m (W + scale B A) x / ||W + scale B A||. It starts as W, whose lengths m has."""

    @configclass
    class Config(LowRank.Config):
        """As of `LowRank`.

        Attributes:
            constant_norm: gradients take the length of the rows for a constant, as the paper and peft have it.
        """

        constant_norm: bool = False

        def count(self, projection: Projection, context: BuildContext) -> Count:
            """R (C + O) weights, and O lengths. That of the rows is measured in each pass, as if R more tokens went through the matrix."""
            return super().count(projection, context) + Count(projection.out_dim, projection.out_dim, 0)

    def __init__(self, config: Config, projection: Projection, context: BuildContext) -> None:
        super().__init__(config, projection, context)
        self.magnitude = nn.Parameter(torch.ones(projection.out_dim))

    config: Any

    def start(self, weight_RC: Tensor) -> None:
        """Take over the lengths of the rows; B is zero."""
        with torch.no_grad():
            self.magnitude.copy_(lengths(weight_RC.detach().to(self.magnitude.dtype)))

    def around(self, rows: Rows, context: Any = None) -> Tensor:
        """y: what the matrix makes of x, without the bias, and B A x, both as much longer as the rows are meant to be."""
        weight_OC, bias_O = rows.numbers()
        gain_O = self.magnitude / self._lengths(weight_OC)
        if self.config.dropout and self.training:
            # The matrix gets the same x as the adapter, for what is beside it.
            x = self.dropped(rows.x)
            plain = nn.functional.linear(x.to(rows.x.dtype), weight_OC.to(rows.x.dtype))
        else:
            x, plain = rows.x.to(self.a.dtype), rows.y if bias_O is None else rows.y - bias_O.to(rows.y.dtype)
        added = (gain_O - 1) * plain.to(gain_O.dtype) + gain_O * self.product(x)
        return rows.y + added.to(rows.y.dtype)

    def _lengths(self, weight_OC: Tensor) -> Tensor:
        b = self.b.detach() if self.config.constant_norm else self.b
        a = self.a.detach() if self.config.constant_norm else self.a
        wide = torch.promote_types(weight_OC.dtype, a.dtype)
        weight_OC = weight_OC.detach() if self.config.constant_norm else weight_OC
        return lengths(weight_OC.to(wide) + self.scale * (b @ a).to(wide)).to(a.dtype)

    def put(self, numbers: Any, device: torch.device | None = None, *, trainable: bool = False) -> None:
        """Take over the numbers of a `Decomposed` of the same rank, see `LowRank.put`."""
        super().put(numbers.pair, device, trainable=trainable)
        self.magnitude = frozen_as(numbers.magnitude_O, device, trainable=trainable)

    def numbers(self) -> Numbers:
        """Its numbers as they are now."""
        return Decomposed(self.pair(), self.magnitude.detach())
