"""`Text`: an answer as JSON, made in steps of some milliseconds, and `Sent`, which sends it part by part as it is read.

One call of `json.dumps` holds Python's lock to its end: 36 MB stop the event loop, and with it every other request, for most of a second.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from anabranch.graph.serve.answer_room import HeldAnswer
from anabranch.graph.serve.gate import Steps
from anabranch.web.json_text import to_json

JSON = "application/json"
SHORT = (",", ":")

# Bytes that are handed to a connection at a time; a transport keeps as many again.
PART = 64 << 10

# Values that are made into text by one call: with names of 4,096 characters some milliseconds.
AT_ONCE = 1024

# Bytes around results.
HEAD = 64

# By which a scope names the connection, as one of its extensions; others' servers have none.
CONNECTION = "anabranch.connection"


class Text:
    """An answer that is being made: the bytes of `to_json` with ``SHORT``.

    Args:
        held: counts it.

    Attributes:
        parts: of it, each but the last of `PART` bytes once `end` or `whole` was called.
        num_bytes: of all of it.
        num_rows: results in it.
    """

    def __init__(self, held: HeldAnswer) -> None:
        self.parts: deque[bytes] = deque()
        self.num_bytes = self.num_rows = 0
        self._held, self._last = held, bytearray()
        # What each result that comes is thought to take, the next one last; and all of them.
        self._row_bytes: list[int] = []
        self._expected = 0

    def expect(self, row_bytes: Sequence[int]) -> None:
        """Keep room for results of so many bytes each. Raises RequestError where there is none."""
        self._row_bytes, self._expected = [*reversed(row_bytes)], sum(row_bytes)
        self._held.reserve(self._expected + HEAD)

    def rows(self, rows: Iterable[dict[str, Any]]) -> Steps[None]:
        """Some more of ``results``, a step for each."""
        for row in rows:
            self._write(b"," if self.num_rows else b'{"results":[')
            self.num_rows += 1
            self._expected -= self._row_bytes.pop() if self._row_bytes else 0
            if max(map(_length, row.values()), default=0) <= AT_ONCE:
                self._write(to_json(row, SHORT))
                self._keep()
                yield
            else:
                yield from self._long(row)
                self._keep()

    def _keep(self) -> None:
        self._held.keep_reserved(self._expected + HEAD)

    def _long(self, row: dict[str, Any]) -> Steps[None]:
        """A result in slices of its lists."""
        sign = b"{"
        for name, value in row.items():
            self._write(sign + to_json(name) + b":")
            sign = b","
            if _length(value) <= AT_ONCE:
                self._write(to_json(value, SHORT))
                continue
            for first in range(0, len(value), AT_ONCE):
                self._write(b"," if first else b"[")
                self._write(to_json(value[first : first + AT_ONCE], SHORT)[1:-1])
                yield
            self._write(b"]")
        self._write(b"}")

    def end(self, **rest: Any) -> None:
        """What comes behind ``results``: at least one value."""
        head = b"]," if self.num_rows else b'{"results":[],'
        self._write(head + to_json(rest, SHORT)[1:])
        self._end()

    def whole(self, value: dict[str, Any]) -> None:
        """All of an answer without results."""
        self._write(to_json(value, SHORT))
        self._end()

    def _write(self, piece: bytes) -> None:
        self._held.more(len(piece))
        self.num_bytes += len(piece)
        self._last += piece
        while len(self._last) > PART:
            self.parts.append(bytes(self._last[:PART]))
            del self._last[:PART]

    def _end(self) -> None:
        self.parts.append(bytes(self._last))
        self._last.clear()


def _length(value: Any) -> int:
    return len(value) if isinstance(value, list) else 0


class Sent(Response):
    """Sends a text, each part once the one before was read but for what a transport keeps.

    Args:
        text: that is made.
        held: counts what of it is here, and is closed at the end.
    """

    def __init__(self, text: Text, held: HeldAnswer) -> None:
        super().__init__(headers={"content-length": str(text.num_bytes)}, media_type=JSON)
        self._parts, self._held = text.parts, held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See `Response`."""
        connection = (scope.get("extensions") or {}).get(CONNECTION)
        loop = asyncio.get_running_loop()

        def cut() -> None:
            loop.call_soon_threadsafe(self._cut, None if connection is None else connection.force_close)

        try:
            self._held.is_whole(cut)
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            while self._parts:
                part = self._parts.popleft()
                # The others are cleared where they are cut off.
                await send({"type": "http.response.body", "body": part, "more_body": bool(self._parts)})
                self._held.sent(len(part))
        finally:
            self._parts.clear()
            self._held.close()

    def _cut(self, force_close: Callable[[], None] | None) -> None:
        self._parts.clear()
        if force_close is not None:
            force_close()
