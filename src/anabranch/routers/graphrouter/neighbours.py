"""N(q): the nearest stored queries, exactly while there are few, on a walk (`retrieve.WalkedRows`) once there are many.

Whole tables of queries are searched exactly a while longer, since one matrix product serves them all.
"""
# Shapes: N stored queries, Q asked ones, J neighbours, D dimensions

import numpy as np

from anabranch.extras import is_installed
from anabranch.routers.contract.strategy import Arrays, Facts
from anabranch.routers.retrieve import WalkedRows

# Numbers of a block of cosines.
PIECE = 1 << 23
EF = 80

# Who walks.
BY = "an index of many queries"

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
        self._index: WalkedRows | None = None

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
            self._index.replace(row, vector_D)

    def _build(self) -> None:
        self._index = WalkedRows(self.dim, by=BY, seed=self.seed, M=16, ef_construction=100, dtype="i8")
        self._index.add(self.vector_ND)

    @property
    def is_exact(self) -> bool:
        """Whether every cosine is looked at."""
        return self._index is None

    def search(self, query_QD: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows int64 [Q, J] and cosines float32 [Q, J], nearest first, J = min(k, N)."""
        k = min(k, self.count)
        if self._index is not None and (len(query_QD) < MANY or self.count > TABLE):
            return self._index.search(query_QD, k, max(EF, 2 * k))
        return nearest(query_QD, self.vector_ND, k)

    def state(self) -> tuple[Arrays, Facts]:
        """Vectors, and the index as it was built."""
        arrays: Arrays = {"near.vector_ND": self.vector_ND.copy()}
        facts: Facts = {}
        if self._index is not None:
            held, facts["index"] = self._index.state()
            arrays |= {f"near.index.{name}": value for name, value in held.items()}
        return arrays, facts

    def load_state(self, arrays: Arrays, facts: Facts) -> None:
        """Take back what `state` gave."""
        self._held = np.array(arrays["near.vector_ND"], np.float32)
        self.count, self._index = len(self._held), None
        if "index" in facts:
            prefix = "near.index."
            held = {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}
            self._index = WalkedRows.of_state(held, facts["index"], by=BY)


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
