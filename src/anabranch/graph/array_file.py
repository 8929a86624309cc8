"""One checked file of named arrays: what graphs, indexes and embeddings are saved in.

    magic     8 bytes, b"ANABARR1"
    lengths   two uint64: bytes of the header, bytes of the whole file
    header    JSON: ``kind`` (what the file holds), ``version`` of that kind, ``meta``, and per array name, dtype, shape, offset, CRC-32
    crc       uint32 of the header
    arrays    raw, little-endian, C order, each at a multiple of 64 bytes, so that they can be mapped into memory

A file is written beside its place and renamed. Reading refuses a file that is foreign, of another kind, truncated, or altered: lengths and
the header's checksum are always checked; checksums of arrays unless it is mapped (that would read all of it; `verify` does, and so does
``verify=True``); `read_beside` leaves one array in the file to whoever reads it. A byte between two arrays belongs to none and is not
looked at.
"""

import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from anabranch.bounds import shown
from anabranch.errors import DataError, InputError
from anabranch.files import atomic_file, parse_json
from anabranch.graph.arguments import as_path
from anabranch.graph.beside import MAGIC, new_file
from anabranch.graph.header import KINDS, check_header

ALIGN = 64
_CHUNK = 1 << 24
_PIECE = 1 << 18


@dataclass(frozen=True)
class ArrayFile:
    """What a file holds.

    Attributes:
        arrays: by name; read-only where the file is mapped.
        meta: what was written beside them.
        version: of the kind.
    """

    arrays: dict[str, np.ndarray]
    meta: dict[str, Any]
    version: int


@dataclass(frozen=True)
class Shape:
    """Of an array that is to be written: its type, its sides, and what the place of its first byte is a multiple of."""

    dtype: Any
    sides: tuple[int, ...]
    align: int = ALIGN

    @property
    def nbytes(self) -> int:
        """Bytes of it."""
        return math.prod(self.sides) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True)
class Left:
    """An array that was left in its file, which is open: whoever reads it looks at its bytes.

    Attributes:
        file: open for reading, without a buffer; closed with the last reference to it.
        place: of the first byte in it.
        shape: what it is.
    """

    file: BinaryIO
    place: int
    shape: Shape


def write_arrays(
    path: str | Path,
    kind: str,
    arrays: Mapping[str, np.ndarray],
    meta: Mapping[str, Any] | None = None,
    version: int = 1,
    *,
    mode: int | None = None,
    is_held: bool = False,
) -> None:
    """Write a file, all or nothing.

    Args:
        path: the place.
        kind: what the file holds.
        arrays: by name.
        meta: what JSON can hold.
        version: of the kind.
        mode: as of `atomic_file`.
        is_held: whether nobody else can take changes of what is there, since this process does.

    Raises InputError for arrays of objects or records, and as `new_file`.
    """
    entries, offset = [], 0
    stored = {name: _little(name, array) for name, array in arrays.items()}
    for name, array in stored.items():
        entries.append(
            {"name": name, "dtype": array.dtype.str, "shape": list(array.shape), "offset": offset, "crc": _crc(array)}
        )
        offset += _padded(array.nbytes)
    header = json.dumps({"kind": kind, "version": version, "meta": dict(meta or {}), "arrays": entries}).encode()
    start = _padded(len(MAGIC) + 16 + len(header) + 4)
    place = atomic_file if is_held else new_file
    with place(path, mode=mode) as temporary, open(temporary, "wb") as file:
        file.write(MAGIC + np.array([len(header), start + offset], "<u8").tobytes() + header)
        file.write(np.array([zlib.crc32(header)], "<u4").tobytes())
        file.write(b"\0" * (start - file.tell()))
        for array in stored.values():
            file.write(_flat(array))
            file.write(b"\0" * (_padded(array.nbytes) - array.nbytes))


