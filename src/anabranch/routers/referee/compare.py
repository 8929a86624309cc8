"""What a difference is worth: the paired bootstrap over questions, and Holm's correction for having tried many strategies."""
# Shapes: N questions, S strategies, B draws

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from anabranch.errors import InputError

DRAWS = 2000

# Numbers drawn at a time.
_AT_ONCE = 2_000_000


@dataclass(frozen=True)
class Interval:
    """A mean over questions, or a paired difference of two.

    Attributes:
        mean: as observed.
        low, high: 95% interval (percentiles of the draws).
        p: two-sided: how likely a mean as far from 0 is if there is no difference.
    """

    mean: float
    low: float
    high: float
    p: float


def bootstrap(
    value_NS: np.ndarray, *, count_N: np.ndarray | None = None, draws: int = DRAWS, seed: int = 0
) -> list[Interval]:
    """Mean of each column, with its interval. Every draw takes the same questions for all columns, so pass differences to pair them.

    Args:
        value_NS: of each question (its sum over repeats, if ``count_N`` is given) and strategy.
        count_N: repeats of each question, over seeds or splits; None for one each. A question is drawn with all its repeats.
        draws: B.
        seed: of the draws.

    Raises InputError for no question or values that are not finite.
    """
    value_NS = np.asarray(value_NS, float)
    count_N = np.ones(len(value_NS)) if count_N is None else np.asarray(count_N, float)
    if value_NS.ndim != 2 or not len(value_NS) or not np.isfinite(value_NS).all():
        raise InputError("a bootstrap needs at least one question, and finite values")
    mean_S = value_NS.sum(0) / count_N.sum()
    mean_BS = resampled_means(value_NS, count_N, draws, seed)
    low_S, high_S = np.quantile(mean_BS, (0.025, 0.975), axis=0)
    below_S, above_S = (mean_BS <= 0).sum(0), (mean_BS >= 0).sum(0)
    p_S = np.minimum(1.0, 2 * (1 + np.minimum(below_S, above_S)) / (draws + 1))
    return [Interval(*map(float, row)) for row in zip(mean_S, low_S, high_S, p_S, strict=True)]


def resampled_means(value_NS: np.ndarray, count_N: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """float64 ``[B, S]``: means over N questions drawn with replacement, B times."""
    generator = np.random.default_rng(seed)
    num = len(value_NS)
    both = np.column_stack([value_NS, count_N])
    step = max(1, _AT_ONCE // num)
    found = []
    for start in range(0, draws, step):
        rows = min(step, draws - start)
        drawn = generator.integers(0, num, (rows, num)) + num * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * num).reshape(rows, num).astype(float)
        total = times @ both
        found.append(total[:, :-1] / total[:, -1:])
    return np.concatenate(found)


def holm(p: Sequence[float]) -> list[float]:
    """p-values corrected for their number, step down (Holm, 1979): those below 0.05 hold together at that level."""
    order = np.argsort(p, kind="stable")
    corrected = np.empty(len(p))
    largest = 0.0
    for rank, at in enumerate(order):
        largest = max(largest, min(1.0, (len(p) - rank) * p[at]))
        corrected[at] = largest
    return corrected.tolist()
