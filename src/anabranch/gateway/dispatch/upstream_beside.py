"""`UpstreamBeside`: calls over HTTP, those with a large body from an event loop of their own.

To write ten megabytes, over TLS to encrypt them too, takes the loop that does it ten milliseconds and more, in which it answers nobody. So
that is the business of another thread's. Its answers are read there too, which takes each piece of them a tenth of a millisecond more.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Generic, Literal, TypeVar

from anabranch.gateway.dispatch.upstream import Upstream
from anabranch.gateway.providers.provider import Failure, Headers, HttpCall, Reply, UpstreamError
from anabranch.web.turns import in_thread

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
        self._loop: _Loop | None = None

    def _started(self) -> "_Loop":
        if self._loop is None:
            self._loop = _Loop()
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
        loop, self._loop = self._loop, None
        if loop is not None:
            await _Work(loop, self._there.close()).done
            await in_thread(loop.end)


class _Loop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        # The standard library's: while it writes, others have Python's lock.
        self._loop = asyncio.SelectorEventLoop()
        self._lock, self._is_over = threading.Lock(), False
        self._thread = threading.Thread(target=self._run, name="anabranch-large-calls", daemon=True)
        self._thread.start()

    def post(self, work: Callable[[], object]) -> bool:
        """Have it done there, if it still runs."""
        with self._lock:
            if not self._is_over:
                self._loop.call_soon_threadsafe(work)
            return not self._is_over

    def end(self) -> None:
        """Wait for the end of what it does, which is cancelled."""
        self.post(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        loop = self._loop
        asyncio.set_event_loop(loop)
        try:
            loop.run_forever()
            with self._lock:
                self._is_over = True
            # What was posted before that begins.
            loop.run_until_complete(asyncio.sleep(0))
            while left := asyncio.all_tasks(loop):
                for task in left:
                    task.cancel()
                loop.run_until_complete(asyncio.gather(*left, return_exceptions=True))
        finally:
            loop.close()


class _ReplyBeside:
    """An answer under way in another loop."""

    __slots__ = ("_held", "_loop", "_reading", "_reply", "headers", "status")

    def __init__(self, reply: Reply, loop: _Loop) -> None:
        self._reply, self._loop, self._held = reply, loop, b""
        self._reading: _Work[bytes] | None = None
        self.status: int = reply.status
        self.headers: Headers = reply.headers

    def read_ready(self) -> bytes:
        """See `Reply`: nothing is known of the other loop. What `read_some` gives is all that lay there."""
        return b""

    async def read_some(self) -> bytes:
        """What comes next; empty at the end. One that is cancelled leaves what it waits for to the next."""
        if self._reading is not None and self._reading.done.done():
            # It came when nobody waited, perhaps long ago: what came since goes with it.
            early = await self._read()
            if not early and not self._held:
                return b""
            self._held += early
        if self._held and self._reading is None:
            self._reading = _Work(self._loop, _at_hand(self._reply))
        try:
            data = await self._read()
        except UpstreamError:
            if not self._held:
                raise
            # The next one meets the same.
            data = b""
        data, self._held = self._held + data, b""
        return data

    async def _read(self) -> bytes:
        if self._reading is None:
            self._reading = _Work(self._loop, self._reply.read_some())
        done = self._reading.done
        # Whoever is cancelled, in the very moment of its end too, leaves it.
        await asyncio.wait((done,))
        self._reading = None
        return done.result()

    def close(self) -> None:
        """Drop the connection if the end has not been reached."""
        # Where the other loop has ended so have its connections.
        self._loop.post(self._reply.close)


async def _at_hand(reply: Reply) -> bytes:
    """What has come, without waiting."""
    try:
        return reply.read_ready()
    except UpstreamError:
        # Whoever reads on meets it.
        return b""


class _Work(Generic[T]):
    """What another loop does for the one that makes this.

    Attributes:
        done: of this loop, once the work is; UpstreamError where the other loop has ended.

    Args:
        loop: the other one.
        work: is begun there.
    """

    def __init__(self, loop: _Loop, work: Coroutine[Any, Any, T]) -> None:
        self._here, self._loop = asyncio.get_running_loop(), loop
        self.done: asyncio.Future[T] = self._here.create_future()
        # Perhaps nobody waits any more when it fails.
        self.done.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._task: asyncio.Task[T] | None = None
        self._is_given_up = False
        if not loop.post(partial(self._begin, work)):
            work.close()
            self.done.set_exception(_closed("connect"))

    def cancel(self) -> None:
        """Have the work cancelled; `done` says when it has ended, and how."""
        self._is_given_up = True
        self._loop.post(self._cancel)

    # In the other loop

    def _begin(self, work: Coroutine[Any, Any, T]) -> None:
        self._task = asyncio.get_running_loop().create_task(work)
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
        if task.cancelled() and self._is_given_up:
            self.done.cancel()
        elif task.cancelled():
            self.done.set_exception(_closed("cut"))
        elif (error := task.exception()) is not None:
            self.done.set_exception(error)
        else:
            self.done.set_result(task.result())


def _closed(kind: Literal["connect", "cut"]) -> UpstreamError:
    return UpstreamError(Failure(kind=kind, message="the connections for large calls are closed"))


def _close_unread(loop: _Loop, done: "asyncio.Future[Reply]") -> None:
    """An answer that came when nobody waited for it any more."""
    if not done.cancelled() and done.exception() is None:
        loop.post(done.result().close)
