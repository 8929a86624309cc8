"""What is looked at of a list of edges behind its first two rows, where these do not tell what it is."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from anabranch.graph.formats.lines import WHITESPACE, RowError, Splitter, blocks, fail, numbers
from anabranch.graph.table_columns import is_index
from anabranch.graph.table_faults import bare_matrix, is_adjacency
from anabranch.graph.table_numbered import are_positions, tell_of_positions


def rows_below(path: Path, start: bytes, line: int, delimiter: int, marks: str) -> list[list[str]]:
    """The first three cells of the rows below a line, as far as the start of the file has any."""
    text = start.removeprefix(b"\xef\xbb\xbf")
    splitter = Splitter(path, delimiter, marks, (0, 1, 2))
    # Of a row that is none who reads them all tells.
    fields, _ = splitter.split(np.frombuffer(text, np.uint8), 1)
    kept = [row for row, number in enumerate(fields.line_R.tolist()) if number > line]
    return [[fields.value(field, row) for field in range(min(3, splitter.num_fields))] for row in kept]


def check_positions(path: Path, start: bytes, line: int, first: list[str], delimiter: int, marks: str) -> None:
    """Raises DataError where a first row is of the numbers of columns, and warns where it may be; see `are_positions`."""
    below = rows_below(path, start, line, delimiter, marks)
    text = start.split(b"\n")[line - 1].strip()
    if are_positions(first, below, at_blanks=delimiter == WHITESPACE and b"\t" not in text):
        fail(
            path,
            line,
            "a row, or names of columns? Begin the file with the line source,target; or header=False says that it is a row",
        )
    how = "; header=True with weight=2 says that it names columns, header=False (--columns 0,1,2) that it is an edge"
    tell_of_positions(path, first, below, how)


def check_no_bare_matrix(path: Path, delimiter: int, marks: str, names: list[str], header_line: int) -> None:
    """Raises DataError for a matrix of numbers below names of its columns. Reads on until there are more rows than columns."""
    places = [place for place, name in enumerate(names) if not is_index(name)]
    if len(places) < 3:
        return
    splitter, parts, count = Splitter(path, delimiter, marks, tuple(places)), [], 0
    for text, first_line in blocks(path, 1 << 16):
        fields, problem = splitter.split(text, first_line)
        if len(fields.line_R) and fields.line_R[0] == header_line:
            fields.keep(slice(1, None))
        count += len(fields.line_R)
        if problem or count > len(places):
            return
        try:
            parts.append(np.stack([numbers(fields, field, "cell") for field in range(len(places))], axis=1))
        except RowError:
            # No number, so no matrix.
            return
    if is_adjacency(np.concatenate(parts)):
        raise bare_matrix(path)


def first_filled(
    path: Path, delimiter: int, marks: str, places: tuple[int, ...], header_line: int
) -> Iterator[tuple[str, int, str]]:
    """Of these columns the first cell that is not empty: where it stands, its column, and what it is. Reads on until all have one."""
    splitter, left = Splitter(path, delimiter, marks, places), set(range(len(places)))
    for text, first_line in blocks(path):
        fields, problem = splitter.split(text, first_line)
        if len(fields.line_R) and fields.line_R[0] == header_line:
            fields.keep(slice(1, None))
        for field in sorted(left):
            filled_R = np.flatnonzero(fields.end_FR[field] > fields.start_FR[field])
            if len(filled_R):
                left.remove(field)
                row = int(filled_R[0])
                yield f", line {fields.line_R[row]}", places[field], fields.value(field, row)
        if problem or not left:
            # Of a problem the reading of the edges tells.
            return
