"""What tells that a table is none of those it looks like, so that it is refused rather than read as another."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anabranch.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

_OPENING, _CLOSING = "([{", ")]}"
_NAMED = "Name the columns in the first line, as source,target"


def row_fault(rows: Sequence[Sequence[str]], *, has_ends: bool) -> tuple[int, str] | None:
    """The number of a row, of the first ones of a table, that is none of a table of edges, and what it is; None where all may be.

    Args:
        rows: cells; x where one is in quotes.
        has_ends: names of columns say which are the ends, or whoever asks does.
    """
    python = next((number for number, row in enumerate(rows) if is_python(row)), None)
    if python is not None:
        return python, "a row as Python or JSON prints it; write edges without brackets, as `1,2`"
    cells = [[cell.strip() for cell in row if cell.strip()] for row in rows]
    if has_ends or not cells or not all(cells):
        return None
    arrow = next((number for number, row in enumerate(cells) if len(row) > 2 and _is_arrow(row[1])), None)
    if arrow is None and all(len(row) > 2 and _is_sign(row[1]) for row in cells):
        arrow = 0
    if arrow is not None:
        sign = cells[arrow][1]
        return arrow, f"is {sign!r} a node, or a sign between two? {_NAMED}, or leave the signs out"
    # Below a line of names, too.
    lists = [number for number, row in enumerate(cells) if _begins_list(row[0])]
    if lists and (len(lists) == len(cells) or not any(re.search("[0-9]", cell) for cell in cells[0])):
        begin = cells[lists[0]][0]
        return lists[0], f"is {begin!r} a node, or are those behind it neighbours? {_NAMED}, or write an edge a line"
    return None


def _is_sign(text: str) -> bool:
    return re.fullmatch(r"[-+=<>~|:*/\\]+", text) is not None


def _is_arrow(text: str) -> bool:
    """Whether it is a sign that no missing cell has: ``->``, ``<=>``."""
    return re.fullmatch(r"[-=~]*[<>][-=~<>]*", text) is not None


def _begins_list(text: str) -> bool:
    """Whether a cell is of a node in front of its neighbours: ``1:``, or ``1: 2`` where these are split at commas."""
    return re.fullmatch(r"[^\s:]+:(\s+-?[0-9]+)?", text) is not None


def is_python(cells: Sequence[str]) -> bool:
    """Whether cells are of a row as Python or JSON prints it: ``(1, 2)``, ``Edge(1, 2)``, ``0: [1, 2]``, ``{"source": 1, "target": 2}``.

    A bracket opens in one of the first two and closes in a later one; names may hold both, and what is behind two ends is none of these.
    """
    bare = [cell.strip() for cell in cells if cell.strip()]
    # A cell that ends in one is a smile.
    begins = (number for number, cell in enumerate(bare[:2]) if _depth(cell) > 0 and cell[-1] not in _OPENING)
    opening = next(begins, None)
    return opening is not None and any(_depth(cell) < 0 for cell in bare[opening + 1 :])


def _depth(text: str) -> int:
    return sum(text.count(mark) for mark in _OPENING) - sum(text.count(mark) for mark in _CLOSING)


def other_mark(lines: Sequence[str]) -> str | None:
    """What lines that have commas may be split at instead, so that commas are those of decimals: ``a b 0,5``, ``1;2,5``; else None.

    Each of them has as many of that mark. What is in quotes does not count.
    """
    bare = [re.sub(r'"[^"]*"', "x", line.strip()) for line in lines]
    for mark in ";|":
        counts = {line.count(mark) for line in bare}
        if len(counts) == 1 and counts != {0}:
            return mark
    words = [line.split() for line in bare]
    has_ends = len({len(row) for row in words}) == 1 and len(words[0]) > 2
    return " " if has_ends and all(map(_has_decimals, words)) else None


def _has_decimals(words: Sequence[str]) -> bool:
    """Whether commas of a line that is split at blanks are those of decimals, and none of names: ``Area 51,7 Eleven``."""
    places = [place for place, word in enumerate(words) if "," in word]
    if not places or not all(_has_decimal_comma(words[place]) for place in places):
        return False
    # Behind the ends or in front of them there are numbers alone; a name that ends in 0 is rare.
    behind = all(_has_decimal_comma(word) or re.fullmatch(r"[+-]?[0-9]+", word) for word in words[places[0] :])
    return behind or places == [0] or any(re.match(r"[+-]?0,", words[place]) for place in places)


def _has_decimal_comma(word: str) -> bool:
    return re.fullmatch(r"[+-]?[0-9]+,[0-9]+([eE][+-]?[0-9]+)?", word) is not None


def check_one_file(
    path: Path | str,
    table: "pa.Table",
    names: Sequence[str] | None,
    is_meant: Callable[[int], bool] = lambda row: False,
) -> None:
    """Raises DataError where a table of text is of two files, the second put behind the first: names of columns stand in a row once
    more, or a row begins with a byte order mark.

    ``names``: of the columns; None where no line has any. ``is_meant`` tells of a row whether it is one all the same.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    columns = table.columns
    if not columns or not pa.types.is_string(columns[0].type):
        return
    for column in columns:
        if not pa.types.is_string(column.type):
            continue
        marked = pc.starts_with(pc.utf8_ltrim_whitespace(pc.fill_null(column, "")), "\ufeff")
        for row in pc.indices_nonzero(marked).to_pylist():
            if not is_meant(row):
                raise DataError(
                    f"{path}, row {row}: a cell begins with a byte order mark (U+FEFF), as where a second file was put behind a first; "
                    "take it out"
                )
    if names is None or not all(pa.types.is_string(column.type) for column in columns):
        return
    low = [name.strip().lower() for name in names]
    cells = [pc.utf8_lower(pc.utf8_trim_whitespace(pc.fill_null(column, ""))) for column in columns]
    is_same = None
    for column in cells:
        found = pc.is_in(column, pa.array(low))
        is_same = found if is_same is None else pc.and_(is_same, found)
    for row in pc.indices_nonzero(is_same).to_pylist():
        # In any case and order, as other programs write them.
        if sorted(column[row].as_py() for column in cells) == sorted(low) and not is_meant(row):
            raise DataError(
                f"{path}, row {row}: the names of columns once more, as where a second file was put behind a first; leave the line out"
            )


