"""Matrix factorisation (RouteLLM): models and queries meet in one space, learned from who won.

    P(a beats b | x) = sigma(delta_a - delta_b),    delta_M = w^T (v_M o W x),    |v_M| = 1

Source: Ong et al. 2024, RouteLLM (arXiv 2406.18665, section 4.2, eq. 8), code lm-sys/RouteLLM: d = 128, Adam at 3e-4 with L2 1e-5,
batches of 64, 100 epochs, noise of standard deviation 0.05 added to the vectors in training, ties left out. Initial values are
PyTorch's, as there.

Recorded outcomes hold up to M (M - 1) / 2 battles a query where the paper's data holds one, so an epoch draws
``battles_per_query`` of them anew.
Prediction: for two models the published win probability, for more the mean of it over the rivals. delta is linear in x, so
deciding is one small product.
"""
# Shapes: N queries, M models, D dimensions of a vector, F factors (the paper's d), B battles of a batch

from typing import Any, Self

import numpy as np

from anabranch.config import Field, configclass
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.predictor import Prediction, Predictor
from anabranch.routers.contract.query import Query
from anabranch.routers.contract.strategy import Facts
from anabranch.routers.logistic import sigmoid
from anabranch.routers.strategies.adam import Adam, Parameters
from anabranch.routers.strategies.battles import Battles, battles_of, win_rates
from anabranch.routers.strategies.knn import one_vector
from anabranch.routers.strategies.training import Kept, means, training_set, vector_of, vectors_of


class MatrixFactorisation(Kept, Predictor, kind="mf"):
    """Win rates from the product of a model's and a query's factors."""

    @configclass
    class Config(Predictor.Config):
        """The published settings.

        Attributes:
            dim: F.
            rate: of Adam.
            weight_decay: L2, in the gradient.
            batch: battles.
            epochs: passes.
            noise: standard deviation of what is added to every number of a vector in training.
            battles_per_query: drawn in each epoch; None for all.
        """

        dim: int = Field(default=128, ge=1)
        rate: float = Field(default=3e-4, gt=0)
        weight_decay: float = Field(default=1e-5, ge=0)
        batch: int = Field(default=64, ge=1)
        epochs: int = Field(default=100, ge=1)
        noise: float = Field(default=0.05, ge=0)
        battles_per_query: int | None = Field(default=1, ge=1)

    learned = ("delta_MD", "known_M")

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.delta_MD, self.known_M = np.zeros((0, 0)), np.zeros(0, bool)

    def fit(self, data: Recorded, *, seed: int = 0) -> Self:
        """Learn from decided battles; without any, all models count as equal."""
        training_set(data, "mf")
        self.models, self.known_M = data.models, np.isfinite(means(data.score_NM))
        x_ND = np.asarray(data.vector_ND, float)
        self.delta_MD = np.zeros((len(self.models), x_ND.shape[1]))
        if len(self.models) == 1:
            return self
        battles = battles_of(data.score_NM, "mf").decided()
        if len(battles):
            p = self._learned(x_ND, battles, np.random.default_rng(seed))
            unit_MF = p["v_MF"] / np.linalg.norm(p["v_MF"], axis=1, keepdims=True)
            self.delta_MD = (unit_MF * p["w_F"]) @ p["W_FD"]
        return self

    def _learned(self, x_ND: np.ndarray, battles: Battles, rng: np.random.Generator) -> Parameters:
        config = self.config
        parameters = initial(len(self.models), x_ND.shape[1], config.dim, rng)
        adam = Adam(parameters, rate=config.rate, penalty=config.weight_decay)
        for _ in range(config.epochs):
            drawn = _drawn(battles.row_B, config.battles_per_query, rng)
            for begin in range(0, len(drawn), config.batch):
                at = drawn[begin : begin + config.batch]
                x_BD = x_ND[battles.row_B[at]]
                x_BD = x_BD + rng.standard_normal(x_BD.shape) * config.noise
                adam.step(loss_and_gradients(parameters, x_BD, battles.winner_B[at], battles.loser_B[at])[1])
        return parameters

    @property
    def learned_dim(self) -> int | None:
        """See `Predictor`."""
        return self.delta_MD.shape[1] or None

    def predict(self, data: Recorded) -> Prediction:
        """Of every row."""
        vector_ND = vectors_of(data, self.delta_MD.shape[1], "mf").astype(float)
        return Prediction(quality_NM=win_rates(vector_ND @ self.delta_MD.T, self.known_M))

    def strengths(self, query: Query) -> np.ndarray:
        """delta."""
        vector_1D = vectors_of(one_vector(query), self.delta_MD.shape[1], "mf").astype(float)
        return (vector_1D @ self.delta_MD.T)[0]

    def predict_one(self, query: Query) -> Prediction:
        """As `predict`."""
        return self.predict(one_vector(query))

    def explain(self, query: Query) -> Facts:
        """Log odds of each model, up to a common number."""
        vector_1D = vector_of(query, self.delta_MD.shape[1], "mf").astype(float)
        return {"log_odds": dict(zip(self.models, np.round(vector_1D @ self.delta_MD.T, 4)[0].tolist(), strict=True))}


