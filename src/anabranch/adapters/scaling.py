"""`Scaling`: what goes into a matrix, or what comes out of it, each number by a factor of its own (IA3, Liu et al. 2022, arXiv 2205.05638).

y = l (W x + b)      of keys and values
y = W (l x) + b      of the last matrix of a feed-forward layer
"""
# Shapes: C inputs, O outputs, F factors (C or O); x is [..., C], y is [..., O]

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from anabranch.adapters.numbers import Numbers, frozen_as
from anabranch.config import configclass
from anabranch.nn import BuildContext, Count, Linear
from anabranch.nn.linear import Projection, Rows

__all__ = ["Scale", "Scaling"]


@dataclass(frozen=True, eq=False)
class Scale(Numbers):
    """The numbers of one linear layer.

    Attributes:
        factor_F: l.
        is_input: whether they are of what goes in.
    """

    what: ClassVar[str] = "IA3"
    holds: ClassVar[str] = "ia3_l"

    factor_F: Tensor
    is_input: bool

    @property
    def sizes(self) -> tuple[int | None, int | None]:
        """(C, None) or (None, O)."""
        return (len(self.factor_F), None) if self.is_input else (None, len(self.factor_F))

    def tensors(self) -> dict[str, Tensor]:
        """l, as a row for inputs and as a column for outputs."""
        return {"ia3_l": self.factor_F.unsqueeze(0 if self.is_input else 1)}

    def reordered(self, order: Callable[[Tensor], Tensor]) -> Self:
        """With the factors of outputs in another order."""
        return self if self.is_input else replace(self, factor_F=order(self.factor_F.unsqueeze(1)).squeeze(1))

    def config(self, *, dropout: float = 0.0, learns: bool = False) -> Linear.Config:
        """A `Scaling`."""
        return Scaling.Config(of="input" if self.is_input else "output")

    def merged(self, weight_OC: Tensor, bias_O: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """W with columns, or with rows and bias, multiplied."""
        wide = torch.promote_types(weight_OC.dtype, self.factor_F.dtype)
        factor_F = self.factor_F.to(weight_OC.device, wide)
        if self.is_input:
            return (weight_OC.to(wide) * factor_F).to(weight_OC.dtype), bias_O
        bias_O = None if bias_O is None else (bias_O.to(wide) * factor_F).to(bias_O.dtype)
        return (weight_OC.to(wide) * factor_F.unsqueeze(1)).to(weight_OC.dtype), bias_O


class Scaling(Linear, kind="scaling"):
    """l (W x + b), or W (l x) + b, which stands beside the matrix. It starts as that, with factors of 1."""

    @configclass
    class Config(Linear.Config):
        """What is multiplied.

        Attributes:
            of: what comes out of the matrix, or what goes into it.
        """

        is_added: ClassVar[bool] = True

        of: Literal["output", "input"] = "output"

        def count(self, projection: Projection, context: BuildContext) -> Count:
            """One factor for each number."""
            factors = projection.out_dim if self.of == "output" else projection.in_dim
            return Count(factors, factors, factors)

    def __init__(self, config: Config, projection: Projection, context: BuildContext) -> None:
        nn.Module.__init__(self)
        self.config = config
        self.factor = nn.Parameter(torch.ones(projection.out_dim if config.of == "output" else projection.in_dim))

    def around(self, rows: Rows, context: Any = None) -> Tensor:
        """y. What is multiplied has the type of the factors for the moment."""
        if self.config.of == "input":
            return rows.of((rows.x.to(self.factor.dtype) * self.factor).to(rows.x.dtype))
        return (rows.y.to(self.factor.dtype) * self.factor).to(rows.y.dtype)

    def put(self, numbers: Any, device: torch.device | None = None, *, trainable: bool = False) -> None:
        """Take over the numbers of a `Scale`."""
        self.factor = frozen_as(numbers.factor_F, device, trainable=trainable)

    def numbers(self) -> Numbers:
        """Its numbers as they are now."""
        return Scale(self.factor.detach(), self.config.of == "input")

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        return f"of={self.config.of}, factors={len(self.factor)}"
