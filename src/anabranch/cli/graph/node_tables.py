"""Tables that tell of nodes: edges, labels, seeds. All commands read them here, in one way.

What a column means is found by what it is called (`anabranch.graph.table_columns`), else by its place. Cells of nodes are text as it
stands in the file: a graph whose nodes are called by numbers makes numbers of them, any other takes 007 as it is. A data frame's index is
passed over. Where nobody can tell whether the first line is of names of columns, or which column is of nodes, the table is refused.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anabranch.cli.graph.files import NAMES, Cells, delimiter_of, read_cells
from anabranch.cli.graph.hints import OF_KINDS, in_options
from anabranch.cli.graph.inputs import are_numbers, names_of, nodes_of
from anabranch.errors import DataError, InputError
from anabranch.graph.table_columns import (
    SOURCES,
    TARGETS,
    WEIGHTS,
    are_alike,
    called,
    check_no_matrix,
    counts_rows,
    is_index,
    is_matrix,
    known_ends,
    named_index,
    plain_name,
    quoted_cells,
)
from anabranch.graph.table_faults import check_one_file
from anabranch.graph.table_look import EdgeTable, check_nameless, check_printed, look_at_edges
from anabranch.graph.table_numbered import are_counted, are_positions, are_quoted, tell_of_positions

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from anabranch.graph import Graph

# Rows that are looked at, to tell whether the first line is one.
_LOOKED_AT = 1000


@dataclass(frozen=True)
class Role:
    """What a column may be for.

    Attributes:
        words: what it is called, in any case.
        is_node: its cells are nodes.
        is_needed: a table without it is refused. One that is needed may be found by its place.
        is_asked: where no column is called so, one of numbers that is nothing else is refused: it may be meant.
        is_number: its cells are finite numbers, others' text.
    """

    words: tuple[str, ...]
    is_node: bool = False
    is_number: bool = False
    is_needed: bool = True
    is_asked: bool = False


@dataclass(frozen=True)
class Form:
    """What a table is of.

    Attributes:
        what: in words.
        roles: columns by name, those of nodes first, in the order in which they stand where nothing names them.
    """

    what: str
    roles: Mapping[str, Role]

    @property
    def nodes(self) -> list[str]:
        """Roles of nodes."""
        return [name for name, role in self.roles.items() if role.is_node]


EDGES = Form(
    "edges",
    {
        "source": Role(SOURCES, is_node=True),
        "target": Role(TARGETS, is_node=True),
        "weight": Role(WEIGHTS, is_number=True, is_needed=False),
    },
)
LABELS = Form("labels", {"node": Role(NAMES, is_node=True), "label": Role(("label", "labels", "class"))})
SEEDS = Form(
    "seeds",
    {
        "node": Role(NAMES, is_node=True),
        "weight": Role((*WEIGHTS, "score"), is_number=True, is_needed=False, is_asked=True),
    },
)


def read_columns(path: str, form: Form, graph: Graph | None, *, are_pairs: bool = False) -> dict[str, list[Any]]:
    """Columns of a table by role; a role that is not needed may be missing.

    Cells of nodes are text, those of a graph's names where it has any like that, else without blanks around them.

    Args:
        path: of a .csv, .tsv or .parquet.
        form: what it is of.
        graph: that knows nodes of it; None where there is none, and any text may be a node.
        are_pairs: edges are pairs of which something is asked, whatever direction the table says.

    Raises DataError for a file that is none, a column that is missing, a table without rows, and an empty cell, naming the row; of edges
    as `look_at_edges`.
    """
    cells = read_cells(path)
    names = cells.names
    is_text = names is None
    if names is None:
        lines = cells.first_lines
        if len(lines) > 1 and is_matrix(*lines):
            raise DataError(f"{path} is a matrix whose rows are called as its columns; {form.what} are a table")
        names = [cell.strip() for cell in lines[0]] if _is_header(path, form, graph, lines, cells.table) else None
        cells = cells.below(names)
        counted = Counter(names)
        twice = next((name for name, count in counted.items() if count > 1 and not is_index(name)), None)
        if twice is not None:
            raise DataError(f"{path} has several columns called {twice!r}")
    elif form is not EDGES:
        check_no_matrix(path, cells.table.schema, cells.table.num_rows, cells.table.column)
    places = _places(path, form, names, cells.table)
    ends = [places[role] for role in form.nodes]

    def is_meant(row: int) -> bool:
        texts = [cells.table.column(place)[row].as_py() for place in ends]
        # A single column without a graph may be of a node that is called node.
        return all(_is_node(graph, text) for text in texts) if graph is not None else cells.table.num_columns == 1

    if is_text:
        check_one_file(path, cells.table, cells.names, is_meant)
    if form is EDGES:
        _look(path, cells, None if are_pairs or graph is None else graph.is_directed, is_meant)
    found = {role: _cells(path, cells.table, place, form.roles[role], graph) for role, place in places.items()}
    for column in found.values():
        empty = next((row for row, cell in enumerate(column) if cell in (None, "")), None)
        if empty is not None:
            raise DataError(f"{path}, row {empty}: an empty cell")
    if not found[form.nodes[0]]:
        raise DataError(f"{path} has no rows")
    return found


def _look(path: str, cells: Cells, of_graph: bool | None, is_meant: Callable[[int], bool]) -> None:
    """Raises DataError for what is no table of edges, or of another direction than the graph's; what the graph knows is meant so."""
    if cells.names is None:
        check_printed(path, [[text or "" for text in texts] for texts in cells.first_lines], False, is_meant)
        return
    # Several may be an index that has no name.
    names = [f"__index_level_{place}__" if is_index(name) else name for place, name in enumerate(cells.names)]
    table = EdgeTable.of(path, cells.table.rename_columns(names))
    # Of pairs no direction counts.
    with in_options(OF_KINDS):
        check_nameless(table, cells.names)
        look_at_edges(table, directed=False if of_graph is None else None, of_graph=of_graph, is_meant=is_meant)


