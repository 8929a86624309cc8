"""All elements within a radius: a walk that holds more until what it holds reaches well outside, or every distance.

A walk of width ef finds the ef nearest (`search`). If at most half of them are within the radius, those inside are taken: the walk went as
far beyond the border as there is inside. Otherwise it is made again with twice the width, and where it would hold one in `MEASURED` of all,
every distance is measured, which is quicker then, and exact.
"""
# Shapes: Q queries, R rows still to do, S slots, Z results

from typing import Any, NamedTuple

import numpy as np

from anabranch.errors import DataError, InputError
from anabranch.graph.hnsw.checks import as_array
from anabranch.graph.hnsw.filters import Filter, prepared
from anabranch.graph.hnsw.layout import AUX, ENTRY, FULL, FULL_STRIDE, FULL_WIDTH, KIND, ROWS, STRIDE, WIDTH
from anabranch.graph.hnsw.lock import Workers
from anabranch.graph.hnsw.measuring import distance
from anabranch.graph.hnsw.raw import address, kernel
from anabranch.graph.hnsw.search import is_selective
from anabranch.graph.hnsw.searching import Searcher

# All are measured where a walk would hold one in so many.
MEASURED = 16

# Results that walks of several queries hold at once, at most.
HELD = 1 << 22

DAMAGED = "index holds numbers that nobody gave it: its file is damaged; bring a copy of it back"

# Ids and distances of each query.
Rows = list[tuple[np.ndarray, np.ndarray]]


class Within(NamedTuple):
    """What lies within a radius of each query, the nearest first, those at one distance by id.

    Attributes:
        indptr: int64 [Q + 1]; results of query q are those from ``indptr[q]`` to ``indptr[q + 1]``.
        ids: int64 [Z].
        distances: float32 [Z].
    """

    indptr: Any
    ids: Any
    distances: Any

    @classmethod
    def of(cls, rows: Rows) -> "Within":
        """Of ids and distances of each query."""
        indptr = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(ids) for ids, _ in rows], out=indptr[1:])
        ids = np.concatenate([np.empty(0, np.int64), *(ids for ids, _ in rows)])
        return cls(indptr, ids, np.concatenate([np.empty(0, np.float32), *(far for _, far in rows)]))


def as_radius(value: Any, count: int) -> np.ndarray:
    """float32 [count], of one number or one for each query. Raises InputError for others and for what is no number."""
    found = as_array(value, "radius")
    if found.dtype.kind not in "fiu" or found.shape not in ((), (count,)):
        raise InputError(
            f"radius has the shape {list(found.shape)} of {found.dtype}; it must be one number, or one for each of the {count:,} queries"
        )
    with np.errstate(over="ignore"):
        radius_Q = np.broadcast_to(found.astype(np.float32), (count,))
    bad = np.flatnonzero(np.isnan(radius_Q))
    if bad.size:
        raise InputError(f"radius{'' if found.ndim == 0 else f'[{bad[0]}]'} is nan; it must be a number")
    return radius_Q


