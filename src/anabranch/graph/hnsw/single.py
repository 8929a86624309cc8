"""Searches of one query, which are over in less time than the interpreter takes to get ready for many.

Everything from the lock to the labels is one call of a kernel, on arrays that are kept from search to search. What is not the plain case
(another type, numbers that are not finite, nothing there, rows of groups) is left to `HNSW.search`, which has the words for it.
"""
# Shapes: D dimension, K neighbours, S slots in use

from typing import Any

import numpy as np

from anabranch.graph.hnsw.arrays import aligned
from anabranch.graph.hnsw.encoding import BITS
from anabranch.graph.hnsw.filters import Filter, Prepared
from anabranch.graph.hnsw.gate import come_in, go_out, new_gate
from anabranch.graph.hnsw.layout import (
    CAP0,
    CAPACITY,
    COUNT,
    DELETED,
    ENTRY,
    LABEL,
    NUM_DELETED,
    NUM_VACANT,
    VERSION,
    WIDTH,
)
from anabranch.graph.hnsw.lock import ReadWriteLock
from anabranch.graph.hnsw.queries import take_query
from anabranch.graph.hnsw.raw import address, helper, kernel
from anabranch.graph.hnsw.search import (
    EXTRA,
    INFINITY,
    PADDING,
    POOL,
    descend,
    filtered_search,
    finish,
    is_selective,
    pool_search,
)
from anabranch.graph.hnsw.searching import Searcher
from anabranch.graph.hnsw.storage import Storage
from anabranch.graph.interrupts import Interrupts

# What a kernel answers that did not search: a writer is there or waits; some elements must not be returned; or something is not plain.
BUSY, SOME_OUT, OTHER = -1, -2, -3


