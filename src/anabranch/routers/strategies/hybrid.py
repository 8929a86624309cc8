"""Hybrid LLM: a classifier says whether a small model is good enough, so that the large one need not be asked.

    H(x) = quality of small - quality of large
    y(x) = sigma((H(x) + t) / tau)                         labels softened by the quality gap
    t    = argmax of mean |y_i - y_j| over pairs           the shift that tells queries apart best (paper, eq. 4)
    p(x) = sigma(theta^T [1, x]),  theta by cross-entropy on y

Source: Ding et al. 2024, "Hybrid LLM" (ICLR 2024, arXiv 2404.14618, section 3). The paper draws several answers per model and
takes y as the share with H >= -t; recorded outcomes hold one, whence sigma((H + t) / tau). ``labels="hard"`` is the paper's
deterministic router, 1 where H >= 0. Its DeBERTa becomes a logistic regression on the query's vector.

With more than two models each is compared with the large one. Quality is the chance of being good enough, that of the large model
being ``threshold``: so a small model is asked when p passes the threshold, the surest first, and `Ranked`'s ``trade_off`` moves
that with what is saved.
"""
# Shapes: N queries, M models, D dimensions

from typing import Any, Literal, Self

import numpy as np

from anabranch.config import Field, configclass
from anabranch.errors import InputError
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.predictor import Prediction, Predictor
from anabranch.routers.contract.query import Query
from anabranch.routers.contract.strategy import Arrays, Facts
from anabranch.routers.logistic import fit_logistic, sigmoid
from anabranch.routers.strategies.knn import one_vector
from anabranch.routers.strategies.training import Kept, check_compared, means, training_set, vectors_of


class Hybrid(Kept, Predictor, kind="hybrid"):
    """Chance that a model does as well as the large one."""

    @configclass
    class Config(Predictor.Config):
        """What is learned.

        Attributes:
            large: the model to do as well as; None for the one of best mean score.
            labels: ``shifted`` as above, ``soft`` with t = 0, ``hard`` for 1 where the small model is at least as good.
            temperature: tau, in units of the scores.
            threshold: chance of being good enough from which the large model is spared.
            penalty: ridge of the classifier.
        """

        large: str | None = None
        labels: Literal["shifted", "soft", "hard"] = "shifted"
        temperature: float = Field(default=0.1, gt=0)
        threshold: float = Field(default=0.5, gt=0, lt=1)
        penalty: float = Field(default=1.0, gt=0)

    learned = ("theta_MC", "shift_M", "known_M")

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.theta_MC, self.shift_M, self.known_M = np.zeros((0, 1)), np.zeros(0), np.zeros(0, bool)
        self.large = 0

    def fit(self, data: Recorded, *, seed: int = 0) -> Self:
        """A classifier for each model but the large one, on rows where both are known. Needs no chance."""
        training_set(data, "hybrid")
        if len(data.models) > 1:
            check_compared(data.score_NM, "hybrid")
        self.models, mean_M = data.models, means(data.score_NM)
        name = self.config.large
        if name is not None and name not in self.models:
            raise InputError(f"hybrid.large is {name!r}, which is not among the models: {', '.join(self.models)}")
        self.large = int(np.nanargmax(mean_M)) if name is None else self.models.index(name)
        x_NC = np.column_stack((np.ones(len(data)), np.asarray(data.vector_ND, float)))
        self.theta_MC, self.shift_M = np.zeros((len(self.models), x_NC.shape[1])), np.zeros(len(self.models))
        self.known_M = np.zeros(len(self.models), bool)
        self.known_M[self.large] = True
        for model in range(len(self.models)):
            gap_N = data.score_NM[:, model] - data.score_NM[:, self.large]
            rows = np.flatnonzero(np.isfinite(gap_N))
            if model != self.large and len(rows):
                label_N, self.shift_M[model] = self._labels(gap_N[rows])
                self.theta_MC[model] = fit_logistic(x_NC[rows], label_N, penalty=self.config.penalty, free=1)
                self.known_M[model] = True
        return self

    def _labels(self, gap_N: np.ndarray) -> tuple[np.ndarray, float]:
        if self.config.labels == "hard":
            return (gap_N >= 0).astype(float), 0.0
        shift = best_shift(gap_N, self.config.temperature) if self.config.labels == "shifted" else 0.0
        return sigmoid((gap_N + shift) / self.config.temperature), shift

    @property
    def learned_dim(self) -> int | None:
        """See `Predictor`."""
        return self.theta_MC.shape[1] - 1 if self.theta_MC.size else None

    def predict(self, data: Recorded) -> Prediction:
        """Of every row."""
        vector_ND = vectors_of(data, self.theta_MC.shape[1] - 1, "hybrid").astype(float)
        p_NM = sigmoid(vector_ND @ self.theta_MC[:, 1:].T + self.theta_MC[:, 0])
        p_NM[:, self.large] = self.config.threshold
        return Prediction(quality_NM=np.where(self.known_M, p_NM, -np.inf))

    def predict_one(self, query: Query) -> Prediction:
        """As `predict`."""
        return self.predict(one_vector(query))

    def explain(self, query: Query) -> Facts:
        """The large model, and the chance of each other to do as well."""
        p_M = self.predict_one(query).quality_NM[0]
        good_enough = {
            name: round(float(p), 4)
            for at, (name, p) in enumerate(zip(self.models, p_M, strict=True))
            if at != self.large and np.isfinite(p)
        }
        return {"large": self.models[self.large], "good_enough": good_enough, "threshold": self.config.threshold}

    def state(self) -> tuple[Arrays, Facts]:
        """Classifiers, and which model is the large one."""
        return super().state()[0], {"large": self.large}

    def load_state(self, arrays: Arrays, facts: Facts) -> None:
        """Take back what `state` gave."""
        super().load_state(arrays, facts)
        self.large = int(facts["large"])


def best_shift(gap_N: np.ndarray, temperature: float) -> float:
    """t of at least 0 for which labels differ most, by mean |y_i - y_j|; the least of those that do equally well.

    Tried at halves of the gaps that occur and of the steps between them, where the labels part ways.
    """
    level = np.unique(np.abs(gap_N))
    if len(level) > 200:
        level = np.quantile(level, np.linspace(0, 1, 200))
    tried = np.unique(np.concatenate(([0.0], level, (level[1:] + level[:-1]) / 2)))
    spread = [mean_difference(sigmoid((gap_N + shift) / temperature)) for shift in tried]
    return float(tried[int(np.argmax(np.round(spread, 12)))])


def mean_difference(value_N: np.ndarray) -> float:
    """Mean of |v_i - v_j| over all ordered pairs, by sorting: 2 sum_i (2 i - N - 1) v_(i) / N^2."""
    count = len(value_N)
    return float(2 * (2 * np.arange(1, count + 1) - count - 1) @ np.sort(value_N) / count**2)
