"""Strategies on logged traffic: what they would have earned, where each query was answered by one model only.

A strategy is judged on the rows where it would have chosen the model that was chosen (Li et al., "Unbiased Offline Evaluation of
Contextual-bandit-based News Article Recommendation Algorithms", arXiv 1003.5956). Where the log says with which probability p that model
was chosen, rows weigh w = 1/p, which is right for any way of choosing that gave every model a chance. Three estimates, on the same rows:

    ips             mean w r                                       Horvitz and Thompson 1952; r is the score, w = 0 without a match
    score           sum w r / sum w                                Swaminathan and Joachims, "The Self-Normalized Estimator", 2015
    doubly robust   mean q(x, chosen) + w (r - q(x, asked))        Dudik, Langford and Li, arXiv 1103.4601

q is what a ridge regression on the vectors (without vectors each model's mean) expects of a model, learned from other rows than it is
used on. The doubly robust estimate is right if the probabilities are, and narrower the better q is.

Rows whose choice was not drawn (a probability of 1, or none, as where the sender named the model) say nothing of what another model would
have done, and are left out where others were drawn. A model that was drawn and never asked, since no budget had room for it, has a
probability without a score: its row counts as drawn and matches nobody. Where none was drawn, the mean over matches is right only if what
answered was chosen without a look at the query.
"""
# Shapes: N rows, M models

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from anabranch.errors import DataError
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.query import Pool
from anabranch.routers.contract.strategy import Strategy
from anabranch.routers.data.splits import groups
from anabranch.routers.referee.bounds import Binned, in_parts
from anabranch.routers.referee.compare import DRAWS, resampled_means
from anabranch.routers.score_scale import range_of
from anabranch.routers.strategies.ridge import Ridge
from anabranch.routers.strategies.training import folds, means

PROBABILITY = "probability"

# Parts, each of which is expected from the others.
FOLDS = 5
_NO_SUPPORT: dict[str, Any] = {"support": 0.0, "support_interval": [0.0, 0.0]}


@dataclass(frozen=True)
class Replayed:
    """What a strategy would have earned.

    Attributes:
        name: of the strategy.
        matched: rows whose answer it would have asked for.
        effective: how many rows of equal weight tell as much.
        score: estimated mean score, weights normalised; None if nothing matched.
        interval: 95%, bootstrap over questions: copies of one are drawn together.
        cost: estimated mean dollars of a call; None if unknown.
        gain: score - what the log got on the rows that the score is of (those that were drawn, if any were), and its interval, paired.
        ips: the estimate without normalised weights; None without probabilities.
        doubly_robust: and its interval; None without probabilities.
        support: mean weight, and its interval (see `bounds`); 1 but for chance where the log may have made all of the strategy's choices,
            and else the share of them that it may have made. The estimates are of that share. Surely above 1, the strategy draws by the
            very lot that the log was drawn by (kind and seed are the same), and no estimate is right.
    """

    name: str
    matched: int
    effective: float
    score: float | None
    interval: list[float] | None
    cost: float | None
    gain: float | None
    gain_interval: list[float] | None
    ips: float | None = None
    doubly_robust: float | None = None
    doubly_robust_interval: list[float] | None = None
    support: float | None = None
    support_interval: list[float] | None = None


@dataclass(frozen=True)
class Replay:
    """Strategies on a log.

    Attributes:
        strategies: one each.
        rows: of the log.
        score, cost: means of what was answered.
        has_probabilities: the log says with which probability models were chosen.
        drawn: rows in which another model might have been chosen; all estimates are of them, if there are any.
        score_range: of the answers' scores; 0 to 1 where they keep to that.
    """

    strategies: list[Replayed]
    rows: int
    score: float
    cost: float | None
    has_probabilities: bool
    drawn: int = 0
    score_range: tuple[float, float] = (0.0, 1.0)

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
    weight_NM, drawn_N = weights(log, known_NM)
    logged_N = _row_means(log.score_NM, known_NM)
    expected_NM = expected(log, seed) if drawn_N.any() else None
    found = []
    for name, strategy in strategies.items():
        model_N = strategy.play(log, pool).model_N
        found.append(_estimate(name, log, model_N, weight_NM, drawn_N, expected_NM, logged_N, draws, seed))
    cost = None if log.cost_NM is None else float(np.nanmean(np.where(known_NM, log.cost_NM, np.nan)))
    return Replay(
        found,
        len(log),
        float(logged_N.mean()),
        cost,
        PROBABILITY in log.signals,
        int(drawn_N.sum()),
        range_of(log.score_NM),
    )


