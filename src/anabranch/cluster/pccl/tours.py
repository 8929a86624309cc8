"""The best ring: an asymmetric travelling salesman's tour over measured bandwidth.

    best_tour(cost_NN)          # [0, 3, 1, 2]: costs add up along the tour, and each is 1000 / Mbit/s where rings are meant

Exact up to a number of places (Held and Karp); beyond, restarts of Or-opt and 3-opt moves that keep directions, until a budget is used.
"""
# Shapes: N places of a tour

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

__all__ = ["best_tour", "edge_costs", "exact_tour", "rings_of", "tour_cost"]

EXACT_TO = 8
_SCALE = 1000.0
# What is not known costs as much as what is very slow, Mbit/s.
_UNKNOWN_RATE = 1.0


def edge_costs(ring: Sequence[int], matrix: Mapping[tuple[int, int], float]) -> np.ndarray:
    """float64 ``[N, N]``: 1000 / Mbit/s from each of ``ring`` to each; the diagonal is 0."""
    cost_NN = np.zeros((len(ring), len(ring)))
    for row, start in enumerate(ring):
        for column, end in enumerate(ring):
            if row != column:
                cost_NN[row, column] = _SCALE / max(matrix.get((start, end), _UNKNOWN_RATE), 1e-9)
    return cost_NN


def tour_cost(cost_NN: np.ndarray, tour: Sequence[int]) -> float:
    """Sum along the closed tour."""
    return float(cost_NN[list(tour), np.roll(tour, -1)].sum()) if len(tour) > 1 else 0.0


def rings_of(
    rings: Mapping[int, Sequence[int]],
    matrix: Mapping[tuple[int, int], float],
    *,
    budget_s: float,
    exact_to: int = EXACT_TO,
    is_cancelled: Callable[[], bool] = lambda: False,
) -> dict[int, list[int]]:
    """By group, its ring in the best order that was found; the one there was, where that is as good."""
    found = {}
    for group, ring in rings.items():
        cost_NN = edge_costs(ring, matrix)
        tour = best_tour(cost_NN, budget_s=budget_s, exact_to=exact_to, is_cancelled=is_cancelled)
        is_better = tour_cost(cost_NN, tour) < tour_cost(cost_NN, range(len(ring))) * (1 - 1e-9)
        found[group] = [ring[place] for place in tour] if is_better else list(ring)
    return found


def best_tour(
    cost_NN: np.ndarray,
    *,
    budget_s: float = 1.0,
    exact_to: int = EXACT_TO,
    seed: int = 0,
    is_cancelled: Callable[[], bool] = lambda: False,
) -> list[int]:
    """A cheap tour that begins at place 0.

    Args:
        cost_NN: of each directed edge, finite and not negative.
        budget_s: for more places than ``exact_to``.
        exact_to: up to so many the tour is the cheapest there is; at most 16.
        seed: of where searches begin.
        is_cancelled: asked between searches.
    """
    count = len(cost_NN)
    if count <= 3 or count <= min(exact_to, 16):
        return exact_tour(cost_NN)
    generator = np.random.default_rng(seed)
    deadline = time.monotonic() + budget_s
    best = _improved(cost_NN, _nearest(cost_NN, 0), deadline)
    for start in range(1, count):
        if time.monotonic() >= deadline or is_cancelled():
            return best
        best = min(
            best, _improved(cost_NN, _nearest(cost_NN, start), deadline), key=lambda tour: tour_cost(cost_NN, tour)
        )
    while time.monotonic() < deadline and not is_cancelled():
        # A kick that no sequence of small moves undoes: three segments change places.
        cut = np.sort(generator.choice(np.arange(1, count), 3, replace=False))
        a, b, c, d = np.split(np.array(best), cut)
        kicked = _improved(cost_NN, np.concatenate([a, c, b, d]).tolist(), deadline)
        best = min(best, kicked, key=lambda tour: tour_cost(cost_NN, tour))
    return best


def exact_tour(cost_NN: np.ndarray) -> list[int]:
    """The cheapest tour, by dynamic programming over subsets: 2^N N^2 steps."""
    count = len(cost_NN)
    if count <= 2:
        return list(range(count))
    rest = count - 1
    # Cost of the cheapest way from 0 through a set of the others to its last place, and the place before that.
    cost = np.full((1 << rest, rest), math.inf)
    before = np.zeros((1 << rest, rest), np.int8)
    for last in range(rest):
        cost[1 << last, last] = cost_NN[0, last + 1]
    among_NN = cost_NN[1:, 1:]
    for visited in range(1, 1 << rest):
        row = cost[visited]
        for last in range(rest):
            bit = 1 << last
            if visited & bit or not np.isfinite(row).any():
                continue
            through = row + among_NN[:, last]
            place = int(through.argmin())
            if through[place] < cost[visited | bit, last]:
                cost[visited | bit, last] = through[place]
                before[visited | bit, last] = place
    visited = (1 << rest) - 1
    last = int((cost[visited] + cost_NN[1:, 0]).argmin())
    tour = []
    while visited:
        tour.append(last + 1)
        visited, last = visited & ~(1 << last), int(before[visited, last])
    return [0, *reversed(tour)]


def _nearest(cost_NN: np.ndarray, start: int) -> list[int]:
    left = set(range(len(cost_NN))) - {start}
    tour = [start]
    while left:
        tour.append(min(left, key=lambda place: (cost_NN[tour[-1], place], place)))
        left.discard(tour[-1])
    return _from_zero(tour)


def _from_zero(tour: list[int]) -> list[int]:
    first = tour.index(0)
    return tour[first:] + tour[:first]


def _improved(cost_NN: np.ndarray, tour: list[int], deadline: float) -> list[int]:
    """Move segments elsewhere, without turning them round, as long as that helps: Or-opt, which is 3-opt of a directed tour."""
    count, is_better = len(tour), True
    while is_better and time.monotonic() < deadline:
        is_better = False
        for length in range(1, count - 1):
            for start in range(1, count - length + 1):
                moved = _best_move(cost_NN, tour, start, length)
                if moved is not None:
                    tour, is_better = moved, True
    return tour


def _best_move(cost_NN: np.ndarray, tour: list[int], start: int, length: int) -> list[int] | None:
    segment, rest = tour[start : start + length], tour[:start] + tour[start + length :]
    before, after = tour[start - 1], tour[(start + length) % len(tour)]
    saved = cost_NN[before, segment[0]] + cost_NN[segment[-1], after] - cost_NN[before, after]
    here, there = np.array(rest), np.roll(rest, -1)
    added = cost_NN[here, segment[0]] + cost_NN[segment[-1], there] - cost_NN[here, there]
    place = int(added.argmin())
    if added[place] >= saved - 1e-12 * (1 + abs(saved)):
        return None
    return rest[: place + 1] + segment + rest[place + 1 :]
