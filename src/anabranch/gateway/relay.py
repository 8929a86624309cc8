"""Streams on their way to the client, and the end of a request, whichever way it ends."""

from collections.abc import Callable
from typing import Any

from anabranch.gateway.providers.provider import UpstreamError


class Relay:
    """The bytes of a stream. Read it to the end, or close it: only then is the request over.

    Attributes:
        on_close: called once when nothing more will be read.

    Args:
        stream: of a dispatcher.
        on_end: called with the stream when it has ended, and with True too if its reader has gone before.
    """

    def __init__(self, stream: Any, on_end: Callable[..., None]) -> None:
        self._stream, self._on_end = stream, on_end
        self._events = aiter(stream)
        self.on_close: Callable[[], None] | None = None

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
            try:
                self._on_end(self._stream, True)
            finally:
                self._close()

    def _close(self) -> None:
        on_close, self.on_close = self.on_close, None
        if on_close is not None:
            on_close()


class Replayed:
    """A kept answer as a stream."""

    def __init__(self, chunks: list[bytes]) -> None:
        self._chunks = iter(chunks)
        self.on_close: Callable[[], None] | None = None

    def __aiter__(self) -> "Replayed":
        return self

    async def __anext__(self) -> bytes:
        try:
            return next(self._chunks)
        except StopIteration:
            raise StopAsyncIteration from None

    async def aclose(self) -> None:
        """Nobody reads on."""
        on_close, self.on_close = self.on_close, None
        if on_close is not None:
            on_close()