def _is_header(path: str, form: Form, graph: Graph | None, lines: Sequence[Sequence[str]], table: pa.Table) -> bool:
    """Whether the first line names the columns. Raises DataError where nobody can tell."""
    first = [cell.strip() for cell in lines[0]]
    if is_index(first[0]) and len(first) > 1:
        numbers = [cell for cell in first[1:] if _is_float(cell)]
        # As data frames write columns that have no names.
        words = any(called(first, form.roles[role].words) is not None for role in form.nodes)
        is_counted = first[1:] == [str(number) for number in range(len(first) - 1)]
        if is_counted or (not numbers and (words or not _comes_again(first, table))):
            return True
        raise _either(path, form, first)
    beginning = quoted_cells(Path(path), delimiter_of(Path(path)))
    if len(beginning) > 1 and are_quoted(*beginning):
        # Which tell of no weight.
        if form is EDGES and are_counted(first):
            raise _either(path, form, first)
        return True
    ends = first[: len(form.nodes)]
    are_nodes = len(lines) > 1 and are_alike(ends, lines[1])
    if not are_nodes and all(called(first, form.roles[role].words) is not None for role in form.nodes):
        # The line that messages and docs give is always one, also where a node is called so.
        needed = [role for role, one in form.roles.items() if one.is_needed]
        is_given = first[: len(needed)] == needed and not any(map(_is_float, first))
        is_clear = is_given or graph is None or not all(_is_node(graph, cell) for cell in ends)
        if not is_clear:
            raise _either(path, form, first)
        return True
    if graph is None:
        return len(lines) > 1 and not _is_float(first[0]) and _is_float(lines[1][0])
    rows: list[list[str]] = []
    if form is EDGES and are_counted(first):
        rows = [[cell or "" for cell in row.values()] for row in table.slice(1, _LOOKED_AT).to_pylist()]
        if are_positions(first, rows, at_blanks=False):
            raise _either(path, form, first)
    if any(_is_node(graph, cell) or (are_numbers(graph) and _is_float(cell)) for cell in ends):
        tell_of_positions(path, first, rows)
        return False
    # A node that was typed wrong is no name of a column.
    if are_numbers(graph) and not _comes_again(first, table):
        return True
    raise _either(path, form, first)


def _comes_again(first: Sequence[str], table: pa.Table) -> bool:
    """Whether a cell of the first line stands in its column once more, so that it is no name of that."""
    import pyarrow.compute as pc

    return any(
        bool(cell) and pc.any(pc.equal(pc.utf8_trim_whitespace(table.column(number).slice(1)), cell)).as_py()
        for number, cell in enumerate(first)
    )


