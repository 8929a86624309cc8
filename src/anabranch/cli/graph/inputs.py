"""What commands are given: graphs, nodes by name, tables of nodes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anabranch.cli.graph.files import read_arrow
from anabranch.cli.graph.hints import OF_KINDS, in_options
from anabranch.cli.graph.options import check_extra
from anabranch.cli.graph.waiting import waiting
from anabranch.errors import ConfigError, DataError, InputError
from anabranch.graph.table_columns import (
    are_fractions,
    as_names,
    chosen_ends,
    counts_rows,
    is_index,
    named_index,
)
from anabranch.graph.table_look import EdgeTable, look_at_edges

if TYPE_CHECKING:
    import numpy as np

    from anabranch.graph import Graph
    from anabranch.graph.names import Names
    from anabranch.graph.rank import Item


# Ids in one option, written as ranges.
MOST_NUMBERS = 10_000_000


@dataclass(frozen=True)
class Opened:
    """A graph that a command works on, what it was called, and the labels that a data set has."""

    graph: Graph
    name: str
    labels: Any = None


def open_graph(
    source: str, *, directed: bool | None = None, columns: str | None = None, ids: str = "auto", quiet: bool = False
) -> Opened:
    """The graph in a file or data set.

    Raises DataError if there is neither, InputError for options that do not fit, and as `read_graph`.
    """
    check_extra()
    from anabranch.graph import load_dataset, read_graph

    labels = None
    with waiting(f"reading {source}", quiet):
        if Path(source).exists():
            # Which says itself whether it is directed.
            own = is_own(source)
            with in_options():
                graph = read_graph(source, directed=None if own else directed, ids=ids, **columns_of(columns))
        else:
            try:
                found = load_dataset(source)
            except ConfigError as error:
                raise DataError(f"there is no file {source}, and {error}") from None
            graph, labels = found.graph, found.labels_NC
        if directed is not None and directed != graph.is_directed:
            graph = graph.to_directed() if directed else graph.to_undirected()
    return Opened(graph, source, labels)


def open_typed(
    source: str,
    relation: str,
    weights: list[str] | None,
    share: str,
    *,
    directed: bool | None,
    columns: str | None,
    quiet: bool,
) -> Opened:
    """The graph of a table of edges of several kinds, by what each kind counts.

    Raises DataError for a file that is none, InputError for a column or kind that is not there or a weight that is no number.
    """
    check_extra()
    if columns is not None:
        raise InputError(
            "--columns is for edges of one kind; with --relation call columns source, target and perhaps weight"
        )
    from anabranch.graph import TypedGraph

    counted = {}
    for text in weights or ():
        kind, equals, value = text.rpartition("=")
        try:
            counted[kind] = float(value)
        except ValueError:
            equals = ""
        if not equals or not kind:
            raise InputError(f"--weight-of is {text!r}; write KIND=WEIGHT")
    with waiting(f"reading {source}", quiet), in_options(OF_KINDS):
        table, said = _typed_table(source, relation, directed)
        typed = TypedGraph.from_table(table, relation, weights=counted, share=share, directed=bool(said))
    # Nodes that were written are found by name here, and given on by number.
    return Opened(typed.graph.numbered(), source)


def _typed_table(source: str, relation: str, directed: bool | None) -> tuple[Any, bool | None]:
    """Edges whose ends are called as they are written, and whether they are directed. Raises DataError."""

    def ends(table: Any) -> list[str]:
        names = [name for name in table.column_names if name != relation]
        if len(names) < 2:
            return []
        places = chosen_ends(source, None, None, names, len(names), named_index(table.schema))
        return [names[place] for place in places]

    table = read_arrow(source, lambda table: [*ends(table), *{relation} & {*table.column_names}])
    if not len(table):
        raise DataError(f"{source} has no rows")
    said = look_at_edges(EdgeTable.of(source, table), directed=directed, relation=relation)
    called = {name: as_names(table[name]) for name in ends(table)}
    kinds = {relation: table[relation]} if relation in table.column_names else {}
    for name, column in (called | kinds).items():
        cells = column.to_pylist()
        row = next((row for row, cell in enumerate(cells) if cell in (None, "")), None)
        if row is not None:
            raise DataError(f"{source}, row {row}: an empty cell")
        if name in called and are_fractions(cells):
            raise DataError(
                f"{source}: {name!r} has whole numbers that are written as {cells[0]!r} is; write them as 5"
            )
    if len({column.type for column in called.values()}) > 1:
        # Numbers in one column only: 1 and '1' would be two nodes.
        called = {name: column.cast("string") for name, column in called.items()}
    for name, column in called.items():
        table = table.set_column(table.column_names.index(name), name, column)
    return table, said


def check_untyped(weights: list[str] | None, share: str) -> None:
    """Raises InputError for options that go with --relation."""
    if weights or share != "edges":
        raise InputError("--weight-of and --share go with --relation COLUMN")


def example_node(graph: Graph) -> str:
    """The node with most edges, as a shell takes its name; empty where there is none."""
    if not graph.num_nodes:
        return ""
    name = str(graph.names_of([int(graph.degree_N.argmax())])[0])
    return name if name.isalnum() else f"'{name}'"


def is_own(source: str) -> bool:
    """Whether this is one of our array files."""
    from anabranch.graph.array_file import MAGIC

    try:
        with open(source, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        # A folder, or not to be read: whoever reads it says so.
        return False


def columns_of(text: str | None) -> dict[str, Any]:
    """``--columns`` as arguments of `read_graph`; none where it is not given. Raises InputError for another form."""
    if text is None:
        return {}
    parts = [part.strip() for part in text.split(",")]
    if len(parts) not in (2, 3) or not all(parts):
        raise InputError(f"--columns is {text!r}; write SOURCE,TARGET or SOURCE,TARGET,WEIGHT")
    named = dict(zip(("source", "target", "weight"), [_as_place(part) for part in parts], strict=False))
    return named if len(parts) == 3 else {**named, "weight": None}


def _as_place(text: str) -> int | str:
    """A column by its number, or by name."""
    place = whole_number(text)
    return text if place is None or place < 0 else place


def whole_number(text: str) -> int | None:
    """The number that text writes in figures of ASCII, at most 20; None for a name, as ² and ٣ are."""
    return int(text) if re.fullmatch(r"-?[0-9]{1,20}", text) else None


def nodes_of(graph: Graph, texts: list[str]) -> np.ndarray:
    """Ids of nodes as they were written: by outside name, or by number where nodes have none. Raises InputError."""
    return graph.ids_of(names_of(graph, texts))


def names_of(graph: Graph, texts: list[str]) -> list[Any]:
    """What texts call nodes, also new ones: themselves, or whole numbers where nodes are called by these. Raises InputError."""
    return [_as_number(text, graph) for text in texts] if are_numbers(graph) else texts


def _as_number(text: str, graph: Graph) -> int:
    # Data frames write 5.0 where a cell of the column was empty once, and R writes 1e+05.
    if (whole := re.fullmatch(r"([+-]?[0-9]+)(\.0*)?", text.strip())) is not None:
        return int(whole[1])
    if not re.fullmatch(r"[+-]?[0-9.]+[eE][+-]?[0-9]{1,3}", text.strip()) or not _is_whole(text):
        what = "have no names, only numbers from 0" if graph.names is None else "are called by numbers"
        raise InputError(f"there is no node {text!r:.80}: the nodes of this graph {what}")
    if abs(float(text)) > 2**53:
        raise InputError(
            f"the node {text!r} is written as a decimal, which cannot tell whole numbers beyond 2^53 apart"
        )
    return int(float(text))


def _is_whole(text: str) -> bool:
    try:
        return float(text).is_integer()
    except ValueError:
        return False


def weighted_nodes(graph: Graph, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Ids and weights of ``NODE`` or ``NODE=WEIGHT``. A node whose name has = in it is found by its whole name first."""
    import numpy as np

    ids, weights = [], []
    for text in texts:
        name, equals, weight = text.rpartition("=")
        try:
            ids.append(int(nodes_of(graph, [text])[0]))
            weights.append(1.0)
        except InputError:
            if not equals:
                raise
            ids.append(int(nodes_of(graph, [name])[0]))
            try:
                weights.append(float(weight))
            except ValueError:
                raise InputError(f"{text!r} is neither a node nor NODE=WEIGHT: {weight!r} is not a number") from None
    return np.array(ids, np.int64), np.array(weights)


