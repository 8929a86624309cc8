"""Similarity-weighted ranking (RouteLLM): ratings of the models from battles on recorded queries, those like this one counting more.

    weight_n  = 10 * 10^(s_n / max s),     s_n the cosine of the query with recorded query n
    ratings   = argmax over xi of sum_n weight_n log P(outcome_n),   P(i beats j) = 1 / (1 + 10^((xi_j - xi_i) / 400))     (Bradley-Terry)

Source: Ong et al. 2024, RouteLLM (arXiv 2406.18665, section 4.2, eq. 6 and appendix on data), code lm-sys/RouteLLM. As there,
models are first put into 10 tiers by ratings from all battles alike, tiers being the split of the sorted ratings of least sum of
variances, and ratings of tiers are fitted, so that rare models borrow from their peers; a tie is half a win. With no more models
than tiers each has its own.

Prediction: for two models the published win probability; for more the mean of it over the rivals, which ranks as the ratings do.
Departure: a tiny ``penalty`` on squared strengths, without which a model that always wins has no rating.
"""
# Shapes: Q queries, N recorded queries, M models, T tiers, D dimensions

from typing import Any, Self

import numpy as np

from anabranch.config import Field, configclass
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.predictor import Prediction, Predictor
from anabranch.routers.contract.query import Query
from anabranch.routers.contract.strategy import Facts
from anabranch.routers.strategies.battles import battles_of, win_rates
from anabranch.routers.strategies.training import Kept, means, training_set, vector_of, vectors_of

# Elo points in a unit of log odds.
POINTS = 400 / np.log(10)

# Similarities held at once.
PIECE = 1 << 23


