"""Where parts of a list of layers begin, searched by what a whole partition costs, whatever that is.

    quickest(6, 4, ends=range(1, 6), cost=lambda bounds: step_of(bounds), starts=[(1, 2, 3)], most=500)

`anabranch.cluster.partitions` finds the best partition exactly where its cost is that of its largest part, or a sum over parts. The time
of a step is neither: what is sent runs beside what is computed, and a pipeline fills and drains. So it is asked for, partition by
partition: of all of them where they are few, else of those that are better, boundary by boundary, from several starts.
"""
# Shapes: L layers, K parts, N bounds to look at, W numbers that are compared in order

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import combinations
from typing import Any

import numpy as np

__all__ = ["Bounds", "descent", "quickest"]

Bounds = tuple[int, ...]
# Of bounds [N, K - 1], quickly, [N, W]: no more than what they cost, which is a tuple of W numbers.
Least = Callable[[np.ndarray], np.ndarray]


def quickest(
    num_parts: int,
    ends: Sequence[int],
    cost: Callable[[Bounds], Any],
    starts: Sequence[Bounds],
    most: int,
    least: Least | None = None,
) -> Bounds:
    """The bounds of least cost: of all, or of those that moves of boundaries lead to.

    Args:
        num_parts: K.
        ends: where a part may begin, in order; bounds are K - 1 of them.
        cost: of bounds; anything that can be compared. Equal ones go by the bounds themselves.
        starts: bounds to begin at where there are more than ``most`` in all; at least one.
        most: calls of ``cost``; each start has one in any case, unless ``least`` says that it is no better than another.
        least: of many bounds, quickly: no more than their cost. What costs least by it is asked for first, and what cannot be better than
            others already is not asked for. None where nothing is known.
    """
    known: dict[Bounds, tuple[Any, Bounds]] = {}

    def rank(bounds: Bounds) -> tuple[Any, Bounds]:
        if bounds not in known:
            known[bounds] = (cost(bounds), bounds)
        return known[bounds]

    def best_of(some: Sequence[Bounds]) -> Bounds:
        found: Bounds | None = None
        for there, bound in _in_order(np.array(some, int).reshape(len(some), num_parts - 1), least):
            if found is not None and bound is not None and bound > rank(found)[0]:
                break
            found = there if found is None or rank(there) < rank(found) else found
        # Also where it is the only one, it is asked for.
        assert found is not None
        return rank(found)[1]

    def better(here: Bounds) -> Bounds | None:
        for there, bound in _in_order(_moves(here, ends), least):
            if (bound is not None and bound > rank(here)[0]) or (there not in known and len(known) >= most):
                return None
            if rank(there) < rank(here):
                return there
        return None

    if math.comb(len(ends), num_parts - 1) <= most:
        return best_of(list(combinations(ends, num_parts - 1)))
    begins = sorted(set(starts))
    best_of(begins)
    # The best start has the first turn; what it leaves of the calls is the others'.
    for here in sorted(known, key=rank):
        there: Bounds | None = here
        while there is not None:
            there = better(there)
    return min(known.values())[1]


def descent(start: Bounds, ends: Sequence[int], least: Least, most: int) -> list[Bounds]:
    """Where moves of boundaries lead by ``least`` alone: from the start on, each time the best of all moves, until none is better or
    ``most`` bounds were looked at.
    """
    path, (_, bound) = [start], next(_in_order(np.array([start], int), least))
    while most > 0:
        moves = _moves(path[-1], ends)
        most -= len(moves)
        there, found = next(_in_order(moves, least), (start, bound))
        if not found < bound:
            break
        path.append(there)
        bound = found
    return path


def _in_order(bounds: np.ndarray, least: Least | None) -> Iterator[tuple[Bounds, Any]]:
    """Bounds and what they cost at least, by that; in their own order where nothing is known."""
    if least is None or not len(bounds):
        yield from ((tuple(row), None) for row in bounds.tolist())
        return
    # So many at once that they take little memory.
    found = np.concatenate([least(bounds[at : at + 4096]) for at in range(0, len(bounds), 4096)])
    for number in np.lexsort(found.T[::-1]):
        yield tuple(bounds[number].tolist()), tuple(found[number].tolist())


def _moves(bounds: Bounds, ends: Sequence[int]) -> np.ndarray:
    """Neighbouring boundaries together, one of them or several, a place up or down: a layer goes from one part to another one."""
    if not bounds:
        return np.empty((0, 0), int)
    moved = np.searchsorted(ends, bounds) + _steps(len(bounds))
    is_inside = (moved[:, 0] >= 0) & (moved[:, -1] < len(ends)) & (np.diff(moved, axis=1) > 0).all(1)
    return np.asarray(ends)[moved[is_inside]]


@cache
def _steps(count: int) -> np.ndarray:
    """[N, count]: first those of one boundary."""
    at = np.arange(count)
    return np.array(
        [
            step * ((first <= at) & (at < first + together))
            for together in range(1, count + 1)
            for first in range(count - together + 1)
            for step in (1, -1)
        ],
        np.int8,
    ).reshape(-1, count)
