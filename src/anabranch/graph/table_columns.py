"""What columns of tables are called by those who write them."""

import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anabranch.bounds import near_name, shown
from anabranch.errors import DataError, InputError
from anabranch.graph.table_faults import bare_matrix, check_meaning, is_adjacency

if TYPE_CHECKING:
    import pyarrow as pa

# Of ends of edges, in pairs.
_ENDS = (
    ("source", "target"),
    ("src", "dst"),
    ("from", "to"),
    ("node1", "node2"),
    ("node_1", "node_2"),
    ("id1", "id2"),
    ("citing", "cited"),
    ("origin", "destination"),
    ("sender", "receiver"),
    ("source", "dest"),
)
# Of Neo4j's tables.
_ENDS_OF_NEO4J = (("start_id", "end_id"), ("startid", "endid"))
# source_id, sourceId, from_node, ...
_SURE = (
    tuple((a + end, b + end) for end in ("", "_id", "id", " id", "_node", "node", " node") for a, b in _ENDS)
    + _ENDS_OF_NEO4J
)
# Other things are called so too: matrices have values v, times have a start and an end.
_UNSURE = (("u", "v"), ("head", "tail"), ("start", "end"))
SOURCES, TARGETS = (tuple(dict.fromkeys(words)) for words in zip(*_SURE, *_UNSURE, strict=True))
WEIGHTS = ("weight", "weights", "w", "edge_weight", "strength")
# Of other things that edges have, and no node of a matrix is called.
_OF_EDGES = (
    "timestamp",
    "time",
    "date",
    "rating",
    "userid",
    "user_id",
    "itemid",
    "item_id",
    "movieid",
    "movie_id",
    "count",
    "freq",
)
# Types of values that Neo4j's tables say behind names of columns.
_TYPES = (
    "int|long|float|double|boolean|byte|short|char|string|point|date|localtime|time|localdatetime|datetime|duration"
)
# Of the row itself.
_OF_ROWS = (
    "id",
    "_id",
    "key",
    "index",
    "no",
    "no.",
    "nr",
    "row",
    "row_id",
    "edge",
    "edge_id",
    "edgeid",
    "rel_id",
    "link_id",
)


# By name or number; None where it is not said.
Column = int | str | None


def is_index(name: str) -> bool:
    """Whether a column is called as data frames call their index.

    Not at all in a text; as pandas calls that when it reads it again, and again; or as pandas calls it in Parquet.
    """
    return re.fullmatch(r"|Unnamed: [0-9]+(\.[0-9]+)*|__index_level_[0-9]+__", name.strip()) is not None


def plain_name(name: str) -> str:
    """What a column is called, in small letters, without the type or group of Neo4j's tables: ``weight:float``, ``:START_ID(User)``."""
    text = re.sub(r"^.*:(start_id|end_id)(\(.*\))?$", r"\1", name.strip().lower())
    return re.sub(rf"^(.+):({_TYPES})(\[\])?$", r"\1", text)


def called(names: Sequence[str], words: Sequence[str]) -> int | None:
    """The number of the column that is called by one of these words, in any case; the first word of which there is one decides."""
    low = [plain_name(name) for name in names]
    return next((low.index(word) for word in words if word in low), None)


def names_ends(cells: Sequence[str]) -> bool:
    """Whether a line names columns of edges: one of sources, and one of targets."""
    return called(cells, SOURCES) is not None and called(cells, TARGETS) is not None


def are_alike(first: Sequence[str], second: Sequence[str]) -> bool:
    """Whether a cell of a line is called as the one below, but for figures: node1 above node2 is a node, and no name of a column."""
    pairs = zip(first, second, strict=False)
    return any(
        re.search("[0-9]", cell) and re.sub("[0-9]+", "0", cell) == re.sub("[0-9]+", "0", below)
        for cell, below in pairs
    )


def is_end(cells: Sequence[str]) -> bool:
    """Whether a line has a word, of one end at least, that means no other thing."""
    return any(plain_name(cell) in words for words in zip(*_SURE, strict=True) for cell in cells)


