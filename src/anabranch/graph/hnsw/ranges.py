"""All elements within a radius: a walk that holds more until what it holds reaches well outside, or every distance.

A walk of width ef finds the ef nearest (`search`). If at most half of them are within the radius, those inside are taken: the walk went as
far beyond the border as there is inside. Otherwise it is made again with twice the width, and where it would hold one in `MEASURED` of all,
every distance is measured, which is quicker then, and exact.

What is within is decided by one kind of distance, whichever way it was found: that of the vectors where they are there (also where a walk
over codes does not measure again, ``rerank=False``), else that of the short rows.
"""
# Shapes: Q queries, R rows still to do, S slots, Z results

from typing import Any, NamedTuple

import numpy as np

from anabranch.errors import DataError, InputError
from anabranch.graph.hnsw.checks import as_array
from anabranch.graph.hnsw.filters import Asked
from anabranch.graph.hnsw.layout import AUX, ENTRY, FULL, FULL_STRIDE, FULL_WIDTH, KIND, ROWS, STRIDE, WIDTH
from anabranch.graph.hnsw.lock import ReadWriteLock, Workers
from anabranch.graph.hnsw.measuring import distance
from anabranch.graph.hnsw.raw import address, kernel
from anabranch.graph.hnsw.search import at_least_zero, is_selective
from anabranch.graph.hnsw.searching import Searcher, in_pieces, piece_of

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
    """Searches an index by radius."""

    def __init__(self, searcher: Searcher) -> None:
        self._searcher = searcher
        self._storage, self._slots = searcher.storage, searcher.slots

    def many(
        self,
        query_QD: np.ndarray,
        radius_Q: np.ndarray,
        ef: int,
        filter: object,
        exact: bool,
        workers: Workers,
        lock: ReadWriteLock,
        most: int | None = None,
    ) -> tuple[Rows, np.ndarray]:
        """Ids and distances of each query, the nearest ``most`` or all, and how many are within, int64 [Q].

        In as many turns as writers ask for (`searching`). Raises InputError for a filter that does not fit, DataError for distances that
        are no numbers.
        """
        query = _Query(query_QD, radius_Q, Asked(filter), ef, bool(exact), most)
        while query.left_R.size or query.again_R.size:
            with lock.read():
                self._turn(query, workers, lock)
        self._searcher.last = (*query.cost, len(query_QD))
        return query.rows, query.number_Q

    def _turn(self, query: "_Query", workers: Workers, lock: ReadWriteLock) -> None:
        """Answer queries until there are none left or a writer waits: one piece at least."""
        held, slots = self._storage, self._slots
        wanted = query.asked.on(slots)
        slot_S = np.flatnonzero(slots.live()) if wanted is None else wanted.slots(slots.labels())
        number, at_once = len(slot_S), max(1, HELD // query.ef)
        if not number:
            query.left_R = query.again_R = query.left_R[:0]
        while query.left_R.size or query.again_R.size:
            if not query.left_R.size:
                query.left_R, query.again_R, query.ef = query.again_R, query.left_R, 2 * query.ef
                at_once = max(1, HELD // query.ef)
            is_few = wanted is not None and is_selective(number, query.first_ef, held.count)
            # Nothing leads anywhere where memory ended while elements were linked.
            if query.exact or is_few or held.graph[ENTRY] < 0 or MEASURED * query.ef >= number:
                self._measure(query, slot_S, workers, lock)
            else:
                self._walk(query, query.left_R[:at_once], workers, lock)
            if lock.is_wanted:
                break

    def _walk(self, query: "_Query", part_R: np.ndarray, workers: Workers, lock: ReadWriteLock) -> None:
        """Write rows of what lies inside, of the first queries of a part; those where it is most of what was held walk again."""
        ef = query.ef
        id_RK, distance_RK = np.full((len(part_R), ef), -1), np.full((len(part_R), ef), np.inf, np.float32)
        done, hops, distances = self._searcher.many(
            query.query_QD[part_R], ef, query.asked, id_RK, distance_RK, workers, lock
        )
        part_R, id_RK, distance_RK = part_R[:done], id_RK[:done], distance_RK[:done]
        query.spend(hops, distances)
        self._by_vectors(query.query_QD[part_R], id_RK, distance_RK)
        found_RK = id_RK >= 0
        _check(distance_RK[found_RK])
        inside_R = (found_RK & (distance_RK <= query.radius_Q[part_R, None])).sum(1)
        # A walk that ended before it held so many has seen all it can.
        more_R = found_RK[:, -1] & (2 * inside_R > ef)
        for place in np.flatnonzero(~more_R).tolist():
            end = int(inside_R[place])
            query.take(int(part_R[place]), id_RK[place, :end], distance_RK[place, :end])
        query.left_R, query.again_R = query.left_R[done:], np.concatenate([query.again_R, part_R[more_R]])

    def _by_vectors(self, query_RD: np.ndarray, id_RK: np.ndarray, distance_RK: np.ndarray) -> None:
        """Measure what walks found again, where that was by codes alone, and sort it."""
        held = self._storage
        if self._searcher.rerank or held.coded is None or not held.coded.is_trained:
            return
        queries = held.encode_queries(query_RD)
        for number in range(len(id_RK)):
            count = int((id_RK[number] >= 0).sum())
            id_S, distance_S = id_RK[number, :count].copy(), np.empty(count, np.float32)
            measure_slots(held.graph, self._slots.find(id_S), *queries, number, distance_S)
            order = np.lexsort((id_S, distance_S))
            id_RK[number, :count], distance_RK[number, :count] = id_S[order], distance_S[order]

    def _measure(self, query: "_Query", slot_S: np.ndarray, workers: Workers, lock: ReadWriteLock) -> None:
        """Write rows of what lies inside of all slots, of the first queries that are left."""
        held, label_S, left_R = self._storage, self._slots.labels()[slot_S], query.left_R

        def work(begin: int, end: int) -> None:
            distance_S = np.empty(len(slot_S), np.float32)
            queries = held.encode_queries(query.query_QD[left_R[begin:end]])
            for number in range(begin, end):
                measure_slots(held.graph, slot_S, *queries, number - begin, distance_S)
                _check(distance_S)
                inside = np.flatnonzero(distance_S <= query.radius_Q[left_R[number]])
                kept = _nearest(inside, distance_S, label_S, query.most)
                kept = kept[np.lexsort((label_S[kept], distance_S[kept]))]
                query.take(int(left_R[number]), label_S[kept], distance_S[kept], len(inside))

        done, _ = in_pieces(work, len(left_R), piece_of(query.ef, slot_S), workers, lock)
        query.spend(0, done * len(slot_S))
        query.left_R = left_R[done:]


class _Query:
    """What is asked for, and how far it is answered.

    Attributes:
        ef: how many walks hold now.
        first_ef: how many the first held.
        left_R: numbers of those that are to be answered with that.
        again_R: of those to be answered with twice as many.
        most: that each keeps; None for all.
        rows: the answers.
        number_Q: how many are within.
        cost: hops and distances so far.
    """

    def __init__(
        self, query_QD: np.ndarray, radius_Q: np.ndarray, asked: Asked, ef: int, exact: bool, most: int | None
    ) -> None:
        self.query_QD, self.radius_Q, self.asked, self.exact, self.most = query_QD, radius_Q, asked, exact, most
        self.ef = self.first_ef = ef
        self.left_R, self.again_R = np.arange(len(query_QD)), np.arange(0)
        self.rows: Rows = [(np.empty(0, np.int64), np.empty(0, np.float32))] * len(query_QD)
        self.number_Q = np.zeros(len(query_QD), np.int64)
        self.cost = (0, 0)

    def take(self, number: int, id_Z: np.ndarray, distance_Z: np.ndarray, total: int | None = None) -> None:
        """The answer of a query, in its order: ``total`` are within, as many as there are where that is not said."""
        self.number_Q[number] = len(id_Z) if total is None else total
        # Copies, so that what they were found in goes.
        self.rows[number] = id_Z[: self.most].copy(), distance_Z[: self.most].copy()

    def spend(self, hops: int, distances: int) -> None:
        """Count what an answer cost."""
        self.cost = self.cost[0] + hops, self.cost[1] + distances


def _nearest(inside: np.ndarray, distance_S: np.ndarray, label_S: np.ndarray, most: int | None) -> np.ndarray:
    """The nearest ``most`` of some slots, or all, in any order; of those at one distance the smallest by label."""
    if most is None or len(inside) <= most:
        return inside
    far = distance_S[inside]
    edge = np.partition(far, most - 1)[most - 1]
    nearer, at = inside[far < edge], inside[far == edge]
    place = np.argpartition(label_S[at], most - len(nearer) - 1)[: most - len(nearer)]
    return np.concatenate([nearer, at[place]])


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
    at_least_zero(kind, distance_S, len(slot_S))
