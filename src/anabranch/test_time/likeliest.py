"""Three parameters that make outcomes likeliest: from the best of many starts uphill, by the neighbours and a parabola through them."""
# Shapes: G points that are looked at

from collections.abc import Callable

import numpy as np

_SEARCHES = 60
_NEIGHBOURS = np.stack(np.meshgrid(*[[-1.0, 0.0, 1.0]] * 3, indexing="ij"), -1).reshape(-1, 3)
_CENTRE = 13
_X, _Y, _Z = _NEIGHBOURS.T
_PARABOLA = np.linalg.pinv(np.stack([np.ones(27), _X, _Y, _Z, _X**2, _Y**2, _Z**2, _X * _Y, _X * _Z, _Y * _Z], axis=1))


def likeliest(
    likelihood: Callable[[np.ndarray], np.ndarray],
    start_G3: np.ndarray,
    bound_32: np.ndarray,
    *,
    step_3: np.ndarray,
    least: float = 2e-4,
) -> np.ndarray:
    """Where a likelihood is highest, float64 ``[3]``.

    Args:
        likelihood: its logarithm, from points ``[G, 3]`` to ``[G]``; what is looked at together is asked for together.
        start_G3: points to begin with, of which the likeliest is gone on from.
        bound_32: least and most of each parameter.
        step_3: how far the first neighbours are.
        least: part of that below which nothing is told apart.
    """
    here, (low, high) = start_G3[likelihood(start_G3).argmax()], bound_32.T
    step = step_3
    for _ in range(_SEARCHES):
        near = np.clip(here + _NEIGHBOURS * step, low, high)
        found = likelihood(near)
        # Where a parabola through them is highest, which follows a ridge that none of them lies on.
        peak = np.clip(here + _peak(found) * step, low, high)[None]
        near, found = np.concatenate([near, peak]), np.append(found, likelihood(peak))
        at = int(found.argmax())
        if at == _CENTRE or found[at] <= found[_CENTRE] + 1e-9:
            step = step / 4
            if step[0] < least * step_3[0]:
                break
        here = near[at]
    return here


def _peak(found: np.ndarray) -> np.ndarray:
    """In steps from the middle, where the parabola through twenty-seven values is highest; where it has no top, nowhere."""
    _, *slope, xx, yy, zz, xy, xz, yz = _PARABOLA @ found
    curvature = np.array([[2 * xx, xy, xz], [xy, 2 * yy, yz], [xz, yz, 2 * zz]])
    if np.linalg.eigvalsh(curvature).max() >= 0:
        return np.zeros(3)
    return np.clip(-np.linalg.solve(curvature, slope), -8.0, 8.0)
