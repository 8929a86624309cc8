"""Sizes of a part, known before it is built."""

from dataclasses import dataclass

__all__ = ["Count"]


@dataclass(frozen=True)
class Count:
    """Sizes of a part, known before it is built.

    Attributes:
        parameters: all parameters.
        active: parameters a token uses.
        flops: forward floating-point operations per token (a multiply-add counts 2).
    """

    parameters: int = 0
    active: int = 0
    flops: int = 0

    def __add__(self, other: "Count") -> "Count":
        return Count(self.parameters + other.parameters, self.active + other.active, self.flops + other.flops)

    @classmethod
    def dense(cls, parameters: int) -> "Count":
        """Weights of matrices that every token goes through."""
        return cls(parameters, parameters, 2 * parameters)