def _either(path: str, form: Form, first: Sequence[str]) -> DataError:
    return DataError(
        f"{path}: is its first line, {','.join(first):.60}, one of {form.what}, or are these names of columns? "
        f"Begin it with the line {','.join(name for name, role in form.roles.items() if role.is_needed)}"
    )


def _places(path: str, form: Form, names: list[str] | None, table: pa.Table) -> dict[str, int]:
    """The number of the column of each role. Raises DataError."""
    count = table.num_columns
    if names is None:
        if count > len(form.roles):
            raise DataError(
                f"{path} has {count} columns and no names of them, and {form.what} are {' and '.join(form.roles)}; "
                "begin it with a line of names (a comma of decimals makes two columns of one)"
            )
        found = dict(zip(form.roles, range(count), strict=False))
    else:
        by_name: dict[str, int | None] = {}
        if len(form.nodes) > 1:
            with in_options(OF_KINDS):
                by_name |= dict(zip(form.nodes, known_ends(path, names, named_index(table.schema)), strict=True))
        by_name |= {role: _named(path, role, one, names) for role, one in form.roles.items() if role not in by_name}
        found = {role: place for role, place in by_name.items() if place is not None}
        missing = [role for role, one in form.roles.items() if one.is_needed and role not in found]
        free = [number for number in range(count) if number not in found.values()]
        bare = [number for number in free if not is_index(names[number])]
        index = next((number for number in free if number not in bare), None)
        if index is not None and missing:
            bare = _beside_index(path, form, names, table, index, bare, missing)
        if "label" in missing and (len(bare) > len(missing) or (len(missing) > 1 and _are_classes(table, bare))):
            # Of several attributes, or a column for each class.
            raise _which(path, names, missing)
        found |= dict(zip(missing, bare, strict=False))
        _ask(path, form, names, table, found)
    short = [role for role, one in form.roles.items() if one.is_needed and role not in found]
    if short:
        needed = [role for role, one in form.roles.items() if one.is_needed]
        raise DataError(
            f"{path} has {count} column(s) and none of {short[0]}; {form.what} are a table of {' and '.join(needed)}"
        )
    return found


def _named(path: str, role: str, one: Role, names: list[str]) -> int | None:
    """The column that is called as a role is. Raises DataError for several."""
    found = [number for number, name in enumerate(names) if plain_name(name) in one.words]
    if len(found) > 1:
        raise DataError(
            f"{path}: which of {', '.join(repr(names[number]) for number in found)} is the {role}? Leave the others out"
        )
    return found[0] if found else None


def _ask(path: str, form: Form, names: list[str], table: pa.Table, found: Mapping[str, int]) -> None:
    """Raises DataError for a column that may be meant for a role that none is called."""
    role = next((role for role, one in form.roles.items() if one.is_asked and role not in found), None)
    rest = [place for place in range(len(names)) if place not in found.values() and not is_index(names[place])]
    for place in rest if role is not None else ():
        cells = table.column(place).to_pylist()
        if all(cell not in (None, "") and _is_float(str(cell)) for cell in cells):
            raise DataError(f"{path}: is the column {names[place]!r} a {role}? Call it {role}, or leave it out")


def _beside_index(
    path: str, form: Form, names: list[str], table: pa.Table, index: int, bare: list[int], missing: list[str]
) -> list[int]:
    """Columns, in the order of the roles that are missing, of a table that has a data frame's index. Raises DataError."""
    is_counted = counts_rows(table.column(index).to_pylist())
    has_words = not all(_is_float(names[number]) for number in bare)
    # Two ends are none of them the index, whatever that counts.
    if len(bare) >= len(missing) and has_words and (is_counted or (missing == form.nodes and len(missing) > 1)):
        return bare
    # It calls the rows by their nodes, as a series does.
    if form.nodes == missing[:1] and len(bare) == len(missing) - 1 and not is_counted:
        return [index, *bare]
    raise _which(path, names, missing)


def _are_classes(table: pa.Table, places: Sequence[int]) -> bool:
    """Whether columns say of each row, by 0 and 1 or truth values, whether it is of a class."""
    words = {"0", "1", "0.0", "1.0", "true", "false"}
    return all({str(cell).strip().lower() for cell in table.column(place).to_pylist()} <= words for place in places)


def _which(path: str, names: list[str], missing: list[str]) -> DataError:
    return DataError(
        f"{path}: which of {', '.join(map(repr, names)):.200} are columns of {' and '.join(missing)}? Call them that"
    )


