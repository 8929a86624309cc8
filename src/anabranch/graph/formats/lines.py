"""Lines of text files, plain or compressed: blocks of whole lines, split into fields by kernels that know every line's number.

Files may be compressed by gzip, bzip2 or xz (told by their first bytes), start with a byte order mark, and end lines with a line feed,
carriage returns before it or not. A field in double quotes may hold the delimiter, blanks and doubled quotes, but no line break.
"""
# Shapes: R rows of a block, F fields that are wanted

import bz2
import gzip
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NoReturn

import numba as nb
import numpy as np

from anabranch.errors import DataError

# As a delimiter: runs of blanks and tabs.
WHITESPACE = 0
BLOCK = 1 << 22

# A hub of thirty million neighbours in a METIS file has a line of this length; what is longer is no list of edges.
MOST_LINE = 1 << 28
_COMPRESSED = {b"\x1f\x8b": ("gzip", gzip.open), b"BZh": ("bzip2", bz2.open), b"\xfd7zXZ\x00": ("xz", lzma.open)}
_UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)
_FINE, _RAGGED, _OPEN_QUOTE, _AFTER_QUOTE, _IN_DOUBT, _RETURN, _ORDER_MARK = range(7)
IN_DOUBT = "a comment, or a row? Begin the file with a line that names its columns if it is a row; `comment` says what comments begin with"
# Lines that begin as comments do and have as many fields as the rows before them.
SKIPPED, ROWS, DOUBTFUL = range(3)
_NOT_A_NUMBER, _TOO_LONG = 1, 2


def first_bytes(path: Path, count: int) -> bytes:
    """The first bytes of a file, uncompressed. Raises DataError."""
    try:
        with open_text(path) as file:
            return file.read(count)
    except _UNREADABLE as error:
        if not isinstance(error, OSError) or compression(path):
            # Says at which line.
            for _ in blocks(path):
                pass
        raise DataError(f"cannot read {path}: {_why(error)}") from error


def open_text(path: Path) -> BinaryIO:
    """A file as plain bytes, whatever it is compressed by."""
    with open(path, "rb") as file:
        start = file.read(6)
    opener = next((opener for magic, (_, opener) in _COMPRESSED.items() if start.startswith(magic)), None)
    return opener(path, "rb") if opener else open(path, "rb")  # type: ignore[operator]


def compression(path: Path) -> str | None:
    """What a file is compressed by."""
    with open(path, "rb") as file:
        start = file.read(6)
    return next((name for magic, (name, _) in _COMPRESSED.items() if start.startswith(magic)), None)


def blocks(path: Path, size: int = BLOCK) -> Iterator[tuple[np.ndarray, int]]:
    """Blocks of whole lines as uint8, about ``size`` bytes each, and the number of their first line (from 1).

    Raises DataError for what cannot be read, with the last line that could.
    """
    carry, line = bytearray(), 1
    try:
        with open_text(path) as file:
            while read := file.read(size):
                if line == 1 and not carry and read.startswith(b"\xef\xbb\xbf"):
                    read = read[3:]
                cut = read.rfind(b"\n") + 1
                if not cut:
                    carry += read
                    if len(carry) > MOST_LINE:
                        raise DataError(
                            f"{path}, line {line}: a line of more than {MOST_LINE >> 20:,} MiB; this is no list of edges (give `format`)"
                        )
                    continue
                block = bytes(carry + read[:cut])
                carry = bytearray(read[cut:])
                yield _plain(path, block, line), line
                line += block.count(b"\n")
    except EOFError as error:
        raise DataError(
            f"{path} is truncated: its compressed data end after line {line + carry.count(10) - 1}"
        ) from error
    except _UNREADABLE as error:
        raise DataError(f"{path} cannot be read on from line {line}: {_why(error)}") from error
    if carry:
        yield _plain(path, bytes(carry), line), line


def _plain(path: Path, block: bytes, line: int) -> np.ndarray:
    """The block as an array. Raises DataError if it is not text."""
    zero = block.find(b"\0")
    if zero >= 0:
        if line == 1 and block[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise DataError(f"{path}, line 1: this is UTF-16 text; save it as UTF-8")
        at = line + block.count(b"\n", 0, zero)
        raise DataError(
            f"{path}, line {at}: a zero byte; this is a binary file, not text (give `format` if it is of another kind)"
        )
    return np.frombuffer(block, np.uint8)


def _why(error: BaseException) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).lower()


