"""N(q): the nearest stored queries, exactly while there are few, by `anabranch.graph.hnsw` once there are many.

Whole tables of queries are searched exactly a while longer, since one matrix product serves them all.
"""
# Shapes: N stored queries, Q asked ones, J neighbours, D dimensions

from typing import Any

import numpy as np

from anabranch.extras import is_installed, require
from anabranch.routers.contract.strategy import Arrays, Facts

# Numbers of a block of cosines.
PIECE = 1 << 23
EF = 80

# Rows up to which whole tables of queries are searched exactly; queries that are a table.
TABLE, MANY = 20_000, 32


class Neighbours:
    """Vectors of stored queries; rows are numbered as they come.

    Args:
        dim: D.
        exact_below: an index is built once there are that many rows.
        seed: of the index.
    """

    def __init__(self, dim: int, exact_below: int, seed: int = 0) -> None:
        self.dim, self.exact_below, self.seed = dim, exact_below, seed
        self.count = 0
        self._held = np.zeros((0, dim), np.float32)
        self._index: Any = None

    def __len__(self) -> int:
        return self.count

    @property
    def vector_ND(self) -> np.ndarray:
        """float32 [N, D], a view."""
        return self._held[: self.count]

    def add(self, vector_ND: np.ndarray) -> None:
        """Append rows."""
        count = self.count + len(vector_ND)
        self._held = with_room(self._held, count)
        self._held[self.count : count] = vector_ND
        self.count = count
        if self._index is not None:
            self._index.add(vector_ND)
        elif count >= self.exact_below and is_installed("numba"):
            # Without it every cosine is looked at, which takes longer and is right.
            self._build()

    def replace(self, row: int, vector_D: np.ndarray) -> None:
        """Put another query in the place of a row."""
        self._held[row] = vector_D
        if self._index is not None:
            self._index.update([row], vector_D[None])

    def _build(self) -> None:
        from anabranch.graph.hnsw import HNSW

        self._index = HNSW(self.dim, "ip", M=16, ef_construction=100, dtype="i8", seed=self.seed, num_threads=1)
        self._index.add(self.vector_ND)

    @property
    def is_exact(self) -> bool:
        """Whether every cosine is looked at."""
        return self._index is None

    def search(self, query_QD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows int64 [Q, J] and cosines float32 [Q, J], nearest first, J = min(k, N)."""
        k = min(k, self.count)
        if not self.is_exact and (len(query_QD) < MANY or self.count > TABLE):
            row_QJ, distance_QJ = self._index.search(query_QD, k, ef=max(EF, 2 * k))
            return np.maximum(row_QJ, 0), np.where(row_QJ < 0, -np.inf, 1 - distance_QJ).astype(np.float32)
        return nearest(query_QD, self.vector_ND, k)

    def state(self) -> tuple[Arrays, Facts]:
        """Vectors, and the index as it was built."""
        arrays, facts = {"near.vector_ND": self.vector_ND.copy()}, {}
        if self._index is not None:
            held = self._index.__getstate__()
            arrays |= {f"near.index.{name}": value for name, value in held["arrays"].items()}
            facts["index"] = held["meta"]
        return arrays, facts

    def load_state(self, arrays: Arrays, facts: Facts) -> None:
        """Take back what `state` gave."""
        self._held = np.array(arrays["near.vector_ND"], np.float32)
        self.count, self._index = len(self._held), None
        if "index" in facts:
            require("numba", by="an index of many queries", of="routers")
            from anabranch.graph.hnsw import HNSW

            prefix = "near.index."
            held = {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
            self._index = HNSW.__new__(HNSW)
            self._index.__setstate__({"arrays": held, "meta": facts["index"], "num_threads": 1})


def nearest(query_QD: np.ndarray, vector_ND: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and cosines of the k nearest, exactly; of equals the lower row first."""
    rows, likes = [], []
    step = max(1, PIECE // max(len(vector_ND), 1))
    for begin in range(0, len(query_QD), step):
        like_QN = query_QD[begin : begin + step] @ vector_ND.T
        row_QJ = (
            np.argpartition(-like_QN, k - 1, 1)[:, :k]
            if 0 < k < like_QN.shape[1]
            else np.tile(np.arange(k), (len(like_QN), 1))
        )
        row_QJ.sort(1)
        like_QJ = np.take_along_axis(like_QN, row_QJ, 1)
        order_QJ = np.argsort(-like_QJ, 1, kind="stable")
        rows.append(np.take_along_axis(row_QJ, order_QJ, 1))
        likes.append(np.take_along_axis(like_QJ, order_QJ, 1))
    empty = np.zeros((0, k))
    return np.concatenate([empty.astype(np.int64), *rows]), np.concatenate([empty.astype(np.float32), *likes])


def with_room(array: np.ndarray, count: int) -> np.ndarray:
    """``array`` with room for ``count`` rows: itself, or a copy that is half as large again."""
    if len(array) >= count:
        return array
    grown = np.zeros((max(count, len(array) * 3 // 2), *array.shape[1:]), array.dtype)
    grown[: len(array)] = array
    return grown
