"""`EdgeSink`: takes edges in chunks, in memory or spilled to disk, and gives the graph, the same to the byte either way.

With a limit, edges go to temporary files as they come (20 bytes each), then, expanded to both directions, into segments of consecutive rows
that fit the limit; each segment is sorted and merged by the kernels that build a graph in memory. A graph that is itself larger than half
the limit ends in a temporary file and is mapped: it takes memory only while it is read, and that the system can take back.
"""
# Shapes: N nodes, E edges as given, M stored edges, B segments

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numba as nb
import numpy as np

from anabranch.errors import CapacityError, DataError, InputError
from anabranch.files import is_full
from anabranch.graph import csr
from anabranch.graph.checks import check_room
from anabranch.graph.store import Graph

LEAST_LIMIT = 1 << 20
IDS = ("auto", "numbers", "names", "text")


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How edges become a graph; see `anabranch.graph.formats.read_graph`.

    Attributes:
        directed: False puts each edge into both its rows.
        is_matrix: edges are entries of a matrix: with directed None it is looked whether it is symmetric, with False that is demanded.
        ids: "auto", "numbers", "names" or "text".
        num_nodes: nodes, where ids are numbers.
        duplicates, drop_zero, allow_negative: as in `Graph.from_edges`.
        memory_limit: bytes, or None.
        spill_folder: where temporary files go.
    """

    directed: bool | None = False
    is_matrix: bool = False
    ids: str = "auto"
    num_nodes: int | None = None
    duplicates: str = "add"
    drop_zero: bool = False
    allow_negative: bool = False
    memory_limit: int | None = None
    spill_folder: str | Path | None = None

    @property
    def chunk_rows(self) -> int:
        """Edges that are read at once."""
        return 1 << 20 if self.memory_limit is None else min(1 << 20, max(1 << 10, self.memory_limit // 1024))

    @property
    def block_bytes(self) -> int:
        """Bytes of text that are read at once; taken apart they are up to 20 times as many."""
        return 1 << 22 if self.memory_limit is None else min(1 << 22, max(1 << 12, self.memory_limit // 128))


class EdgeSink:
    """Edges as they are read. Fill it with `add` or `add_text` (not both), then `finish`; it is a context that closes its files.

    Args:
        rules: how edges become a graph.
        path: where they come from, for messages.
        is_weighted: whether they have weights.
    """

    def __init__(self, rules: Rules, path: Path | str, is_weighted: bool) -> None:
        self.rules = rules
        self.path = path
        self.is_weighted = is_weighted
        self.count = 0  # edges kept
        self.seen = 0  # edges given
        self.low, self.high = 0, -1
        self._codes: dict[str, int] | None = None
        self._chunks: list[csr.Chunk] = []
        self._files: list[BinaryIO] = []

    def __enter__(self) -> "EdgeSink":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.close()

    def add(self, source_E: np.ndarray, target_E: np.ndarray, weight_E: np.ndarray | None) -> None:
        """Take integers and checked float32 weights. Edges of weight 0 are left out (whoever checks them knows whether they may be)."""
        self.seen += len(source_E)
        if len(source_E):
            self.low = min(self.low, int(source_E.min()), int(target_E.min()))
            self.high = max(self.high, int(source_E.max()), int(target_E.max()))
        if weight_E is not None and not weight_E.all():
            kept = weight_E != 0
            source_E, target_E, weight_E = source_E[kept], target_E[kept], weight_E[kept]
        self.count += len(source_E)
        if self.rules.memory_limit is not None:
            self._spill(source_E, target_E, weight_E)
            return
        narrow = np.int32 if self.low >= -csr.INT32 and self.high <= csr.INT32 else np.int64
        self._chunks.append((source_E.astype(narrow), target_E.astype(narrow), weight_E))

    def add_text(self, source_E: Any, target_E: Any, weight_E: np.ndarray | None) -> None:
        """Take ids as `pyarrow` arrays of text. Nodes that are only in edges of weight 0 are left out with them."""
        self.seen += len(source_E)
        if weight_E is not None and not weight_E.all():
            kept = np.flatnonzero(weight_E)
            source_E, target_E, weight_E = source_E.take(kept), target_E.take(kept), weight_E[kept]
        codes = self._codes = {} if self._codes is None else self._codes
        coded = []
        for array in (source_E, target_E):
            encoded = array.dictionary_encode()
            table = np.array([codes.setdefault(name, len(codes)) for name in encoded.dictionary.to_pylist()], np.int64)
            coded.append(table[encoded.indices.to_numpy()] if len(table) else np.empty(0, np.int64))
        self.add(coded[0], coded[1], weight_E)

    def finish(self) -> Graph:
        """The graph. Raises DataError for duplicates that may not be or a matrix that is not symmetric, and CapacityError."""
        try:
            return self._build()
        except InputError as error:
            raise DataError(f"{self.path}: {error}") from error
        except MemoryError as error:
            raise CapacityError(
                f"{self.path} does not fit into memory ({self.count:,} edges so far); give `memory_limit`, so that it is built on disk"
            ) from error

    def _build(self) -> Graph:
        rules = self.rules
        num_nodes, names, rename = self._resolve()
        check_room(num_nodes)
        directed = bool(rules.directed) or rules.is_matrix

        def chunks() -> Iterator[csr.Chunk]:
            for source_E, target_E, weight_E in self._stored():
                yield (rename(source_E), rename(target_E), weight_E) if rename else (source_E, target_E, weight_E)

        options: dict[str, Any] = {
            "directed": directed,
            "is_weighted": self.is_weighted,
            "duplicates": rules.duplicates,
            "drop_zero": rules.drop_zero,
        }
        need = Graph.estimate_bytes(num_nodes, self.count, self.is_weighted, directed).build
        if rules.memory_limit is None or need + 64 * rules.chunk_rows <= rules.memory_limit:
            arrays = csr.compress(chunks, num_nodes, **options)
        else:
            limit, folder = rules.memory_limit, rules.spill_folder
            arrays = compress_in_segments(
                chunks, num_nodes, limit=limit, folder=folder, rows=rules.chunk_rows, **options
            )
        graph = Graph(*arrays, directed, names)
        return (
            graph._as_undirected(demanded=rules.directed is False) if rules.is_matrix and not rules.directed else graph
        )

    def _resolve(self) -> tuple[int, np.ndarray | None, Callable[[np.ndarray], np.ndarray] | None]:
        """How many nodes there are, what they are called, and what turns ids as read into numbers of nodes."""
        if self._codes is not None:
            names = np.empty(len(self._codes), object)
            names[:] = sorted(self._codes)
            rank = np.empty(len(names), np.int64)
            rank[[self._codes[name] for name in names]] = np.arange(len(names))
            return len(names), names, lambda ids: rank[ids]
        if self.rules.num_nodes is not None:
            return self.rules.num_nodes, None, None
        if self.rules.ids == "numbers":
            return self.high + 1, None, None
        distinct = self._distinct()
        if not len(distinct):
            return 0, None, None
        if self.rules.ids == "auto" and distinct[0] == 0 and len(distinct) == int(distinct[-1]) + 1:
            return len(distinct), None, None
        if distinct[0] >= 0 and distinct[-1] < 4 * len(distinct):
            table = np.zeros(int(distinct[-1]) + 1, np.int64)
            table[distinct] = np.arange(len(distinct))
            return len(distinct), distinct, lambda ids: table[ids]
        return len(distinct), distinct, lambda ids: np.searchsorted(distinct, ids)

    def _distinct(self) -> np.ndarray:
        """All ids, rising, int64."""
        if self.low >= 0 and self.high < 2 * self.count and self.high < (self.rules.memory_limit or 1 << 62) // 8:
            used = np.zeros(self.high + 1, bool)
            for source_E, target_E, _ in self._stored():
                used[source_E] = True
                used[target_E] = True
            return np.flatnonzero(used)
        found, waiting, size = np.empty(0, np.int64), [], 0
        for source_E, target_E, _ in self._stored():
            waiting.append(np.unique(np.append(source_E, target_E)))
            size += len(waiting[-1])
            if size > max(len(found), 1 << 17):
                found, waiting, size = np.unique(np.concatenate([found, *waiting])), [], 0
        return np.unique(np.concatenate([found, *waiting]))

    def _spill(self, source_E: np.ndarray, target_E: np.ndarray, weight_E: np.ndarray | None) -> None:
        with full_disk(self.rules.spill_folder):
            if not self._files:
                for _ in range(3):
                    self._files.append(temporary(self.rules.spill_folder))
            for file, array, dtype in zip(
                self._files, (source_E, target_E, weight_E), (np.int64, np.int64, np.float32), strict=True
            ):
                if array is not None:
                    file.write(np.ascontiguousarray(array, dtype).data)

    def _stored(self) -> Iterator[csr.Chunk]:
        yield from self._chunks
        for file in self._files:
            file.flush()
            file.seek(0)
        left = self.count if self._files else 0
        while left:
            rows = min(left, self.rules.chunk_rows)
            ends = [np.fromfile(file, np.int64, rows) for file in self._files[:2]]
            yield ends[0], ends[1], np.fromfile(self._files[2], np.float32, rows) if self.is_weighted else None
            left -= rows


def compress_in_segments(
    chunks: Callable[[], Iterable[csr.Chunk]],
    num_nodes: int,
    *,
    limit: int,
    folder: str | Path | None,
    rows: int,
    directed: bool,
    is_weighted: bool,
    duplicates: str,
    drop_zero: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """What `csr.compress` gives, in about ``limit`` bytes of memory. Raises also CapacityError if rows or the longest row need more."""
    indptr = np.zeros(num_nodes + 1, np.int64)
    for source_E, target_E, _ in chunks():
        csr.count_rows(source_E, target_E, not directed, indptr[1:])
    longest = int(indptr.max())
    np.cumsum(indptr, out=indptr)
    stored = int(indptr[-1])
    ids = csr.id_type(num_nodes, stored)
    width = np.dtype(ids).itemsize
    # A row number, an id, the id in its place; two weights, and what sorting them takes.
    each = 3 * width + (24 if is_weighted else 0)
    capacity = max(0, limit - indptr.nbytes) // 3 // each
    if longest > 2 * capacity:
        need = indptr.nbytes + 3 * each * max(longest, 1) // 2
        raise CapacityError(
            f"memory_limit is {limit:,} bytes; {num_nodes:,} rows, the longest of {longest:,} edges, need at least {need:,}"
        )
    bounds = segment_bounds(indptr, max(capacity, 1))
    with (
        full_disk(folder),
        temporary(folder) as row_file,
        temporary(folder) as id_file,
        temporary(folder) as weight_file,
    ):
        files = (row_file, id_file, weight_file) if is_weighted else (row_file, id_file)
        _deal(chunks, bounds, indptr, ids, not directed, files)
        sizes = (width, 4) if is_weighted else (width,)
        in_memory = stored * sum(sizes) <= limit // 2
        kinds = (ids, np.float32)
        outputs = [
            _Output(stored, kind, None if in_memory else folder, in_memory)
            for kind, _ in zip(kinds, sizes, strict=False)
        ]
        done, old = 0, 0
        for first, last in pairwise(bounds):
            local = indptr[first : last + 1] - old
            # The place of the row was moved by the segment before.
            local[0] = 0
            count, old = int(local[-1]), old + int(local[-1])
            row_E = np.fromfile(row_file, ids, count)
            id_E = np.fromfile(id_file, ids, count)
            weight_E = np.fromfile(weight_file, np.float32, count) if is_weighted else csr.NO_WEIGHTS
            indices, weights = np.empty(count, ids), np.empty(len(weight_E), np.float32)
            row_E -= ids(first)
            csr.fill_rows(row_E, id_E, weight_E, False, local[:-1].copy(), indices, weights)
            del row_E, id_E, weight_E
            kept = csr.merge(local, indices, weights, duplicates, drop_zero, int(first))
            outputs[0].append(indices[:kept])
            if is_weighted:
                outputs[1].append(weights[:kept])
            indptr[first + 1 : last + 1] = local[1:] + done
            done += kept
        found = [output.finish() for output in outputs]
    if found[0].dtype == np.int64 and csr.id_type(num_nodes, done) is np.int32:
        found[0] = found[0].astype(np.int32)
    return indptr, found[0], found[1] if is_weighted else None


def segment_bounds(indptr: np.ndarray, capacity: int) -> np.ndarray:
    """int64 [B + 1]: segments of rows with up to ``capacity`` edges each, or one row."""
    bounds, last = [0], len(indptr) - 1
    while bounds[-1] < last:
        at = int(np.searchsorted(indptr, indptr[bounds[-1]] + capacity, side="right")) - 1
        bounds.append(min(last, max(at, bounds[-1] + 1)))
    return np.array(bounds, np.int64)


def _deal(
    chunks: Callable[[], Iterable[csr.Chunk]],
    bounds: np.ndarray,
    indptr: np.ndarray,
    ids: type[np.signedinteger],
    both: bool,
    files: tuple[BinaryIO, ...],
) -> None:
    """Write each edge (in both directions, if so) into the part of the files that is its segment's, in the order given."""
    place_B = indptr[bounds[:-1]].copy()
    for source_E, target_E, weight_E in chunks():
        plain = csr.NO_WEIGHTS if weight_E is None else weight_E
        count_B = np.zeros(len(bounds) - 1, np.int64)
        count_segments(source_E, target_E, both, bounds, count_B)
        total = int(count_B.sum())
        next_B = np.cumsum(count_B) - count_B
        row_E, id_E = np.empty(total, ids), np.empty(total, ids)
        moved_E = np.empty(total if len(plain) else 0, np.float32)
        fill_segments(source_E, target_E, plain, both, bounds, next_B.copy(), row_E, id_E, moved_E)
        for segment in np.flatnonzero(count_B):
            part = slice(next_B[segment], next_B[segment] + count_B[segment])
            for file, array in zip(files, (row_E, id_E, moved_E), strict=False):
                file.seek(int(place_B[segment]) * array.itemsize)
                file.write(array[part].data)
            place_B[segment] += count_B[segment]
    for file in files:
        file.flush()
        file.seek(0)


