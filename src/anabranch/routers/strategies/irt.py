"""Item response theory: models have abilities, queries have demands and a difficulty.

    quality_M(x) = scale(sigma(a(x)^T theta_M - b(x))),    a(x) = A x + a_0 (what the query asks for),    b(x) = beta^T x + beta_0
    (how hard it is)

Source: IRT-Router (Song et al. 2025, arXiv 2506.01048, section 3: multidimensional IRT with demands and difficulty from the
query's embedding), after the multidimensional two-parameter model (Reckase 2009). Here theta_M is free for each model; all is
learned together by Adam on soft labels.

Demands and difficulty are shared, so a model has only F numbers of its own: `add_model` places a new one from a few dozen scores,
the rest staying as it is.
"""
# Shapes: N queries, B queries of a batch, M models, D dimensions, F abilities

from typing import Any, Self

import numpy as np

from anabranch.config import Field, configclass
from anabranch.errors import DataError, InputError
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.predictor import Prediction, Predictor
from anabranch.routers.contract.query import Model, Query
from anabranch.routers.contract.strategy import Facts
from anabranch.routers.logistic import cross_entropy, fit_logistic, sigmoid
from anabranch.routers.score_scale import BRING, UNIT, Scale, ScoreScale
from anabranch.routers.strategies.adam import Parameters, fitted, held_back
from anabranch.routers.strategies.knn import one_vector
from anabranch.routers.strategies.training import Kept, closed, means, training_set, vector_of, vectors_of