class Filling:
    """Arrays of a file that is being written: `put` their rows in any order."""

    def __init__(self, file: BinaryIO, places: dict[str, int], shapes: Mapping[str, Shape]) -> None:
        self._file, self._places, self._shapes = file, places, shapes

    def put(self, name: str, first: int, rows: np.ndarray) -> None:
        """Write rows from number ``first`` on. They are of the array's type and width (a mistake of the program otherwise)."""
        shape = self._shapes[name]
        rows = np.ascontiguousarray(rows, np.dtype(shape.dtype).newbyteorder("<"))
        if rows.shape[1:] != shape.sides[1:] or first < 0 or first + len(rows) > shape.sides[0]:
            raise ValueError(f"rows {list(rows.shape)} from {first} on are none of {name!r}, {list(shape.sides)}")
        if rows.size:
            self._file.seek(self._places[name] + first * (rows.nbytes // len(rows)))
            self._file.write(_flat(rows))

    def crc(self, name: str) -> int:
        """The checksum of what was written; zeros where nothing was."""
        left, found = self._shapes[name].nbytes, 0
        self._file.seek(self._places[name])
        while left:
            # Small: who fills a file piece by piece has little memory.
            piece = self._file.read(min(left, _PIECE))
            if not piece:
                raise EOFError(f"the file ends within {name!r}")
            found, left = zlib.crc32(piece, found), left - len(piece)
        return found


@contextmanager
def filling_arrays(
    path: str | Path, kind: str, shapes: Mapping[str, Shape], meta: Mapping[str, Any] | None = None, version: int = 1
) -> Iterator[Filling]:
    """Write a file whose arrays need not fit into memory, all or nothing: what is yielded takes their rows.

    Raises as `new_file`.
    """
    entries, widest = [], 2**32 - 1
    for name, shape in shapes.items():
        dtype = np.dtype(shape.dtype).newbyteorder("<").str
        entries.append({"name": name, "dtype": dtype, "shape": list(shape.sides), "offset": 2**63 - 1, "crc": widest})

    def header() -> bytes:
        return json.dumps({"kind": kind, "version": version, "meta": dict(meta or {}), "arrays": entries}).encode()

    # Numbers that are not known yet take fewer digits later: the rest is filled with spaces.
    length = len(header())
    start = end = _padded(len(MAGIC) + 16 + length + 4)
    places: dict[str, int] = {}
    for entry, (name, shape) in zip(entries, shapes.items(), strict=True):
        places[name] = -(-end // shape.align) * shape.align
        entry["offset"], end = places[name] - start, _padded(places[name] + shape.nbytes)
    with new_file(path) as temporary, open(temporary, "w+b") as file:
        file.truncate(end)
        filling = Filling(file, places, shapes)
        yield filling
        for entry in entries:
            entry["crc"] = filling.crc(str(entry["name"]))
        written = header().ljust(length)
        file.seek(0)
        file.write(MAGIC + np.array([length, end], "<u8").tobytes() + written)
        file.write(np.array([zlib.crc32(written)], "<u4").tobytes())


def check_how(mmap: Any, verify: Any) -> None:
    """Raise InputError unless ``mmap`` is a truth value, and ``verify`` one or None: what a file says is not left to a word for either."""
    for name, value, also in (("mmap", mmap, ""), ("verify", verify, ", or None")):
        if not (isinstance(value, bool | np.bool_) or (also and value is None)):
            raise InputError(f"{name} is {shown(value)}; it must be True or False{also}")


def read_arrays(
    path: str | Path, kind: str, *, versions: tuple[int, ...] = (1,), mmap: bool = False, verify: bool | None = None
) -> ArrayFile:
    """Read a file of this kind.

    Args:
        path: the file.
        kind: what it must hold.
        versions: those the caller can read.
        mmap: map arrays into memory instead of reading them; they are then read-only.
        verify: look at the checksums of arrays. Default: unless they are mapped.

    Raises:
        InputError: ``mmap`` or ``verify`` is none of these.
        DataError: there is no such file, or it is foreign, of another kind or version, truncated or altered.
    """
    check_how(mmap, verify)
    path = as_path(path)
    header, start = _header(path)
    _check_kind(path, header, kind, versions)
    verify = not mmap if verify is None else verify
    arrays: dict[str, np.ndarray] = {}
    for entry in header["arrays"]:
        array = _array(path, entry, start, mmap)
        if verify and _crc(array) != entry["crc"]:
            raise DataError(f"{path} is damaged: the checksum of {entry['name']!r} is wrong; make the file again")
        arrays[entry["name"]] = array
    return ArrayFile(arrays, header["meta"], header["version"])


def read_beside(
    path: str | Path, kind: str, left: str, *, versions: tuple[int, ...] = (1,), mmap: bool = False
) -> tuple[ArrayFile, Left]:
    """Read all arrays but one, which stays in the file; all of it is of one file, whatever takes its place meanwhile.

    Args:
        path: the file.
        kind: what it must hold.
        left: the array that stays; its checksum is not looked at.
        versions: those the caller can read.
        mmap: map the others into memory, which processes share then; their checksums are looked at all the same.

    Raises DataError as `read_arrays`, and where ``left`` is not there.
    """
    path = as_path(path)
    try:
        file = open(path, "rb", buffering=0)
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        header, start = _parsed(file, path)
        _check_kind(path, header, kind, versions)
        arrays, found = {}, None
        for entry in header["arrays"]:
            if entry["name"] == left:
                found = Left(file, start + entry["offset"], Shape(np.dtype(entry["dtype"]), tuple(entry["shape"])))
                continue
            array = _array(file, entry, start, mmap)
            if _crc(array) != entry["crc"]:
                raise DataError(f"{path} is damaged: the checksum of {entry['name']!r} is wrong; make the file again")
            arrays[entry["name"]] = array
        if found is None:
            raise DataError(f"{path} is damaged: it has no {left!r}")
    except BaseException:
        file.close()
        raise
    return ArrayFile(arrays, header["meta"], header["version"]), found


def _check_kind(path: Path, header: dict[str, Any], kind: str, versions: tuple[int, ...]) -> None:
    if header["kind"] != kind:
        raise DataError(f"{path} holds a {header['kind']}, not a {kind}")
    if header["version"] not in versions:
        known = ", ".join(map(str, versions))
        raise DataError(f"{path} is version {header['version']} of a {kind}; this release reads {known}")


def _array(source: Path | BinaryIO, entry: dict[str, Any], start: int, mmap: bool) -> np.ndarray:
    """An array of a file, which is open or closed."""
    shape, dtype, place = tuple(entry["shape"]), np.dtype(entry["dtype"]), start + entry["offset"]
    try:
        if mmap and 0 not in shape:
            return np.memmap(source, dtype, "r", place, shape)
        count = int(np.prod(shape, dtype=np.int64))
        if not isinstance(source, Path):
            source.seek(place)
            return np.fromfile(source, dtype, count).reshape(shape)
        return np.fromfile(source, dtype, count, offset=place).reshape(shape)
    except (OSError, ValueError) as error:
        # Another process changed it after the header was read.
        name = source if isinstance(source, Path) else source.name
        raise DataError(f"cannot read {entry['name']!r} of {name}: {str(error).lower()}") from error


def verify(path: str | Path, kind: str, *, versions: tuple[int, ...] = (1,)) -> None:
    """Read all of a file and look at every checksum. Raises as `read_arrays`."""
    read_arrays(path, kind, versions=versions)


def kind_of(path: str | Path) -> str:
    """What a file holds. Raises DataError for a foreign or damaged one."""
    return _header(as_path(path))[0]["kind"]


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The header, and where arrays start."""
    try:
        with open(path, "rb") as file:
            return _parsed(file, path)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"cannot read {path}: {(error.strerror or str(error)).lower()}")


def _parsed(file: BinaryIO, path: Path) -> tuple[dict[str, Any], int]:
    """The header of an open file, called ``path``, and where arrays start."""
    try:
        size = os.fstat(file.fileno()).st_size
        fixed = file.read(len(MAGIC) + 16)
        if fixed[: len(MAGIC)] != MAGIC:
            raise DataError(f"{path} is not one of our array files (it does not start with {MAGIC.decode()})")
        if len(fixed) < len(MAGIC) + 16:
            raise DataError(f"{path} is truncated: it ends within its first {len(MAGIC) + 16} bytes")
        length, whole = (int(number) for number in np.frombuffer(fixed[len(MAGIC) :], "<u8"))
        if size != whole or length > size:
            raise DataError(f"{path} is truncated or damaged: it has {size:,} bytes where {whole:,} were written")
        header, crc = file.read(length), file.read(4)
    except OSError as error:
        raise _unreadable(path, error) from error
    if len(crc) < 4 or zlib.crc32(header) != int(np.frombuffer(crc, "<u4")[0]):
        raise DataError(f"{path} is damaged: the checksum of its header is wrong; make the file again")
    start = _padded(len(MAGIC) + 16 + length + 4)
    try:
        found = parse_json(header)
        check_header(found, start, size)
    except ValueError as error:
        # Its sum is right: written so by something else.
        raise DataError(f"{path} has a header that this release cannot read: {error}") from error
    return found, start


def _little(name: str, array: np.ndarray) -> np.ndarray:
    array = np.asarray(array, order="C")
    if array.dtype.kind not in KINDS:
        raise InputError(f"{name!r} is of type {array.dtype}; a file holds numbers, truth values and fixed-length text")
    return array.astype(array.dtype.newbyteorder("<"), copy=False)


def _flat(array: np.ndarray) -> memoryview:
    """The bytes of a contiguous array, without a copy."""
    return array.reshape(-1).view(np.uint8).data


def _crc(array: np.ndarray) -> int:
    flat = _flat(array)
    found = 0
    for start in range(0, len(flat), _CHUNK):
        found = zlib.crc32(flat[start : start + _CHUNK], found)
    return found


def _padded(count: int) -> int:
    return -(-count // ALIGN) * ALIGN