def weights(log: Recorded, known_NM: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What a match weighs, and the rows whose choice was drawn. Raises DataError for what is no probability."""
    chance_NM = log.signals.get(PROBABILITY)
    if chance_NM is None:
        return known_NM.astype(float), np.zeros(len(log), bool)
    has_NM = ~np.isnan(chance_NM)
    wrong_N = (has_NM & ~((chance_NM > 0) & (chance_NM <= 1))).any(1)
    if wrong_N.any():
        row = int(np.flatnonzero(wrong_N)[0])
        raise DataError(f"row {row + 1} of the log has no probability between 0 and 1 for a model that answered")
    drawn_N = (has_NM & (chance_NM < 1)).any(1)
    if not drawn_N.any():
        return known_NM.astype(float), drawn_N
    used_NM = known_NM & has_NM & drawn_N[:, None]
    return np.where(used_NM, 1 / np.where(used_NM, chance_NM, 1), 0.0), drawn_N


def expected(log: Recorded, seed: int) -> np.ndarray:
    """Score ``[N, M]`` that each model is expected to get, learned from the other parts of the log."""
    expected_NM = np.empty(log.score_NM.shape)
    parts = min(FOLDS, len(log))
    # Copies of a question stay on one side, or it would be expected from itself.
    group_N = groups(log)
    parts = min(parts, int(group_N.max()) + 1)
    for learned_G, held_G in folds(int(group_N.max()) + 1, parts, seed) if parts > 1 else ():
        learned, held = (np.flatnonzero(np.isin(group_N, part_G)) for part_G in (learned_G, held_G))
        part = log.take(learned)
        mean_M = means(part.score_NM)
        # Of a model that this part says nothing of, what any model gets.
        usual = float(np.nanmean(part.score_NM))
        expected_NM[held] = np.where(np.isfinite(mean_M), mean_M, usual)
        if log.vector_ND is not None:
            quality_NM = Ridge(Ridge.Config(predicts_cost=False)).fit(part).predict(log.take(held)).quality_NM
            expected_NM[held] = np.where(np.isfinite(quality_NM), quality_NM, expected_NM[held])
    if parts < 2:
        expected_NM[:] = np.nanmean(log.score_NM)
    return expected_NM


def _row_means(value_NM: np.ndarray, known_NM: np.ndarray) -> np.ndarray:
    return np.where(known_NM, value_NM, 0).sum(1) / known_NM.sum(1)


def _estimate(
    name: str,
    log: Recorded,
    model_N: np.ndarray,
    weight_NM: np.ndarray,
    drawn_N: np.ndarray,
    expected_NM: np.ndarray | None,
    logged_N: np.ndarray,
    draws: int,
    seed: int,
) -> Replayed:
    rows = np.arange(len(log))
    weight_N = weight_NM[rows, model_N]
    matched = int((weight_N > 0).sum())
    if not matched:
        return Replayed(name, 0, 0.0, None, None, None, None, None, **_NO_SUPPORT if drawn_N.any() else {})
    value_N = np.where(weight_N > 0, weight_N * np.nan_to_num(log.score_NM[rows, model_N]), 0)
    robust_N = np.zeros(len(log))
    if expected_NM is not None:
        expected_N = expected_NM[rows, model_N]
        robust_N = np.where(drawn_N, expected_N + value_N - weight_N * expected_N, 0.0)
    # Rows that estimates are of: what the log got on others is no match for them.
    used_N = drawn_N if drawn_N.any() else np.ones(len(log), bool)
    summed_N5 = np.column_stack([value_N, weight_N, np.where(used_N, logged_N, 0.0), robust_N, used_N])
    group_N = groups(log)
    summed_G5 = np.zeros((group_N.max() + 1, 5))
    np.add.at(summed_G5, group_N, summed_N5)
    mean_B5 = resampled_means(summed_G5, np.ones(len(summed_G5)), draws, seed)
    # A draw without a match estimates nothing.
    mean_B5 = mean_B5[mean_B5[:, 1] > 0]
    score, score_B = float(value_N.sum() / weight_N.sum()), mean_B5[:, 0] / mean_B5[:, 1]
    logged, logged_B = float(logged_N[used_N].mean()), mean_B5[:, 2] / mean_B5[:, 4]
    cost = None
    if log.cost_NM is not None:
        cost_N = log.cost_NM[rows, model_N]
        priced_N = (weight_N > 0) & np.isfinite(cost_N)
        cost = float(np.average(cost_N[priced_N], weights=weight_N[priced_N])) if priced_N.any() else None
    found = Replayed(
        name,
        matched,
        float(weight_N.sum() ** 2 / (weight_N**2).sum()),
        score,
        _interval(score_B),
        cost,
        score - logged,
        _interval(score_B - logged_B),
    )
    if not drawn_N.any():
        return found
    num_drawn = drawn_N.sum()
    return replace(
        found,
        ips=float(value_N.sum() / num_drawn),
        doubly_robust=float(robust_N.sum() / num_drawn),
        doubly_robust_interval=_interval(mean_B5[:, 3] / mean_B5[:, 4]),
        support=float(weight_N.sum() / num_drawn),
        support_interval=_supported(summed_G5[:, 1], summed_G5[:, 4], float(weight_NM.max())),
    )


def _supported(weight_G: np.ndarray, drawn_G: np.ndarray, heaviest: float) -> list[float]:
    """Interval of the mean weight of a drawn row, from the sums of each question, of which few may be most of the log (see `bounds`)."""
    weight_G, drawn_G = weight_G[drawn_G > 0], drawn_G[drawn_G > 0]
    mean = float(weight_G.sum() / drawn_G.sum())
    scale, most = 1 / float(drawn_G.mean()), float(drawn_G.max())
    value_G = in_parts(mean + (weight_G - mean * drawn_G) * scale)
    # Of copies none of which matched, and of copies that all did, by the smallest chance.
    low = Binned.of(value_G).lower(0.025, mean - mean * most * scale)
    high = -Binned.of(-value_G).lower(0.025, -mean - (heaviest - mean) * most * scale)
    return [max(0.0, low), min(heaviest, high)]


def _interval(value_B: np.ndarray) -> list[float]:
    low, high = np.quantile(value_B, (0.025, 0.975))
    return [float(low), float(high)]