def element_ids(called: Names | None, texts: list[str]) -> np.ndarray:
    """Ids of elements of an index as they were written, by name, or by id where they have none. Raises InputError."""
    import numpy as np

    if called is None or called.are_numbers:
        for text in texts:
            # Beyond 64 bits there are no ids, nor numbers that are names.
            if not re.fullmatch(r"-?\d{1,20}", text) or not -(2**63) <= int(text) < (
                2**63 if called is None else 2**64
            ):
                what = "has no names, only ids" if called is None else "calls its elements by numbers"
                raise InputError(f"there is no element {text!r:.80}: the index {what}")
        numbers = [int(text) for text in texts]
        return np.array(numbers, np.int64) if called is None else called.ids_of(numbers)
    return called.ids_of(texts)


def numbers(text: str, option: str = "--rows") -> np.ndarray:
    """Ids written as ``0,7`` or ``0-9``, int64. Raises InputError that names the option."""
    import numpy as np

    found: list[int] = []
    try:
        for part in text.split(","):
            first, dash, last = part.strip().partition("-")
            begin, end = int(first), int(last if dash else first)
            if end > np.iinfo(np.int64).max or len(found) + end - begin > MOST_NUMBERS:
                raise InputError(
                    f"{option} is {text!r:.80}; ids end at {np.iinfo(np.int64).max}, and at most {MOST_NUMBERS:,} are taken"
                )
            found += range(begin, end + 1)
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{option} is {text!r}; write ids as 0,7 or 0-9") from None
    if not found:
        raise InputError(f"{option} is {text!r}, which names nothing; write them as 0,7 or 0-9")
    return np.array(found, np.int64)


