"""How many requests are computed at once, and for how long: a few threads, a short queue before them, a deadline.

A kernel under way cannot be stopped. A request that is past its deadline is answered, but its thread counts as taken until it is done, so
that the machine is never asked for more than ``concurrency`` at a time.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from anabranch.graph.serve.limits import Limits

T = TypeVar("T")


class FullError(Exception):
    """As many requests as may are under way or waiting."""


class LateError(Exception):
    """The deadline has passed."""


class Gate:
    """Lets requests through to threads. `run` is called in the event loop."""

    def __init__(self, limits: Limits) -> None:
        # Requests that may be under way or waiting.
        self.room = limits.concurrency + limits.waiting
        self._threads = ThreadPoolExecutor(limits.concurrency, thread_name_prefix="answer")
        # Requests under way or waiting.
        self.taken = 0

    @property
    def is_full(self) -> bool:
        """Whether another request would be turned away."""
        return self.taken >= self.room

    async def run(self, work: Callable[[], T], deadline: float) -> T:
        """``work()`` in a thread, by ``deadline`` (of `time.monotonic`).

        Raises FullError, or LateError; and whatever ``work`` raises.
        """
        if self.is_full:
            raise FullError
        self.taken += 1
        loop = asyncio.get_running_loop()

        def in_time() -> T:
            # It waited too long: nobody reads the answer.
            if time.monotonic() >= deadline:
                raise LateError
            return work()

        def done(_: object) -> None:
            self.taken -= 1

        future = loop.run_in_executor(self._threads, in_time)
        future.add_done_callback(done)
        ready, _ = await asyncio.wait({future}, timeout=max(deadline - time.monotonic(), 0))
        if not ready:
            # So that it counts as seen.
            future.add_done_callback(lambda late: late.cancelled() or late.exception())
            raise LateError
        return future.result()

    def close(self) -> None:
        """End the threads once they are idle."""
        self._threads.shutdown(wait=False, cancel_futures=True)
