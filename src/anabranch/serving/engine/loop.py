"""`EngineLoop`: schedule, run, update, until told to end; the only place where a scheduler and a runner meet."""

import logging
import queue
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from anabranch.errors import AnabranchError, InputError
from anabranch.serving.core.batch import Batch, Sampled
from anabranch.serving.core.client import BusyError, EngineStats, FieldInputError
from anabranch.serving.core.request import Finish, Output, Request
from anabranch.serving.core.scheduler import TURN
from anabranch.serving.engine.messages import (
    Abort,
    Add,
    Answered,
    Begun,
    Close,
    Closed,
    Command,
    Control,
    Event,
    Pause,
    Prepared,
    Refused,
    Reply,
    Resume,
    Turned,
)

logger = logging.getLogger(__name__)

# Steps under way with asynchronous scheduling: one runs, one waits for it.
DEPTH = 2

# Least time between two pictures of the engine.
PICTURE_S = 0.2

# The control that asks for a sign of life.
PING = "ping"

# How long to wait for news where there is work that cannot go on.
IDLE_S = 0.002


class Scheduling(Protocol):
    """What the loop needs of `anabranch.serving.core.scheduler.Scheduler`."""

    def add(self, request: Request) -> object: ...  # noqa: D102
    def abort(self, id: str) -> Output | None: ...  # noqa: D102
    def pause(self, id: str, why: str = ...) -> None: ...  # noqa: D102
    def resume(self, id: str) -> None: ...  # noqa: D102
    def go_on(self, id: str, request: Request | None) -> None: ...  # noqa: D102
    def schedule(self) -> Batch | None: ...  # noqa: D102
    def update(self, batch: Batch, sampled: Sequence[Sampled]) -> list[Output]: ...  # noqa: D102
    def stats(self) -> EngineStats: ...  # noqa: D102
    @property
    def has_work(self) -> bool: ...  # noqa: D102


class Running(Protocol):
    """What the loop needs of a `ModelRunner`."""

    def run(self, batch: Batch) -> list[Sampled]: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


