"""Ridge regression: each model's score is linear in the vector of the query.

    quality_M(x) = mean_M + (x - mean x)^T beta_M,     beta_M = argmin |y - X beta|^2 + alpha_M |beta|^2

alpha_M is the one of least leave-one-out error, which needs no refitting: with X = U S V^T the hat matrix is U diag(s^2 / (s^2 +
alpha)) U^T, and the error of leaving row n out is its residual divided by 1 - h_nn (Golub, Heath and Wahba 1979, eq. 1.4; here
with 1/N in h for the mean). Costs are predicted the same way where they are recorded. Survey: Varangot-Reille et al. 2025, arXiv
2502.00409, supervised routing.
"""
# Shapes: N queries, M models, D dimensions, R rank, A values of alpha

from typing import Any, Self

import numpy as np

from anabranch.config import configclass
from anabranch.errors import ConfigError
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.predictor import Prediction, Predictor
from anabranch.routers.contract.query import Query
from anabranch.routers.contract.strategy import Facts
from anabranch.routers.strategies.knn import one_vector
from anabranch.routers.strategies.training import Kept, closed, means, training_set, vectors_of


class Ridge(Kept, Predictor, kind="ridge"):
    """A linear score per model, with a penalty chosen by leave-one-out error."""

    @configclass
    class Config(Predictor.Config):
        """The penalties to choose from.

        Attributes:
            alphas: of the squared length of beta, vectors being of length 1.
            predicts_cost: predict costs too, where they are recorded; otherwise `Ranked` takes prices or means.
        """

        alphas: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
        predicts_cost: bool = True

        def __post_init__(self) -> None:
            if not self.alphas or min(self.alphas) <= 0:
                raise ConfigError(f"ridge.alphas is {self.alphas}; give at least one penalty above 0")

    learned = ("beta_MD", "offset_M", "alpha_M", "cost_beta_MD", "cost_offset_M", "mean_M", "cost_floor_M")

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.beta_MD, self.offset_M, self.alpha_M = np.zeros((0, 0)), np.zeros(0), np.zeros(0)
        self.cost_beta_MD, self.cost_offset_M = np.zeros((0, 0)), np.zeros(0)
        self.mean_M, self.cost_floor_M = np.zeros(0), np.zeros(0)

    def fit(self, data: Recorded, *, seed: int = 0) -> Self:
        """Least squares of every model's known scores (and costs). Needs no chance: ``seed`` changes nothing."""
        training_set(data, "ridge")
        vector_ND = np.asarray(data.vector_ND, float)
        self.models, self.mean_M = data.models, means(data.score_NM)
        self.beta_MD, self.offset_M, self.alpha_M = ridge(vector_ND, data.score_NM, self.config.alphas)
        self.cost_beta_MD, self.cost_offset_M = np.zeros((0, vector_ND.shape[1])), np.zeros(0)
        if self.config.predicts_cost and data.cost_NM is not None and np.isfinite(data.cost_NM).any():
            self.cost_beta_MD, self.cost_offset_M, _ = ridge(vector_ND, data.cost_NM, self.config.alphas)
            lowest_NM = np.where(np.isfinite(data.cost_NM), data.cost_NM, np.inf).min(0)
            # A line may pass below what a call can cost.
            self.cost_floor_M = np.where(np.isfinite(lowest_NM), lowest_NM, np.nan)
        return self

    @property
    def learned_dim(self) -> int | None:
        """See `Predictor`."""
        return self.beta_MD.shape[1] or None

    def predict(self, data: Recorded) -> Prediction:
        """Of every row."""
        vector_ND = vectors_of(data, self.beta_MD.shape[1], "ridge").astype(float)
        quality_NM = vector_ND @ self.beta_MD.T + self.offset_M
        cost_NM = None
        if len(self.cost_offset_M):
            cost_NM = np.maximum(vector_ND @ self.cost_beta_MD.T + self.cost_offset_M, self.cost_floor_M)
        return Prediction(quality_NM=closed(quality_NM, self.mean_M), cost_NM=cost_NM)

    def predict_one(self, query: Query) -> Prediction:
        """As `predict`."""
        return self.predict(one_vector(query))

    def explain(self, query: Query) -> Facts:
        """The chosen penalties."""
        return {"alpha": dict(zip(self.models, self.alpha_M.tolist(), strict=True))}


