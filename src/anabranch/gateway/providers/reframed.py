"""Streams that are no server-sent events, made into such: everything behind a `Transport` reads one form.

Reframed(http, "application/x-ndjson", Lines)    lines of JSON -> events
"""

from collections.abc import Callable
from typing import Protocol

from anabranch.gateway.providers.provider import Headers, HttpCall, Reply, Transport, UpstreamError, excess
from anabranch.gateway.providers.sse import EVENT_BYTES


class Framer(Protocol):
    """Cuts the bytes of one stream into events."""

    def feed(self, data: bytes) -> bytes:
        """The events that are whole now, as server-sent events. Raises UpstreamError (``garbage``, ``excess``)."""

    def end(self) -> bytes:
        """What is left at the end of the connection. Raises UpstreamError if that is no whole event."""


class Lines:
    """Newline-delimited JSON."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> bytes:
        """One event for each line."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > EVENT_BYTES:
            raise excess(f"a line of more than {EVENT_BYTES:,} bytes")
        return b"".join(b"data: " + line.strip() + b"\n\n" for line in lines if line.strip())

    def end(self) -> bytes:
        """The last line may have no end."""
        rest, self._rest = self._rest.strip(), b""
        return b"data: " + rest + b"\n\n" if rest else b""


class Reframed:
    """A transport whose good answers of one media type come as server-sent events; all others are as they are.

    Args:
        http: what carries the calls.
        media_type: of the streams.
        framer: makes what cuts one stream.
    """

    def __init__(self, http: Transport, media_type: str, framer: Callable[[], Framer]) -> None:
        self._http, self._media_type, self._framer = http, media_type, framer

    async def open(self, call: HttpCall) -> Reply:
        """Send, and wait for status and headers. Raises UpstreamError."""
        reply = await self._http.open(call)
        media_type = reply.headers.get("content-type", "").partition(";")[0].strip().lower()
        if 200 <= reply.status < 300 and media_type == self._media_type:
            return _Events(reply, self._framer())
        return reply


class _Events:
    def __init__(self, reply: Reply, framer: Framer) -> None:
        self._reply, self._framer = reply, framer
        self._broken: UpstreamError | None = None
        self.status = reply.status
        self.headers: Headers = {
            **{name.lower(): value for name, value in reply.headers.items()},
            "content-type": "text/event-stream",
        }

    def read_ready(self) -> bytes:
        return self._fed(self._reply.read_ready())

    async def read_some(self) -> bytes:
        while True:
            # What is broken stays so, and nothing more is waited for.
            self._fed(b"")
            data = await self._reply.read_some()
            events = self._fed(data) if data else self._framer.end()
            if events or not data:
                return events

    def _fed(self, data: bytes) -> bytes:
        if self._broken is not None:
            raise self._broken
        try:
            return self._framer.feed(data) if data else b""
        except UpstreamError as error:
            self._broken = error
            raise

    def close(self) -> None:
        self._reply.close()
