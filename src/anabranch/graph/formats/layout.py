"""How a list of edges is written: its delimiter, its line of names, which columns are ends and weights, and whether ids are text."""

import io
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from anabranch.bounds import shown
from anabranch.errors import DataError, InputError
from anabranch.graph.formats.build import Rules
from anabranch.graph.formats.further_rows import check_no_bare_matrix, check_positions, first_filled
from anabranch.graph.formats.lines import IN_DOUBT, WHITESPACE, Splitter, blocks, fail, first_bytes
from anabranch.graph.table_columns import (
    WEIGHTS,
    Column,
    are_alike,
    called,
    chosen_ends,
    column_of,
    has_quoted_words,
    is_end,
    is_index,
    is_matrix,
    known_ends,
    names_ends,
    no_table,
    says_edges,
    says_ends,
)
from anabranch.graph.table_direction import is_direction
from anabranch.graph.table_faults import other_mark, row_fault
from anabranch.graph.table_numbered import are_counted, are_numbered, are_quoted, nameless, tell_of_nameless

_logger = logging.getLogger(__name__)

# `write_graph` leaves it.
NOTE = re.compile(rb"^# anabranch graph: (\d+) nodes( by name)?, (directed|undirected)\r*$", re.MULTILINE)

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
        comment: characters that start a line to be left out; None for # and %, where the line is no row.
    """

    source: Column = None
    target: Column = None
    weight: Column = "auto"
    header: bool | None = None
    delimiter: str | None = None
    comment: str | None = None

    @property
    def marks(self) -> str:
        """Characters that start a comment."""
        return "#%" if self.comment is None else self.comment


@dataclass(frozen=True)
class Layout:
    """What was found out about a file.

    Attributes:
        delimiter: a byte, or `WHITESPACE`.
        header_line: the line of the header, 0 if there is none.
        columns: numbers of the columns of source, target and (perhaps) weight.
        is_text: whether ids are text.
        has_quoted_words: whether all words are in quotes, as R writes them, and a bare NA is none.
        direction: the number of Gephi's column Type, which says Directed or Undirected in the first row; None where there is none.
        header: of ``columns`` what the header calls them, and whether in quotes; none where whoever asks says that there is one.
    """

    delimiter: int
    header_line: int
    columns: tuple[int, ...]
    is_text: bool
    has_quoted_words: bool
    header: tuple[tuple[str, bool], ...]
    direction: int | None


def first_rows(path: Path, dialect: Dialect) -> tuple[bytes, list[int], list[str]]:
    """The start of a file, and line numbers and texts of its first two rows."""
    size = 1 << 16
    while True:
        start = first_bytes(path, size)
        if b"\0" in start[: 1 << 16]:
            next(iter(blocks(path)))  # says where
        whole = start if len(start) < size else start[: start.rfind(b"\n") + 1]
        found = list(islice(_data_lines(whole, dialect.marks), 2))
        if len(found) == 1 and dialect.comment is None and len(start) < size:
            # Below a line of names all rows may be of hashtags.
            number = found[0][0]
            rows = (
                (line, text)
                for line, text in _data_lines(whole, "")
                if line > number and _may_be_row(text, dialect.marks)
            )
            found += islice(rows, 1)
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


def _may_be_row(line: bytes, marks: str) -> bool:
    """Whether a line that begins as comments do may be a row: neither a blank nor a second such character follows."""
    text = line[:8].decode("latin-1")
    return text[:1] in tuple(marks) and bool(text[1:2].strip()) and text[1] not in marks


def check_comments(path: Path, start: bytes, first_line: int, marks: str, delimiter: int) -> None:
    """Raises DataError where a line before the first row begins as comments do, names no columns, and may be a row."""
    mark = bytes([delimiter])
    begun = start.removeprefix(b"\xef\xbb\xbf").split(b"\n")[:first_line]
    for number, line in enumerate(begun[:-1], 1):
        names = line.decode("utf-8", "replace").lstrip(marks).split(chr(delimiter))
        if line.count(mark) == begun[-1].count(mark) and _may_be_row(line, marks) and not names_ends(names):
            fail(path, number, IN_DOUBT)


def layout_of(
    path: Path, rules: Rules, dialect: Dialect, start: bytes, lines: list[int], texts: list[str], noted: bool
) -> Layout:
    """What the first rows of a file tell of all.

    Args:
        start: of the file, as of `first_rows`, like ``lines`` and ``texts`` of its rows.
        noted: the file says itself what it is, as `write_graph` leaves it.

    Raises DataError for what is no list of edges, or where nobody can tell; InputError for columns that are not there.
    """
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
    if not noted:
        _check_rows(path, dialect, lines, texts, rows, delimiter)
    has_header, names = _names(path, dialect, start, lines[0], rows, delimiter, noted)
    columns = _columns(path, dialect, names, len(first), lines[0])
    free = tuple(sorted({*nameless(names or ())} - {*columns}))
    if free and dialect.source is None and dialect.target is None:
        filled = first_filled(path, delimiter, dialect.marks, free, lines[0] if has_header else 0)
        tell_of_nameless(path, filled, has_weight=len(columns) > 2 or dialect.weight != "auto")
    sample = rows[1] if has_header and len(rows) > 1 else rows[0]
    if has_header and len(rows) == 1:
        raise DataError(f"{path} holds no edges, only the header in line {lines[0]}")
    inside = [sample[column] for column in columns[:2] if column < len(sample)]
    is_whole = [_is_whole(text) and not _is_padded(text) and not quoted for text, quoted in inside]
    if rules.ids == "numbers" or (rules.num_nodes is not None and rules.ids == "auto" and not noted):
        is_text = False
    elif rules.ids == "text":
        is_text = True
    else:
        is_text = not all(is_whole)
        if is_text and all(_is_plain_number(text) and not quoted for text, quoted in inside):
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
        and not is_number(sample[columns[2]][0])
    ):
        place = lines[1] if has_header else lines[0]
        fail(
            path,
            place,
            f"the third field {sample[columns[2]][0]!r} is not a number; weight=None leaves it out, weight=COLUMN takes another",
        )
    header = tuple(rows[0][column] for column in columns) if has_header and dialect.header is None else ()
    direction = None if names is None else called(names, ("type",))
    if direction is not None and not (direction < len(sample) and is_direction(sample[direction][0])):
        direction = None
    if names is None and dialect.weight == "auto":
        _tell_of_rest(path, columns, len(first))
    return Layout(
        delimiter, lines[0] if has_header else 0, columns, is_text, has_quoted_words(rows[0]), header, direction
    )


def _check_rows(
    path: Path,
    dialect: Dialect,
    lines: list[int],
    texts: list[str],
    rows: list[list[tuple[str, bool]]],
    delimiter: int,
) -> None:
    """Raises DataError for rows as `row_fault` finds them, and where nobody can tell what they are split at."""
    has_ends = names_ends([text for text, _ in rows[0]])
    is_said = dialect.source is not None or dialect.target is not None
    fault = row_fault([["x" if quoted else text for text, quoted in row] for row in rows], has_ends=has_ends or is_said)
    if fault is not None:
        fail(path, lines[fault[0]], fault[1])
    if dialect.delimiter is not None or delimiter != ord(",") or has_ends:
        return
    mark = other_mark(texts)
    if mark is not None:
        fail(
            path,
            lines[0],
            f"split at ',', or at {'blanks' if mark == ' ' else repr(mark)}, where commas are those of decimals? "
            f"Begin the file with the line source,target or source{mark}target; or `delimiter` says which",
        )


def _names(
    path: Path,
    dialect: Dialect,
    start: bytes,
    line: int,
    rows: list[list[tuple[str, bool]]],
    delimiter: int,
    noted: bool,
) -> tuple[bool, list[str] | None]:
    """Whether the first row names the columns, and what names them: it, the comment above, or nothing.

    Raises DataError for a matrix, and where nobody can tell.
    """
    first, below = [text for text, _ in rows[0]], [text for row in rows[1:] for text, _ in row]
    if noted or dialect.header is not None:
        return bool(dialect.header), first if dialect.header else None
    if below and is_matrix(first, below):
        raise no_table(path)
    has_header = _has_header(rows, dialect)
    is_counted = len(first) > 3 and first == [str(number) for number in range(len(first))]
    is_said = dialect.source is not None or dialect.target is not None
    if (has_header or is_counted) and not is_said and not says_ends(first) and not says_edges(first):
        check_no_bare_matrix(path, delimiter, dialect.marks, first, line)
    bare = [name for name in first if not is_index(name)]
    if has_header:
        if are_counted(bare) and not is_said and dialect.weight == "auto":
            fail(
                path,
                line,
                f"columns are called {','.join(bare):.40}, which tells of no weight: call them source,target,weight, or say which they are",
            )
        return True, first
    is_end_named = delimiter != WHITESPACE and is_end(first) and not are_alike(first, below)
    if is_end_named or are_numbered(first, below):
        either = "a row, or names of columns? Begin the file with the line source,target"
        fail(path, line, f"{either}; or `header` says which")
    if not is_said and are_counted(first):
        check_positions(path, start, line, first, delimiter, dialect.marks)
    return False, _said(path, start, line, dialect, delimiter, len(first))


def _said(path: Path, start: bytes, first_line: int, dialect: Dialect, delimiter: int, count: int) -> list[str] | None:
    """Names of columns in the comment above the first row, where they say that ends stand elsewhere than in front: ``#,source,target``."""
    above = start.split(b"\n")[first_line - 2 : first_line - 1] if first_line > 1 else []
    text = b"".join(above).decode("utf-8", "replace").strip()
    if not text or text[0] not in dialect.marks:
        return None
    mark = None if delimiter == WHITESPACE else chr(delimiter)
    names = [name.strip() for name in text.lstrip(dialect.marks + " ").split(mark)]
    if len(names) != count or not names_ends(names) or known_ends(path, names) == (0, 1):
        return None
    return names


