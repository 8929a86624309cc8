"""Strategies on logged traffic: what they would have earned, where each query was answered by one model only.

A strategy is judged on the rows where it would have chosen the model that answered (Li et al., "Unbiased Offline Evaluation of
Contextual-bandit-based News Article Recommendation Algorithms", arXiv 1003.5956). Where the log says with which probability that model
was chosen, rows weigh the inverse of it and weights are normalised (Swaminathan and Joachims, "The Self-Normalized Estimator for
Counterfactual Learning", 2015): right for any way of choosing that gave every model a chance. Without probabilities the mean is right only
if what answered was drawn without a look at the query.
"""
# Shapes: N rows, M models

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from anabranch.errors import DataError
from anabranch.gateway.dataset import Recorded
from anabranch.gateway.query import Pool
from anabranch.gateway.referee.compare import DRAWS, resampled_means
from anabranch.gateway.strategy import Strategy

PROBABILITY = "probability"


@dataclass(frozen=True)
class Replayed:
    """What a strategy would have earned.

    Attributes:
        name: of the strategy.
        matched: rows whose answer it would have asked for.
        effective: how many rows of equal weight tell as much.
        score: estimated mean score; None if nothing matched.
        interval: 95%, bootstrap over rows.
        cost: estimated mean dollars of a call; None if unknown.
        gain: score - that of the log, and its interval, paired.
    """

    name: str
    matched: int
    effective: float
    score: float | None
    interval: list[float] | None
    cost: float | None
    gain: float | None
    gain_interval: list[float] | None


@dataclass(frozen=True)
class Replay:
    """Strategies on a log.

    Attributes:
        strategies: one each.
        rows: of the log.
        score, cost: means of what was answered.
        has_probabilities: the log says with which probability models were chosen.
    """

    strategies: list[Replayed]
    rows: int
    score: float
    cost: float | None
    has_probabilities: bool

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return asdict(self)


def replay(
    strategies: Mapping[str, Strategy], log: Recorded, pool: Pool, *, draws: int = DRAWS, seed: int = 0
) -> Replay:
    """Estimate what fitted strategies would have earned on logged traffic.

    Args:
        strategies: by name, fitted, on other rows.
        log: scores where a model was asked, NaN elsewhere; ``signals["probability"]`` where known.
        pool: models to choose among.
        draws: of the bootstrap.
        seed: of the draws.

    Raises DataError for an empty log, or probabilities that are not above 0 and at most 1.
    """
    known_NM = np.isfinite(log.score_NM)
    if not known_NM.any():
        raise DataError("the log holds no scored answer; send feedback for some requests first")
    log = log.take(np.flatnonzero(known_NM.any(1)))
    known_NM = np.isfinite(log.score_NM)
    weight_NM = _weights(log, known_NM)
    logged_N = _row_means(log.score_NM, known_NM)
    cost_NM = log.cost_NM
    found = []
    for name, strategy in strategies.items():
        model_N = strategy.play(log, pool).model_N
        found.append(_estimate(name, log, model_N, weight_NM, logged_N, draws, seed))
    cost = None if cost_NM is None else float(np.nanmean(np.where(known_NM, cost_NM, np.nan)))
    return Replay(found, len(log), float(logged_N.mean()), cost, PROBABILITY in log.signals)


def _weights(log: Recorded, known_NM: np.ndarray) -> np.ndarray:
    chance_NM = log.signals.get(PROBABILITY)
    if chance_NM is None:
        return known_NM.astype(float)
    wrong_N = (known_NM & ~((chance_NM > 0) & (chance_NM <= 1))).any(1)
    if wrong_N.any():
        row = int(np.flatnonzero(wrong_N)[0])
        raise DataError(
            f"row {row + 1} of the log has no probability between 0 and 1 for a model that answered; give it in every row, or in none"
        )
    return np.where(known_NM, 1 / np.where(known_NM, chance_NM, 1), 0.0)


def _row_means(value_NM: np.ndarray, known_NM: np.ndarray) -> np.ndarray:
    return np.where(known_NM, value_NM, 0).sum(1) / known_NM.sum(1)


def _estimate(
    name: str, log: Recorded, model_N: np.ndarray, weight_NM: np.ndarray, logged_N: np.ndarray, draws: int, seed: int
) -> Replayed:
    rows = np.arange(len(log))
    weight_N = weight_NM[rows, model_N]
    matched = int((weight_N > 0).sum())
    if not matched:
        return Replayed(name, 0, 0.0, None, None, None, None, None)
    value_N = np.where(weight_N > 0, weight_N * np.nan_to_num(log.score_NM[rows, model_N]), 0)
    score = float(value_N.sum() / weight_N.sum())
    count_N = np.ones(len(log))
    mean_B3 = resampled_means(np.column_stack([value_N, weight_N, logged_N]), count_N, draws, seed)
    # A draw without a match estimates nothing.
    mean_B3 = mean_B3[mean_B3[:, 1] > 0]
    score_B = mean_B3[:, 0] / mean_B3[:, 1]
    cost = None
    if log.cost_NM is not None:
        cost_N = log.cost_NM[rows, model_N]
        priced_N = (weight_N > 0) & np.isfinite(cost_N)
        cost = float(np.average(cost_N[priced_N], weights=weight_N[priced_N])) if priced_N.any() else None
    return Replayed(
        name, matched, float(weight_N.sum() ** 2 / (weight_N**2).sum()), score, _interval(score_B), cost,
        score - float(logged_N.mean()), _interval(score_B - mean_B3[:, 2]),
    )  # fmt: skip


def _interval(value_B: np.ndarray) -> list[float]:
    low, high = np.quantile(value_B, (0.025, 0.975))
    return [float(low), float(high)]