def initial(num_models: int, dim: int, factors: int, rng: np.random.Generator) -> Parameters:
    """v from N(0, 1); W and w even within +-1 / sqrt(inputs)."""
    return {
        "v_MF": rng.standard_normal((num_models, factors)),
        "W_FD": rng.uniform(-1, 1, (factors, dim)) / np.sqrt(dim),
        "w_F": rng.uniform(-1, 1, factors) / np.sqrt(factors),
    }


def loss_and_gradients(
    parameters: Parameters, x_BD: np.ndarray, winner_B: np.ndarray, loser_B: np.ndarray
) -> tuple[float, Parameters]:
    """Mean of -log P(winner beats loser), and its gradients."""
    v_MF, w_FD, w_F = parameters["v_MF"], parameters["W_FD"], parameters["w_F"]
    length_M1 = np.linalg.norm(v_MF, axis=1, keepdims=True)
    unit_MF = v_MF / length_M1
    gap_BF, h_BF = unit_MF[winner_B] - unit_MF[loser_B], x_BD @ w_FD.T
    logit_B = (gap_BF * h_BF) @ w_F
    # Of the loss by the logit.
    slope_B1 = -sigmoid(-logit_B)[:, None] / len(logit_B)
    dgap_BF = slope_B1 * h_BF * w_F
    dunit_MF = np.zeros_like(v_MF)
    np.add.at(dunit_MF, winner_B, dgap_BF)
    np.subtract.at(dunit_MF, loser_B, dgap_BF)
    # The part along v changes only its length.
    inward_M1 = (dunit_MF * unit_MF).sum(axis=1, keepdims=True)
    gradients = {
        "v_MF": (dunit_MF - inward_M1 * unit_MF) / length_M1,
        "W_FD": (slope_B1 * gap_BF * w_F).T @ x_BD,
        "w_F": (gap_BF * h_BF).T @ slope_B1[:, 0],
    }
    return float(np.logaddexp(0, -logit_B).mean()), gradients


def _drawn(row_B: np.ndarray, per_query: int | None, rng: np.random.Generator) -> np.ndarray:
    """Places of the battles of one epoch, in random order: all, or up to so many of each query."""
    order = rng.permutation(len(row_B))
    if per_query is None:
        return order
    by_row = order[np.argsort(row_B[order], kind="stable")]
    first = np.flatnonzero(np.r_[True, np.diff(row_B[by_row]) > 0])
    rank = np.arange(len(by_row)) - np.repeat(first, np.diff(np.r_[first, len(by_row)]))
    return rng.permutation(by_row[rank < per_query])
