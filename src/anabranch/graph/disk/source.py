"""Where vectors come from while an index is made: read some rows at a time, checked and scaled as the metric asks."""
# Shapes: N vectors, D dimension, S some rows

from typing import Any

import numpy as np

from anabranch.errors import InputError
from anabranch.graph.hnsw import HNSW
from anabranch.graph.hnsw.checks import as_array, as_vectors
from anabranch.graph.interrupts import Interrupts


class Rows:
    """Rows of an array in memory or mapped from a file."""

    def __init__(self, vectors: Any, metric: str) -> None:
        # What is mapped stays in its file.
        self._array = vectors if isinstance(vectors, np.ndarray) else as_array(vectors, "vectors")
        if self._array.ndim != 2 or not self._array.size:
            raise InputError(
                f"vectors have the shape {list(self._array.shape)}; they must be rows, at least one, of numbers"
            )
        if self._array.dtype.kind not in "fiub":
            raise InputError(f"vectors must be numbers, not {self._array.dtype}")
        self.count, self.dim = self._array.shape
        self.metric = metric

    def piece(self, first: int, last: int) -> np.ndarray:
        """Rows from one to another, float32. Raises InputError as `HNSW.add`, naming the row."""
        return as_vectors(self._array[first:last], self.dim, self.metric, self._called(first))

    def take(self, row_S: np.ndarray) -> np.ndarray:
        """Some rows, which were looked at before, float32."""
        # In the order of the file.
        order = np.argsort(row_S, kind="stable")
        found_SD = np.empty((len(row_S), self.dim), np.float32)
        found_SD[order] = as_vectors(self._array[row_S[order]], self.dim, self.metric, "vectors")
        return found_SD

    def _called(self, first: int) -> str:
        return "vectors" if not first else f"the vectors from {first:,} on"


class Elements:
    """What an `HNSW` holds, in the order of its places. Whoever uses it holds the lock of the index, so nothing here asks for that.

    Args:
        index: where each place holds an element; of others ``is_whole`` is False, and rows cannot be read.
        interrupts: those that are held back by the lock, looked for whenever rows are read.
    """

    def __init__(self, index: HNSW, interrupts: Interrupts) -> None:
        self._storage, self._interrupts = index._storage, interrupts
        self.count, self.dim, self.metric = self._storage.count, index.dim, index.metric
        self.is_whole = self.count > 0 and not self._storage.deleted[: self.count].any()
        self.id_N = self._storage.label[: self.count].copy()

    def piece(self, first: int, last: int) -> np.ndarray:
        """As `Rows.piece`."""
        return self.take(np.arange(first, last))

    def take(self, row_S: np.ndarray) -> np.ndarray:
        """As `Rows.take`."""
        self._interrupts.check()
        return self._storage.decode(row_S)


Source = Rows | Elements
