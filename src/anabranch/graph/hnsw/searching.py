"""How a search is answered: which kernel, with what filter, on how many threads. Callers hold the lock of the index."""
# Shapes: Q queries, K neighbours, D dimension, S slots

import numpy as np

from anabranch.graph.hnsw import layout
from anabranch.graph.hnsw.coded import TABLES, Coded
from anabranch.graph.hnsw.filters import Filter, prepared
from anabranch.graph.hnsw.linking import Marks
from anabranch.graph.hnsw.lock import Workers
from anabranch.graph.hnsw.search import EXTRA, POOL, is_selective, scan_many, search_many
from anabranch.graph.hnsw.slots import Slots
from anabranch.graph.hnsw.storage import Storage


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

    def many(
        self,
        query_QD: np.ndarray,
        ef: int,
        filter: object,
        id_QK: np.ndarray,
        distance_QK: np.ndarray,
        workers: Workers,
    ) -> None:
        """Write the nearest K of each query over -1 and infinity; the graph has an entry point.

        Raises InputError for a filter that does not fit.
        """
        held, graph, k = self.storage, self.storage.graph, id_QK.shape[1]
        ef = min(max(ef, k), held.count)
        label_N, keep = self.slots.labels(), self._kept(k, ef)
        query_Q, aux_Q, full_Q = held.encode_queries(query_QD)
        # All, unless something keeps some out or two heaps are quicker.
        allowed, slot_S = 0, None
        if filter is not None:
            wanted = filter.on(self.slots) if isinstance(filter, Filter) else prepared(filter, self.slots)
            allowed_N, allowed = wanted.allowed_S, wanted.allowed_S.ctypes.data
            if is_selective(wanted.number, ef, held.count):
                slot_S = wanted.slots(label_N)
        elif graph[layout.NUM_DELETED] != len(held.vacant_S) or ef > POOL:
            allowed_N = self.slots.live()
            allowed = allowed_N.ctypes.data
        parts: list[np.ndarray] = []
        coded = self._codes()

        def walk(begin: int, end: int) -> None:
            counts = np.zeros(2, np.int64)
            queries, results = (query_Q, aux_Q, full_Q, begin, end), (id_QK, distance_QK, counts)
            if slot_S is not None:
                scan_many(graph, label_N, slot_S, *queries, *results)
            elif coded is not None:
                row, step = coded.described(graph, rerank=bool(self.rerank)), max(1, TABLES // coded.coder.query_bytes)
                for first in range(begin, end, step):
                    part = slice(first, min(first + step, end))
                    some = *coded.coder.encode_queries(query_QD[part]), full_Q[part], 0, part.stop - first
                    with Marks(held) as marks:
                        search_many(
                            row, label_N, marks, *some, ef, keep, allowed, id_QK[part], distance_QK[part], counts
                        )
            else:
                with Marks(held) as marks:
                    search_many(graph, label_N, marks, *queries, ef, keep, allowed, *results)
            parts.append(counts)

        workers.run(walk, len(query_QD) if slot_S is None or len(slot_S) else 0, 4)
        hops, distances = (sum(int(part[place]) for part in parts) for place in (0, 1))
        self.last = (hops, distances, len(query_QD))
