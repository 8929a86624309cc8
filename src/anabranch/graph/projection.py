"""Random projections whose rows are keyed: row i depends on (seed, key of node i) alone, so other nodes may come and go.

Very sparse ("Very sparse random projections", Li, Hastie and Church, KDD 2006): entries are

    +sqrt(s)  with probability 1 / (2 s),    0  with probability 1 - 1 / s,    -sqrt(s)  with probability 1 / (2 s)

so of mean 0 and variance 1, as those of the dense one, N(0, 1). Columns come in blocks of `BLOCK`, each from a stream of its own: column
c is the same for every number of columns. The gap to the next entry that is not 0 is geometric, so a row costs as many draws as it
has entries, and one per block.
"""
# Shapes: N nodes, C columns of a chunk, E entries that are not 0

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numba as nb
import numpy as np

from anabranch.bounds import shown
from anabranch.errors import InputError
from anabranch.graph.random import next_bits, stream, to_unit

BLOCK = 32


@dataclass(frozen=True)
class SparseProjection:
    """Some columns of a very sparse projection, by rows.

    Attributes:
        indptr: int64 [N + 1], where each row's entries start.
        place_E: uint16 or uint32, twice the column of each entry, + 1 where the entry is negative.
        value: what each entry is, but for its sign: sqrt(s).
        num_columns: C.
    """

    indptr: np.ndarray
    place_E: np.ndarray
    value: float
    num_columns: int

    def to_scipy(self, dtype: Any = np.float64) -> Any:
        """`scipy.sparse.csr_array` [N, C]."""
        from scipy.sparse import csr_array

        data = np.where(self.place_E & 1, -self.value, self.value).astype(dtype)
        columns = (self.place_E >> 1).astype(np.int64)
        return csr_array((data, columns, self.indptr), shape=(len(self.indptr) - 1, self.num_columns))


def key_of(name: Any) -> int:
    """The 64 bits that stand for a node's outside name: an integer itself, text by its hash; the same on every machine.

    Raises InputError for text that is none in UTF-8.
    """
    if isinstance(name, int | np.integer):
        return int(name) & 0xFFFFFFFFFFFFFFFF
    try:
        text = str(name).encode()
    except ValueError:
        # Half of a pair of UTF-16, which Python's text may hold.
        raise InputError(f"the name {shown(name)} is no text in UTF-8, which vectors of nodes are made of") from None
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def keys_of(names: Iterable[Any]) -> np.ndarray:
    """uint64 [N]: `key_of` of each name."""
    if isinstance(names, np.ndarray) and names.dtype.kind in "iu":
        return names.astype(np.int64 if names.dtype.kind == "i" else np.uint64).view(np.uint64)
    if isinstance(names, str | bytes) or not np.iterable(names):
        raise InputError(f"names is {shown(names)}; it must be a list of names")
    return np.array([key_of(name) for name in names], np.uint64)


def sparse_rows(key_N: np.ndarray, first: int, last: int, s: float, seed: int) -> SparseProjection:
    """Columns ``first`` (a multiple of `BLOCK`) to ``last`` - 1 of the very sparse projection. ``s`` is at least 1."""
    state = np.uint64(seed & 0xFFFFFFFFFFFFFFFF)
    place_type = np.uint16 if last - first <= 2**15 else np.uint32
    indptr, log_zero = np.zeros(len(key_N) + 1, np.int64), _log_zero(s)
    _sparse(key_N, first, last, log_zero, state, indptr, np.empty(0, place_type), True)
    np.cumsum(indptr, out=indptr)
    place_E = np.empty(indptr[-1], place_type)
    _sparse(key_N, first, last, log_zero, state, indptr, place_E, False)
    return SparseProjection(indptr, place_E, float(s) ** 0.5, last - first)


def gaussian_rows(key_N: np.ndarray, first: int, last: int, seed: int, dtype: Any = np.float32) -> np.ndarray:
    """The same columns of the dense projection, [N, C]."""
    out = np.empty((len(key_N), last - first), dtype)
    _gaussian(key_N, first, last, np.uint64(seed & 0xFFFFFFFFFFFFFFFF), out)
    return out


def _log_zero(s: float) -> float:
    with np.errstate(divide="ignore"):
        # -inf for s = 1: every gap is 0.
        return float(np.log1p(-1.0 / s))


@nb.njit(cache=True, nogil=True)
def _sparse(key_N, first, last, log_zero, seed, indptr, place_E, is_count):
    """Count entries into indptr[row + 1], or write them from indptr[row] on."""
    none = np.exp(log_zero * BLOCK)
    for row in range(len(key_N)):
        count = 0
        for start in range(first, last, BLOCK):
            state = stream(seed, key_N[row], start // BLOCK)
            column = start - 1
            end = min(start + BLOCK, last)
            while True:
                state, bits = next_bits(state)
                unit = 1.0 - to_unit(bits)  # in (0, 1]
                # No entry in a whole block.
                if unit <= none:
                    break
                column += 1 + int(np.log(unit) / log_zero)
                if column >= end:
                    break
                if not is_count:
                    place_E[indptr[row] + count] = 2 * (column - first) + (bits & np.uint64(1))
                count += 1
        if is_count:
            indptr[row + 1] = count


@nb.njit(cache=True, nogil=True)
def _gaussian(key_N, first, last, seed, out):
    for row in range(len(key_N)):
        for start in range(first, last, BLOCK):
            state = stream(seed, key_N[row], start // BLOCK)
            # Two by Box and Muller.
            for column in range(start, min(start + BLOCK, last), 2):
                state, bits = next_bits(state)
                radius = np.sqrt(-2.0 * np.log(1.0 - to_unit(bits)))
                state, bits = next_bits(state)
                angle = 2.0 * np.pi * to_unit(bits)
                out[row, column - first] = radius * np.cos(angle)
                if column + 1 < last:
                    out[row, column + 1 - first] = radius * np.sin(angle)
