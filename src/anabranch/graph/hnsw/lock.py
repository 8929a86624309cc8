"""Many readers or one writer; and pieces of work for threads whose kernels run without the interpreter's lock."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from itertools import pairwise
from types import TracebackType
from typing import Self

from anabranch import machine

# Per thread, so that threads finish together.
PIECES = 4


class ReadWriteLock:
    """Readers share it, a writer has it alone; a waiting writer goes before readers that come later. Not reentrant."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._readers = 0
        self._writing = False
        self._waiting = 0

    @contextmanager
    def read(self) -> Iterator[None]:
        """Hold it with other readers. An interrupt while it waits leaves no trace."""
        is_held = False
        try:
            with self._changed:
                self._changed.wait_for(lambda: not self._writing and not self._waiting)
                self._readers += 1
                is_held = True
            yield
        finally:
            if is_held:
                with self._changed:
                    self._readers -= 1
                    self._changed.notify_all()

    @contextmanager
    def write(self) -> Iterator[None]:
        """Hold it alone. An interrupt while it waits lets the others go on."""
        is_held = False
        try:
            with self._changed:
                self._waiting += 1
                try:
                    self._changed.wait_for(lambda: not self._writing and not self._readers)
                    self._writing = is_held = True
                finally:
                    self._waiting -= 1
                    if not is_held:
                        self._changed.notify_all()
            yield
        finally:
            if is_held:
                with self._changed:
                    self._writing = False
                    self._changed.notify_all()


class Workers:
    """Threads for as long as it is entered; with one thread, work is done where it is asked for."""

    def __init__(self, num_threads: int | None) -> None:
        self.num_threads = num_threads or machine.affinity()
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def run(self, work: Callable[[int, int], None], total: int, least: int = 1) -> None:
        """``work(begin, end)`` on pieces that cover ``total``, none shorter than ``least`` unless there is only one."""
        pieces = min(self.num_threads * PIECES, total // max(least, 1))
        if self.num_threads == 1 or pieces < 2:
            if total:
                work(0, total)
            return
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.num_threads)
        ends = [total * piece // pieces for piece in range(pieces + 1)]
        tasks = [self._pool.submit(work, *pair) for pair in pairwise(ends)]
        # All of them, also where one raises: whoever puts things right must be alone.
        wait(tasks)
        for task in tasks:
            task.result()
