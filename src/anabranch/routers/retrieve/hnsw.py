"""`anabranch.graph.HNSW` behind the seam: a walk through small-world graphs, for a hundred thousand vectors and more.

An `Index` of kind ``hnsw`` keeps vectors by id and namespace. `WalkedRows` is for tables that hold their vectors themselves (`knn`,
GraphRouter's neighbours): rows are numbered as they come, and many queries are searched for at once.
"""
# Shapes: N vectors, Q queries, K results, D dimensions

from typing import Any, Self

import numpy as np

from anabranch.config import Field, Seed, configclass
from anabranch.extras import require
from anabranch.routers.contract.strategy import Arrays, Facts
from anabranch.routers.retrieve.index import Allow, Index, Shard


def _graph_class(by: str) -> Any:
    """It compiles on first use: only who asks for it waits. Raises MissingExtraError, ``by`` whom."""
    require("numba", by=by, of="routers")
    from anabranch.graph.hnsw import HNSW

    return HNSW


class WalkedRows:
    """Vectors of length 1 (or 0), whose rows are found by cosine, some of them perhaps not.

    Args:
        dim: D.
        by: who asks, for the message where the extra is missing.
        seed: of the levels.
        options: of `anabranch.graph.HNSW`.
    """

    def __init__(self, dim: int, *, by: str, seed: int = 0, **options: Any) -> None:
        # The inner product of such vectors is the cosine, and takes zeros too.
        self._graph = _graph_class(by)(dim, metric="ip", seed=seed, workers=1, **options)

    def add(self, vector_ND: np.ndarray) -> None:
        """Append rows."""
        self._graph.add(vector_ND)

    def replace(self, row: int, vector_D: np.ndarray) -> None:
        """Put another vector in the place of a row."""
        self._graph.update([row], vector_D[None])

    def search(self, query_QD: np.ndarray, k: int, ef: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows int64 [Q, K] and cosines float32 [Q, K], nearest first; where a walk found fewer than k, row 0 and -inf.

        Args:
            query_QD: of length 1.
            k: at most the rows there are.
            ef: candidates that a walk keeps.
        """
        row_QK, distance_QK = self._graph.search(query_QD, k, ef=ef)
        like_QK = np.where(row_QK < 0, -np.inf, 1 - distance_QK).astype(np.float32)
        return np.maximum(row_QK, 0), like_QK

    def state(self) -> tuple[Arrays, Facts]:
        """The graph as it was built."""
        held = self._graph.__getstate__()
        return held["arrays"], held["meta"]

    @classmethod
    def of_state(cls, arrays: Arrays, facts: Facts, *, by: str) -> Self:
        """What `state` gave, once more."""
        made, graph_class = cls.__new__(cls), _graph_class(by)
        made._graph = graph_class.__new__(graph_class)
        made._graph.__setstate__({"arrays": arrays, "meta": facts, "workers": 1})
        return made


class HnswShard(Shard):
    """See the module. The inner product of unit vectors is the cosine, and takes zeros too."""

    def __init__(self, config: Any, dim: int) -> None:
        self._ef = config.ef
        self._graph = _graph_class("the index hnsw")(
            dim, metric="ip", M=config.M, ef_construction=config.ef_construction, seed=config.seed, workers=1
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
        found: np.ndarray = self._graph.vectors([id])[0]
        return found

    @property
    def size_bytes(self) -> int:
        """Memory of vectors and links, with what they have room for."""
        return int(self._graph.size_bytes)


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
