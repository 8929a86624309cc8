"""Work in one other thread, or on the loop itself, sender by sender: who brings much waits for itself, others for one piece of it."""

import asyncio
import concurrent.futures
import contextvars
import logging
import threading
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from functools import partial
from typing import Any, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")
_Piece = tuple[Callable[[], Any], "asyncio.Future[Any]"]


class Turns:
    """For one event loop. Senders who wait take turns; the pieces of each are done in the order they came.

    Args:
        executor: what the pieces are done in, one at a time; None for the loop itself, which does one and then whatever else there is
            before it does the next: for pieces so short that nobody minds.
    """

    def __init__(self, executor: Executor | None = None) -> None:
        self._executor, self._is_busy = executor, False
        # The order of the senders is that of their turns.
        self._waiting: dict[str, deque[_Piece]] = {}

    async def run(self, whose: str, work: Callable[[], T]) -> T:
        """What ``work()`` gives or raises, as `plainly`. One that is cancelled before its turn is not begun, and nothing of it stays."""
        future = self.put(whose, work)
        try:
            return await future
        except asyncio.CancelledError:
            self.drop(whose, future)
            raise

    def put(self, whose: str, work: Callable[[], T]) -> "asyncio.Future[T]":
        """As `run`, for whoever does not wait for it, or not as long as it takes; `drop` gives it up."""
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(whose, deque()).append((work, future))
        self._begin()
        return future

    def drop(self, whose: str, future: "asyncio.Future[Any]") -> None:
        """Nobody wants what was `put` any more: it is not begun if it has not been yet, and nothing of it stays."""
        future.cancel()
        pieces = self._waiting.get(whose, ())
        left = deque(piece for piece in pieces if piece[1] is not future)
        if left:
            self._waiting[whose] = left
        elif pieces:
            del self._waiting[whose]

    def _begin(self) -> None:
        while self._waiting and not self._is_busy:
            whose = next(iter(self._waiting))
            pieces = self._waiting.pop(whose)
            work, future = pieces.popleft()
            if pieces:
                self._waiting[whose] = pieces
            if future.cancelled():
                continue
            try:
                running = self._started(future.get_loop(), work)
            except RuntimeError:
                # The executor was shut down, and takes nothing any more: what waits ends as what it had taken and not begun.
                future.cancel()
                continue
            self._is_busy = True
            running.add_done_callback(partial(self._ended, future))

    def _started(self, loop: asyncio.AbstractEventLoop, work: Callable[[], Any]) -> "asyncio.Future[Any]":
        if self._executor is not None:
            return loop.run_in_executor(self._executor, plainly, work)
        running = loop.create_future()
        loop.call_soon(_do, work, running)
        return running

    def _ended(self, future: "asyncio.Future[Any]", running: "asyncio.Future[Any]") -> None:
        self._is_busy = False
        if running.cancelled():
            future.cancel()
        elif (error := running.exception()) is None:
            if not future.done():
                future.set_result(running.result())
        elif not future.done():
            future.set_exception(error)
        self._begin()


class UnusualError(RuntimeError):
    """What was raised, its cause, would end or steer whoever waits for the work, and is no error of the work to them.

    A future cannot even hold StopIteration, and would never end; CancelledError cancels whoever waits, SystemExit ends the loop.
    """


# Errors by their class alone.
_STEERING = (StopIteration, StopAsyncIteration, concurrent.futures.CancelledError)


def plainly(work: Callable[[], T]) -> T:
    """What ``work()`` gives or raises; `UnusualError` for what is no error of it, but for Ctrl-C in the main thread."""
    try:
        return work()
    except BaseException as error:
        is_interrupt = isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread()
        if is_interrupt or _is_error(error):
            raise
        raise UnusualError(f"{type(error).__name__} was raised") from error


def words(error: BaseException) -> str:
    """Its text, for whoever may read that; its class where it has none to give, since others wrote how it is made."""
    try:
        return plainly(lambda: str(error))
    except Exception:
        return type(error).__name__


def _is_error(error: BaseException) -> bool:
    return isinstance(error, Exception) and not isinstance(error, _STEERING)


def _task() -> "asyncio.Task[Any] | None":
    """That runs now; None where what is awaited is closed after its loop has ended."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


async def plainly_awaited(work: Callable[[], Awaitable[T]]) -> T:
    """As `plainly`, of what ``work()`` gives and is awaited; that whoever awaits it is cancelled, or ends, is told as ever.

    For what is ours and calls what others wrote. What others wrote to be awaited has a task of its own, by `in_task`: it may leave the
    task in which it runs told to end, as `asyncio.TaskGroup` does until Python 3.13, or turn that it was told into an error.
    """
    try:
        return await work()
    except BaseException as error:
        task = _task()
        is_cancelled = isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling()
        if is_cancelled or task is None or isinstance(error, KeyboardInterrupt) or _is_error(error):
            raise
        raise UnusualError(f"{type(error).__name__} was raised") from error


async def in_thread(work: Callable[..., T], *arguments: Any) -> T:
    """What ``work(*arguments)`` gives or raises, as `plainly`, in another thread: `asyncio.to_thread`, for what others wrote too."""
    return await asyncio.to_thread(plainly, partial(work, *arguments))


# Seconds in which what is cancelled may end. It is told once: told again, what it does about its end would be cut off.
GRACE_S = 1.5

# What was cancelled and has not ended.
_lingering: set["asyncio.Task[Any]"] = set()


async def in_task(work: Callable[[], Awaitable[T]], limit_s: float | None = None) -> T:
    """As `plainly_awaited`, in a task of its own: whoever waits is neither cancelled by what is done there nor held up by it.

    What does not end when it is cancelled, since its time is over or whoever waits is cancelled, is left behind after a moment. What is
    set there of variables of the context is set for whoever waited, as if it had been awaited.

    Args:
        work: gives what is awaited.
        limit_s: seconds that it has; None for as many as it takes.

    Raises TimeoutError after ``limit_s``.
    """
    context = contextvars.copy_context()
    task = asyncio.create_task(plainly_awaited(work), context=context)
    try:
        await asyncio.wait({task}, timeout=limit_s)
    except asyncio.CancelledError:
        # What others did in the task cannot have raised it here: it is for whoever waits.
        await _end(task)
        raise
    if not task.done():
        await _end(task)
        raise TimeoutError
    _take_over(context)
    if task.cancelled():
        raise UnusualError("CancelledError was raised")
    return task.result()


def _take_over(context: contextvars.Context) -> None:
    here = contextvars.copy_context()
    for variable, value in context.items():
        if variable not in here or here[variable] is not value:
            variable.set(value)


async def _end(task: "asyncio.Task[Any]") -> None:
    _lingering.add(task)
    task.add_done_callback(_gone)
    task.cancel()
    await asyncio.wait({task}, timeout=GRACE_S)
    if not task.done():
        logger.error("what was cancelled has not ended within %g s, and is left behind", GRACE_S)


def _gone(task: "asyncio.Task[Any]") -> None:
    _lingering.discard(task)
    # Seen: nobody asks what it ended with.
    task.cancelled() or task.exception()


def _do(work: Callable[[], Any], running: "asyncio.Future[Any]") -> None:
    try:
        result = plainly(work)
    except Exception as error:
        running.set_exception(error)
    else:
        running.set_result(result)