class SwElo(Kept, Predictor, kind="sw_elo"):
    """Bradley-Terry ratings, fitted anew for every query with weights by similarity."""

    @configclass
    class Config(Predictor.Config):
        """The published constants.

        Attributes:
            num_tiers: groups of models of like strength that share a rating.
            gamma: base of the weights.
            penalty: of squared strengths, against one battle a tier; tiny, it only keeps the ratings of who never loses finite.
        """

        num_tiers: int = Field(default=10, ge=1)
        gamma: float = Field(default=10.0, gt=1)
        penalty: float = Field(default=1e-5, gt=0)

    learned = ("vector_ND", "wins_NP", "tier_M", "known_M", "rating_M", "start_T")

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.vector_ND, self.wins_NP = np.zeros((0, 0), np.float32), np.zeros((0, 0), np.float32)
        self.tier_M, self.known_M, self.rating_M = np.zeros(0, np.int64), np.zeros(0, bool), np.zeros(0)
        # Strengths of the tiers over all, from where the search for a query's begins.
        self.start_T = np.zeros(0)

    def fit(self, data: Recorded, *, seed: int = 0) -> Self:
        """Ratings of all battles alike, tiers from them, and wins of tier over tier in every row. Needs no chance."""
        training_set(data, "sw_elo")
        self.models, self.known_M = data.models, np.isfinite(means(data.score_NM))
        num_models = len(self.models)
        if num_models == 1:
            self.vector_ND, self.wins_NP = np.asarray(data.vector_ND[:1], np.float32), np.zeros((1, 1), np.float32)  # type: ignore[index]
            self.tier_M, self.rating_M = np.zeros(1, np.int64), np.zeros(1)
            self.start_T = np.zeros(1)
            return self
        battles = battles_of(data.score_NM, "sw_elo")
        own_M = np.arange(num_models)
        wins_NMM = _wins(battles, own_M, len(data))
        self.rating_M = bradley_terry(wins_NMM.sum(0)[None], self.config.penalty)[0] * POINTS + 1000
        self.tier_M = tiers(self.rating_M, self.config.num_tiers)
        fought = np.unique(battles.row_B)
        self.vector_ND = np.ascontiguousarray(data.vector_ND[fought], np.float32)  # type: ignore[index]
        wins_NTT = _wins(battles, self.tier_M, len(data))[fought]
        self.start_T = bradley_terry(wins_NTT.sum(0, dtype=float)[None], self.config.penalty)[0]
        self.wins_NP = wins_NTT.reshape(len(fought), -1)
        return self

    @property
    def learned_dim(self) -> int | None:
        """See `Predictor`."""
        return self.vector_ND.shape[1] or None

    def predict(self, data: Recorded) -> Prediction:
        """Of every row, some thousand at a time."""
        vector_QD = vectors_of(data, self.vector_ND.shape[1], "sw_elo")
        step = max(1, PIECE // len(self.vector_ND))
        pieces = [self.ratings(vector_QD[at : at + step]) for at in range(0, len(vector_QD), step)]
        strength_QM = np.concatenate([np.zeros((0, len(self.models))), *pieces]) / POINTS
        return Prediction(quality_NM=win_rates(strength_QM, self.known_M))

    def strengths(self, query: Query) -> np.ndarray:
        """Ratings as log odds."""
        return self.ratings(vector_of(query, self.vector_ND.shape[1], "sw_elo"))[0] / POINTS

    def predict_one(self, query: Query) -> Prediction:
        """With the ratings for the explanation."""
        rating_1M = self.ratings(vector_of(query, self.vector_ND.shape[1], "sw_elo"))
        rounded = dict(zip(self.models, np.round(rating_1M[0], 1).tolist(), strict=True))
        return Prediction(quality_NM=win_rates(rating_1M / POINTS, self.known_M), details={"ratings": rounded})

    def ratings(self, vector_QD: np.ndarray) -> np.ndarray:
        """Elo points ``[Q, M]`` around 1000, with weights by similarity to each query."""
        similarity_QN = vector_QD @ self.vector_ND.T if len(vector_QD) > 1 else (self.vector_ND @ vector_QD[0])[None]
        largest_Q1 = np.maximum(similarity_QN.max(axis=1, keepdims=True), 1e-6)
        rate = np.float32(np.log(self.config.gamma))
        # Gamma * gamma^(s / max s).
        weight_QN = np.exp(rate * (1 + similarity_QN / largest_Q1))
        num_tiers = len(self.start_T)
        wins_QTT = (weight_QN @ self.wins_NP).astype(float).reshape(-1, num_tiers, num_tiers)
        return bradley_terry(wins_QTT, self.config.penalty, self.start_T)[:, self.tier_M] * POINTS + 1000

    def explain(self, query: Query) -> Facts:
        """Ratings for this query, and over all."""
        overall = dict(zip(self.models, np.round(self.rating_M, 1).tolist(), strict=True))
        return {**(self.predict_one(query).details or {}), "overall": overall}


def _wins(battles: Any, group_M: np.ndarray, num_rows: int) -> np.ndarray:
    """Wins of group over group in every row, float32 ``[N, T, T]``; a tie is half a win of each, within a group nothing is counted."""
    num_groups = int(group_M.max()) + 1
    wins_NTT = np.zeros((num_rows, num_groups, num_groups), np.float32)
    winner_B, loser_B = group_M[battles.winner_B], group_M[battles.loser_B]
    np.add.at(wins_NTT, (battles.row_B, winner_B, loser_B), np.where(battles.tie_B, 0.5, 1.0))
    np.add.at(wins_NTT, (battles.row_B, loser_B, winner_B), np.where(battles.tie_B, 0.5, 0.0))
    wins_NTT[:, np.arange(num_groups), np.arange(num_groups)] = 0
    return wins_NTT


def bradley_terry(wins_QTT: np.ndarray, penalty: float = 1e-5, start_T: np.ndarray | None = None) -> np.ndarray:
    """Strengths in log odds ``[Q, T]``, of mean 0, of largest likelihood; ``wins_QTT[q, i, j]`` is how often i beat j, in any weights.

    Minimises -sum_ij wins_ij log sigma(s_i - s_j) + penalty |s|^2 / 2, wins scaled to sum to T, by Newton's method for all Q at once.
    For two without a penalty that is s_1 - s_2 = log(wins_12 / wins_21). ``start_T`` is where to begin, of mean 0; the result is the same.
    """
    num_queries, num_tiers = wins_QTT.shape[:2]
    total_Q11 = np.maximum(wins_QTT.sum((1, 2)), 1e-30)[:, None, None]
    # So that the penalty does not depend on the size of weights.
    wins_QTT = wins_QTT * num_tiers / total_Q11
    played_QTT = wins_QTT + wins_QTT.transpose(0, 2, 1)
    strength_QT = np.zeros((num_queries, num_tiers)) if start_T is None else np.tile(start_T, (num_queries, 1))
    eye_TT = np.eye(num_tiers)

    def loss(strength_QT: np.ndarray) -> np.ndarray:
        gap_QTT = strength_QT[:, :, None] - strength_QT[:, None]
        return (wins_QTT * np.logaddexp(0, -gap_QTT)).sum((1, 2)) + 0.5 * penalty * (strength_QT**2).sum(1)

    now_Q = loss(strength_QT)
    for _ in range(60):
        p_QTT = 0.5 * (1 + np.tanh(0.5 * (strength_QT[:, :, None] - strength_QT[:, None])))
        gradient_QT = (played_QTT * p_QTT - wins_QTT).sum(2) + penalty * strength_QT
        curve_QTT = -played_QTT * p_QTT * (1 - p_QTT)
        curve_QTT = curve_QTT + eye_TT * (penalty - curve_QTT.sum(2))[:, :, None]
        step_QT = np.linalg.solve(curve_QTT, gradient_QT[..., None])[..., 0]
        if (gradient_QT * step_QT).sum(1).max(initial=0.0) < 1e-13:
            break
        size_Q1 = np.ones((num_queries, 1))
        new_Q = loss(strength_QT - step_QT)
        # Halve the steps that would raise the loss.
        while (worse_Q := new_Q > now_Q + 1e-12).any():
            size_Q1[worse_Q] /= 2
            new_Q = loss(strength_QT - size_Q1 * step_QT)
        strength_QT, now_Q = strength_QT - size_Q1 * step_QT, new_Q
    return strength_QT - strength_QT.mean(axis=1, keepdims=True)


def tiers(value_M: np.ndarray, num_tiers: int) -> np.ndarray:
    """Tier of each value, 0 the lowest: the split of the sorted values into ``num_tiers`` runs of least sum of variances
    (RouteLLM's dynamic programme).

    best[j, t] = min over i of best[i, t - 1] + var(values i ... j). Fewer tiers where there are fewer values.
    """
    order = np.argsort(value_M, kind="stable")
    sorted_M = value_M[order]
    count = len(sorted_M)
    num_tiers = min(num_tiers, count)
    # Of values i up to but without j.
    variance_MM = np.full((count + 1, count + 1), np.inf)
    for begin in range(count):
        for end in range(begin + 1, count + 1):
            variance_MM[begin, end] = sorted_M[begin:end].var()
    best_M = variance_MM[0].copy()
    cuts = []
    for _ in range(num_tiers - 1):
        total_MM = best_M[:, None] + variance_MM
        cuts.append(total_MM.argmin(axis=0))
        best_M = total_MM.min(axis=0)
    tier_M, end = np.zeros(count, np.int64), count
    for tier in range(num_tiers - 1, -1, -1):
        begin = int(cuts[tier - 1][end]) if tier else 0
        tier_M[order[begin:end]] = tier
        end = begin
    return tier_M