def _delimiter(text: str, given: str | None) -> int:
    if given == "whitespace" or given == " ":
        return WHITESPACE
    if given is not None:
        if len(given) != 1 or not given.isascii() or given in '"\n\r\0':
            raise InputError(f"delimiter is {shown(given)}; it must be one ASCII character, or 'whitespace'")
        return ord(given)
    # Marks in quotes divide none, nor those between attributes, as networkx writes them behind the ends.
    bare = re.sub(r"\s\{.*\}$", "", re.sub(r'"[^"]*"', "", text.strip()))
    # Aligned by tabs and blanks.
    if all(map(is_number, bare.split())):
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
    if len(rows) > 1 and are_quoted(rows[0], rows[1]):
        return True
    first = [text for text, _ in rows[0]]
    # A data frame's index is no node, and what stands behind it are words.
    has_index = len(first) > 2 and is_index(first[0]) and not any(map(is_number, first[1:]))
    if has_index or (names_ends(first) and not are_alike(first, [text for row in rows[1:] for text, _ in row])):
        return True
    ends = [
        column if isinstance(column, int) else place for place, column in enumerate((dialect.source, dialect.target))
    ]
    if len(rows) < 2 or len(rows[1]) <= max(ends) or len(first) <= max(ends):
        return False
    second = [text for text, _ in rows[1]]
    if all(_is_whole(second[end]) for end in ends) and not any(_is_whole(first[end]) for end in ends):
        return True
    weights = [dialect.weight] if isinstance(dialect.weight, int) else range(len(first))
    has_weights = dialect.weight is not None and len(first) == len(second)
    return has_weights and any(is_number(second[number]) and first[number].lower() in WEIGHTS for number in weights)


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


def _tell_of_rest(path: Path, columns: tuple[int, ...], count: int) -> None:
    """A warning where columns of a list without names are left out, as times behind weights are, and nobody says which are meant."""
    rest = [str(column) for column in range(count) if column not in columns]
    if rest:
        _logger.warning(
            "%s has %d columns and no line of names: column %d is the source, %d the target and %d the weight, and what is in %s is "
            "left out; source, target and weight (--columns 0,1,2) say which are meant",
            *(path, count, *columns, ", ".join(rest)),
        )


def _is_whole(text: str) -> bool:
    return re.fullmatch(r"[+-]?[0-9]+", text) is not None


def _is_padded(text: str) -> bool:
    """Whether it is of figures behind a 0, as names may be."""
    return re.fullmatch(r"0[0-9]+", text) is not None


def _is_plain_number(text: str) -> bool:
    """Whether it is a number of figures of ASCII, and none that may be a name."""
    return text.isascii() and is_number(text) and not _is_padded(text)


def is_number(text: str) -> bool:
    """Whether text is read as a number, whole or not."""
    try:
        float(text)
    except ValueError:
        return False
    return "_" not in text
