"""Routing between a weak and a strong model, judged as RouteLLM does (Ong et al., arXiv 2406.18665), at every cut.

A router scores how much a query needs the strong model. Sending the k highest of N to it, for k = 0 to N, gives a path of qualities
from all-weak to all-strong. The performance gap recovered at a cut is ``PGR = (q - q_weak) / (q_strong - q_weak)``.

    APGR     the area under PGR over the share of strong calls
    CPT(x)   the smallest share of strong calls that recovers x of the gap

Where scores tie, the path is that of a random order among them, on average.
"""
# Shapes: N queries, C cuts

from dataclasses import dataclass

import numpy as np

from anabranch.errors import InputError

TARGETS = (0.2, 0.5, 0.8)
BINS = 10


@dataclass(frozen=True)
class Recovery:
    """What a router makes of two models.

    Attributes:
        share_C: shares of strong calls, rising from 0 to 1.
        quality_C: mean quality at each.
        pgr_C: performance gap recovered at each.
    """

    share_C: np.ndarray
    quality_C: np.ndarray
    pgr_C: np.ndarray

    @property
    def apgr(self) -> float:
        """0.5 for a random order; above 1 is possible where the weak model is right and the strong one is not."""
        return float(np.trapezoid(self.pgr_C, self.share_C))

    def cpt(self, target: float) -> float | None:
        """Smallest share of strong calls, between two cuts too, with PGR of at least ``target``; None if none has it."""
        reached = np.flatnonzero(self.pgr_C >= target - 1e-12)
        return None if not len(reached) else float(self.share_C[reached[0]])


def recovery(score_N: np.ndarray, weak_N: np.ndarray, strong_N: np.ndarray) -> Recovery:
    """The path over all N + 1 cuts.

    Args:
        score_N: how much each query is for the strong model.
        weak_N: quality of the weak model's answer.
        strong_N: of the strong model's.

    Raises InputError for no query, values that are not finite, or models that are equally good on average.
    """
    score_N, weak_N, strong_N = (np.asarray(values, float) for values in (score_N, weak_N, strong_N))
    _check(score_N, weak_N, strong_N)
    order_N = np.argsort(-score_N, kind="stable")
    gain_N = (strong_N - weak_N)[order_N]
    _, start, count = np.unique(-score_N[order_N], return_index=True, return_counts=True)
    gain_N = np.repeat(np.add.reduceat(gain_N, start) / count, count)
    share_C = np.arange(len(score_N) + 1) / len(score_N)
    return _recovery(share_C, weak_N.mean() + np.append(0.0, np.cumsum(gain_N)) / len(score_N), weak_N, strong_N)


def recovery_in_bins(score_N: np.ndarray, weak_N: np.ndarray, strong_N: np.ndarray, bins: int = BINS) -> Recovery:
    """The path as RouteLLM's code draws it: cuts at the quantiles of the score, and the all-weak end. Arguments as of `recovery`."""
    score_N, weak_N, strong_N = (np.asarray(values, float) for values in (score_N, weak_N, strong_N))
    _check(score_N, weak_N, strong_N)
    threshold = np.unique(np.quantile(score_N, np.linspace(0, 1, bins + 1)))[::-1]
    is_strong = score_N >= threshold[:, None]
    quality = np.where(is_strong, strong_N, weak_N).mean(1)
    share_C = np.append(0.0, is_strong.mean(1))
    return _recovery(share_C, np.append(weak_N.mean(), quality), weak_N, strong_N)


def _check(score_N: np.ndarray, weak_N: np.ndarray, strong_N: np.ndarray) -> None:
    if not score_N.shape == weak_N.shape == strong_N.shape or score_N.ndim != 1 or not len(score_N):
        raise InputError("scores and the qualities of two models must be of the same queries, at least one")
    if not all(np.isfinite(values).all() for values in (score_N, weak_N, strong_N)):
        raise InputError("scores and qualities must be finite; leave out queries without an outcome")
    if strong_N.mean() == weak_N.mean():
        raise InputError("both models are equally good on average, so there is no gap to recover")


def _recovery(share_C: np.ndarray, quality_C: np.ndarray, weak_N: np.ndarray, strong_N: np.ndarray) -> Recovery:
    gap = strong_N.mean() - weak_N.mean()
    return Recovery(share_C, quality_C, (quality_C - weak_N.mean()) / gap)
