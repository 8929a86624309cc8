"""`LocalEngine`: an engine in a thread of this process; for tests, embedding, and where a process of its own is not wanted."""

import asyncio
import contextlib
import functools
import threading
from collections.abc import Callable

from anabranch.errors import BackendError
from anabranch.serving.core.client import EngineInfo
from anabranch.serving.engine.at_exit import end_before_exit, interrupt
from anabranch.serving.engine.engine import Engine
from anabranch.serving.engine.loop import EngineLoop
from anabranch.serving.engine.messages import Close, Command
from anabranch.serving.engine.streams import StreamsClient, as_error, deliver_to


class LocalEngine(StreamsClient):
    """An `EngineClient` for the event loop that starts it.

    Args:
        make: makes the engine, in its thread.
        max_restarts, watchdog_s: see `StreamsClient`. A thread cannot be ended: one that is given up is left where it hangs.
    """

    def __init__(self, make: Callable[[], Engine], *, max_restarts: int = 3, watchdog_s: float | None = None) -> None:
        super().__init__(max_restarts, watchdog_s)
        self._make = make
        self._loop: EngineLoop | None = None
        self._thread: threading.Thread | None = None

    async def start(self) -> EngineInfo:
        """Load and warm up. Raises AnabranchError if it cannot."""
        loop = asyncio.get_running_loop()
        started: asyncio.Future[EngineInfo] = loop.create_future()
        thread = threading.Thread(target=self._run, args=(loop, started), name="anabranch-engine", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise BackendError(f"the engine's thread cannot be started: {error}") from error
        self._thread = thread
        end_before_exit(thread, functools.partial(self._end, thread))
        try:
            return self._opened(await started)
        except asyncio.CancelledError:
            # What is being loaded cannot be stopped, but ends with that.
            self._abandon()
            if self._loop is not None:
                self._loop.put(Close())
            raise

    def _run(self, loop: asyncio.AbstractEventLoop, started: "asyncio.Future[EngineInfo]") -> None:
        try:
            engine = self._make()
            engine.warm_up()
        except BaseException as error:
            _tell(loop, started, None, as_error(error))
            return
        self._loop = engine.loop(functools.partial(deliver_to, self, loop))
        if started.cancelled():
            self._loop.put(Close())
        _tell(loop, started, engine.info, None)
        self._loop.run()

    def _send(self, command: Command) -> None:
        assert self._loop is not None
        self._loop.put(command)

    def _end(self, thread: threading.Thread) -> None:
        """With the interpreter: after the step under way, or wherever loading is."""
        if self._loop is None:
            interrupt(thread)
        else:
            self._loop.put(Close())

    def _abandon(self) -> None:
        self._thread = None

    async def _ended(self) -> None:
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join)


def _tell(
    loop: asyncio.AbstractEventLoop,
    future: "asyncio.Future[EngineInfo]",
    info: EngineInfo | None,
    error: Exception | None,
) -> None:
    # Closed: nobody waits.
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(_settle, future, info, error)


def _settle(future: "asyncio.Future[EngineInfo]", info: EngineInfo | None, error: Exception | None) -> None:
    # Whoever waited has been cancelled.
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    elif info is not None:
        future.set_result(info)
