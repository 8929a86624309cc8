"""Threads of this package: how many there are by default, and the ways in which work is given to them.

Kernels let go of the interpreter's lock, so threads are enough. What comes out never depends on their number: results stand in the order of
the tasks (`in_order`), carry their number (`as_done`), or lie in places of their own (`Workers`).
"""

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import pairwise
from typing import Any, Self, TypeVar

from anabranch import machine
from anabranch.bounds import shown
from anabranch.errors import InputError

Task = TypeVar("Task")
Result = TypeVar("Result")

# What ``workers`` of an index was called before.
FORMER = "num_threads"

# Beyond that threads would wait for processors, and take memory; what comes out does not depend on it.
MOST_THREADS = 4096

# Of `Workers.run`, per thread, so that threads finish together.
PIECES = 4


def num_workers(asked: int | None = None) -> int:
    """What is asked for, `MOST_THREADS` at most.

    By default as many as can really run at once, or fewer where NUMBA_NUM_THREADS in the environment says so: the one default of this
    package. Numba itself is not asked: that would start its own threads, and set how many torch uses.
    """
    if asked is not None:
        return min(int(asked), MOST_THREADS)
    most = os.environ.get("NUMBA_NUM_THREADS", "").strip()
    return min(machine.usable_cores(), int(most)) if most.isdecimal() and int(most) else machine.usable_cores()


def asked_workers(workers: int | None, former: Mapping[str, Any], call: str) -> int | None:
    """``workers`` of a call; where that is None, what it gives by the former name, ``num_threads``.

    Args:
        workers: as given.
        former: all that was given by other names than the call has.
        call: its name.

    Raises TypeError for other names, as Python does, and InputError where both are given.
    """
    if not former:
        return workers
    for name in former:
        if name != FORMER:
            raise TypeError(f"{call}() got an unexpected keyword argument {name!r}")
    if workers is not None and former[FORMER] is not None:
        raise InputError(
            f"workers is {shown(workers)}, and {FORMER}, its former name, {shown(former[FORMER])}; give one of them"
        )
    return former[FORMER] if workers is None else workers


def in_order(work: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    """Results in the order of the tasks; at most two tasks a worker are begun before their turn."""
    if workers <= 1:
        yield from map(work, tasks)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: list[Future[Result]] = []
        try:
            for task in tasks:
                waiting.append(pool.submit(work, task))
                if len(waiting) > 2 * workers:
                    yield waiting.pop(0).result()
            while waiting:
                yield waiting.pop(0).result()
        finally:
            for future in waiting:
                future.cancel()


def as_done(
    work: Callable[[Task], Result], tasks: Iterable[tuple[int, Task]], workers: int
) -> Generator[tuple[int, Result], None, None]:
    """Numbers and results of numbered tasks, as they are done; one task more than workers is begun, and the next when it is drawn."""
    source = iter(tasks)
    with ThreadPoolExecutor(workers) as pool:
        running: dict[Future[Result], int] = {}
        try:
            while True:
                while len(running) <= workers and (task := next(source, None)) is not None:
                    running[pool.submit(work, task[1])] = task[0]
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        finally:
            for future in running:
                future.cancel()


class Workers:
    """Threads for as long as it is entered, begun when they are first needed; with one, work is done where it is asked for.

    Args:
        count: how many; None for the default.
    """

    def __init__(self, count: int | None = None) -> None:
        self.count = num_workers(count)
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def each(self, work: Callable[..., None], tasks: Sequence[tuple[Any, ...]]) -> None:
        """``work(*task)`` of all tasks, in any order. All are over before an error goes on: whoever puts things right is alone."""
        if self.count == 1 or len(tasks) < 2:
            for task in tasks:
                work(*task)
            return
        begun = [self._begun().submit(work, *task) for task in tasks]
        wait(begun)
        for one in begun:
            one.result()

    def run(self, work: Callable[[int, int], None], total: int, least: int = 1) -> None:
        """``work(begin, end)`` on pieces that cover ``total``, none shorter than ``least`` unless there is only one."""
        pieces = 1 if self.count == 1 else max(1, min(self.count * PIECES, total // max(least, 1)))
        ends = [total * piece // pieces for piece in range(pieces + 1)]
        if total:
            self.each(work, list(pairwise(ends)))

    def map(self, work: Callable[[Task], Result], tasks: Sequence[Task]) -> list[Result]:
        """Results of all tasks, in their order."""
        found: list[Any] = [None] * len(tasks)
        self.each(lambda place, task: found.__setitem__(place, work(task)), list(enumerate(tasks)))
        return found

    def begin(self, work: Callable[..., Result], *arguments: Any) -> "Future[Result]":
        """Begin work in a thread, also where there is only one."""
        return self._begun().submit(work, *arguments)

    def _begun(self) -> ThreadPoolExecutor:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.count)
        return self._pool
