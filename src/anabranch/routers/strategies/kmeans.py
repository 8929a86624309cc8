"""k-means: Lloyd's iterations from k-means++ seeds (Arthur and Vassilvitskii 2007), the best of several starts."""
# Shapes: N rows, C clusters, D dimensions

import numpy as np

MOST_ITERATIONS = 100


def kmeans(x_ND: np.ndarray, num_clusters: int, *, num_starts: int = 4, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Centres float32 ``[C, D]`` of least sum of squared distances, and the centre of each row.

    A cluster that loses all its rows takes the row farthest from its centre. C is at most the number of different rows.
    """
    x_ND = np.asarray(x_ND, np.float32)
    num_clusters = min(num_clusters, len(x_ND))
    best: tuple[float, np.ndarray, np.ndarray] | None = None
    for start in range(num_starts):
        centre_CD = _seeds(x_ND, num_clusters, np.random.default_rng([seed, start]))
        centre_CD, cluster_N, spread = _lloyd(x_ND, centre_CD)
        if best is None or spread < best[0]:
            best = spread, centre_CD, cluster_N
    assert best is not None
    return best[1], best[2]


def distances(x_ND: np.ndarray, centre_CD: np.ndarray) -> np.ndarray:
    """Squared distances ``[N, C]``."""
    square_N1 = np.einsum("nd,nd->n", x_ND, x_ND)[:, None]
    return np.maximum(square_N1 - 2 * x_ND @ centre_CD.T + np.einsum("cd,cd->c", centre_CD, centre_CD), 0)


def _seeds(x_ND: np.ndarray, num_clusters: int, rng: np.random.Generator) -> np.ndarray:
    """Each next seed is a row drawn in proportion to its squared distance from the seeds so far; fewer where rows repeat."""
    chosen = [int(rng.integers(len(x_ND)))]
    nearest_N = distances(x_ND, x_ND[chosen])[:, 0].astype(float)
    while len(chosen) < num_clusters:
        # The same row again, but for rounding.
        nearest_N[nearest_N < 1e-6] = 0.0
        if not nearest_N.any():
            break
        chosen.append(int(rng.choice(len(x_ND), p=nearest_N / nearest_N.sum())))
        np.minimum(nearest_N, distances(x_ND, x_ND[chosen[-1:]])[:, 0], out=nearest_N)
    return x_ND[chosen].copy()


def _lloyd(x_ND: np.ndarray, centre_CD: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    cluster_N = np.full(len(x_ND), -1)
    for _ in range(MOST_ITERATIONS):
        distance_NC = distances(x_ND, centre_CD)
        new_N = distance_NC.argmin(axis=1)
        nearest_N = distance_NC[np.arange(len(x_ND)), new_N].copy()
        for empty in np.flatnonzero(np.bincount(new_N, minlength=len(centre_CD)) == 0):
            farthest = int(nearest_N.argmax())
            new_N[farthest], nearest_N[farthest] = empty, 0.0
        if np.array_equal(new_N, cluster_N):
            break
        cluster_N = new_N
        order, count_C = np.argsort(cluster_N, kind="stable"), np.bincount(cluster_N)
        begin_C = np.concatenate(([0], np.cumsum(count_C)[:-1]))  # none is empty
        centre_CD = np.add.reduceat(x_ND[order], begin_C, axis=0) / count_C[:, None].astype(np.float32)
    spread = float(((x_ND - centre_CD[cluster_N]) ** 2).sum(dtype=float))
    return centre_CD, cluster_N, spread
