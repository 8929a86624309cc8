"""The container of GGUF (versions 2 and 3, little-endian): metadata and where each tensor lies, read in one pass over the mapped file.

The gguf package reads the same, a numpy scalar at a time: seconds for a vocabulary. What it is needed for is its tables of types.
"""

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anabranch.bounds import shown

__all__ = ["Container", "Stored"]

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
