"""How many requests are computed at once, and for how long: a few threads, a queue before them, a deadline.

Work comes in steps of some milliseconds. After one of them a request that has had its turn goes behind those that wait, so that what asks
for much takes longer, and not everybody else; and one that is past its deadline ends. A step under way cannot be stopped: a request whose
deadline passes meanwhile is answered, but its thread counts as taken until the step is done, so that the machine is never asked for more
than ``concurrency`` at a time.
"""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

from anabranch.graph.serve.limits import Limits

T = TypeVar("T")

# Yields between its steps.
Steps = Generator[None, None, T]

# Seconds of a turn; what is begun by then goes on to the end of its step.
TURN_S = 0.05

# Of all places, those that one address may take: others are let in beside one that asks without end.
SHARE = 0.75


class FullError(Exception):
    """As many requests as may are under way or waiting."""


class LateError(Exception):
    """The deadline has passed."""


@dataclass
class _Job:
    """Work of a request, and when it has to be done."""

    steps: Steps[Any]
    deadline: float
    found: Future[Any] = field(default_factory=Future)


class Gate:
    """Lets requests through to threads. `run` is called in the event loop."""

    def __init__(self, limits: Limits) -> None:
        # Requests that may be under way or waiting.
        self.room = limits.concurrency + limits.waiting
        self._concurrency = limits.concurrency
        self._threads = ThreadPoolExecutor(limits.concurrency, thread_name_prefix="answer")
        # Requests under way or waiting.
        self.taken = 0
        self._of_source: Counter[str] = Counter()
        self.most_of_source = math.ceil(SHARE * self.room)

    def why_full(self, source: str) -> str | None:
        """Why another request of an address would be turned away."""
        if self.taken >= self.room:
            return f"{self.room} requests are under way or waiting, which is the limit"
        if self._of_source[source] >= self.most_of_source:
            return (
                f"{self.most_of_source} requests of this address are under way or waiting, of {self.room} that may be"
            )
        return None

    async def run(
        self, work: Callable[[], Steps[T]], deadline: float, over: Callable[[], None] = lambda: None, source: str = ""
    ) -> T:
        """What the steps of ``work()`` return, made in threads, by ``deadline`` (of `time.monotonic`).

        Args:
            work: of the request.
            deadline: no step is begun after it.
            over: called in the event loop when no thread has to do with it any more, which may be after this raised.
            source: the address that asks.

        Raises FullError with the reason, or LateError; and whatever a step raises.
        """
        if (why := self.why_full(source)) is not None:
            over()
            raise FullError(why)
        self.taken += 1
        self._of_source[source] += 1

        def done(_: object) -> None:
            self.taken -= 1
            self._of_source[source] -= 1
            if not self._of_source[source]:
                del self._of_source[source]
            over()

        job = _Job(work(), deadline)
        future = asyncio.wrap_future(job.found)
        future.add_done_callback(done)
        self._threads.submit(self._turn, job)
        ready, _ = await asyncio.wait({future}, timeout=max(deadline - time.monotonic(), 0))
        if not ready:
            # So that it counts as seen.
            future.add_done_callback(lambda late: late.cancelled() or late.exception())
            raise LateError
        return future.result()

    def _turn(self, job: _Job) -> None:
        """In a thread: steps until they are done, or it is another's turn."""
        end = time.monotonic() + TURN_S
        try:
            while True:
                # It waited, or takes, too long: nobody reads the answer.
                if time.monotonic() >= job.deadline:
                    raise LateError
                next(job.steps)
                if time.monotonic() >= end and self.taken > self._concurrency:
                    self._threads.submit(self._turn, job)
                    return
        except StopIteration as last:
            job.found.set_result(last.value)
        except BaseException as error:
            job.steps.close()
            job.found.set_exception(error)

    def close(self) -> None:
        """End the threads once they are idle."""
        self._threads.shutdown(wait=False, cancel_futures=True)
