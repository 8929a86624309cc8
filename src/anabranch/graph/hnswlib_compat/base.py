"""What both kinds of index share: spaces, vectors as they come in, labels, threads."""

from typing import Any

import numpy as np

from anabranch.errors import InputError
from anabranch.graph.hnsw.checks import MAX_LENGTH, TOO_LONG, too_long
from anabranch.graph.masks import unmasked
from anabranch.graph.workers import num_workers

SPACES = ("l2", "ip", "cosine")

# Vectors are scaled here, as there: a zero vector stays one.
METRIC = {"l2": "l2", "ip": "ip", "cosine": "ip"}
FULL = "The number of elements exceeds the specified limit"


class Base:
    """What both kinds of index share."""

    def __init__(self, space: str, dim: int) -> None:
        if space not in SPACES:
            raise RuntimeError("Space name must be one of l2, ip, or cosine.")
        self._space, self._dim = space, int(dim)
        self.num_threads = num_workers()

    @property
    def space(self) -> str:
        """ "l2", "ip" or "cosine"."""
        return self._space

    @property
    def dim(self) -> int:
        """Numbers in a vector."""
        return self._dim

    def set_num_threads(self, num_threads: int) -> None:
        """Threads of calls that are not told; 0 or less for all processors."""
        self.num_threads = int(num_threads)

    def _vectors(self, data: Any) -> np.ndarray:
        found = np.ascontiguousarray(plain(data, "vectors"), np.float32)
        if found.ndim not in (1, 2):
            raise RuntimeError(
                f"Input vector data wrong shape. Number of dimensions {found.ndim}. Data must be a 1D or 2D array."
            )
        found = found[None] if found.ndim == 1 else found
        if found.shape[1] != self._dim:
            raise RuntimeError("Wrong dimensionality of the vectors")
        bad = np.flatnonzero(~np.isfinite(found).all(1))
        if bad.size:
            raise RuntimeError(f"row {bad[0]} of the vectors is not finite")
        if self._space != "cosine" and (row := too_long(found)) is not None:
            raise RuntimeError(f"row {row} of the vectors is longer than {MAX_LENGTH:g}: {TOO_LONG}")
        if self._space == "cosine":
            length = np.sqrt(np.einsum("nd,nd->n", found, found))[:, None]
            found = found * (np.float32(1) / (length + np.float32(1e-30)))
        return found

    def _threads(self, num_threads: int, rows: int) -> int:
        threads = num_threads if num_threads > 0 else self.num_threads
        threads = min(threads, num_workers()) if threads > 0 else num_workers()
        # Not worth it, as there.
        return 1 if rows <= 4 * threads else threads


def plain(value: Any, what: str) -> Any:
    """`unmasked`, with the error that hnswlib's users expect."""
    try:
        return unmasked(value, what)
    except InputError as error:
        raise RuntimeError(str(error)) from None


def labels_of(ids: Any, rows: int, first: int) -> np.ndarray:
    """Labels of so many vectors; those from ``first`` on where none are given. Raises RuntimeError for another number of them."""
    if ids is None:
        return np.arange(first, first + rows)
    found = np.asarray(plain(ids, "labels"))
    if not (found.shape == (rows,) or (found.ndim == 0 and rows == 1)):
        raise RuntimeError(f"The input label shape {found.ndim} does not match the input data vector shape {rows}")
    found = np.atleast_1d(found)
    if found.size and (found.dtype.kind not in "iuf" or found.min() < 0 or found.max() > np.iinfo(np.int64).max):
        raise RuntimeError(f"labels must be integers from 0 to {np.iinfo(np.int64).max}")
    return found.astype(np.int64)


def last_of_each(label_N: np.ndarray) -> np.ndarray:
    """Rows that stay where a label stands there twice: its last, as if they came one by one. Rising."""
    _, from_end = np.unique(label_N[::-1], return_index=True)
    return np.sort(len(label_N) - 1 - from_end)


def flat_labels(ids: Any) -> np.ndarray:
    """As many labels as the first dimension is long, in C order, as there."""
    found = np.asarray(plain(ids, "labels"))
    return found.reshape(-1)[: found.shape[0]].astype(np.int64)
