"""Control frames: what a peer and the master, or two peers before data flows, tell each other.

    u32 length | u16 kind | u64 epoch | body: JSON, at most 1 MiB

Whoever is at the other end may send anything: a `Reader` never holds more than one frame, and whatever is no frame is a `WireError`.
"""

from __future__ import annotations

import json
import socket
import struct
import time
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

HEADER = struct.Struct("!IHQ")
MOST_BODY = 1 << 20
# Of a frame before its connection has proved itself.
MOST_HELLO = 4096
VERSION = 3
# Lists and objects within each other; a shared state's description has four.
_MOST_DEPTH = 8
_MOST_EPOCH = 2**63


class WireError(Exception):
    """The other end sent what is no frame of this protocol."""


class Kind(IntEnum):
    """Of a frame."""

    HELLO = 1
    CHALLENGE = 2
    PROOF = 3
    WELCOME = 4
    REFUSED = 5
    BEAT = 6
    VOTE = 7
    REPLY = 8
    ABORT = 9
    KICK = 10
    LEAVE = 11
    WITHDRAW = 12
    FETCH = 13


@dataclass(frozen=True)
class Frame:
    """One frame.

    Attributes:
        kind: what it is.
        body: what it says.
        epoch: of the sender's ring.
    """

    kind: Kind
    body: dict[str, Any]
    epoch: int = 0


def packed(kind: Kind, body: dict[str, Any] | None = None, epoch: int = 0) -> bytes:
    """The bytes of a frame. Raises WireError for a body that is too large."""
    text = json.dumps(body or {}, separators=(",", ":"), allow_nan=False).encode()
    if len(text) > MOST_BODY:
        raise WireError(f"a message of {len(text)} bytes, at most {MOST_BODY} go")
    return HEADER.pack(len(text), kind, epoch) + text


class Reader:
    """Makes frames of bytes as they come.

    Attributes:
        most: bytes of a body.
    """

    def __init__(self, most: int = MOST_BODY) -> None:
        self.most = most
        self._held = bytearray()

    def feed(self, data: bytes) -> list[Frame]:
        """Frames that are complete now. Raises WireError for what is none."""
        self._held += data
        frames = []
        while len(self._held) >= HEADER.size:
            length, kind, epoch = HEADER.unpack_from(self._held)
            if length > self.most:
                raise WireError(f"a message of {length} bytes, at most {self.most} go")
            if len(self._held) < HEADER.size + length:
                break
            frames.append(_frame(kind, epoch, bytes(self._held[HEADER.size : HEADER.size + length])))
            del self._held[: HEADER.size + length]
        return frames


def _frame(kind: int, epoch: int, text: bytes) -> Frame:
    try:
        known = Kind(kind)
    except ValueError:
        raise WireError(f"a message of the unknown kind {kind}") from None
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        raise WireError("a message that is no JSON") from None
    if not isinstance(body, dict) or epoch >= _MOST_EPOCH:
        raise WireError("a message that is no object")
    if _is_deep(body):
        raise WireError(f"a message of more than {_MOST_DEPTH} lists within each other")
    return Frame(known, body, epoch)


def _is_deep(body: dict[str, Any]) -> bool:
    """Whether what copies, compares or writes it anew might run out of stack."""
    level: list[Any] = [body]
    for _ in range(_MOST_DEPTH):
        within = (part for one in level for part in (one.values() if isinstance(one, dict) else one))
        level = [part for part in within if isinstance(part, (dict, list))]
        if not level:
            return False
    return True


def number(body: dict[str, Any], name: str, most: int = 2**62, default: int | None = None) -> int:
    """A whole number from 0 to ``most`` of a frame. Raises WireError if it is none."""
    value = body.get(name, default)
    if type(value) is not int or not 0 <= value <= most:
        raise WireError(f"{name} is {str(value)[:40]!r}, and goes from 0 to {most}")
    return value


def word(body: dict[str, Any], name: str, most: int = 256) -> str:
    """A text of a frame, at most ``most`` letters. Raises WireError if it is none."""
    value = body.get(name)
    if not isinstance(value, str) or len(value) > most or not is_plain(value):
        raise WireError(f"{name} is no text of at most {most} letters")
    return value


def is_plain(text: str) -> bool:
    """Whether it has no half of a pair of UTF-16, which is a letter of JSON and of nothing else."""
    return not any(0xD800 <= ord(letter) < 0xE000 for letter in text)


def receive_exactly(sock: socket.socket, view: memoryview, deadline: float) -> None:
    """Fill ``view``. Raises TimeoutError at ``deadline`` (of the monotonic clock), ConnectionError where the other end is gone."""
    while view:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("nothing came in time")
        sock.settimeout(left)
        count = sock.recv_into(view)
        if not count:
            raise ConnectionError("the other end closed the connection")
        view = view[count:]


def receive_frame(sock: socket.socket, deadline: float, most: int = MOST_BODY) -> Frame:
    """The next frame, of at most ``most`` bytes, and not a byte more. Raises WireError, TimeoutError, ConnectionError."""
    head = bytearray(HEADER.size)
    receive_exactly(sock, memoryview(head), deadline)
    length, kind, epoch = HEADER.unpack(head)
    if length > most:
        raise WireError(f"a message of {length} bytes, at most {most} go")
    text = bytearray(length)
    receive_exactly(sock, memoryview(text), deadline)
    return _frame(kind, epoch, bytes(text))


def send_all(sock: socket.socket, data: bytes | memoryview, deadline: float) -> None:
    """Send all of ``data``. Raises TimeoutError at ``deadline``, OSError where the connection is gone."""
    sock.settimeout(max(deadline - time.monotonic(), 0.001))
    sock.sendall(data)