class ItemResponse(Kept, Predictor, kind="irt"):
    """Scores from abilities of models, and demands and difficulty of queries."""

    @configclass
    class Config(Predictor.Config):
        """Size and training.

        Attributes:
            dim: F (25 in IRT-Router).
            rate: of Adam.
            weight_decay: L2, in the gradient.
            batch: queries.
            epochs: at most.
            patience: epochs without gain on the rows held back before it stops.
            holdout: share of the rows held back.
            scale: scores of the worst and the best answer in recorded outcomes; others are refused.
            new_penalty: pull of a new model's abilities to the mean model's, in rows' worth.
        """

        dim: int = Field(default=25, ge=1)
        rate: float = Field(default=5e-3, gt=0)
        weight_decay: float = Field(default=1e-4, ge=0)
        batch: int = Field(default=64, ge=1)
        epochs: int = Field(default=60, ge=1)
        patience: int = Field(default=8, ge=1)
        holdout: float = Field(default=0.1, ge=0, lt=1)
        scale: Scale = UNIT
        new_penalty: float = Field(default=1.0, gt=0)

    learned = ("A_FD", "a_F", "beta_D", "beta_1", "theta_MF", "mean_M", "span_2")

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.A_FD, self.a_F, self.beta_D, self.beta_1 = np.zeros((0, 0)), np.zeros(0), np.zeros(0), np.zeros(1)
        scale = ScoreScale.of(config.scale)
        self.theta_MF, self.mean_M, self.span_2 = np.zeros((0, 0)), np.zeros(0), np.array([scale.low, scale.high])

    def fit(self, data: Recorded, *, seed: int = 0) -> Self:
        """Learn all together until the rows held back gain no more."""
        training_set(data, "irt")
        config, rng = self.config, np.random.default_rng(seed)
        self.models, self.mean_M = data.models, means(data.score_NM)
        scale = ScoreScale.of(config.scale)
        x_ND, y_NM = np.asarray(data.vector_ND, float), scale.shares_of(data)
        parameters = {
            "A_FD": rng.standard_normal((config.dim, x_ND.shape[1])),
            "a_F": np.full(config.dim, 1 / np.sqrt(config.dim)),
            "beta_D": np.zeros(x_ND.shape[1]),
            "beta_1": np.zeros(1),
            "theta_MF": rng.standard_normal((len(self.models), config.dim)) / np.sqrt(config.dim),
        }
        parts = held_back(len(data), config.holdout, rng)
        for name, value in fitted(parameters, loss_and_gradients, x_ND, y_NM, parts, config, rng).items():
            setattr(self, name, value)
        self.span_2 = np.array([scale.low, scale.high])
        return self

    def add_model(self, name: str, data: Recorded) -> Self:
        """Place a model by its scores, with demands and difficulties as they are: a logistic regression of F numbers.

        Args:
            name: its column in ``data``; a model that is there already is placed anew.
            data: queries with vectors.

        Raises InputError before `fit` or for an unknown column, DataError for no known score or one beyond the scale.
        """
        if not self.models:
            raise InputError("irt has no demands and difficulties yet: fit it before a model is added")
        own = training_set(data.only([name]), "irt")
        rows = np.flatnonzero(np.isfinite(own.score_NM[:, 0]))
        if not len(rows):
            raise DataError(f"irt cannot place {name!r} without a score of it")
        demand_NF, difficulty_N = self._items(vectors_of(own.take(rows), self.A_FD.shape[1], "irt").astype(float))
        label_N = self._joining(own)[rows, 0]
        theta_F = fit_logistic(
            demand_NF, label_N, offset_N=-difficulty_N, prior_D=self.theta_MF.mean(0), penalty=self.config.new_penalty
        )
        mean = float(own.score_NM[rows, 0].mean())
        if name in self.models:
            at = self.models.index(name)
            self.theta_MF[at], self.mean_M[at] = theta_F, mean
        else:
            self.models = (*self.models, name)
            self.theta_MF, self.mean_M = np.vstack((self.theta_MF, theta_F)), np.append(self.mean_M, mean)
        return self

    def join(self, model: Model, shots: Recorded | None = None) -> None:
        """`add_model`, as routers of all kinds are asked."""
        if shots is None:
            raise InputError(f"irt places a model by its scores; give outcomes of {model.name!r}")
        self.add_model(model.name, shots)

    def _joining(self, own: Recorded) -> np.ndarray:
        """Scores of a model that joins, from 0 to 1.

        What was fitted before there was a scale to say has the span of the scores it saw instead, which says nothing of others: those
        beyond it count as its ends.
        """
        span = ScoreScale(*self.span_2)
        if span == ScoreScale.of(self.config.scale):
            return span.shares_of(own, advice=f"{BRING}, or fit irt again with one that has it (scale)")
        return np.clip(span.shares(own.score_NM), 0.0, 1.0)

    def _items(self, x_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return x_ND @ self.A_FD.T + self.a_F, x_ND @ self.beta_D + self.beta_1

    @property
    def learned_dim(self) -> int | None:
        """See `Predictor`."""
        return self.A_FD.shape[1] or None

    def predict(self, data: Recorded) -> Prediction:
        """Of every row."""
        demand_NF, difficulty_N = self._items(vectors_of(data, self.A_FD.shape[1], "irt").astype(float))
        share_NM = sigmoid(demand_NF @ self.theta_MF.T - difficulty_N[:, None])
        return Prediction(quality_NM=closed(ScoreScale(*self.span_2).scores(share_NM), self.mean_M))

    def predict_one(self, query: Query) -> Prediction:
        """As `predict`."""
        return self.predict(one_vector(query))

    def explain(self, query: Query) -> Facts:
        """How hard the query is, in log odds."""
        _, difficulty_1 = self._items(vector_of(query, self.A_FD.shape[1], "irt").astype(float))
        return {"difficulty": round(float(difficulty_1[0]), 4)}


def loss_and_gradients(parameters: Parameters, x_BD: np.ndarray, y_BM: np.ndarray) -> tuple[float, Parameters]:
    """Mean cross-entropy over known labels, and its gradients."""
    demand_BF = x_BD @ parameters["A_FD"].T + parameters["a_F"]
    logit_BM = demand_BF @ parameters["theta_MF"].T - (x_BD @ parameters["beta_D"] + parameters["beta_1"])[:, None]
    known_BM = np.isfinite(y_BM)
    label_BM, count = np.where(known_BM, y_BM, 0.0), max(1, int(known_BM.sum()))
    loss = float((cross_entropy(logit_BM, label_BM) * known_BM).sum() / count)
    dlogit_BM = np.where(known_BM, sigmoid(logit_BM) - label_BM, 0.0) / count
    ddemand_BF, dhard_B = dlogit_BM @ parameters["theta_MF"], -dlogit_BM.sum(1)
    return loss, {
        "A_FD": ddemand_BF.T @ x_BD,
        "a_F": ddemand_BF.sum(0),
        "beta_D": dhard_B @ x_BD,
        "beta_1": dhard_B.sum(keepdims=True),
        "theta_MF": dlogit_BM.T @ demand_BF,
    }
