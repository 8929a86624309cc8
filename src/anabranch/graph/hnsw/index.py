"""`HNSW`: the index as users see it. The kernels are in `search` and `build`, the arrays in `storage`."""
# Shapes: N vectors, D dimension, Q queries, K neighbours, S slots

from pathlib import Path
from typing import Any, Self

import numpy as np

from anabranch.errors import CapacityError, DataError, InputError
from anabranch.graph.hnsw import layout, storage
from anabranch.graph.hnsw.checks import (
    as_distinct,
    as_ids,
    as_positive,
    as_vectors,
    is_one_row,
    like,
)
from anabranch.graph.hnsw.filters import Filter, prepared
from anabranch.graph.hnsw.linking import Linker, Marks
from anabranch.graph.hnsw.lock import ReadWriteLock, Workers
from anabranch.graph.hnsw.search import scan_many, search_many
from anabranch.graph.hnsw.slots import Slots
from anabranch.graph.hnsw.storage import METRICS, PRECISIONS, Storage, draw_levels
from anabranch.graph.interrupts import Interrupts

# Above this ef, two heaps are quicker than one sorted array.
POOL = 1024

# A filter that lets a smaller share through is answered by measuring all of it.
SELECTIVE = 0.01

# Deleted elements are taken out of all lists, so that their places can be used again, once they are one in so many.
WORTH = 4096

# Results measured again beside 2 k.
EXTRA = 16


