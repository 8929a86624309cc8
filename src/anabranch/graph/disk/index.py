"""`DiskIndex`: the index as users see it. Kernels are in `search`, the file in `stored`, how it is made in `making`."""
# Shapes: N vectors, D dimension, Q queries, K neighbours, S slots

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from anabranch.bounds import LARGEST_INT
from anabranch.errors import CapacityError, DataError, InputError
from anabranch.graph.arguments import as_path
from anabranch.graph.array_file import check_how
from anabranch.graph.disk import search, stored
from anabranch.graph.disk.answering import Asked
from anabranch.graph.disk.blocks import Form, read_blocks
from anabranch.graph.disk.slots import Slots
from anabranch.graph.hnsw.arrays import aligned
from anabranch.graph.hnsw.checks import as_ids, as_one_id, as_positive, as_vectors, like, results
from anabranch.graph.hnsw.filters import Filter, Prepared, prepared
from anabranch.graph.hnsw.lock import ReadWriteLock
from anabranch.graph.workers import FORMER, Workers, asked_workers, num_workers

# Queries of one call of a kernel: between two of them an interrupt is seen.
PIECE = 256

# Bytes of a limit that are left to searches beside their marks.
SCRATCH = 1 << 18


class DiskIndex:
    """Approximate nearest neighbours of vectors that stay on disk. Read-only; made by `build` or `from_hnsw`.

    In memory are a code of some bytes for each vector, the places of ids, and the entry layer of the graph (`memory_bytes`); vectors and
    links are read, a block for each step of the walk. Any number of threads may search at once, and any number of processes may open one
    file: what the system keeps of it in its cache it keeps once, and with ``mmap`` the codes too. One that was forked goes on with what
    the first had opened; one that unpickles an index opens the file again.

    Every block is compared with its digest when it is read, all that is held in memory with checksums when it is opened: damage raises
    DataError, also where the disk fails or the file is cut while it is in use.

    Args:
        path: the file.
        memory: bytes it may take in memory, such as 64 << 20. What codes leave of it holds blocks, those that most lead to first; None
            for none.
        mmap: map codes from the file instead of reading them, so that processes share them. Do not write into the file then: replace it.
        workers: threads of calls that are not told another number; None for all processors. While the disk is waited for, others go on:
            more of them than processors may be quicker.
        former: ``num_threads``, the former name of ``workers``, counts where that is None, also in `search`.

    Raises:
        DataError: the file is missing, foreign, truncated or damaged.
        CapacityError: ``memory`` does not hold what must be in it.
        BackendError: the system cannot read at a place of a file (pread).
    """

    def __init__(
        self,
        path: str | Path,
        *,
        memory: int | None = None,
        mmap: bool = False,
        workers: int | None = None,
        **former: Any,
    ) -> None:
        check_how(mmap, None)
        workers = asked_workers(workers, former, "DiskIndex")
        self.workers = None if workers is None else as_positive(workers, "workers")
        memory = None if memory is None else as_positive(memory, "memory", LARGEST_INT)
        self._options = {"memory": memory, "mmap": bool(mmap)}
        self.path = as_path(path)
        self._held = stored.read(self.path, mmap=mmap)
        self._slots = Slots(self._held)
        self._lock = ReadWriteLock()
        self._is_closed = False
        self._last = (0, 0, 0, 0)
        self._cache_CW = np.empty((0, self._held.form.block >> 3), np.uint64)
        self._form = self._held.form
        self.num_cached = self._fill(memory)

    # What is in it

    def __len__(self) -> int:
        return self._form.elements

    def __contains__(self, id: Any) -> bool:
        known = as_one_id(id)
        return known is not None and bool(self.contains(np.array([known]))[0])

    def contains(self, ids: Any) -> np.ndarray:
        """Which of some ids are in it, bool [N]. Raises InputError for what are no ids."""
        return self._slots.find(as_ids(ids, None)) >= 0

    def __repr__(self) -> str:
        return f"DiskIndex({str(self.path)!r}, {len(self):,} vectors of {self.dim}, {self.metric}, {self.dtype})"

    @property
    def dim(self) -> int:
        """Numbers in a vector."""
        return self._form.dim

    @property
    def row_size(self) -> int:
        """As of `HNSW`: numbers of a vector as it is given."""
        return self.dim

    @property
    def metric(self) -> str:
        """As of `HNSW`."""
        return self._held.metric

    @property
    def dtype(self) -> str:
        """How vectors are searched: "pq" and the bytes of a code."""
        return f"pq{self._held.codes.num_parts}"

    @property
    def M(self) -> int:
        """Links of an element when it was inserted; most links on disk are `stats`' ``max_degree``."""
        return self._held.M

    @property
    def ids(self) -> np.ndarray:
        """Ids, rising, int64 [N]."""
        return self._slots.ids()

    @property
    def memory_bytes(self) -> int:
        """Bytes of all that is held in memory for as long as it is open; a search takes N / 4 for its marks and some for its pool."""
        return self._held.nbytes + self._cache_CW.nbytes

    @property
    def size_bytes(self) -> int:
        """Bytes of the file."""
        return self._held.size_bytes

    def vectors(self, ids: Any) -> Any:
        """Vectors by id, float32 [N, D]: of length 1 for "cosine". Raises InputError for unknown ids, DataError as `search`."""
        id_N = as_ids(ids, None)
        slot_N = self._slots.find(id_N)
        bad = np.flatnonzero(slot_N < 0)
        if bad.size:
            raise InputError(f"ids[{bad[0]}] is {id_N[bad[0]]}, which is not in the index")
        order = np.argsort(slot_N, kind="stable")
        vector_ND, label_N = np.empty((len(id_N), self.dim), np.float32), np.empty(len(id_N), np.int64)
        room_W = aligned((self._form.block >> 3,), np.uint64)
        with self._open():
            wrong = search.gather(self._form, self._cache_CW, room_W, slot_N[order], vector_ND, label_N)
        if wrong < 0 and not np.array_equal(label_N, id_N[order]):
            wrong = int(slot_N[order][np.argmax(label_N != id_N[order])]) // self._form.per
        self._check(int(wrong))
        found = np.empty_like(vector_ND)
        found[order] = vector_ND
        return like(found, ids)

    # Searching

    def search(
        self,
        queries: Any,
        k: int = 10,
        ef: int | None = None,
        filter: Any = None,
        *,
        beam: int = 4,
        workers: int | None = None,
        **former: Any,
    ) -> tuple[Any, Any]:
        """The k nearest of each query, measured exactly among all that the walk reads.

        Args:
            queries: [Q, D], or [D] for one; a numpy array, or a torch tensor on any device.
            k: how many.
            ef: how many to hold during the walk, at least k; more reads more blocks and finds more. Default 64.
            filter: only elements that it lets through: a mask by id, a list of ids, or what `prepare_filter` made of one. Up to 2 ef
                matches are all measured; of up to a tenth of all, codes are compared and the nearest ef measured; for more, the walk
                holds ef divided by their share.
            beam: blocks that are asked for together, so that a disk can read them side by side.
            workers: for this call; None for the index's own.

        Returns:
            As `HNSW.search`.

        Raises:
            InputError: queries of another dimension or with numbers that are not finite; k, ef or beam below 1; a filter of another kind;
                the index is closed.
            CapacityError: memory does not hold the results.
            DataError: a block that was read is not what was written.
        """
        workers = asked_workers(workers, former, "search")
        k, beam = as_positive(k, "k"), min(as_positive(beam, "beam"), 256)
        ef = max(64 if ef is None else as_positive(ef, "ef"), k)
        query_QD = as_vectors(queries, self.dim, self.metric, "queries")
        id_QK, distance_QK = results(len(query_QD), k)
        wanted = None if filter is None else self._prepared(filter)
        asked = Asked(
            self._held, self._form, self._cache_CW, self._wide(query_QD), wanted, id_QK, distance_QK, ef, beam
        )
        with self._open():
            self._run(asked, workers)
        return like(id_QK, queries), like(distance_QK, queries)

    def exact(self, queries: Any, k: int = 10, filter: Any = None) -> tuple[Any, Any]:
        """The true k nearest of each query: the whole file is read once, all in it is measured. As `search`."""
        k = as_positive(k, "k")
        query_QD = as_vectors(queries, self.dim, self.metric, "queries")
        id_QK, distance_QK = results(len(query_QD), k)
        wanted = None if filter is None else self._prepared(filter)
        asked = Asked(self._held, self._form, self._cache_CW, self._wide(query_QD), wanted, id_QK, distance_QK)
        blocks = np.arange(-(-len(self) // self._form.per))
        with self._open():
            for first in range(0, len(blocks) if len(query_QD) else 0, PIECE):
                # Each piece goes on with the results of those before.
                counts = asked.measure(blocks[first : first + PIECE], 0, len(query_QD))
                self._check(int(counts[search.BAD]))
        return like(id_QK, queries), like(distance_QK, queries)

    def prepare_filter(self, ids_or_mask: Any) -> Filter:
        """A filter for many searches, as `HNSW.prepare_filter`; it takes a byte per vector, and 9 while it is made."""
        made = Filter(ids_or_mask)
        made.on(self._slots)  # type: ignore[arg-type]
        return made

    def stats(self) -> dict[str, Any]:
        """What the index looks like, and what the last search cost.

        Returns:
            ``count``, ``shards`` (in which it was built), ``max_degree``, ``code_bytes``, ``block_bytes``, ``per_block`` (elements in
            one), ``num_cached`` (blocks in memory), ``memory_bytes``, ``size_bytes``, and of the last search ``queries``, ``blocks``
            (read or found in memory), ``codes`` and ``exact`` (distances by codes and by vectors), means per query.
        """
        form, (queries, blocks, codes, exact) = self._form, self._last
        each = max(queries, 1)
        return {
            "count": len(self),
            "shards": self._held.shards,
            "max_degree": form.links,
            "code_bytes": self._held.codes.num_parts,
            "block_bytes": form.block,
            "per_block": form.per,
            "num_cached": self.num_cached,
            "memory_bytes": self.memory_bytes,
            "size_bytes": self.size_bytes,
            "queries": queries,
            "blocks": blocks / each,
            "codes": codes / each,
            "exact": exact / each,
        }

    def verify(self) -> None:
        """Read all blocks and compare them with their digests. Raises DataError naming one that is damaged."""
        form = self._held.form
        room_UW = np.empty((PIECE, form.block >> 3), np.uint64)
        total = -(-len(self) // form.per)
        with self._open():
            for first in range(0, total, PIECE):
                self._check(int(read_blocks(form, first, room_UW[: total - first])))

    # Opening and closing

    def close(self) -> None:
        """Wait for searches under way, and give the file back. What comes later raises InputError."""
        with self._lock.write():
            self._is_closed = True
            self._held.left.file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # Where opening it failed there is no file.
        if "_held" in self.__dict__:
            self._held.left.file.close()

    def __getstate__(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "options": self._options,
            "workers": self.workers,
            "seed": self._form.seed,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        DiskIndex.__init__(self, state["path"], **state["options"], workers=state.get("workers", state.get(FORMER)))
        if self._form.seed != state["seed"]:
            raise DataError(f"{self.path} is another index than the one that was pickled; it was replaced")

    # Inside

    def _open(self) -> "_Reading":
        return _Reading(self)

    def _fill(self, memory: int | None) -> int:
        """Read as many blocks as there is memory for; how many."""
        form, total = self._form, -(-len(self) // self._form.per)
        if memory is None:
            return 0
        if self._held.nbytes > memory:
            raise CapacityError(
                f"memory is {memory:,} bytes, and {self._held.nbytes:,} of {self.path} must be in it; build it with shorter codes"
            )
        # Searches take some: marks of each thread, and pools.
        room = memory - self._held.nbytes - SCRATCH - num_workers(self.workers) * (form.elements // 4)
        number = max(0, min(total, room // form.block))
        cache_CW = np.empty((number, form.block >> 3), np.uint64)
        self._check(int(read_blocks(form, 0, cache_CW)))
        self._cache_CW, self._form = cache_CW, form._replace(cached=number)
        return number

    def _wide(self, query_QD: np.ndarray) -> np.ndarray:
        """As kernels take them: padded with zeros."""
        wide_QD = aligned((len(query_QD), self._form.width), np.float32)
        wide_QD[:, : self.dim], wide_QD[:, self.dim :] = query_QD, 0
        return wide_QD

    def _prepared(self, filter: Any) -> Prepared:
        slots: Any = self._slots
        return filter.on(slots) if isinstance(filter, Filter) else prepared(filter, slots)

    def _run(self, asked: Asked, workers: int | None) -> None:
        parts: list[np.ndarray] = []

        def piece(begin: int, end: int) -> None:
            for first in range(begin, end, PIECE):
                parts.append(asked.answer(first, min(end, first + PIECE)))
                self._check(int(parts[-1][search.BAD]))

        with Workers(self.workers if workers is None else as_positive(workers, "workers")) as pool:
            pool.run(piece, len(asked.query_QD))
        blocks, codes, exact = (
            sum(int(part[place]) for part in parts) for place in (search.BLOCKS, search.CODES, search.EXACT)
        )
        self._last = (len(asked.query_QD), blocks, codes, exact)

    def _check(self, number: int) -> None:
        """Raises DataError for a block that could not be read as it was written, and tells the system's own reason if it has one."""
        if number >= 0:
            raise DataError(f"{self.path} is damaged or was cut: block {number:,} {self._held.why_bad(number)}")


class _Reading:
    """Around what reads the file: it is not closed meanwhile."""

    def __init__(self, index: DiskIndex) -> None:
        self._index, self._entered = index, index._lock.read()

    def __enter__(self) -> Form:
        self._entered.__enter__()
        if self._index._is_closed:
            self._entered.__exit__(None, None, None)
            raise InputError(f"{self._index.path} was closed")
        return self._index._form

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered.__exit__(kind, error, trace)
