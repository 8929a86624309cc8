"""How a search is answered: which kernel, with what filter, on how many threads, and in how many turns.

Many queries take long, and a writer that waits keeps all other readers out. So queries are answered in pieces of some milliseconds.
When a writer waits after one of them the lock is given back and asked for again: a turn ends, and the next is answered by the index as it
is then. Each query is answered within one turn, by one state of the index; what was worked out of its arrays is worked out again for the
next.
"""
# Shapes: Q queries, K neighbours, D dimension, S slots, P queries of a piece

from collections.abc import Callable
from typing import TypeVar

import numpy as np

from anabranch.graph.hnsw import layout
from anabranch.graph.hnsw.coded import TABLES, Coded
from anabranch.graph.hnsw.filters import Asked
from anabranch.graph.hnsw.linking import Marks
from anabranch.graph.hnsw.lock import ReadWriteLock, Workers
from anabranch.graph.hnsw.search import EXTRA, POOL, is_selective, scan_many, search_many
from anabranch.graph.hnsw.slots import Slots
from anabranch.graph.hnsw.storage import Storage
from anabranch.graph.workers import PIECES

# A piece: walks that hold so many results together, or scans that measure so many.
WALKED, SCANNED = 1 << 14, 1 << 20

# Queries of a piece of several threads, where there are as many.
LEAST = 4

Result = TypeVar("Result")


class Searcher:
    """Searches an index.

    Attributes:
        storage: its arrays.
        slots: where they hold what.
        rerank: whether, or how many, results are measured again.
        last: hops, distances and queries of the last search.
    """

    def __init__(self, held: Storage, slots: Slots, *, rerank: bool | int) -> None:
        self.storage, self.slots, self.rerank = held, slots, rerank
        self.last = (0, 0, 0)

    def _kept(self, k: int, ef: int) -> int:
        """How many of ``ef`` results are measured again: at least the k that are returned."""
        if isinstance(self.rerank, bool):
            return ef if self._codes() is not None else min(ef, 2 * k + EXTRA)
        return min(ef, max(k, self.rerank))

    def _codes(self) -> Coded | None:
        """Those that are walked over."""
        coded = self.storage.coded
        return coded if coded is not None and coded.is_trained else None

    def all(
        self,
        query_QD: np.ndarray,
        ef: int,
        filter: object,
        id_QK: np.ndarray,
        distance_QK: np.ndarray,
        workers: Workers,
        lock: ReadWriteLock,
    ) -> None:
        """Write the nearest K of each query over -1 and infinity, in as many turns as writers ask for.

        Raises InputError for a filter that does not fit.
        """
        asked, done, hops, distances = Asked(filter), 0, 0, 0
        while done < len(query_QD):
            with lock.read():
                if self.storage.graph[layout.ENTRY] < 0:
                    break
                rest = slice(done, None)
                turn = self.many(query_QD[rest], ef, asked, id_QK[rest], distance_QK[rest], workers, lock)
            done, hops, distances = done + turn[0], hops + turn[1], distances + turn[2]
        if done:
            self.last = (hops, distances, len(query_QD))

    def many(
        self,
        query_QD: np.ndarray,
        ef: int,
        asked: Asked,
        id_QK: np.ndarray,
        distance_QK: np.ndarray,
        workers: Workers,
        lock: ReadWriteLock,
    ) -> tuple[int, int, int]:
        """One turn of a reader: as `all`, of the first queries, until a writer waits; the graph has an entry point.

        Each thread answers one piece at least, so that whoever comes again and again gets to its end.

        Returns:
            How many queries were answered, and hops and distances of these.
        """
        held, graph, k = self.storage, self.storage.graph, id_QK.shape[1]
        ef = min(max(ef, k), held.count)
        label_N, keep = self.slots.labels(), self._kept(k, ef)
        # All, unless something keeps some out or two heaps are quicker.
        allowed, slot_S = 0, None
        wanted = asked.on(self.slots)
        if wanted is not None:
            allowed_N, allowed = wanted.allowed_S, wanted.allowed_S.ctypes.data
            if is_selective(wanted.number, ef, held.count):
                slot_S = wanted.slots(label_N)
        elif graph[layout.NUM_DELETED] != len(held.vacant_S) or ef > POOL:
            allowed_N = self.slots.live()
            allowed = allowed_N.ctypes.data
        coded = self._codes()
        row = graph if coded is None else coded.described(graph, rerank=bool(self.rerank))

        def walk(begin: int, end: int) -> np.ndarray:
            counts, part = np.zeros(2, np.int64), slice(begin, end)
            query_P, aux_P, full_P = held.encode_queries(query_QD[part])
            results = id_QK[part], distance_QK[part], counts
            if slot_S is not None:
                scan_many(graph, label_N, slot_S, query_P, aux_P, full_P, 0, end - begin, *results)
                return counts
            if coded is not None:
                query_P, aux_P = coded.coder.encode_queries(query_QD[part])
            with Marks(held) as marks:
                queries = query_P, aux_P, full_P, 0, end - begin
                search_many(row, label_N, marks, *queries, ef, keep, allowed, *results)
            return counts

        if slot_S is not None and not len(slot_S):
            return len(query_QD), 0, 0
        most = piece_of(ef, slot_S)
        if coded is not None and slot_S is None:
            most = min(most, max(1, TABLES // coded.coder.query_bytes))
        done, parts = in_pieces(walk, len(query_QD), most, workers, lock)
        hops, distances = (sum(int(part[place]) for part in parts) for place in (0, 1))
        return done, hops, distances


def piece_of(ef: int, slot_S: np.ndarray | None) -> int:
    """How many queries are a piece: of walks of ``ef``, or of scans of slots."""
    return max(1, WALKED // ef if slot_S is None else SCANNED // len(slot_S))


def in_pieces(
    work: Callable[[int, int], Result], total: int, most: int, workers: Workers, lock: ReadWriteLock
) -> tuple[int, list[Result]]:
    """``work(begin, end)`` on pieces of at most ``most`` of ``total``, by all workers, until there are none left or a writer waits.

    Pieces are begun in their order and brought to an end, so those that were done are the first. How many of ``total`` these cover, and
    what came of them, in any order.
    """
    step = min(most, max(LEAST, -(-total // (workers.count * PIECES)))) if workers.count > 1 else most
    # One iterator for all threads.
    left, found = iter(range(0, total, step)), list[Result]()

    def take() -> None:
        for begin in left:
            found.append(work(begin, min(begin + step, total)))
            if lock.is_wanted:
                break

    workers.each(take, [()] * min(workers.count, -(-total // step)))
    return next(left, total), found