def check_meaning(path: Path | str, source: tuple[int, str], target: tuple[int, str]) -> None:
    """Raises DataError where columns, given by place and name, are called as ends are, but in a way that has two meanings, or whose nodes
    are of two kinds that have the same ids."""
    low = [name.strip().lower() for _, name in (source, target)]
    if low == ["head", "tail"] and target[0] < source[0]:
        raise DataError(
            f"{path}: does an edge go from {target[1]!r} to {source[1]!r}, as in graph theory, or the other way, as in tables of facts? "
            "Call the columns source and target, or say which they are"
        )
    groups = [re.fullmatch(r".*:(?:start_id|end_id)(?:\((.*)\))?", name) for name in low]
    if all(groups) and len({group[1] for group in groups if group}) > 1:
        raise DataError(
            f"{path}: {source[1]!r} and {target[1]!r} are of two groups, in each of which an id is another node; "
            "put the group in front of the ids and call the columns source and target, or say which they are if no id is in both"
        )


def is_adjacency(values_NN: Any) -> bool:
    """Whether an array [N, N] looks like a matrix of a graph, and not like N edges of N columns; of 3 and 4 it may be either, and has to
    be symmetric, empty on its diagonal, or of 0 and 1 alone."""
    count = len(values_NN)
    if values_NN.shape != (count, count) or count < 3:
        return False
    is_symmetric = (values_NN == values_NN.T).all()
    is_binary = ((values_NN == 0) | (values_NN == 1)).all()
    return bool(count > 4 or is_symmetric or is_binary or not values_NN.diagonal().any())


def bare_matrix(path: Path | str) -> DataError:
    """That a file seems to be a matrix whose rows have no names."""
    return DataError(
        f"{path} has as many rows as columns, all of numbers, and none is called as ends are: is it a matrix? "
        "If it is a table of edges, call two columns source and target in its first line, or say which they are"
    )
