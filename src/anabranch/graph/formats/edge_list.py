"""Edge lists and CSV: one edge a line, its ends and perhaps a weight. `read_edge_list` finds out how a file is written, then streams it."""
# Shapes: R rows of a block, E edges

import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.bounds import shown
from anabranch.errors import DataError, InputError
from anabranch.graph.checks import weight_problem
from anabranch.graph.formats.build import EdgeSink, Rules
from anabranch.graph.formats.lines import (
    WHITESPACE,
    Fields,
    RowError,
    Splitter,
    blocks,
    fail,
    first_bytes,
    gather,
    integers,
    numbers,
)
from anabranch.graph.store import Graph
from anabranch.graph.table_columns import (
    WEIGHTS,
    Column,
    called,
    chosen_ends,
    column_of,
    is_index,
    is_matrix,
    names_ends,
)

# `write_graph` leaves it.
NOTE = re.compile(rb"^# anabranch graph: (\d+) nodes, (directed|undirected)\r?$", re.MULTILINE)

# A longer row among the first two, which are looked at field by field, is none of a list of edges.
MOST_ROW = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """How a text file is written; see `anabranch.graph.formats.read_graph`.

    Attributes:
        source, target: columns by name or number; None for the first two (or those with well-known names).
        weight: "auto", None for none, or a column.
        header: whether the first row names the columns; None looks.
        delimiter: one character, "whitespace", or None to look.
        comment: characters that start a line to be left out.
    """

    source: Column = None
    target: Column = None
    weight: Column = "auto"
    header: bool | None = None
    delimiter: str | None = None
    comment: str = "#%"


@dataclass(frozen=True)
class Layout:
    """What was found out about a file.

    Attributes:
        delimiter: a byte, or `WHITESPACE`.
        header_line: the line of the header, 0 if there is none.
        columns: numbers of the columns of source, target and (perhaps) weight.
        is_text: whether ids are text.
    """

    delimiter: int
    header_line: int
    columns: tuple[int, ...]
    is_text: bool


def read_edge_list(path: Path, rules: Rules, dialect: Dialect) -> Graph:
    """The graph of a text file. Raises as `anabranch.graph.formats.read_graph`."""
    start, lines, texts = _first_rows(path, dialect)
    note = NOTE.search(start)
    if note and rules.num_nodes is None and rules.ids in ("auto", "numbers"):
        rules = replace(rules, num_nodes=int(note[1]))
    if note and rules.directed is None:
        rules = replace(rules, directed=note[2] == b"directed")
    layout = _layout(path, rules, dialect, lines, texts, note is not None)
    if layout.is_text and rules.num_nodes is not None:
        rules = replace(rules, num_nodes=None)
    splitter = Splitter(path, layout.delimiter, dialect.comment, layout.columns)
    with EdgeSink(rules, path, len(layout.columns) > 2) as sink:
        for text, first_line in blocks(path, rules.block_bytes):
            fields, problem = splitter.split(text, first_line)
            if layout.header_line and len(fields.line_R) and fields.line_R[0] == layout.header_line:
                fields.keep(slice(1, None))
            add_fields(path, sink, fields, layout.is_text)
            if problem:
                raise problem
        if not sink.seen:
            raise DataError(f"{path} holds no edges")
        return sink.finish()


def add_fields(path: Path, sink: EdgeSink, fields: Fields, is_text: bool, base: int = 0) -> None:
    """Check the rows of a block and hand them on; ids start at ``base``. Raises DataError naming the first line with a fault."""
    rules = sink.rules

    def ends(field: int) -> Any:
        what = ("source", "target")[field]
        return _text(fields, field, what) if is_text else _ids(fields, field, what, rules, base)

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
        return found
    high = np.iinfo(np.int64).max if rules.num_nodes is None else rules.num_nodes - 1 + base
    if len(found) and (found.min() < base or found.max() > high):
        row = int(np.flatnonzero((found < base) | (found > high))[0])
        allowed = "must not be negative" if rules.num_nodes is None else f"is out of range; nodes are {base} to {high}"
        raise RowError(row, f"the {what} {found[row]} {allowed}")
    return found - base if base else found


