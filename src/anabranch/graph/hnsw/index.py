"""`HNSW`: the index as users see it. What it is asked is in `finding`, files and pickles in `kept`, kernels in `search` and `build`."""
# Shapes: N vectors, D dimension, Q queries, K neighbours, S slots

import warnings
from typing import Any

import numpy as np

from anabranch.bounds import whole
from anabranch.errors import InputError
from anabranch.graph.arguments import check_flag, plain
from anabranch.graph.hnsw import layout
from anabranch.graph.hnsw.changing import Changes
from anabranch.graph.hnsw.checks import (
    as_distinct,
    as_ids,
    as_one_id,
    as_positive,
    as_vectors,
    like,
    warn_of_rounding,
    warn_of_short,
)
from anabranch.graph.hnsw.coarse import told_of_strays, warn_of_coarse, warn_of_worse
from anabranch.graph.hnsw.coded import Coded, check_quantization
from anabranch.graph.hnsw.encoding import BITS
from anabranch.graph.hnsw.figures import figures
from anabranch.graph.hnsw.finding import Finding
from anabranch.graph.hnsw.kept import Kept
from anabranch.graph.hnsw.linking import Linker
from anabranch.graph.hnsw.lock import ReadWriteLock
from anabranch.graph.hnsw.options import MAX_EF, MAX_RERANK, check_options
from anabranch.graph.hnsw.ranges import Ranges
from anabranch.graph.hnsw.searching import Searcher
from anabranch.graph.hnsw.single import Single
from anabranch.graph.hnsw.slots import Slots
from anabranch.graph.hnsw.storage import Storage
from anabranch.graph.workers import Workers, asked_workers


