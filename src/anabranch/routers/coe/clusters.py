"""Clusters of vectors, for data without category labels: k-means by Lloyd's algorithm from k-means++ starts."""
# Shapes: N rows, D dimensions, K clusters

import numpy as np

from anabranch.errors import InputError


def k_means(vector_ND: np.ndarray, num_clusters: int, *, seed: int, iterations: int = 50) -> np.ndarray:
    """Cluster of each row, int64; at most as many clusters as rows, numbered by falling size.

    Args:
        vector_ND: rows.
        num_clusters: K.
        seed: of the start.
        iterations: at most.
    """
    if num_clusters < 1 or not len(vector_ND):
        raise InputError(f"num_clusters is {num_clusters} for {len(vector_ND)} rows; both must be at least 1")
    vector_ND = np.asarray(vector_ND, np.float32)
    centre_KD = _start(vector_ND, min(num_clusters, len(vector_ND)), np.random.default_rng(seed))
    cluster_N = np.full(len(vector_ND), -1)
    for _ in range(iterations):
        distance_NK = (centre_KD**2).sum(axis=1) - 2 * (vector_ND @ centre_KD.T)
        nearest_N = distance_NK.argmin(axis=1)
        if (nearest_N == cluster_N).all():
            break
        cluster_N = nearest_N
        count_K = np.bincount(cluster_N, minlength=len(centre_KD))
        sum_KD = np.zeros_like(centre_KD)
        np.add.at(sum_KD, cluster_N, vector_ND)
        # A cluster that lost all rows keeps its centre.
        used_K = count_K > 0
        centre_KD[used_K] = sum_KD[used_K] / count_K[used_K, None]
    order_K = np.argsort(-np.bincount(cluster_N, minlength=len(centre_KD)), kind="stable")
    rank_K = np.empty(len(order_K), np.int64)
    rank_K[order_K] = np.arange(len(order_K))
    return rank_K[cluster_N]


def _start(vector_ND: np.ndarray, num_clusters: int, generator: np.random.Generator) -> np.ndarray:
    """k-means++: each next centre drawn by its squared distance to those before."""
    chosen = [int(generator.integers(len(vector_ND)))]
    distance_N = ((vector_ND - vector_ND[chosen[0]]) ** 2).sum(axis=1, dtype=np.float64)
    while len(chosen) < num_clusters:
        total = distance_N.sum()
        # All rows are centres already.
        weight_N = distance_N / total if total > 0 else None
        chosen.append(int(generator.choice(len(vector_ND), p=weight_N)))
        distance_N = np.minimum(distance_N, ((vector_ND - vector_ND[chosen[-1]]) ** 2).sum(axis=1, dtype=np.float64))
    return vector_ND[chosen].copy()
