"""The container of GGUF (versions 2 and 3, little-endian): metadata and where each tensor lies, read in one pass over the file.

The gguf package reads the same, a numpy scalar at a time: seconds for a vocabulary. What it is needed for is its tables of types.
"""

import math
import re
import struct
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from anabranch.bounds import MOST_SIZE, shown
from anabranch.errors import CheckpointError
from anabranch.lm.stored_file import StoredFile

__all__ = ["Container", "Fields", "Stored", "open_parts", "part_files"]

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# Dimensions of a tensor, and levels of arrays within arrays, at most.
_MOST_DIMS, _MOST_NESTED = 8, 4
_PLAIN = {"F32": np.float32, "F16": np.float16, "F64": np.float64}


@dataclass(frozen=True)
class Stored:
    """One tensor.

    Attributes:
        name: in the file.
        shape: sizes, the fastest first.
        tensor_type: a ``gguf.GGMLQuantizationType``.
        file: that it lies in.
        start: its first byte there.
        row_shape: of what is read: the reversed shape, with the bytes of a row for its numbers where these are in blocks.
        row_type: of what is read, uint8 for blocks.
    """

    name: str
    shape: tuple[int, ...]
    tensor_type: Any
    file: StoredFile
    start: int
    row_shape: tuple[int, ...]
    row_type: Any

    def read(self, index: int | None = None) -> NDArray[Any]:
        """What is stored, in memory of its own; of a stack the matrix ``index`` alone. Raises CheckpointError as `StoredFile`."""
        shape = self.row_shape if index is None else self.row_shape[1:]
        size = math.prod(shape) * np.dtype(self.row_type).itemsize
        found = self.file.read(self.start + (index or 0) * size, size)
        return found.view(self.row_type).reshape(shape)


