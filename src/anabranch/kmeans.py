"""k-means: Lloyd's iterations from k-means++ seeds (Arthur and Vassilvitskii 2007), the best of several starts.

In numpy, since indexes cluster anew while a gateway serves, which has no scikit-learn; from the same seeds it finds what that does.
"""
# Shapes: N rows, C clusters, D dimensions

import numpy as np

from anabranch.errors import InputError

MOST_ITERATIONS = 100

# Numbers of a table of distances.
PIECE = 1 << 23


def kmeans(
    x_ND: np.ndarray,
    num_clusters: int,
    *,
    num_starts: int = 4,
    seed: int = 0,
    iterations: int = MOST_ITERATIONS,
    on_sphere: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Centres float32 ``[C, D]`` of least sum of squared distances, and the nearest centre of each row, int64 ``[N]``.

    A cluster that loses all its rows takes the row farthest from its centre. C is at most the number of different rows.

    Args:
        x_ND: rows, at least one; with ``on_sphere`` of length 1, or zeros.
        num_clusters: C.
        num_starts: the best of so many is kept.
        seed: of the starts.
        iterations: at most, of each start.
        on_sphere: centres are brought to length 1 in each iteration, so that clusters are those of least cosine distance.

    Raises InputError for no rows or no clusters.
    """
    if num_clusters < 1 or not len(x_ND):
        raise InputError(f"num_clusters is {num_clusters} for {len(x_ND)} rows; both must be at least 1")
    x_ND = np.asarray(x_ND, np.float32)
    num_clusters = min(num_clusters, len(x_ND))
    best: tuple[float, np.ndarray, np.ndarray] | None = None
    for start in range(num_starts):
        centre_CD = _seeds(x_ND, num_clusters, np.random.default_rng([seed, start]))
        centre_CD, cluster_N, spread = _lloyd(x_ND, centre_CD, iterations, on_sphere)
        if best is None or spread < best[0]:
            best = spread, centre_CD, cluster_N
    assert best is not None
    return best[1], best[2]


def distances(x_ND: np.ndarray, centre_CD: np.ndarray) -> np.ndarray:
    """Squared distances ``[N, C]``."""
    square_N1 = np.einsum("nd,nd->n", x_ND, x_ND)[:, None]
    return np.maximum(square_N1 - 2 * x_ND @ centre_CD.T + np.einsum("cd,cd->c", centre_CD, centre_CD), 0)


def by_size(cluster_N: np.ndarray) -> np.ndarray:
    """The same clusters, numbered by falling size; of equals the lower number first."""
    order_C = np.argsort(-np.bincount(cluster_N), kind="stable")
    rank_C = np.empty(len(order_C), np.int64)
    rank_C[order_C] = np.arange(len(order_C))
    return rank_C[cluster_N]


def _seeds(x_ND: np.ndarray, num_clusters: int, rng: np.random.Generator) -> np.ndarray:
    """Each next seed is a row drawn in proportion to its squared distance from the seeds so far; fewer where rows repeat."""
    chosen, length_N = [int(rng.integers(len(x_ND)))], np.einsum("nd,nd->n", x_ND, x_ND)
    nearest_N = distances(x_ND, x_ND[chosen])[:, 0].astype(float)
    while len(chosen) < num_clusters:
        # The same row again, but for rounding, which is as large as rows are long.
        nearest_N[nearest_N < 1e-6 * length_N] = 0.0
        if not nearest_N.any():
            break
        chosen.append(int(rng.choice(len(x_ND), p=nearest_N / nearest_N.sum())))
        np.minimum(nearest_N, distances(x_ND, x_ND[chosen[-1:]])[:, 0], out=nearest_N)
    return x_ND[chosen].copy()


def _nearest(x_ND: np.ndarray, centre_CD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest centre of each row, and its squared distance; in blocks of rows, since a table of all may be large."""
    step = max(1, PIECE // len(centre_CD))
    cluster, distance = [], []
    for begin in range(0, len(x_ND), step):
        distance_BC = distances(x_ND[begin : begin + step], centre_CD)
        cluster.append(distance_BC.argmin(axis=1))
        distance.append(np.take_along_axis(distance_BC, cluster[-1][:, None], 1)[:, 0])
    return np.concatenate(cluster), np.concatenate(distance)


def _lloyd(
    x_ND: np.ndarray, centre_CD: np.ndarray, iterations: int, on_sphere: bool
) -> tuple[np.ndarray, np.ndarray, float]:
    cluster_N = np.full(len(x_ND), -1)
    for _ in range(iterations):
        new_N, nearest_N = _nearest(x_ND, centre_CD)
        for empty in np.flatnonzero(np.bincount(new_N, minlength=len(centre_CD)) == 0):
            farthest = int(nearest_N.argmax())
            new_N[farthest], nearest_N[farthest] = empty, 0.0
        if np.array_equal(new_N, cluster_N):
            break
        cluster_N = new_N
        order, count_C = np.argsort(cluster_N, kind="stable"), np.bincount(cluster_N)
        begin_C = np.concatenate(([0], np.cumsum(count_C)[:-1]))  # none is empty
        centre_CD = np.add.reduceat(x_ND[order], begin_C, axis=0) / count_C[:, None].astype(np.float32)
        if on_sphere:
            length_C1 = np.linalg.norm(centre_CD, axis=1, keepdims=True)
            centre_CD = centre_CD / np.where(length_C1 > 0, length_C1, 1)
    spread = float(((x_ND - centre_CD[cluster_N]) ** 2).sum(dtype=float))
    return centre_CD, cluster_N, spread