class _Output:
    """An array that grows to at most ``size``: in memory, or in a temporary file that is mapped at the end."""

    def __init__(self, size: int, dtype: Any, folder: str | Path | None, in_memory: bool) -> None:
        self.array = np.empty(size, dtype) if in_memory else None
        self.file = None if in_memory else temporary(folder)
        self.dtype, self.count = dtype, 0

    def append(self, part: np.ndarray) -> None:
        if self.array is not None:
            self.array[self.count : self.count + len(part)] = part
        elif self.file is not None:
            self.file.write(part)
        self.count += len(part)

    def finish(self) -> np.ndarray:
        if self.array is not None:
            self.array.resize(self.count, refcheck=False)
            return self.array
        assert self.file is not None
        # The mapping keeps what is in it.
        with self.file as file:
            file.flush()
            return np.memmap(file, self.dtype, "r", shape=(self.count,)) if self.count else np.empty(0, self.dtype)


def temporary(folder: str | Path | None) -> Any:
    """A file without a name, gone when it is closed. Raises CapacityError if the folder does not do."""
    try:
        return tempfile.TemporaryFile(dir=folder)
    except OSError as error:
        if is_full(error):
            raise
        place = folder or tempfile.gettempdir()
        raise CapacityError(
            f"spill_folder {os.fspath(place)} cannot hold temporary files: {(error.strerror or '').lower()}"
        ) from error