def _cells(path: str, table: pa.Table, place: int, role: Role, graph: Graph | None) -> list[Any]:
    import pyarrow as pa

    column, name = table.column(place), table.column_names[place]
    kind = column.type
    if role.is_node:
        is_text = graph is not None and not are_numbers(graph)
        if pa.types.is_string(kind):
            return _trimmed(column.to_pylist(), graph if is_text else None)
        if pa.types.is_integer(kind):
            return [None if cell is None else str(cell) for cell in column.to_pylist()]
        if pa.types.is_floating(kind) and not is_text:
            return [None if cell is None else repr(cell) for cell in column.to_pylist()]
        raise DataError(
            f"{path}: the column {name!r} is of {kind}; {'text' if is_text else 'text or whole numbers'} call nodes here"
        )
    cells = column.to_pylist()
    if not role.is_number:
        return [cell if cell is None else str(cell).strip() for cell in cells]
    return [None if cell in (None, "") else _number(path, row, cell) for row, cell in enumerate(cells)]


def _trimmed(cells: list[str | None], graph: Graph | None) -> list[str | None]:
    """Without blanks around them, as hands write them behind commas, but where a node is called so."""
    bare = [None if cell is None else cell.strip() for cell in cells]
    if graph is None or bare == cells:
        return bare
    return [
        cell if cell is not None and cell != one and _is_node(graph, cell) else one
        for cell, one in zip(cells, bare, strict=True)
    ]


def _number(path: str, row: int, cell: Any) -> float:
    try:
        found = float("nan" if isinstance(cell, str) and "_" in cell else cell)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise DataError(f"{path}, row {row}: the weight {cell!r:.40} is not a number")
    return found


def _is_float(text: str) -> bool:
    try:
        return not math.isinf(float(text))
    except ValueError:
        return False


def _is_node(graph: Graph, text: str) -> bool:
    try:
        nodes_of(graph, [text])
    except InputError:
        return False
    return True


def read_edges(path: str, graph: Graph) -> tuple[list[Any], list[Any], list[float] | None]:
    """Sources, targets and (None where there are none) weights of a table of edges; ends as the graph calls its nodes, also new ones.

    Raises DataError as `read_columns`, and for an end that cannot be a node.
    """
    columns = read_columns(path, EDGES, graph)
    try:
        source, target = (names_of(graph, columns[role]) for role in EDGES.nodes)
    except InputError as error:
        raise DataError(f"{path}: {error}") from None
    return source, target, columns.get("weight")


def pairs_of(graph: Graph, path: str) -> tuple[np.ndarray, list[str], list[str]]:
    """Ids [E, 2] of pairs of known nodes in a table, and what they are called there. Raises DataError."""
    import numpy as np

    columns = read_columns(path, EDGES, graph, are_pairs=True)
    return (
        np.column_stack([_ids(path, graph, columns[role]) for role in EDGES.nodes]),
        columns["source"],
        columns["target"],
    )


def read_seeds(path: str, graph: Graph) -> tuple[np.ndarray, np.ndarray]:
    """Ids and weights of a table with a column node and perhaps weight; without it each weighs 1. Raises DataError."""
    import numpy as np

    columns = read_columns(path, SEEDS, graph)
    ids = _ids(path, graph, columns["node"])
    return ids, np.ones(len(ids)) if "weight" not in columns else np.array(columns["weight"])


def read_names(path: str) -> list[str]:
    """Nodes of a table with a column node, as they are written there, where there is no graph to know them. Raises DataError."""
    return read_columns(path, SEEDS, None)["node"]


def read_labels(path: str, graph: Graph) -> Any:
    """`scipy.sparse.csr_array` of bool [N, C] from a table with a row for each label of each node, in columns node and label.

    Raises DataError naming the row of an unknown node or an empty cell.
    """
    import numpy as np
    from scipy.sparse import coo_array

    columns = read_columns(path, LABELS, graph)
    ids = _ids(path, graph, columns["node"])
    _, column = np.unique(columns["label"], return_inverse=True)
    shape = (graph.num_nodes, int(column.max()) + 1)
    return coo_array((np.ones(len(ids), bool), (ids, column)), shape=shape).tocsr().astype(bool)


def _ids(path: str, graph: Graph, texts: list[str]) -> np.ndarray:
    try:
        return nodes_of(graph, texts)
    except InputError as error:
        raise DataError(f"{path}: {error}") from None
