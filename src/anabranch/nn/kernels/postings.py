"""The compiled product of one sparse vector with many, which NumPy makes of several passes over all that they share."""
# Shapes: F features of the vector, T postings, M rows

import numpy as np

from anabranch.nn.kernels import load
from anabranch.nn.kernels.binding import Kernel

__all__ = ["products"]

POSTINGS = Kernel(
    "anabranch_postings",
    """start: int64[F] array, end: int64[F] array, weight: float64[F] array, row: int32[T] array, value: float64[T] array,
    score: float64[M] out array, F, T, M""",
    result="status",
    holds_interpreter=True,
)


def products(
    start_F: np.ndarray, end_F: np.ndarray, weight_F: np.ndarray, row_T: np.ndarray, value_T: np.ndarray, rows: int
) -> np.ndarray:
    """score_M = sum of weight_f value_p over the postings of each feature f, int64 ``start_f`` to ``end_f``, by their row.

    By the kernel where there is one. Of a row the features are summed in their order either way.
    """
    if load() is not None:
        score_M = np.zeros(rows)
        POSTINGS(start_F, end_F, weight_F, row_T, value_T, score_M)
        return score_M
    count_F = end_F - start_F
    # The places start, start + 1, ..., end - 1 of all features one after the other.
    place_Q = np.arange(count_F.sum()) + np.repeat(start_F - (count_F.cumsum() - count_F), count_F)
    product_Q = value_T[place_Q] * np.repeat(weight_F, count_F)
    found_M: np.ndarray = np.bincount(row_T[place_Q], product_Q, rows)
    return found_M
