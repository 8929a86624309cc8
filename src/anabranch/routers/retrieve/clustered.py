"""K-means with K = sqrt(N) clusters, of which a search looks into the nearest: K + N/K comparisons are fewest then (IC-Cache, section 4).

Clusters are made anew, by themselves, when a namespace has grown or shrunk by ``rebuild_at`` since they were made; until then a new
vector joins the nearest centre. Probing all clusters gives what `exact` gives.
"""
# Shapes: N vectors, D dimensions, K clusters

import math
from typing import Any

import numpy as np

from anabranch.config import Field, Seed, configclass
from anabranch.kmeans import kmeans
from anabranch.routers.contract.strategy import Arrays
from anabranch.routers.retrieve.index import Allow, Index, Shard
from anabranch.routers.retrieve.rows import Rows, nearest

ROUNDS = 10  # of K-means

# Vectors per cluster that K-means looks at.
SAMPLE = 64


class ClusteredShard(Shard):
    """See the module."""

    def __init__(self, config: Any, dim: int) -> None:
        self._config, self._dim = config, dim
        # How many vectors there were.
        self._made_at = 0
        self._set_clusters(np.zeros((0, dim), np.float32))

    def _set_clusters(self, centre_KD: np.ndarray) -> None:
        self.centre_KD = centre_KD
        self._clusters = [Rows(self._dim) for _ in centre_KD]
        self._cluster: dict[int, int] = {}  # of each id

    def __len__(self) -> int:
        return len(self._cluster)

    @property
    def num_clusters(self) -> int:
        """K."""
        return len(self.centre_KD)

    def add(self, id_N: np.ndarray, vector_ND: np.ndarray) -> None:
        """To the nearest centres, which may be made anew."""
        if len(self) + len(id_N) > (1 + self._config.rebuild_at) * self._made_at:
            old_id, old_vector = self.rows()
            self._rebuild(np.concatenate([old_id, id_N]), np.concatenate([old_vector, vector_ND]))
        else:
            self._put(id_N, vector_ND, closest(vector_ND, self.centre_KD))

    def _put(self, id_N: np.ndarray, vector_ND: np.ndarray, cluster_N: np.ndarray) -> None:
        self._cluster |= dict(zip(id_N.tolist(), cluster_N.tolist(), strict=True))
        order = np.argsort(cluster_N, kind="stable")
        for at in np.split(order, np.flatnonzero(np.diff(cluster_N[order])) + 1):
            if len(at):
                self._clusters[cluster_N[at[0]]].add(id_N[at], vector_ND[at])

    def _rebuild(self, id_N: np.ndarray, vector_ND: np.ndarray) -> None:
        self._set_clusters(centres(vector_ND, round(math.sqrt(len(id_N))), seed=self._config.seed))
        self._put(id_N, vector_ND, closest(vector_ND, self.centre_KD))
        self._made_at = len(id_N)

    def remove(self, id_N: np.ndarray) -> None:
        """From its clusters, which may be made anew."""
        for id in id_N.tolist():
            self._clusters[self._cluster.pop(id)].remove(id)
        if len(self) < self._made_at / (1 + self._config.rebuild_at):
            self._rebuild(*self.rows())

    def search(self, query_D: np.ndarray, k: int, allow: Allow | None) -> tuple[np.ndarray, np.ndarray]:
        """In the clusters of the nearest centres; in more of them while there are fewer than k results."""
        order = np.argsort(-(self.centre_KD @ query_D), kind="stable")
        probes = self.num_clusters if self._config.probes is None else min(self._config.probes, self.num_clusters)
        parts, count = [], 0
        for place, cluster in enumerate(order):
            if place >= probes and count >= k:
                break
            parts.append(self._clusters[cluster].candidates(query_D, allow))
            count += len(parts[-1][0])
        return nearest(parts, query_D, k)

    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Cluster by cluster."""
        if not self._clusters:
            return np.zeros(0, np.int64), np.zeros((0, self._dim), np.float32)
        return np.concatenate([rows.id_N for rows in self._clusters]), np.concatenate(
            [rows.vector_ND for rows in self._clusters]
        )

    def vector(self, id: int) -> np.ndarray:
        """Of one that is there."""
        return self._clusters[self._cluster[id]].vector(id)

    @property
    def size_bytes(self) -> int:
        """Memory of its arrays."""
        return self.centre_KD.nbytes + sum(rows.size_bytes for rows in self._clusters)

    def state(self) -> Arrays:
        """Centres, how many rows each has, and how many there were when they were made."""
        counts = np.array([len(rows) for rows in self._clusters], np.int64)
        return {"centre_KD": self.centre_KD, "count_K": counts, "made_at": np.array(self._made_at)}

    def load_state(self, id_N: np.ndarray, vector_ND: np.ndarray, arrays: Arrays) -> None:
        """The same clusters."""
        self._set_clusters(arrays["centre_KD"])
        self._put(id_N, vector_ND, np.repeat(np.arange(self.num_clusters), arrays["count_K"]))
        self._made_at = int(arrays["made_at"])


class Clustered(Index, kind="clustered"):
    """K-means in numpy."""

    @configclass
    class Config(Index.Config):
        """How much is looked at.

        Attributes:
            probes: clusters that a search looks into; None for all.
            rebuild_at: clusters are made anew when a namespace is larger or smaller by this share.
            seed: of K-means.
        """

        probes: int | None = Field(default=8, ge=1)
        rebuild_at: float = Field(default=0.5, gt=0)
        seed: Seed = 0

    def make_shard(self) -> Shard:
        """Empty."""
        return ClusteredShard(self.config, self.dim)

    def num_clusters(self, namespace: str = "") -> int:
        """K of a namespace; 0 if there is nothing in it."""
        shard = self._shards.get(namespace)
        return shard.num_clusters if isinstance(shard, ClusteredShard) else 0


def centres(vector_ND: np.ndarray, num_clusters: int, *, seed: int) -> np.ndarray:
    """Centres of length 1, float32 [K, D], of a sample; fewer where there are fewer different vectors. Those of zeros are zeros."""
    random = np.random.default_rng(seed)
    if len(vector_ND) > SAMPLE * num_clusters:
        vector_ND = vector_ND[np.sort(random.choice(len(vector_ND), SAMPLE * num_clusters, replace=False))]
    return kmeans(vector_ND, num_clusters, num_starts=1, seed=seed, iterations=ROUNDS, on_sphere=True)[0]


def closest(vector_ND: np.ndarray, centre_KD: np.ndarray) -> np.ndarray:
    """The centre most similar to each vector, int64 [N], in blocks of rows."""
    blocks = [vector_ND[start : start + 4096] @ centre_KD.T for start in range(0, len(vector_ND), 4096)]
    return np.concatenate([block.argmax(1) for block in blocks]) if blocks else np.zeros(0, np.int64)
