"""Streams on their way to the client, and the end of a request, whichever way it ends.

A request is over when its stream was read to the end, or closed, or when whoever had it let go of it: also of one that was never read.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any

from anabranch.gateway.providers.provider import UpstreamError
from anabranch.web.api_error import ApiError
from anabranch.web.sse import read_data

Call = Callable[[], None]


class Relay:
    """The bytes of a stream. Read it to the end, or close it: only then is the request over.

    Attributes:
        on_close: called once when nothing more will be read.

    Args:
        stream: of a dispatcher.
        on_end: called with the stream when it has ended, and with True too if its reader has gone before.
    """

    _is_open = False

    def __init__(self, stream: Any, on_end: Callable[..., None]) -> None:
        self._stream, self._on_end = stream, on_end
        self._events = aiter(stream)
        self._loop, self._is_open = asyncio.get_running_loop(), True
        self.on_close: Call | None = None

    def __aiter__(self) -> "Relay":
        return self

    async def __anext__(self) -> bytes:
        try:
            return await anext(self._events)
        except (StopAsyncIteration, UpstreamError):
            try:
                self._on_end(self._stream)
            finally:
                self._close()
            raise StopAsyncIteration from None

    async def aclose(self) -> None:
        """Nobody reads on: the upstream is cancelled, and what it has given so far is paid for."""
        try:
            await self._stream.aclose()
        finally:
            self._leave()

    def _leave(self) -> None:
        try:
            self._on_end(self._stream, True)
        finally:
            self._close()

    def _close(self) -> None:
        self._is_open = False
        on_close, self.on_close = self.on_close, None
        if on_close is not None:
            on_close()

    def __del__(self) -> None:
        if self._is_open:
            _soon(self._loop, self._drop)

    def _drop(self) -> None:
        try:
            self._stream.drop()
        finally:
            self._leave()


class Replayed:
    """A kept answer as a stream."""

    def __init__(self, chunks: list[bytes]) -> None:
        self._chunks = iter(chunks)
        self._loop = asyncio.get_running_loop()
        self.on_close: Call | None = None

    def __aiter__(self) -> "Replayed":
        return self

    async def __anext__(self) -> bytes:
        try:
            return next(self._chunks)
        except StopIteration:
            self._close()
            raise StopAsyncIteration from None

    async def aclose(self) -> None:
        """Nobody reads on."""
        self._close()

    def _close(self) -> None:
        on_close, self.on_close = self.on_close, None
        if on_close is not None:
            on_close()

    def __del__(self) -> None:
        if self.on_close is not None:
            _soon(self._loop, self.on_close)


class Chunks:
    """The chunks of a stream as objects.

    Args:
        stream: of a `Reply`.
    """

    def __init__(self, stream: AsyncIterator[bytes]) -> None:
        self._stream, self._held = stream, b""
        self._ready: deque[dict[str, Any]] = deque()

    def __aiter__(self) -> "Chunks":
        return self

    async def __anext__(self) -> dict[str, Any]:
        """The next chunk. Raises ApiError for what breaks the stream off."""
        try:
            while not self._ready:
                events, mark, self._held = (self._held + await anext(self._stream)).rpartition(b"\n\n")
                self._ready.extend(read_data(events + mark))
            chunk = self._ready.popleft()
            if "error" in chunk:
                error = chunk["error"]
                raise ApiError(502, error.get("code"), str(error.get("message")), type=error.get("type"))
        except BaseException:
            await self.aclose()
            raise
        return chunk

    async def aclose(self) -> None:
        """Nobody reads on."""
        self._ready.clear()
        await self._stream.aclose()  # type: ignore[attr-defined]


def _soon(loop: asyncio.AbstractEventLoop, call: Call) -> None:
    """Call it in the loop, whichever thread collected what was let go of; nothing is left to be told where the loop has ended."""
    try:
        loop.call_soon_threadsafe(call)
    except RuntimeError:
        if not loop.is_closed():
            raise
