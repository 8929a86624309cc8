"""`StreamsClient`: what every client of one loop does on the side of the event loop: streams, their buffers, replies, pictures."""

import asyncio
import itertools
import logging
from collections import deque
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any

from anabranch.errors import AnabranchError, BackendError, InputError
from anabranch.serving.core.client import EngineInfo, EngineStats
from anabranch.serving.core.request import Finish, Output, Request
from anabranch.serving.engine.messages import (
    Abort,
    Add,
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

BUFFER = 256  # outputs that wait for a reader before its request is paused; what was on its way then is put together
STALL_S = 30.0  # a reader that lets a full buffer stand for so long has its request ended
KEPT_SAMPLES = 4096  # values of one histogram between two pictures


def joined(first: Output, second: Output) -> Output:
    """Two outputs of one request as one."""
    return replace(
        second,
        tokens=first.tokens + second.tokens,
        logprobs=first.logprobs + second.logprobs,
        routing=first.routing + second.routing,
        prompt_logprobs=first.prompt_logprobs + second.prompt_logprobs,
        cached_tokens=second.cached_tokens if first.cached_tokens is None else first.cached_tokens,
        queue_s=second.queue_s if first.queue_s is None else first.queue_s,
    )


class _Stream:
    """Outputs of one request on their way to whoever reads them.

    Attributes:
        stall: set while the request is paused; ends it when the reader does not come.
    """

    def __init__(self) -> None:
        self.outputs: deque[Output | Refused] = deque()
        self.news = asyncio.Event()
        self.stall: asyncio.TimerHandle | None = None

    @property
    def is_full(self) -> bool:
        return len(self.outputs) >= BUFFER

    @property
    def is_drained(self) -> bool:
        return len(self.outputs) <= BUFFER // 2

    def push(self, output: Output | Refused) -> None:
        last = self.outputs[-1] if self.is_full else None
        if last is None or isinstance(last, Refused) or isinstance(output, Refused):
            self.outputs.append(output)
        else:
            self.outputs[-1] = joined(last, output)
        self.news.set()

    async def take(self) -> Output | Refused:
        while not self.outputs:
            self.news.clear()
            await self.news.wait()
        return self.outputs.popleft()

    def unstall(self) -> bool:
        """No longer paused; whether it was."""
        was, self.stall = self.stall, None
        if was is not None:
            was.cancel()
        return was is not None


class StreamsClient:
    """Base of clients whose loop is elsewhere. One says how commands get there (`_send`), and calls `_deliver` with what comes back.

    Args:
        max_restarts: how often `restart` may be called.
    """

    def __init__(self, max_restarts: int = 3) -> None:
        self.max_restarts, self.restarts = max_restarts, 0
        self.info: EngineInfo | None = None
        self._streams: dict[str, _Stream] = {}
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
        return info

    async def submit(self, request: Request) -> AsyncIterator[Output]:
        """Run one request, see `EngineClient`. It begins when the iterator is first asked."""
        if not self._is_open:
            yield Output(id=request.id, finish=Finish.ERROR, error="the engine is not ready")
            return
        if request.id in self._streams:
            raise InputError(f"a request {request.id!r} is under way; ids must differ")
        stream = self._streams[request.id] = _Stream()
        has_ended = False
        try:
            self._send(Add(request))
            while not has_ended:
                output = await stream.take()
                if stream.is_drained and stream.unstall():
                    self._send(Resume(request.id))
                if isinstance(output, Refused):
                    has_ended = True
                    raise InputError(output.error)
                has_ended = output.finish is not None
                yield output
        finally:
            stream.unstall()
            if self._streams.get(request.id) is stream:
                del self._streams[request.id]
            if not has_ended:
                self._send(Abort(request.id))

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
        """Take no more requests, let those under way end for ``drain_s`` seconds, abort the rest; nothing is left of the loop then."""
        if self._closed is not None:
            self._is_open = False
            self._send(Close(drain_s))
            await self._closed.wait()
        await self._ended()

    # What comes back; in the thread of the event loop

    def _deliver(self, events: Iterable[Event]) -> None:
        for event in events:
            match event:
                case Output() | Refused():
                    self._push(event)
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
        stream.push(event)
        if stream.is_full and stream.stall is None and isinstance(event, Output) and event.finish is None:
            stream.stall = asyncio.get_running_loop().call_later(STALL_S, self._give_up, event.id)
            self._send(Pause(event.id))

    def _give_up(self, id: str) -> None:
        logger.warning("request %s is ended: nobody has read its output for %g s", id, STALL_S)
        self._send(Abort(id))

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
            if not any(isinstance(output, Output) and output.finish is not None for output in stream.outputs):
                stream.push(Output(id=id, finish=finish, error=reason))
        for future in self._replies.values():
            if not future.done():
                future.set_exception(BackendError(reason))
        if self._closed is not None:
            self._closed.set()


def deliver_to(client: StreamsClient, loop: asyncio.AbstractEventLoop, events: list[Event]) -> None:
    """From another thread, hand events to a client whose event loop may be gone."""
    with suppress(RuntimeError):  # closed: nobody is there to read
        loop.call_soon_threadsafe(client._deliver, events)


def as_error(error: BaseException) -> AnabranchError:
    """What a failed start tells: the error itself where a user caused it."""
    return error if isinstance(error, AnabranchError) else BackendError(f"the engine could not start: {error!r}")
