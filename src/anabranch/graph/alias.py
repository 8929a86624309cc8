"""Alias tables: a draw by weight in constant time (Walker, 1977; built as by Vose, 1991).

Slot j of n slots keeps itself with probability ``keep[j]`` and gives way to ``other[j]``: draw a slot evenly, then a coin. Tables of all
nodes of a graph lie one after another, along its edges.
"""

from dataclasses import dataclass

import numba as nb
import numpy as np

from anabranch.errors import InputError
from anabranch.graph.random import below, low_unit


@dataclass(frozen=True)
class AliasTable:
    """Tables of all rows of a graph, aligned with its edges.

    Attributes:
        keep_M: float32, the probability that a slot keeps itself.
        other_M: int32, where it goes otherwise, counted from the start of the row.
    """

    keep_M: np.ndarray
    other_M: np.ndarray

    @property
    def nbytes(self) -> int:
        """Bytes of both arrays."""
        return self.keep_M.nbytes + self.other_M.nbytes


def build_alias(indptr: np.ndarray, weight_M: np.ndarray) -> AliasTable:
    """Tables of every row ``weight_M[indptr[i]:indptr[i + 1]]``.

    Weights must be finite and not negative, with a positive sum in every row that has any.

    Raises:
        InputError: they are not, naming the row.
    """
    row = _bad_row(indptr, weight_M)
    if row >= 0:
        raise InputError(
            f"row {row} cannot be drawn from: that takes finite weights that are not negative and not all 0"
        )
    keep_M = np.empty(len(weight_M), np.float32)
    other_M = np.empty(len(weight_M), np.int32)
    _build(indptr, weight_M, keep_M, other_M)
    return AliasTable(keep_M, other_M)


@nb.njit(cache=True, nogil=True)
def _bad_row(indptr, weight_M):
    for row in range(len(indptr) - 1):
        total = 0.0
        for place in range(indptr[row], indptr[row + 1]):
            if not weight_M[place] >= 0:
                return row
            total += weight_M[place]
        if indptr[row + 1] > indptr[row] and not (0 < total < np.inf):
            return row
    return -1


@nb.njit(cache=True, nogil=True)
def _build(indptr, weight_M, keep_M, other_M):
    longest = 0
    for row in range(len(indptr) - 1):
        longest = max(longest, indptr[row + 1] - indptr[row])
    scaled = np.empty(longest, np.float64)
    # Slots below the mean from the front, those above from the back.
    todo = np.empty(longest, np.int64)
    for row in range(len(indptr) - 1):
        start, count = indptr[row], indptr[row + 1] - indptr[row]
        total = 0.0
        for slot in range(count):
            total += weight_M[start + slot]
        small, large = 0, count
        for slot in range(count):
            scaled[slot] = weight_M[start + slot] * count / total
            keep_M[start + slot] = 1.0
            other_M[start + slot] = slot
            if scaled[slot] < 1.0:
                todo[small] = slot
                small += 1
            else:
                large -= 1
                todo[large] = slot
        while small > 0 and large < count:
            poor, rich = todo[small - 1], todo[large]
            small -= 1
            keep_M[start + poor] = scaled[poor]
            other_M[start + poor] = rich
            scaled[rich] -= 1.0 - scaled[poor]
            if scaled[rich] < 1.0:
                large += 1
                todo[small] = rich
                small += 1
        # What is left on either side differs from 1 by rounding alone and keeps itself.


@nb.njit(inline="always")
def pick(bits, start, count, keep_M, other_M):
    """The place in the edges of a draw from the table at ``start`` of ``count`` slots; one 64-bit draw is enough."""
    slot = below(bits, count)
    if low_unit(bits) >= keep_M[start + slot]:
        slot = other_M[start + slot]
    return start + slot
