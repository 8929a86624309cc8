"""Threads of this package: how many there are by default, and the ways in which work is given to them.

Kernels let go of the interpreter's lock, so threads are enough. What comes out never depends on their number: results stand in the order of
the tasks (`in_order`), carry their number (`as_done`), or lie in places of their own (`Threads`).
"""

from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any, TypeVar

from anabranch import machine

Task = TypeVar("Task")
Result = TypeVar("Result")


def num_workers(asked: int | None) -> int:
    """What is asked for, or as many as can really run at once."""
    return machine.usable_cores() if asked is None else int(asked)


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


class Threads:
    """Runs functions of row ranges on some threads, call after call."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._pool = ThreadPoolExecutor(count) if count > 1 else None

    def each(self, work: Callable[..., None], tasks: list[tuple[Any, ...]]) -> None:
        """``work(*task)`` of all tasks, in any order."""
        if self._pool is None or len(tasks) < 2:
            for task in tasks:
                work(*task)
            return
        for done in [self._pool.submit(work, *task) for task in tasks]:
            done.result()

    def close(self) -> None:
        """End the threads."""
        if self._pool is not None:
            self._pool.shutdown()


@contextmanager
def threads(count: int) -> Iterator[Threads]:
    """Some threads for a while."""
    pool = Threads(count)
    try:
        yield pool
    finally:
        pool.close()
