"""Server-sent events of upstreams: whole events out of bytes that are cut anywhere, which are not trusted.

`anabranch.web.sse` writes events; it reads none but ours, and knows nothing of upstreams.
"""

import re
from collections.abc import Iterator

from anabranch.gateway.providers.provider import excess, garbage

# Most bytes of one event.
EVENT_BYTES = 8 << 20
DONE_DATA = b"[DONE]"

# A stream may begin with one.
BOM = b"\xef\xbb\xbf"

# Fields that nobody knows are passed over, as the standard has it; what is no name, such as the beginning of a page, is no field.
_FIELD = re.compile(rb"[A-Za-z][A-Za-z0-9_-]{0,63}")


class Splitter:
    """Collects bytes and gives out whole events, with ``\\n`` as the only line end."""

    __slots__ = ("_ends_in_cr", "_has_begun", "_rest")

    def __init__(self) -> None:
        self._rest = b""
        # A line feed that comes next is the other half of a line end.
        self._ends_in_cr = self._has_begun = False

    def feed(self, data: bytes) -> bytes:
        """All events that are whole now; what follows them is kept. Raises UpstreamError (``excess``) for an endless event."""
        if self._ends_in_cr and data:
            data, self._ends_in_cr = data.removeprefix(b"\n"), False
        if b"\r" in data:
            self._ends_in_cr = data.endswith(b"\r")
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        block = self._rest + data if self._rest else data
        if not self._has_begun:
            if block != BOM and BOM.startswith(block):
                self._rest = block
                return b""
            self._has_begun, block = True, block.removeprefix(BOM)
        end = block.rfind(b"\n\n")
        cut = end + 2 if end >= 0 else 0
        if cut == len(block):
            self._rest = b""
            return block
        self._rest = block[cut:]
        if len(self._rest) > EVENT_BYTES:
            raise excess(f"an event of more than {EVENT_BYTES:,} bytes")
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
            field, colon, value = line.partition(b":")
            value = value[1:] if value[:1] == b" " else value
            if field == b"data":
                data.append(value)
            elif field == b"event":
                name = value
            elif field not in (b"id", b"retry") and not (colon and _FIELD.fullmatch(field)):
                raise garbage("what is no event stream", line)
        # One without data is none.
        if joined := b"\n".join(data):
            yield name, joined
