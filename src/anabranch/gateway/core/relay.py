"""Streams on their way to the client, and the end of a request, whichever way it ends.

A request is over when its stream was read to the end, or closed, or when whoever had it let go of it: also of one that was never read.
"""

import asyncio
import contextlib
import json
import weakref
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from anabranch.gateway.cache import ToldChunks
from anabranch.gateway.providers.chunks import as_chunks
from anabranch.gateway.providers.provider import UpstreamError
from anabranch.web.api_error import ApiError
from anabranch.web.large_json import is_long_to_read, load_large
from anabranch.web.sse import DONE, HEARTBEAT, event, event_slices, read_data

Call = Callable[[], None]

# How long, in all, a reader may have those wait who want the same answer.
PATIENCE_S = 1.0

# Bytes of a stream that are held for a reader who is slower than those who wait for the same.
READ_AHEAD = 8 << 20

# Likewise of all streams.
READ_AHEAD_IN_ALL = 128 << 20


class Ahead:
    """What all streams of a gateway hold for slow readers.

    Attributes:
        size: bytes.
    """

    __slots__ = ("size",)

    def __init__(self) -> None:
        self.size = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sharing:
    """Who else wants what a stream says.

    Attributes:
        to_the_end: it is read to its end in any case, whether or not its reader stays.
        is_awaited: whether somebody waits for it now.
        release: called if they have to do without it, since it is too long to be read ahead of its reader.
        keep: sees to it that a task ends before the gateway does.
        ahead: what is held in all; None where this is the only stream.
    """

    to_the_end: bool
    is_awaited: Callable[[], bool]
    release: Call
    keep: Callable[["asyncio.Task[Any]"], None]
    ahead: Ahead | None = None


