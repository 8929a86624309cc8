"""A task in which what others wrote to be awaited runs, piece after piece, whoever waits for the pieces."""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from anabranch.web.turns import GRACE_S, UnusualError, plainly_awaited

__all__ = ["OwnTask", "all_ended"]

logger = logging.getLogger(__name__)

T = TypeVar("T")
_Piece = tuple[Callable[[], Awaitable[Any]], "asyncio.Future[Any]"]

# A loop holds its tasks weakly.
_alive: set["asyncio.Task[None]"] = set()
# Of these, what was told to end and has not ended.
_ending: set["asyncio.Task[None]"] = set()


async def all_ended() -> None:
    """Wait for what was told to end in this loop, a moment at most: what it tidies up may need what is closed next."""
    loop = asyncio.get_running_loop()
    tasks = {task for task in _ending if task.get_loop() is loop}
    if tasks:
        await asyncio.wait(tasks, timeout=GRACE_S)


class OwnTask:
    """Runs what it is told to `begin` in one task and one context, so that what is kept by either (variables of a context, limiters and
    groups of tasks) holds from piece to piece. That whoever waits for a piece is cancelled is nothing to it; nor does it cancel whoever
    waits, whatever it leaves behind. `end` ends it. For one event loop, that runs.
    """

    def __init__(self) -> None:
        self._pieces: deque[_Piece] = deque()
        self._is_running = self._is_over = self._waits = False
        self._last: Callable[[], object] | None = None
        self._overdue: asyncio.TimerHandle | None = None
        self._wake = asyncio.Event()
        self._task = asyncio.ensure_future(self._run())
        _alive.add(self._task)
        self._task.add_done_callback(self._gone)

    def begin(self, work: Callable[[], Awaitable[T]]) -> "asyncio.Future[T]":
        """Of what ``work()`` gives and is awaited, once those before it have ended; what it raises is as of `plainly_awaited`.

        Whoever waits for it waits by `asyncio.wait`, which does not cancel it. It is UnusualError where the end comes first.
        """
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        if self._is_over:
            _fail(future)
            return future
        self._pieces.append((work, future))
        self._wake.set()
        return future

    def withdraw(self, future: "asyncio.Future[Any]") -> bool:
        """Whether what was to `begin` has not begun; then it does not, and fails as where the end comes first."""
        left = deque(piece for piece in self._pieces if piece[1] is not future)
        is_found = len(left) < len(self._pieces)
        self._pieces = left
        if is_found:
            _fail(future)
        return is_found

    def end(self, last: Callable[[], object] | None = None, *, waits: bool = False) -> None:
        """Cancel what runs, once, begin nothing more, and do ``last()``, which does not fail, in the task once that has ended.

        Where it does not end within a moment the log says so, and ``last()`` is done beside it at once, unless it ``waits``.
        """
        if self._task.done():
            if last is not None:
                last()
            return
        self._last, self._waits, self._is_over = last, waits, True
        if self._is_running:
            self._task.cancel()
        self._wake.set()
        _ending.add(self._task)
        if self._overdue is None:
            self._overdue = self._task.get_loop().call_later(GRACE_S, self._left_behind)

    async def ended(self) -> None:
        """Wait for its end, a moment at most."""
        await asyncio.wait({self._task}, timeout=GRACE_S)

    def _left_behind(self) -> None:
        logger.error("what was cancelled has not ended within %g s, and is left behind", GRACE_S)
        if not self._waits:
            self._at_end()

    async def _run(self) -> None:
        try:
            while not self._is_over:
                if not self._pieces:
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                await self._do(*self._pieces.popleft())
        finally:
            self._is_over = True
            self._at_end()

    async def _do(self, work: Callable[[], Awaitable[Any]], future: "asyncio.Future[Any]") -> None:
        self._is_running = True
        try:
            result = await plainly_awaited(work)
        except asyncio.CancelledError:
            # By `end`, by the end of the loop, or by its own doing, which cannot be told apart.
            _fail(future, "CancelledError was raised")
            raise
        except Exception as error:
            future.set_exception(error)
        else:
            future.set_result(result)
        finally:
            self._is_running = False
        # Seen, also where nobody asks.
        future.exception()
        if self._task.cancelling() and not self._is_over:
            await self._taken_back()

    async def _taken_back(self) -> None:
        """What a piece that has ended left of cancels is for nobody."""
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.sleep(0)
        while self._task.cancelling():
            self._task.uncancel()

    def _at_end(self) -> None:
        last, self._last = self._last, None
        if last is not None:
            last()

    def _gone(self, task: "asyncio.Task[None]") -> None:
        _alive.discard(task)
        _ending.discard(task)
        if self._overdue is not None:
            self._overdue.cancel()
        self._is_over = True
        for _, future in self._pieces:
            _fail(future)
        self._pieces.clear()
        # Where it was cancelled before it began.
        self._at_end()
        task.cancelled() or task.exception()


def _fail(future: "asyncio.Future[Any]", why: str = "the task has ended") -> None:
    future.set_exception(UnusualError(why))
    # Seen, also where nobody asks.
    future.exception()
