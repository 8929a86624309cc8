"""Whether a first line calls columns by numbers, as programs do of themselves, or is a row; and columns that it does not name."""

import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from anabranch.errors import DataError
from anabranch.graph.table_columns import are_alike, is_index

_logger = logging.getLogger(__name__)

# Of columns that have no names, before their numbers: R, readr, Spark, polars, DuckDB, Arrow, pandas, spreadsheets.
_OF_PROGRAMS = ("V", "X", "Var", "...", "_", "_c", "column_", "column", "Column", "f", "col", "field", "Field")
_COUNTED = (("0", "1"), ("1", "2"), ("a", "b"), ("A", "B"))
# Weights, of which one is not whole by chance where all others are fractions.
_MANY = 8


def are_numbered(first: Sequence[str], below: Sequence[str]) -> bool:
    """Whether a line begins as programs call columns that have no names, or people two of a kind: V1 and V2, _c0 and _c1,
    node_a and node_b.

    ``below``: the next line; of other words than those of programs it must show that nodes are not called so.
    """
    places = [number for number, cell in enumerate(first) if not is_index(cell)][:2]
    found = [re.fullmatch(r"(.*[^0-9])([0-9]+|(?<=[_ -])[a-zA-Z])", first[place].strip()) for place in places]
    words = [(one[1], one[2]) for one in found if one is not None]
    if len(words) < 2 or words[0][0] != words[1][0] or tuple(end for _, end in words) not in _COUNTED:
        return False
    if are_alike(first, below):
        return False
    word, cells = words[0][0], [below[place].strip() for place in places if place < len(below)]
    if word in _OF_PROGRAMS:
        return True
    return bool(cells) and not any(cell.startswith(word) or re.search("[0-9]$", cell) for cell in cells)


def are_counted(first: Sequence[str]) -> bool:
    """Whether a line counts its cells from 0, and has three at least."""
    return len(first) > 2 and [cell.strip() for cell in first] == [str(number) for number in range(len(first))]


def are_quoted(first: Sequence[tuple[str, bool]], second: Sequence[tuple[str, bool]]) -> bool:
    """Whether a line is of numbers in quotes above numbers without: names, by who writes all text in quotes and no number.

    Args:
        first, second: cells of two lines, and whether each is in quotes.
    """
    cells = [(cell, place) for place, cell in enumerate(first) if not is_index(cell[0])]
    if not cells or not all(is_quoted and _is_number(text) for (text, is_quoted), _ in cells):
        return False
    below = [second[place][1] for _, place in cells if place < len(second) and _is_number(second[place][0])]
    return bool(below) and not any(below)


def are_positions(first: Sequence[str], rows: Sequence[Sequence[str]], *, at_blanks: bool) -> bool:
    """Whether a line is of the numbers of columns, as data frames call those that have no names: 0,1,2 above 5,7,0.5, or more of them.

    Three may be an edge from 0 to 1 that weighs 2, and are one where rows are split at blanks, where another weight is written as a whole
    number, or where 0 or 1 is an end once more and nothing speaks against it. Four are numbers of columns, but where rows are split at
    blanks and 0 or 1 is an end once more.

    Args:
        first: cells of the line.
        rows: of those below it that are looked at.
        at_blanks: lines are split at blanks, and no tabs, as those of lists of edges are, and seldom those of data frames.
    """
    if not are_counted(first):
        return False
    is_known = _is_known(rows)
    if len(first) > 3 or at_blanks:
        return len(first) > 3 and not (at_blanks and is_known)
    if not _are_fractions(rows):
        return False
    # A column of fractions has 2.0 for 2, all of many weights are seldom fractions but for one, and lists have each edge once.
    is_again = any([cell.strip() for cell in row[:2]] == ["0", "1"] for row in rows)
    has_point = any(re.search(r"\.0*$", row[2].strip()) for row in rows if len(row) > 2)
    return sum(len(row) > 2 for row in rows) >= _MANY or is_again or has_point or not is_known


def tell_of_positions(path: Path | str, first: Sequence[str], rows: Sequence[Sequence[str]], how: str = "") -> None:
    """A warning where a line that is read as an edge may be of the numbers of columns: above fractions alone, or without another edge of
    0 or 1.

    Args:
        path: for the warning.
        first, rows: as of `are_positions`.
        how: what else says which it is, behind "; ".
    """
    if are_counted(first) and rows and (_are_fractions(rows) or not _is_known(rows)):
        _logger.warning(
            "%s: its first line, %s, is read as an edge, and may be of the numbers of columns, as data frames write them; write "
            "source,target,weight in its place if it is, and above it if it is an edge%s",
            *(path, ",".join(cell.strip() for cell in first), how),
        )


def _is_known(rows: Sequence[Sequence[str]]) -> bool:
    """Whether an end is called 0 or 1."""
    return any(cell.strip() in ("0", "1") for row in rows for cell in row[:2])


def _are_fractions(rows: Sequence[Sequence[str]]) -> bool:
    """Whether there are weights in third places, and all are fractions."""
    weights = [row[2].strip() for row in rows if len(row) > 2]
    return bool(weights) and all(map(_is_fraction, weights))


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text


def _is_fraction(text: str) -> bool:
    """Whether a number is written with a point or an exponent."""
    return re.fullmatch(r"[+-]?([0-9]*\.[0-9]*|[0-9]+(?=[eE]))([eE][+-]?[0-9]+)?", text) is not None


def nameless(names: Sequence[str]) -> list[int]:
    """Numbers of columns behind a first name that have none, or pandas' for a column of that number: no index, which stands in front."""
    first = next((place for place, name in enumerate(names) if not is_index(name)), len(names))
    return [place for place in range(first, len(names)) if names[place].strip() in ("", f"Unnamed: {place}")]


def tell_of_nameless(path: Path | str, found: Iterable[tuple[str, int, object]], *, has_weight: bool) -> None:
    """A warning of columns without names that are not empty, and so left out. Raises DataError for a number where no weight is known.

    Args:
        path: for messages.
        found: of each column where its first cell stands, behind the path, its number, and what the cell is.
        has_weight: a column of weights is named or said.
    """
    told = []
    for where, place, cell in found:
        what = f"column {place} has no name, and {cell!r:.40} in it"
        if not has_weight and not isinstance(cell, bool) and _is_number(str(cell)):
            raise DataError(f"{path}{where}: {what}: is it a weight? Name it, leave it out, or say which they are")
        told.append(f"{path}{where}: {what}")
    if told:
        _logger.warning("%s; it is left out", "; ".join(told))
