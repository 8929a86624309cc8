"""Bounds of the mean of values that never lie below a known worst one, right however few and lopsided they are.

Of n values x_1..x_n >= worst, the mean is above the ``level`` quantile of D_1 x_1 + ... + D_n x_n + D_0 worst, with D uniform on the
simplex, but for a chance of ``level`` (Gaffke 2005; Learned-Miller and Thomas, "A New Confidence Interval for the Mean of a Bounded Random
Variable", arXiv 1905.06208). The share D_0 stands for what n values may never have shown. Of two values it is the exact bound of Clopper
and Pearson, of equal values worst + (x - worst) level^(1/n), and of many well spread ones the normal bound; that it holds whatever the
distribution is proved for these and a conjecture beyond, of which no failure is known (`tests/routers/test_bounds.py` looks for some).

D is n + 1 exponential numbers G over their sum, so that P(sum D x <= c) = P(sum G (x - c) <= 0), whose transform is a product. It is
inverted along the line through the saddle point (Rice 1980), where the trapezoidal rule is right to about 1e-9 of the probability.
"""
# Shapes: N values, K bins, U points of the line

from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist
from typing import Self

import numpy as np

# Bins that values are put into, each with the mean of its own, so that means stay and variances lose less than a hundredth.
BINS = 256

# Values held of one sample; more are put together in so many parts of equal size, which are as independent and keep to the same limits.
MOST = 8192

_LEAST = 1e-300
# Beside the largest value.
_NOTHING = 1e-30
_STEP, _AT_ONCE, _FURTHEST = 0.1, 20, 18.0
_NORMAL = NormalDist()


def in_parts(value_N: np.ndarray) -> np.ndarray:
    """``[min(N, MOST), ...]`` with the same mean: of more than `MOST` rows, means of parts of them, dealt out in turn."""
    value_N = np.asarray(value_N, float)
    num = len(value_N)
    if num <= MOST:
        return value_N
    total = np.zeros((MOST, *value_N.shape[1:]))
    np.add.at(total, np.arange(num) % MOST, value_N)
    return total * (MOST / num)


@dataclass(frozen=True)
class Binned:
    """Values by how often they came: ``value_K``, ``count_K``."""

    value_K: np.ndarray
    count_K: np.ndarray

    @classmethod
    def of(cls, value_N: np.ndarray) -> Self:
        """Of at least one value."""
        value_K, count_K = np.unique(value_N, return_counts=True)
        if len(value_K) <= BINS:
            return cls(value_K, count_K.astype(float))
        low, high = float(value_K[0]), float(value_K[-1])
        bin_N = np.minimum((np.asarray(value_N) - low) * (BINS / (high - low)), BINS - 1).astype(np.int64)
        count_B, total_B = np.bincount(bin_N, minlength=BINS), np.bincount(bin_N, value_N, BINS)
        held_B = count_B > 0
        return cls(total_B[held_B] / count_B[held_B], count_B[held_B].astype(float))

    @property
    def mean(self) -> float:
        """Of all values."""
        return float(self.count_K @ self.value_K / self.count_K.sum())

    def p(self, point: float, worst: float) -> float:
        """One-sided p-value of a mean of ``point`` or less; values are never below ``worst``."""
        return tail(np.append(self.value_K, worst) - point, np.append(self.count_K, 1.0))

    def lower(self, level: float, worst: float) -> float:
        """What the true mean is below with probability ``level`` (under 0.5) at most."""
        lowest = min(worst, float(self.value_K[0]))
        num = self.count_K.sum()
        spread = float(np.sqrt(self.count_K @ (self.value_K - self.mean) ** 2)) / num
        guess = self.mean + _NORMAL.inv_cdf(level) * spread
        return below(lambda point: self.p(point, worst), level, lowest, self.mean, guess)


def tail(value_K: np.ndarray, count_K: np.ndarray) -> float:
    """P(sum of ``count`` exponential numbers times ``value`` <= 0)."""
    # The unit of the values does not matter, and squares of very small ones would be 0. What is nothing beside the largest is left out.
    value_K = value_K / (float(np.abs(value_K).max()) or 1.0)
    used_K = np.abs(value_K) > _NOTHING
    value_K, count_K = value_K[used_K], count_K[used_K]
    if not len(value_K) or value_K.max() < 0:
        return 1.0
    if value_K.min() > 0:
        return 0.0
    if count_K @ value_K < 0:
        return 1.0 - tail(-value_K, count_K)
    # Left of 0, and of it by a part of the spread at least: there is a pole.
    spread = float(np.sqrt(count_K @ value_K**2))
    at = min(_saddle(value_K, count_K), -0.3 / spread)
    slope_K = value_K / (1 - at * value_K)
    width = 1 / float(np.sqrt(count_K @ slope_K**2))
    peak = -float(count_K @ np.log1p(-at * value_K))
    total = 0.0
    for start in np.arange(0.0, _FURTHEST, _STEP * _AT_ONCE):
        at_U = start + _STEP * np.arange(_AT_ONCE)
        line_U = 1j * width * np.sinh(at_U)
        height_U = -np.log1p(-line_U[:, None] * slope_K) @ count_K
        part_U = (np.exp(height_U) / -(at + line_U)).real * width * np.cosh(at_U)
        # Half of the point in the middle, since the line is gone along one way only.
        total += float(part_U.sum()) - (0.5 * float(part_U[0]) if start == 0 else 0.0)
        if abs(float(part_U[-1])) <= 1e-14 * abs(total):
            break
    return float(min(1.0, max(0.0, np.exp(peak) * _STEP * total / np.pi)))


def _saddle(value_K: np.ndarray, count_K: np.ndarray) -> float:
    """About where the slope of the logarithm of the transform is 0, left of 0; by halves. Any place near it does."""
    low, high = 1 / float(value_K.min()), 0.0
    for _ in range(30):
        middle = (low + high) / 2
        if float(count_K @ (value_K / np.maximum(1 - middle * value_K, _LEAST))) < 0:
            low = middle
        else:
            high = middle
    return high


def below(p_of: Callable[[float], float], level: float, lowest: float, highest: float, guess: float) -> float:
    """The point with ``p_of(point) == level`` between ``lowest``, where p is about 0, and ``highest``, where it is about a half.

    Its normal quantile is nearly straight, so that a few steps along secants do; every fourth halves what is left.
    """
    wanted = _NORMAL.inv_cdf(level)

    def height(point: float) -> float:
        return _NORMAL.inv_cdf(min(max(p_of(point), _LEAST), 1 - 1e-16)) - wanted

    left, right, at_left, at_right = lowest, highest, height(lowest), -wanted
    point = guess if lowest < guess < highest else (lowest + highest) / 2
    for step in range(60):
        found = height(point)
        left, at_left, right, at_right = (
            (left, at_left, point, found) if found >= 0 else (point, found, right, at_right)
        )
        if abs(found) < 1e-9 or right - left <= 1e-12 * max(abs(lowest), abs(highest)):
            break
        is_secant = step % 4 != 3 and at_left > -30
        point = left - at_left * (right - left) / (at_right - at_left) if is_secant else (left + right) / 2
    return point
