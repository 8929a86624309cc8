"""The index as a value: rows of counts of one graph, what makes scores of them, and how they lie on disk."""
# Shapes: N nodes, R indexed nodes, Z entries

import zlib
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numba as nb
import numpy as np

from anabranch.errors import DataError, InputError, first_line
from anabranch.graph.array_file import read_arrays, write_arrays
from anabranch.graph.header import described, whole
from anabranch.graph.powerwalk.index import Chunk, stored_counts
from anabranch.graph.powerwalk.query import Leaky, Lookup, QueryBuffers, read_count
from anabranch.graph.ppr.rules import Transition
from anabranch.graph.rows import RowFile, SparseRows, check_rows, id_type
from anabranch.graph.store import Graph
from anabranch.graph.stored_folder import WALKS, read_facts, read_table

KIND = "powerwalk-index"

# Of a folder of Parquet files that Spark wrote (`anabranch.graph.fully_ppr.walk_index`).


class Index:
    """Fingerprints of some nodes of a graph.

    Attributes:
        transition: of the graph.
        indptr, ids, counts: rows of all nodes, empty for those without a fingerprint.
        has_N: which have one.
        total_N: int64, counts of each row before it was cut.
        cut_N: int64, walks of each row that ``max_steps`` cut.
        seen_ptr, seen: tracked visits, [N + 1] and ids; empty where they are not tracked.
        unit: what a count is worth in the unbiased estimate, or 0 for the ratio.
        spare: buffers that queries hand on.
    """

    def __init__(self, transition: Transition, arrays: dict[str, np.ndarray], unit: float) -> None:
        self.transition, self.unit = transition, unit
        self.indptr, self.ids, self.counts = arrays["indptr"], arrays["ids"], arrays["values"]
        self.has_N, self.total_N, self.cut_N = arrays["has"], arrays["total"], arrays["cut"]
        self.seen_ptr, self.seen = arrays["seen_ptr"], arrays["seen"]
        self.spare: list[QueryBuffers] = []

    @cached_property
    def leaky(self) -> Leaky:
        """What kernels walk on."""
        return Leaky.of(self.transition)

    @cached_property
    def lookup(self) -> Lookup:
        """What kernels read."""
        if self.unit:
            scale_N = np.full(self.transition.num_nodes, self.unit)
        else:
            scale_N = self._sum_N / np.maximum(self.total_N, 1)
        return Lookup.of(self.indptr, self.ids, self.counts, scale_N)

    @cached_property
    def _sum_N(self) -> np.ndarray:
        """What the estimates of a row should sum to: h; or, if dead ends will count 1 / alpha times, less by as much as its own do."""
        transition = self.transition
        if transition.dangling != "absorb" or not len(transition.dangling_nodes):
            return transition.stay_N
        counts = self.counts.astype(np.float64)
        absorbed = np.where(transition.inverse_N[self.ids] == 0, counts / transition.alpha, counts)
        size = transition.num_nodes
        plain_N = SparseRows(self.indptr, self.ids, counts, size).sums()
        return np.divide(
            plain_N, SparseRows(self.indptr, self.ids, absorbed, size).sums(), out=np.ones(size), where=plain_N > 0
        )

    @cached_property
    def kept_N(self) -> np.ndarray:
        """float64 [N], the share of each row's counts that was kept; 1 where there is no row."""
        sums_N = SparseRows(self.indptr, self.ids, self.counts, self.transition.num_nodes).sums()
        return np.divide(sums_N, self.total_N, out=np.ones(len(sums_N)), where=self.total_N > 0)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in self.arrays().values())

    def arrays(self) -> dict[str, np.ndarray]:
        """By the names they have in a file."""
        return {
            "indptr": self.indptr,
            "ids": self.ids,
            "values": self.counts,
            "has": self.has_N,
            "total": self.total_N,
            "cut": self.cut_N,
            "seen_ptr": self.seen_ptr,
            "seen": self.seen,
        }

    def save(self, path: str | Path, meta: dict[str, Any]) -> None:
        """Write it, all or nothing, with the mark of the graph."""
        write_arrays(path, KIND, self.arrays(), {**meta, "graph": mark(self.transition.graph)})

    def take_buffers(self) -> QueryBuffers:
        """Those of an earlier query, or new ones."""
        try:
            return self.spare.pop()
        except IndexError:
            return QueryBuffers.of(self.transition.num_nodes)

    def stale(self, changed_N: np.ndarray) -> np.ndarray:
        """float64 [N]: the share of each row's counts that lies on changed nodes; at least a trace where walks saw one."""
        share_N = np.zeros(self.transition.num_nodes)
        _mark_stale(self.indptr, self.ids, self.lookup.values, self.lookup.table, changed_N, self.total_N, share_N)
        if len(self.seen):
            _mark_seen(self.seen_ptr, self.seen, changed_N, share_N)
        return share_N

    def grown(self, transition: Transition) -> "Index":
        """The index for another graph, whose nodes beyond those of this one have no rows yet."""
        arrays, more = self.arrays(), transition.num_nodes - len(self.has_N)
        if more:
            for name in ("indptr", "seen_ptr"):
                if len(arrays[name]):
                    arrays[name] = np.append(arrays[name], np.full(more, arrays[name][-1]))
            for name in ("has", "total", "cut"):
                arrays[name] = np.append(arrays[name], np.zeros(more, arrays[name].dtype))
            for name in ("ids", "seen"):
                arrays[name] = arrays[name].astype(id_type(transition.num_nodes), copy=False)
        return Index(transition, arrays, self.unit)

    def replaced(self, transition: Transition, nodes: np.ndarray, made: "Gathered") -> "Index":
        """The index with the rows of ``nodes`` from ``made``, for another graph of as many nodes."""
        facts = made.facts()
        is_new_N = np.zeros(transition.num_nodes, bool)
        is_new_N[nodes] = True
        new_ids, new_counts = made.entries()
        arrays = self.arrays()
        arrays["indptr"], arrays["ids"], arrays["values"] = _merged(
            (self.indptr, self.ids, self.counts), (facts["indptr"], new_ids, new_counts), is_new_N
        )
        if len(self.seen_ptr):
            arrays["seen_ptr"], arrays["seen"], _ = _merged(
                (self.seen_ptr, self.seen, self.seen), (facts["seen_ptr"], facts["seen"], facts["seen"]), is_new_N
            )
        for name in ("total", "cut", "has"):
            arrays[name] = np.where(is_new_N, facts[name], arrays[name])
        return Index(transition, arrays, self.unit)


