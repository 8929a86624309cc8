"""Vectors in one array, searched by one product."""
# Shapes: N vectors held, D dimensions, K results

import numpy as np

from anabranch.routers.retrieve.index import Allow

# Of a product in 32 bits.
MARGIN = 1e-5


class Rows:
    """Ids and float32 vectors that come and go; the last row takes the place of one that goes."""

    def __init__(self, dim: int) -> None:
        self._id = np.zeros(0, np.int64)
        self._vector = np.zeros((0, dim), np.float32)
        self._row: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._row)

    @property
    def id_N(self) -> np.ndarray:
        """int64 [N]."""
        return self._id[: len(self)]

    @property
    def vector_ND(self) -> np.ndarray:
        """float32 [N, D]."""
        return self._vector[: len(self)]

    @property
    def size_bytes(self) -> int:
        """Memory of the arrays, room to grow included."""
        return self._id.nbytes + self._vector.nbytes

    def add(self, id_N: np.ndarray, vector_ND: np.ndarray) -> None:
        """Append."""
        start, end = len(self), len(self) + len(id_N)
        if end > len(self._id):
            room = max(end, 2 * len(self._id))
            self._id = np.concatenate([self.id_N, np.zeros(room - start, np.int64)])
            self._vector = np.concatenate([self.vector_ND, np.zeros((room - start, self._vector.shape[1]), np.float32)])
        self._id[start:end], self._vector[start:end] = id_N, vector_ND
        self._row |= dict(zip(id_N.tolist(), range(start, end), strict=True))

    def remove(self, id: int) -> None:
        """Take one out; nothing of it stays in memory."""
        row, last = self._row.pop(id), len(self)
        if row != last:
            self._id[row], self._vector[row] = self._id[last], self._vector[last]
            self._row[int(self._id[row])] = row
        self._vector[last] = 0

    def vector(self, id: int) -> np.ndarray:
        """Of one that is there."""
        return self._vector[self._row[id]]

    def candidates(self, query_D: np.ndarray, allow: Allow | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Ids and vectors that may be found, and rough similarities."""
        id_N, vector_ND = self.id_N, self.vector_ND
        similarity_N = vector_ND @ query_D
        if allow is None:
            return id_N, vector_ND, similarity_N
        allowed_N = np.flatnonzero(allow(id_N))
        return id_N[allowed_N], vector_ND[allowed_N], similarity_N[allowed_N]


def nearest(
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]], query_D: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k most similar of some candidates (ids, vectors, rough similarities).

    Products of matrices may round one and the same row differently by where it lies, so whatever may be among the k is measured again
    row by row: the result does not depend on how rows are kept.
    """
    parts = [part for part in parts if len(part[0])]
    if not parts:
        return np.zeros(0, np.int64), np.zeros(0)
    rough_N = np.concatenate([part[2] for part in parts])
    least = np.partition(rough_N, len(rough_N) - k)[len(rough_N) - k] - MARGIN if k < len(rough_N) else -np.inf
    kept = [(part[0][near], part[1][near]) for part in parts for near in [part[2] >= least]]
    id_N = np.concatenate([part[0] for part in kept])
    vector_ND = np.concatenate([part[1] for part in kept])
    similarity_N = (vector_ND.astype(np.float64) * query_D).sum(axis=1)
    order = np.lexsort((id_N, -similarity_N))[:k]
    return id_N[order], similarity_N[order]