class Container:
    """A GGUF file: ``fields`` by name, ``tensors`` in order. ``gguf`` is the package. Raises ValueError for what is not one."""

    def __init__(self, path: Path, gguf: Any) -> None:
        self.fields: dict[str, Any] = {}
        self._gguf = gguf
        self._stored = StoredFile(path)
        with self._stored.beginning() as file:
            self._read_heads(file)

    def _read_heads(self, file: BinaryIO) -> None:
        self._file, self._at = file, 0
        if self._stored.size < 4 or self._next(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        version, num_tensors, num_fields = self._take("IQQ")
        if version not in (2, 3):
            raise ValueError(f"it is of GGUF version {version}; supported: 2 and 3")
        for _ in range(num_fields):
            name = self._string()
            self.fields[name] = self._value(self._take("I")[0])
        heads = [self._head() for _ in range(num_tensors)]
        step = self.fields.get("general.alignment", 32)
        if type(step) is not int or not 1 <= step <= 1 << 20:
            raise ValueError(f"general.alignment is {shown(step)}; it must be 1 to {1 << 20}")
        start = -(-self._at // step) * step
        self.tensors = [self._tensor(name, shape, kind, start + offset) for name, shape, kind, offset in heads]

    def _take(self, kinds: str) -> tuple[Any, ...]:
        form = struct.Struct("<" + kinds)
        return form.unpack(self._next(form.size))

    def _next(self, size: int) -> bytes:
        self._need(size)
        found = self._file.read(size)
        if len(found) < size:
            raise ValueError("it was shortened while it was read")
        self._at += size
        return found

    def _need(self, size: int) -> None:
        if self._at + size > self._stored.size:
            raise ValueError(f"it ends at byte {self._stored.size}, in the middle of what it announces")

    def _string(self) -> str:
        (size,) = self._take("Q")
        text = self._next(size)
        try:
            return text.decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError(f"the text at byte {self._at - size}, {shown(text)}, is not UTF-8") from None

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            item, count = self._take("IQ")
            if item in _SCALARS:
                self._need(count * struct.calcsize("<" + _SCALARS[item]))
                return list(self._take(f"{count}{_SCALARS[item]}"))
            # Each takes a byte at least, so no list of a corrupt length is begun.
            self._need(count)
            if depth == _MOST_NESTED:
                raise ValueError(f"a field has arrays in arrays, more than {_MOST_NESTED} deep")
            return [self._value(item, depth + 1) for _ in range(count)]
        if kind not in _SCALARS:
            raise ValueError(f"a field is of type {kind}, which there is not")
        return self._take(_SCALARS[kind])[0]

    def _head(self) -> tuple[str, tuple[int, ...], Any, int]:
        name = self._string()
        (dims,) = self._take("I")
        if dims > _MOST_DIMS:
            raise ValueError(f"tensor {shown(name)} has {dims} dimensions; at most {_MOST_DIMS} can be")
        *shape, kind, offset = self._take(f"{dims}QIQ")
        try:
            return name, tuple(shape), self._gguf.GGMLQuantizationType(kind), offset
        except ValueError:
            raise ValueError(f"tensor {shown(name)} is of type {kind}, which there is not") from None

    def _tensor(self, name: str, shape: tuple[int, ...], kind: Any, start: int) -> Stored:
        block, size = self._gguf.GGML_QUANT_SIZES[kind]
        count = math.prod(shape)
        total = count // block * size
        if not shape or shape[0] % block:
            raise ValueError(
                f"tensor {shown(name)} has rows of {shape[:1]} numbers; {kind.name} packs {block} at a time"
            )
        if start + total > self._stored.size:
            raise ValueError(
                f"it ends at byte {self._stored.size}, and {shown(name)} would reach to byte {start + total}"
            )
        if kind.name in _PLAIN:
            return Stored(name, shape, kind, self._stored, start, shape[::-1], _PLAIN[kind.name])
        rows = (*shape[:0:-1], shape[0] // block * size)
        return Stored(name, shape, kind, self._stored, start, rows, np.uint8)


# Parts of a file, at most.
_MOST_PARTS = 10_000
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")


def part_files(path: Path) -> list[Path]:
    """``path``, and behind it the other parts where it has the name of the first of several: what `open_parts` opens, there or not."""
    name = _PART.fullmatch(path.name)
    if name is None or int(name[3]) > _MOST_PARTS:
        return [path]
    return [path, *(path.with_name(f"{name[1]}-{other:05}-of-{name[3]}.gguf") for other in range(2, int(name[3]) + 1))]


def open_parts(path: Path, gguf: Any) -> list[Container]:
    """A file, or all parts of one that was split (``NAME-00001-of-00003.gguf``), whose first part is given and has the metadata.

    Raises CheckpointError for a file that is corrupt, a part that is not the first, and parts that are missing or of another file.
    """
    first = _opened(path, gguf)
    fields = Fields(path, first.fields)
    count = fields.integer("split.count", 0, default=0, most=_MOST_PARTS)
    if count < 2:
        _check_once(path, [first])
        return [first]
    name = _PART.fullmatch(path.name)
    if name is None or int(name[3]) != count:
        raise CheckpointError(
            f"{path} is one of {count} parts (split.count), whose names must end in -00001-of-{count:05}.gguf; give them those names again"
        )
    number = fields.integer("split.no", 0, default=0, most=_MOST_PARTS)
    beginning = path.with_name(f"{name[1]}-00001-of-{name[3]}.gguf")
    if number != 0:
        raise CheckpointError(f"{path} is part {number + 1} of {count}; give the first, {beginning}")
    parts = [first]
    for other, place in enumerate(part_files(path)[1:], start=2):
        if not place.is_file():
            raise CheckpointError(f"{place} is missing, part {other} of {count} of {path}; copy it beside the first")
        parts.append(_opened(place, gguf))
        said = Fields(place, parts[-1].fields)
        if (said.get("split.no"), said.get("split.count")) != (other - 1, count):
            raise CheckpointError(
                f"{place} is not part {other} of {count} by its split.no and split.count; copy it again"
            )
    held = _check_once(path, parts)
    wanted = fields.integer("split.tensors.count", 0, default=held)
    if held != wanted:
        raise CheckpointError(
            f"the {count} parts of {path} hold {held} tensors, and split.tensors.count is {wanted}; copy them again"
        )
    return parts


def _check_once(path: Path, parts: Sequence[Container]) -> int:
    """The number of tensors that ``parts`` hold. Raises CheckpointError where one is there twice: nobody knows which was meant."""
    times = Counter(tensor.name for part in parts for tensor in part.tensors)
    twice = next((name for name, count in times.items() if count > 1), None)
    if twice is not None:
        where = str(path) if len(parts) == 1 else f"the {len(parts)} parts of {path}"
        raise CheckpointError(
            f"{where} {'holds' if len(parts) == 1 else 'hold'} {shown(twice)} more than once; copy or convert the model again"
        )
    return len(times)


def _opened(path: Path, gguf: Any) -> Container:
    try:
        return Container(path, gguf)
    except Exception as error:
        # Broken bytes may raise anything.
        raise CheckpointError(f"cannot read {path}: {error}; it is truncated or corrupt, copy it again") from None


class Fields:
    """The metadata of a file, read field by field. Raises CheckpointError for a value of another kind than is asked for."""

    def __init__(self, path: Path, table: dict[str, Any]) -> None:
        self.path = path
        self._table = table

    def get(self, name: str) -> Any:
        """A value, None if there is none."""
        return self._table.get(name)

    def under(self, prefix: str) -> Iterator[tuple[str, Any]]:
        """(name behind ``prefix`` and a dot, value) of the fields that have it."""
        for name, value in self._table.items():
            if name.startswith(f"{prefix}."):
                yield name.removeprefix(f"{prefix}."), value

    def require(self, name: str) -> Any:
        """A value that must be there."""
        value = self.get(name)
        if value is None:
            raise CheckpointError(f"{self.path} has no {name}, without which the model cannot be built")
        return value

    def integer(self, name: str, low: int = 1, *, most: int = MOST_SIZE, default: int | None = None) -> int:
        """A whole number from ``low`` to ``most``, ``default`` where there is none."""
        value = self.require(name) if default is None else self._table.get(name, default)
        if type(value) is not int or not low <= value <= most:
            raise CheckpointError(
                f"{name} in {self.path} is {shown(value)}; it must be a whole number from {low} to {most}"
            )
        return value

    def real(self, name: str, *, default: float | None = None) -> float:
        """A finite number above 0, ``default`` where there is none or 0."""
        value = self.require(name) if default is None else self._table.get(name) or default
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise CheckpointError(f"{name} in {self.path} is {shown(value)}; it must be a finite number above 0")
        return value

    def flag(self, name: str, *, default: bool) -> bool:
        """True or false, ``default`` where it is not said."""
        value = self._table.get(name, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"{name} in {self.path} is {shown(value)}; it must be true or false")
        return value

    def list_of(self, kind: type, name: str) -> list[Any]:
        """A list of values of one type, empty where there is none."""
        value = self._table.get(name, [])
        if not isinstance(value, list) or not all(type(item) is kind for item in value):
            raise CheckpointError(f"{name} in {self.path} is {shown(value)}; it must be a list of {kind.__name__}")
        return value
