"""What an `HNSW` is asked: its nearest, all within a radius, and filters for that."""
# Shapes: Q queries, D dimension, K neighbours

from typing import Any

from anabranch.errors import CapacityError
from anabranch.graph.arguments import check_flag
from anabranch.graph.hnsw.checks import as_positive, as_vectors, like, results
from anabranch.graph.hnsw.filters import Filter
from anabranch.graph.hnsw.lock import ReadWriteLock
from anabranch.graph.hnsw.ranges import Ranges, Within, as_radius
from anabranch.graph.hnsw.searching import Searcher
from anabranch.graph.hnsw.single import Single
from anabranch.graph.hnsw.slots import Slots
from anabranch.graph.workers import Workers, asked_workers


class Finding:
    """Base of `HNSW`, which makes all that is used here."""

    dim: int
    metric: str
    workers: int | None
    _lock: ReadWriteLock
    _slots: Slots
    _searcher: Searcher
    _single: Single
    _ranges: Ranges

    def search(
        self,
        queries: Any,
        k: int = 10,
        ef: int | None = None,
        filter: Any = None,
        *,
        workers: int | None = None,
        **former: Any,
    ) -> tuple[Any, Any]:
        """The k nearest of each query.

        Args:
            queries: [Q, D], or [D] for one; a numpy array, or a torch tensor on any device. For "hamming" packed bits, as of `add`.
            k: how many.
            ef: how many to hold during the walk, at least k; more finds more. Default 64.
            filter: only elements that it lets through: a mask by id (bool, an entry for every id up to the largest), a list of ids, or what
                `prepare_filter` made of one. Few matches (at most 2 ef, or 1%) are measured one by one, exactly.
            workers: for this call; None for the index's own.

        Returns:
            ids, int64 [Q, K], and distances, float32 [Q, K], the nearest first, those at one distance by id; -1 and infinity behind the
            last where there are fewer. Tensors, on their device, where queries are.

        Raises:
            InputError: queries of another dimension or with numbers that are not finite; k or ef below 1; a filter of another kind.
            CapacityError: memory does not hold the results.
        """
        if former:
            workers = asked_workers(workers, former, "search")
        if filter is None or type(filter) is Filter:
            found = self._single.search(queries, k, ef, filter)
            if found is not None:
                return found
        k, ef = as_positive(k, "k"), 64 if ef is None else as_positive(ef, "ef")
        query_QD = as_vectors(queries, self.dim, self.metric, "queries")
        id_QK, distance_QK = results(len(query_QD), k)
        with self._pool(workers, {}, "search") as pool:
            self._searcher.all(query_QD, ef, filter, id_QK, distance_QK, pool, self._lock)
        return like(id_QK, queries), like(distance_QK, queries)

    def range_search(
        self,
        queries: Any,
        radius: Any,
        ef: int | None = None,
        filter: Any = None,
        *,
        exact: bool = False,
        workers: int | None = None,
        **former: Any,
    ) -> Within:
        """All within a radius of each query.

        What is returned is within it, with the distance that `search` gives (but of codes with ``rerank=False``, where `search` tells
        distances of codes: here those of the vectors count). What may be missing is what `search` misses with an ``ef`` of
        at least twice as many as are within: the walk holds ``ef``, then twice as many and so on, until at most half of them are. Where
        that would be more than a sixteenth of all elements, and with ``exact``, every distance is measured and nothing is missing.

        Args:
            queries: as of `search`.
            radius: the largest distance that counts, as the metric gives it (squared for "l2"), as a 32-bit number; one, or [Q]. May be
                infinite.
            ef: how many the first walk holds; more finds more. Default 64.
            filter: as of `search`.
            exact: measure every distance.
            workers: for this call; None for the index's own.

        Returns:
            `Within`: ``indptr``, int64 [Q + 1], ``ids``, int64, and ``distances``, float32: those of query q are from ``indptr[q]`` to
            ``indptr[q + 1]``, the nearest first, those at one distance by id. Tensors, on their device, where queries are.

        Raises:
            InputError: as `search`; a radius that is no number.
            CapacityError: memory does not hold the results.
            DataError: a distance is no number, since a mapped file was damaged.
        """
        exact, ef = check_flag("exact", exact), 64 if ef is None else as_positive(ef, "ef")
        query_QD = as_vectors(queries, self.dim, self.metric, "queries")
        radius_Q = as_radius(radius, len(query_QD))
        try:
            with self._pool(workers, former, "range_search") as pool:
                rows, _ = self._ranges.many(query_QD, radius_Q, ef, filter, exact, pool, self._lock)
            found = Within.of(rows)
        except MemoryError as error:
            raise CapacityError(
                f"no memory for all within the radius of {len(query_QD):,} queries; ask for fewer, or for a smaller one"
            ) from error
        return Within(*(like(array, queries) for array in found))

    def nearest_within(
        self,
        queries: Any,
        radius: Any,
        k: int = 10,
        ef: int | None = None,
        filter: Any = None,
        *,
        exact: bool = False,
        workers: int | None = None,
    ) -> tuple[Any, Any, Any]:
        """The k nearest within a radius of each query, and how many are within: as `range_search`, without holding all of these.

        Args and errors are those of `search` and `range_search`.

        Returns:
            ids, int64 [Q, K], and distances, float32 [Q, K], as `search`; and how many are within, int64 [Q]. Tensors, on their device,
            where queries are.
        """
        exact = check_flag("exact", exact)
        k, ef = as_positive(k, "k"), 64 if ef is None else as_positive(ef, "ef")
        query_QD = as_vectors(queries, self.dim, self.metric, "queries")
        radius_Q = as_radius(radius, len(query_QD))
        id_QK, distance_QK = results(len(query_QD), k)
        try:
            with self._pool(workers, {}, "nearest_within") as pool:
                rows, number_Q = self._ranges.many(query_QD, radius_Q, ef, filter, exact, pool, self._lock, most=k)
        except (MemoryError, ValueError) as error:
            raise CapacityError(f"no memory for {k:,} results of {len(query_QD):,} queries; ask for fewer") from error
        for number, (ids, distances) in enumerate(rows):
            id_QK[number, : len(ids)], distance_QK[number, : len(ids)] = ids, distances
        return like(id_QK, queries), like(distance_QK, queries), like(number_Q, queries)

    def prepare_filter(self, ids_or_mask: Any) -> Filter:
        """A filter for many searches: what it lets through is worked out once, and again only when the index has changed.

        Raises InputError for what is no list of ids and no mask, and for a mask that ends before the largest id.
        """
        made = Filter(ids_or_mask)
        with self._lock.read():
            made.on(self._slots)
        return made

    def _pool(self, workers: int | None, former: dict[str, Any], call: str) -> Workers:
        workers = asked_workers(workers, former, call)
        return Workers(self.workers if workers is None else as_positive(workers, "workers"))
