"""k nearest neighbours: a model's expected score is its mean score on the k recorded queries most like this one.

    quality_M = mean over the k rows n of largest <x, x_n> of score_nM                      (all vectors of length 1)

Source: the kNN router of RouterBench (Hu et al. 2024, arXiv 2403.12031, section 5.1; k = 40 there) and of the survey of
Varangot-Reille et al. 2025 (arXiv 2502.00409). With ``temperature`` neighbours weigh exp(similarity / temperature).

A neighbour whose score of a model is unknown does not count for that model; where no neighbour's is known, the model's overall
mean stands in.
The search is exact: one product of matrix and vector. For data far beyond 10^5 rows ``index="hnsw"`` walks (`retrieve.WalkedRows`).
"""
# Shapes: N recorded queries, Q queries, K neighbours, M models, D dimensions

from typing import Any, Literal, Self

import numpy as np

from anabranch.config import Field, configclass
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.predictor import Prediction, Predictor
from anabranch.routers.contract.query import Query
from anabranch.routers.contract.strategy import Arrays, Facts
from anabranch.routers.retrieve import WalkedRows
from anabranch.routers.strategies.training import closed, means, training_set, vector_of, vectors_of

# Similarities held at once.
PIECE = 1 << 23

# Neighbours in an explanation.
SHOWN = 5


