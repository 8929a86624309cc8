"""`anabranch.graph.HNSW` behind the seam: a walk through small-world graphs, for a hundred thousand vectors and more."""
# Shapes: N vectors, D dimensions

from typing import Any

import numpy as np

from anabranch.config import Field, Seed, configclass
from anabranch.extras import require
from anabranch.routers.retrieve.index import Allow, Index, Shard


class HnswShard(Shard):
    """See the module. The inner product of unit vectors is the cosine, and takes zeros too."""

    def __init__(self, config: Any, dim: int) -> None:
        # Compiles on first use: only who asks for it waits.
        require("numba", by="the index hnsw", of="routers")
        from anabranch.graph.hnsw import HNSW

        self._ef = config.ef
        self._graph = HNSW(
            dim, metric="ip", M=config.M, ef_construction=config.ef_construction, seed=config.seed, num_threads=1
        )

    def add(self, id_N: np.ndarray, vector_ND: np.ndarray) -> None:
        """Insert and link."""
        self._graph.add(vector_ND, id_N)

    def remove(self, id_N: np.ndarray) -> None:
        """Mark: not found any more, and taken out of the graph once a fifth is."""
        self._graph.remove(id_N)

    def compact(self) -> None:
        """Take out what is marked now."""
        self._graph.compact()

    def search(self, query_D: np.ndarray, k: int, allow: Allow | None) -> tuple[np.ndarray, np.ndarray]:
        """By a walk as wide as ``ef``, or k if that is more."""
        allowed = None
        if allow is not None:
            id_N = self._graph.ids
            allowed = id_N[allow(id_N)]
            if not len(allowed):
                return np.zeros(0, np.int64), np.zeros(0)
        id_QK, distance_QK = self._graph.search(query_D[None], k, max(self._ef, k), filter=allowed)
        found = id_QK[0] >= 0
        return id_QK[0][found], 1.0 - distance_QK[0][found].astype(np.float64)

    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """In the order of their places in the graph."""
        id_N = self._graph.ids
        return id_N, self._graph.vectors(id_N)

    def vector(self, id: int) -> np.ndarray:
        """Of one that is there."""
        return self._graph.vectors([id])[0]

    @property
    def size_bytes(self) -> int:
        """Memory of vectors and links, with what they have room for."""
        return self._graph.size_bytes


class Hnsw(Index, kind="hnsw"):
    """A graph per namespace. `state` keeps vectors; the graph is built anew from them, so neighbours found may differ a little."""

    @configclass
    class Config(Index.Config):
        """As `anabranch.graph.HNSW`.

        Attributes:
            M: links of a vector.
            ef_construction: candidates for them.
            ef: candidates of a search.
            seed: of the levels.
        """

        M: int = Field(default=16, ge=2, le=1024)
        ef_construction: int = Field(default=200, ge=2)
        ef: int = Field(default=64, ge=1)
        seed: Seed = 0

    def make_shard(self) -> Shard:
        """Empty."""
        return HnswShard(self.config, self.dim)
