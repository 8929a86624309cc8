"""Tables and arrays in files that people have: read whole or refused with what is wrong."""

from __future__ import annotations

import tokenize
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anabranch.errors import DataError, first_line

if TYPE_CHECKING:
    import numpy as np

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


def read_arrow(path: str | Path) -> Any:
    """A table of Arrow from .parquet, .pq, .csv, .tsv or .txt (tabs), the last three also with .gz.

    Raises DataError for a file that is missing, foreign or malformed, where two columns have one name, or text is not UTF-8.
    """
    import pyarrow as pa
    from pyarrow import csv, parquet

    path = Path(path)
    name = path.name.removesuffix(".gz")
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    is_text = name.endswith((".csv", ".tsv", ".txt"))
    if not is_text and not name.endswith((".parquet", ".pq")):
        raise DataError(f"cannot tell what {path} is; tables come as .parquet, .csv or .tsv")
    try:
        if is_text:
            table = csv.read_csv(path, parse_options=csv.ParseOptions(delimiter="," if name.endswith(".csv") else "\t"))
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


def open_array(path: Path) -> np.ndarray:
    """The array of a .npy file, mapped into memory. Raises DataError for what is none."""
    import numpy as np

    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except (*DAMAGED, OSError, EOFError) as error:
        raise DataError(f"{path} is no array of numpy, or is damaged: {first_line(error)}") from None
