"""Server-sent events: whole events out of bytes that are cut anywhere, and bytes out of events."""

import json
from collections.abc import Iterator
from typing import Any

from anabranch.gateway.providers.provider import garbage

EVENT_BYTES = 8 << 20  # most bytes of one event
DONE = b"data: [DONE]\n\n"
DONE_DATA = b"[DONE]"


class Splitter:
    """Collects bytes and gives out whole events, with ``\\n`` as the only line end."""

    __slots__ = ("_has_cr", "_rest")

    def __init__(self) -> None:
        self._rest = b""
        self._has_cr = False  # a carriage return was seen: from now on line ends are looked at closely

    def feed(self, data: bytes) -> bytes:
        """All events that are whole now; what follows them is kept. Raises UpstreamError (``garbage``) for an endless event."""
        block = self._rest + data if self._rest else data
        if self._has_cr or b"\r" in data:
            self._has_cr = True
            held = block[-1:] == b"\r"  # the other half of a line end may follow
            block = (block[:-1] if held else block).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
            end = b"\r" if held else b""
        else:
            end = b""
        cut = block.rfind(b"\n\n") + 2
        if cut == 1:
            cut = 0
        if cut == len(block) and not end:
            self._rest = b""
            return block
        self._rest = block[cut:] + end
        if len(self._rest) > EVENT_BYTES:
            raise garbage(f"an event of more than {EVENT_BYTES:,} bytes")
        return block[:cut]

    @property
    def rest(self) -> bytes:
        """What came after the last whole event."""
        return self._rest


def events(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Name (empty if it has none) and data of each event in a block of whole events; comments are left out.

    Raises UpstreamError (``garbage``) for a line that is no field of an event.
    """
    for event in block.split(b"\n\n"):
        name, data = b"", []
        for line in event.split(b"\n"):
            if not line or line[:1] == b":":
                continue
            field, _, value = line.partition(b":")
            value = value[1:] if value[:1] == b" " else value
            if field == b"data":
                data.append(value)
            elif field == b"event":
                name = value
            elif field not in (b"id", b"retry"):
                raise garbage("what is no event stream", line)
        if data:
            yield name, b"\n".join(data)


def event(value: Any) -> bytes:
    """A chunk as an event."""
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"