class Fields:
    """Wanted fields of the rows of a block.

    Attributes:
        text: uint8, the block.
        start_FR, end_FR: int64, where each field lies in it.
        quoted_FR: uint8, 1 if it was in quotes, 2 if it holds doubled ones.
        line_R: int64, each row's line.
    """

    def __init__(self, text: np.ndarray, wanted: tuple[int, ...]) -> None:
        rows = int(np.count_nonzero(text == 10)) + 1
        self.text = text
        self.wanted = np.array(wanted, np.int64)
        self.start_FR = np.zeros((len(wanted), rows), np.int64)
        self.end_FR = np.zeros((len(wanted), rows), np.int64)
        self.quoted_FR = np.zeros((len(wanted), rows), np.uint8)
        self.line_R = np.empty(rows, np.int64)

    def keep(self, part: slice) -> None:
        """Leave only these rows."""
        self.start_FR, self.end_FR = self.start_FR[:, part], self.end_FR[:, part]
        self.quoted_FR, self.line_R = self.quoted_FR[:, part], self.line_R[part]

    def value(self, field: int, row: int) -> str:
        """A field as text."""
        found = bytes(self.text[self.start_FR[field, row] : self.end_FR[field, row]]).decode("utf-8", "replace")
        return found.replace('""', '"') if self.quoted_FR[field, row] == 2 else found


class Splitter:
    """Splits the blocks of one file, whose rows all have as many fields as the first.

    Args:
        path: for messages.
        delimiter: a byte, or `WHITESPACE`.
        comment: characters that start a line to be left out.
        wanted: the fields that are kept, by number.
        full_comments: what comments are that have as many fields as a row before them, and no blank or second mark behind their first
            character: `SKIPPED`, `ROWS`, or `DOUBTFUL`, a fault.
    """

    def __init__(
        self, path: Path, delimiter: int, comment: str, wanted: tuple[int, ...], full_comments: int = SKIPPED
    ) -> None:
        self.path = path
        self.full_comments = full_comments
        self.delimiter = delimiter
        self.comment = np.frombuffer(comment.encode(), np.uint8)
        self.wanted = wanted
        self.num_fields = -1

    def split(self, text: np.ndarray, first_line: int) -> tuple[Fields, DataError | None]:
        """The fields of the rows up to a bad one, and what is wrong with that. What comes before may be worse: look there first."""
        fields = Fields(text, self.wanted)
        rows, problem, line, found, expected = split_fields(
            text,
            self.delimiter,
            self.comment,
            self.full_comments,
            fields.wanted,
            self.num_fields,
            first_line,
            fields.start_FR,
            fields.end_FR,
            fields.quoted_FR,
            fields.line_R,
        )
        fields.keep(slice(0, rows))
        self.num_fields = int(expected)
        if problem == _FINE:
            return fields, None
        what = {
            _RAGGED: f"{found} field{'s' * (found != 1)}, where the lines before have {expected}",
            _OPEN_QUOTE: "a quote that is not closed on its line",
            _AFTER_QUOTE: "something behind a closing quote",
            _IN_DOUBT: IN_DOUBT,
            _RETURN: "a carriage return within the line; end all lines with a line feed, or all with both",
            _ORDER_MARK: "a byte order mark (U+FEFF), as of a second file behind a first; take it out, or put the name in quotes",
        }[problem]
        return fields, DataError(f"{self.path}, line {line}: {what}")


class RowError(Exception):
    """A fault of a row of a block: who reads the block knows the line, and whether another row has one before it."""

    def __init__(self, row: int, what: str) -> None:
        super().__init__(what)
        self.row, self.what = row, what


def integers(fields: Fields, field: int, what: str, hint: str = "") -> np.ndarray:
    """int64 [R] of a field. Raises RowError."""
    values = np.empty(len(fields.line_R), np.int64)
    row, problem = parse_integers(fields.text, fields.start_FR[field], fields.end_FR[field], values)
    if problem:
        why = f"is not a whole number{hint}" if problem == _NOT_A_NUMBER else "is beyond 64-bit whole numbers"
        raise RowError(row, f"the {what} {fields.value(field, row)!r} {why}")
    return values


