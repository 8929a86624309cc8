"""`FullyPPRResult`: the most related nodes of every source, with scores; in memory, mapped from one checked file, or as Parquet."""
# Shapes: S sources, Z stored entries, N nodes

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from anabranch.bounds import MOST_SIZE, is_whole, shown
from anabranch.errors import DataError, InputError, first_line
from anabranch.files import atomic_write_json, parse_json
from anabranch.graph.arguments import as_path
from anabranch.graph.array_file import check_how, read_arrays, write_arrays
from anabranch.graph.beside import new_file
from anabranch.graph.checks import check_room, is_known
from anabranch.graph.header import described, whole
from anabranch.graph.names import check_saved_names, names_arrays, names_from, plain_names
from anabranch.graph.rows import SparseRows, check_top_k, id_type
from anabranch.graph.stored_folder import FACTS, SCORES, read_facts, read_table

KIND = "fully-ppr"

# Beside the Parquet files of a folder; readers pass over names with an underscore.

# Of a Parquet file's schema.
META = b"anabranch"
COLUMNS = ("source", "target", "score")


@dataclass(frozen=True, eq=False)
class FullyPPRResult:
    """Scores from many nodes, one sparse row per source, by falling score, ties by rising id.

    Attributes:
        rows: the rows; ``rows.nodes`` are the sources (None: row i is about node i).
        names: outside names of nodes, as the graph has them, or None.
        facts: how the scores were made: method, alpha, walks, seed and so on.
        by_name: whether integers are names too, see `anabranch.graph.store.Graph`. Not written to files.
    """

    rows: SparseRows
    names: np.ndarray | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    by_name: bool = False

    @property
    def num_sources(self) -> int:
        """S."""
        return len(self.rows)

    @property
    def num_nodes(self) -> int:
        """N, of the graph."""
        return self.rows.num_columns

    @property
    def sources(self) -> np.ndarray:
        """int64 [S], the node of each row."""
        return np.arange(len(self.rows)) if self.rows.nodes is None else self.rows.nodes

    @cached_property
    def _order(self) -> np.ndarray:
        return np.argsort(self.sources, kind="stable")

    def row_of(self, node: int) -> int:
        """Which row is about a node. Raises InputError where none is."""
        if not is_whole(node):
            raise InputError(f"node {shown(node)} is not an id; `top_named` takes outside names")
        if not 0 <= node <= MOST_SIZE:
            row = -1
        elif self.rows.nodes is None:
            row = int(node)
        else:
            place = int(np.searchsorted(self.rows.nodes, node, sorter=self._order))
            row = (
                int(self._order[place])
                if place < len(self.rows) and self.rows.nodes[self._order[place]] == node
                else -1
            )
        if not 0 <= row < len(self.rows):
            raise InputError(f"node {shown(node)} is not one of the {len(self.rows):,} sources")
        return row

    def top(self, node: Any, k: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Nodes and scores of the ``k`` best of a source (all that are kept for None), by id, or by name where the node is given so.

        Raises InputError for another node, or a k below 1.
        """
        kept = check_top_k(k, "k") or None
        is_name = self.names is not None and (self.by_name or isinstance(node, str))
        ids, scores = self.rows.row(self.row_of(self._id_of(node) if is_name else node))
        return self.names[ids[:kept]] if is_name else ids[:kept], scores[:kept]  # type: ignore[index]

    def top_named(self, name: Any, k: int | None = None) -> list[tuple[Any, float]]:
        """The same by outside names: pairs of name and score."""
        if self.names is None:
            found, scores = self.top(name, k)
        else:
            found, scores = replace(self, by_name=True).top(name, k)
        return list(zip(found.tolist(), scores.tolist(), strict=True))

    def _id_of(self, name: Any) -> int:
        if not is_known(name, self._index):
            raise InputError(f"the graph has no node {shown(name)}")
        return self._index[name]

    @cached_property
    def _index(self) -> dict[Any, int]:
        return {} if self.names is None else {name: number for number, name in enumerate(self.names.tolist())}

    def to_scipy(self) -> Any:
        """`scipy.sparse.csr_array` [S, N]."""
        return self.rows.to_scipy()

    def to_arrow(self) -> pa.Table:
        """Columns source, target, score; and source_name, target_name where nodes have names."""
        return table_of(self.rows, 0, self.names, self._meta())

    def _meta(self) -> dict[str, Any]:
        return parquet_facts(self.num_nodes, self.facts, is_all=self.rows.nodes is None, ordered=True)

    # On disk

    def save(self, path: str | Path) -> None:
        """Write everything into one file, all or nothing: Parquet for a name that ends in ``.parquet``, a checked array file otherwise.

        Raises InputError for names that a file would not keep apart: neither all integers nor all text, or one of two nodes; and for nodes
        without a name, as Parquet has of those that no row tells of, where the file is not Parquet.
        """
        path = as_path(path)
        names = self._saved_names(path)
        if path.suffix == ".parquet":
            with parquet_writer(path, self.num_nodes, self.rows.values.dtype, names, self._meta()) as write:
                write(self.rows, 0)
            return
        arrays = {
            "indptr": self.rows.indptr,
            "ids": self.rows.ids,
            "values": self.rows.values,
            **names_arrays(names),
        }
        if self.rows.nodes is not None:
            arrays["nodes"] = self.rows.nodes
        write_arrays(path, KIND, arrays, {"num_columns": self.num_nodes, "facts": self.facts})

    def _saved_names(self, path: Path) -> np.ndarray | None:
        """Names as a file holds them. Raises InputError."""
        if self.names is None or self.names.dtype.kind in "iu":
            known = [] if self.names is None else self.names.tolist()
            names = self.names
        else:
            known = [name for name in self.names.tolist() if name is not None]
            names = plain_names(self.names)
            check_saved_names(plain_names(np.array(known, object)))
            if len(known) < len(self.names) and path.suffix != ".parquet":
                raise InputError(
                    f"{len(self.names) - len(known):,} of {len(self.names):,} nodes have no name: these scores come from Parquet, and tell "
                    "nothing of them; save them as .parquet"
                )
        if len(set(known)) < len(known):
            twice = next(name for name, count in Counter(known).items() if count > 1)
            raise InputError(f"several nodes are called {twice!r:.80}; a file would not keep them apart")
        return names

    @classmethod
    def load(cls, path: str | Path, *, mmap: bool = False, verify: bool | None = None) -> Self:
        """Read what `save` wrote, or a folder of Parquet files of a run on Spark.

        In a folder of a run from files of edges whose ids are not 0 ... N - 1, nodes are the ids that scores name, in rising order.
        With ``mmap`` an array file stays on disk until it is used. ``verify``: check the sums of all its arrays, which reads all of them
        (default: unless it is mapped; that rows are of the graph's nodes is always checked).
        Parquet does not tell of sources that have no score of at least ``min_score``, unless all nodes were sources.

        Raises DataError for a file that is missing, foreign or damaged.
        """
        check_how(mmap, verify)
        path = as_path(path)
        if path.suffix == ".parquet" or path.is_dir():
            return cls._from_parquet(path)
        found = read_arrays(path, KIND, mmap=mmap, verify=verify)
        rows = SparseRows.checked(found.arrays, found.meta, path)
        if rows.nodes is not None and rows.nodes.max(initial=-1) >= rows.num_columns:
            raise DataError(f"{path} is damaged: its sources are not nodes of its graph; make it again")
        with described(path, "scores"):
            names, facts = names_from(found.arrays), dict(found.meta["facts"])
            if names is not None and names.shape != (rows.num_columns,):
                raise ValueError(f"{len(names):,} names of {rows.num_columns:,} nodes")
        return cls(rows, names, facts)

    @classmethod
    def _from_parquet(cls, path: Path) -> Self:
        try:
            if path.is_dir():
                facts, table = read_facts(path, SCORES), read_table(path)
            else:
                table = pq.ParquetFile(path).read()
                facts = parse_json((table.schema.metadata or {})[META])
        except (OSError, KeyError, ValueError, pa.ArrowException) as error:
            raise DataError(f"cannot read the scores in {path}: {first_line(error)}") from error
        missing = [name for name in COLUMNS if name not in table.column_names]
        if missing:
            raise DataError(f"{path} has no column {missing[0]!r}; scores have {', '.join(COLUMNS)}")
        with described(path, "scores"):
            rows, names = _from_table(table, facts)
            return cls(rows, names, dict(facts["facts"]))


def _column(table: pa.Table, name: str) -> np.ndarray:
    """Ids or scores. Raises ValueError where some are missing, or are of another kind."""
    column, kind = table[name], "fiu" if name == "score" else "iu"
    if column.null_count:
        raise ValueError(f"{name} has {column.null_count:,} rows without a value")
    found = column.to_numpy()
    if found.dtype.kind not in kind:
        raise ValueError(f"{name} is {column.type}")
    if not np.isfinite(found).all():
        raise ValueError(f"{name} has numbers that are not finite")
    return found


def _ids(table: pa.Table, name: str, num_nodes: int) -> np.ndarray:
    found = _column(table, name)
    if found.size and not 0 <= found.min() <= found.max() < num_nodes:
        raise ValueError(f"{name} has ids from {found.min()} to {found.max()}; there are {num_nodes:,} nodes")
    return found


def _from_table(table: pa.Table, facts: dict[str, Any]) -> tuple[SparseRows, np.ndarray | None]:
    if facts.get("ids") == "names":
        return _from_names(table)
    num_nodes = whole(facts["num_nodes"], "num_nodes")
    source, target = (_ids(table, name, num_nodes) for name in COLUMNS[:2])
    score = _column(table, COLUMNS[2])
    order = _order(source, target, score)
    if facts["is_all"] or "source_name" in table.column_names:
        check_room(num_nodes)
    # A source whose scores are all below `min_score` has an empty row.
    if facts["is_all"]:
        # Each is a row, if perhaps an empty one.
        whole(num_nodes, "num_nodes", most=MOST_SIZE)
        length = np.bincount(source, minlength=num_nodes)
        indptr = np.append(0, np.cumsum(length)).astype(np.int64)
        rows = SparseRows(indptr, target[order].astype(id_type(num_nodes)), score[order], num_nodes)
    else:
        nodes, first, length = np.unique(source, return_index=True, return_counts=True)
        indptr = np.append(0, np.cumsum(length)).astype(np.int64)
        rows = SparseRows(indptr, target[order].astype(id_type(num_nodes)), score[order], num_nodes, nodes)
        rows = rows.take(np.argsort(first, kind="stable")) if facts["ordered"] else rows
    if "source_name" not in table.column_names:
        return rows, None
    # Nodes that no row tells of have none.
    names = np.full(num_nodes, None, object)
    said = [
        (ids, np.array(table[name].to_pylist(), object))
        for ids, name in ((source, "source_name"), (target, "target_name"))
    ]
    for ids, called in said:
        names[ids] = called
    if any((names[ids] != called).any() or (called == None).any() for ids, called in said):  # noqa: E711
        raise ValueError("names of nodes are missing, or do not agree")
    known = [name for name in names.tolist() if name is not None]
    if len(set(known)) < len(known):
        raise ValueError("several nodes have one name")
    return rows, plain_names(names)


def _order(source: np.ndarray, target: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Rows of scores by source, and falling. Raises ValueError for a pair that is there twice."""
    by_pair = np.lexsort((target, source))
    source, target = source[by_pair], target[by_pair]
    if ((source[1:] == source[:-1]) & (target[1:] == target[:-1])).any():
        raise ValueError("a pair of nodes is there twice")
    # Stable, so that targets rise where scores are equal.
    return by_pair[np.lexsort((-score[by_pair], source))]


def _from_names(table: pa.Table) -> tuple[SparseRows, np.ndarray]:
    """Scores of a run from files of edges whose ids are not 0 ... N - 1: nodes are the ids that are named, in rising order."""
    for name in ("source", "target"):
        if table[name].null_count:
            raise ValueError(f"{name} has {table[name].null_count:,} rows without a value")
    ends = pa.chunked_array([*table["source"].chunks, *table["target"].chunks], table["source"].type)
    codes = (
        ends.combine_chunks().dictionary_encode() if ends.num_chunks else pa.array([], ends.type).dictionary_encode()
    )
    if isinstance(codes, pa.ChunkedArray):
        codes = codes.combine_chunks()
    found = codes.dictionary.to_numpy(zero_copy_only=False)
    order = np.argsort(found)
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    number = place[codes.indices.to_numpy()]
    source, target, score = number[: len(table)], number[len(table) :], _column(table, "score")
    order_E = _order(source, target, score)
    nodes, length = np.unique(source, return_counts=True)
    indptr = np.append(0, np.cumsum(length)).astype(np.int64)
    rows = SparseRows(indptr, target[order_E].astype(id_type(len(found))), score[order_E], len(found), nodes)
    return rows, found[order]


def _kind_of(names: np.ndarray) -> Any:
    """The type of a column of names; of integers some may be missing."""
    if names.dtype.kind in "iu":
        return pa.int64() if names.dtype.kind == "i" else pa.uint64()
    known = next((name for name in names.tolist() if name is not None), "")
    return pa.string() if isinstance(known, str) else pa.int64() if _fit(names) else pa.uint64()


def _fit(names: np.ndarray) -> bool:
    """Whether integers among these fit 64 bits with a sign."""
    return all(name is None or name < 2**63 for name in names.tolist())


def table_of(rows: SparseRows, first: int, names: np.ndarray | None, meta: dict[str, Any] | None = None) -> pa.Table:
    """Rows as a table; row i without ``nodes`` is about node ``first`` + i."""
    nodes = np.arange(first, first + len(rows)) if rows.nodes is None else rows.nodes
    source = np.repeat(nodes.astype(np.int64, copy=False), np.diff(rows.indptr))
    columns: dict[str, Any] = {"source": source, "target": rows.ids.astype(np.int64, copy=False), "score": rows.values}
    if names is not None:
        kind = _kind_of(names)
        columns["source_name"], columns["target_name"] = (pa.array(names[ids], kind) for ids in (source, rows.ids))
    table = pa.table(columns)
    return table if meta is None else table.replace_schema_metadata({META: json.dumps(meta).encode()})


def parquet_facts(num_nodes: int, facts: dict[str, Any], *, is_all: bool, ordered: bool) -> dict[str, Any]:
    """What Parquet says beside the scores: N, whether every node is a source, whether sources stand in the order they were asked in."""
    return {"kind": SCORES, "num_nodes": num_nodes, "is_all": is_all, "ordered": ordered, "facts": facts}


@contextmanager
def parquet_writer(
    path: Path, num_nodes: int, dtype: Any, names: np.ndarray | None, meta: dict[str, Any]
) -> Iterator[Any]:
    """Yield ``write(rows, first)``, which adds a row group to a Parquet file that is there whole in the end or not at all."""
    none = SparseRows(np.zeros(1, np.int64), np.empty(0, id_type(num_nodes)), np.empty(0, dtype), num_nodes)
    schema = table_of(none, 0, names, meta).schema
    with new_file(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        yield lambda rows, first: writer.write_table(table_of(rows, first, names, meta).cast(schema))


def write_facts(folder: Path, num_nodes: int, facts: dict[str, Any], is_all: bool) -> None:
    """The facts of a folder of Parquet files; written last, so a folder without them is not whole."""
    atomic_write_json(folder / FACTS, parquet_facts(num_nodes, facts, is_all=is_all, ordered=False))
