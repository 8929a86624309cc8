"""Sparse rows of scores: what PageRank from many nodes gives, what an index of it holds, and how both lie in a file.

A row is about one node (or one query) and lists columns with their scores, largest first, ties by rising id. Rows may be cut to their
largest entries; nothing else is assumed of them (they need not sum to 1).
"""
# Shapes: R rows, Z stored entries, N columns

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any, Self

import numba as nb
import numpy as np
from numpy.typing import ArrayLike

from anabranch.bounds import is_whole, shown
from anabranch.errors import DataError, InputError
from anabranch.files import explained
from anabranch.graph.arguments import as_path
from anabranch.graph.array_file import read_arrays, write_arrays
from anabranch.graph.beside import check_unchanged
from anabranch.graph.header import described, whole
from anabranch.graph.masks import unmasked

KIND = "sparse-rows"
INT32 = np.iinfo(np.int32).max


def id_type(num_columns: int) -> type[np.signedinteger]:
    """int32 where ids of that many columns fit, int64 otherwise."""
    return np.int32 if num_columns <= INT32 else np.int64


def check_rows(
    indptr: Any, ids: Any, values: Any | None, num_columns: int, num_rows: int | None, source: str, what: str = "rows"
) -> None:
    """Raise DataError unless kernels, which look at no bound, may read these rows. All ids are read once, also where they are mapped.

    Args:
        indptr: where rows start.
        ids: columns.
        values: of the same length; None where there are none.
        num_columns: ids are below.
        num_rows: there must be; None for any number.
        source: named in the error, as ``what`` is.
    """
    if not (
        isinstance(indptr, np.ndarray)
        and indptr.dtype == np.int64
        and indptr.ndim == 1
        and len(indptr)
        and isinstance(ids, np.ndarray)
        and ids.dtype in (np.int32, np.int64)
        and ids.ndim == 1
        and (num_rows is None or len(indptr) == num_rows + 1)
        and (
            values is None
            or (isinstance(values, np.ndarray) and values.dtype.kind in "fiu" and values.shape == ids.shape)
        )
    ):
        raise DataError(f"{source} is damaged: its {what} are not lists that belong together; make it again")
    if (row := _find_fault(indptr, ids, num_columns)) >= 0:
        raise DataError(f"{source} is damaged: row {row} of its {what} is out of range; make it again")


@nb.njit(cache=True, nogil=True)
def _find_fault(indptr, ids, num_columns):
    """The first row whose ends are out of order or range, or that has an id out of range; -1 if there is none."""
    rows = len(indptr) - 1
    if indptr[0] != 0:
        return 0
    for row in range(rows):
        start, end = indptr[row], indptr[row + 1]
        if end < start or end > len(ids):
            return row
        for place in range(start, end):
            if ids[place] < 0 or ids[place] >= num_columns:
                return row
    return -1 if indptr[rows] == len(ids) else rows


