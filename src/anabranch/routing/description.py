"""What parts say of themselves to code that computes the same faster: plain records, so that a fast path knows records and no design."""
# Shapes: E destinations, D width, P width of a state

from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["CellForm", "ScoreForm", "described"]


@dataclass(frozen=True)
class CellForm:
    """h' = GRU(W x, h), a state h that goes from router to router and starts from zeros.

    Attributes:
        projector_PD: W.
        weight_ih, weight_hh: ``[3 P, P]``, gates in torch's order.
        bias_ih, bias_hh: ``[3 P]``.
        hands_on: whether the next router goes on from h'; if not, each starts from zeros.
    """

    projector_PD: Tensor
    weight_ih: Tensor
    weight_hh: Tensor
    bias_ih: Tensor
    bias_hh: Tensor
    hands_on: bool

    @property
    def state_dim(self) -> int:
        """P."""
        return self.projector_PD.shape[0]


@dataclass(frozen=True)
class ScoreForm:
    """activation(W x), or of what a cell makes of x.

    Attributes:
        weight: W, ``[E, D]``, behind a cell ``[E, P]``.
        activation: as in `Score.Config`.
        cell: what x goes through before; None for nothing.
    """

    weight: Tensor
    activation: str
    cell: CellForm | None = None


def described(part: Any) -> Any:
    """``part.describe()``: a record, or a sentence on why there is none; None where the class of ``part`` does not define it itself.

    What a class inherits describes its parent, and a subclass may compute something else.
    """
    describe = vars(type(part)).get("describe")
    return None if describe is None else describe(part)
