"""Edge lists and CSV: one edge a line, its ends and perhaps a weight. `read_edge_list` finds out how a file is written, then streams it."""
# Shapes: R rows of a block, E edges

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.errors import DataError
from anabranch.graph.checks import weight_problem
from anabranch.graph.formats.build import EdgeSink, Rules
from anabranch.graph.formats.layout import NOTE, Dialect, Layout, check_comments, first_rows, layout_of
from anabranch.graph.formats.lines import (
    DOUBTFUL,
    ROWS,
    SKIPPED,
    WHITESPACE,
    Fields,
    RowError,
    Splitter,
    blocks,
    fail,
    gather,
    integers,
    numbers,
)
from anabranch.graph.store import Graph
from anabranch.graph.table_columns import names_ends
from anabranch.graph.table_direction import MixedError, direction_of


def read_edge_list(path: Path, rules: Rules, dialect: Dialect) -> Graph:
    """The graph of a text file. Raises as `anabranch.graph.formats.read_graph`."""
    start, lines, texts = first_rows(path, dialect)
    note = NOTE.search(start)
    if note and note[2] and rules.num_nodes is None and rules.ids == "auto":
        rules = replace(rules, ids="names")
    if note and rules.num_nodes is None and rules.ids in ("auto", "numbers"):
        rules = replace(rules, num_nodes=int(note[1]))
    if note and rules.directed is None:
        rules = replace(rules, directed=note[3] == b"directed")
    layout = layout_of(path, rules, dialect, start, lines, texts, note is not None)
    if layout.is_text and rules.num_nodes is not None:
        rules = replace(rules, num_nodes=None)
    full = SKIPPED
    if dialect.comment is None and layout.is_text and layout.delimiter != WHITESPACE and not note:
        # Nodes may be called so, as hashtags are.
        full = ROWS if layout.header_line else DOUBTFUL
    if full == DOUBTFUL:
        check_comments(path, start, lines[0], dialect.marks, layout.delimiter)
    if layout.direction is not None and rules.directed is None:
        rules = replace(rules, directed=_said_direction(path, rules, dialect, layout, full))
    splitter = Splitter(path, layout.delimiter, dialect.marks, layout.columns, full)
    with EdgeSink(rules, path, len(layout.columns) > 2) as sink:
        for text, first_line in blocks(path, rules.block_bytes):
            fields, problem = splitter.split(text, first_line)
            if layout.header_line and len(fields.line_R) and fields.line_R[0] == layout.header_line:
                fields.keep(slice(1, None))
            again = _header_again(fields, layout.header) if layout.is_text else None
            if again is not None:
                problem = DataError(
                    f"{path}, line {fields.line_R[again]}: the names of columns once more, as where a second file was put behind "
                    "a first; leave the line out, or put its names in quotes if it is an edge"
                )
                fields.keep(slice(0, again))
            add_fields(path, sink, fields, layout.is_text, has_quoted_words=layout.has_quoted_words)
            if problem:
                raise problem
        if not sink.seen:
            raise DataError(f"{path} holds no edges")
        return sink.finish()


def _said_direction(path: Path, rules: Rules, dialect: Dialect, layout: Layout, full: int) -> bool | None:
    """What Gephi's column Type says of all edges. Raises DataError naming the first line that says otherwise."""
    assert layout.direction is not None
    splitter = Splitter(path, layout.delimiter, dialect.marks, (layout.direction,), full)
    found = None
    for text, first_line in blocks(path, rules.block_bytes):
        fields, problem = splitter.split(text, first_line)
        if layout.header_line and len(fields.line_R) and fields.line_R[0] == layout.header_line:
            fields.keep(slice(1, None))
        try:
            found = direction_of(_text(fields, 0, "type", has_quoted_words=False), found)
        except RowError as error:
            fail(path, int(fields.line_R[error.row]), error.what)
        except MixedError as error:
            fail(path, int(fields.line_R[error.row]), f"{error.what}; `directed` says what all are")
        if problem:
            # Of which the reading of the edges tells, or of what is before it.
            return found
    return found


def _header_again(fields: Fields, header: tuple[tuple[str, bool], ...]) -> int | None:
    """The first row that is written as the header is, in quotes or not; where that names ends, in any case and order of these."""
    if not header:
        return None
    names = [text for text, _ in header]
    low = [name.lower() for name in names]
    meant = [low, [low[1], low[0], *low[2:]]] if names_ends(names) else [names]
    is_same = np.ones(len(fields.line_R), bool)
    for field, (_, is_quoted) in enumerate(header):
        # Doubled quotes within are rare in names of columns: such a row is an edge.
        is_same &= fields.quoted_FR[field] == is_quoted
        words = [one[field].encode() for one in meant]
        if len(meant) > 1 and not all(map(bytes.isascii, words)):
            # Of which another case may be of other bytes, and more of them.
            continue
        is_same &= np.isin(fields.end_FR[field] - fields.start_FR[field], list(map(len, words)))
        if all(words):
            begin_R = fields.text[np.minimum(fields.start_FR[field], len(fields.text) - 1)]
            is_same &= np.isin(begin_R | 32, [word[0] | 32 for word in words])
    for row in np.flatnonzero(is_same).tolist():
        cells = [fields.value(field, row) for field in range(len(header))]
        if ([cell.lower() for cell in cells] if len(meant) > 1 else cells) in meant:
            return row
    return None


