"""What a column Type, as Gephi writes it, says of the direction of all edges."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

_DIRECTIONS = {"directed": True, "undirected": False}


class MixedError(Exception):
    """Edges of a table differ in direction: who reads the table knows its rows.

    Attributes:
        row: the first that differs from the first one.
        what: in words, without what may be done.
    """

    def __init__(self, row: int, what: str) -> None:
        super().__init__(what)
        self.row, self.what = row, what


def is_direction(cell: object) -> bool:
    """Whether a cell says Directed or Undirected, in any case."""
    return isinstance(cell, str) and cell.strip().lower() in _DIRECTIONS


def direction_of(cells: "pa.Array | pa.ChunkedArray", expected: bool | None = None) -> bool | None:
    """Whether cells say that all edges are directed, or that none is; None where the first says neither, and the column is another.

    Args:
        cells: of the column, in the order of the rows.
        expected: what cells before these say; None for the first.

    Raises MixedError where one says otherwise.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(cells.type):
        cells = cells.cast(cells.type.value_type)
    if not len(cells) or not (pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type)):
        return expected
    first = cells[0].as_py()
    if expected is None and not is_direction(first):
        return None
    found = _DIRECTIONS[first.strip().lower()] if expected is None else expected
    word = next(word for word, is_directed in _DIRECTIONS.items() if is_directed == found)
    others = pc.indices_nonzero(pc.not_equal(pc.utf8_lower(pc.utf8_trim_whitespace(pc.fill_null(cells, ""))), word))
    if len(others):
        row = others[0].as_py()
        raise MixedError(
            row,
            f"an edge of the type {cells[row].as_py()!r}, where those before are {word}",
        )
    return found
