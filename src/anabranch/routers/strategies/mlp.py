"""A network with one hidden layer: query vector in, expected score of every model out.

    quality = scale(sigma(U relu(V x + a) + b)),    loss: cross-entropy with the scores as soft labels, over what is known

Supervised routing of the survey (Varangot-Reille et al. 2025, arXiv 2502.00409), and the MLP router of RouterBench (Hu et al.
2024, arXiv 2403.12031, section 5.1: a hidden layer of 100). Learned by Adam in numpy; a tenth of the rows is held back to tell
when to stop.
"""
# Shapes: N queries, B queries of a batch, M models, D dimensions, H hidden

from typing import Any, Self

import numpy as np

from anabranch.config import Field, configclass
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.predictor import Prediction, Predictor
from anabranch.routers.contract.query import Query
from anabranch.routers.logistic import cross_entropy, sigmoid
from anabranch.routers.score_scale import UNIT, Scale, ScoreScale
from anabranch.routers.strategies.adam import Parameters, fitted, held_back
from anabranch.routers.strategies.knn import one_vector
from anabranch.routers.strategies.training import Kept, closed, means, training_set, vectors_of


class Mlp(Kept, Predictor, kind="mlp"):
    """One hidden layer, all models' scores at once."""

    @configclass
    class Config(Predictor.Config):
        """Size and training.

        Attributes:
            hidden: H.
            rate: of Adam.
            weight_decay: L2, in the gradient.
            batch: queries.
            epochs: at most.
            patience: epochs without gain on the rows held back before it stops.
            holdout: share of the rows held back.
            scale: scores of the worst and the best answer in recorded outcomes; others are refused.
        """

        hidden: int = Field(default=100, ge=1)
        rate: float = Field(default=1e-3, gt=0)
        weight_decay: float = Field(default=1e-4, ge=0)
        batch: int = Field(default=64, ge=1)
        epochs: int = Field(default=100, ge=1)
        patience: int = Field(default=10, ge=1)
        holdout: float = Field(default=0.1, ge=0, lt=1)
        scale: Scale = UNIT

    learned = ("V_HD", "a_H", "U_MH", "b_M", "mean_M", "span_2")

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.V_HD, self.a_H, self.U_MH, self.b_M = np.zeros((0, 0)), np.zeros(0), np.zeros((0, 0)), np.zeros(0)
        scale = ScoreScale.of(config.scale)
        self.mean_M, self.span_2 = np.zeros(0), np.array([scale.low, scale.high])

    def fit(self, data: Recorded, *, seed: int = 0) -> Self:
        """Learn until the rows held back gain no more."""
        training_set(data, "mlp")
        config, rng = self.config, np.random.default_rng(seed)
        self.models, self.mean_M = data.models, means(data.score_NM)
        scale = ScoreScale.of(self.config.scale)
        x_ND, y_NM = np.asarray(data.vector_ND, float), scale.shares_of(data)
        parts = held_back(len(data), config.holdout, rng)
        parameters = self._initial(x_ND.shape[1], means(y_NM), rng)
        for name, value in fitted(parameters, loss_and_gradients, x_ND, y_NM, parts, config, rng).items():
            setattr(self, name, value)
        self.span_2 = np.array([scale.low, scale.high])
        return self

    def _initial(self, dim: int, mean_M: np.ndarray, rng: np.random.Generator) -> Parameters:
        """He's initial values; outputs start at the mean scores. A unit vector has numbers of size 1 / sqrt(D), hence no division by D."""
        hidden = self.config.hidden
        mean_M = np.clip(np.nan_to_num(mean_M, nan=0.5), 0.01, 0.99)
        return {
            "V_HD": rng.standard_normal((hidden, dim)) * np.sqrt(2),
            "a_H": np.zeros(hidden),
            "U_MH": rng.standard_normal((len(mean_M), hidden)) * 0.1 / np.sqrt(hidden),
            "b_M": np.log(mean_M / (1 - mean_M)),
        }

    @property
    def learned_dim(self) -> int | None:
        """See `Predictor`."""
        return self.V_HD.shape[1] or None

    def predict(self, data: Recorded) -> Prediction:
        """Of every row."""
        x_ND = vectors_of(data, self.V_HD.shape[1], "mlp").astype(float)
        logit_NM = np.maximum(x_ND @ self.V_HD.T + self.a_H, 0) @ self.U_MH.T + self.b_M
        return Prediction(quality_NM=closed(ScoreScale(*self.span_2).scores(sigmoid(logit_NM)), self.mean_M))

    def predict_one(self, query: Query) -> Prediction:
        """As `predict`."""
        return self.predict(one_vector(query))


def loss_and_gradients(parameters: Parameters, x_BD: np.ndarray, y_BM: np.ndarray) -> tuple[float, Parameters]:
    """Mean cross-entropy over known labels, and its gradients."""
    raw_BH = x_BD @ parameters["V_HD"].T + parameters["a_H"]
    hidden_BH = np.maximum(raw_BH, 0)
    logit_BM = hidden_BH @ parameters["U_MH"].T + parameters["b_M"]
    known_BM = np.isfinite(y_BM)
    label_BM, count = np.where(known_BM, y_BM, 0.0), max(1, int(known_BM.sum()))
    loss = float((cross_entropy(logit_BM, label_BM) * known_BM).sum() / count)
    dlogit_BM = np.where(known_BM, sigmoid(logit_BM) - label_BM, 0.0) / count
    draw_BH = (dlogit_BM @ parameters["U_MH"]) * (raw_BH > 0)
    return loss, {
        "V_HD": draw_BH.T @ x_BD,
        "a_H": draw_BH.sum(0),
        "U_MH": dlogit_BM.T @ hidden_BH,
        "b_M": dlogit_BM.sum(0),
    }