def numbers(fields: Fields, field: int, what: str) -> np.ndarray:
    """float64 [R] of a field, each the double nearest to what is written. Raises RowError."""
    values = np.empty(len(fields.line_R), np.float64)
    hard = parse_numbers(fields.text, fields.start_FR[field], fields.end_FR[field], values)
    # Long mantissas, large exponents, nan, inf, and what is no number.
    for row in np.flatnonzero(hard).tolist():
        shown = fields.value(field, row)
        try:
            if "_" in shown:
                raise ValueError
            values[row] = float(shown)
        except ValueError:
            raise RowError(row, f"the {what} {shown!r} is not a number") from None
    return values


def fail(path: Path, line: int, what: str) -> NoReturn:
    """Raise a DataError that names file and line."""
    raise DataError(f"{path}, line {line}: {what}")


@nb.njit(cache=True, nogil=True)
def count_fields(text, at, end, delimiter):
    """How many fields a line has, were it a row; delimiters in quotes divide none."""
    count, is_quoted, is_begin = 1, False, True
    while at < end:
        character = text[at]
        if character == 34 and (is_quoted or is_begin):
            is_quoted = not is_quoted
        elif character == delimiter and not is_quoted:
            count += 1
        is_begin = character == delimiter or (is_begin and (character == 32 or character == 9))
        at += 1
    return count


@nb.njit(cache=True, nogil=True)
def has_return(text, at, end):
    """Whether a carriage return stands in a line, but in quotes."""
    is_quoted = False
    while at < end:
        if text[at] == 34:
            is_quoted = not is_quoted
        elif text[at] == 13 and not is_quoted:
            return True
        at += 1
    return False


@nb.njit(cache=True, nogil=True)
def split_fields(
    text, delimiter, comment, full_comments, wanted, num_fields, first_line, start_FR, end_FR, quoted_FR, line_R
):
    """Find the wanted fields of all lines. Returns rows, a problem, its line, the fields found there, and fields a row has."""
    size, at_line, rows, position = len(text), first_line, 0, 0
    white = delimiter == 0
    while position < size:
        stop, returned = position, size
        while stop < size and text[stop] != 10:
            if text[stop] == 13 and returned == size:
                returned = stop
            stop += 1
        end = stop
        # Python's csv ends lines with two of them on Windows, where a file was opened without newline="".
        while end > position and text[end - 1] == 13:
            end -= 1
        at = position
        if end - at >= 3 and text[at] == 0xEF and text[at + 1] == 0xBB and text[at + 2] == 0xBF:
            return rows, _ORDER_MARK, at_line, 0, num_fields
        while at < end and (text[at] == 32 or text[at] == 9) and text[at] != delimiter:
            at += 1
        is_data, is_comment = at < end, False
        if is_data:
            for character in comment:
                is_comment = is_comment or text[at] == character
        if is_comment:
            # Only a whole look at it tells how many fields it has.
            is_data = (
                full_comments != 0 and num_fields > 0 and at + 1 < end and text[at + 1] != 32 and text[at + 1] != 9
            )
            for character in comment:
                is_data = is_data and text[at + 1] != character
            if is_data and count_fields(text, at, end, delimiter) != num_fields:
                is_data = False
            elif is_data and full_comments == 2:
                return rows, _IN_DOUBT, at_line, num_fields, num_fields
        if is_data:
            if returned < end and has_return(text, at, end):
                return rows, _RETURN, at_line, 0, num_fields
            count = 0
            while True:
                while at < end and (text[at] == 32 or text[at] == 9) and text[at] != delimiter:
                    at += 1
                if white and at >= end:
                    break
                quoted = 0
                if at < end and text[at] == 34:
                    quoted, at = 1, at + 1
                    begin = at
                    while at < end and (text[at] != 34 or (at + 1 < end and text[at + 1] == 34)):
                        if text[at] == 34:
                            quoted = 2
                            at += 1
                        at += 1
                    if at >= end:
                        return rows, _OPEN_QUOTE, at_line, count, num_fields
                    finish, at = at, at + 1
                    behind = at
                    while at < end and (text[at] == 32 or text[at] == 9) and text[at] != delimiter:
                        at += 1
                    if at < end and ((white and at == behind) or (not white and text[at] != delimiter)):
                        return rows, _AFTER_QUOTE, at_line, count, num_fields
                else:
                    begin = at
                    if at + 3 <= end and text[at] == 0xEF and text[at + 1] == 0xBB and text[at + 2] == 0xBF:
                        return rows, _ORDER_MARK, at_line, 0, num_fields
                    if white:
                        while at < end and text[at] != 32 and text[at] != 9:
                            at += 1
                    else:
                        while at < end and text[at] != delimiter:
                            at += 1
                    finish = at
                    while finish > begin and (text[finish - 1] == 32 or text[finish - 1] == 9):
                        finish -= 1
                for field in range(len(wanted)):
                    if wanted[field] == count:
                        start_FR[field, rows], end_FR[field, rows], quoted_FR[field, rows] = begin, finish, quoted
                count += 1
                if at >= end:
                    break
                if not white:
                    # Over the delimiter; at the end of the line an empty field follows.
                    at += 1
            if num_fields < 0:
                num_fields = count
            if count != num_fields:
                return rows, _RAGGED, at_line, count, num_fields
            line_R[rows] = at_line
            rows += 1
        position = stop + 1
        at_line += 1
    return rows, _FINE, at_line, 0, num_fields


