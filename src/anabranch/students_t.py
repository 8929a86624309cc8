"""Student's t distribution: how wide an interval of a mean of few numbers is, and how likely its distance from 0."""

import math
from functools import lru_cache

__all__ = ["t_probability", "t_quantile"]


@lru_cache
def t_quantile(probability: float, degrees: int) -> float:
    """Quantile of Student's t distribution for 0.5 <= ``probability`` < 1, to about 1e-12."""
    low, high = 0.0, 1.0
    while t_probability(high, degrees) < probability:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if t_probability(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


def t_probability(t: float, degrees: int) -> float:
    """P(T <= t) for Student's t with an integer number of degrees of freedom and t >= 0.

    The finite series of Abramowitz and Stegun, 26.7.3 and 26.7.4.
    """
    theta = math.atan2(t, math.sqrt(degrees))
    sine, cosine = math.sin(theta), math.cos(theta)
    odd = degrees % 2
    term, total = (cosine, cosine if degrees > 1 else 0.0) if odd else (1.0, 1.0)
    for power in range(3 if odd else 2, degrees - 1, 2):
        term *= cosine**2 * (power - 1) / power
        total += term
    inside = 2 / math.pi * (theta + sine * total) if odd else sine * total
    return (1 + inside) / 2
