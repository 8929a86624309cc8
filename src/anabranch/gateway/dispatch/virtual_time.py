"""An event loop whose clock jumps: waiting takes no time, so a day of outages can be played in seconds, the same every time.

    run_virtual(lambda: game(Dispatcher(groups, clock=virtual_clock)))

Only for what happens in process (`Mock`, `Replay`): a socket's other end does not know the time.
"""

import asyncio
import selectors
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from anabranch.errors import InputError

T = TypeVar("T")


class VirtualLoop(asyncio.SelectorEventLoop):
    """Where nothing is to be done until a timer, it is that timer's time."""

    def __init__(self) -> None:
        self._now_s = 0.0
        super().__init__(_Jumping(self))

    def time(self) -> float:
        """Seconds since the loop was made."""
        return self._now_s

    def jump(self, seconds: float) -> None:
        """Let time pass."""
        self._now_s += seconds


class _Jumping(selectors.SelectSelector):
    def __init__(self, loop: VirtualLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        if timeout is None:
            raise InputError("nothing will ever happen: every task waits, and no timer is set")
        self._loop.jump(timeout)
        return ready


def virtual_clock() -> float:
    """The time of the running loop: the clock of a `Dispatcher` in it."""
    return asyncio.get_running_loop().time()


def run_virtual(work: Callable[[], Awaitable[T]]) -> T:
    """Run ``work()`` in a loop of its own. Raises InputError where it waits for what never comes."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:

        async def main() -> T:
            return await work()

        return runner.run(main())
