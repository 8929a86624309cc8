"""Edges of Parquet files and Arrow tables, batch by batch."""
# Shapes: E edges of a batch

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.errors import DataError, first_line
from anabranch.graph.formats.build import EdgeSink, Rules
from anabranch.graph.formats.edge_list import checked_floats
from anabranch.graph.formats.layout import Dialect
from anabranch.graph.formats.lines import RowError
from anabranch.graph.store import Graph
from anabranch.graph.table_columns import (
    WEIGHTS,
    called,
    chosen_ends,
    column_of,
    index_first,
    named_index,
    names_ends,
    range_index,
)
from anabranch.graph.table_look import EdgeTable, look_at_edges, unpacked, unpacked_type

# `write_graph` leaves it in the metadata: nodes, direction.
NOTE = b"anabranch.graph"


def read_parquet(path: Path, rules: Rules, dialect: Dialect) -> Graph:
    """The graph of a Parquet file. Raises as `anabranch.graph.formats.read_graph`."""
    import pyarrow as pa

    try:
        with _opened(path) as file:
            schema = file.schema_arrow
            rules = looked(_edge_table(path, file), rules, dialect)
            columns = choose_columns(path, schema, dialect)
            batches = file.iter_batches(
                rules.chunk_rows, columns=[schema.names[column] for column in columns], use_threads=False
            )
            return graph_of(path, schema, columns, (_columns(batch, schema, columns) for batch in batches), rules)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise DataError(f"{path} cannot be read as Parquet: {first_line(error)}") from error


def _opened(path: Path) -> Any:
    """A file of Parquet that is read page by page."""
    import pyarrow.parquet as pq

    return pq.ParquetFile(path, pre_buffer=False, buffer_size=1 << 16, page_checksum_verification=True)


def _edge_table(path: Path, file: Any) -> EdgeTable:
    """An open file of Parquet, whose columns are read in parts: of dictionaries a row group is one at least."""

    def parts(name: str, size: int) -> Iterator[Any]:
        return (batch.column(0) for batch in file.iter_batches(size, columns=[name], use_threads=False))

    return EdgeTable.in_parts(path, file.schema_arrow, file.metadata.num_rows, parts)


def looked(table: EdgeTable, rules: Rules, dialect: Dialect) -> Rules:
    """Rules with the direction that the table says, where nobody else says one. Raises DataError as `look_at_edges`."""
    if NOTE in (table.schema.metadata or {}):
        # It says itself what it is.
        return rules
    ends_are_said = dialect.source is not None or dialect.target is not None
    weight_is_said = dialect.weight != "auto"
    directed = look_at_edges(table, ends_are_said=ends_are_said, weight_is_said=weight_is_said, directed=rules.directed)
    return replace(rules, directed=directed)


def _columns(batch: Any, schema: Any, columns: tuple[int, ...]) -> list[Any]:
    return [batch.column(schema.names[column]) for column in columns]


def choose_columns(path: Path | str, schema: Any, dialect: Dialect) -> tuple[int, ...]:
    """Numbers of the columns of source, target and (perhaps) weight, by name, well-known name, or place."""
    import pyarrow as pa

    names = list(schema.names)
    if len(names) < 2:
        raise DataError(f"{path} has {len(names)} column{'s' * (len(names) != 1)}, where an edge needs two")
    if len(set(names)) != len(names):
        raise DataError(f"{path} has several columns of the same name: {', '.join(map(str, names))}")
    if not any(isinstance(column, int) for column in (dialect.source, dialect.target, dialect.weight)):
        names = index_first(schema)
    source, target = chosen_ends(path, dialect.source, dialect.target, names, len(names), named_index(schema))
    _check_index(path, schema, names, dialect)
    chosen: tuple[int, ...] = (source, target)
    if dialect.weight == "auto":
        weight = called(names, WEIGHTS)
        chosen += () if weight is None or weight in chosen else (weight,)
    elif dialect.weight is not None and dialect.weight is not False:
        weight = column_of(path, dialect.weight, names, len(names), None)
        assert weight is not None
        chosen += (weight,)
    chosen = tuple(schema.names.index(names[column]) for column in chosen)
    for column in chosen[:2]:
        kind = unpacked_type(schema.field(column).type)
        if not (pa.types.is_integer(kind) or _is_text(kind)):
            raise DataError(
                f"{path}: the column {schema.names[column]!r} is of type {kind}; node ids are integers or text"
            )
    kind = unpacked_type(schema.field(chosen[-1]).type)
    if len(chosen) > 2 and not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)):
        raise DataError(f"{path}: the column {schema.names[chosen[-1]]!r} is of type {kind}; weights are numbers")
    return chosen


