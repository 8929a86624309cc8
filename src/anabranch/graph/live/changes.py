"""Changes of an index, and what they are as bytes in a log.

    item      kind (uint32), count (uint32)
    upsert    kind 1: ids int64 [count], vectors [count, dim], float32 or as the log's header says
    delete    kind 2: ids int64 [count]
    names     kind 3, before the upsert that brings them: the id that the first of them gets (uint64), length (uint64), and a JSON list of
              ``count`` names, which elements of the ids from there on have from then on

All little-endian.
"""
# Shapes: N ids, D dimension

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

ITEM = struct.Struct("<II")
PLACE = struct.Struct("<QQ")
UPSERT, DELETE, NAMES = 1, 2, 3
# Types of numbers in a vector.
FLOATS, BYTES = "f4", "u1"


@dataclass(frozen=True)
class Change:
    """Elements that come or move (``vectors``, float32 [N, D], or uint8 of packed bits), or go (None). ``ids`` are int64 [N], each once.

    ``names`` are those that it brings; they get the ids ``first_named``, ``first_named`` + 1, ...
    """

    ids: np.ndarray
    vectors: np.ndarray | None
    names: tuple[Any, ...] = ()
    first_named: int = 0


def payload_bytes(change: Change) -> int:
    """Bytes of a change in a payload."""
    size = ITEM.size + 8 * len(change.ids)
    if change.vectors is not None:
        size += np.dtype(_row(change.vectors)).itemsize * change.vectors.size
    return size if not change.names else size + ITEM.size + PLACE.size + len(_text(change.names))


def _row(vectors: np.ndarray) -> str:
    return BYTES if vectors.dtype == np.uint8 else FLOATS


def encode(changes: Sequence[Change]) -> bytes:
    """The payload of a frame."""
    parts: list[bytes] = []
    for change in changes:
        if change.names:
            text = _text(change.names)
            parts += [ITEM.pack(NAMES, len(change.names)), PLACE.pack(change.first_named, len(text)), text]
        parts.append(ITEM.pack(DELETE if change.vectors is None else UPSERT, len(change.ids)))
        parts.append(np.ascontiguousarray(change.ids, "<i8").tobytes())
        if change.vectors is not None:
            parts.append(np.ascontiguousarray(change.vectors, f"<{_row(change.vectors)}").tobytes())
    return b"".join(parts)


def decode(payload: bytes, dim: int, row: str = FLOATS) -> list[Change]:
    """Changes of a payload. Raises ValueError or struct.error where it is not one."""
    changes, place, number = [], 0, np.dtype(row).newbyteorder("<")
    names: tuple[Any, ...] = ()
    first = 0
    while place < len(payload):
        kind, count = ITEM.unpack_from(payload, place)
        place += ITEM.size
        if kind == NAMES:
            first, length = PLACE.unpack_from(payload, place)
            place += PLACE.size
            names, place = _names(payload[place : place + length], count), place + length
            continue
        size = 8 * count + (number.itemsize * count * dim if kind == UPSERT else 0)
        if kind not in (UPSERT, DELETE) or place + size > len(payload):
            raise ValueError(f"a change of kind {kind} with {count} ids")
        ids = np.frombuffer(payload, "<i8", count, place).astype(np.int64)
        vectors = None
        if kind == UPSERT:
            vectors = np.frombuffer(payload, number, count * dim, place + 8 * count).astype(row)
            vectors = vectors.reshape(count, dim)
        changes.append(Change(ids, vectors, names, first))
        names, first, place = (), 0, place + size
    if names:
        raise ValueError("names of no change")
    return changes


def _text(names: Sequence[Any]) -> bytes:
    return json.dumps(list(names), ensure_ascii=False, separators=(",", ":")).encode()


def _names(text: bytes, count: int) -> tuple[Any, ...]:
    try:
        found = json.loads(text)
    except RecursionError:
        raise ValueError("names that are none") from None
    if not isinstance(found, list) or len(found) != count:
        raise ValueError(f"{count} names that are none")
    return tuple(found)
