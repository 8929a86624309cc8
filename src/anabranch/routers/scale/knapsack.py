"""Which steps get the dear mode under a cap: a 0/1 knapsack over steps, greedily, and exactly as the oracle of tests.

    maximise  sum_i x_i g_i      s.t.  sum_i x_i c_i <= capacity,   x_i in {0, 1}

`greedy` takes steps by falling gain per cost, passes over what does not fit, and gives the best single step where that is worth more (half
of the optimum at least). `exact` is the dynamic program over capacity, in whole units: costs are rounded up and the capacity down, so what
it gives always fits; with costs that are whole multiples of ``unit`` nothing is lost.
"""
# Shapes: N steps, W units of capacity

import math
from collections.abc import Sequence

import numpy as np

from anabranch.errors import InputError

# Cells of the exact table: N x (W + 1). Beyond it a coarser unit is wanted.
MOST_CELLS = 50_000_000


def checked(
    gain: Sequence[float], cost: Sequence[float], capacity: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Gains, costs, the steps worth considering, and the capacity. Raises InputError for NaN, lengths that differ, a capacity that is NaN.

    A step without gain is never worth anything; one with gain that costs nothing is always taken, and its cost counts as 0.
    """
    gain_N, cost_N = np.asarray(gain, np.float64), np.asarray(cost, np.float64)
    if gain_N.shape != cost_N.shape or gain_N.ndim != 1:
        raise InputError(
            f"gains have shape {list(gain_N.shape)} and costs {list(cost_N.shape)}; give one of each a step"
        )
    if np.isnan(gain_N).any() or not np.isfinite(cost_N).all() or math.isnan(capacity):
        raise InputError("gains may not be NaN, costs must be finite, and the capacity a number")
    cost_N = np.maximum(cost_N, 0.0)
    open_C = np.flatnonzero((gain_N > 0) & (cost_N <= capacity))
    return gain_N, cost_N, open_C, float(capacity)


def greedy(gain: Sequence[float], cost: Sequence[float], capacity: float) -> np.ndarray:
    """bool ``[N]``: steps by falling gain per cost as long as they fit; ties by their order. Raises InputError, see `checked`."""
    gain_N, cost_N, open_C, left = checked(gain, cost, capacity)
    taken_N = np.zeros(len(gain_N), bool)
    if not len(open_C):
        return taken_N
    with np.errstate(divide="ignore"):
        ratio_C = gain_N[open_C] / cost_N[open_C]
    for at in open_C[np.argsort(-ratio_C, kind="stable")]:
        if cost_N[at] <= left:
            taken_N[at] = True
            left -= cost_N[at]
    best = open_C[np.argmax(gain_N[open_C])]
    if gain_N[best] > gain_N[taken_N].sum():
        # One dear step that the cheap ones left no room for.
        taken_N[:] = False
        taken_N[best] = True
    return taken_N


def exact(gain: Sequence[float], cost: Sequence[float], capacity: float, *, unit: float = 64.0) -> np.ndarray:
    """bool ``[N]``: the dynamic program. Of equal choices the one with earlier steps is not preferred; the value is what is exact.

    Args:
        gain: of taking a step; infinite gains are taken first.
        cost: in tokens or dollars.
        capacity: likewise; infinity takes all that gain, below 0 nothing fits.
        unit: what the table counts in.

    Raises InputError, see `checked`; also for a unit that is not above 0, and a table of more than `MOST_CELLS`.
    """
    if not (unit > 0 and math.isfinite(unit)):
        raise InputError(f"unit is {unit!r}; it must be above 0")
    gain_N, cost_N, open_C, capacity = checked(gain, cost, capacity)
    taken_N = np.zeros(len(gain_N), bool)
    if not len(open_C):
        return taken_N
    if cost_N[open_C].sum() <= capacity:
        taken_N[open_C] = True
        return taken_N
    units_C = np.array([_units(cost_N[at], unit) for at in open_C])
    room = math.floor(capacity / unit + 1e-9)
    if len(open_C) * (room + 1) > MOST_CELLS:
        raise InputError(f"{len(open_C)} steps by {room:,} units are too many; take a unit above {unit:g}")
    best_W = np.zeros(room + 1)
    took_CW = np.zeros((len(open_C), room + 1), bool)
    for place, at in enumerate(open_C):
        size = int(units_C[place])
        if size > room:
            continue
        with_it_W = np.full(room + 1, -np.inf)
        with_it_W[size:] = best_W[: room + 1 - size] + gain_N[at]
        took_CW[place] = with_it_W > best_W
        best_W = np.maximum(best_W, with_it_W)
    left = room
    for place in range(len(open_C) - 1, -1, -1):
        if took_CW[place, left]:
            taken_N[open_C[place]] = True
            left -= int(units_C[place])
    return taken_N


def _units(cost: float, unit: float) -> int:
    """Rounded up, but for what is a whole number of units up to rounding."""
    return math.ceil(cost / unit - 1e-9)
