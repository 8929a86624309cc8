"""Nearest vector by cosine, behind a small protocol: exact by one product of matrices, or through HNSW where there are many."""
# Shapes: N vectors held, D dimensions

from typing import Protocol

import numpy as np

from anabranch.extras import require


class VectorIndex(Protocol):
    """Unit vectors by id."""

    def __len__(self) -> int: ...

    def add(self, id: int, vector_D: np.ndarray) -> None:
        """Hold a vector of length 1 under an id that is not taken."""

    def remove(self, id: int) -> None:
        """Let go of it; nothing happens if it is not there."""

    def nearest(self, vector_D: np.ndarray, k: int = 1) -> list[tuple[int, float]]:
        """Up to k ids with their cosines, nearest first."""


class ExactIndex:
    """Every vector is compared. Right up to some thousands of vectors."""

    def __init__(self, dim: int) -> None:
        self._vector_ND = np.zeros((16, dim), np.float32)
        # Of rows 0 to len - 1.
        self._ids: list[int] = []
        self._row_of: dict[int, int] = {}

    def __len__(self) -> int:
        return len(self._ids)

    def add(self, id: int, vector_D: np.ndarray) -> None:
        """As the protocol."""
        row = len(self._ids)
        if row == len(self._vector_ND):
            self._vector_ND = np.concatenate([self._vector_ND, np.zeros_like(self._vector_ND)])
        self._vector_ND[row] = vector_D
        self._ids.append(id)
        self._row_of[id] = row

    def remove(self, id: int) -> None:
        """As the protocol. The last row takes the place of the one that goes."""
        row = self._row_of.pop(id, None)
        if row is None:
            return
        last = self._ids.pop()
        if last != id:
            self._vector_ND[row] = self._vector_ND[len(self._ids)]
            self._ids[row] = last
            self._row_of[last] = row

    def nearest(self, vector_D: np.ndarray, k: int = 1) -> list[tuple[int, float]]:
        """As the protocol."""
        cosine_N = self._vector_ND[: len(self._ids)] @ vector_D.astype(np.float32, copy=False)
        order = np.argsort(-cosine_N, kind="stable")[:k]
        return [(self._ids[at], float(cosine_N[at])) for at in order]


class GraphIndex:
    """HNSW. Needs numba (``anabranch[routers]``), which takes a second to load and compile."""

    def __init__(self, dim: int, *, ef: int = 64) -> None:
        require("numba", by="an index of many answers", of="routers")
        from anabranch.graph.hnsw import HNSW

        self._graph = HNSW(dim, metric="cosine", num_threads=1)
        self._ef = ef

    def __len__(self) -> int:
        return len(self._graph)

    def add(self, id: int, vector_D: np.ndarray) -> None:
        """As the protocol."""
        self._graph.add(vector_D[None], ids=np.array([id]))

    def remove(self, id: int) -> None:
        """As the protocol."""
        if id in self._graph:
            self._graph.remove(np.array([id]))

    def nearest(self, vector_D: np.ndarray, k: int = 1) -> list[tuple[int, float]]:
        """As the protocol."""
        if not len(self._graph):
            return []
        id_1K, distance_1K = self._graph.search(vector_D[None], k, max(k, self._ef))
        return [
            (int(id), 1.0 - float(distance)) for id, distance in zip(id_1K[0], distance_1K[0], strict=True) if id >= 0
        ]
