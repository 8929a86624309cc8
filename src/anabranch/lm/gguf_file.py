"""The container of GGUF (versions 2 and 3, little-endian): metadata and where each tensor lies, read in one pass over the mapped file.

The gguf package reads the same, a numpy scalar at a time: seconds for a vocabulary. What it is needed for is its tables of types.
"""

import math
import mmap
import re
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anabranch.bounds import MOST_SIZE, shown
from anabranch.errors import CheckpointError

__all__ = ["Container", "Fields", "Stored", "open_parts"]

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
        data: plain numbers in the reversed shape, or uint8 with a row of bytes for each row.
    """

    name: str
    shape: tuple[int, ...]
    tensor_type: Any
    data: NDArray[Any]


class Container:
    """A GGUF file: ``fields`` by name, ``tensors`` in order. ``gguf`` is the package. Raises ValueError for what is not one."""

    def __init__(self, path: Path, gguf: Any) -> None:
        self.fields: dict[str, Any] = {}
        self._gguf = gguf
        with path.open("rb") as file:
            self._bytes: Any = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._at = 0
        if self._bytes[:4] != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        self._at = 4
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

    def forget(self) -> None:
        """Let go of what was read: its pages are read again when they are wanted."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._bytes.madvise(mmap.MADV_DONTNEED)

    def _take(self, kinds: str) -> tuple[Any, ...]:
        form = struct.Struct("<" + kinds)
        self._need(form.size)
        values = form.unpack_from(self._bytes, self._at)
        self._at += form.size
        return values

    def _need(self, size: int) -> None:
        if self._at + size > len(self._bytes):
            raise ValueError(f"it ends at byte {len(self._bytes)}, in the middle of what it announces")

    def _string(self) -> str:
        (size,) = self._take("Q")
        self._need(size)
        self._at += size
        text: bytes = self._bytes[self._at - size : self._at]
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
        if start + total > len(self._bytes):
            raise ValueError(
                f"it ends at byte {len(self._bytes)}, and {shown(name)} would reach to byte {start + total}"
            )
        if kind.name in _PLAIN:
            data = np.frombuffer(self._bytes, _PLAIN[kind.name], count, start).reshape(shape[::-1])
        else:
            rows = (*shape[:0:-1], shape[0] // block * size)
            data = np.frombuffer(self._bytes, np.uint8, total, start).reshape(rows)
        return Stored(name, shape, kind, data)


# Parts of a file, at most.
_MOST_PARTS = 10_000


def open_parts(path: Path, gguf: Any) -> list[Container]:
    """A file, or all parts of one that was split (``NAME-00001-of-00003.gguf``), whose first part is given and has the metadata.

    Raises CheckpointError for a file that is corrupt, a part that is not the first, and parts that are missing or of another file.
    """
    first = _opened(path, gguf)
    fields = Fields(path, first.fields)
    count = fields.integer("split.count", 0, default=0, most=_MOST_PARTS)
    if count < 2:
        return [first]
    name = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if name is None or int(name[3]) != count:
        raise CheckpointError(
            f"{path} is one of {count} parts (split.count), whose names must end in -00001-of-{count:05}.gguf; give them those names again"
        )
    number = fields.integer("split.no", 0, default=0, most=_MOST_PARTS)
    beginning = path.with_name(f"{name[1]}-00001-of-{name[3]}.gguf")
    if number != 0:
        raise CheckpointError(f"{path} is part {number + 1} of {count}; give the first, {beginning}")
    parts = [first]
    for other in range(2, count + 1):
        place = path.with_name(f"{name[1]}-{other:05}-of-{name[3]}.gguf")
        if not place.is_file():
            raise CheckpointError(f"{place} is missing, part {other} of {count} of {path}; copy it beside the first")
        parts.append(_opened(place, gguf))
        said = Fields(place, parts[-1].fields)
        if (said.get("split.no"), said.get("split.count")) != (other - 1, count):
            raise CheckpointError(
                f"{place} is not part {other} of {count} by its split.no and split.count; copy it again"
            )
    names = [tensor.name for part in parts for tensor in part.tensors]
    wanted = fields.integer("split.tensors.count", 0, default=len(names))
    twice = next((name for name, times in Counter(names).items() if times > 1), None)
    if twice is not None:
        raise CheckpointError(f"the {count} parts of {path} hold {shown(twice)} more than once; copy them again")
    if len(names) != wanted:
        raise CheckpointError(
            f"the {count} parts of {path} hold {len(names)} tensors, and split.tensors.count is {wanted}; copy them again"
        )
    return parts


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