def _check_index(path: Path | str, schema: Any, names: list[str], dialect: Dialect) -> None:
    """Raises DataError where an end may be a data frame's index, which the file has as a note alone, and nothing says which are ends."""
    name, numbers = range_index(schema) or (None, range(0))
    is_said = dialect.source is not None or dialect.target is not None or names_ends(names)
    if name is not None and not is_said and numbers != range(len(numbers)):
        raise DataError(f"{path}: its index {name!r} is not among its columns; call reset_index() before it is written")


def graph_of(
    path: Path | str, schema: Any, columns: tuple[int, ...], batches: Iterable[list[Any]], rules: Rules
) -> Graph:
    """The graph of batches, each the two or three columns of `choose_columns`."""
    kinds = [unpacked_type(schema.field(column).type) for column in columns[:2]]
    is_text = rules.ids == "text" or any(map(_is_text, kinds))
    note = ((schema.metadata or {}).get(NOTE) or b"").split()
    if len(note) in (2, 3) and note[0].isdigit():
        if note[2:] == [b"named"] and rules.ids == "auto" and rules.num_nodes is None:
            rules = replace(rules, ids="names")
        if rules.num_nodes is None and rules.ids in ("auto", "numbers") and not is_text:
            rules = replace(rules, num_nodes=int(note[0]))
        if rules.directed is None:
            rules = replace(rules, directed=note[1] == b"directed")
    if is_text and (rules.ids == "numbers" or rules.num_nodes is not None):
        raise DataError(f"{path}: ids are text, not numbers; leave out ids and num_nodes")
    done = 0
    with EdgeSink(rules, path, len(columns) > 2) as sink:
        for batch in batches:
            _add(path, sink, batch, is_text, done)
            done += len(batch[0])
        if not sink.seen and not note:
            raise DataError(f"{path} holds no edges")
        return sink.finish()


def _add(path: Path | str, sink: EdgeSink, batch: list[Any], is_text: bool, done: int) -> None:
    columns: list[Any] = []
    readers = (_text_column if is_text else _id_column,) * 2 + (_weight_column,)
    what = ("source", "target", "weight")
    fault: RowError | None = None
    for field, array in enumerate(batch):
        while len(columns) == field:
            try:
                columns.append(readers[field](array if fault is None else array[: fault.row], what[field], sink.rules))
            except RowError as error:
                fault = error
                columns = [column[: error.row] for column in columns]
    if fault:
        raise DataError(f"{path}, row {done + fault.row}: {fault.what}")
    (sink.add_text if is_text else sink.add)(columns[0], columns[1], columns[2] if len(columns) > 2 else None)


def _full(array: Any, what: str) -> Any:
    """The array, dictionaries unpacked. Raises RowError for a null."""
    import pyarrow as pa

    # Of dictionaries with short indices, as categories have them, not all can be put together.
    array = unpacked(array)
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    if array.null_count:
        raise RowError(
            int(np.flatnonzero(array.is_null().to_numpy(zero_copy_only=False))[0]), f"the {what} is missing (null)"
        )
    return array


def _id_column(array: Any, what: str, rules: Rules) -> np.ndarray:
    found = _full(array, what).to_numpy(zero_copy_only=False)
    if found.dtype == np.uint64 and len(found) and found.max() > np.iinfo(np.int64).max:
        row = int(np.flatnonzero(found > np.uint64(np.iinfo(np.int64).max))[0])
        raise RowError(row, f"the {what} {found[row]} is beyond 64-bit whole numbers with a sign")
    ids = found.astype(np.int64, copy=False)
    if rules.num_nodes is None and rules.ids != "numbers":
        return ids
    high = np.iinfo(np.int64).max if rules.num_nodes is None else rules.num_nodes - 1
    if len(ids) and (ids.min() < 0 or ids.max() > high):
        row = int(np.flatnonzero((ids < 0) | (ids > high))[0])
        allowed = "must not be negative" if rules.num_nodes is None else f"is out of range; nodes are 0 to {high}"
        raise RowError(row, f"the {what} {ids[row]} {allowed}")
    return ids


def _text_column(array: Any, what: str, rules: Rules) -> Any:
    import pyarrow as pa

    return _full(array, what).cast(pa.string())


def _weight_column(array: Any, what: str, rules: Rules) -> np.ndarray:
    import pyarrow as pa

    return checked_floats(_full(array, what).cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False), rules)


def _is_text(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
