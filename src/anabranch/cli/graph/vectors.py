"""Vectors in files.

.npy       an array [N, D]
.npz       ``vectors`` [N, D] and perhaps ``names`` [N]; or any single array [N, D]
.parquet   a row per vector: a column of lists, or columns of numbers; a column node, name or id tells names
.csv .tsv  columns of numbers; a first column of text or called node, name or id tells names: numbers where all of them are whole
           numbers as one writes them, else text as it stands (007)
.anb       an index of ours: its vectors
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.cli.graph.files import DAMAGED, NAMES, delimiter_of, open_array, read_arrow
from anabranch.errors import DataError, InputError, first_line
from anabranch.graph.beside import new_file
from anabranch.graph.table_columns import are_fractions, as_names, is_index, is_of_r, named_index

WRITTEN = (".npy", ".npz", ".parquet", ".csv", ".tsv")


@dataclass(frozen=True)
class Vectors:
    """Rows of numbers.

    Attributes:
        array: [N, D], float32 (of packed bits uint8 [N, D / 8]).
        names: what they are called; None where that is by their number: the file says nothing, or 0 ... N - 1.
        is_named: the file says what they are called.
    """

    array: np.ndarray
    names: np.ndarray | None = None
    is_named: bool = False

    @property
    def ids(self) -> np.ndarray | None:
        """Names that the file says, numbers 0 ... N - 1 too; None where it says none."""
        return np.arange(len(self.array)) if self.names is None and self.is_named else self.names


def read_vectors(path: str | Path, *, bits: bool = False) -> Vectors:
    """Vectors and names in a file; ``bits``: packed bits, of bytes 0 to 255 [N, D / 8] or truth values [N, D].

    Raises DataError for a file that is missing, foreign or malformed, naming the row.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"there is no file {path}")
    readers = {".npy": _npy, ".npz": _npz, ".parquet": _table, ".csv": _table, ".tsv": _table, ".anb": _index}
    if path.suffix not in readers:
        raise DataError(f"cannot tell what {path} is; vectors come as {', '.join(readers)}")
    try:
        found = readers[path.suffix](path)
    except (OSError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot read {path}: {first_line(error)}") from None
    array = _checked_bits(found.array, path) if bits else _checked(found.array, path)
    return Vectors(array, None if found.names is None else _checked_names(found, path), found.is_named)


def write_vectors(path: str | Path, vectors: Vectors) -> None:
    """Write vectors, all or nothing. Raises InputError for an unknown ending, and as `atomic_file`."""
    path = Path(path)
    check_written(path)
    with new_file(path) as temporary:
        if path.suffix == ".npy":
            with open(temporary, "wb") as file:
                np.save(file, vectors.array)
        elif path.suffix == ".npz":
            names = {} if vectors.names is None else {"names": _plain(vectors.names)}
            with open(temporary, "wb") as file:
                np.savez(file, vectors=vectors.array, **names)  # type: ignore[arg-type]
        else:
            _write_table(path, temporary, vectors)


def check_written(path: Path) -> None:
    """Raises InputError for a name whose ending `write_vectors` does not know."""
    if path.suffix not in WRITTEN:
        raise InputError(f"--out is {str(path)!r}; its name must end in {', '.join(WRITTEN)}")


def _write_table(path: Path, temporary: Path, vectors: Vectors) -> None:
    import pyarrow as pa
    from pyarrow import csv, parquet

    count, dim = vectors.array.shape
    node = pa.array(np.arange(count) if vectors.names is None else vectors.names.tolist())
    if path.suffix == ".parquet":
        flat = pa.array(np.ascontiguousarray(vectors.array).reshape(-1))
        parquet.write_table(pa.table({"node": node, "vector": pa.FixedSizeListArray.from_arrays(flat, dim)}), temporary)
        return
    columns = {f"x{number}": vectors.array[:, number] for number in range(dim)}
    delimiter = "," if path.suffix == ".csv" else "\t"
    csv.write_csv(pa.table({"node": node, **columns}), temporary, csv.WriteOptions(delimiter=delimiter))


def _npy(path: Path) -> Vectors:
    return Vectors(open_array(path))


def _npz(path: Path) -> Vectors:
    try:
        with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as found:
            beside = [name for name in found.files if name not in ("vectors", "names")]
            if "vectors" in found.files and beside:
                raise DataError(
                    f"{path} holds {', '.join(beside)} beside the vectors; call names of the rows 'names', and leave others out"
                )
            if "vectors" in found.files:
                return Vectors(found["vectors"], found["names"] if "names" in found.files else None)
            if len(found.files) == 1:
                return Vectors(found[found.files[0]])
            raise DataError(f"{path} holds {', '.join(found.files)}; call the array of vectors 'vectors'")
    except DAMAGED as error:
        raise DataError(f"{path} is not a numpy .npz file, or is damaged: {first_line(error)}") from None


def _index(path: Path) -> Vectors:
    from anabranch.graph.live import open_named

    index, names = open_named(path)
    ids = index.ids
    if names is not None:
        return Vectors(index.vectors(ids), names.array[ids], is_named=True)
    return Vectors(index.vectors(ids), None if np.array_equal(ids, np.arange(len(ids))) else ids, is_named=True)


def _table(path: Path) -> Vectors:
    table = read_arrow(path, lambda table: [name for name in [_names_of(table, path)] if name is not None])
    names = _names_of(table, path)
    # Beside names the number of a row says nothing.
    rest = [name for name in table.column_names if name != names and not (names is not None and is_index(name))]
    if not rest:
        raise DataError(f"{path} has no columns of numbers")
    for name in table.column_names:
        column = table[name]
        if column.null_count:
            row = int(np.flatnonzero(column.is_null().to_numpy())[0])
            raise DataError(f"{path}, row {row}: {name!r} is empty")
    found = _lists(table, rest, path) if len(rest) == 1 and _is_list(table.schema.field(rest[0]).type) else None
    if found is None:
        found = _numbers(table, rest, path)
    if names is None:
        return Vectors(found)
    # Text of Parquet is text, also where it looks like numbers.
    called_as = table[names] if path.suffix == ".parquet" else as_names(table[names], is_float=is_index(names))
    named = _row_names(called_as, names, path)
    is_number = named.dtype.kind in "iu" and np.array_equal(named, np.arange(len(named)))
    # Rows that are counted have no names. R counts from 1; elsewhere rows of these numbers were chosen.
    is_counted = named.dtype.kind in "iu" and np.array_equal(named, np.arange(1, len(named) + 1))
    if is_index(names) and (
        is_number or (is_counted and path.suffix != ".parquet" and is_of_r(path, delimiter_of(path)))
    ):
        return Vectors(found)
    return Vectors(found, None if is_number else named, is_named=True)


def _names_of(table: Any, path: Path) -> str | None:
    """The column that calls the rows: one called so, else the last of a data frame's index, else a first one of text. Raises DataError."""
    import pyarrow as pa

    if table.num_columns < 2:
        return next((name for name in table.column_names if name.lower() in NAMES), None)
    said = [name for name in table.column_names if name.lower() in NAMES] or named_index(table.schema)
    index = [name for name in table.column_names if is_index(name)]
    if len(said) > 1:
        raise DataError(f"{path}: which of {', '.join(map(repr, said))} calls the rows? Leave the others out")
    if said:
        return said[0]
    if index:
        return index[-1]
    kind = table.schema.field(0).type
    # Of a text what is no number may look like a truth value or a time.
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_null(kind) or _is_list(kind)
    return None if is_number else table.column_names[0]


def _numbers(table: Any, names: list[str], path: Path) -> np.ndarray:
    import pyarrow as pa

    for name in names:
        kind = table.schema.field(name).type
        if not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
            raise DataError(f"{path}: {name!r} is of {kind}; vectors are numbers, or one column of lists")
    return np.stack([table[name].to_numpy() for name in names], axis=1)


def _row_names(column: Any, name: str, path: Path) -> np.ndarray:
    import pyarrow as pa

    if pa.types.is_floating(column.type):
        # One that had an empty cell once.
        try:
            column = column.cast(pa.int64(), safe=True)
        except pa.ArrowInvalid:
            raise DataError(f"{path}: {name!r} names rows, and has numbers that are not whole") from None
    if pa.types.is_integer(column.type):
        return column.to_numpy()
    if not pa.types.is_string(column.type):
        raise DataError(f"{path}: {name!r} names rows, and is of {column.type}; names are text or whole numbers")
    cells = column.to_pylist()
    if "" in cells:
        raise DataError(f"{path}, row {cells.index('')}: {name!r} is empty")
    if are_fractions(cells):
        raise DataError(
            f"{path}: {name!r} has whole numbers that are written as {cells[0]!r} is; write them as 5, or text in Parquet"
        )
    return np.array(cells, object)


def _is_list(kind: Any) -> bool:
    import pyarrow as pa

    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _lists(table: Any, names: list[str], path: Path) -> np.ndarray:
    import pyarrow.compute as pc

    column = table[names[0]].combine_chunks()
    lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
    if len(lengths) and (lengths != lengths[0]).any():
        row = int(np.flatnonzero(lengths != lengths[0])[0])
        raise DataError(f"{path}, row {row}: a vector of {lengths[row]} numbers, the first has {lengths[0]}")
    flat = pc.list_flatten(column)
    if flat.null_count:
        row = int(np.flatnonzero(flat.is_null().to_numpy(zero_copy_only=False))[0]) // int(lengths[0])
        raise DataError(f"{path}, row {row}: a number is missing")
    values = flat.to_numpy(zero_copy_only=False)
    if values.dtype.kind not in "iuf":
        raise DataError(f"{path}: {names[0]!r} is a column of lists, but not of numbers")
    return values.reshape(len(lengths), -1) if len(lengths) else np.empty((0, 0))


def _checked(array: np.ndarray, path: Path) -> np.ndarray:
    if array.dtype.kind not in "fiu" or array.ndim != 2:
        raise DataError(f"{path} holds {array.dtype} of the shape {list(array.shape)}; vectors are numbers [N, D]")
    if not array.size:
        raise DataError(f"{path} holds no vectors (shape {list(array.shape)})")
    with np.errstate(over="ignore"):
        found = np.ascontiguousarray(array, np.float32)
    bad = np.flatnonzero(~np.isfinite(found).all(1))
    if bad.size:
        raise DataError(f"{path}, row {bad[0]}: a number is not finite (as a 32-bit number)")
    return found


def _checked_bits(array: np.ndarray, path: Path) -> np.ndarray:
    if array.dtype.kind not in "iub" or array.ndim != 2:
        raise DataError(
            f"{path} holds {array.dtype} of the shape {list(array.shape)}; bits are bytes (uint8) or truth values"
        )
    if not array.size:
        raise DataError(f"{path} holds no vectors (shape {list(array.shape)})")
    if array.dtype == bool:
        if array.shape[1] % 8:
            raise DataError(
                f"{path} has {array.shape[1]} truth values in a row; bits come in whole bytes, so in eights"
            )
        return np.packbits(array, axis=1)
    bad = np.flatnonzero(((array < 0) | (array > 255)).any(1))
    if bad.size:
        raise DataError(f"{path}, row {bad[0]}: a number is not a byte, 0 to 255")
    return np.ascontiguousarray(array, np.uint8)


def _checked_names(found: Vectors, path: Path) -> np.ndarray:
    names = np.asarray(found.names)
    if names.dtype.kind not in "iuUO" or not all(
        isinstance(name, str) for name in names.tolist() if names.dtype.kind == "O"
    ):
        raise DataError(f"{path} has names of the type {names.dtype}; names are text or whole numbers")
    names = names if names.dtype.kind in "iu" else names.astype(object)
    if names.shape != (len(found.array),):
        raise DataError(f"{path} has {len(found.array):,} vectors and names of the shape {list(names.shape)}")
    values, counts = np.unique(names.astype(str) if names.dtype == object else names, return_counts=True)
    if (counts > 1).any():
        raise DataError(f"{path} has the name {str(values[counts > 1][0])!r} twice")
    return names


def _plain(names: np.ndarray) -> np.ndarray:
    """Names as an array that needs no pickle."""
    return names if names.dtype.kind in "iu" else names.astype(str)