class EngineLoop:
    """Runs requests on one scheduler and one runner.

    Commands come from any thread through `put`; events go out through ``emit``, those of a step together, from the thread that calls
    `run`. An exception of the scheduler or the runner ends the loop, and every request under way gets `Finish.ERROR`.

    Args:
        scheduler: what to run next.
        runner: runs it.
        emit: takes events.
        is_async: the model runs in a thread of its own, and the next step is scheduled while it does.
        check: raises InputError for a request that this engine can never run, beyond what the scheduler checks.
        prepare: begins, in another thread, what a request needs before it can run, such as a grammar that is compiled; None for nothing.
            What its future gives is held while the request is under way.
        bind: the request as the scheduler and the runner get it, once it is prepared; None for as it came.
        release: told the id of each request that was begun by ``prepare`` and has ended.
        turn: told what is new of each request; where it gives a future the request waits for that, which says what it is from then on
            (`Scheduler.go_on`).
        controls: functions by name, called in the loop's thread between steps. One that gives a future is answered when that is done.
        sources: each gives counters, gauges and samples that are added to a picture.
    """

    def __init__(
        self,
        scheduler: Scheduling,
        runner: Running,
        emit: Callable[[list[Event]], None],
        *,
        is_async: bool = False,
        check: Callable[[Request], None] | None = None,
        prepare: Callable[[Request], Future[Any] | None] | None = None,
        bind: Callable[[Request], Request] | None = None,
        release: Callable[[str], None] | None = None,
        turn: Callable[[Output], Future[Any] | None] | None = None,
        controls: Mapping[str, Callable[..., Any]] | None = None,
        sources: Sequence[Callable[[], EngineStats]] = (),
    ) -> None:
        self.scheduler, self.runner = scheduler, runner
        self._emit, self._check, self._prepare = emit, check, prepare
        self._bind, self._release, self._turn_of = bind, release, turn
        self._controls, self._sources = dict(controls or {}), tuple(sources)
        self._inbox: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._live: set[str] = set()
        # Live, but not yet the scheduler's; and whether that was told.
        self._preparing: dict[str, tuple[Request, Future[Any], bool]] = {}
        # What those wait for that are in the midst of their text.
        self._turning: dict[str, Future[Any]] = {}
        # What was prepared for those under way.
        self._held: dict[str, Any] = {}
        self._flight: deque[tuple[Batch, Future[tuple[list[Sampled], float]]]] = deque()
        self._worker = ThreadPoolExecutor(1, "anabranch-model") if is_async else None
        self._closing_at: float | None = None
        # Why nothing runs any more; None while it does.
        self._ended: str | None = None
        self._is_idle_told = False
        self._picture_at = 0.0
        self._step_times: list[float] = []

    def put(self, command: Command) -> None:
        """Tell the loop something, from any thread."""
        self._inbox.put(command)

    def run(self, *, until_idle: bool = False) -> None:
        """Work until closed, or with ``until_idle`` until there is nothing left to do (raises what the runner raised).

        An engine that has ended stays so: ``until_idle`` then raises AnabranchError with the reason, and else nothing happens.
        """
        if self._ended is not None:
            if until_idle:
                raise AnabranchError(f"the engine has ended: {self._ended}; make a new one")
            return
        try:
            while not self._is_over():
                if until_idle and not self._live and self._inbox.empty():
                    return
                self._turn()
        except BaseException as error:
            self._fail(error)
            if until_idle or not isinstance(error, Exception):
                raise
            return
        self._end(None)

    def _turn(self) -> None:
        self._take_commands()
        if self._worker is None:
            batch = self._schedule_step()
            if batch is None:
                return self._rest()
            return self._finish(batch, *self._timed(batch))
        while len(self._flight) < DEPTH and (batch := self._schedule_step()) is not None:
            self._flight.append((batch, self._worker.submit(self._timed, batch)))
        if not self._flight:
            return self._rest()
        batch, future = self._flight.popleft()
        return self._finish(batch, *future.result())

    def _schedule_step(self) -> Batch | None:
        batch = self.scheduler.schedule()
        if batch is not None and batch.new:
            # Before it runs: whatever becomes of it, the others have had no part in it.
            self._emit([Begun(tuple(request.id for request in batch.new))])
        return batch

    def _timed(self, batch: Batch) -> tuple[list[Sampled], float]:
        start = time.perf_counter()
        return self.runner.run(batch), time.perf_counter() - start

    def _finish(self, batch: Batch, sampled: list[Sampled], seconds: float) -> None:
        outputs = self.scheduler.update(batch, sampled)
        self._step_times.append(seconds)
        self._is_idle_told = False
        for output in outputs:
            self._note(output)
        events: list[Event] = [*outputs]
        if not self._live or time.monotonic() - self._picture_at > PICTURE_S:
            # After the last request's end at once: its tokens are counted where it is seen to end.
            events.append(self._picture())
        if events:
            self._emit(events)

    def _note(self, output: Output) -> None:
        """Something is new of a request: it may have ended, or have to wait."""
        future = None if self._turn_of is None else self._turn_of(output)
        if output.finish is not None:
            self._forget(output.id)
        elif future is not None:
            self.scheduler.pause(output.id, TURN)
            waits, id = future, output.id
            self._turning[id] = waits
            waits.add_done_callback(lambda _: self.put(Turned(id, waits)))

    def _rest(self) -> None:
        """Nothing can run: say how the engine is, and wait for a command."""
        if not self._is_idle_told:
            self._is_idle_told = True
            self._emit([self._picture()])
        if self.scheduler.has_work or self._live:
            self._take_commands(IDLE_S)

    # Commands

    def _take_commands(self, wait_s: float | None = None) -> None:
        """Obey what has come; with nothing to do wait for it, as long as need be."""
        if (
            wait_s is None
            and not self._live
            and not self._flight
            and not self.scheduler.has_work
            and self._is_idle_told
        ):
            timeout = None if self._closing_at is None else 0.0
        else:
            timeout = wait_s or 0.0
        try:
            self._obey(self._inbox.get(timeout is None or timeout > 0, timeout))
            while True:
                self._obey(self._inbox.get_nowait())
        except queue.Empty:
            pass
        if self._closing_at is not None and time.monotonic() >= self._closing_at:
            for id in sorted(self._live):
                self._abort(id)

    def _obey(self, command: Command) -> None:
        match command:
            case Add(request):
                self._add(request)
            case Prepared(id):
                self._prepared(id)
            case Abort(id):
                self._abort(id)
            case Pause(id):
                self.scheduler.pause(id)
            case Resume(id):
                self.scheduler.resume(id)
            case Turned(id, future):
                self._turned(id, future)
            case Control():
                self._control(command)
            case Answered(number, future):
                self._emit([_reply(number, future)])
                self._is_idle_told = False
            case Close(drain_s):
                self._closing_at = time.monotonic() + drain_s

    def _add(self, request: Request) -> None:
        if self._closing_at is not None:
            self._emit([Output(id=request.id, finish=Finish.ABORT, error="the engine takes no more requests")])
            return
        try:
            if request.id in self._live:
                raise InputError(f"a request {request.id!r} is under way; ids must differ")
            if self._check is not None:
                self._check(request)
            future = None if self._prepare is None else self._prepare(request)
        except Exception as error:
            self._refuse(request, error)
            return
        if future is None:
            self._schedule(request)
            return
        self._live.add(request.id)
        is_told = not future.done()
        if is_told:
            self._emit([Output(id=request.id, is_prepared=False)])
        self._preparing[request.id] = request, future, is_told
        future.add_done_callback(lambda _: self.put(Prepared(request.id)))

    def _prepared(self, id: str) -> None:
        request, future, is_told = self._preparing.get(id, (None, None, False))
        # It was aborted, and its id may have come again.
        if request is None or future is None or not future.done():
            return
        del self._preparing[id]
        error = AnabranchError("the engine ends") if future.cancelled() else future.exception()
        if error is None:
            self._held[id] = future.result()
            if is_told:
                self._emit([Output(id=id, is_prepared=True)])
            self._schedule(request)
            return
        self._forget(id)
        if not isinstance(error, AnabranchError):
            logger.error("request %s could not be prepared: %s", id, error, exc_info=error)
        is_busy = isinstance(error, BusyError)
        self._emit([Refused(id, str(error) or type(error).__name__, is_busy=is_busy, field=_field_of(error))])

    def _turned(self, id: str, future: Future[Any]) -> None:
        # It was aborted, and its id may have come again.
        if self._turning.get(id) is not future:
            return
        del self._turning[id]
        error = AnabranchError("the engine ends") if future.cancelled() else future.exception()
        if error is None:
            self.scheduler.go_on(id, future.result())
            return
        if not isinstance(error, AnabranchError):
            logger.error("request %s cannot go on: %s", id, error, exc_info=error)
        output = self.scheduler.abort(id)
        self._forget(id)
        if output is not None:
            output.finish, output.error = Finish.ERROR, str(error) or type(error).__name__
            self._emit([output])

    def _schedule(self, request: Request) -> None:
        try:
            self.scheduler.add(request if self._bind is None else self._bind(request))
        except Exception as error:
            self._forget(request.id)
            self._refuse(request, error)
            return
        self._live.add(request.id)
        self._is_idle_told = False

    def _refuse(self, request: Request, error: Exception) -> None:
        """Tell that a request cannot be taken: it never ran, so whatever it is that raised, nobody else is concerned."""
        if isinstance(error, InputError):
            self._emit([Refused(request.id, str(error), field=_field_of(error))])
            return
        logger.error("request %s cannot be taken", request.id, exc_info=error)
        self._emit([Refused(request.id, f"the request cannot be taken: {type(error).__name__}: {error}")])

    def _abort(self, id: str) -> None:
        preparing = self._preparing.pop(id, None)
        if preparing is not None:
            # Nobody waits for it any longer, so it need not be made.
            preparing[1].cancel()
            output: Output | None = Output(id=id, finish=Finish.ABORT)
        else:
            output = self.scheduler.abort(id)
        self._forget(id)
        if output is not None:
            self._emit([output])

    def _forget(self, id: str) -> None:
        self._live.discard(id)
        self._held.pop(id, None)
        self._turning.pop(id, None)
        if self._release is not None:
            self._release(id)

    def _control(self, command: Control) -> None:
        reply, number = self._answer(command), command.number
        if isinstance(reply.value, Future):
            reply.value.add_done_callback(lambda future: self.put(Answered(number, future)))
        else:
            self._emit([reply])
        # An engine that has nothing to do is another one now, and says so.
        self._is_idle_told = self._is_idle_told and command.name == PING

    def _answer(self, command: Control) -> Reply:
        if command.name == PING:
            return Reply(command.number)
        function = self._controls.get(command.name)
        if function is None:
            known = ", ".join(sorted(self._controls)) or "none"
            return Reply(command.number, error=InputError(f"no control {command.name!r}; known: {known}"))
        try:
            return Reply(command.number, function(**command.arguments))
        except AnabranchError as error:
            return Reply(command.number, error=error)
        except TypeError as error:
            # Arguments that the function does not take.
            return Reply(command.number, error=InputError(f"control {command.name!r}: {error}"))

    # The end

    def _is_over(self) -> bool:
        return self._closing_at is not None and not self._live and not self._flight and self._inbox.empty()

    def _fail(self, error: BaseException) -> None:
        # An interruption is raised, and no fault.
        if isinstance(error, Exception):
            logger.error("the engine failed: %s", error, exc_info=error)
        message = f"{type(error).__name__}: {error}"
        lost = [Output(id=id, finish=Finish.ERROR, error=message, engine_failed=True) for id in sorted(self._live)]
        self._live.clear()
        for _, future, _ in self._preparing.values():
            future.cancel()
        self._preparing.clear()
        self._emit([*lost])
        self._end(message)

    def _end(self, error: str | None) -> None:
        self._ended = error or "it was closed"
        for _, future in self._flight:
            future.cancel()
        self._flight.clear()
        if self._worker is not None:
            self._worker.shutdown()
        try:
            self.runner.close()
        except Exception:
            logger.exception("a hook failed as the engine ended")
        self._emit([self._picture(), Closed(error)])

    def _picture(self) -> EngineStats:
        stats = self.scheduler.stats()
        for source in self._sources:
            more = source()
            stats.counters |= more.counters
            stats.gauges |= more.gauges
            stats.samples |= more.samples
        stats.samples["step_time"], self._step_times = self._step_times, []
        self._picture_at = time.monotonic()
        return stats


def _field_of(error: BaseException) -> str:
    """The field of a request that an error is about; "" where it does not say."""
    return error.field if isinstance(error, FieldInputError) else ""


def _reply(number: int, future: "Future[Any]") -> Reply:
    """What a control's future gave, or the error that it raised; one that nobody foresaw is told without its trace."""
    # Asked for and not raised: an error that is raised here knows this frame, which knows the future, which knows the error, and with it
    # all that the work had read.
    error = AnabranchError("the engine ends") if future.cancelled() else future.exception()
    if error is None:
        return Reply(number, future.result())
    if isinstance(error, AnabranchError):
        return Reply(number, error=error)
    logger.error("a control failed", exc_info=error)
    return Reply(number, error=AnabranchError(f"it failed: {type(error).__name__}: {error}"))