class HNSW:
    """Approximate nearest neighbours of vectors, by a walk through a hierarchy of small-world graphs.

    Any number of threads may search at once, and beside one that changes the index: a search waits for single steps of it, never for the
    whole, and finds new elements batch by batch (one that is moved is not found for a while). What is saved, pickled or counted by `stats`
    and `ids` is whole. The same calls with the same seed give the same bytes, whatever the number of threads and of searches beside.

    Args:
        dim: numbers in a vector.
        metric: "l2" (squared), "ip" (1 - inner product; no metric, so recall may suffer) or "cosine" (vectors are scaled to length 1).
        M: links of a new element; at most 2 M accumulate on level 0. 5 to 48, more for more dimensions.
        ef_construction: candidates considered for them; at least M.
        dtype: how vectors are searched, "f32", "f16" (half the bytes) or "i8" (a quarter).
        seed: of the levels.
        rerank: whether to keep float32 vectors beside shorter ones and measure the best results again by them; without effect for "f32".
        heuristic: "diverse" (paper, algorithm 4) or "simple" (the M nearest, algorithm 3).
        extend_candidates: consider neighbours of candidates too (algorithm 4).
        keep_pruned: fill links up with the nearest rejected (algorithm 4).
        flat: put all elements on level 0 alone, which is NSW.
        compact_at: `remove` compacts once more than this share is deleted; None for never.
        num_threads: of all calls that are not told another number; None for all processors.

    Raises:
        InputError: an argument has a value it may not have.
    """

    def __init__(
        self,
        dim: int,
        metric: str = "l2",
        M: int = 16,
        ef_construction: int = 200,
        dtype: str = "f32",
        seed: int = 0,
        *,
        rerank: bool = True,
        heuristic: str = "diverse",
        extend_candidates: bool = False,
        keep_pruned: bool = False,
        flat: bool = False,
        compact_at: float | None = 0.2,
        num_threads: int | None = None,
    ) -> None:
        self.dim, self.M = as_positive(dim, "dim"), as_positive(M, "M")
        self.ef_construction = max(as_positive(ef_construction, "ef_construction"), self.M)
        for name, value, allowed in (
            ("metric", metric, METRICS),
            ("dtype", dtype, PRECISIONS),
            ("heuristic", heuristic, ("diverse", "simple")),
        ):
            if value not in allowed:
                raise InputError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")
        if self.M < 2 or self.M > 1024 or self.dim > 2**16:
            raise InputError(f"M is {M} and dim {dim}; M must be 2 to 1024 and dim at most {2**16}")
        if compact_at is not None and not 0 <= compact_at < 1:
            raise InputError(f"compact_at is {compact_at}; it must be a share from 0 to below 1, or None")
        if not isinstance(seed, int | np.integer):
            raise InputError(f"seed is {seed!r}; it must be an integer")
        self.metric, self.dtype, self.seed, self.heuristic = metric, dtype, int(seed), heuristic
        self.extend_candidates, self.keep_pruned, self.flat = bool(extend_candidates), bool(keep_pruned), bool(flat)
        self.compact_at = compact_at
        self.num_threads = None if num_threads is None else as_positive(num_threads, "num_threads")
        self._storage = Storage(self.dim, metric, self.M, self.ef_construction, dtype, bool(rerank))
        self._storage.graph[layout.SIMPLE] = heuristic == "simple"
        self._storage.graph[layout.EXTEND], self._storage.graph[layout.KEEP] = extend_candidates, keep_pruned
        self._lock = ReadWriteLock()
        self._drawn = 0  # levels so far
        self._next_id = 0
        self._linker = Linker(self._storage, self._lock)
        self._slots = Slots(self._storage)
        self._last = (0, 0, 0)

    # What is in it

    def __len__(self) -> int:
        # Both change while elements are taken out.
        return max(0, self._storage.count - int(self._storage.graph[layout.NUM_DELETED]))

    def __contains__(self, id: int) -> bool:
        id = int(id)
        if not 0 <= id <= np.iinfo(np.int64).max:
            return False
        with self._lock.read():
            return bool(self._known(np.array([id]))[0])

    def contains(self, ids: Any) -> np.ndarray:
        """Which of some ids are in it, bool [N]. Raises InputError for what are no ids."""
        id_N = as_ids(ids, None)
        with self._lock.read():
            return self._known(id_N)

    def __repr__(self) -> str:
        return f"HNSW({len(self):,} vectors of {self.dim}, {self.metric}, {self.dtype}, M={self.M})"

    @property
    def rerank(self) -> bool:
        """Whether results are measured again by float32 vectors."""
        return self._storage.rerank

    @property
    def size_bytes(self) -> int:
        """Bytes of all arrays with what they have room for, the table of ids included."""
        return self._storage.nbytes + self._slots.nbytes

    def growth_bytes(self, count: int) -> int:
        """Bytes that arrays take anew so that ``count`` more elements fit; 0 where there is room for them."""
        with self._lock.read():
            return self._storage.growth_bytes(count)

    @property
    def ids(self) -> np.ndarray:
        """Ids in the order of their places, int64 [N]: that in which they came, but for those that came into places of deleted ones."""
        with self._lock.read(whole=True):
            return self._slots.labels()[self._slots.live()]

    def vectors(self, ids: Any) -> Any:
        """Vectors by id, float32 [N, D]: of length 1 for "cosine", rounded where only short rows are kept.

        Raises InputError for unknown ids.
        """
        with self._lock.read():
            return like(self._storage.decode(self._slots_of(as_ids(ids, None))), ids)

    # Putting in

    def add(
        self,
        vectors: Any,
        ids: Any = None,
        *,
        update: bool = False,
        repair: bool = False,
        reuse: bool = True,
        num_threads: int | None = None,
    ) -> np.ndarray:
        """Insert vectors.

        Places of deleted elements are used again, once it is worth a look at all lists to take these out of them.

        Args:
            vectors: [N, D] numbers.
            ids: int [N], not negative, each once; None for those after the largest so far.
            update: move elements whose id is there already, instead of raising.
            repair: link elements that level 0 does not lead to afterwards (as `repair`).
            reuse: use the places of deleted elements, which `restore` cannot bring back then.
            num_threads: for this call; None for the index's own.

        Returns:
            The ids, int64 [N].

        An interrupt (Ctrl-C) ends it between batches: elements that are in the graph by then stay, the others are not there.

        Raises:
            InputError: vectors of another dimension, with numbers that are not finite or too long to be squared (`MAX_LENGTH`), ids that do
                not fit, or no ids left after the largest.
            CapacityError: memory does not suffice; the index is as it was.
        """
        vector_ND = as_vectors(vectors, self.dim, self.metric, "vectors")
        given = None if ids is None else as_distinct(as_ids(ids, len(vector_ND)))
        with self._lock.write() as interrupts, self._workers(num_threads) as workers:
            id_N = self._following(len(vector_ND)) if given is None else given
            known = self._known(id_N) if given is not None else np.zeros(len(id_N), bool)
            if known.any() and not update:
                row = int(np.flatnonzero(known)[0])
                raise InputError(
                    f"ids[{row}] is {id_N[row]}, which is in the index; update=True moves it to the new vector"
                )
            if known.any():
                self._move(self._slots_of(id_N[known]), vector_ND[known], workers)
            if not known.all():
                self._insert_new(vector_ND[~known], id_N[~known], workers, interrupts, reuse)
            if repair:
                self._repair()
        return id_N

    def update(self, ids: Any, vectors: Any, *, repair: bool = True, num_threads: int | None = None) -> None:
        """Move elements to new vectors: they are taken out of the graph and inserted again on their levels.

        Raises InputError for unknown ids, and as `add`.
        """
        vector_ND = as_vectors(vectors, self.dim, self.metric, "vectors")
        id_N = as_distinct(as_ids(ids, len(vector_ND)))
        with self._lock.write(), self._workers(num_threads) as workers:
            self._move(self._slots_of(id_N), vector_ND, workers)
            if repair:
                self._repair()

    def remove(self, ids: Any) -> None:
        """Delete elements: searches walk over them and do not return them, until `compact` takes them out.

        Compacts by itself once more than ``compact_at`` of the elements are deleted.

        Raises InputError for unknown ids, and then deletes none.
        """
        id_N = as_distinct(as_ids(ids, None))
        with self._lock.write():
            slot_S = self._slots_of(id_N)
            self._storage.own()
            self._slots.drop(id_N)
            self._storage.mark(slot_S, deleted=True)
            share = self._storage.graph[layout.NUM_DELETED] / max(self._storage.count, 1)
            if self.compact_at is not None and share > self.compact_at:
                with self._workers(None) as workers:
                    self._compact(True, workers)
                # Some room stays for what comes next.
                if 4 * self._storage.count < 3 * self._storage.capacity:
                    self._storage.shrink()

    def restore(self, ids: Any) -> None:
        """Undo `remove` for elements that were not compacted since, and whose places `add` did not take.

        Raises InputError for ids that are not deleted, and then restores none.
        """
        id_N = as_distinct(as_ids(ids, None))
        with self._lock.write():
            dead_S = np.flatnonzero(~self._slots.live())
            dead_S = dead_S[np.argsort(self._slots.labels()[dead_S], kind="stable")]
            label_S = self._slots.labels()[dead_S]
            # The last that was deleted with an id.
            place_N = np.searchsorted(label_S, id_N, side="right") - 1
            is_there = (place_N >= 0) & ~self._known(id_N)
            is_there[is_there] = label_S[place_N[is_there]] == id_N[is_there]
            if not is_there.all():
                row = int(np.flatnonzero(~is_there)[0])
                raise InputError(f"ids[{row}] is {id_N[row]}, which is not a deleted element of the index")
            self._storage.mark(dead_S[place_N], deleted=False)
            self._slots.put(id_N, dead_S[place_N])

    def compact(self, *, repair: bool = True, num_threads: int | None = None) -> int:
        """Take deleted elements out of graph and memory: lists that pointed at them are selected anew. Returns how many.

        Arrays become as small as what they hold.
        """
        with self._lock.write(), self._workers(num_threads) as workers:
            found = self._compact(repair, workers)
            if not self._storage.is_mapped:
                self._storage.shrink()
            return found

    def repair(self) -> int:
        """Link every element that cannot be reached on level 0 from the entry point; how many there were.

        It is linked from the nearest reached list that has room, so nothing else changes.
        """
        with self._lock.write():
            return self._repair()

    # Searching

    def search(
        self, queries: Any, k: int = 10, ef: int | None = None, filter: Any = None, *, num_threads: int | None = None
    ) -> tuple[Any, Any]:
        """The k nearest of each query.

        Args:
            queries: [Q, D], or [D] for one; a numpy array, or a torch tensor on any device.
            k: how many.
            ef: how many to hold during the walk, at least k; more finds more. Default 64.
            filter: only elements that it lets through: a mask by id (bool, an entry for every id up to the largest), a list of ids, or what
                `prepare_filter` made of one. Few matches (at most 2 ef, or 1%) are measured one by one, exactly.
            num_threads: for this call; None for the index's own.

        Returns:
            ids, int64 [Q, K], and distances, float32 [Q, K], the nearest first, those at one distance by id; -1 and infinity behind the
            last where there are fewer. Tensors, on their device, where queries are.

        Raises:
            InputError: queries of another dimension or with numbers that are not finite; k or ef below 1; a filter of another kind.
            CapacityError: memory does not hold the results.
        """
        k, ef = as_positive(k, "k"), 64 if ef is None else as_positive(ef, "ef")
        if filter is None and is_one_row(queries, self.dim) and self.metric != "cosine" and max(k, ef) <= POOL:
            return self._search_one(queries, k, ef)
        query_QD = as_vectors(queries, self.dim, self.metric, "queries")
        try:
            id_QK, distance_QK = np.full((len(query_QD), k), -1), np.full((len(query_QD), k), np.inf, np.float32)
        except (MemoryError, ValueError) as error:
            raise CapacityError(f"no memory for {k:,} results of {len(query_QD):,} queries; ask for fewer") from error
        with self._lock.read():
            if self._storage.graph[layout.ENTRY] >= 0 and len(query_QD):
                self._search(query_QD, ef, filter, id_QK, distance_QK, num_threads)
        return like(id_QK, queries), like(distance_QK, queries)

    def prepare_filter(self, ids_or_mask: Any) -> Filter:
        """A filter for many searches: what it lets through is worked out once, and again only when the index has changed.

        Raises InputError for what is no list of ids and no mask, and for a mask that ends before the largest id.
        """
        made = Filter(ids_or_mask)
        with self._lock.read():
            made.on(self._slots)
        return made

    def stats(self) -> dict[str, Any]:
        """What the index looks like, and what the last search cost.

        Returns:
            ``count``, ``deleted``, ``levels`` (elements on each level), ``mean_degree`` (links per list on each level), ``unreachable``
            (elements that level 0 does not lead to), ``size_bytes`` (as the property), and of the last search ``queries``, ``hops`` and
            ``distances`` (means per query).
        """
        with self._lock.read(whole=True):
            held, graph = self._storage, self._storage.graph
            level_N = held.level[: held.count]
            levels = [int((level_N >= level).sum()) for level in range(int(graph[layout.TOP]) + 1)]
            degrees = []
            for level in range(len(levels)):
                lists = held.first[: held.count][level_N >= level] + level - 1
                links = held.links[: held.count] if level == 0 else held.upper[lists]
                degrees.append(round(float((links >= 0).sum(1).mean()), 3))
            reached = self._linker.reached()
            hops, distances, queries = self._last
            return {
                "count": held.count - int(graph[layout.NUM_DELETED]),
                "deleted": int(graph[layout.NUM_DELETED]),
                "levels": levels,
                "mean_degree": degrees,
                "unreachable": int((~reached & (held.deleted[: held.count] == 0)).sum()),
                "size_bytes": self.size_bytes,
                "queries": queries,
                "hops": hops / max(queries, 1),
                "distances": distances / max(queries, 1),
            }

    # On disk

    def save(self, path: str | Path) -> None:
        """Write the index into one checked file (`anabranch.graph.array_file`), all or nothing."""
        with self._lock.read(whole=True):
            storage.save(self._storage, path, self._facts())

    @classmethod
    def load(cls, path: str | Path, *, mmap: bool = False, num_threads: int | None = None) -> Self:
        """Read what `save` wrote.

        Args:
            path: the file.
            mmap: leave vectors and links on disk until they are used; the first change copies them into memory. Links are checked all the
                same, the bytes of vectors only without ``mmap``.
            num_threads: as for a new index.

        Raises:
            DataError: the file is missing, foreign, truncated or damaged.
        """
        arrays, meta = storage.read(path, mmap=mmap)
        return cls._made(arrays, meta, mapped=mmap, source=str(path), num_threads=num_threads)

    def __getstate__(self) -> dict[str, Any]:
        return self._state(copy=True)

    def _state(self, *, copy: bool) -> dict[str, Any]:
        """What a pickle holds. Without ``copy`` arrays are the index's own: whoever writes them keeps changes out meanwhile."""
        with self._lock.read(whole=True):
            held = self._storage.arrays()
            arrays = {name: np.array(array) for name, array in held.items()} if copy else held
            graph = self._storage.graph
            meta = {**self._facts(), "entry": int(graph[layout.ENTRY]), "top": int(graph[layout.TOP])}
            return {"arrays": arrays, "meta": meta, "num_threads": self.num_threads}

    def __setstate__(self, state: dict[str, Any]) -> None:
        made = type(self)._made(
            state["arrays"], state["meta"], mapped=False, source="the pickle", num_threads=state["num_threads"]
        )
        self.__dict__.update(made.__dict__)

    def _facts(self) -> dict[str, Any]:
        names = ("dim", "metric", "M", "ef_construction", "dtype", "seed", "rerank", "heuristic", "extend_candidates")
        return {
            "options": {name: getattr(self, name) for name in (*names, "keep_pruned", "flat", "compact_at")},
            "drawn": self._drawn,
            "next_id": self._next_id,
        }

    @classmethod
    def _made(
        cls, arrays: dict[str, np.ndarray], meta: dict[str, Any], *, mapped: bool, source: str, num_threads: int | None
    ) -> Self:
        try:
            made = cls(**meta["options"], num_threads=num_threads)
            drawn, next_id, entry, top = (int(meta[name]) for name in ("drawn", "next_id", "entry", "top"))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{source} is damaged: its header does not describe an index ({error})") from error
        made._storage.take_arrays(arrays, entry, top, mapped=mapped, source=source)
        made._drawn, made._next_id, made._linker.linked = drawn, next_id, made._storage.count
        made._slots.forget()
        return made

    # Inside: callers hold the lock

    def _workers(self, num_threads: int | None) -> Workers:
        return Workers(self.num_threads if num_threads is None else as_positive(num_threads, "num_threads"))

    def _following(self, count: int) -> np.ndarray:
        """Ids after the largest so far. Raises InputError where there are none left."""
        left = int(np.iinfo(np.int64).max) - self._next_id + 1
        if count > left:
            raise InputError(
                f"the largest id so far is {self._next_id - 1}, which leaves {left:,} for {count:,} vectors; give ids"
            )
        return np.arange(count, dtype=np.int64) + np.int64(self._next_id) if count else np.empty(0, np.int64)

    def _known(self, id_N: np.ndarray) -> np.ndarray:
        return self._slots.find(id_N) >= 0

    def _slots_of(self, id_N: np.ndarray) -> np.ndarray:
        slot_S = self._slots.find(id_N)
        bad = np.flatnonzero(slot_S < 0)
        if bad.size:
            raise InputError(f"ids[{bad[0]}] is {id_N[bad[0]]}, which is not in the index")
        return slot_S

    def _insert_new(
        self, vector_ND: np.ndarray, id_N: np.ndarray, workers: Workers, interrupts: Interrupts, reuse: bool
    ) -> None:
        held, count, done = self._storage, len(vector_ND), 0
        again = self._vacate(count, workers) if reuse else 0
        # A table that a reader makes from now on has all of them.
        had_table = self._slots.is_made
        slot_S = self._append(vector_ND[again:], id_N[again:])
        try:
            slot_S = np.append(held.refill(again, vector_ND[:again], id_N[:again]), slot_S)
            done = self._linker.link(slot_S, workers, interrupts)
        finally:
            # An interrupt, or no memory: what was linked stays, the rest was never here.
            if done < count:
                done = self._linker.num_done if len(slot_S) == count else 0
                self._take_back(slot_S[done:], count - again, workers)
            self._drawn += max(done - again, 0)
            if done:
                self._next_id = max(self._next_id, int(id_N[:done].max()) + 1)
            if done < count:
                # Readers, who were let in meanwhile, may have counted the rest.
                self._slots.forget()
            elif had_table:
                self._slots.put(id_N, slot_S)

    def _vacate(self, count: int, workers: Workers) -> int:
        """How many of so many new elements have vacant places; where there are too few, those of deleted elements become so."""
        held = self._storage
        dead = int(held.graph[layout.NUM_DELETED]) - len(held.vacant_S)
        if len(held.vacant_S) < count and dead * WORTH >= max(held.count, 1):
            held.own()
            dead_S = np.flatnonzero(~self._slots.live() & (held.level[: held.count] >= 0))
            self._linker.take_out(dead_S, workers)
            held.vacate(dead_S)
            if held.graph[layout.ENTRY] >= 0:
                self._linker.repair()
        return min(count, len(held.vacant_S))

    def _append(self, vector_ND: np.ndarray, id_N: np.ndarray) -> np.ndarray:
        if not len(id_N):
            return np.empty(0, np.int64)
        level_N = np.zeros(len(id_N), np.int32)
        if not self.flat:
            level_N = draw_levels(np.uint64(self.seed % 2**64), self._drawn, len(id_N), self.M)
        return self._storage.append(vector_ND, id_N, level_N)

    def _take_back(self, slot_S: np.ndarray, appended: int, workers: Workers) -> None:
        """Let slots be as if they had never been given to the linker, of which the last ``appended`` of all were new."""
        held = self._storage
        self._linker.undo(slot_S, workers)
        begin = held.count - appended
        again_S = np.sort(slot_S[slot_S < begin])
        held.mark(again_S, deleted=True)
        held.vacate(again_S)
        held.drop_last(int((slot_S >= begin).sum()))

    def _move(self, slot_S: np.ndarray, vector_SD: np.ndarray, workers: Workers) -> None:
        if not len(slot_S):
            return
        self._storage.own()
        # Before anything is taken out: there may be no memory for it.
        encoded = self._storage.encode(vector_SD)
        try:
            self._linker.take_out(slot_S, workers)
            self._storage.put_encoded(slot_S, encoded)
            self._linker.link(slot_S, workers)
        except BaseException:
            # Whatever came between, they come in again.
            self._linker.link_again(slot_S, workers)
            raise

    def _compact(self, repair: bool, workers: Workers) -> int:
        held, is_live_S = self._storage, self._slots.live()
        dead, live = np.flatnonzero(~is_live_S), np.flatnonzero(is_live_S)
        if not dead.size:
            return 0
        held.own()
        if live.size:
            self._linker.take_out(dead[held.level[dead] >= 0], workers)
            held.keep(live)
        else:
            held.reset()
            self._linker.linked = 0
        self._slots.forget()
        if repair:
            self._repair()
        return len(dead)

    def _repair(self) -> int:
        if not self._storage.count:
            return 0
        self._storage.own()
        return self._linker.repair()

    def _search_one(self, query: np.ndarray, k: int, ef: int) -> tuple[np.ndarray, np.ndarray]:
        """As `search` of one float32 row without a filter: the same kernel, with nothing around it that one query does not need."""
        query_1D = query.reshape(1, -1)
        id_1K, distance_1K = np.empty((1, k), np.int64), np.empty((1, k), np.float32)
        id_1K.fill(-1)
        distance_1K.fill(np.inf)
        counts = np.zeros(2, np.int64)
        with Interrupts() as interrupts:
            self._lock.enter_read(interrupts)
            try:
                self._search_held(query_1D, k, ef, id_1K, distance_1K, counts)
            finally:
                self._lock.leave_read()
        return id_1K, distance_1K

    def _search_held(
        self, query_1D: np.ndarray, k: int, ef: int, id_1K: np.ndarray, distance_1K: np.ndarray, counts: np.ndarray
    ) -> None:
        held = self._storage
        if held.graph[layout.NUM_DELETED] != len(held.vacant_S):
            self._search(query_1D, ef, None, id_1K, distance_1K, 1)
            return
        if held.graph[layout.ENTRY] >= 0:
            query_Q, aux_Q, full_Q = held.encode_queries(query_1D)
            ef = min(max(ef, k), held.count)
            marks = held.take_marks()
            search_many(
                held.graph, held.label, marks, query_Q, aux_Q, full_Q, 0, 1, ef, min(ef, 2 * k + EXTRA), 0,
                id_1K, distance_1K, counts,
            )  # fmt: skip
            held.give_marks(marks)
        self._last = (int(counts[0]), int(counts[1]), 1)

    def _search(
        self,
        query_QD: np.ndarray,
        ef: int,
        filter: Any,
        id_QK: np.ndarray,
        distance_QK: np.ndarray,
        num_threads: int | None,
    ) -> None:
        held, graph, k = self._storage, self._storage.graph, id_QK.shape[1]
        ef = min(max(ef, k), held.count)
        label_N, keep = self._slots.labels(), min(ef, 2 * k + EXTRA)
        query_Q, aux_Q, full_Q = held.encode_queries(query_QD)
        # All, unless something keeps some out or two heaps are quicker.
        allowed, slot_S = 0, None
        if filter is not None:
            wanted = filter.on(self._slots) if isinstance(filter, Filter) else prepared(filter, self._slots)
            allowed_N, allowed = wanted.allowed_S, wanted.allowed_S.ctypes.data
            if wanted.number <= max(2 * ef, SELECTIVE * held.count):
                slot_S = wanted.slots(label_N)
        elif graph[layout.NUM_DELETED] != len(held.vacant_S) or ef > POOL:
            allowed_N = self._slots.live()
            allowed = allowed_N.ctypes.data
        parts: list[np.ndarray] = []

        def walk(begin: int, end: int) -> None:
            counts = np.zeros(2, np.int64)
            queries, results = (query_Q, aux_Q, full_Q, begin, end), (id_QK, distance_QK, counts)
            if slot_S is not None:
                scan_many(graph, label_N, slot_S, *queries, *results)
            else:
                with Marks(held) as marks:
                    search_many(graph, label_N, marks, *queries, ef, keep, allowed, *results)
            parts.append(counts)

        with self._workers(num_threads) as workers:
            workers.run(walk, len(query_QD) if slot_S is None or len(slot_S) else 0, 4)
        hops, distances = (sum(int(part[place]) for part in parts) for place in (0, 1))
        self._last = (hops, distances, len(query_QD))