def ridge(x_ND: np.ndarray, y_NM: np.ndarray, alphas: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Coefficients ``[M, D]``, offsets ``[M]`` and the chosen alpha ``[M]`` of each column, over its known rows.

    Columns that are known in the same rows share one decomposition. A column without a known value gets zeros and NaN as its offset.
    """
    num_models, dim = y_NM.shape[1], x_ND.shape[1]
    beta_MD, offset_M, alpha_M = (
        np.zeros((num_models, dim)),
        np.full(num_models, np.nan),
        np.full(num_models, max(alphas)),
    )
    known_NM = np.isfinite(y_NM)
    for pattern_N in {known_NM[:, column].tobytes(): known_NM[:, column] for column in range(num_models)}.values():
        if not pattern_N.any():
            continue
        columns = np.flatnonzero((known_NM == pattern_N[:, None]).all(axis=0))
        beta, offset, alpha, _ = _ridge(x_ND[pattern_N], y_NM[np.ix_(pattern_N, columns)], alphas)
        beta_MD[columns], offset_M[columns], alpha_M[columns] = beta, offset, alpha
    return beta_MD, offset_M, alpha_M


def ridge_left_out(
    x_ND: np.ndarray, y_N: np.ndarray, alphas: tuple[float, ...]
) -> tuple[np.ndarray, float, np.ndarray]:
    """Coefficients ``[D]`` and offset of one known column, and what each row is predicted without having been seen."""
    beta_1D, offset_1, _, left_out_N1 = _ridge(x_ND, y_N[:, None], alphas)
    return beta_1D[0], float(offset_1[0]), left_out_N1[:, 0]


def _ridge(
    x_ND: np.ndarray, y_NM: np.ndarray, alphas: tuple[float, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Coefficients, offsets, alphas and leave-one-out predictions where all is known."""
    num_rows = len(x_ND)
    mean_D, mean_M = x_ND.mean(0), y_NM.mean(0)
    u_NR, s_R, v_RD = _decomposed(x_ND - mean_D)
    centred_NM = y_NM - mean_M
    image_RM = u_NR.T @ centred_NM
    error_AM, shrink_AR = [], np.array([s_R**2 / (s_R**2 + alpha) for alpha in alphas])
    for alpha, shrink_R in zip(alphas, shrink_AR, strict=True):
        residual_NM = _left_out_residual(u_NR, shrink_R[:, None], image_RM, centred_NM)
        error_AM.append((residual_NM**2).mean(0) if num_rows > 1 else np.full(len(mean_M), -alpha))
    choice_M = np.argmin(error_AM, axis=0)
    alpha_M = np.asarray(alphas)[choice_M]
    left_out_NM = y_NM - _left_out_residual(u_NR, shrink_AR[choice_M].T, image_RM, centred_NM)
    beta_MD = ((s_R[:, None] / (s_R[:, None] ** 2 + alpha_M)) * image_RM).T @ v_RD
    return beta_MD, mean_M - beta_MD @ mean_D, alpha_M, left_out_NM


def _left_out_residual(
    u_NR: np.ndarray, shrink_RM: np.ndarray, image_RM: np.ndarray, centred_NM: np.ndarray
) -> np.ndarray:
    """Residuals over 1 - h; ``shrink_RM`` may have one column for all."""
    hat_NM = 1 / len(u_NR) + u_NR**2 @ shrink_RM
    return (centred_NM - u_NR @ (shrink_RM * image_RM)) / np.maximum(1 - hat_NM, 1e-9)


def _decomposed(x_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """U, s, V^T without directions of no length; by X^T X where that is small, far quicker than the SVD of a tall matrix."""
    if len(x_ND) < x_ND.shape[1]:
        return np.linalg.svd(x_ND, full_matrices=False)
    if not x_ND.shape[1]:
        return np.zeros((len(x_ND), 0)), np.zeros(0), np.zeros((0, 0))
    square_R, v_DR = np.linalg.eigh(x_ND.T @ x_ND)
    kept_R = square_R > square_R[-1] * 1e-12
    if not kept_R.any() or square_R[-1] <= 0:
        return np.zeros((len(x_ND), 0)), np.zeros(0), np.zeros((0, x_ND.shape[1]))
    s_R = np.sqrt(square_R[kept_R])
    return x_ND @ v_DR[:, kept_R] / s_R, s_R, v_DR[:, kept_R].T