class Gathered:
    """Chunks of rows as they come, and the index they make."""

    def __init__(self, num_nodes: int, sources: np.ndarray, dtype: Any, track: bool) -> None:
        self.num_nodes, self.sources, self.dtype, self.track = num_nodes, sources, dtype, track
        self._chunks: list[Chunk] = []
        self._parts: list[tuple[np.ndarray, np.ndarray]] = []

    def append(self, chunk: Chunk, file: RowFile | None = None) -> None:
        """Add rows, to memory or to the file."""
        counts = stored_counts(chunk.counts, self.dtype)
        if file is None:
            self._parts.append((chunk.ids, counts))
        else:
            indptr = np.append(0, np.cumsum(chunk.length_S)).astype(np.int64)
            file.append(SparseRows(indptr, chunk.ids, counts, self.num_nodes))
        empty = np.empty(0, np.float32)
        self._chunks.append(Chunk(**{**vars(chunk), "ids": chunk.ids[:0], "counts": empty}))

    def entries(self) -> tuple[np.ndarray, np.ndarray]:
        """ids and counts of all rows."""
        if not self._parts:
            return np.empty(0, id_type(self.num_nodes)), np.empty(0, self.dtype)
        ids, counts = zip(*self._parts, strict=True)
        return np.concatenate(ids), np.concatenate(counts)

    def facts(self) -> dict[str, np.ndarray]:
        """All arrays of the index but ids and counts."""
        has_N = np.zeros(self.num_nodes, bool)
        has_N[self.sources] = True
        found = {"has": has_N, "indptr": self._starts("length_S")}
        for name, field in (("total", "total_S"), ("cut", "cut_S")):
            found[name] = np.zeros(self.num_nodes, np.int64)
            found[name][self.sources] = self._joined(field)
        found["seen_ptr"] = self._starts("seen_length_S") if self.track else np.empty(0, np.int64)
        seen = [chunk.seen for chunk in self._chunks]
        found["seen"] = np.concatenate([np.empty(0, id_type(self.num_nodes)), *seen])
        return found

    def _joined(self, field: str) -> np.ndarray:
        return np.concatenate([np.empty(0, np.int64), *(getattr(chunk, field) for chunk in self._chunks)])

    def _starts(self, field: str) -> np.ndarray:
        length_N = np.zeros(self.num_nodes, np.int64)
        length_N[self.sources] = self._joined(field)
        return np.append(0, np.cumsum(length_N)).astype(np.int64)

    def index(self, transition: Transition, unit: float) -> Index:
        """The index of all rows."""
        ids, counts = self.entries()
        return Index(transition, {**self.facts(), "ids": ids, "values": counts}, unit)