@nb.njit(cache=True, nogil=True)
def parse_integers(text, start_R, end_R, value_R):
    """Whole numbers with an optional sign. Returns the first bad row and what is wrong with it, or 0, 0."""
    limit = np.uint64(9223372036854775807)
    for row in range(len(value_R)):
        at, end = start_R[row], end_R[row]
        negative = at < end and text[at] == 45
        if at < end and (negative or text[at] == 43):
            at += 1
        if at >= end:
            return row, _NOT_A_NUMBER
        value, is_long = np.uint64(0), False
        while at < end:
            digit = text[at] - 48
            if digit < 0 or digit > 9:
                return row, _NOT_A_NUMBER
            # There is one more below 0.
            if value > (limit + np.uint64(negative) - np.uint64(digit)) // np.uint64(10):
                is_long = True
            value = value * np.uint64(10) + np.uint64(digit)
            at += 1
        if is_long:
            return row, _TOO_LONG
        value_R[row] = -np.int64(value) if negative else np.int64(value)
    return 0, 0


@nb.njit(cache=True, nogil=True)
def parse_numbers(text, start_R, end_R, value_R):
    """Decimal numbers whose digits and power of ten are exact doubles, so that one rounding is right; True where it is not so easy."""
    hard_R = np.zeros(len(value_R), np.bool_)
    for row in range(len(value_R)):
        at, end = start_R[row], end_R[row]
        negative = at < end and text[at] == 45
        if at < end and (negative or text[at] == 43):
            at += 1
        digits, value, scale, seen_point, is_easy = 0, np.int64(0), 0, False, True
        while at < end and is_easy:
            character = text[at]
            if 48 <= character <= 57:
                # Times ten plus nine stays below 2**53.
                if value > 900719925474098:
                    is_easy = False
                value = value * 10 + (character - 48)
                digits += 1
                scale -= seen_point
            elif character == 46 and not seen_point:
                seen_point = True
            else:
                break
            at += 1
        if at < end and is_easy and (text[at] == 101 or text[at] == 69):
            at += 1
            down = at < end and text[at] == 45
            if at < end and (down or text[at] == 43):
                at += 1
            exponent, power = 0, 0
            while at < end and 48 <= text[at] <= 57 and power < 4:
                exponent = exponent * 10 + (text[at] - 48)
                power += 1
                at += 1
            is_easy = is_easy and power > 0
            scale += -exponent if down else exponent
        if not is_easy or digits == 0 or at < end or scale < -22 or scale > 22:
            hard_R[row] = True
            continue
        number = np.float64(value)
        number = number * 10.0**scale if scale >= 0 else number / 10.0**-scale
        value_R[row] = -number if negative else number
    return hard_R


@nb.njit(cache=True, nogil=True)
def gather(text, start_R, end_R, offset_R, gathered):
    """Copy fields one after another."""
    for row in range(len(start_R)):
        place = offset_R[row]
        for at in range(start_R[row], end_R[row]):
            gathered[place] = text[at]
            place += 1
