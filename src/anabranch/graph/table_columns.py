"""What columns of tables are called by those who write them."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from anabranch.bounds import shown
from anabranch.errors import DataError, InputError
from anabranch.graph.checks import near_name

if TYPE_CHECKING:
    import pyarrow as pa

# Of ends of edges, in pairs.
_ENDS = (
    ("source", "target"),
    ("src", "dst"),
    ("from", "to"),
    ("from_node", "to_node"),
    ("fromnode", "tonode"),
    ("from_id", "to_id"),
    ("node1", "node2"),
    ("node_1", "node_2"),
    ("id1", "id2"),
    ("citing", "cited"),
    ("origin", "destination"),
    ("sender", "receiver"),
    ("source", "dest"),
)
# Other things are called so too: matrices have values v, times have a start and an end.
_UNSURE = (("u", "v"), ("head", "tail"), ("start", "end"))
SOURCES, TARGETS = (tuple(dict.fromkeys(words)) for words in zip(*_ENDS, *_UNSURE, strict=True))
WEIGHTS = ("weight", "weights", "w", "edge_weight", "strength")


# By name or number; None where it is not said.
Column = int | str | None


def is_index(name: str) -> bool:
    """Whether a column is called as data frames call their index.

    Not at all in a text; as pandas calls that when it reads it again, and again; or as pandas calls it in Parquet.
    """
    return re.fullmatch(r"|Unnamed: [0-9]+(\.[0-9]+)*|__index_level_[0-9]+__", name.strip()) is not None


def called(names: Sequence[str], words: Sequence[str]) -> int | None:
    """The number of the column that is called by one of these words, in any case; the first word of which there is one decides."""
    low = [name.strip().lower() for name in names]
    return next((low.index(word) for word in words if word in low), None)


def names_ends(cells: Sequence[str]) -> bool:
    """Whether a line names columns of edges: one of sources, and one of targets."""
    return called(cells, SOURCES) is not None and called(cells, TARGETS) is not None


def _others(names: Sequence[str], taken: set[int | None], wanted: int) -> list[int]:
    """Columns beside some. A data frame's index and weights are among them only where there are too few others."""
    free = [number for number in range(len(names)) if number not in taken]
    bare = [number for number in free if not is_index(names[number]) and names[number].strip().lower() not in WEIGHTS]
    return bare if len(bare) >= wanted else free


def known_ends(path: Path | str, names: Sequence[str]) -> tuple[int | None, int | None]:
    """Numbers of the columns of source and target by what they are called; None for one that is not known, and stands by its place.

    Words that mean other things too count where both are there and nothing else may be an end before them. Where one end is known and it is
    not plain which column is the other, nobody can tell.

    Raises DataError where nobody can.
    """
    low = [name.strip().lower() for name in names]
    whole = [pair for pair in _ENDS if set(pair) <= set(low)]
    if len(whole) == 1 or whole[:1] == [_ENDS[0]]:
        return low.index(whole[0][0]), low.index(whole[0][1])
    places = [called(names, words) for words in (SOURCES, TARGETS)]
    if any(sum(name in words for name in low) > 1 for words in (SOURCES, TARGETS)):
        raise _either(path, names)
    unsure = [place is not None and any(low[place] in pair for pair in _UNSURE) for place in places]
    free = [number for number, name in enumerate(low) if not is_index(names[number]) and name not in WEIGHTS]
    if None not in places and (not any(unsure) or set(free[:2]) == set(places)):
        return places[0], places[1]
    if all(place is None or is_unsure for place, is_unsure in zip(places, unsure, strict=True)) and None in places:
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
    path: Path | str, source: Column, target: Column, names: Sequence[str] | None, count: int
) -> tuple[int, int]:
    """Numbers of the columns of source and target, where whoever asks may have said one or both.

    Raises InputError for a column that there is not, or one that is both; DataError as `known_ends`.
    """
    known = names or [str(number) for number in range(count)]
    by_name = (
        known_ends(path, known)
        if source is None and target is None
        else [called(known, words) for words in (SOURCES, TARGETS)]
    )
    first = column_of(path, source, names, count, by_name[0])
    second = column_of(path, target, names, count, by_name[1])
    if first is not None and first == second:
        if source is not None and target is not None:
            raise InputError(f"source and target are both column {names[first] if names else first} of {path}")
        # Whoever asks knows better than a word.
        first, second = (None, second) if source is None else (first, None)
    rest = iter(_others(known, {first, second}, (first is None) + (second is None)))
    return next(rest) if first is None else first, next(rest) if second is None else second


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
