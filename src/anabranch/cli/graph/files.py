"""Tables and arrays in files that people have: read whole or refused with what is wrong."""

from __future__ import annotations

import tokenize
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anabranch.errors import DataError, first_line
from anabranch.graph.table_columns import is_index, is_of_r, with_index
from anabranch.graph.table_faults import check_one_file

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

# Of the columns of a table, which are to be text as it is written.
AsText = Callable[[Any], list[str]]

_TEXTS = (".csv", ".tsv", ".txt")


def read_arrow(path: str | Path, as_text: AsText | None = None) -> Any:
    """A table of Arrow from .parquet, .pq, .csv, .tsv or .txt (tabs), the last three also with .gz.

    The first line of a text names its columns. One of numbers (behind a first name, too) is a row, and columns are then called f0, f1 and
    so on; one of the numbers of four columns or more, from 0 or 1, above numbers that are not whole, names them, and so does one that
    begins with nothing, with what columns of names are called (`NAMES`), or with text above numbers, whatever numbers stand behind it.

    Args:
        path: of the file.
        as_text: tells by the table's columns which of a text are text, as it is written there; in others what looks like a number, a
            truth value or a time is one.

    Raises DataError for a file that is missing, foreign or malformed, where two columns have one name, text is not UTF-8, or nobody can
    tell whether the first line is a row.
    """

    def read(delimiter: str, path: Path) -> Any:
        table = _read_text(path, delimiter)
        has_names = _names_columns(table, path, delimiter)
        kept = table if has_names else _read_text(path, delimiter, has_names=False)
        chosen = [] if as_text is None else as_text(_bare(kept))
        texts = [name for name in kept.column_names if name.strip() in chosen]
        whole = _bare(_read_text(path, delimiter, has_names=has_names, texts=texts) if texts else kept)
        check_one_file(path, whole, whole.column_names if has_names else None)
        return whole

    return _read(Path(path), read)


@dataclass(frozen=True)
class Cells:
    """A table as it is written.

    Attributes:
        table: of Arrow; of a text all cells are text, and the first line is a row.
        names: what its columns are called, of Parquet; None where the first line may say so.
    """

    table: Any
    names: list[str] | None

    @property
    def first_lines(self) -> list[list[str]]:
        """The first two lines, or one."""
        return [list(row.values()) for row in self.table.slice(0, 2).to_pylist()]

    def below(self, names: list[str] | None) -> Cells:
        """Its rows, where its first line has these names; for None it is a row as well."""
        return self if names is None else Cells(self.table.slice(1), names)


def read_cells(path: str | Path) -> Cells:
    """Cells of a file as `read_arrow` takes. Raises DataError as that, and for a text without lines."""
    path = Path(path)
    table = _read(path, lambda delimiter, path: _read_text(path, delimiter, has_names=False, texts=None))
    return Cells(table, None if path.name.removesuffix(".gz").endswith(_TEXTS) else table.column_names)


def _read(path: Path, read_text: Callable[[str, Path], Any]) -> Any:
    """A table whose columns have names that differ, of UTF-8. Raises DataError."""
    import pyarrow as pa
    from pyarrow import parquet

    name = path.name.removesuffix(".gz")
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    is_text = name.endswith(_TEXTS)
    if not is_text and not name.endswith((".parquet", ".pq")):
        raise DataError(f"cannot tell what {path} is; tables come as .parquet, .csv or .tsv")
    try:
        if is_text:
            table = read_text(delimiter_of(path), path)
        else:
            table = _plain(parquet.read_table(path))
            table = with_index(table) if len(set(table.column_names)) == table.num_columns else table
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


def delimiter_of(path: Path) -> str:
    """Of a table as text, by its ending."""
    return "," if path.name.removesuffix(".gz").endswith(".csv") else "\t"


def _plain(table: Any) -> Any:
    """Text in one form, however Parquet keeps it: polars and pandas write long text, and categories."""
    import pyarrow as pa

    for number, field in enumerate(table.schema):
        kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        if pa.types.is_large_string(kind) or pa.types.is_string_view(kind):
            kind = pa.string()
        if kind != field.type:
            table = table.set_column(number, field.name, table.column(number).cast(kind))
    return table


def _bare(table: Any) -> Any:
    """Its columns are called without the blanks that hands write behind commas."""
    return table.rename_columns([name.strip() for name in table.column_names])


def _read_text(path: Path, delimiter: str, *, has_names: bool = True, texts: list[str] | None = ()) -> Any:  # type: ignore[assignment]
    """``texts``: columns that are text; None for all. Raises OSError and those of Arrow."""
    import pyarrow as pa
    from pyarrow import csv

    options, source = csv.ParseOptions(delimiter=delimiter), _ended(path)
    how = csv.ReadOptions(autogenerate_column_names=not has_names)
    if texts is None:
        texts = csv.open_csv(source(), how, options).schema.names
    kinds = dict.fromkeys(texts, pa.string())
    # Who writes all words in quotes writes what is missing without.
    missing = {"null_values": ["", "NA"], "strings_can_be_null": True, "quoted_strings_can_be_null": False}
    nulls = missing if is_of_r(path, delimiter) else {}
    return csv.read_csv(source(), how, options, csv.ConvertOptions(column_types=kinds, **nulls))


def _names_columns(table: Any, path: Path, delimiter: str) -> bool:
    """Whether the first line, of which the table's columns are called, names them. Raises DataError where nobody can tell."""
    import pyarrow as pa

    first, kinds = table.column_names, table.schema.types
    line = f"{path}: is its first line, {delimiter.join(first):.60}, a row, or are these names of columns? Begin it with a line of names"
    # As data frames write years or chosen columns, with an index.
    if len(first) > 1 and (is_index(first[0]) or first[0].lower() in NAMES):
        if not is_index(first[0]) and all(map(_is_number, first[1:])) and not all(map(_is_whole, first[1:])):
            # One of words among which node, name or key are.
            raise DataError(line)
        return True
    is_named = not _is_number(first[0]) and len(first) > 1
    numbers = first[1:] if is_named else first
    # What names a row is in all of them no number: text, also where it looks like a time or a truth value.
    is_number = pa.types.is_integer(kinds[0]) or pa.types.is_floating(kinds[0]) or pa.types.is_null(kinds[0])
    # A word above times is called so, and is none of them.
    is_time = pa.types.is_temporal(kinds[0]) and not any(map(str.isdecimal, first[0]))
    if not all(map(_is_number, numbers)) or (is_named and table.num_rows and (is_number or is_time)):
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
        is_clear, is_header = (
            not (is_named and all(map(_is_whole, numbers)) and len(set(numbers)) == len(numbers)),
            False,
        )
    if not is_clear:
        raise DataError(line)
    return is_header


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


def _is_whole(text: str) -> bool:
    return text.strip().lstrip("+-").isdecimal()


def open_array(path: Path) -> np.ndarray:
    """The array of a .npy file, mapped into memory. Raises DataError for what is none."""
    import numpy as np

    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (*DAMAGED, OSError, EOFError) as error:
        raise DataError(f"{path} is not a numpy array, or is damaged: {first_line(error)}") from None