class _Seat:
    """What one search at a time needs."""

    __slots__ = ("capacity", "full_W", "heap_d", "heap_i", "marks", "row_D", "short_B")

    def __init__(self, held: Storage) -> None:
        self.capacity = held.capacity
        self.marks = aligned((held.capacity + 1,), np.uint8)
        self.full_W = aligned((max(held.full_stride // 4, 1),), np.float32)
        # Float32 as well, where rows are of half precision.
        self.short_B = aligned((max(4 * int(held.graph[WIDTH]), held.stride),), np.uint8)
        for array in (self.marks, self.full_W, self.short_B):
            array.fill(0)
        dim = held.encoding.dim
        self.row_D = self.short_B[: dim // 8] if held.encoding.dtype == BITS else self.full_W[:dim]
        self.heap_d, self.heap_i = np.empty(0, np.float32), np.empty(0, np.int32)

    def heap(self) -> tuple[np.ndarray, np.ndarray]:
        """Room for what a search with a filter holds, made when it is needed."""
        if not len(self.heap_d):
            self.heap_d = aligned((self.capacity + 1,), np.float32)
            self.heap_i = aligned((self.capacity + 1,), np.int32)
        return self.heap_d, self.heap_i


class Single:
    """Searches an index for one query at a time, by any number of threads."""

    def __init__(self, searcher: Searcher, lock: ReadWriteLock) -> None:
        held = searcher.storage
        self._searcher, self._storage, self._lock = searcher, held, lock
        self._graph, self._gate, self._open = held.graph, lock.gate, new_gate()
        is_bits = held.encoding.dtype == BITS
        width = held.encoding.dim // 8 if is_bits else held.encoding.dim
        self._dtype = np.dtype(np.uint8 if is_bits else np.float32)
        self._shapes: tuple[tuple[int, ...], ...] = ((width,), (1, width))
        # Tables to look codes up in take longer to make than all else here.
        if held.coded is not None:
            self._shapes = ()
        # Results measured again: so many, or in proportion to how many are asked for.
        self._again = None if isinstance(searcher.rerank, bool) else searcher.rerank
        self._seats: list[_Seat] = []

    def search(self, query: Any, k: int, ef: int | None, filter: Filter | None) -> tuple[np.ndarray, np.ndarray] | None:
        """As `HNSW.search`: ids and distances, [1, K]; None, and nothing has happened, where it is not the plain case."""
        ef = 64 if ef is None else ef
        if (
            type(query) is not np.ndarray
            or query.dtype is not self._dtype
            or query.shape not in self._shapes
            or type(k) is not int
            or type(ef) is not int
            or not (0 < k <= POOL and 0 < ef <= POOL)
        ):
            return None
        try:
            seat = self._seats.pop()
        except IndexError:
            seat = _Seat(self._storage)
        if seat.capacity != self._storage.capacity:
            seat = _Seat(self._storage)
        seat.row_D[...] = query
        id_1K, distance_1K = np.empty((1, k), np.int64), np.empty((1, k), np.float32)
        keep = 2 * k + EXTRA if self._again is None else max(k, self._again)
        done = SOME_OUT
        if filter is None:
            done = search_one(
                self._graph, self._gate, seat.marks, seat.full_W, seat.short_B, ef, keep, id_1K, distance_1K
            )
        if done < 0:
            done = self._search(seat, filter, done, (ef, keep, id_1K, distance_1K))
        self._seats.append(seat)
        if done < 0:
            return None
        self._searcher.last = done >> 32, done & 0xFFFFFFFF, 1
        return id_1K, distance_1K

    def _search(
        self, seat: _Seat, filter: Filter | None, done: int, asked: tuple[int, int, np.ndarray, np.ndarray]
    ) -> int:
        """Beside a writer; or where some elements must not be returned."""
        found: Prepared | None = None
        if filter is not None:
            found, ef = filter.known(self._searcher.slots), max(asked[0], asked[2].shape[1])
            # What is not worked out yet, or is measured one by one.
            if found is None or is_selective(found.number, ef, len(found.allowed_S)):
                return OTHER
        arrays = (seat.marks, seat.full_W, seat.short_B)

        def among(gate: np.ndarray) -> int:
            allowed, version = (0, 0) if found is None else (found.address, found.version)
            return int(search_one_of(self._graph, gate, *arrays, *seat.heap(), allowed, version, *asked))

        def all_of(gate: np.ndarray) -> int:
            return int(search_one(self._graph, gate, *arrays, *asked))

        if done == SOME_OUT:
            done = among(self._gate)
        if done != BUSY:
            return done
        with Interrupts() as interrupts:
            self._lock.enter_read(interrupts)
            try:
                done = all_of(self._open) if filter is None else SOME_OUT
                return among(self._open) if done == SOME_OUT else done
            finally:
                self._lock.leave_read()


@helper
def is_plain(graph, visited):
    """Whether there is something to search, by these marks."""
    return graph[ENTRY] >= 0 and len(visited) == graph[CAPACITY] + 1


@helper
def answer(graph, full, count, hops, evaluations, best_d, best_i, keep, id_1K, distance_1K):
    """Write the results of a search (`finish`), and nothing behind the last; its cost in one number."""
    for place in range(count):
        best_i[place] = ~best_i[place]
    k = id_1K.shape[1]
    count = finish(graph, full, count, keep, graph[LABEL], best_d, best_i, id_1K[0], distance_1K[0])
    for place in range(count, k):
        id_1K[0, place], distance_1K[0, place] = -1, INFINITY
    return (hops << 32) | evaluations


@kernel
def search_one(graph, gate, visited, full_W, short_B, ef, keep, id_1K, distance_1K):
    """K-NN-SEARCH of one query, within the gate; its cost, or BUSY, SOME_OUT or OTHER, and then nothing is written.

    Args:
        graph: the row that describes the index.
        gate: where to come in (`anabranch.graph.hnsw.gate`).
        visited: uint8 [C + 1], marks.
        full_W: float32 [FULL_WIDTH], the query and zeros; changed.
        short_B: room for it in another precision.
        ef: how many to hold.
        keep: how many of them to measure again.
        id_1K: int64, written.
        distance_1K: float32, written.
    """
    # Whatever may fail is before it comes in.
    ef = max(ef, id_1K.shape[1])
    best_d, best_i = np.empty(ef + PADDING, np.float32), np.empty(ef + PADDING, np.int32)
    todo = np.empty(graph[CAP0] + 1, np.int32)
    if not come_in(gate):
        return BUSY
    done, ground = OTHER, np.int64(0)
    if is_plain(graph, visited):
        done = SOME_OUT
        if graph[NUM_DELETED] == graph[NUM_VACANT]:
            done = OTHER
            is_fit, query, scale, norm = take_query(graph, address(full_W), address(short_B))
            if is_fit:
                ef = min(ef, graph[COUNT])
                entry, nearest, start, hops, evaluations = descend(graph, query, scale, norm, ground)
                count, more_hops, more = pool_search(
                    graph, query, scale, norm, ground, entry, nearest, start, ef, visited, best_d, best_i, todo
                )
                hops, evaluations = hops + more_hops, evaluations + more
                done = answer(
                    graph, address(full_W), count, hops, evaluations, best_d, best_i, min(ef, keep), id_1K, distance_1K
                )
    go_out(gate)
    return done


@kernel
def search_one_of(
    graph, gate, visited, full_W, short_B, heap_d, heap_i, allowed, version, ef, keep, id_1K, distance_1K
):
    """As `search_one`, of those slots that a filter lets through.

    Args:
        heap_d: float32 [C + 1], room.
        heap_i: int32 [C + 1], room.
        allowed: address of uint8 [N], 0 for all that are not deleted.
        version: of the index for which it was worked out.
    """
    ef = max(ef, id_1K.shape[1])
    best_d, best_i = np.empty(ef + PADDING, np.float32), np.empty(ef + PADDING, np.int32)
    todo = np.empty(graph[CAP0] + 1, np.int32)
    if not come_in(gate):
        return BUSY
    done, ground = OTHER, np.int64(0)
    is_same = allowed == 0 or version == graph[VERSION]
    if is_same and is_plain(graph, visited) and len(heap_d) == len(visited):
        is_fit, query, scale, norm = take_query(graph, address(full_W), address(short_B))
        if is_fit:
            # Marks of those that are deleted say the opposite.
            flags, kept_out = (allowed, 0) if allowed != 0 else (graph[DELETED], 1)
            ef = min(ef, graph[COUNT])
            entry, nearest, start, hops, evaluations = descend(graph, query, scale, norm, ground)
            count, more_hops, more = filtered_search(
                graph,
                query,
                scale,
                norm,
                entry,
                nearest,
                start,
                ef,
                flags,
                kept_out,
                visited,
                heap_d,
                heap_i,
                best_d,
                best_i,
                todo,
            )
            hops, evaluations = hops + more_hops, evaluations + more
            done = answer(
                graph, address(full_W), count, hops, evaluations, best_d, best_i, min(ef, keep), id_1K, distance_1K
            )
    go_out(gate)
    return done
