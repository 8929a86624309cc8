"""Work in one other thread, or on the loop itself, sender by sender: who brings much waits for itself, others for one piece of it."""

import asyncio
from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor
from functools import partial
from typing import Any, TypeVar

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
        """What ``work()`` gives or raises. One that is cancelled before its turn is not begun, and nothing of it stays."""
        future = asyncio.get_running_loop().create_future()
        piece = (work, future)
        self._waiting.setdefault(whose, deque()).append(piece)
        self._begin()
        try:
            found: T = await future
        except asyncio.CancelledError:
            self._forget(whose, piece)
            raise
        return found

    def _forget(self, whose: str, piece: _Piece) -> None:
        pieces = self._waiting.get(whose)
        if pieces is not None and piece in pieces:
            pieces.remove(piece)
            if not pieces:
                del self._waiting[whose]

    def _begin(self) -> None:
        while self._waiting and not self._is_busy:
            whose = next(iter(self._waiting))
            pieces = self._waiting.pop(whose)
            work, future = pieces.popleft()
            if pieces:
                self._waiting[whose] = pieces
            if not future.cancelled():
                self._is_busy = True
                running = self._started(future.get_loop(), work)
                running.add_done_callback(partial(self._ended, future))

    def _started(self, loop: asyncio.AbstractEventLoop, work: Callable[[], Any]) -> "asyncio.Future[Any]":
        if self._executor is not None:
            return loop.run_in_executor(self._executor, work)
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


def _do(work: Callable[[], Any], running: "asyncio.Future[Any]") -> None:
    try:
        result = work()
    except Exception as error:
        running.set_exception(error)
    else:
        running.set_result(result)