@dataclass(frozen=True, eq=False)
class SparseRows:
    """Rows of scores.

    Attributes:
        indptr: int64 [R + 1], where each row starts.
        ids: int32 or int64 [Z], columns, in the order of their scores.
        values: float16, float32 or float64 [Z], scores, falling within a row.
        num_columns: N.
        nodes: int64 [R], the node that each row is about; None where row i is about node i (or the i-th query).
        names: what columns are called outside, [N], where nodes of the graph have names; not written by `save`.
    """

    indptr: np.ndarray
    ids: np.ndarray
    values: np.ndarray
    num_columns: int
    nodes: np.ndarray | None = None
    names: np.ndarray | None = None

    @classmethod
    def from_rows(
        cls,
        rows: Sequence[tuple[ArrayLike, ArrayLike]],
        num_columns: int,
        *,
        dtype: Any = np.float32,
        nodes: np.ndarray | None = None,
        names: np.ndarray | None = None,
    ) -> Self:
        """Rows given one by one as ``(ids, values)``, already in order."""
        lengths = [len(np.asarray(ids)) for ids, _ in rows]
        indptr = np.append(0, np.cumsum(lengths)).astype(np.int64)
        ids = np.concatenate([np.asarray(ids) for ids, _ in rows]) if rows else np.empty(0)
        values = np.concatenate([np.asarray(values) for _, values in rows]) if rows else np.empty(0)
        return cls(indptr, ids.astype(id_type(num_columns)), values.astype(dtype), num_columns, nodes, names)

    def __len__(self) -> int:
        return len(self.indptr) - 1

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays."""
        extra = 0 if self.nodes is None else self.nodes.nbytes
        return self.indptr.nbytes + self.ids.nbytes + self.values.nbytes + extra

    def row(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Ids and values of a row, views. Raises InputError for a row that is not there."""
        if not is_whole(number) or not 0 <= number < len(self):
            raise InputError(f"row {shown(number)} is not one of the {len(self):,} rows")
        start, end = self.indptr[number], self.indptr[number + 1]
        return self.ids[start:end], self.values[start:end]

    def named(self, number: int) -> list[tuple[Any, float]]:
        """The same as pairs of name and value, by falling value; ids where columns have no names."""
        ids, values = self.row(number)
        found = ids if self.names is None else self.names[ids]
        return list(zip(found.tolist(), values.tolist(), strict=True))

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        return (self.row(number) for number in range(len(self)))

    def top(self, k: int | None) -> "SparseRows":
        """Every row cut to its ``k`` largest entries, None for all. Raises InputError unless k is at least 1."""
        if k is None:
            return self
        length_R = np.minimum(np.diff(self.indptr), check_top_k(k, "k"))
        indptr = np.append(0, np.cumsum(length_R)).astype(np.int64)
        kept = np.repeat(self.indptr[:-1] - indptr[:-1], length_R) + np.arange(indptr[-1])
        return replace(self, indptr=indptr, ids=self.ids[kept], values=self.values[kept])

    def take(self, numbers: np.ndarray) -> "SparseRows":
        """The rows of these numbers, in this order; itself where that is all of them as they are. Raises InputError for others."""
        numbers = _row_numbers(numbers, len(self))
        if np.array_equal(numbers, np.arange(len(self))):
            return self
        length_R = np.diff(self.indptr)[numbers]
        indptr = np.append(0, np.cumsum(length_R)).astype(np.int64)
        kept = np.repeat(self.indptr[:-1][numbers] - indptr[:-1], length_R) + np.arange(indptr[-1])
        nodes = None if self.nodes is None else self.nodes[numbers]
        return replace(self, indptr=indptr, ids=self.ids[kept], values=self.values[kept], nodes=nodes)

    def sums(self) -> np.ndarray:
        """float64 [R], the sum of each row."""
        running = np.append(0.0, np.cumsum(self.values, dtype=np.float64))
        return running[self.indptr[1:]] - running[self.indptr[:-1]]

    def to_scipy(self) -> Any:
        """`scipy.sparse.csr_array` [R, N] of float32 or float64 (scipy has no float16), columns in rising order."""
        from scipy.sparse import csr_array

        values = self.values.astype(np.float32) if self.values.dtype == np.float16 else self.values.copy()
        found = csr_array((values, self.ids.copy(), self.indptr.copy()), shape=(len(self), self.num_columns))
        found.sort_indices()
        return found

    def save(self, path: str | Path) -> None:
        """Write the rows into one checked file, all or nothing. Raises as `anabranch.files.atomic_file`."""
        arrays = {"indptr": self.indptr, "ids": self.ids, "values": self.values}
        if self.nodes is not None:
            arrays["nodes"] = self.nodes
        write_arrays(path, KIND, arrays, {"num_columns": self.num_columns})

    @classmethod
    def load(cls, path: str | Path, *, mmap: bool = False) -> Self:
        """Read what `save` or `RowFile` wrote. Raises DataError for a file that is missing, foreign, truncated or damaged."""
        found = read_arrays(path, KIND, mmap=mmap)
        return cls.checked(found.arrays, found.meta, path)

    @classmethod
    def checked(cls, arrays: Mapping[str, np.ndarray], meta: Mapping[str, Any], path: str | Path) -> Self:
        """Rows of a file. Raises DataError if they do not fit together, or reach out of range."""
        indptr, ids, values, nodes = (arrays.get(name) for name in ("indptr", "ids", "values", "nodes"))
        with described(path, "rows of scores"):
            num_columns = whole(meta["num_columns"], "num_columns")
            if values is None:
                raise ValueError("there are no values")
        check_rows(indptr, ids, values, num_columns, None, str(path))
        if nodes is not None:
            has_place = nodes.dtype.kind in "iu" and nodes.shape == (len(indptr) - 1,)  # type: ignore[arg-type]
            if not has_place or nodes.min(initial=0) < 0:
                raise DataError(f"{path} is damaged: its nodes are out of range; make it again")
        return cls(indptr, ids, values, num_columns, nodes)  # type: ignore[arg-type]


