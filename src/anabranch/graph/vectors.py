"""Passes over tall matrices of vectors, in place: lengths of rows taken out, columns brought to mean 0 and variance 1.

Sums are taken in 64 bits and in an order that no number of threads changes.
"""
# Shapes: N nodes, D dim

import numba as nb
import numpy as np

from anabranch.graph.products import ranges
from anabranch.graph.workers import Workers

_LANES = 32

# Rows whose sums are taken at once; fixed, so that the order of additions is.
_TILE = 4096

# A column that varies less than this share of its root mean square is constant but for rounding.
FLAT = 1e-6


def scale_rows(x_ND: np.ndarray, weight: float, normalize: bool, pool: Workers) -> None:
    """x = weight x, each row first divided by its length (zero rows stay) if ``normalize``."""
    pool.each(
        lambda first, last: _combine(x_ND, x_ND, float(weight), normalize, True, first, last),
        ranges(len(x_ND), 4 * pool.count),
    )


def add_rows(out_ND: np.ndarray, x_ND: np.ndarray, weight: float, normalize: bool, pool: Workers) -> None:
    """out += weight x, each row of x first divided by its length (zero rows stay) if ``normalize``."""
    pool.each(
        lambda first, last: _combine(out_ND, x_ND, float(weight), normalize, False, first, last),
        ranges(len(x_ND), 4 * pool.count),
    )


def column_moments(x_ND: np.ndarray, pool: Workers) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D], and what to multiply with for variance 1 [D], 0 where a column is constant; both float64."""
    tiles = [(first, min(first + _TILE, len(x_ND))) for first in range(0, len(x_ND), _TILE)]
    sum_TD, square_TD = np.zeros((2, len(tiles), x_ND.shape[1]))
    pool.each(
        lambda place, first, last: _sums(x_ND, first, last, sum_TD[place], square_TD[place]),
        [(place, *tile) for place, tile in enumerate(tiles)],
    )
    count = max(len(x_ND), 1)
    mean_D, square_D = sum_TD.sum(0) / count, square_TD.sum(0) / count
    # The caller looks at the mean.
    with np.errstate(invalid="ignore", over="ignore"):
        variance_D = square_D - mean_D**2
    varies = variance_D > FLAT**2 * square_D
    return mean_D, np.where(varies, 1 / np.sqrt(np.where(varies, variance_D, 1.0)), 0.0)


def shift_columns(x_ND: np.ndarray, mean_D: np.ndarray, factor_D: np.ndarray, pool: Workers) -> None:
    """x = (x - mean) factor."""
    pool.each(
        lambda first, last: _shift(x_ND, mean_D, factor_D, first, last),
        ranges(len(x_ND), 4 * pool.count),
    )


@nb.njit(cache=True, nogil=True)
def _combine(out_ND, x_ND, weight, normalize, is_new, first, last):
    columns = x_ND.shape[1]
    lane = np.empty(_LANES, np.float64)
    for row in range(first, last):
        factor = weight
        if normalize:
            lane[:] = 0
            for start in range(0, columns, _LANES):
                for place in range(min(_LANES, columns - start)):
                    value = np.float64(x_ND[row, start + place])
                    lane[place] += value * value
            length = np.sqrt(lane.sum())
            factor = weight / length if length > 0 else 0.0
        for column in range(columns):
            value = factor * x_ND[row, column]
            out_ND[row, column] = value if is_new else out_ND[row, column] + value


@nb.njit(cache=True, nogil=True)
def _sums(x_ND, first, last, sum_D, square_D):
    for row in range(first, last):
        for column in range(x_ND.shape[1]):
            value = np.float64(x_ND[row, column])
            sum_D[column] += value
            square_D[column] += value * value


@nb.njit(cache=True, nogil=True)
def _shift(x_ND, mean_D, factor_D, first, last):
    for row in range(first, last):
        for column in range(x_ND.shape[1]):
            x_ND[row, column] = (x_ND[row, column] - mean_D[column]) * factor_D[column]