def _others(path: Path | str, names: Sequence[str], taken: set[int | None], wanted: int) -> list[int]:
    """Columns beside some and weights. A data frame's index is among them only where there is one other column, as in a series.

    Raises DataError where there are too few.
    """
    free = [number for number in range(len(names)) if number not in taken]
    ends = [number for number in free if plain_name(names[number]) not in WEIGHTS]
    bare = [number for number in ends if not is_index(names[number])]
    index = [number for number in ends if is_index(names[number])]
    if len(bare) < wanted == len(index) == 2:
        # An index of two parts, as of a matrix that was stacked.
        return index
    if len(bare) < wanted <= len(free) and (len(names) > 2 or len(ends) < wanted):
        raise _either(path, names)
    return bare if len(bare) >= wanted else ends


def known_ends(path: Path | str, names: Sequence[str], index: Sequence[str] = ()) -> tuple[int | None, int | None]:
    """Numbers of the columns of source and target by what they are called; None for one that is not known, and stands by its place.

    ``index`` is as of `chosen_ends`: where neither is known, it may be an end or not.

    Words that mean other things too count where both are there and nothing else may be an end before them. Where one end is known and it is
    not plain which column is the other, nobody can tell.

    Raises DataError where nobody can, and as `check_meaning`.
    """
    source, target = _known_ends(path, names, index)
    if source is not None and target is not None:
        check_meaning(path, (source, names[source]), (target, names[target]))
    return source, target


def _known_ends(path: Path | str, names: Sequence[str], index: Sequence[str]) -> tuple[int | None, int | None]:
    low = [plain_name(name) for name in names]
    whole = [pair for pair in _SURE if set(pair) <= set(low)]
    # Of sender and sender_id the plain one.
    is_one = all(word.startswith(begin) for pair in whole for word, begin in zip(pair, whole[0], strict=True))
    if whole and (is_one or whole[0] == _SURE[0]):
        return low.index(whole[0][0]), low.index(whole[0][1])
    places = [called(names, words) for words in (SOURCES, TARGETS)]
    if any(sum(name in words for name in low) > 1 for words in (SOURCES, TARGETS)):
        raise _either(path, names)
    unsure = [place is not None and any(low[place] in pair for pair in _UNSURE) for place in places]
    free = [number for number, name in enumerate(low) if not is_index(names[number]) and name not in WEIGHTS]
    if None not in places and (not any(unsure) or set(free[:2]) == set(places)):
        return places[0], places[1]
    if all(place is None or is_unsure for place, is_unsure in zip(places, unsure, strict=True)) and None in places:
        if len(free) > 2 and (low[free[0]] in _OF_ROWS or any(names[number] in index for number in free)):
            # It may call the edges.
            raise _either(path, names)
        return None, None
    sure = [None if is_unsure else place for place, is_unsure in zip(places, unsure, strict=True)]
    rest = [number for number in free if number not in sure]
    if sure != [None, None] and len(rest) == 1:
        return tuple(rest[0] if place is None else place for place in sure)  # type: ignore[return-value]
    if sure != [None, None] and not rest:
        return sure[0], sure[1]
    raise _either(path, names)


def _either(path: Path | str, names: Sequence[str]) -> DataError:
    return DataError(
        f"{path}: which of its columns {', '.join(map(repr, names)):.200} are source and target? Call them that, or say which they are"
    )


def is_matrix(first: Sequence[str], second: Sequence[str]) -> bool:
    """Whether two lines begin a matrix of a data frame, whose rows are called as its columns are, and no table of edges."""
    # Few columns without names are those of edges, which begin with row 0 as well.
    is_counted = list(first[1:]) == [str(number) for number in range(len(first) - 1)] and len(first) < 5
    is_square = len(first) > 2 and len(first) == len(second) and second[0].strip() == first[1].strip()
    return is_index(first[0]) and is_square and not is_counted


def chosen_ends(
    path: Path | str,
    source: Column,
    target: Column,
    names: Sequence[str] | None,
    count: int,
    index: Sequence[str] = (),
) -> tuple[int, int]:
    """Numbers of the columns of source and target, where whoever asks may have said one or both.

    ``index``: columns that are a data frame's index, and have names of their own.

    Raises InputError for a column that there is not, or one that is both; DataError as `known_ends`.
    """
    known = names or [str(number) for number in range(count)]
    by_name = known_ends(path, known, index) if source is None and target is None else _beside(known, source, target)
    first = column_of(path, source, names, count, by_name[0])
    second = column_of(path, target, names, count, by_name[1])
    if first is not None and first == second:
        if source is not None and target is not None:
            raise InputError(f"source and target are both column {names[first] if names else first} of {path}")
        # Whoever asks knows better than a word.
        first, second = (None, second) if source is None else (first, None)
    rest = iter(_others(path, known, {first, second}, (first is None) + (second is None)))
    return next(rest) if first is None else first, next(rest) if second is None else second


