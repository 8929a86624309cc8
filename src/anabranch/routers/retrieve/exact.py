"""Every vector is measured: exact, no build, right for some ten thousand."""
# Shapes: N vectors, D dimensions

import numpy as np

from anabranch.routers.retrieve.index import Allow, Index, Shard
from anabranch.routers.retrieve.rows import Rows, nearest


class ExactShard(Shard):
    """See the module."""

    def __init__(self, dim: int) -> None:
        self._rows = Rows(dim)

    def add(self, id_N: np.ndarray, vector_ND: np.ndarray) -> None:
        """Append."""
        self._rows.add(id_N, vector_ND)

    def remove(self, id_N: np.ndarray) -> None:
        """One by one."""
        for id in id_N.tolist():
            self._rows.remove(id)

    def search(self, query_D: np.ndarray, k: int, allow: Allow | None) -> tuple[np.ndarray, np.ndarray]:
        """One product."""
        return nearest([self._rows.candidates(query_D, allow)], query_D, k)

    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Copies."""
        return self._rows.id_N.copy(), self._rows.vector_ND.copy()

    def vector(self, id: int) -> np.ndarray:
        """Of one that is there."""
        return self._rows.vector(id)

    @property
    def size_bytes(self) -> int:
        """Memory of its arrays."""
        return self._rows.size_bytes


class Exact(Index, kind="exact"):
    """Brute force in numpy."""

    def make_shard(self) -> Shard:
        """Empty."""
        return ExactShard(self.dim)
