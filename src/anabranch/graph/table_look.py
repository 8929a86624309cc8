"""The one look at a table of edges that all take who read one: whether it is such a table, and which direction it says of its edges.

`anabranch.graph.formats.layout` does the same for a text that is read in blocks, of the same parts.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from anabranch.errors import DataError
from anabranch.graph.table_columns import WEIGHTS, called, check_no_bare_matrix, check_no_matrix, is_index, names_ends
from anabranch.graph.table_direction import MixedError, direction_of
from anabranch.graph.table_faults import is_python, row_fault
from anabranch.graph.table_numbered import nameless, tell_of_nameless

if TYPE_CHECKING:
    import pyarrow as pa

# Cells of a column that are read at once, to look at it: few, since they may be whole documents.
_LOOKED_AT = 1 << 10


def unpacked_type(kind: "pa.DataType") -> "pa.DataType":
    """The type of cells, where a dictionary holds them too."""
    import pyarrow as pa

    return kind.value_type if pa.types.is_dictionary(kind) else kind


def unpacked(cells: "pa.Array | pa.ChunkedArray") -> Any:
    """Cells as they are, where dictionaries hold them, of each part its own; what is missing in one is missing."""
    import pyarrow as pa

    if not pa.types.is_dictionary(cells.type):
        return cells
    if isinstance(cells, pa.ChunkedArray):
        return pa.chunked_array([chunk.dictionary_decode() for chunk in cells.chunks], cells.type.value_type)
    return cells.dictionary_decode()


@dataclass(frozen=True)
class EdgeTable:
    """A table of edges, of which no more is read than is looked at.

    Attributes:
        path: for messages.
        schema: names and types of its columns.
        num_rows: how many rows it has; one that has more than columns may say any number above that.
        first: by the name of a column, its first cells: one more than there are columns at least, where there are so many; of no
            dictionary, as in ``rest``.
        rest: cells behind these, in parts.
        is_ordered: whether the rest comes in the order of rows, so that a cell's number is its row's.
    """

    path: Path | str
    schema: "pa.Schema"
    num_rows: int
    first: "Callable[[str], pa.Array | pa.ChunkedArray]"
    rest: "Callable[[str], Iterable[pa.Array]]" = lambda name: ()
    is_ordered: bool = True

    @classmethod
    def of(cls, path: Path | str, table: "pa.Table") -> Self:
        """A table in memory."""
        size = max(_LOOKED_AT, table.num_columns + 1)
        return cls(
            path,
            table.schema,
            table.num_rows,
            lambda name: unpacked(table.column(name).slice(0, size)),
            lambda name: map(unpacked, table.column(name).slice(size).chunks),
        )

    @classmethod
    def in_parts(
        cls, path: Path | str, schema: "pa.Schema", num_rows: int, parts: "Callable[[str, int], Iterable[pa.Array]]"
    ) -> Self:
        """A table whose columns are read in parts of any lengths: ``parts`` of a column, by name, each of so many cells at most."""
        import pyarrow as pa

        size = max(_LOOKED_AT, len(schema.names) + 1)

        def first(name: str) -> "pa.ChunkedArray":
            found, count = [], 0
            for part in parts(name, size):
                found.append(unpacked(part[: size - count]))
                count += len(part)
                if count >= size:
                    break
            return pa.chunked_array(found, unpacked_type(schema.field(name).type))

        def rest(name: str) -> "Iterator[pa.Array]":
            count = 0
            for part in parts(name, size):
                behind = part[max(size - count, 0) :]
                count += len(part)
                if len(behind):
                    yield unpacked(behind)

        return cls(path, schema, num_rows, first, rest)


def look_at_edges(
    table: EdgeTable,
    *,
    ends_are_said: bool = False,
    weight_is_said: bool = False,
    directed: bool | None = None,
    of_graph: bool | None = None,
    relation: str | None = None,
    is_meant: Callable[[int], bool] = lambda row: False,
) -> bool | None:
    """Whether edges have a direction, as whoever asks or Gephi's column Type says; None where nobody does.

    Args:
        table: what is looked at.
        ends_are_said: whoever asks says which columns are source and target.
        weight_is_said: whoever asks says which column is the weight, or that none is.
        directed: what whoever asks says, so that Type is not looked at.
        of_graph: whether the graph that the edges go to is directed; None where they make one.
        relation: a column that says of what kind an edge is; it is none of a matrix, nor Gephi's.
        is_meant: tells of a row whether it is one, whatever it looks like.

    Raises DataError for a matrix, for rows as programs print them (`row_fault`), for edges of both directions, and for those of another
    direction than the graph has.
    """
    names = list(table.schema.names)
    if len(set(names)) < len(names):
        # Of which who chooses columns tells.
        return directed
    if not ends_are_said:
        named = [name if name != relation else "relation" for name in names]
        check_nameless(table, named, has_weight=weight_is_said)
    check_no_matrix(table.path, table.schema, table.num_rows, table.first)
    if not ends_are_said:
        for some in {tuple(names): None, tuple(name for name in names if name != relation): None}:
            check_no_bare_matrix(table.path, some, table.num_rows, table.first)
    _check_rows(table, names, ends_are_said, is_meant)
    place = called(names, ("type",))
    if directed is not None or place is None or names[place] == relation:
        return directed
    hint = "`directed` says what all are" if of_graph is None else "leave the column out if all are as the graph's are"
    found = _said(table, names[place], hint)
    if found is not None and of_graph is not None and found != of_graph:
        kinds = {True: "directed", False: "undirected"}
        raise DataError(
            f"{table.path}: its column {names[place]!r} says that edges are {kinds[found]}, and the graph is {kinds[of_graph]}; "
            "leave the column out if they are to be as its others"
        )
    return found


def check_nameless(table: EdgeTable, names: Sequence[str], *, has_weight: bool = False) -> None:
    """A warning of a third column or a later one that ``names``, in the order of the table's columns, do not name, and that has a cell
    that is not empty. Raises DataError where that is a number, and no weight is named nor said (``has_weight``)."""
    places = nameless(names) if len(names) > 2 else []
    has_weight = has_weight or called(names, WEIGHTS) is not None
    found = (("", place, _first_filled(table, table.schema.names[place])) for place in places)
    tell_of_nameless(table.path, (one for one in found if one[2] is not None), has_weight=has_weight)


def _first_filled(table: EdgeTable, name: str) -> Any:
    """The first cell of a column that is not empty, or None."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for cells in chain([table.first(name)], table.rest(name)):
        kept = cells.drop_null()
        if pa.types.is_floating(kept.type):
            kept = kept.filter(pc.invert(pc.is_nan(kept)))
        found = next((cell for cell in kept.to_pylist() if str(cell).strip()), None)
        if found is not None:
            return found
    return None


