"""Whether a first line calls columns by numbers, as programs do of themselves, or is a row."""

import re
from collections.abc import Sequence

from anabranch.graph.table_columns import are_alike, is_index

# Of columns that have no names, before their numbers: R, readr, Spark, polars, DuckDB, Arrow, pandas, spreadsheets.
_OF_PROGRAMS = ("V", "X", "Var", "...", "_", "_c", "column_", "column", "Column", "f", "col", "field", "Field")
_COUNTED = (("0", "1"), ("1", "2"), ("a", "b"), ("A", "B"))


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


def are_positions(first: Sequence[str], below: Sequence[str]) -> bool:
    """Whether a line is of the numbers of columns, as data frames call those that have no names: 0,1,2 above 5,7,0.5, or more of them.

    Two may be an edge, and three one that has a weight, where others below are whole too.
    """
    bare = [cell.strip() for cell in first]
    if len(bare) < 3 or bare != [str(number) for number in range(len(bare))]:
        return False
    return len(bare) > 3 or any(
        re.fullmatch(r"[+-]?[0-9]*\.[0-9]*([eE][+-]?[0-9]+)?", cell.strip()) for cell in below[2:]
    )
