"""Tables and arrays in files that people have: read whole or refused with what is wrong."""

from __future__ import annotations

import re
import tokenize
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anabranch.errors import DataError, first_line

if TYPE_CHECKING:
    import numpy as np

# What columns that name the rows are called, in any case.
NAMES = ("node", "name", "id", "key")

# What numpy raises for a file that is none of its own, or is damaged: its header is read as an expression of Python.
DAMAGED = (
    ValueError,
    KeyError,
    IndexError,
    OverflowError,
    SyntaxError,
    RecursionError,
    NotImplementedError,
    tokenize.TokenError,
    zlib.error,
)


# From so many on, columns that are called 0, 1, 2, ... are no row of numbers that happen to be these.
_SURELY_NAMES = 4

# Whether the first line of a text is a row, by its cells and those of the second (empty where there is none).
IsRow = Callable[[list[str], list[str]], bool]


def read_arrow(path: str | Path, is_row: IsRow | None = None, *, as_text: bool = False) -> Any:
    """A table of Arrow from .parquet, .pq, .csv, .tsv or .txt (tabs), the last three also with .gz.

    The first line of a text names its columns. One of numbers (behind a first name, too) is a row, and columns are then called f0, f1 and
    so on; one of the numbers of four columns or more, from 0 or 1, above numbers that are not whole, names them, and so does one that
    begins with nothing, with what columns of names are called (`NAMES`), or with text above numbers, whatever numbers stand behind it.

    Args:
        path: of the file.
        is_row: whoever knows what its cells are about says by it whether the first line is one.
        as_text: all cells of a text are text, as they are written; otherwise what looks like a number is one.

    Raises DataError for a file that is missing, foreign or malformed, where two columns have one name, text is not UTF-8, or nobody can
    tell whether the first line is a row.
    """
    import pyarrow as pa
    from pyarrow import parquet

    path = Path(path)
    name = path.name.removesuffix(".gz")
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    is_text = name.endswith((".csv", ".tsv", ".txt"))
    if not is_text and not name.endswith((".parquet", ".pq")):
        raise DataError(f"cannot tell what {path} is; tables come as .parquet, .csv or .tsv")
    try:
        if is_text:
            table = _text_table(path, "," if name.endswith(".csv") else "\t", is_row, as_text=as_text)
        else:
            table = parquet.read_table(path)
        names = table.column_names
    except UnicodeDecodeError:
        raise DataError(f"{path} has names of columns that are not UTF-8") from None
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read {path}: {first_line(error)}") from None
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{path} has several columns called {twice!r}")
    for name, kind in zip(names, table.schema.types, strict=True):
        if is_text and pa.types.is_binary(kind):
            raise DataError(f"{path}: column {name!r} holds text that is not UTF-8")
    return table


def _text_table(path: Path, delimiter: str, is_row: IsRow | None, *, as_text: bool) -> Any:
    """Raises DataError, OSError and those of Arrow."""
    import pyarrow as pa
    from pyarrow import csv

    options, source = csv.ParseOptions(delimiter=delimiter), _ended(path)

    def read(*, has_names: bool, kinds: dict[str, Any] | None = None) -> Any:
        how = csv.ReadOptions(autogenerate_column_names=not has_names)
        return csv.read_csv(source(), how, options, csv.ConvertOptions(column_types=kinds))

    table = read(has_names=True)
    first = table.column_names
    if is_row is not None:
        second = [str(column[0].as_py()) for column in table.columns] if table.num_rows else []
        has_names = not is_row(first, second)
    else:
        has_names = _names_columns(table, path, delimiter)
    if not as_text:
        return table if has_names else read(has_names=False)
    names = first if has_names else [f"f{number}" for number in range(len(first))]
    return read(has_names=has_names, kinds=dict.fromkeys(names, pa.string()))


def _names_columns(table: Any, path: Path, delimiter: str) -> bool:
    """Whether the first line, of which the table's columns are called, names them. Raises DataError where nobody can tell."""
    import pyarrow as pa

    first, kinds = table.column_names, table.schema.types
    # As data frames write years or chosen columns, with an index.
    if len(first) > 1 and (is_index(first[0]) or first[0].lower() in NAMES):
        return True
    is_named = not _is_number(first[0]) and len(first) > 1
    numbers = first[1:] if is_named else first
    # What names a row is text in all of them.
    if not all(map(_is_number, numbers)) or (is_named and table.num_rows and not pa.types.is_string(kinds[0])):
        return True
    is_counted = numbers in ([str(number + start) for number in range(len(numbers))] for start in (0, 1))
    if is_counted:
        # As data frames write columns without names.
        are_whole = all(
            pa.types.is_integer(kind) or pa.types.is_null(kind) for kind in kinds[len(first) - len(numbers) :]
        )
        is_clear, is_header = len(numbers) >= _SURELY_NAMES and not are_whole, True
    else:
        # Of rows by name: years, or chosen columns, may stand there.
        is_whole = all(number.strip().lstrip("+-").isdecimal() for number in numbers)
        is_clear, is_header = not (is_named and is_whole and len(set(numbers)) == len(numbers)), False
    if not is_clear:
        line = delimiter.join(first)
        raise DataError(
            f"{path}: is its first line, {line:.60}, a row, or are these names of columns? Begin it with a line of names"
        )
    return is_header


def is_index(name: str) -> bool:
    """Whether a column is called as data frames call their index: not at all, or as pandas calls that when it reads it again."""
    return re.fullmatch(r"|Unnamed: [0-9]+", name) is not None


def _ended(path: Path) -> Callable[[], Any]:
    """What a text is read from, each time anew: one of a single line that does not end is none to Arrow, so its end is added."""
    import pyarrow as pa

    with pa.input_stream(path) as opened:
        begin = opened.read(1 << 16)
    if begin.strip() and len(begin) < 1 << 16 and not begin.endswith((b"\n", b"\r")):
        return lambda: pa.BufferReader(begin + b"\n")
    return lambda: path


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def open_array(path: Path) -> np.ndarray:
    """The array of a .npy file, mapped into memory. Raises DataError for what is none."""
    import numpy as np

    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (*DAMAGED, OSError, EOFError) as error:
        raise DataError(f"{path} is no array of numpy, or is damaged: {first_line(error)}") from None
