"""The norm of a gradient that lies in slices, to the bit the same however it is cut.

    squares = Squares.of(part)                    # of each rank's numbers
    Squares.sum([squares, ...]).root()            # of all

A sum of squares in floating point depends on its order, and the order on the cut. The square of a float32 is a whole number of 48 bits
times a power of two: here they are added as whole numbers, exactly, and rounded once at the end.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import numpy as np
from torch import Tensor

__all__ = ["Squares"]

# Bits of a float32's mantissa, and of the half of its square that is added at a time: 2^29 of them fit a double exactly.
_BITS, _HALF = 24, 24
# Numbers that are worked on at a time, so that there are no copies of all.
_CHUNK = 2**20


@dataclass(frozen=True)
class Squares:
    """An exact sum of squares of numbers as float32.

    Attributes:
        total: times ``2 ** exponent`` it is the sum.
        exponent: even.
        is_finite: whether all numbers were; else the others say nothing.
    """

    total: int = 0
    exponent: int = 0
    is_finite: bool = True

    @classmethod
    def of(cls, x: Tensor) -> Self:
        """Of all numbers of a tensor; of other types they are rounded to float32 first."""
        flat = x.detach().reshape(-1).float().numpy()
        return cls.sum(cls._of_chunk(flat[at : at + _CHUNK]) for at in range(0, flat.size, _CHUNK))

    @classmethod
    def _of_chunk(cls, x: np.ndarray) -> Self:
        if not np.isfinite(x).all():
            return cls(is_finite=False)
        mantissa, exponent = np.frexp(x.astype(np.float64))
        whole = np.ldexp(mantissa, _BITS).astype(np.int64)
        square = whole * whole
        lowest = int(exponent.min())
        at = exponent - lowest
        high, low = (
            np.bincount(at, weights=half.astype(np.float64)) for half in (square >> _HALF, square & (2**_HALF - 1))
        )
        total = sum(
            ((int(h) << _HALF) + int(lo)) << (2 * place) for place, (h, lo) in enumerate(zip(high, low, strict=True))
        )
        return cls(total, 2 * (lowest - _BITS))

    @classmethod
    def sum(cls, parts: Iterable[Self]) -> Self:
        """Of several, exactly."""
        total, exponent = 0, 0
        for part in parts:
            if not part.is_finite:
                return cls(is_finite=False)
            if not part.total:
                continue
            if not total:
                total, exponent = part.total, part.exponent
                continue
            lowest = min(exponent, part.exponent)
            total = (total << (exponent - lowest)) + (part.total << (part.exponent - lowest))
            exponent = lowest
        return cls(total, exponent)

    def root(self) -> float:
        """The norm; infinite where a number was not finite."""
        if not self.is_finite:
            return math.inf
        # Squares of float32 lie between 2^-298 and 2^256, so a sum has some 650 bits at most, which a double holds.
        return math.ldexp(math.sqrt(self.total), self.exponent // 2)

    def told(self) -> list[int | bool]:
        """JSON-ready."""
        return [self.total, self.exponent, self.is_finite]
