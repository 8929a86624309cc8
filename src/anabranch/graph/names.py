"""Outside names of the rows of an index or an embedding, kept in a file beside it.

An `HNSW` numbers its vectors 0 ... N - 1 and knows no names. ``index.anb`` of a graph whose nodes have names has ``index.anb.names`` beside
it: a checked file (`anabranch.graph.array_file`) that also says which index it belongs to, so that an index that was replaced is never
read with the names of another.
"""

import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from anabranch.errors import DataError, InputError
from anabranch.graph.array_file import read_arrays, write_arrays
from anabranch.graph.beside import new_file, replacing
from anabranch.graph.header import described
from anabranch.graph.masks import unmasked

KIND = "names"
_HEAD_BYTES = 1 << 16

# Characters of a name that comes to an index: every result that is called so tells it.
LONGEST = 4096


class Names:
    """Names of N rows, both ways. ``array`` is [N], integers or text, as in `Graph.names`; they are distinct."""

    def __init__(self, array: Any) -> None:
        found = np.asarray(unmasked(array, "names"))
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

    Attributes:
        is_open: whether it is not known yet if they are numbers or text: there are none. See `beginning`.
    """

    def __init__(self, names: Names) -> None:
        # Of numbers; None for text.
        self._kind = {"i": np.int64, "u": np.uint64}.get(names.array.dtype.kind)
        self._listed = names.array.tolist()
        self._index = dict(names._index)
        self.is_open = not self._listed and self._kind is None

    @classmethod
    def beginning(cls, names: Sequence[Any]) -> Self:
        """None yet, of the kind that these have, which are to be the first: whole numbers as the first of them, or text."""
        numbers = [name for name in names if isinstance(name, int) and not isinstance(name, bool)]
        is_number = bool(numbers) and numbers[0] is names[0]
        kind: Any = np.uint64 if is_number and max(numbers) > np.iinfo(np.int64).max else np.int64
        made = cls(Names(np.empty(0, kind if is_number else object)))
        made.is_open = False
        return made

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

    def check(self, names: Sequence[Any], *, longest: int | None = LONGEST) -> None:
        """Raise InputError unless these are different names that rows may have: integers of 64 bits, or text, as those there are.

        New text has at most ``longest`` characters; None for as many as it likes.
        """
        seen = set()
        limits = None if self._kind is None else np.iinfo(self._kind)
        for place, name in enumerate(names):
            if limits is not None:
                if isinstance(name, bool) or not isinstance(name, int) or not limits.min <= name <= limits.max:
                    raise InputError(f"names[{place}] is {name!r:.80}; elements are called by whole numbers here")
            elif not isinstance(name, str) or any("\ud800" <= letter <= "\udfff" for letter in name):
                raise InputError(f"names[{place}] is {name!r:.80}; elements are called by text here")
            elif longest is not None and len(name) > longest and name not in self._index:
                raise InputError(
                    f"names[{place}] is {name[:40]!r}... of {len(name):,} characters; a new name has at most {longest:,}"
                )
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
    """Where the names of an index lie: of a link, beside the file that it leads to."""
    return Path(f"{os.path.realpath(index) if os.path.islink(index) else index}.names")


def write_names(index: str | Path, names: Names) -> Path:
    """Write the names of the index that was saved at ``index``, all or nothing.

    Raises as `anabranch.graph.beside.new_file` and `check_names_place`.
    """
    path = names_path(index)
    # Changes that were taken of the index may bring names.
    with replacing(index):
        check_names_place(index)
        write_arrays(path, KIND, names_arrays(names.array), {"index": fingerprint(Path(index))})
    return path


def write_named(index: str | Path, names: Names, save: Callable[[Path], None]) -> None:
    """Put a changed index and its names in the place of what it was made of, so that a crash leaves an index with its names.

    Args:
        index: the place.
        names: those that were there, and perhaps more behind them.
        save: writes the index to the path that it is given.

    Raises as `anabranch.graph.beside.new_file` and `check_names_place`.
    """
    with replacing(index), new_file(index) as temporary:
        check_names_place(index)
        save(temporary)
        # First the names, which fit the old index too: a process may be killed before the new one is in its place.
        meta = {"index": fingerprint(temporary), "before": fingerprint(Path(index))}
        # A link is replaced by the index, whose names then lie beside it.
        write_arrays(Path(f"{index}.names"), KIND, names_arrays(names.array), meta)


def check_names_place(index: str | Path) -> None:
    """Raise DataError where something else than names of an index lies in their place: it would be lost."""
    # Of a link, whose names lie elsewhere until an index takes its place.
    for path in {names_path(index), Path(f"{index}.names")}:
        if not os.path.lexists(path):
            continue
        try:
            read_arrays(path, KIND, mmap=True)
        except DataError as error:
            raise DataError(
                f"{path} lies where names of {index} go, and would be lost ({error}); move it away, or name another file"
            ) from None


def remove_names(index: str | Path) -> None:
    """Remove the names of an index that was there before. Raises DataError as `check_names_place`."""
    check_names_place(index)
    names_path(index).unlink(missing_ok=True)


def read_names(index: str | Path, ids: np.ndarray | None = None) -> Names | None:
    """The names of an index; None where there is no file of them. ``ids`` are those that must have one.

    Raises DataError for a damaged file, or one that was written for another index or has too few names.
    """
    path = names_path(index)
    if not path.exists():
        return None
    found = read_arrays(path, KIND)
    if fingerprint(Path(index)) not in (found.meta.get("index"), found.meta.get("before")):
        raise DataError(f"{path} belongs to another index than {index}; build the index again, or remove the file")
    with described(path, "names"):
        names = Names(_of_names(found.arrays))
    if ids is not None and len(ids) and ids.max() >= len(names):
        raise DataError(
            f"{path} has {len(names):,} names, and an id of the index is {ids.max()}; build the index again"
        )
    return names


def plain_names(names: np.ndarray) -> np.ndarray:
    """The same as an array of integers where all of them are; others as they come."""
    if names.dtype != object or not len(names) or not all(type(name) is int for name in names.tolist()):
        return names
    for kind in (np.int64, np.uint64):
        limits = np.iinfo(kind)
        if all(limits.min <= name <= limits.max for name in names.tolist()):
            return names.astype(kind)
    return names


def check_saved_names(names: np.ndarray) -> None:
    """Raises InputError for names that a file would not keep apart: neither all integers nor all text."""
    if names.dtype.kind in "iuU":
        return
    strange = next((name for name in names.tolist() if not isinstance(name, str)), None)
    if strange is not None:
        raise InputError(f"names can be saved if all are integers or all are text; {strange!r:.80} is not text")


def names_arrays(names: np.ndarray | None) -> dict[str, np.ndarray]:
    """Names, [N] of integers or text, as arrays that a file can hold; none for None. Raises InputError for text that is not UTF-8."""
    if names is None:
        return {}
    if names.dtype.kind in "iu":
        return {"names": names}
    try:
        encoded = [str(name).encode() for name in names.tolist()]
    except UnicodeEncodeError as error:
        # Half of a pair of UTF-16, which Python's text may hold.
        raise InputError(f"the name {error.object!r:.80} cannot be written: it is no text in UTF-8") from None
    ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
    return {"name_ends": ends, "name_bytes": np.frombuffer(b"".join(encoded), np.uint8)}


def _of_names(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Names that there must be. Raises ValueError."""
    names = names_from(arrays)
    if names is None or names.ndim != 1 or names.dtype.kind not in "iuO":
        raise ValueError("there are none")
    return names


def names_from(arrays: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Names that `names_arrays` made arrays of; None where there are none.

    Raises ValueError for other arrays, UnicodeDecodeError (which is one) for what is no text.
    """
    if "name_ends" not in arrays:
        return arrays.get("names")
    ends_N, letters = arrays["name_ends"], arrays.get("name_bytes")
    if (
        ends_N.dtype != np.int64
        or ends_N.ndim != 1
        or letters is None
        or letters.dtype != np.uint8
        or letters.ndim != 1
    ):
        raise ValueError("names are not bytes and where each ends")
    if (np.diff(ends_N, prepend=0) < 0).any() or (ends_N[-1] if len(ends_N) else 0) != len(letters):
        raise ValueError("ends of names are out of order or range")
    text, ends = letters.tobytes(), ends_N.tolist()
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