def _row_numbers(numbers: Any, count: int) -> np.ndarray:
    """int64, from 0 to below ``count``. Raises InputError for others."""
    try:
        found = np.asarray(unmasked(numbers, "numbers"))
    except ValueError as error:
        raise InputError(f"numbers of rows must be one list: {error}") from None
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        raise InputError(
            f"numbers of rows are {found.dtype} {list(found.shape)}; they must be one list of whole numbers"
        )
    bad = np.flatnonzero((found < 0) | (found >= count))
    if bad.size:
        raise InputError(f"row {found[bad[0]]} is not one of the {count:,} rows")
    return found.astype(np.int64)


class RowFile:
    """Rows written to disk as they are made, in memory of one chunk.

    Chunks go to two plain files in a temporary folder beside ``path``; at the end they become one checked array file. Use `row_file`.
    """

    def __init__(self, folder: Path, num_columns: int, dtype: Any) -> None:
        self.num_columns, self.dtype = num_columns, np.dtype(dtype)
        self._lengths: list[np.ndarray] = []
        self._paths = {"ids": folder / "ids", "values": folder / "values"}
        self._types = {"ids": np.dtype(id_type(num_columns)), "values": self.dtype}
        self._files: dict[str, IO[bytes]] = {name: open(path, "wb") for name, path in self._paths.items()}

    def append(self, rows: SparseRows) -> None:
        """Add rows after those there are."""
        self._lengths.append(np.diff(rows.indptr))
        self._files["ids"].write(np.ascontiguousarray(rows.ids, self._types["ids"]).data)
        self._files["values"].write(np.ascontiguousarray(rows.values, self.dtype).data)

    def arrays(self) -> dict[str, np.ndarray]:
        """What was written, mapped from disk."""
        self.close()
        length_R = np.concatenate([np.empty(0, np.int64), *self._lengths])
        found = {"indptr": np.append(0, np.cumsum(length_R)).astype(np.int64)}
        for name, path in self._paths.items():
            dtype = self._types[name]
            found[name] = np.memmap(path, dtype, "r") if os.path.getsize(path) else np.empty(0, dtype)
        return found

    def close(self) -> None:
        """Close the plain files."""
        for file in self._files.values():
            file.close()


@contextmanager
def row_file(
    path: str | Path,
    num_columns: int,
    dtype: Any = np.float32,
    *,
    kind: str = KIND,
    extra: Mapping[str, np.ndarray] | None = None,
    meta: Mapping[str, Any] | None = None,
) -> Iterator[RowFile]:
    """Yield a `RowFile`; on a clean exit ``path`` is written whole, otherwise it stays as it was.

    Args:
        path: the file that comes out.
        num_columns: N.
        dtype: of values.
        kind: of the file; that of `SparseRows` unless the caller reads it differently.
        extra: further arrays of the file, read when it is written (they may be filled while rows are).
        meta: further facts, read at the end too.
    """
    path = as_path(path)
    # In the end it would be too late to say so.
    check_unchanged(path)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent)
    with beside as folder:
        rows = RowFile(Path(folder), num_columns, dtype)
        try:
            yield rows
            write_arrays(path, kind, {**rows.arrays(), **(extra or {})}, {"num_columns": num_columns, **(meta or {})})
        finally:
            rows.close()


