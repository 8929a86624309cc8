"""Which items to keep: the 0/1 knapsack, exactly where that is quick, else with a bound on what is missed.

Greedy by value per weight, then fix every item whose change would cost more than the greedy solution lacks (Dantzig's bound), and
search the few that are left by branch and bound (Horowitz and Sahni, 1974).
"""
# Shapes: N items, C items of the core

import bisect
import itertools
from dataclasses import dataclass

import numpy as np

from anabranch.errors import InputError


@dataclass(frozen=True)
class Packed:
    """What to keep.

    Attributes:
        keep_N: bool.
        value: of what is kept.
        bound: no choice is worth more.
        is_optimal: the search ended by itself.
    """

    keep_N: np.ndarray
    value: float
    bound: float
    is_optimal: bool


def knapsack(value_N: np.ndarray, weight_N: np.ndarray, capacity: float, *, max_nodes: int = 50_000) -> Packed:
    """The most valuable items that weigh at most ``capacity`` together.

    Args:
        value_N: at least 0; items of value 0 are not kept.
        weight_N: above 0.
        capacity: at least 0.
        max_nodes: of the search, after which the best found so far is taken.

    Raises InputError for other values.
    """
    value_N, weight_N = np.asarray(value_N, np.float64), np.asarray(weight_N, np.float64)
    if value_N.shape != weight_N.shape or value_N.ndim != 1:
        raise InputError(f"values have shape {list(value_N.shape)} and weights {list(weight_N.shape)}")
    if not (np.isfinite(value_N).all() and (value_N >= 0).all() and (weight_N > 0).all() and capacity >= 0):
        raise InputError("values must be at least 0 and finite, weights above 0, the capacity at least 0")
    item_C = np.flatnonzero((value_N > 0) & (weight_N <= capacity))
    item_C = item_C[np.argsort(-value_N[item_C] / weight_N[item_C], kind="stable")]
    keep_C, bound, is_optimal = _pack(value_N[item_C], weight_N[item_C], float(capacity), max_nodes)
    keep_N = np.zeros(len(value_N), bool)
    keep_N[item_C[keep_C]] = True
    return Packed(keep_N, float(value_N[keep_N].sum()), bound, is_optimal)


def _pack(value_C: np.ndarray, weight_C: np.ndarray, capacity: float, max_nodes: int) -> tuple[np.ndarray, float, bool]:
    """Of items sorted by falling value per weight."""
    filled_C = np.cumsum(weight_C)
    # The first that does not fit.
    critical = int(np.searchsorted(filled_C, capacity, side="right"))
    if critical == len(value_C):
        return np.ones(len(value_C), bool), float(value_C.sum()), True
    density = value_C[critical] / weight_C[critical]
    room = capacity - (filled_C[critical - 1] if critical else 0.0)
    bound = float(value_C[:critical].sum() + room * density)
    greedy_C = np.arange(len(value_C)) < critical
    # Whatever still fits behind it.
    for at in range(critical, len(value_C)):
        if weight_C[at] <= room:
            greedy_C[at] = True
            room -= weight_C[at]
    least = float(value_C[greedy_C].sum())
    # Turning an item against the bound's choice costs at least |v - d w|: where that is more than the gap, the bound's choice stands.
    is_core_C = bound - np.abs(value_C - density * weight_C) > least
    base_C = (np.arange(len(value_C)) < critical) & ~is_core_C
    core = np.flatnonzero(is_core_C)
    left = capacity - weight_C[base_C].sum()
    found, is_optimal = _search(
        value_C[core].tolist(), weight_C[core].tolist(), left, least - value_C[base_C].sum(), max_nodes
    )
    if found is None:
        return greedy_C, bound, is_optimal
    base_C[core[found]] = True
    return base_C, bound, is_optimal


def _search(
    value: list[float], weight: list[float], capacity: float, least: float, max_nodes: int
) -> tuple[list[int] | None, bool]:
    """Items worth more than ``least`` together, the best such; None if there are none. Depth first, an item taken before it is left out."""
    best: list[int] | None = None
    weight_sum, value_sum = [0.0, *itertools.accumulate(weight)], [0.0, *itertools.accumulate(value)]

    def bound(at: int, room: float) -> float:
        """What items from ``at`` on are worth at most, the last one in part."""
        end = bisect.bisect_right(weight_sum, weight_sum[at] + room, lo=at) - 1
        part = (room - (weight_sum[end] - weight_sum[at])) * value[end] / weight[end] if end < len(value) else 0.0
        return value_sum[end] - value_sum[at] + part

    total, room, nodes = 0.0, capacity, 0
    taken: list[int] = []
    at = 0
    while True:
        while at < len(value) and bound(at, room) + total > least and nodes < max_nodes:
            nodes += 1
            if weight[at] <= room:
                taken.append(at)
                total, room = total + value[at], room - weight[at]
            at += 1
        if at == len(value) and total > least + 1e-12 * max(1.0, abs(least)):
            best, least = list(taken), total
        if not taken or nodes >= max_nodes:
            return best, nodes < max_nodes
        # Back to the last one taken, and go on without it.
        at = taken.pop()
        total, room = total - value[at], room + weight[at]
        at += 1
