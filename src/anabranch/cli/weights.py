"""Which bits were measured: how a model's weights stand in memory, for people and for programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from anabranch.nn.weight_kinds import FLOATS, numbers_of_kinds

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Weights:
    """The weights of a model that was loaded.

    Attributes:
        quantize: ``int8``, ``int4`` or ``nf4`` where weights were rounded to these, ``stored`` where some are in few bits as their file
            has them, ``none`` where all are in floating point.
        numbers: of each kind, how many; the most frequent first.
    """

    quantize: str
    numbers: dict[str, int]

    @classmethod
    def of(cls, model: nn.Module, quantize: str = "none") -> Weights:
        """Of a model that was loaded with ``quantize``."""
        numbers = numbers_of_kinds(model)
        if quantize not in ("int8", "int4", "nf4"):
            quantize = "none" if set(numbers) <= set(FLOATS) else "stored"
        return cls(quantize, numbers)

    @property
    def shares(self) -> dict[str, float]:
        """Of each kind, 0 to 1."""
        all_numbers = sum(self.numbers.values())
        return {kind: count / all_numbers for kind, count in self.numbers.items()}

    @property
    def floating_point(self) -> float:
        """Share of the numbers that are in floating point."""
        return sum(share for kind, share in self.shares.items() if kind in FLOATS)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"quantize": self.quantize, "floating_point": self.floating_point, "kinds": self.shares}

    def __str__(self) -> str:
        """In one line."""
        floats = [kind for kind in self.numbers if kind in FLOATS]
        names = " and ".join(floats)
        if self.quantize == "none":
            return f"{names}: none in fewer bits"
        shares = [f"{share:.1%} {kind}" for kind, share in self.shares.items() if kind not in FLOATS]
        rest = f"{self.floating_point:.1%} in floating point{names and f' ({names})'}"
        how = "as stored" if self.quantize == "stored" else f"rounded to {self.quantize}"
        return f"{how}: {', '.join(shares)}; {rest}"
