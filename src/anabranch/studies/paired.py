"""Paired comparisons over seeds: the mean difference, its t-interval, and what it says about a claim."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Verdict = Literal["holds", "does not hold", "not resolved", "not run", "void"]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: of the values; NaN if there is none.
        half_width: of the confidence interval around it; infinite for fewer than two values.
        count: how many values.
    """

    mean: float
    half_width: float
    count: int

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.mean + self.half_width

    @property
    def interval(self) -> list[float] | None:
        """``[low, high]``, None where it is not known."""
        return [self.low, self.high] if math.isfinite(self.half_width) else None


def estimate(values: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Mean of ``values`` with the t-interval of that confidence (values independent and roughly normal)."""
    count = len(values)
    mean = math.fsum(values) / count if count else math.nan
    if count < 2:
        return Estimate(mean, math.inf, count)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    return Estimate(mean, t_quantile(0.5 + confidence / 2, count - 1) * deviation / math.sqrt(count), count)


def paired_difference(ours: Mapping[int, float], baseline: Mapping[int, float], confidence: float = 0.95) -> Estimate:
    """Mean of ours - baseline over the seeds that both have."""
    return estimate([ours[seed] - baseline[seed] for seed in sorted(ours.keys() & baseline.keys())], confidence)


def verdict_below(difference: Estimate, limit: float = 0.0) -> Verdict:
    """Whether the difference is below ``limit``: holds or does not if the whole interval is on one side, else not resolved."""
    if difference.high < limit:
        return "holds"
    return "does not hold" if difference.low > limit else "not resolved"


def every_seed(seen: Sequence[bool]) -> Verdict:
    """The verdict on what was so or not in each seed: holds if in all of at least two, does not hold if in none.

    For what must be so in each run, such as a limit or equal bits. For the sign of a difference between two trained models see `same_sign`.
    """
    if len(seen) < 2 or (any(seen) and not all(seen)):
        return "not resolved"
    return "holds" if seen[0] else "does not hold"


# Below this nothing is decided where chance has a part: fewer than five alike come about by it more often than once in sixteen.
SEEDS_NEEDED = 5


def same_sign(differences: Sequence[float]) -> Verdict:
    """The verdict on a direction that noise could have given: holds if in all of at least five seeds, does not hold if in none.

    Where there is no difference two seeds agree every other time, five once in sixteen; `every_seed` is for what has to be so in each run.
    """
    return every_seed([value > 0 for value in differences]) if len(differences) >= SEEDS_NEEDED else "not resolved"


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