class HNSW(Kept, Finding):
    """Approximate nearest neighbours of vectors, by a walk through a hierarchy of small-world graphs.

    Any number of threads may search at once, and beside one that changes the index: a search waits for single steps of it, never for the
    whole, and finds new elements batch by batch (one that is moved is not found for a while). A search of many queries makes room for
    whoever waits to change something: each query is answered by one state of the index, a later one maybe by a later state. What is saved,
    pickled or counted by `stats` and `ids` is whole. The same calls with the same seed give the same bytes, whatever the number of threads
    and of searches beside.

    Args:
        dim: numbers in a vector; bits for "hamming", a multiple of 8.
        metric: "l2" (squared), "ip" (1 - inner product in 32 bits, which says little of vectors that are all shorter than 1e-3; no metric,
            so recall may suffer), "cosine" (vectors are scaled to length 1) or "hamming" (how many bits
            differ; vectors are packed bits, uint8 [N, dim / 8], or bool [N, dim]).
        M: links of a new element; at most 2 M accumulate on level 0. 5 to 48, more for more dimensions.
        ef_construction: candidates considered for them; at least M, at most 1,048,576.
        dtype: how vectors are searched, "f32", "f16" (half the bytes) or "i8" (a quarter); "b1" for "hamming". None for "f32", or "b1".
        seed: of the levels.
        rerank: whether to keep float32 vectors beside shorter ones and measure the best results again by them (2 k + 16; with codes all
            that the walk holds), or how many of them (at least k are); without effect for "f32" without codes.
        quantization: walk over codes of vectors in place of the vectors: "pq" (product quantisation) or "int4" (half a byte for each
            number). Vectors stay as float32 beside them, mapped from a file on the disk. See `train`.
        code_bytes: of "pq", bytes of a code, 1 to ``dim``; None for one for each four numbers.
        heuristic: "diverse" (paper, algorithm 4) or "simple" (the M nearest, algorithm 3).
        extend_candidates: consider neighbours of candidates too (algorithm 4).
        keep_pruned: fill links up with the nearest rejected (algorithm 4).
        flat: put all elements on level 0 alone, which is NSW.
        compact_at: `remove` compacts once more than this share is deleted; None for never.
        workers: threads of all calls that are not told another number; None for all processors.
        former: ``num_threads``, the former name of ``workers``, counts where that is None, here and in all calls that have it.

    Raises:
        InputError: an argument has a value it may not have.
    """

    def __init__(
        self,
        dim: int,
        metric: str = "l2",
        M: int = 16,
        ef_construction: int = 200,
        dtype: str | None = None,
        seed: int = 0,
        *,
        rerank: bool | int = True,
        heuristic: str = "diverse",
        extend_candidates: bool = False,
        keep_pruned: bool = False,
        flat: bool = False,
        compact_at: float | None = 0.2,
        workers: int | None = None,
        quantization: str | None = None,
        code_bytes: int | None = None,
        **former: Any,
    ) -> None:
        workers = asked_workers(workers, former, "HNSW")
        self.dim, self.M = as_positive(dim, "dim"), as_positive(M, "M")
        self.ef_construction = max(as_positive(ef_construction, "ef_construction", MAX_EF), self.M)
        is_of_bits = isinstance(metric, str) and metric == "hamming"
        dtype = (BITS if is_of_bits else "f32") if dtype is None else dtype
        check_options(
            self.dim, self.M, metric=metric, dtype=dtype, heuristic=heuristic, compact_at=compact_at, seed=seed
        )
        check_quantization(quantization, code_bytes, dim=self.dim, metric=metric, dtype=dtype)
        self.metric, self.dtype, self.seed, self.heuristic = metric, dtype, int(seed), heuristic
        self.quantization, self.code_bytes = quantization, None if code_bytes is None else int(code_bytes)
        self._rerank = (
            bool(rerank) if isinstance(rerank, bool | np.bool_) else as_positive(rerank, "rerank", MAX_RERANK)
        )
        self.extend_candidates = check_flag("extend_candidates", extend_candidates)
        self.keep_pruned, self.flat = check_flag("keep_pruned", keep_pruned), check_flag("flat", flat)
        self.compact_at = plain(compact_at)
        self.workers = None if workers is None else as_positive(workers, "workers")
        coded = None if quantization is None else Coded(quantization, self.dim, metric, code_bytes)
        self._storage = Storage(self.dim, metric, self.M, self.ef_construction, dtype, bool(rerank), coded)
        self._storage.graph[layout.SIMPLE] = self.heuristic == "simple"
        self._storage.graph[layout.EXTEND], self._storage.graph[layout.KEEP] = self.extend_candidates, self.keep_pruned
        self._lock = ReadWriteLock()
        self._linker = Linker(self._storage, self._lock)
        self._slots = Slots(self._storage)
        self._changes = Changes(self._storage, self._slots, self._linker, self._lock, self.seed, is_flat=self.flat)
        self._searcher = Searcher(self._storage, self._slots, rerank=self._rerank)
        self._single = Single(self._searcher, self._lock)
        self._ranges = Ranges(self._searcher)

    # What is in it

    def __len__(self) -> int:
        # Both change while elements are taken out.
        return max(0, self._storage.count - int(self._storage.graph[layout.NUM_DELETED]))

    def __contains__(self, id: Any) -> bool:
        if (known := as_one_id(id)) is None:
            return False
        with self._lock.read():
            return bool(self._slots.known(np.array([known]))[0])

    def contains(self, ids: Any) -> np.ndarray:
        """Which of some ids are in it, bool [N]. Raises InputError for what are no ids."""
        id_N = as_ids(ids, None)
        with self._lock.read():
            return self._slots.known(id_N)

    def __repr__(self) -> str:
        return f"HNSW({len(self):,} vectors of {self.dim}, {self.metric}, {self.dtype}, M={self.M})"

    @property
    def row_size(self) -> int:
        """Numbers of a vector as it is given: ``dim``, or for "hamming" as many bytes as hold ``dim`` bits."""
        return self.dim // 8 if self.metric == "hamming" else self.dim

    @property
    def num_threads(self) -> int | None:
        """The former name of ``workers``."""
        return self.workers

    @num_threads.setter
    def num_threads(self, number: int | None) -> None:
        self.workers = None if number is None else as_positive(number, "num_threads")

    @property
    def rerank(self) -> bool | int:
        """Whether results are measured again by float32 vectors, or how many of the best."""
        return self._rerank if self._storage.rerank or self.quantization is not None else False

    @property
    def size_bytes(self) -> int:
        """Bytes of all arrays with what they have room for, codes and the table of ids included; also of those on the disk (`stats`)."""
        return self._storage.nbytes + self._slots.nbytes

    def growth_bytes(self, count: int) -> int:
        """Bytes that arrays take anew so that ``count`` more elements fit; 0 where there is room for them."""
        count = whole("count", count, 0)
        with self._lock.read():
            return self._storage.growth_bytes(count)

    @property
    def ids(self) -> np.ndarray:
        """Ids in the order of their places, int64 [N]: that in which they came, but for those that came into places of deleted ones."""
        with self._lock.read(whole=True):
            return self._slots.labels()[self._slots.live()]

    def vectors(self, ids: Any) -> Any:
        """Vectors by id, float32 [N, D]: of length 1 for "cosine", rounded where only short rows are kept. For "hamming" packed bits,
        uint8 [N, D / 8].

        Raises InputError for unknown ids.
        """
        with self._lock.read():
            return like(self._storage.decode(self._slots.of(as_ids(ids, None))), ids)

    # Putting in

    def add(
        self,
        vectors: Any,
        ids: Any = None,
        *,
        update: bool = False,
        repair: bool = False,
        reuse: bool = True,
        workers: int | None = None,
        **former: Any,
    ) -> np.ndarray:
        """Insert vectors.

        Places of deleted elements are used again, once it is worth a look at all lists to take these out of them.

        Args:
            vectors: [N, D] numbers; for "hamming" packed bits.
            ids: int [N], not negative, each once; None for those after the largest so far.
            update: move elements whose id is there already, instead of raising.
            repair: look whether level 0 leads to all elements afterwards, and link those that it does not. So it is whenever some were
                moved, or places of deleted ones used again, an eighth came as copies of others, or a sixteenth came at all.
            reuse: use the places of deleted elements, which `restore` cannot bring back then.
            workers: for this call; None for the index's own.

        Returns:
            The ids, int64 [N].

        An interrupt (Ctrl-C) ends it between batches: elements that are in the graph by then stay, the others are not there.

        Warns (UserWarning), with the row, of a vector for "l2" that is not zero and shorter than 1e-18 (`MIN_LENGTH`): squared distances
        between such ones are 0, so that they are not told apart. And of vectors that are rounded to too little: for "ip" where all are
        shorter than 1e-3, with "f16" where numbers lie over 65,504 from the centre, or are all below 6.1e-5, with "f16" and "i8" where many
        are rounded by as much as they lie from each other, with ``quantization`` where many lie far from what codes were learned from, and
        are too few to learn from. With ``rerank=False``, when rows are rounded about another centre, of elements
        that keep errors of the one before.

        Raises:
            InputError: vectors of another dimension, with numbers that are not finite or too long to be squared (`MAX_LENGTH`), ids that do
                not fit, or no ids left after the largest.
            CapacityError: memory does not suffice; the index is as it was.
        """
        update, repair, reuse = check_flag("update", update), check_flag("repair", repair), check_flag("reuse", reuse)
        vector_ND = as_vectors(vectors, self.dim, self.metric, "vectors")
        warn_of_short(vector_ND, self.metric, "vectors")
        given = None if ids is None else as_distinct(as_ids(ids, len(vector_ND)))
        if len(vector_ND) == 1 and not repair:
            with self._lock.write_beside():
                id_1 = self._changes.insert_beside(vector_ND, given, reuse=reuse)
            if id_1 is not None:
                if self._changes.is_crowded:
                    with self._lock.write(), Workers(1) as pool:
                        self._changes.repair_if_due(pool)
                self._tell(vector_ND)
                return id_1
        with self._lock.write() as interrupts, self._pool(workers, former, "add") as pool:
            id_N = self._changes.following(len(vector_ND)) if given is None else given
            known = self._slots.known(id_N) if given is not None else np.zeros(len(id_N), bool)
            if known.any() and not update:
                row = int(np.flatnonzero(known)[0])
                raise InputError(
                    f"ids[{row}] is {id_N[row]}, which is in the index; update=True moves it to the new vector"
                )
            if known.any():
                self._changes.move(self._slots.of(id_N[known]), vector_ND[known], pool)
            if not known.all():
                self._changes.insert(vector_ND[~known], id_N[~known], pool, interrupts, reuse=reuse)
            if repair:
                self._changes.repair(pool)
            self._changes.repair_if_due(pool)
            self._changes.learn_if_due(pool)
            strays = told_of_strays(vector_ND, self._storage, "vectors")
        self._tell(vector_ND, strays)
        return id_N

    def train(self, vectors: Any = None, *, workers: int | None = None, **former: Any) -> None:
        """Learn anew what codes stand for, and code all vectors by it. Searches go on meanwhile.

        `add` does so by itself once there are 1,024 vectors, and again at eight times as many, until there are 32,768; and where codes say
        little of the vectors that there are by then, `add` and `update` (whenever one in 8 has come, was moved or has gone, or as many as
        one in 100 that lie far from what codes were learned from), `compact` and `repair`; and what was read from a file, when something
        is changed first. This is for vectors that have become others since. Before, there are no codes, and distances are exact.

        Args:
            vectors: [S, D] to learn from; None for those that are there, or 32,768 of them.
            workers: for this call; None for the index's own.

        Raises:
            InputError: the index has no codes, or nothing to learn from; and as `add`.
            CapacityError: memory does not suffice; codes are as they were.
        """
        if self.quantization is None:
            raise InputError("the index has no codes to learn; it was made without quantization")
        sample = None if vectors is None else as_vectors(vectors, self.dim, self.metric, "vectors")
        with self._lock.write(), self._pool(workers, former, "train") as pool:
            self._changes.learn(pool, sample)

    def update(self, ids: Any, vectors: Any, *, repair: bool = True, workers: int | None = None, **former: Any) -> None:
        """Move elements to new vectors: they are taken out of the graph and inserted again on their levels.

        ``repair`` says whether it is looked then if all can be reached; if not, that is for the next change: `add`, `remove`, `restore`,
        or `update` and `compact` that are not told so.

        Raises InputError for unknown ids, and as `add`.
        """
        repair = check_flag("repair", repair)
        vector_ND = as_vectors(vectors, self.dim, self.metric, "vectors")
        warn_of_short(vector_ND, self.metric, "vectors")
        id_N = as_distinct(as_ids(ids, len(vector_ND)))
        with self._lock.write(), self._pool(workers, former, "update") as pool:
            self._changes.move(self._slots.of(id_N), vector_ND, pool)
            if repair:
                self._changes.repair(pool)
            self._changes.learn_after_loss(pool)
            strays = told_of_strays(vector_ND, self._storage, "vectors")
        self._tell(vector_ND, strays)

    def remove(self, ids: Any) -> None:
        """Delete elements: searches walk over them and do not return them, until `compact` takes them out.

        Compacts by itself once more than ``compact_at`` of the elements are deleted.

        Raises InputError for unknown ids, and then deletes none.
        """
        id_N = as_distinct(as_ids(ids, None))
        with self._lock.write():
            self._changes.delete(id_N)
            share = self._storage.graph[layout.NUM_DELETED] / max(self._storage.count, 1)
            if self.compact_at is not None and share > self.compact_at:
                with self._pool(None, {}, "remove") as pool:
                    self._changes.compact(pool, repair=True)
                    self._changes.learn_after_loss(pool)
                # Some room stays for what comes next.
                if 4 * self._storage.count < 3 * self._storage.capacity:
                    self._storage.shrink()
            elif self._changes.is_crowded:
                # What a change before was told not to repair.
                with self._pool(None, {}, "remove") as pool:
                    self._changes.repair_if_due(pool)
        self._tell(None)

    def restore(self, ids: Any) -> None:
        """Undo `remove` for elements that were not compacted since, and whose places `add` did not take.

        Raises InputError for ids that are not deleted, and then restores none.
        """
        id_N = as_distinct(as_ids(ids, None))
        with self._lock.write(), self._pool(None, {}, "restore") as pool:
            self._changes.restore(id_N, pool)
            self._changes.repair_if_due(pool)

    def compact(self, *, repair: bool = True, workers: int | None = None, **former: Any) -> int:
        """Take deleted elements out of graph and memory: lists that pointed at them are selected anew. Returns how many.

        Arrays become as small as what they hold.
        """
        repair = check_flag("repair", repair)
        with self._lock.write(), self._pool(workers, former, "compact") as pool:
            found = self._changes.compact(pool, repair=repair)
            self._changes.learn_after_loss(pool)
            if not self._storage.is_mapped:
                self._storage.shrink()
        self._tell(None)
        return found

    def repair(self) -> int:
        """Look for every element, and link those that a walk for them does not come to, or that cannot be reached on level 0; how many.

        That takes as long as a search for each. Changes look by themselves for what they may have cut off. Beside that, codes are learned
        anew where they say little of the vectors that there are (as `train`). Raises CapacityError where memory does not suffice for that:
        codes stay then.
        """
        with self._lock.write(), self._pool(None, {}, "repair") as pool:
            found = self._changes.repair(pool, everything=True)
            self._changes.look_again(pool)
        return found

    def stats(self) -> dict[str, Any]:
        """What the index looks like, and what the last search cost.

        Returns:
            ``count``, ``deleted``, ``levels`` (elements on each level), ``mean_degree`` (links per list on each level), ``unreachable``
            (elements that level 0 does not lead to), ``size_bytes`` (as the property), ``mapped_bytes`` (of these, on the disk until they
            are used), ``code_bytes`` (of an element's codes, 0 without), and of the last search ``queries``, ``hops`` and ``distances``
            (means per query).
        """
        with self._lock.read(whole=True):
            return figures(self._storage, self._linker, self.size_bytes, self._searcher.last)

    # Inside

    def _tell(self, vector_ND: np.ndarray | None, strays: str | None = None) -> None:
        """Warn of vectors that came of which little is kept, of ``strays``, and of elements that keep errors."""
        encoding = self._storage.encoding
        if vector_ND is not None:
            is_told = warn_of_rounding(vector_ND, self.metric, self.dtype, encoding.centre_D, "vectors")
            if not is_told:
                warn_of_coarse(vector_ND, encoding, "vectors")
        if strays is not None:
            warnings.warn(strays, stacklevel=3)
        if number := self._changes.take_worse():
            warn_of_worse(number, len(self))