class Relay:
    """The bytes of a stream. Read it to the end, or close it: only then is the request over.

    Where others want what it says too, no reader holds them up: once its reader has had it wait for `PATIENCE_S` in all, the rest is
    read in a task of its own, up to `READ_AHEAD` bytes ahead of the reader; then the request is over when that has come to the end. While
    nobody waits, and where all streams hold `READ_AHEAD_IN_ALL`, it is read as its reader asks for it.

    Attributes:
        on_close: called once when nothing more will be read.

    Args:
        stream: of a dispatcher.
        on_end: called with the stream when it has ended, and with True too if its reader has gone before.
        sharing: None where nobody else wants it.
        prepare: awaited with the stream when all of it has come, before ``on_end``: what would hold up the event loop there is done
            elsewhere, to its end, whoever goes away meanwhile. None for nothing.
        keep: sees to it that the task in which that is done ends before the gateway does; None where nobody does.
    """

    _is_open = False

    def __init__(
        self,
        stream: Any,
        on_end: Callable[..., None],
        sharing: Sharing | None = None,
        prepare: Callable[[Any], Awaitable[None]] | None = None,
        keep: Callable[["asyncio.Task[Any]"], None] | None = None,
    ) -> None:
        self._stream, self._on_end, self._sharing, self._prepare = stream, on_end, sharing, prepare
        self._keep = keep
        # That all of it has come is being told.
        self._concluding: asyncio.Task[None] | None = None
        self._events = aiter(stream)
        self._loop, self._is_open = asyncio.get_running_loop(), True
        self.on_close: Call | None = None
        # What was read ahead, and by whom; None as long as it is read as its reader asks for it.
        self._ahead: deque[bytes] = deque()
        self._size = 0
        self._all = Ahead() if sharing is None or sharing.ahead is None else sharing.ahead
        self._task: asyncio.Task[None] | None = None
        self._turn = asyncio.Event()
        self._is_left = False
        # Since when the reader has had it wait, and how long before.
        self._handed_s: float | None = self._loop.time()
        self._waited_s = 0.0
        if sharing is not None and sharing.to_the_end:
            self._read_on()
        elif sharing is not None:
            _watch(weakref.ref(self), self._loop)

    def __aiter__(self) -> "Relay":
        return self

    async def __anext__(self) -> bytes:
        if self._handed_s is not None:
            self._waited_s += self._loop.time() - self._handed_s
            self._handed_s = None
        if self._task is not None:
            return await self._next_of_ahead()
        try:
            piece: bytes = await anext(self._events)
        except StopAsyncIteration:
            await self._conclude(self._end)
            raise StopAsyncIteration from None
        except UpstreamError:
            self._end()
            raise StopAsyncIteration from None
        self._handed_s = self._loop.time()
        return piece

    async def _conclude(self, end: Call) -> None:
        """All of it has come: that it is whole stays so, and is told once it has been put together, whoever goes away meanwhile."""
        prepare = self._prepare
        if prepare is None:
            end()
            return

        async def work() -> None:
            try:
                await prepare(self._stream)
            finally:
                end()

        self._concluding = task = self._loop.create_task(work())
        # Perhaps nobody waits any more when it fails. One that is cancelled may not even have begun.
        task.add_done_callback(lambda done: end() if done.cancelled() else done.exception())
        if self._keep is not None:
            self._keep(task)
        await asyncio.shield(task)

    @property
    def _is_being_concluded(self) -> bool:
        """Also by one that was cancelled, until that is told: all of it has come."""
        task = self._concluding
        return task is not None and (not task.done() or task.cancelled())

    def _end(self) -> None:
        try:
            self._on_end(self._stream)
        finally:
            self._close()

    async def aclose(self) -> None:
        """Nobody reads on: the upstream is cancelled, and what it has given so far is paid for; unless others want the rest."""
        task, sharing = self._task, self._sharing
        if self._is_being_concluded:
            # The rest is done without its reader.
            self._is_left = True
            self._forget()
            return
        if task is not None and sharing is not None and not task.done():
            self._is_left = True
            self._forget()
            self._turn.set()
            if sharing.to_the_end or sharing.is_awaited():
                return
            task.cancel()
            await asyncio.wait((task,))
        try:
            await self._stream.aclose()
        finally:
            self._leave()

    # Ahead of the reader

    def _look(self) -> bool:
        """Whether to look again later: begins to read ahead if the reader has had others wait for too long."""
        if not self._is_open or self._task is not None:
            return False
        waiting_s = 0.0 if self._handed_s is None else self._loop.time() - self._handed_s
        is_awaited = self._sharing is not None and self._sharing.is_awaited()
        # While the reader asks, something else reads already.
        if is_awaited and self._handed_s is not None and self._waited_s + waiting_s > PATIENCE_S:
            self._read_on()
        return self._task is None

    def _read_on(self) -> None:
        assert self._sharing is not None
        self._task = self._loop.create_task(self._pump(self._sharing))
        self._task.add_done_callback(self._pumped)
        self._sharing.keep(self._task)

    def _pumped(self, task: "asyncio.Task[None]") -> None:
        # Its reader raises it; if there is none, nobody minds.
        if not task.cancelled():
            task.exception()
        self._turn.set()
        if self._is_left:
            self._leave()

    async def _pump(self, sharing: Sharing) -> None:
        try:
            async for piece in self._events:
                if self._is_left or (piece is HEARTBEAT and self._ahead):
                    continue
                self._ahead.append(piece)
                self._size += len(piece)
                self._all.size += len(piece)
                self._turn.set()
                await self._held_up(sharing)
            await self._conclude(lambda: self._on_end(self._stream))
        except UpstreamError:
            self._on_end(self._stream)
        except BaseException:
            if self._is_being_concluded:
                # A gateway that stops cancels that too, whichever first.
                self._on_end(self._stream)
                raise
            await self._stream.aclose()
            self._on_end(self._stream, True)
            raise

    async def _held_up(self, sharing: Sharing) -> None:
        """Wait while no more is to be read ahead."""
        while self._ahead and not self._is_left:
            is_full = self._size > READ_AHEAD or self._all.size > READ_AHEAD_IN_ALL
            if is_full:
                sharing.release()
            elif sharing.to_the_end or sharing.is_awaited():
                return
            self._turn.clear()
            # Somebody may come to wait for it, whom nothing else tells of.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(PATIENCE_S / 4):
                    await self._turn.wait()

    def _forget(self) -> None:
        self._all.size -= self._size
        self._size = 0
        self._ahead.clear()

    async def _next_of_ahead(self) -> bytes:
        task = self._task
        assert task is not None
        while not self._ahead:
            if task.done():
                self._close()
                # Raises what it broke at.
                task.result()
                raise StopAsyncIteration
            self._turn.clear()
            await self._turn.wait()
        piece = self._ahead.popleft()
        self._size -= len(piece)
        self._all.size -= len(piece)
        self._turn.set()
        return piece

    # The end

    def _leave(self) -> None:
        try:
            self._on_end(self._stream, True)
        finally:
            self._close()

    def _close(self) -> None:
        self._is_open = False
        self._forget()
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


def _watch(relay: "weakref.ref[Relay]", loop: asyncio.AbstractEventLoop) -> None:
    """Look at a stream every now and then, without holding on to it."""
    found = relay()
    if found is not None and found._look():
        loop.call_later(PATIENCE_S / 4, _watch, relay, loop)


class Replayed:
    """A kept answer as a stream."""

    @staticmethod
    def chunks_of(answer: bytes, endpoint: str, with_usage: bool) -> list[bytes]:
        """What is told of a whole answer as it is kept; of a long one in steps, for another thread."""
        if not is_long_to_read([answer]):
            return [*(event(chunk) for chunk in as_chunks(json.loads(answer), endpoint, with_usage)), DONE]
        chunks = as_chunks(load_large(answer), endpoint, with_usage)
        return [*(b"".join(event_slices(chunk)) for chunk in chunks), DONE]

    def __init__(self, told: ToldChunks) -> None:
        self._told: ToldChunks | None = told
        self._chunks = iter(told.chunks)
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
        self._told, self._chunks = None, iter(())
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
            if chunk.get("error"):
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