class Ranges:
    """Searches an index by radius, for a reader that holds its lock."""

    def __init__(self, searcher: Searcher) -> None:
        self._searcher = searcher
        self._storage, self._slots = searcher.storage, searcher.slots

    def many(
        self, query_QD: np.ndarray, radius_Q: np.ndarray, ef: int, filter: object, exact: bool, workers: Workers
    ) -> Rows:
        """Ids and distances of each query.

        Raises InputError for a filter that does not fit, DataError for distances that are no numbers.
        """
        held, slots = self._storage, self._slots
        if filter is not None:
            wanted = filter.on(slots) if isinstance(filter, Filter) else prepared(filter, slots)
            slot_S, number = wanted.slots(slots.labels()), wanted.number
            exact = exact or is_selective(number, ef, held.count)
        else:
            slot_S = np.flatnonzero(slots.live())
            number = len(slot_S)
        # Nothing leads anywhere where memory ended while elements were linked.
        exact = exact or held.graph[ENTRY] < 0
        rows: Rows = [(np.empty(0, np.int64), np.empty(0, np.float32))] * len(query_QD)
        left_R, cost = np.arange(len(query_QD) if number else 0), [0, 0]
        while left_R.size and not exact and MEASURED * ef < number:
            again = []
            for begin in range(0, len(left_R), max(1, HELD // ef)):
                part_R = left_R[begin : begin + max(1, HELD // ef)]
                again.append(part_R[self._walk(query_QD, radius_Q, part_R, ef, filter, workers, rows)])
                cost = [total + more for total, more in zip(cost, self._searcher.last, strict=False)]
            left_R, ef = np.concatenate(again), 2 * ef
        if left_R.size:
            self._measure(query_QD, radius_Q, left_R, slot_S, workers, rows)
            cost[1] += len(left_R) * len(slot_S)
        self._searcher.last = (cost[0], cost[1], len(query_QD))
        return rows

    def _walk(
        self,
        query_QD: np.ndarray,
        radius_Q: np.ndarray,
        part_R: np.ndarray,
        ef: int,
        filter: object,
        workers: Workers,
        rows: Rows,
    ) -> np.ndarray:
        """Write rows of what lies inside; which are not done, since most of what was held does, bool [R]."""
        id_RK, distance_RK = np.full((len(part_R), ef), -1), np.full((len(part_R), ef), np.inf, np.float32)
        self._searcher.many(query_QD[part_R], ef, filter, id_RK, distance_RK, workers)
        found_RK = id_RK >= 0
        _check(distance_RK[found_RK])
        inside_R = (found_RK & (distance_RK <= radius_Q[part_R, None])).sum(1)
        # A walk that ended before it held so many has seen all it can.
        more_R = found_RK[:, -1] & (2 * inside_R > ef)
        for place in np.flatnonzero(~more_R).tolist():
            end = int(inside_R[place])
            rows[int(part_R[place])] = id_RK[place, :end].copy(), distance_RK[place, :end].copy()
        return more_R

    def _measure(
        self,
        query_QD: np.ndarray,
        radius_Q: np.ndarray,
        left_R: np.ndarray,
        slot_S: np.ndarray,
        workers: Workers,
        rows: Rows,
    ) -> None:
        """Write rows of what lies inside of all slots."""
        held, label_S = self._storage, self._slots.labels()[slot_S]
        queries = held.encode_queries(query_QD[left_R])

        def work(begin: int, end: int) -> None:
            distance_S = np.empty(len(slot_S), np.float32)
            for number in range(begin, end):
                measure_slots(held.graph, slot_S, *queries, number, distance_S)
                _check(distance_S)
                inside = np.flatnonzero(distance_S <= radius_Q[left_R[number]])
                inside = inside[np.lexsort((label_S[inside], distance_S[inside]))]
                rows[int(left_R[number])] = label_S[inside], distance_S[inside]

        workers.run(work, len(left_R), 1)


def _check(distance_S: np.ndarray) -> None:
    """What is no number is within no radius, and would be missing without a word."""
    if not np.isfinite(distance_S).all():
        raise DataError(f"the {DAMAGED}")


@kernel
def measure_slots(graph, slot_S, query_Q, aux_Q, full_Q, number, distance_S):
    """Write distances of a query to slots, exact ones where there are full vectors."""
    is_full = graph[FULL] != 0
    zero = np.float32(0.0)
    query = address(full_Q[number]) if is_full else address(query_Q[number])
    scale, norm = (zero, zero) if is_full else (aux_Q[number, 0], aux_Q[number, 1])
    kind = graph[KIND] & 1 if is_full else graph[KIND]
    rows, stride = (graph[FULL], graph[FULL_STRIDE]) if is_full else (graph[ROWS], graph[STRIDE])
    width, aux = (graph[FULL_WIDTH], 0) if is_full else (graph[WIDTH], graph[AUX])
    for place in range(len(slot_S)):
        slot = np.int64(slot_S[place])
        distance_S[place] = distance(kind, query, scale, norm, rows + slot * stride, aux, slot, width)
