"""Outside names of the rows of an index or an embedding, kept in a file beside it.

An `HNSW` numbers its vectors 0 ... N - 1 and knows no names. ``index.anb`` of a graph whose nodes have names has ``index.anb.names`` beside
it: a checked file (`anabranch.graph.array_file`) that also says which index it belongs to, so that an index that was replaced is never
read with the names of another.
"""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from anabranch.errors import DataError, InputError
from anabranch.graph.array_file import read_arrays, write_arrays
from anabranch.graph.beside import replacing

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

    @property
    def are_numbers(self) -> bool:
        """Whether rows are called by integers, not by text."""
        return self.array.dtype.kind in "iu"


class GrowingNames(Names):
    """Names to which more are added behind the last. One thread adds, any number may look some up meanwhile.

    Args:
        names: to begin with.
    """

    def __init__(self, names: Names) -> None:
        # Of numbers; None for text.
        self._kind = {"i": np.int64, "u": np.uint64}.get(names.array.dtype.kind)
        self._listed = names.array.tolist()
        self._index = dict(names._index)

    @property
    def array(self) -> np.ndarray:  # type: ignore[override]
        """All of them, [N]."""
        listed = list(self._listed)
        if self._kind is not None:
            return np.array(listed, self._kind)
        found = np.empty(len(listed), object)
        found[:] = listed
        return found

    def __len__(self) -> int:
        return len(self._listed)

    def of(self, ids: np.ndarray) -> list[Any]:
        """Names of rows, as JSON can hold them."""
        return [self._listed[id] for id in ids.tolist()]

    @property
    def are_numbers(self) -> bool:
        """Whether rows are called by integers, not by text."""
        return self._kind is not None

    def find(self, name: Any) -> int | None:
        """The row of a name; None where there is none."""
        return self._index.get(name)

    def check(self, names: Sequence[Any]) -> None:
        """Raise InputError unless these are different names that rows may have: integers of 64 bits, or text, as those there are."""
        seen = set()
        limits = None if self._kind is None else np.iinfo(self._kind)
        for place, name in enumerate(names):
            if limits is not None:
                if isinstance(name, bool) or not isinstance(name, int) or not limits.min <= name <= limits.max:
                    raise InputError(f"names[{place}] is {name!r:.80}; elements are called by whole numbers here")
            elif not isinstance(name, str) or any("\ud800" <= letter <= "\udfff" for letter in name):
                raise InputError(f"names[{place}] is {name!r:.80}; elements are called by text here")
            if name in seen:
                raise InputError(f"names[{place}] is {name!r:.80}, which stands there before; give each name once")
            seen.add(name)

    def add(self, names: Sequence[Any]) -> None:
        """Put names behind the last, which are checked and new."""
        first = len(self._listed)
        # Whoever finds a row by its name finds the name of the row, too.
        self._listed.extend(names)
        self._index.update((name, first + number) for number, name in enumerate(names))

    def since(self, count: int) -> list[Any]:
        """Names behind the first ``count``."""
        return self._listed[count:]


def names_path(index: str | Path) -> Path:
    """Where the names of an index lie."""
    return Path(f"{index}.names")


def write_names(index: str | Path, names: Names) -> Path:
    """Write the names of the index that was saved at ``index``, all or nothing. Raises as `anabranch.graph.beside.new_file`."""
    path = names_path(index)
    # Changes that were taken of the index may bring names.
    with replacing(index):
        write_arrays(path, KIND, names_arrays(names.array), {"index": fingerprint(Path(index))})
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
    try:
        names = Names(names_from(found.arrays))
    except ValueError as error:
        # Sums are right: written so.
        raise DataError(f"{path} does not hold names that this release can read ({error})") from error
    if ids is not None and len(ids) and ids.max() >= len(names):
        raise DataError(
            f"{path} has {len(names):,} names, and an id of the index is {ids.max()}; build the index again"
        )
    return names


def names_arrays(names: np.ndarray | None) -> dict[str, np.ndarray]:
    """Names, [N] of integers or text, as arrays that a file can hold; none for None."""
    if names is None:
        return {}
    if names.dtype.kind in "iu":
        return {"names": names}
    encoded = [str(name).encode() for name in names.tolist()]
    ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
    return {"name_ends": ends, "name_bytes": np.frombuffer(b"".join(encoded), np.uint8)}


def names_from(arrays: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Names that `names_arrays` made arrays of; None where there are none. Raises UnicodeDecodeError for what is no text."""
    if "name_ends" not in arrays:
        return arrays.get("names")
    text, ends = arrays["name_bytes"].tobytes(), arrays["name_ends"].tolist()
    found = np.empty(len(ends), object)
    found[:] = [text[start:end].decode() for start, end in zip([0, *ends], ends, strict=False)]
    return found


def fingerprint(index: Path) -> str:
    """Of a checked file: its size and a checksum of its start, where the checksums of all its arrays are."""
    try:
        with open(index, "rb") as file:
            return f"{index.stat().st_size}-{zlib.crc32(file.read(_HEAD_BYTES)):08x}"
    except OSError as error:
        raise DataError(f"cannot read {index}: {(error.strerror or str(error)).lower()}") from error
