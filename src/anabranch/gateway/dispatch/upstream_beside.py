"""`UpstreamBeside`: calls over HTTP, those with a large body from an event loop of their own.

To write ten megabytes, over TLS to encrypt them too, takes the loop that does it ten milliseconds and more, in which it answers nobody. So
that is the business of another thread's. Its answers are read there too, which takes each piece of them a tenth of a millisecond more.
"""

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from functools import partial
from typing import Any, Generic, TypeVar

from anabranch.gateway.dispatch.upstream import Upstream
from anabranch.gateway.providers.provider import Headers, HttpCall, Reply

__all__ = ["BESIDE_BYTES", "UpstreamBeside"]

T = TypeVar("T")

# Bytes of a body from which on it is worth while.
BESIDE_BYTES = 1 << 20


class UpstreamBeside:
    """The transport over HTTP. Use within a running event loop; ``close`` ends its connections, and the other loop.

    Args:
        connections: most at once, to all hosts, of each of both loops; 0 for no limit.
    """

    def __init__(self, connections: int = 0) -> None:
        self._here, self._there = Upstream(connections), Upstream(connections)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def _started(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            # The standard library's: while it writes, others have Python's lock.
            self._loop = asyncio.SelectorEventLoop()
            self._thread = threading.Thread(target=_run, args=(self._loop,), name="anabranch-large-calls", daemon=True)
            self._thread.start()
        return self._loop

    async def open(self, call: HttpCall) -> Reply:
        """Send, and wait for status and headers. Raises UpstreamError."""
        if len(call.body) <= BESIDE_BYTES:
            return await self._here.open(call)
        loop = self._started()
        work = _Work(loop, self._there.open(call))
        try:
            return _ReplyBeside(await asyncio.shield(work.done), loop)
        except asyncio.CancelledError:
            work.cancel()
            work.done.add_done_callback(partial(_close_unread, loop))
            raise

    async def close(self) -> None:
        """End all connections."""
        await self._here.close()
        loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if loop is not None and thread is not None:
            await _Work(loop, self._there.close()).done
            loop.call_soon_threadsafe(loop.stop)
            await asyncio.to_thread(thread.join)


class _ReplyBeside:
    """An answer under way in another loop."""

    __slots__ = ("_loop", "_reading", "_reply", "headers", "status")

    def __init__(self, reply: Reply, loop: asyncio.AbstractEventLoop) -> None:
        self._reply, self._loop = reply, loop
        self._reading: _Work[bytes] | None = None
        self.status: int = reply.status
        self.headers: Headers = reply.headers

    def read_ready(self) -> bytes:
        """See `Reply`: nothing is known of the other loop."""
        return b""

    async def read_some(self) -> bytes:
        """What comes next; empty at the end. One that is cancelled leaves what it waits for to the next."""
        if self._reading is None:
            self._reading = _Work(self._loop, self._reply.read_some())
        done = self._reading.done
        try:
            return await asyncio.shield(done)
        finally:
            if done.done():
                self._reading = None

    def close(self) -> None:
        """Drop the connection if the end has not been reached."""
        with contextlib.suppress(RuntimeError):
            # Where the other loop has ended so have its connections.
            self._loop.call_soon_threadsafe(self._reply.close)


class _Work(Generic[T]):
    """What another loop does for the one that makes this.

    Attributes:
        done: of this loop, once the work is.

    Args:
        loop: the other one.
        work: is begun there.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T]) -> None:
        self._here, self._loop = asyncio.get_running_loop(), loop
        self.done: asyncio.Future[T] = self._here.create_future()
        # Perhaps nobody waits any more when it fails.
        self.done.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._task: asyncio.Task[T] | None = None
        loop.call_soon_threadsafe(self._begin, work)

    def cancel(self) -> None:
        """Have the work cancelled; `done` says when it has ended, and how."""
        self._loop.call_soon_threadsafe(self._cancel)

    # In the other loop

    def _begin(self, work: Coroutine[Any, Any, T]) -> None:
        self._task = self._loop.create_task(work)
        self._task.add_done_callback(self._ended)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _ended(self, task: "asyncio.Task[T]") -> None:
        with contextlib.suppress(RuntimeError):
            # Where this loop has ended nobody waits.
            self._here.call_soon_threadsafe(self._tell, task)

    # Here

    def _tell(self, task: "asyncio.Task[T]") -> None:
        if task.cancelled():
            self.done.cancel()
        elif (error := task.exception()) is not None:
            self.done.set_exception(error)
        else:
            self.done.set_result(task.result())


def _close_unread(loop: asyncio.AbstractEventLoop, done: "asyncio.Future[Reply]") -> None:
    """An answer that came when nobody waited for it any more."""
    if not done.cancelled() and done.exception() is None:
        loop.call_soon_threadsafe(done.result().close)


def _run(loop: asyncio.AbstractEventLoop) -> None:
    """A loop until it is stopped, and the end of what it does."""
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
    finally:
        loop.close()
