"""`StreamsClient`: what every client of one loop does on the side of the event loop: streams, replies, pictures."""

import asyncio
import itertools
import logging
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from anabranch.errors import AnabranchError, BackendError, InputError
from anabranch.serving.core.client import EngineInfo, EngineStats, NotBegunError
from anabranch.serving.core.request import Finish, Output, Request
from anabranch.serving.core.stream import Stream
from anabranch.serving.engine.loop import PING
from anabranch.serving.engine.messages import (
    Abort,
    Add,
    Begun,
    Close,
    Closed,
    Command,
    Control,
    Event,
    Pause,
    Refused,
    Reply,
    Resume,
)

logger = logging.getLogger(__name__)

# Values of one histogram between two pictures.
KEPT_SAMPLES = 4096


class StreamsClient:
    """Base of clients whose loop is elsewhere. One says how commands get there (`_send`), and calls `_deliver` with what comes back.

    Args:
        max_restarts: how often `restart` may be called.
        watchdog_s: a loop that gives no sign of life for so long counts as dead; None waits for ever.
    """

    def __init__(self, max_restarts: int = 3, watchdog_s: float | None = None) -> None:
        self.max_restarts, self.restarts = max_restarts, 0
        self.watchdog_s = watchdog_s
        self._watchdog: asyncio.Task[None] | None = None
        # When the loop gave its last sign of life.
        self._heard = 0.0
        self.info: EngineInfo | None = None
        self._streams: dict[str, Stream] = {}
        self._replies: dict[int, asyncio.Future[Any]] = {}
        self._numbers = itertools.count()
        self._stats = EngineStats()
        self._closed: asyncio.Event | None = None
        self._is_open = False

    def _send(self, command: Command) -> None:
        raise NotImplementedError  # abstract

    async def start(self) -> EngineInfo:
        """Load and warm up. Raises AnabranchError if it cannot."""
        raise NotImplementedError  # abstract

    async def _ended(self) -> None:
        """Wait until nothing is left of a loop that was closed or has crashed."""
        raise NotImplementedError  # abstract

    def _abandon(self) -> None:
        """Have nothing more to do with a loop that does not move."""
        raise NotImplementedError  # abstract

    async def restart(self) -> EngineInfo:
        """Start anew after a crash. Raises BackendError when that has been done ``max_restarts`` times."""
        if self.restarts >= self.max_restarts:
            raise BackendError(f"the engine has crashed {self.restarts + 1} times; it is not started again")
        self.restarts += 1
        await self._ended()
        return await self.start()

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken."""
        return self._is_open

    def _opened(self, info: EngineInfo) -> EngineInfo:
        self.info, self._closed, self._is_open = info, asyncio.Event(), True
        if self.watchdog_s is not None:
            self._watchdog = asyncio.get_running_loop().create_task(self._watch(self.watchdog_s))
        return info

    async def _watch(self, patience_s: float) -> None:
        """Ask for signs of life; so many seconds after the last one the loop is given up. While this loop stood still, nobody was heard."""
        clock = asyncio.get_running_loop().time
        self._heard = clock()
        while self._is_open:
            asked = asyncio.ensure_future(self.control(PING))
            try:
                while not asked.done():
                    ends = self._heard + patience_s
                    await asyncio.wait([asked], timeout=ends - clock())
                    if self._forgives(clock() - ends, patience_s):
                        continue
                    if not asked.done() and clock() - self._heard >= patience_s:
                        if self._is_open:
                            self._give_up(f"the engine has made no progress for {patience_s:g} s")
                        return
                await asked
            except BackendError:
                return
            finally:
                asked.cancel()
                # Whatever becomes of it now: nobody asks.
                asked.add_done_callback(lambda future: future.cancelled() or future.exception())
            began = clock()
            await asyncio.sleep(patience_s / 4)
            self._forgives(clock() - began - patience_s / 4, patience_s)

    def _forgives(self, late_s: float, patience_s: float) -> bool:
        """Whether this loop looks so late that it stood still itself: whoever is asked has its whole time again."""
        if late_s <= patience_s / 4:
            return False
        self._heard = asyncio.get_running_loop().time()
        return True

    def _give_up(self, message: str) -> None:
        logger.error("%s; it is given up", message)
        self._abandon()
        self._lost(message, crashed=True)

    async def submit(self, request: Request) -> AsyncIterator[Output]:
        """Run one request, see `EngineClient`. It begins when the iterator is first asked."""
        if not self._is_open:
            raise NotBegunError("the engine is not ready")
        if request.id in self._streams:
            raise InputError(f"a request {request.id!r} is under way; ids must differ")
        stream = self._streams[request.id] = Stream(
            request.id,
            pause=lambda id: self._send(Pause(id)),
            resume=lambda id: self._send(Resume(id)),
            abort=lambda id: self._send(Abort(id)),
            buffer=request.buffer,
            stall_s=request.stall_s,
        )
        with stream:
            try:
                self._send(Add(request))
                while not stream.is_over:
                    yield await stream.take()
            finally:
                if self._streams.get(request.id) is stream:
                    del self._streams[request.id]

    async def abort(self, id: str) -> None:
        """End a request; its iterator gets `Finish.ABORT`."""
        if id in self._streams:
            self._send(Abort(id))

    def stats(self) -> EngineStats:
        """How it is; samples are those since the last call."""
        stats, self._stats = self._stats, replace(self._stats, samples={name: [] for name in self._stats.samples})
        stats.gauges["streams"] = len(self._streams)
        return stats

    async def control(self, name: str, **arguments: Any) -> Any:
        """Run a command of the engine's."""
        if not self._is_open:
            raise BackendError("the engine is not ready")
        number = next(self._numbers)
        future = self._replies[number] = asyncio.get_running_loop().create_future()
        self._send(Control(number, name, arguments))
        try:
            return await future
        finally:
            self._replies.pop(number, None)

    async def close(self, drain_s: float = 0.0) -> None:
        """Take no more requests, let those under way end for ``drain_s`` seconds, abort the rest; nothing is left of the loop then.

        A loop that has not ended ``watchdog_s`` seconds later is given up; so is one whose end nobody waits for any longer, where this is
        cancelled.
        """
        if self._watchdog is not None:
            self._watchdog.cancel()
        if self._closed is not None:
            self._is_open = False
            self._send(Close(drain_s))
            try:
                async with asyncio.timeout(None if self.watchdog_s is None else drain_s + self.watchdog_s):
                    await self._closed.wait()
            except TimeoutError:
                self._give_up("the engine did not end when it was closed")
            except asyncio.CancelledError:
                self._give_up("the engine did not end when it was closed")
                raise
        await self._ended()

    # What comes back; in the thread of the event loop

    def _deliver(self, events: Iterable[Event]) -> None:
        self._heard = asyncio.get_running_loop().time()
        for event in events:
            match event:
                case Output() | Refused():
                    self._push(event)
                case Begun(ids):
                    for id in ids:
                        if id in self._streams:
                            self._streams[id].has_begun = True
                case EngineStats():
                    self._note(event)
                case Reply(number, value, error):
                    future = self._replies.get(number)
                    if future is not None and not future.done():
                        future.set_exception(error) if error is not None else future.set_result(value)
                case Closed(error):
                    self._lost(error or "the engine is closed", crashed=error is not None)

    def _push(self, event: Output | Refused) -> None:
        stream = self._streams.get(event.id)
        if stream is None:
            return
        if isinstance(event, Refused):
            stream.refuse(event.reason)
        else:
            stream.push(event)

    def _note(self, stats: EngineStats) -> None:
        samples = self._stats.samples
        for name, values in stats.samples.items():
            samples[name] = (samples.get(name, []) + values)[-KEPT_SAMPLES:]
        self._stats = EngineStats(counters=stats.counters, gauges=stats.gauges, samples=samples)

    def _lost(self, reason: str, *, crashed: bool) -> None:
        """The loop is gone: nobody waits for it any longer."""
        self._is_open = False
        finish = Finish.ERROR if crashed else Finish.ABORT
        for id, stream in list(self._streams.items()):
            if stream.has_ended:
                continue
            if crashed and not stream.has_begun:
                stream.refuse(NotBegunError(reason))
            else:
                stream.push(Output(id=id, finish=finish, error=reason, engine_failed=crashed))
        for future in self._replies.values():
            if not future.done():
                future.set_exception(BackendError(reason))
        if self._closed is not None:
            self._closed.set()


def deliver_to(client: StreamsClient, loop: asyncio.AbstractEventLoop, events: list[Event]) -> None:
    """From another thread, hand events to a client whose event loop may be gone."""
    # Closed: nobody is there to read.
    with suppress(RuntimeError):
        loop.call_soon_threadsafe(client._deliver, events)


def as_error(error: BaseException) -> AnabranchError:
    """What a failed start tells: the error itself where a user caused it."""
    return error if isinstance(error, AnabranchError) else BackendError(f"the engine could not start: {error!r}")