def are_numbers(graph: Graph) -> bool:
    """Whether nodes are called by numbers; text that looks like some, 007, is read as it is."""
    return graph.names is None or graph.names.dtype.kind in "iu"


# Columns that tell of an item.
_OF_ITEMS = ("id", "item", "title", "artist", "tags")


def read_items(path: str) -> list[Item]:
    """Items of a table with a column id (or item, item_id ..., else the first) and perhaps title (or name), artist and tags (a list, or
    text with ; between).

    A data frame's index is the id where no other column can be, and it does not count the rows.

    Raises DataError where none of these columns is there or nobody can tell which is the id, and naming the row of an item that cannot
    be one, or that is there twice.
    """
    from anabranch.graph.rank import Item

    table = read_arrow(path, lambda table: table.column_names)
    names = [name.lower() for name in table.column_names]
    first = _id_of_items(path, names, table)
    columns = {name: table.column(number).to_pylist() for number, name in enumerate(names)}
    ids = as_names(table.column(names.index(first)), is_float=is_index(first)).to_pylist()
    if not ids:
        raise DataError(f"{path} has no rows")
    found: dict[Any, Item] = {}
    for row, id_ in enumerate(ids):
        texts = {name: columns[name][row] for name in ("title", "artist", "tags") if name in columns}
        if "name" in columns and first != "name":
            texts.setdefault("title", columns["name"][row])
        tags = texts.pop("tags", None) or ()
        if isinstance(tags, str):
            tags = [tag.strip() for tag in tags.split(";") if tag.strip()]
        try:
            made = Item(
                id_, **{name: "" if text is None else str(text) for name, text in texts.items()}, tags=tuple(tags)
            )
        except (InputError, TypeError) as error:
            raise DataError(f"{path}, row {row}: {error}") from None
        if made.id in found:
            raise DataError(f"{path}, row {row}: the item {made.id!r} is there twice")
        found[made.id] = made
    return list(found.values())


def _like_id(names: list[str]) -> str | None:
    """The first column, but for an index, where it is called as ids of anything are, ``item_id``, ``artistID``; in small letters."""
    first = next((name for name in names if not is_index(name)), "")
    return first.lower() if re.fullmatch(r".*[_ ]id|.*[a-z](Id|ID)", first) else None


def _id_of_items(path: str, names: list[str], table: Any) -> str:
    """The column of ids, by its name in small letters. Raises DataError."""
    if not {*names} & {*_OF_ITEMS} and _like_id(table.column_names) is None:
        raise DataError(
            f"{path}: none of its columns {', '.join(map(repr, names)):.100} is called {', '.join(_OF_ITEMS)}; "
            "begin it with the line id,title"
        )
    said = next((name for name in ("id", "item") if name in names), None) or _like_id(table.column_names)
    index = next((name for name in names if is_index(name)), None)
    if said is not None or index is None:
        return said or names[0]
    others = [name for name in names if name not in _OF_ITEMS and not is_index(name)]
    is_counted = counts_rows(table.column(names.index(index)).to_pylist())
    if bool(others) != is_counted:
        raise DataError(f"{path}: which of its columns {', '.join(map(repr, names)):.100} is the id? Call it id")
    return others[0] if others else index