def read(path: str | Path, *, mmap: bool, verify: bool | None = None) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and meta of a file; ``verify`` as in `read_arrays`.

    Raises DataError for one that is missing, foreign, truncated or damaged.
    """
    found = read_arrays(path, KIND, mmap=mmap, verify=verify)
    _check(found.arrays, found.meta, str(path))
    return found.arrays, found.meta


def read_folder(path: Path, graph: Graph, dtype_of: Callable[[str], Any]) -> tuple["Gathered", dict[str, Any]]:
    """Rows of an index that Spark wrote, for the graph that its edges make here, and the arguments it was made by.

    ``dtype_of`` gives the type of counts by its name. Raises DataError for a folder that is not whole, not an index, or of another graph.
    """
    try:
        facts, table = read_facts(path, WALKS), read_table(path)
        params, of = facts["params"], facts["graph"]
        source, target, count, total = (table[name] for name in ("source", "target", "count", "total"))
        found = {"num_nodes": graph.num_nodes, "num_stored_edges": len(graph.indices)}
        wanted = {name: of[name] for name in found}
        dtype = dtype_of(params["dtype"])
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"cannot read the index in {path}: {first_line(error)}") from error
    if found != wanted:
        raise DataError(f"{path} is the index of another graph: {wanted}, this one has {found}; build it again")
    try:
        source_Z, target_Z = (_numbers(column, graph) for column in (source, target))
    except InputError as error:
        raise DataError(f"{path} is the index of another graph: {error}") from None
    count_Z, total_Z = count.to_numpy(), total.to_numpy()
    order = np.lexsort((target_Z, -count_Z, source_Z))
    source_Z, target_Z, count_Z, total_Z = source_Z[order], target_Z[order], count_Z[order], total_Z[order]
    length_N = np.bincount(source_Z, minlength=graph.num_nodes)
    total_N = np.zeros(graph.num_nodes, np.int64)
    total_N[source_Z] = total_Z
    none = np.zeros(graph.num_nodes, np.int64)
    ids = target_Z.astype(id_type(graph.num_nodes))
    made = Gathered(graph.num_nodes, np.arange(graph.num_nodes), dtype, track=False)
    made.append(Chunk(length_N, ids, count_Z.astype(np.float32), total_N, none, none[:0], ids[:0]))
    return made, params


def _numbers(column: Any, graph: Graph) -> np.ndarray:
    """Numbers of nodes from their ids in a table, each distinct one looked up once. Raises InputError for one that is no node."""
    encoded = column.combine_chunks().dictionary_encode()
    known = graph.ids_of(encoded.dictionary.to_pylist())
    return known[encoded.indices.to_numpy()]


def _check(arrays: dict[str, np.ndarray], meta: dict[str, Any], path: str) -> None:
    """Kernels follow rows without looking, so they are looked at here, also where they are mapped. Raises DataError."""
    with described(path, "an index of walks"):
        of = {name: whole(meta["graph"][name], name) for name in ("num_nodes", "num_stored_edges", "crc")}
        num_nodes = of["num_nodes"]
        facts = [arrays[name] for name in ("has", "total", "cut")]
        starts, ids, counts, seen_starts, seen = (
            arrays[name] for name in ("indptr", "ids", "values", "seen_ptr", "seen")
        )
    kinds = (bool, np.int64, np.int64)
    if any(array.dtype != kind or array.shape != (num_nodes,) for array, kind in zip(facts, kinds, strict=True)):
        raise DataError(f"{path} is damaged: what it says of nodes is not one number for each; build it again")
    if counts.dtype not in (np.float16, np.float32):
        raise DataError(f"{path} is damaged: its counts are {counts.dtype}; build it again")
    check_rows(starts, ids, counts, num_nodes, num_nodes, path)
    if len(seen_starts) or len(seen):
        check_rows(seen_starts, seen, None, num_nodes, num_nodes, path, "visits")


def mark(graph: Graph) -> dict[str, int]:
    """What tells graphs apart: sizes and a checksum of the arrays."""
    crc = 0
    for array in (graph.indptr, graph.indices, graph.weights):
        if array is not None:
            crc = zlib.crc32(np.ascontiguousarray(array).view(np.uint8).data, crc)
    return {"num_nodes": graph.num_nodes, "num_stored_edges": len(graph.indices), "crc": crc}


def check_mark(path: str | Path, found: dict[str, int], graph: Graph) -> None:
    """Raises DataError unless the index was made of this graph."""
    here = mark(graph)
    if found != here:
        raise DataError(
            f"{path} is the index of another graph ({found['num_nodes']:,} nodes, {found['num_stored_edges']:,} stored edges, "
            f"checksum {found['crc']:08x}; this one {here['num_nodes']:,}, {here['num_stored_edges']:,}, {here['crc']:08x}); "
            "build it again, or load it with the old graph and `update`"
        )


def check_successor(old: Graph, new: Graph) -> None:
    """Raises InputError unless the nodes of ``old`` are the first of ``new``."""
    if new.num_nodes < old.num_nodes:
        raise InputError(
            f"the graph has {new.num_nodes:,} nodes, the index {old.num_nodes:,}; nodes do not go away: remove their edges, or "
            "build a new index"
        )
    if old.names is not None and new.names is not None:
        differ = np.flatnonzero(new.names[: old.num_nodes] != old.names)
        if differ.size:
            place = differ[0]
            raise InputError(
                f"node {place} is {new.names[place]!r} in the graph and {old.names[place]!r} in the index; keep the order of "
                "nodes, with new ones after the old"
            )


def changed_nodes(old: Graph, new: Graph) -> np.ndarray:
    """bool [N of the old graph]: its nodes whose out-edges or their weights differ in the new one, which has no fewer nodes."""
    differs_N = np.zeros(old.num_nodes, bool)
    empty = np.empty(0, np.float32)
    before, after = (empty if graph.weights is None else graph.weights for graph in (old, new))
    _differ(old.indptr, old.indices, new.indptr, new.indices, before, after, differs_N)
    return differs_N


@nb.njit(cache=True, nogil=True)
def _differ(old_ptr, old_ids, new_ptr, new_ids, old_weight_M, new_weight_M, differs_N):
    for node in range(len(differs_N)):
        start, other = old_ptr[node], new_ptr[node]
        count = old_ptr[node + 1] - start
        differs = count != new_ptr[node + 1] - other
        edge = 0
        while not differs and edge < count:
            differs = old_ids[start + edge] != new_ids[other + edge]
            if not differs:
                before = old_weight_M[start + edge] if len(old_weight_M) else np.float32(1.0)
                after = new_weight_M[other + edge] if len(new_weight_M) else np.float32(1.0)
                differs = before != after
            edge += 1
        differs_N[node] = differs


@nb.njit(cache=True, nogil=True)
def _mark_stale(indptr, ids, values, table, changed_N, total_N, share_N):
    for node in range(len(share_N)):
        found = 0.0
        for entry in range(indptr[node], indptr[node + 1]):
            if changed_N[ids[entry]]:
                found += read_count(values, table, entry)
        if found > 0.0:
            share_N[node] = found / total_N[node]


@nb.njit(cache=True, nogil=True)
def _mark_seen(seen_ptr, seen, changed_N, share_N):
    for node in range(len(share_N)):
        for entry in range(seen_ptr[node], seen_ptr[node + 1]):
            if share_N[node] == 0.0 and changed_N[seen[entry]]:
                share_N[node] = 1e-9


def _merged(
    old: tuple[np.ndarray, np.ndarray, np.ndarray], new: tuple[np.ndarray, np.ndarray, np.ndarray], is_new_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows of ``new`` where that is said, of ``old`` elsewhere."""
    length_N = np.where(is_new_N, np.diff(new[0]), np.diff(old[0]))
    indptr = np.append(0, np.cumsum(length_N)).astype(np.int64)
    ids, values = np.empty(indptr[-1], old[1].dtype), np.empty(indptr[-1], old[2].dtype)
    parts = []
    for array, source in ((ids, 1), (values, 2)):
        view = (array, old[source], new[source])
        if array.dtype == np.float16:
            view = tuple(one.view(np.uint16) for one in view)  # type: ignore[assignment]
        parts.append(view)
    for array, before, after in parts:
        _copy_rows(indptr, array, old[0], before, new[0], after, is_new_N)
    return indptr, ids, values


@nb.njit(cache=True, nogil=True)
def _copy_rows(indptr, array, old_ptr, old, new_ptr, new, is_new_N):
    for node in range(len(is_new_N)):
        start, end = indptr[node], indptr[node + 1]
        if is_new_N[node]:
            array[start:end] = new[new_ptr[node] : new_ptr[node + 1]]
        else:
            array[start:end] = old[old_ptr[node] : old_ptr[node + 1]]
