"""Avengers: cluster the queries, rank the models in every cluster, go by the rankings of the nearest clusters.

    w_c        softmax of -beta |x - centre_c| over the nearest clusters
    quality_M  sum over c of w_c score_cM,     score_cM the mean score of model M in cluster c

Source: Zhang et al. 2025, "The Avengers" (arXiv 2505.19797), and Avengers-Pro (arXiv 2508.12631), whose balance of performance and
cost in a cluster,

    performance_weight (score_cM - min) / (max - min)  +  (1 - performance_weight) (1 - cost_cM / max cost),

takes the place of score_cM where ``performance_weight`` is set. Left unset, qualities stay in the units of the scores, `Ranked`'s
``trade_off`` weighs them against the cost of the model in these clusters, and one fitted router serves the whole curve.

Departure: cluster means are pulled to the overall mean as if by ``prior`` more rows, 0 being the paper's plain mean.
"""
# Shapes: N queries, C clusters, K nearest clusters, M models, D dimensions

from typing import Any, Self

import numpy as np

from anabranch.config import Field, configclass
from anabranch.kmeans import distances, kmeans
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.predictor import Prediction, Predictor
from anabranch.routers.contract.query import Query
from anabranch.routers.contract.strategy import Facts
from anabranch.routers.strategies.knn import one_vector, top_k
from anabranch.routers.strategies.training import (
    Kept,
    closed,
    means,
    shrunk,
    totals,
    training_set,
    vector_of,
    vectors_of,
)


class Cluster(Kept, Predictor, kind="cluster"):
    """Mean score of a model in the clusters nearest to the query."""

    @configclass
    class Config(Predictor.Config):
        """Clusters and how they are used.

        Attributes:
            num_clusters: of k-means; fewer where there are fewer different queries.
            nearest: clusters that speak for a query.
            beta: how much more the nearer ones count (9 in the published code).
            prior: rows' worth of pull of a cluster's mean to the overall mean.
            performance_weight: of performance against cost within a cluster, both from 0 to 1 (Avengers-Pro); None for plain mean scores.
            num_starts: of k-means, the best of which is kept.
        """

        num_clusters: int = Field(default=64, ge=1)
        nearest: int = Field(default=3, ge=1)
        beta: float = Field(default=9.0, ge=0)
        prior: float = Field(default=1.0, ge=0)
        performance_weight: float | None = Field(default=None, ge=0, le=1)
        num_starts: int = Field(default=4, ge=1)

    learned = ("centre_CD", "score_CM", "cost_CM", "size_C", "mean_M")

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.centre_CD = np.zeros((0, 0), np.float32)
        self.score_CM, self.cost_CM, self.size_C = np.zeros((0, 0)), np.zeros((0, 0)), np.zeros(0)
        self.mean_M = np.zeros(0)

    def fit(self, data: Recorded, *, seed: int = 0) -> Self:
        """Cluster the queries, then average scores and costs in each cluster over what is known."""
        config = self.config
        training_set(data, "cluster", cost=config.performance_weight not in (None, 1.0))
        self.models, self.mean_M = data.models, means(data.score_NM)
        self.centre_CD, cluster_N = kmeans(
            data.vector_ND,  # type: ignore[arg-type]
            config.num_clusters,
            num_starts=config.num_starts,
            seed=seed,
        )
        self.size_C = np.bincount(cluster_N, minlength=len(self.centre_CD)).astype(float)
        self.score_CM = shrunk(*totals(data.score_NM, cluster_N, len(self.centre_CD)), config.prior, self.mean_M)
        self.cost_CM = np.zeros((len(self.centre_CD), 0))
        if data.cost_NM is not None:
            cost_M = means(data.cost_NM)
            self.cost_CM = shrunk(*totals(data.cost_NM, cluster_N, len(self.centre_CD)), config.prior, cost_M)
            self.cost_CM[:, np.isnan(cost_M)] = np.nan
        if config.performance_weight is not None:
            self.score_CM = self._balanced(config.performance_weight)
        return self

    def _balanced(self, weight: float) -> np.ndarray:
        """Performance and cost of each model in a cluster, each from 0 to 1 over the models, weighed together."""
        known_M = np.isfinite(self.mean_M)
        least_C1 = self.score_CM[:, known_M].min(1, keepdims=True)
        range_C1 = self.score_CM[:, known_M].max(1, keepdims=True) - least_C1
        performance_CM = np.where(range_C1 > 0, (self.score_CM - least_C1) / np.where(range_C1 > 0, range_C1, 1), 1.0)
        if weight == 1.0:
            return performance_CM
        cost_CM = np.nan_to_num(self.cost_CM)
        most_C1 = cost_CM.max(1, keepdims=True)
        saving_CM = np.where(most_C1 > 0, 1 - cost_CM / np.where(most_C1 > 0, most_C1, 1), 1.0)
        return weight * performance_CM + (1 - weight) * saving_CM

    @property
    def learned_dim(self) -> int | None:
        """See `Predictor`."""
        return self.centre_CD.shape[1] or None

    def predict(self, data: Recorded) -> Prediction:
        """Of every row."""
        cluster_NK, weight_NK = self._nearest(vectors_of(data, self.centre_CD.shape[1], "cluster"))
        quality_NM = np.einsum("nk,nkm->nm", weight_NK, self.score_CM[cluster_NK])
        cost_NM = None
        if self.cost_CM.shape[1]:
            cost_NM = np.einsum("nk,nkm->nm", weight_NK, self.cost_CM[cluster_NK])
        return Prediction(quality_NM=closed(quality_NM, self.mean_M), cost_NM=cost_NM)

    def _nearest(self, vector_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Nearest clusters ``[N, K]``, nearest first, and their weights."""
        away_NC = np.sqrt(distances(vector_ND, self.centre_CD)).astype(float)
        cluster_NK, nearness_NK = top_k(-away_NC, min(self.config.nearest, len(self.centre_CD)))
        weight_NK = np.exp(self.config.beta * (nearness_NK - nearness_NK[:, :1]))
        return cluster_NK, weight_NK / weight_NK.sum(axis=1, keepdims=True)

    def predict_one(self, query: Query) -> Prediction:
        """As `predict`."""
        return self.predict(one_vector(query))

    def explain(self, query: Query) -> Facts:
        """The nearest clusters, their weights and sizes."""
        cluster_1K, weight_1K = self._nearest(vector_of(query, self.centre_CD.shape[1], "cluster"))
        return {
            "clusters": [
                {"cluster": int(at), "weight": round(float(weight), 4), "queries": int(self.size_C[at])}
                for at, weight in zip(cluster_1K[0], weight_1K[0], strict=True)
            ]
        }