def add_fields(
    path: Path, sink: EdgeSink, fields: Fields, is_text: bool, base: int = 0, *, has_quoted_words: bool = False
) -> None:
    """Check the rows of a block and hand them on; ids start at ``base``. Raises DataError naming the first line with a fault."""
    rules = sink.rules

    def ends(field: int) -> Any:
        what = ("source", "target")[field]
        return _text(fields, field, what, has_quoted_words) if is_text else _ids(fields, field, what, rules, base)

    def weights(field: int) -> np.ndarray:
        return checked_floats(numbers(fields, field, "weight"), rules)

    columns: list[Any] = []
    fault, fault_line = None, 0
    for field in range(len(fields.wanted)):
        while len(columns) == field:
            try:
                columns.append((weights if field == 2 else ends)(field))
            except RowError as error:
                # A row before it may have a fault in a later column: look at those as well.
                fault, fault_line = error, int(fields.line_R[error.row])
                fields.keep(slice(0, error.row))
                columns = [column[: error.row] for column in columns]
    if fault:
        fail(path, fault_line, fault.what)
    (sink.add_text if is_text else sink.add)(columns[0], columns[1], columns[2] if len(columns) > 2 else None)


def _ids(fields: Fields, field: int, what: str, rules: Rules, base: int) -> np.ndarray:
    hint = (
        ", as the ids of the first row are; ids='text' reads all of them as text"
        if rules.ids == "auto" and not base
        else ""
    )
    found = integers(fields, field, what, hint)
    if rules.num_nodes is None and rules.ids != "numbers":
        start_R, length_R = fields.start_FR[field], fields.end_FR[field] - fields.start_FR[field]
        padded = np.flatnonzero((length_R > 1) & (fields.text[np.minimum(start_R, len(fields.text) - 1)] == ord("0")))
        if len(padded):
            row = int(padded[0])
            raise RowError(
                row,
                f"the {what} {fields.value(field, row)!r} begins with 0, so that it may be a name; "
                f"ids='text' reads all of them as text, ids='numbers' as numbers",
            )
        return found
    high = np.iinfo(np.int64).max if rules.num_nodes is None else rules.num_nodes - 1 + base
    if len(found) and (found.min() < base or found.max() > high):
        row = int(np.flatnonzero((found < base) | (found > high))[0])
        allowed = "must not be negative" if rules.num_nodes is None else f"is out of range; nodes are {base} to {high}"
        raise RowError(row, f"the {what} {found[row]} {allowed}")
    return found - base if base else found


def _text(fields: Fields, field: int, what: str, has_quoted_words: bool) -> Any:
    """A column as `pyarrow` array of text. Raises RowError for a cell that is empty, or missing as R says it, or is not UTF-8."""
    import pyarrow as pa

    rows = len(fields.line_R)
    start_R, end_R, quoted_R = fields.start_FR[field], fields.end_FR[field], fields.quoted_FR[field]
    empty = np.flatnonzero((start_R == end_R) & (quoted_R == 0))
    if len(empty):
        raise RowError(int(empty[0]), f"the {what} is empty")
    short = np.flatnonzero((end_R - start_R == 2) & (quoted_R == 0)) if has_quoted_words else ()
    row = next((int(row) for row in short if bytes(fields.text[start_R[row] : end_R[row]]) == b"NA"), None)
    if row is not None:
        raise RowError(row, f'the {what} is NA, a missing cell where words are in quotes; a node of this name is "NA"')
    offset_R = np.zeros(rows + 1, np.int32)
    np.cumsum(end_R - start_R, out=offset_R[1:])
    gathered = np.empty(int(offset_R[-1]), np.uint8)
    gather(fields.text, start_R, end_R, offset_R, gathered)
    array = pa.Array.from_buffers(pa.string(), rows, [None, pa.py_buffer(offset_R), pa.py_buffer(gathered)])
    try:
        array.validate(full=True)
    except pa.ArrowInvalid:
        row = next(row for row in range(rows) if not _is_utf8(gathered[offset_R[row] : offset_R[row + 1]]))
        raise RowError(row, f"the {what} is not UTF-8 text") from None
    if (quoted_R == 2).any():
        return pa.array([fields.value(field, row) for row in range(rows)], pa.string())
    return array


def _is_utf8(text: np.ndarray) -> bool:
    try:
        bytes(text).decode()
    except UnicodeDecodeError:
        return False
    return True


def checked_floats(value_E: np.ndarray, rules: Rules) -> np.ndarray:
    """Weights as float32. Raises RowError for a bad one."""
    with np.errstate(over="ignore"):
        weight_E = value_E.astype(np.float32)
    problem = weight_problem(weight_E, rules.drop_zero, rules.allow_negative)
    if problem:
        row, what = problem
        raise RowError(row, f"the weight {value_E[row]} is not allowed; weights must be {what}")
    return weight_E
