"""Clicks from wherever a user has them, as three arrays: nodes, terms, items."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.bounds import shown
from anabranch.errors import DataError, InputError, first_line
from anabranch.graph.arguments import as_path
from anabranch.graph.masks import unmasked
from anabranch.graph.table_columns import as_names, is_of_r
from anabranch.graph.table_faults import check_one_file


def read_clicks(
    source: Any, columns: tuple[str, str, str] = ("node", "term", "item")
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Nodes, terms and items of clicks, arrays of one length; terms are texts, nodes and items integers or texts.

    Args:
        source: a path of a Parquet or CSV file (by its suffix: ``.parquet``, ``.csv``, ``.tsv``, these also with ``.gz``); an
            Arrow table or data frame or mapping with ``columns``; a tuple of three arrays; or an iterable of (node, term, item).
        columns: names in files and tables.

    Raises:
        DataError: a file that cannot be read, or lacks a column, or has an empty cell (with its row).
        InputError: arrays of different length or kind.
    """
    if not isinstance(columns, list | tuple) or len(columns) != 3 or not all(isinstance(name, str) for name in columns):
        raise InputError(f"columns is {shown(columns)}; it must be the names of three: nodes, terms and items")
    if isinstance(source, str | Path):
        source = _read_file(as_path(source, "clicks"), columns)
    if hasattr(source, "column_names") or hasattr(source, "columns") or isinstance(source, dict):
        names = (
            list(source.keys())
            if isinstance(source, dict)
            else list(getattr(source, "column_names", None) or source.columns)
        )
        for name in columns:
            if name not in names:
                raise DataError(f"clicks have no column {name!r}; there are {', '.join(map(str, names))}")
        parts = [source[name] for name in columns]
    elif isinstance(source, tuple) and len(source) == 3 and not any(isinstance(part, str | int) for part in source):
        parts = list(source)
    else:
        parts = _of_triples(source)
    nodes, terms, items = (_column(part, name) for part, name in zip(parts, columns, strict=True))
    if not len(nodes) == len(terms) == len(items):
        raise InputError(
            f"there are {len(nodes):,} nodes, {len(terms):,} terms and {len(items):,} items; a click has one of each"
        )
    if terms.dtype.kind in "iu":
        terms = terms.astype(str)
    return nodes, terms, items


def _of_triples(source: Iterable[Any]) -> list[Any]:
    rows = source.tolist() if isinstance(source, np.ndarray) else source
    if not np.iterable(rows) or isinstance(rows, bytes):
        raise InputError(
            f"clicks are {shown(source)}; they must be a path, a table, three arrays, or (node, term, item) rows"
        )
    rows = list(rows)
    for number, row in enumerate(rows):
        if isinstance(row, str) or not hasattr(row, "__len__") or len(row) != 3:
            raise InputError(f"click {number} is {shown(row)}; a click is (node, term, item)")
    return [list(part) for part in zip(*rows, strict=True)] if rows else [[], [], []]


def _read_file(path: Path, columns: tuple[str, str, str]) -> Any:
    import pyarrow as pa
    from pyarrow import csv, parquet

    name = path.name.removesuffix(".gz")
    try:
        if name.endswith(".parquet"):
            return parquet.read_table(path, columns=[c for c in columns if c in parquet.read_schema(path).names])
        if name.endswith((".csv", ".tsv")):
            separator = "\t" if name.endswith(".tsv") else ","
            text = dict.fromkeys(columns, pa.string())
            options = csv.ConvertOptions(
                column_types=text,
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
                null_values=["", "NA"] if is_of_r(path, separator) else [""],
            )
            table = csv.read_csv(path, parse_options=csv.ParseOptions(delimiter=separator), convert_options=options)
            check_one_file(path, table, table.column_names)
            for name in {columns[0], columns[2]} & {*table.column_names}:
                table = table.set_column(table.column_names.index(name), name, as_names(table[name]))
            return table
    except UnicodeDecodeError:
        raise DataError(f"{path} has names of columns that are not UTF-8") from None
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read clicks from {path}: {first_line(error)}") from error
    raise DataError(f"cannot tell what {path} is; clicks come as .parquet, .csv or .tsv")


def _column(values: Any, name: str) -> np.ndarray:
    """A column as integers or texts. Raises DataError naming the row of the first empty or foreign cell."""
    if hasattr(values, "null_count"):  # Arrow
        if values.null_count:
            row = int(np.flatnonzero(values.is_null().to_numpy(zero_copy_only=False))[0])
            raise DataError(f"click {row} has no {name}")
        values = values.to_numpy(zero_copy_only=False) if hasattr(values, "chunks") is False else values.to_numpy()
    values = unmasked(values, name)
    found = np.asarray(values) if not isinstance(values, list) else _of_list(values)
    if found.ndim != 1:
        raise InputError(f"{name} has the shape {found.shape}; it must be a list")
    if found.size == 0:
        return found.astype(np.int64 if found.dtype.kind in "iu" else str)
    if found.dtype.kind in "iuU":
        return found
    wrong = [row for row, value in enumerate(found.tolist()) if not isinstance(value, str) or not value]
    if found.dtype.kind != "O" or wrong:
        row = wrong[0] if wrong else 0
        raise DataError(
            f"click {row} has the {name} {shown(found[row])}; nodes and items are integers or texts, terms are texts"
        )
    return found.astype(str)


def _of_list(values: list[Any]) -> np.ndarray:
    """A list as an array that keeps kinds apart: numpy would make texts of numbers among texts."""
    if all(isinstance(value, int | np.integer) and not isinstance(value, bool) for value in values) and values:
        return np.array(values)
    return np.array(values, dtype=object) if values else np.array([], dtype=str)