def _beside(names: Sequence[str], source: Column, target: Column) -> tuple[int | None, int | None]:
    """Numbers of the columns of source and target by what they are called, where one is said: words that mean other things too count
    beside their own pair alone."""
    said = source if target is None else target
    pairs = [*_SURE, *(pair for pair in _UNSURE if isinstance(said, str) and plain_name(said) in pair)]
    return called(names, [source for source, _ in pairs]), called(names, [target for _, target in pairs])


def column_of(
    path: Path | str, given: Column, names: Sequence[str] | None, count: int, default: int | None
) -> int | None:
    """The number of a column by name or number. Raises InputError, suggesting a near name."""
    if given is None:
        return default
    if isinstance(given, str):
        if names is None:
            raise InputError(f"{path} has no header to look for the column {shown(given)} in; give its number")
        if given in names:
            return list(names).index(given)
        there = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        raise InputError(f"{path} has no column {shown(given)}{near_name(given, names)} (columns: {there:.500})")
    if isinstance(given, bool) or not 0 <= given < count:
        raise InputError(f"{path} has no column {given}; columns are 0 to {count - 1}")
    return int(given)


def has_quoted_words(first: Sequence[tuple[str, bool]]) -> bool:
    """Whether all words (no numbers) of a first line are in quotes, given each cell and whether it is in quotes, and there is one.

    So R writes all words of a table: a bare NA below is no word, but a cell that is missing.
    """
    words = [is_quoted for cell, is_quoted in first if not re.fullmatch(r"[+-]?[0-9.]*([eE][+-]?[0-9]+)?", cell)]
    return bool(words) and all(words)


def is_of_r(path: Path, delimiter: str) -> bool:
    """Whether all words of the first line of a text file (also .gz) are in quotes, as R writes them. Raises OSError."""
    return has_quoted_words(next(iter(quoted_cells(path, delimiter)), []))


def quoted_cells(path: Path, delimiter: str) -> list[list[tuple[str, bool]]]:
    """Cells of the first two lines of a text file (also .gz), and whether each is in quotes. Raises OSError."""
    import pyarrow as pa

    with pa.input_stream(path) as opened:
        begin = opened.read(1 << 16).decode("utf-8", "replace").removeprefix("\ufeff").lstrip("\r\n")
    cell = rf'(?:^|{delimiter})(?:"((?:[^"]|"")*)"|([^{delimiter}]*))'
    lines = [line for line in begin.splitlines() if line][:2]
    return [[(quoted or bare, not bare) for quoted, bare in re.findall(cell, line)] for line in lines]


def _pandas_index(schema: "pa.Schema") -> list[Any]:
    """What pandas' note in a schema says of a data frame's index: names of columns, or bounds of a range."""
    try:
        columns = json.loads((schema.metadata or {}).get(b"pandas", b"{}")).get("index_columns", [])
    except (ValueError, AttributeError):
        # A note of somebody else.
        return []
    return columns if isinstance(columns, list) else []


def named_index(schema: "pa.Schema") -> list[str]:
    """Columns of Parquet that pandas' note says are the index of a data frame, and have names of their own."""
    found = (one.get("name") if isinstance(one, dict) else one for one in _pandas_index(schema))
    return [name for name in found if isinstance(name, str) and name in schema.names and not is_index(name)]


def range_index(schema: "pa.Schema") -> tuple[str | None, range] | None:
    """Name and numbers of a data frame's index that pandas wrote as a note alone, as it does where steps are even; else None."""
    for one in _pandas_index(schema):
        if isinstance(one, dict) and one.get("kind") == "range":
            start, stop, step = (one.get(name) for name in ("start", "stop", "step"))
            name = one.get("name")
            if not (isinstance(start, int) and isinstance(stop, int) and isinstance(step, int)) or not step:
                return None
            if max(abs(start), abs(stop)) > 2**62:
                return None
            return name if isinstance(name, str) and name not in schema.names else None, range(start, stop, step)
    return None


def with_index(table: "pa.Table") -> "pa.Table":
    """A table of Parquet whose index stands in front as columns, where it has a name or does not count the rows from 0."""
    import pyarrow as pa

    name, numbers = range_index(table.schema) or (None, range(0))
    if numbers != range(len(numbers)) and len(numbers) == table.num_rows:
        return table.add_column(0, name or "__index_level_0__", pa.array(numbers, pa.int64()))
    return table.select(index_first(table.schema))


