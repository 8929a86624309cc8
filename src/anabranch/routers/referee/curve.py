"""Cost against quality: the curve of a strategy, what it can reach by mixing two of its settings, and the area under that.

The area is RouterBench's AIQ (Hu et al., arXiv 2403.12031), over a range of costs that is declared beforehand, so that it does not
change with the set that is compared; `routerbench_aiq` is theirs.
"""
# Shapes: P points of a curve, H points of its hull; a point is (mean cost, mean quality)

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from anabranch.errors import InputError


def hull(point_P2: np.ndarray) -> np.ndarray:
    """Non-decreasing upper convex hull: what mixing settings at random can reach, and nothing that costs more for less.

    Args:
        point_P2: cost and quality of each setting, finite, in any order.

    Returns: ``[H, 2]`` by rising cost; quality rises with it, ever more slowly.
    """
    point_P2 = np.asarray(point_P2, float)
    if point_P2.ndim != 2 or point_P2.shape[1:] != (2,) or not len(point_P2) or not np.isfinite(point_P2).all():
        raise InputError("a curve needs at least one point, each of a finite cost and quality")
    kept: list[np.ndarray] = []
    for point in point_P2[np.lexsort((-point_P2[:, 1], point_P2[:, 0]))]:
        if kept and point[1] <= kept[-1][1]:
            # Dearer, and no better.
            continue
        while len(kept) > 1 and _is_below(kept[-1], kept[-2], point):
            kept.pop()
        kept.append(point)
    return np.array(kept)


def _is_below(middle: np.ndarray, first: np.ndarray, last: np.ndarray) -> bool:
    """Whether ``middle`` lies on or below the line between its neighbours."""
    rise, run = last - first, middle - first
    return bool(run[1] * rise[0] <= rise[1] * run[0])


def aiq(point_P2: np.ndarray, low: float, high: float) -> float:
    """Mean quality of the hull over costs from ``low`` to ``high``; the hull is flat before its first point and after its last.

    A single point, and a range of one cost, give that quality. Raises InputError if the range is not one.
    """
    if not (np.isfinite([low, high]).all() and low <= high):
        raise InputError(f"the range of costs is {low} to {high}; it must rise")
    found_H2 = hull(point_P2)
    cost_H, quality_H = found_H2.T
    if low == high:
        return float(np.interp(low, cost_H, quality_H))
    cost = np.unique(np.concatenate([[low, high], cost_H[(cost_H > low) & (cost_H < high)]]))
    return float(np.trapezoid(np.interp(cost, cost_H, quality_H), cost) / (high - low))


def routerbench_aiq(point_P2: np.ndarray, high: float | None = None) -> float:
    """As RouterBench's code reckons it: area under the hull from its first point, flat to ``high``, divided by ``high``.

    Args:
        point_P2: cost and quality of each setting.
        high: the largest cost of the comparison; None takes that of the points.
    """
    found_H2 = hull(point_P2)
    high = float(np.max(np.asarray(point_P2, float)[:, 0])) if high is None else high
    first = found_H2[0]
    if high <= 0 or high <= first[0]:
        return float(first[1]) if high == first[0] == 0 else 0.0
    return aiq(found_H2, float(first[0]), high) * (high - float(first[0])) / high


def cost_save(point_P2: np.ndarray, quality: float, cost: float) -> float | None:
    """The largest share of ``cost`` that a setting saves while its quality is at least ``quality``; None if no setting is as good.

    Negative where being as good costs more.
    """
    point_P2 = np.asarray(point_P2, float)
    good_P = point_P2[:, 1] >= quality - 1e-12
    if not good_P.any() or cost <= 0:
        return None
    return float(1 - point_P2[good_P, 0].min() / cost)


@dataclass(frozen=True)
class Scale:
    """Costs and qualities that count as 0 and 1 when distances are measured."""

    cost: tuple[float, float]
    quality: tuple[float, float]

    def __call__(self, point_P2: np.ndarray) -> np.ndarray:
        """Points in these units."""
        low = np.array([self.cost[0], self.quality[0]])
        span = np.array([self.cost[1], self.quality[1]]) - low
        return (np.asarray(point_P2, float) - low) / np.where(span > 0, span, 1.0)


def pareto_distance(point: Sequence[float], frontier_H2: np.ndarray, scale: Scale) -> float:
    """How far a point lies below a frontier (`hull` of all that is compared): 0 on it or above.

    The distance is Euclidean, in units of ``scale``, to the nearest point of the frontier, flat beyond its last point.
    """
    at, line_H2 = scale(np.array([point], float))[0], scale(frontier_H2)
    if at[0] >= line_H2[0, 0] and at[1] >= np.interp(at[0], *line_H2.T):
        return 0.0
    flat_end = [[max(at[0], line_H2[-1, 0]), line_H2[-1, 1]]]
    line_H2 = np.concatenate([line_H2, flat_end])
    start, step = line_H2[:-1], np.diff(line_H2, axis=0)
    length = (step**2).sum(1)
    along = np.clip(((at - start) * step).sum(1) / np.where(length > 0, length, 1), 0, 1)
    nearest = start + along[:, None] * step
    return float(np.sqrt(((at - nearest) ** 2).sum(1)).min())
