"""Where vectors come from while an index is made: read some rows at a time, checked and scaled as the metric asks."""
# Shapes: N vectors, D dimension, S some rows

from typing import Any

import numpy as np

from anabranch.errors import InputError
from anabranch.graph.hnsw import HNSW
from anabranch.graph.hnsw.checks import as_array, as_vectors


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
    """What an `HNSW` holds, in the order of its places."""

    def __init__(self, index: HNSW) -> None:
        self._index, self.id_N = index, index.ids
        self.count, self.dim, self.metric = len(self.id_N), index.dim, index.metric

    def piece(self, first: int, last: int) -> np.ndarray:
        """As `Rows.piece`."""
        return self._index.vectors(self.id_N[first:last])

    def take(self, row_S: np.ndarray) -> np.ndarray:
        """As `Rows.take`."""
        return self._index.vectors(self.id_N[row_S])


Source = Rows | Elements