def check_top_k(top_k: int | None, name: str = "top_k") -> int:
    """``top_k`` as a number, 0 for None (all). Raises InputError, which begins with ``name``, unless it is at least 1."""
    if top_k is None:
        return 0
    if not is_whole(top_k) or top_k < 1:
        raise InputError(f"{name} is {shown(top_k)}; it must be a whole number of at least 1, or None for all")
    # More than there can be nodes, and a number that kernels take.
    return min(int(top_k), 2**40)


@nb.njit(cache=True, nogil=True)
def _before(value, node, other_value, other_node):
    """Whether an entry comes before another: larger, or as large with the smaller id."""
    return value > other_value or (value == other_value and node < other_node)


@nb.njit(cache=True, nogil=True)
def _sift(ids, values, place, count):
    """Let the entry at ``place`` sink in a heap whose root is the last in order."""
    node, value = ids[place], values[place]
    while True:
        child = 2 * place + 1
        if child >= count:
            break
        if child + 1 < count and _before(values[child], ids[child], values[child + 1], ids[child + 1]):
            child += 1
        if not _before(value, node, values[child], ids[child]):
            break
        ids[place], values[place] = ids[child], values[child]
        place = child
    ids[place], values[place] = node, value


@nb.njit(cache=True, nogil=True)
def grown(array, size):
    """``array``, or a larger copy of it that holds ``size``."""
    if size <= len(array):
        return array
    larger = np.empty(max(size, 2 * len(array)), array.dtype)
    larger[: len(array)] = array
    return larger


@nb.njit(cache=True, nogil=True)
def order_top(ids, values, count, top_k):
    """Bring the ``top_k`` first of ``count`` entries to the front, in order, in place; 0 orders all. Returns how many stand there."""
    kept = count if top_k == 0 or top_k > count else top_k
    if kept == 0:
        return 0
    for place in range(kept // 2 - 1, -1, -1):
        _sift(ids, values, place, kept)
    for place in range(kept, count):
        if _before(values[place], ids[place], values[0], ids[0]):
            ids[0], values[0] = ids[place], values[place]
            _sift(ids, values, 0, kept)
    for last in range(kept - 1, 0, -1):
        node, value = ids[0], values[0]
        ids[0], values[0] = ids[last], values[last]
        ids[last], values[last] = node, value
        _sift(ids, values, 0, last)
    return kept


def top_of_dense(score_N: np.ndarray, top_k: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Ids int64 and scores of the ``top_k`` largest positive entries of a dense row, in order; None for all of them."""
    kept = check_top_k(top_k)
    if kept and kept < len(score_N):
        ids, values = np.empty(kept, np.int64), np.empty(kept, score_N.dtype)
        found = _top_dense(np.ascontiguousarray(score_N), ids, values)
        return ids[:found], values[:found]
    ids = np.flatnonzero(score_N > 0)
    # Ids rise, so ties do.
    order = np.argsort(-score_N[ids], kind="stable")
    return ids[order], score_N[ids[order]]


@nb.njit(cache=True, nogil=True)
def _top_dense(score_N, ids, values):
    """Fill ``ids`` and ``values`` with the largest positive entries, in order; returns how many there are."""
    size, found = len(ids), 0
    for node in range(len(score_N)):
        value = score_N[node]
        if not value > 0:
            continue
        if found < size:
            ids[found], values[found] = node, value
            found += 1
            if found == size:
                for place in range(size // 2 - 1, -1, -1):
                    _sift(ids, values, place, size)
        elif value > values[0]:
            # A tie has the larger id.
            ids[0], values[0] = node, value
            _sift(ids, values, 0, size)
    return order_top(ids, values, found, 0)
