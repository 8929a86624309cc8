"""Scores on the scale from 0 to 1, which losses of probabilities want, and back."""
# Shapes: N queries, M models

from dataclasses import dataclass
from typing import Self

import numpy as np


@dataclass(frozen=True)
class Span:
    """Least and largest score seen; what lies beyond is clipped."""

    low: float = 0.0
    high: float = 1.0

    @classmethod
    def of(cls, score_NM: np.ndarray) -> Self:
        """Of known scores; 0 to 1 where they lie within."""
        low, high = float(np.nanmin(score_NM)), float(np.nanmax(score_NM))
        if low >= 0 and high <= 1:
            return cls()
        return cls(low, high if high > low else low + 1.0)

    def shrink(self, score_NM: np.ndarray) -> np.ndarray:
        """To 0 ... 1; NaN stays."""
        return (score_NM - self.low) / (self.high - self.low)

    def stretch(self, share_NM: np.ndarray) -> np.ndarray:
        """Back."""
        return self.low + share_NM * (self.high - self.low)