def index_first(schema: "pa.Schema") -> list[str]:
    """Columns in the order of the data frame: pandas writes its index last."""
    index = named_index(schema)
    return [*index, *(name for name in schema.names if name not in index)]


def check_no_matrix(
    path: Path | str, schema: "pa.Schema", rows: int, column: "Callable[[str], pa.ChunkedArray]"
) -> None:
    """Raises DataError for a matrix of a data frame, whose rows are called as its columns: it is no table of edges.

    ``column`` gives a column by name; it is asked for the index alone.
    """
    index = [name for name in schema.names if is_index(name) or name in named_index(schema)]
    rest = [name for name in schema.names if name not in index]
    if len(rest) != rows or len(set(schema.names)) < len(schema.names):
        return
    is_same = any([str(cell) for cell in column(name).to_pylist()] == rest for name in index)
    # Few columns without names are those of edges.
    if is_same or (not index and rest == [str(number) for number in range(rows)] and rows > 3):
        raise no_table(path)


def check_no_bare_matrix(
    path: Path | str, names: Sequence[str], rows: int, column: "Callable[[str], pa.ChunkedArray]"
) -> None:
    """Raises DataError for a matrix of numbers whose rows have no names, or only an index; ``column`` as of `check_no_matrix`."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    bare = [name for name in names if not is_index(name)]
    if len(bare) != rows or rows < 3 or says_ends(names) or says_edges(names):
        return
    columns = []
    for name in bare:
        cells = column(name)
        if pa.types.is_string(cells.type):
            # True and false are 1 and 0, as in other columns.
            cells = pc.utf8_trim_whitespace(cells)
            is_truth = pc.all(pc.is_in(pc.utf8_lower(cells), pa.array(["true", "false"]))).as_py()
            cells = pc.equal(pc.utf8_lower(cells), "true") if is_truth else cells
        try:
            columns.append(cells.cast(pa.float64()).to_numpy(zero_copy_only=False))
        except pa.ArrowException:
            # No number, so no matrix.
            return
    if is_adjacency(np.stack(columns, axis=1)):
        raise bare_matrix(path)


def says_ends(names: Sequence[str]) -> bool:
    """Whether a column at least is called as ends or weights are."""
    return called(names, (*SOURCES, *TARGETS, *WEIGHTS)) is not None


def says_edges(names: Sequence[str]) -> bool:
    """Whether a column at least is called as what edges have beside ends and weights: a time, a rating."""
    return called(names, _OF_EDGES) is not None


def no_table(path: Path | str) -> DataError:
    """That a file is no table of edges, but a matrix."""
    return DataError(f"{path} is a matrix whose rows are called as its columns; edges are a table of source and target")


def counts_rows(cells: Sequence[object]) -> bool:
    """Whether a column counts the rows, from 0 as data frames do or from 1 as R does; 0.0 and 0 are one."""
    counted = [str(number) for number in range(len(cells) + 1)]
    return [str(cell).removesuffix(".0") for cell in cells] in (counted[:-1], counted[1:])


def are_fractions(cells: "Sequence[object]") -> bool:
    """Whether all of these are whole numbers that are written as fractions, as data frames do: 5.0, of which nobody can tell if it is 5."""
    return all(isinstance(cell, str) and re.fullmatch(r"-?[0-9]+\.0+", cell) for cell in cells)


def as_names(column: "pa.ChunkedArray", *, is_float: bool = False) -> "pa.ChunkedArray":
    """A column of names as it is written, without blanks around them: whole numbers where all of it are as one writes them (not 007).

    Columns of another type than text are as they come. ``is_float``: 5.0 is a whole number too, as in the index of a data frame.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if not pa.types.is_string(column.type) or not len(column):
        return column
    column = pc.utf8_trim_whitespace(column)
    whole = pc.replace_substring_regex(column, r"\.0+$", "") if is_float else column
    if not pc.all(pc.match_substring_regex(whole, r"^(0|-?[1-9][0-9]{0,19})$"), skip_nulls=False).as_py():
        return column
    for kind in (pa.int64(), pa.uint64()):
        try:
            return whole.cast(kind)
        except pa.ArrowInvalid:
            # Beyond what it holds.
            continue
    return column
