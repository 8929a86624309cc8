"""Student's t distribution: how wide an interval of a mean of few numbers is."""

from __future__ import annotations

import math
from functools import lru_cache

__all__ = ["within_95"]


# Above so many degrees a series about the normal distribution is as good, and does not take longer with each.
_FEW = 1000
# Of the normal distribution.
_NORMAL_95 = 1.959963984540054


@lru_cache
def within_95(degrees: int) -> float:
    """Deviations of the mean within which 95 % lie: 12.7 for 1 degree of freedom, 1.96 for very many.

    By halving, to 1e-12, of the finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4; above 1,000 degrees by their 26.7.5, to 1e-8.
    ``degrees`` must be at least 1.
    """
    if degrees > _FEW:
        z = _NORMAL_95
        return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
    low, high = 1.9, 13.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < 0.95 else (low, middle)
    return (low + high) / 2


def _within(t: float, degrees: int) -> float:
    """The share that lies between -t and t."""
    angle = math.atan2(t, math.sqrt(degrees))
    cosine, odd = math.cos(angle), degrees % 2
    term = total = cosine if odd else 1.0
    for power in range(3 if odd else 2, degrees - 1, 2):
        term *= cosine**2 * (power - 1) / power
        total += term
    if not odd:
        return math.sin(angle) * total
    return 2 / math.pi * (angle + math.sin(angle) * (total if degrees > 1 else 0.0))
