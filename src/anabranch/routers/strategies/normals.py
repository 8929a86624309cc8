"""Which of several normal variables is the largest, and draws that depend on what they are drawn for alone."""

import math

import numpy as np

from anabranch.routers.strategies.training import share

# Of a standard normal number: where its distribution is looked at, and the distribution there.
_STEPS = np.linspace(-6, 6, 193)


_BELOW = np.array([(1 + math.erf(step / math.sqrt(2))) / 2 for step in _STEPS])


def largest_of_normals(mean_K: np.ndarray, deviation_K: np.ndarray) -> np.ndarray:
    """Probability ``[K]`` of each of K independent normal numbers to be the largest.

    The integral of prod_{j != k} F_j dF_k, F the distributions, by the trapezoidal rule on a grid that is fine wherever one of them
    rises; right to about 1e-4. Without a deviation a number is its mean; equal ones share.
    """
    # As wide as floats tell apart, so that a number without a deviation rises within its own part of the grid.
    deviation_K = np.maximum(deviation_K, 1e-9 * max(1.0, float(np.abs(mean_K).max())))
    grid_G = np.sort((mean_K[:, None] + deviation_K[:, None] * _STEPS).ravel())
    below_KG = np.interp((grid_G - mean_K[:, None]) / deviation_K[:, None], _STEPS, _BELOW, left=0.0, right=1.0)
    chance_K = np.empty(len(mean_K))
    for k in range(len(mean_K)):
        others_G = np.delete(below_KG, k, axis=0).prod(axis=0)
        chance_K[k] = ((others_G[1:] + others_G[:-1]) / 2) @ np.diff(below_KG[k])
    return chance_K / chance_K.sum()


def normal_of(*what: object) -> float:
    """A standard normal number that is a hash of ``what`` (Box and Muller 1958)."""
    radius, angle = share("radius", *what), share("angle", *what)
    return float(np.sqrt(-2 * np.log(1.0 - radius)) * np.cos(2 * np.pi * angle))