def _text(fields: Fields, field: int, what: str) -> Any:
    """A column as `pyarrow` array of text."""
    import pyarrow as pa

    rows = len(fields.line_R)
    start_R, end_R, quoted_R = fields.start_FR[field], fields.end_FR[field], fields.quoted_FR[field]
    empty = np.flatnonzero((start_R == end_R) & (quoted_R == 0))
    if len(empty):
        raise RowError(int(empty[0]), f"the {what} is empty")
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


def _first_rows(path: Path, dialect: Dialect) -> tuple[bytes, list[int], list[str]]:
    """The start of a file, and line numbers and texts of its first two rows."""
    size = 1 << 16
    while True:
        start = first_bytes(path, size)
        if b"\0" in start[: 1 << 16]:
            next(iter(blocks(path)))  # says where
        whole = start if len(start) < size else start[: start.rfind(b"\n") + 1]
        found = list(islice(_data_lines(whole, dialect.comment), 2))
        long = next((number for number, line in found if len(line) > MOST_ROW), None)
        if long is None and len(found) < 2 and len(start) - len(whole) > MOST_ROW:
            long = whole.count(b"\n") + 1
        if long is not None:
            fail(path, long, f"a line of more than {MOST_ROW >> 20:,} MiB; this is no list of edges (give `format`)")
        if len(found) == 2 or len(start) < size:
            break
        size *= 16
    if not start:
        raise DataError(f"{path} is empty")
    if not found:
        raise DataError(f"{path} holds no edges, only comments and blank lines")
    return whole, [number for number, _ in found], [line.decode("utf-8", "replace") for _, line in found]


def _data_lines(text: bytes, comment: str) -> Iterator[tuple[int, bytes]]:
    """Lines that are neither blank nor comments, with their numbers."""
    for number, line in enumerate(io.BytesIO(text.removeprefix(b"\xef\xbb\xbf")), 1):
        bare = line.strip()
        if bare and bare[:1].decode("latin-1") not in tuple(comment):
            yield number, line.rstrip(b"\n")


def _layout(path: Path, rules: Rules, dialect: Dialect, lines: list[int], texts: list[str], noted: bool):
    delimiter = _delimiter(texts[0], dialect.delimiter)
    rows = [_fields_of(path, text, line, delimiter) for text, line in zip(texts, lines, strict=True)]
    first = [text for text, _ in rows[0]]
    if len(first) < 2:
        mark = "whitespace" if delimiter == WHITESPACE else repr(chr(delimiter))
        fail(
            path,
            lines[0],
            f"{len(first)} field, where an edge needs two (split at {mark}; `delimiter` says what else)",
        )
    has_header = _has_header(rows, dialect) if dialect.header is None and not noted else bool(dialect.header)
    if dialect.header is None and len(rows) > 1 and is_matrix(first, [text for text, _ in rows[1]]):
        raise DataError(
            f"{path} is a matrix whose rows are called as its columns; edges are a table of source and target"
        )
    names = first if has_header else None
    columns = _columns(path, dialect, names, len(first), lines[0])
    sample = rows[1] if has_header and len(rows) > 1 else rows[0]
    if has_header and len(rows) == 1:
        raise DataError(f"{path} holds no edges, only the header in line {lines[0]}")
    inside = [sample[column] for column in columns[:2] if column < len(sample)]
    is_whole = [_is_whole(text) and not quoted for text, quoted in inside]
    if rules.ids == "numbers" or (rules.num_nodes is not None and rules.ids == "auto" and not noted):
        is_text = False
    elif rules.ids == "text":
        is_text = True
    else:
        is_text = not all(is_whole)
        if is_text and all(_is_number(text) and not quoted for text, quoted in inside):
            # Of a data frame whose column had an empty cell once: 5.0 and 5 would be two nodes.
            text = next(text for text, _ in inside if not _is_whole(text))
            fail(
                path,
                lines[-1] if has_header else lines[0],
                f"the id {text!r} is a number, but not whole; ids='text' reads all as text",
            )
    if (
        len(columns) > 2
        and dialect.weight == "auto"
        and columns[2] < len(sample)
        and not _is_number(sample[columns[2]][0])
    ):
        place = lines[1] if has_header else lines[0]
        fail(
            path,
            place,
            f"the third field {sample[columns[2]][0]!r} is not a number; weight=None leaves it out, weight=COLUMN takes another",
        )
    return Layout(delimiter, lines[0] if has_header else 0, columns, is_text)


