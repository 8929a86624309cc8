"""`StrategyThread`: the thread that a strategy is at work in, until its last user has done with it."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from anabranch.web.turns import Turns

__all__ = ["StrategyThread"]

T = TypeVar("T")


class StrategyThread:
    """For one event loop. Lanes that go on with a strategy use it together with those before them, and so does all that waits in it.

    Args:
        name: of the strategy.

    Attributes:
        began: when what runs in it began, of `time.monotonic`; None if nothing does.
        turns: in which senders have something done there.
    """

    def __init__(self, name: str) -> None:
        # It runs nothing, and has no thread, before there is something to do.
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=f"strategy-{name}")
        self.turns, self._users = Turns(self._executor), 0
        self.began: float | None = None

    def take(self) -> "StrategyThread":
        """One more uses it, and will `release` it."""
        self._users += 1
        return self

    def release(self) -> None:
        """A user has done with it; after the last it ends once it is idle."""
        self._users -= 1
        if not self._users:
            self._executor.shutdown(wait=False, cancel_futures=True)

    def timed(self, work: Callable[[], T]) -> Callable[[], T]:
        """``work`` that tells by `began` since when it runs. All that is done in the thread is, so that nobody waits for it too long."""

        def run() -> T:
            self.began = time.monotonic()
            try:
                return work()
            finally:
                self.began = None

        return run

    @contextmanager
    def used(self) -> Iterator[Turns]:
        """As long as the block lasts it does not end."""
        self.take()
        try:
            yield self.turns
        finally:
            self.release()
