"""`BodyBeside`: the rest of a large body, read from its socket in another thread.

To read ten megabytes as aiohttp does takes an event loop ten milliseconds: they come in hundreds of pieces, each of which is copied twice,
and reading is stopped and begun again as often. Here another thread takes them out of the socket, a megabyte at a time, and the loop hears
of each. What was read so does not go through the parser of the connection, which waits for it for ever: the connection is closed once the
request is answered (`TAKEN` is set on the request), and what else comes on it is passed over.
"""

import asyncio
import os
import select
import socket
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cache
from typing import Any

from aiohttp import web

__all__ = ["BESIDE_BYTES", "TAKEN", "BodyBeside"]

# From how many bytes on, that have not come yet, it is worth while.
BESIDE_BYTES = 1 << 20

# Key of a request whose connection is to be closed when it is answered.
TAKEN = web.RequestKey("TAKEN", bool)

# Bytes that are taken before the loop hears of it, and in one call; and milliseconds that the thread waits for more of them.
_STEP, _READ, _PATIENCE_MS = 1 << 20, 256 << 10, 2

# At once, of this process; each has a body for a turn.
NUM_THREADS = 8

# Seconds that one body takes a thread at a time, of which others need some too: a byte a millisecond would keep it for long.
_TURN_S = 0.05


class BodyBeside:
    """Of one request. A context manager: when it ends, the connection goes on to be read, so that it is known when its sender goes away.

    Args:
        request: whose body it is, of a length that its head tells, and not compressed.
        sock: a duplicate of its socket, which is closed at the end.
        left: bytes that have not come.
    """

    def __init__(self, request: web.BaseRequest, sock: socket.socket, left: int) -> None:
        self._request, self._sock, self._left = request, sock, left
        # Set where nobody waits for what comes.
        self._is_over = threading.Event()
        self._reading: Future[tuple[list[bytes], bool]] | None = None

    @classmethod
    def of(cls, request: web.BaseRequest) -> "tuple[BodyBeside | None, list[bytes]]":
        """One for a request, and what has come of its body so far; none where that is most of it, or its socket cannot be read."""
        length, transport, content = request.content_length, request.transport, request.content
        if length is None or transport is None or length - content.total_bytes <= BESIDE_BYTES:
            return None, []
        sock = transport.get_extra_info("socket")
        if sock is None or transport.get_extra_info("sslcontext") is not None:
            return None, []
        begun: list[bytes] = []
        # To the last byte that has come: none is left in the parser then.
        while part := content.read_nowait():
            begun.append(part)
        left = length - content.total_bytes
        if left <= BESIDE_BYTES:
            return None, begun
        try:
            twin = socket.socket(fileno=socket.dup(sock.fileno()))
        except OSError:
            # As many files are open as may be: it is read as any other.
            return None, begun
        twin.setblocking(False)
        return cls(request, twin, left), begun

    def __enter__(self) -> "BodyBeside":
        protocol: Any = self._request.protocol
        protocol.pause_reading()
        protocol.set_parser(_Passed())
        self._request[TAKEN] = True
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        if self._reading is None:
            self._sock.close()
        else:
            # The thread may have it yet, and have it when this loop has ended.
            self._reading.add_done_callback(lambda _: self._sock.close())
        if self._left:
            self._request.protocol.resume_reading(resume_parser=False)
        else:
            self._request.content.feed_eof()

    async def some(self) -> list[bytes]:
        """What comes next of the body; empty at its end. Raises ConnectionResetError where its sender goes away."""
        loop = asyncio.get_running_loop()
        while self._left:
            self._reading = _threads().submit(_taken, self._sock, min(self._left, _STEP), self._is_over)
            found, has_ended = await asyncio.shield(asyncio.wrap_future(self._reading))
            self._left -= sum(map(len, found))
            if self._left and has_ended:
                raise ConnectionResetError("the client went away in the middle of its body")
            if found:
                return found
            await self._readable(loop)
        return []

    async def _readable(self, loop: asyncio.AbstractEventLoop) -> None:
        ready = loop.create_future()
        number = self._sock.fileno()
        loop.add_reader(number, _set, ready)
        try:
            await ready
        finally:
            loop.remove_reader(number)


@cache
def _threads() -> ThreadPoolExecutor:
    """Of bodies alone: what others wait for in a thread, such as the names of hosts, does not wait behind them."""
    return ThreadPoolExecutor(NUM_THREADS, "anabranch-bodies")


if hasattr(os, "register_at_fork"):
    # A child has none of its parent's threads.
    os.register_at_fork(after_in_child=_threads.cache_clear)


def _set(ready: "asyncio.Future[None]") -> None:
    if not ready.done():
        ready.set_result(None)


def _taken(sock: socket.socket, most: int, is_over: threading.Event) -> tuple[list[bytes], bool]:
    """What comes of so many bytes without much waiting, in one turn, and whether no more will."""
    found: list[bytes] = []
    end = time.monotonic() + _TURN_S
    poll = select.poll()
    poll.register(sock, select.POLLIN)
    while most and time.monotonic() < end and not is_over.is_set():
        try:
            part = sock.recv(min(most, _READ))
        except BlockingIOError:
            if not poll.poll(_PATIENCE_MS):
                break
            continue
        except OSError:
            return found, True
        if not part:
            return found, True
        found.append(part)
        most -= len(part)
    return found, False


class _Passed:
    """In the place of a parser: nothing that comes is anything."""

    def feed_data(self, data: bytes) -> tuple[bool, bytes]:
        """Pass it over."""
        return False, b""

    def feed_eof(self) -> None:
        """It has ended."""
