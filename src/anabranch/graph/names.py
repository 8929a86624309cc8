"""Outside names of the rows of an index or an embedding, kept in a file beside it.

An `HNSW` numbers its vectors 0 ... N - 1 and knows no names. ``index.anb`` of a graph whose nodes have names has ``index.anb.names`` beside
it: a checked file (`anabranch.graph.array_file`) that also says which index it belongs to, so that an index that was replaced is never
read with the names of another.
"""

import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.errors import DataError, InputError
from anabranch.graph.array_file import read_arrays, write_arrays

KIND = "names"
_HEAD_BYTES = 1 << 16


class Names:
    """Names of N rows, both ways. ``array`` is [N], integers or text, as in `Graph.names`; they are distinct."""

    def __init__(self, array: Any) -> None:
        found = np.asarray(array)
        self.array = found if found.dtype.kind in "iu" else np.asarray(found, object)
        self._index = {name: number for number, name in enumerate(self.array.tolist())}
        if self.array.ndim != 1 or len(self._index) != len(self.array):
            raise InputError("names are a list without repetition; at least two rows have the same one")

    def __len__(self) -> int:
        return len(self.array)

    def ids_of(self, names: Iterable[Any]) -> np.ndarray:
        """Row numbers, int64. Raises InputError naming the first name that no row has."""
        for name in (asked := list(names)):
            if not isinstance(name, int | str | np.integer) or name not in self._index:
                raise InputError(f"there is no {name!r:.80} among the {len(self):,} names")
        return np.array([self._index[name] for name in asked], np.int64)

    def of(self, ids: np.ndarray) -> list[Any]:
        """Names of rows, as JSON can hold them."""
        return self.array[ids].tolist()


def names_path(index: str | Path) -> Path:
    """Where the names of an index lie."""
    return Path(f"{index}.names")


def write_names(index: str | Path, names: Names) -> Path:
    """Write the names of the index that was saved at ``index``, all or nothing. Raises as `anabranch.files.atomic_file`."""
    array, path = names.array, names_path(index)
    if array.dtype.kind in "iu":
        arrays = {"names": array}
    else:
        encoded = [str(name).encode() for name in array.tolist()]
        ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
        arrays = {"name_ends": ends, "name_bytes": np.frombuffer(b"".join(encoded), np.uint8)}
    write_arrays(path, KIND, arrays, {"index": fingerprint(Path(index))})
    return path


def read_names(index: str | Path, ids: np.ndarray | None = None) -> Names | None:
    """The names of an index; None where there is no file of them. ``ids`` are those that must have one.

    Raises DataError for a damaged file, or one that was written for another index or has too few names.
    """
    path = names_path(index)
    if not path.exists():
        return None
    found = read_arrays(path, KIND)
    if found.meta.get("index") != fingerprint(Path(index)):
        raise DataError(f"{path} belongs to another index than {index}; build the index again, or remove the file")
    if "names" in found.arrays:
        names = Names(found.arrays["names"])
    else:
        text, ends = found.arrays["name_bytes"].tobytes(), found.arrays["name_ends"].tolist()
        parts = [text[start:end].decode() for start, end in zip([0, *ends], ends, strict=False)]
        names = Names(np.array(parts, object))
    if ids is not None and len(ids) and ids.max() >= len(names):
        raise DataError(
            f"{path} has {len(names):,} names, and an id of the index is {ids.max()}; build the index again"
        )
    return names


def fingerprint(index: Path) -> str:
    """Of a checked file: its size and a checksum of its start, where the checksums of all its arrays are."""
    try:
        with open(index, "rb") as file:
            return f"{index.stat().st_size}-{zlib.crc32(file.read(_HEAD_BYTES)):08x}"
    except OSError as error:
        raise DataError(f"cannot read {index}: {(error.strerror or str(error)).lower()}") from error