def _check_rows(table: EdgeTable, names: list[str], ends_are_said: bool, is_meant: Callable[[int], bool]) -> None:
    """Raises DataError for rows of text as programs print them."""
    if is_python(names):
        raise DataError(f"{table.path}: the names of its columns are {_PRINTED}")
    bare = [name for name in names if not is_index(name)]
    if any(_is_text(table.schema.field(name).type) for name in bare):
        columns = [_first_cells(table, name) for name in bare]
        rows = [list(row) for row in zip(*columns, strict=True)]
        check_printed(table.path, rows, ends_are_said or names_ends(names), is_meant)


_PRINTED = "a row as Python or JSON prints it; write edges without brackets, below a line source,target"


def check_printed(
    path: Path | str, rows: list[list[str]], has_ends: bool, is_meant: Callable[[int], bool] = lambda row: False
) -> None:
    """Raises DataError for the first of these rows that `row_fault` finds, but for one that is meant."""
    fault = row_fault(rows, has_ends=has_ends)
    if fault is not None and not is_meant(fault[0]):
        raise DataError(f"{path}, row {fault[0]}: {fault[1]}")


def _first_cells(table: EdgeTable, name: str) -> list[str]:
    """The first two cells of a column; what is no text is no bracket, sign or colon."""
    if not _is_text(table.schema.field(name).type):
        return ["0"] * min(2, table.num_rows)
    return [cell or "" for cell in table.first(name).slice(0, 2).to_pylist()]


def _is_text(kind: "pa.DataType") -> bool:
    import pyarrow as pa

    kind = unpacked_type(kind)
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _said(table: EdgeTable, name: str, hint: str) -> bool | None:
    """What a column Type says of all edges; where its first cells say nothing, no more of it is read."""
    done = 0
    try:
        cells = table.first(name)
        found = direction_of(cells)
        for part in table.rest(name) if found is not None else ():
            done += len(cells)
            cells = part
            found = direction_of(cells, found)
    except MixedError as error:
        where = f", row {done + error.row}" if table.is_ordered else ""
        raise DataError(f"{table.path}{where}: {error.what}; {hint}") from None
    return found