@contextmanager
def full_disk(folder: str | Path | None) -> Iterator[None]:
    """Say of a full disk which one it is."""
    try:
        yield
    except OSError as error:
        if not is_full(error):
            raise
        place = folder or tempfile.gettempdir()
        raise CapacityError(f"no room left for temporary files in {place}; spill_folder names another place") from error


@nb.njit(cache=True, nogil=True)
def _segment(bounds, row):
    low, high = 0, len(bounds) - 1
    while high - low > 1:
        middle = (low + high) // 2
        if bounds[middle] <= row:
            low = middle
        else:
            high = middle
    return low


@nb.njit(cache=True, nogil=True)
def count_segments(source_E, target_E, both, bounds, count_B):
    """How many stored edges go to each segment."""
    for edge in range(len(source_E)):
        count_B[_segment(bounds, source_E[edge])] += 1
        if both and source_E[edge] != target_E[edge]:
            count_B[_segment(bounds, target_E[edge])] += 1


@nb.njit(cache=True, nogil=True)
def fill_segments(source_E, target_E, weight_E, both, bounds, next_B, row_E, id_E, moved_E):
    """Order stored edges by segment, within one as given."""
    weighted = len(moved_E) > 0
    for edge in range(len(source_E)):
        for turn in range(2 if both and source_E[edge] != target_E[edge] else 1):
            row = source_E[edge] if turn == 0 else target_E[edge]
            other = target_E[edge] if turn == 0 else source_E[edge]
            segment = _segment(bounds, row)
            place = next_B[segment]
            next_B[segment] = place + 1
            row_E[place], id_E[place] = row, other
            if weighted:
                moved_E[place] = weight_E[edge]