class Knn(Predictor, kind="knn"):
    """Mean score of the k most similar recorded queries."""

    @configclass
    class Config(Predictor.Config):
        """How many neighbours and how they are found.

        Attributes:
            k: neighbours; all rows where there are fewer.
            temperature: neighbours weigh exp(similarity / temperature); None for all alike.
            index: ``exact``, or ``hnsw``, which may miss neighbours and is quicker from about 10^5 rows.
            ef: candidates that ``hnsw`` keeps while it searches; at least k are kept.
        """

        k: int = Field(default=40, ge=1)
        temperature: float | None = Field(default=None, gt=0)
        index: Literal["exact", "hnsw"] = "exact"
        ef: int = Field(default=200, ge=1)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.vector_ND, self.score_NM = np.zeros((0, 0), np.float32), np.zeros((0, 0))
        self.mean_M = np.zeros(0)
        self.is_complete = True
        self.seed = 0
        self._index: WalkedRows | None = None

    def fit(self, data: Recorded, *, seed: int = 0) -> Self:
        """Keep the rows that have a score. ``seed`` draws the levels of ``hnsw``."""
        training_set(data, "knn")
        scored = np.flatnonzero(np.isfinite(data.score_NM).any(axis=1))
        self.models, self.seed = data.models, seed
        self._keep(np.ascontiguousarray(data.vector_ND[scored], np.float32), np.array(data.score_NM[scored], float))  # type: ignore[index]
        return self

    def _keep(self, vector_ND: np.ndarray, score_NM: np.ndarray) -> None:
        self.vector_ND, self.score_NM = vector_ND, score_NM
        self.mean_M = means(score_NM)
        self.is_complete = bool(np.isfinite(score_NM).all())
        self._index = self._build_index() if self.config.index == "hnsw" else None

    def _build_index(self) -> WalkedRows:
        index = WalkedRows(self.vector_ND.shape[1], by="knn with index = 'hnsw'", seed=self.seed)
        index.add(self.vector_ND)
        return index

    def neighbours(self, vector_QD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows ``[Q, K]`` by falling similarity, ties by row, and their similarities."""
        k = min(self.config.k, len(self.vector_ND))
        if self._index is not None:
            return self._index.search(vector_QD, k, max(self.config.ef, k))
        return top_k(vector_QD @ self.vector_ND.T if len(vector_QD) > 1 else (self.vector_ND @ vector_QD[0])[None], k)

    @property
    def learned_dim(self) -> int | None:
        """See `Predictor`."""
        return self.vector_ND.shape[1] or None

    def predict(self, data: Recorded) -> Prediction:
        """Of every row, some thousand at a time."""
        vector_QD = vectors_of(data, self.vector_ND.shape[1], "knn")
        step = max(1, PIECE // max(1, len(self.vector_ND)))
        pieces = [self._expected(*self.neighbours(vector_QD[at : at + step])) for at in range(0, len(vector_QD), step)]
        quality_QM = np.concatenate([quality for quality, _ in pieces]) if pieces else np.zeros((0, len(self.models)))
        confidence_Q = np.concatenate([sure for _, sure in pieces]) if pieces else np.zeros(0)
        return Prediction(quality_NM=quality_QM, confidence_N=confidence_Q)

    def predict_one(self, query: Query) -> Prediction:
        """With the nearest neighbours for the explanation."""
        vector_QD = vector_of(query, self.vector_ND.shape[1], "knn")
        row_QK, similarity_QK = self.neighbours(vector_QD)
        quality_QM, confidence_Q = self._expected(row_QK, similarity_QK)
        nearest = [
            {"row": int(row), "similarity": round(float(similarity), 4)}
            for row, similarity in zip(row_QK[0, :SHOWN], similarity_QK[0, :SHOWN], strict=True)
            if np.isfinite(similarity)
        ]
        return Prediction(
            quality_NM=quality_QM, confidence_N=confidence_Q, details={"neighbours": nearest, "k": row_QK.shape[1]}
        )

    def _expected(self, row_QK: np.ndarray, similarity_QK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean scores ``[Q, M]``, and the share of neighbours on which the best model was best."""
        score_QKM = self.score_NM[row_QK]
        # A neighbour that a walk did not find is none.
        weight_QK = np.isfinite(similarity_QK).astype(float)
        if self.config.temperature is not None:
            weight_QK = np.exp((similarity_QK - similarity_QK[:, :1]) / self.config.temperature)
        if self.is_complete:
            quality_QM = np.einsum("qk,qkm->qm", weight_QK, score_QKM) / weight_QK.sum(1, keepdims=True)
        else:
            known_QKM = np.isfinite(score_QKM)
            score_QKM = np.where(known_QKM, score_QKM, 0.0)
            total_QM = np.einsum("qk,qkm->qm", weight_QK, score_QKM)
            count_QM = np.einsum("qk,qkm->qm", weight_QK, known_QKM.astype(float))
            quality_QM = np.where(
                count_QM > 0, total_QM / np.where(count_QM > 0, count_QM, 1), np.nan_to_num(self.mean_M)
            )
            score_QKM = np.where(known_QKM, score_QKM, -np.inf)
        quality_QM = closed(quality_QM, self.mean_M)
        best_QK1 = np.take_along_axis(score_QKM, quality_QM.argmax(1)[:, None, None], axis=2)
        confidence_Q = (best_QK1[..., 0] >= score_QKM.max(axis=2)).mean(axis=1)
        return quality_QM, confidence_Q

    def explain(self, query: Query) -> Facts:
        """The nearest recorded rows."""
        return dict(self.predict_one(query).details or {})

    def state(self) -> tuple[Arrays, Facts]:
        """Vectors and scores; an index is built again when read."""
        return {"vector_ND": self.vector_ND, "score_NM": self.score_NM}, {"seed": self.seed}

    def load_state(self, arrays: Arrays, facts: Facts) -> None:
        """Take back what `state` gave."""
        self.seed = int(facts["seed"])
        self._keep(arrays["vector_ND"], arrays["score_NM"])


def one_vector(query: Query) -> Recorded:
    """The vector of a query as a table."""
    vector_1D = None if query.vector_D is None else np.asarray(query.vector_D, np.float32)[None]
    return Recorded(query=(query.text,), models=("any",), score_NM=np.full((1, 1), np.nan), vector_ND=vector_1D)


def top_k(value_QN: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Columns ``[Q, K]`` of the k largest of each row, falling, ties by column; and the values.

    `argpartition` alone may take any of the equal values at the edge, so those are filled up in order.
    """
    num_columns = value_QN.shape[1]
    edge_Q1 = np.partition(value_QN, num_columns - k, axis=1)[:, num_columns - k, None]
    column_QK = np.empty((len(value_QN), k), np.int64)
    for row, (value_N, edge) in enumerate(zip(value_QN, edge_Q1[:, 0], strict=True)):
        above = np.flatnonzero(value_N >= edge)
        column_QK[row] = above[np.argsort(-value_N[above], kind="stable")[:k]]
    return column_QK, np.take_along_axis(value_QN, column_QK, axis=1)
