"""`ShardedHNSW`: independent indexes that are built and searched side by side, their results merged exactly."""
# Shapes: N vectors, Q queries, K neighbours

import os
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import numpy as np

from anabranch.errors import DataError, InputError
from anabranch.graph.arguments import check_flag
from anabranch.graph.array_file import read_arrays, write_arrays
from anabranch.graph.header import described
from anabranch.graph.hnsw.checks import as_distinct, as_ids, as_one_id, as_positive, as_vectors, like, results
from anabranch.graph.hnsw.filters import Filter
from anabranch.graph.hnsw.index import HNSW
from anabranch.graph.hnsw.ranges import Within
from anabranch.graph.hnsw.storage import VERSION, VERSIONS
from anabranch.graph.workers import FORMER, Workers, asked_workers, num_workers

KIND = "sharded hnsw index"

# A child that is forked while a thread, which it has not, changes an index, would wait for that.
_OPEN: "weakref.WeakSet[ShardedHNSW]" = weakref.WeakSet()


def _after_fork() -> None:
    for index in list(_OPEN):
        index._open()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class ShardedHNSW:
    """``num_shards`` indexes; the element of an id lives in shard id % num_shards.

    One change after another, as of `HNSW`: a call that is refused has changed no shard. Searches go on beside.

    What `search` returns is the k nearest among what each shard returns, so recall is at least that of a shard, at the cost of one walk per
    shard. Shards work side by side, each in one thread. A shard may hold 2 billion elements; there is no bound on all.

    Args:
        dim: numbers in a vector.
        num_shards: how many indexes.
        metric: as of `HNSW`.
        workers: how many shards work at once; None for one per processor.
        **options: of each `HNSW` (M, ef_construction, dtype, seed ...). ``num_threads`` is the former name of ``workers``.
    """

    def __init__(
        self, dim: int, num_shards: int = 2, metric: str = "l2", *, workers: int | None = None, **options: Any
    ) -> None:
        self.num_shards = as_positive(num_shards, "num_shards")
        former = {FORMER: options.pop(FORMER)} if FORMER in options else {}
        workers = asked_workers(workers, former, "ShardedHNSW")
        self.workers = None if workers is None else as_positive(workers, "workers")
        self.shards = [HNSW(dim, metric, **options, workers=1) for _ in range(self.num_shards)]
        self.dim, self.metric = self.shards[0].dim, metric
        # Which ids are free is looked up in all shards, and has to stay so until the last has them.
        self._open()

    @property
    def num_threads(self) -> int | None:
        """The former name of ``workers``."""
        return self.workers

    @num_threads.setter
    def num_threads(self, number: int | None) -> None:
        self.workers = None if number is None else as_positive(number, "num_threads")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_changing"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def _open(self) -> None:
        self._changing = threading.Lock()
        _OPEN.add(self)

    def __len__(self) -> int:
        return sum(map(len, self.shards))

    def __contains__(self, id: Any) -> bool:
        known = as_one_id(id)
        return known is not None and known in self.shards[known % self.num_shards]

    def __repr__(self) -> str:
        return f"ShardedHNSW({len(self):,} vectors of {self.dim} in {self.num_shards} shards, {self.metric})"

    @property
    def ids(self) -> np.ndarray:
        """Ids, rising, int64 [N]."""
        return np.sort(np.concatenate([shard.ids for shard in self.shards]))

    def add(self, vectors: Any, ids: Any = None, *, update: bool = False, repair: bool = False) -> np.ndarray:
        """Insert vectors, as `HNSW.add`. All arguments are checked before any shard changes."""
        update, repair = check_flag("update", update), check_flag("repair", repair)
        vector_ND = as_vectors(vectors, self.dim, self.metric, "vectors")
        with self._changing:
            return self._add(vector_ND, ids, update, repair)

    def _add(self, vector_ND: np.ndarray, ids: Any, update: bool, repair: bool) -> np.ndarray:
        if ids is None:
            begin = max((shard._changes.next_id for shard in self.shards), default=0)
            if begin + len(vector_ND) > 2**63:
                raise InputError(
                    f"there are no {len(vector_ND):,} ids after the largest, {begin - 1}; give ids that are free"
                )
            id_N = begin + np.arange(len(vector_ND), dtype=np.int64)
        else:
            id_N = as_distinct(as_ids(ids, len(vector_ND)))
        if not update:
            known = np.zeros(len(id_N), bool)
            for number, shard in enumerate(self.shards):
                known |= (id_N % self.num_shards == number) & shard.contains(id_N)
            if known.any():
                row = int(np.flatnonzero(known)[0])
                raise InputError(
                    f"ids[{row}] is {id_N[row]}, which is in the index; update=True moves it to the new vector"
                )
        self._each(id_N, lambda shard, mine: shard.add(vector_ND[mine], id_N[mine], update=update, repair=repair))
        return id_N

    def update(self, ids: Any, vectors: Any) -> None:
        """Move elements, as `HNSW.update`."""
        vector_ND = as_vectors(vectors, self.dim, self.metric, "vectors")
        id_N = as_distinct(as_ids(ids, len(vector_ND)))
        with self._changing:
            self._check_known(id_N)
            self._each(id_N, lambda shard, mine: shard.update(id_N[mine], vector_ND[mine]))

    def remove(self, ids: Any) -> None:
        """Delete elements, as `HNSW.remove`."""
        id_N = as_distinct(as_ids(ids, None))
        with self._changing:
            self._check_known(id_N)
            self._each(id_N, lambda shard, mine: shard.remove(id_N[mine]))

    def compact(self) -> int:
        """Take deleted elements out of all shards; how many."""
        return sum(self._all(lambda shard: shard.compact()))

    def repair(self) -> int:
        """Link what cannot be reached, in all shards; how many."""
        return sum(self._all(lambda shard: shard.repair()))

    def search(self, queries: Any, k: int = 10, ef: int | None = None, filter: Any = None) -> tuple[Any, Any]:
        """The k nearest among those that each shard finds, as `HNSW.search`."""
        query_QD = as_vectors(queries, self.dim, self.metric, "queries")
        room, most = self._room(query_QD, k)
        ids, distances = _merged(self._all(lambda shard: shard.search(query_QD, most, ef, filter)), *room)
        return like(ids, queries), like(distances, queries)

    def range_search(
        self, queries: Any, radius: Any, ef: int | None = None, filter: Any = None, *, exact: bool = False
    ) -> Within:
        """All within a radius that each shard finds, as `HNSW.range_search`."""
        query_QD = as_vectors(queries, self.dim, self.metric, "queries")
        found = self._all(lambda shard: shard.range_search(query_QD, radius, ef, filter, exact=exact))
        row_Z = np.concatenate([np.repeat(np.arange(len(query_QD)), np.diff(one.indptr)) for one in found])
        id_Z, distance_Z = (np.concatenate([one[place] for one in found]) for place in (1, 2))
        order_Z = np.lexsort((id_Z, distance_Z, row_Z))
        indptr = np.append(0, np.cumsum(np.bincount(row_Z, minlength=len(query_QD)))).astype(np.int64)
        return Within(*(like(array, queries) for array in (indptr, id_Z[order_Z], distance_Z[order_Z])))

    def nearest_within(
        self, queries: Any, radius: Any, k: int = 10, ef: int | None = None, filter: Any = None, *, exact: bool = False
    ) -> tuple[Any, Any, Any]:
        """The k nearest within a radius and how many each shard finds there, as `HNSW.nearest_within`."""
        query_QD = as_vectors(queries, self.dim, self.metric, "queries")
        room, most = self._room(query_QD, k)
        found = self._all(lambda shard: shard.nearest_within(query_QD, radius, most, ef, filter, exact=exact))
        ids, distances = _merged([one[:2] for one in found], *room)
        return tuple(like(array, queries) for array in (ids, distances, sum(one[2] for one in found)))

    def prepare_filter(self, ids_or_mask: Any) -> Filter:
        """A filter for many searches, as `HNSW.prepare_filter`: worked out for each shard once, and again when that has changed."""
        return Filter(ids_or_mask)

    def stats(self) -> dict[str, Any]:
        """Sums over shards (``count``, ``deleted``, ``unreachable``, ``size_bytes``, ``hops``, ``distances``), and each shard's own."""
        each = [shard.stats() for shard in self.shards]
        names = ("count", "deleted", "unreachable", "size_bytes", "hops", "distances")
        return {**{name: sum(one[name] for one in each) for name in names}, "shards": each}

    def save(self, path: str | Path) -> None:
        """Write all shards into one checked file, all or nothing: as they are between two changes."""
        with self._changing:
            states = [shard.__getstate__() for shard in self.shards]
        arrays = {
            f"{number}/{name}": array for number, state in enumerate(states) for name, array in state["arrays"].items()
        }
        write_arrays(path, KIND, arrays, {"shards": [state["meta"] for state in states]}, VERSION)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        mmap: bool = False,
        workers: int | None = None,
        verify: bool | None = None,
        **former: Any,
    ) -> Self:
        """Read what `save` wrote, as `HNSW.load`."""
        workers = asked_workers(workers, former, "load")
        found = read_arrays(path, KIND, versions=VERSIONS, mmap=mmap, verify=verify)
        shards = []
        with described(path, "an index of shards"):
            metas = list(found.meta["shards"])
        for number, meta in enumerate(metas):
            start = f"{number}/"
            arrays = {name.removeprefix(start): array for name, array in found.arrays.items() if name.startswith(start)}
            shards.append(HNSW._made(arrays, meta, mapped=mmap, source=f"shard {number} of {path}", workers=1))
        if not shards:
            raise DataError(f"{path} is damaged: it holds no shard")
        if len({(shard.dim, shard.metric) for shard in shards}) > 1:
            raise DataError(f"{path} is damaged: its shards hold vectors of different kinds")
        made = cls(shards[0].dim, len(shards), shards[0].metric, workers=workers)
        made.shards = shards
        return made

    def _room(self, query_QD: np.ndarray, k: int) -> tuple[tuple[np.ndarray, np.ndarray], int]:
        """Room for k results of each query, and how many of them a shard can have at most.

        Raises InputError for what is no k, CapacityError where memory for these and for what shards find does not suffice.
        """
        k = as_positive(k, "k")
        most = min(k, max(1, *(len(shard) for shard in self.shards)))
        return results(len(query_QD), k, _MERGED_BYTES * len(query_QD) * most * self.num_shards), most

    def _all(self, work: Callable[[HNSW], Any]) -> list[Any]:
        with Workers(min(num_workers(self.workers), self.num_shards)) as pool:
            return pool.map(work, self.shards)

    def _each(self, id_N: np.ndarray, work: Callable[[HNSW, np.ndarray], Any]) -> None:
        """Give every shard the rows of its ids."""
        places = {
            id(shard): np.flatnonzero(id_N % self.num_shards == number) for number, shard in enumerate(self.shards)
        }
        self._all(lambda shard: work(shard, places[id(shard)]) if len(places[id(shard)]) else None)

    def _check_known(self, id_N: np.ndarray) -> None:
        bad = [row for row, id in enumerate(id_N.tolist()) if id not in self]
        if bad:
            raise InputError(f"ids[{bad[0]}] is {id_N[bad[0]]}, which is not in the index")


# Of each result of a shard: it, again side by side, its place in the order, and what that is made of.
_MERGED_BYTES = 12 + 12 + 8 + 8 + 8


def _merged(found: list[tuple[Any, Any]], id_QK: np.ndarray, distance_QK: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The nearest of what shards found, -1 and infinity behind the last: ids and distances, which are written into."""
    id_QR, distance_QR = (np.concatenate(parts, 1) for parts in zip(*found, strict=True))
    by_id = np.where(id_QR < 0, np.iinfo(np.int64).max, id_QR)
    best_QB = np.lexsort((by_id, distance_QR))[:, : id_QK.shape[1]]
    width = best_QB.shape[1]
    id_QK[:, :width] = np.take_along_axis(id_QR, best_QB, 1)
    distance_QK[:, :width] = np.take_along_axis(distance_QR, best_QB, 1)
    return id_QK, distance_QK