def _delimiter(text: str, given: str | None) -> int:
    if given == "whitespace" or given == " ":
        return WHITESPACE
    if given is not None:
        if len(given) != 1 or not given.isascii() or given in '"\n\r\0':
            raise InputError(f"delimiter is {shown(given)}; it must be one ASCII character, or 'whitespace'")
        return ord(given)
    bare = re.sub(r'"[^"]*"', "", text.strip())
    # Aligned by tabs and blanks.
    if all(map(_is_number, bare.split())):
        return WHITESPACE
    # Where commas are those of decimals.
    marks = "\t;,|" if bare.count(";") > bare.count(",") else "\t,;|"
    return next((ord(mark) for mark in marks if mark in bare), WHITESPACE)


def _fields_of(path: Path, text: str, line: int, delimiter: int) -> list[tuple[str, bool]]:
    """All fields of a line, and whether each was in quotes, by the rules of the kernel."""
    block = np.frombuffer(text.encode(), np.uint8)
    splitter = Splitter(path, delimiter, "", tuple(range(len(block) + 1)))
    fields, problem = splitter.split(block, line)
    if problem:
        raise problem
    return [(fields.value(field, 0), bool(fields.quoted_FR[field, 0])) for field in range(splitter.num_fields)]


def _has_header(rows: list[list[tuple[str, bool]]], dialect: Dialect) -> bool:
    if any(isinstance(column, str) and column != "auto" for column in (dialect.source, dialect.target, dialect.weight)):
        return True
    first = [text for text, _ in rows[0]]
    # A data frame's index is no node, and what stands behind it are words.
    has_index = len(first) > 2 and is_index(first[0]) and not any(map(_is_number, first[1:]))
    if has_index or names_ends(first):
        return True
    ends = [
        column if isinstance(column, int) else place for place, column in enumerate((dialect.source, dialect.target))
    ]
    if len(rows) < 2 or len(rows[1]) <= max(ends) or len(first) <= max(ends):
        return False
    second = [text for text, _ in rows[1]]
    if all(_is_whole(second[end]) for end in ends) and not any(_is_whole(first[end]) for end in ends):
        return True
    weight = dialect.weight if isinstance(dialect.weight, int) else 2
    has_third = dialect.weight is not None and 0 <= weight < min(len(first), len(second))
    return has_third and _is_number(second[weight]) and first[weight].lower() in WEIGHTS


def _columns(path: Path, dialect: Dialect, names: list[str] | None, count: int, line: int) -> tuple[int, ...]:
    source, target = chosen_ends(path, dialect.source, dialect.target, names, count)
    if dialect.weight is None or dialect.weight is False:
        return source, target
    if dialect.weight != "auto":
        weight = column_of(path, dialect.weight, names, count, None)
        assert weight is not None
        return source, target, weight
    if names is not None:
        weight = called(names, WEIGHTS)
    else:
        weight = next((column for column in range(count) if column not in (source, target)), None)
    return (source, target) if weight is None else (source, target, weight)


def _is_whole(text: str) -> bool:
    return re.fullmatch(r"[+-]?[0-9]+", text) is not None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text
