"""Filling CUDA memory: from files by way of pinned memory, from other GPUs, or with zeros, each on a stream of its own.

What serves is on other streams and, in other processes, on other contexts; nothing here waits for it, nor it for this.
"""

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator

from anabranch.serving.elasticmoe.cuda_driver import Driver

__all__ = ["Lane", "Lanes"]

_HALF = 4 << 20


class Lane:
    """A stream and a pinned buffer of two halves, for one thread at a time; within `Driver.on` of its GPU."""

    def __init__(self, driver: Driver) -> None:
        self._driver = driver
        self.stream = driver.stream()
        try:
            self._host = driver.pin(2 * _HALF)
        except BaseException:
            driver.destroy(self.stream)
            raise
        whole = (ctypes.c_char * (2 * _HALF)).from_address(self._host)
        self._halves = memoryview(whole).cast("B")[:_HALF], memoryview(whole).cast("B")[_HALF:]

    def read(self, target: int, file: int, start: int, count: int) -> int:
        """``count`` bytes of an open file to an address; gives ``count``. Raises EOFError for a file that is too short."""
        done, turn = 0, 0
        try:
            while done < count:
                size = min(_HALF, count - done)
                # While the other half travels.
                got = os.preadv(file, [self._halves[turn][:size]], start + done)
                if not got:
                    raise EOFError(f"{count - done} bytes are missing at {start + done}")
                self._driver.wait(self.stream)
                self._driver.copy_in(target + done, self._host + turn * _HALF, got, self.stream)
                done, turn = done + got, 1 - turn
        finally:
            self._driver.wait(self.stream)
        return count

    def copy(self, target: tuple[int, int], source: tuple[int, int], count: int) -> int:
        """``count`` bytes between two places (GPU, address); gives ``count``."""
        self._driver.copy(target, source, count, self.stream)
        self._driver.wait(self.stream)
        return count

    def clear(self, target: int, size: int) -> None:
        """Write zeros."""
        self._driver.clear(target, size, self.stream)
        self._driver.wait(self.stream)

    def close(self) -> None:
        """Give stream and buffer back."""
        self._halves = memoryview(b""), memoryview(b"")
        try:
            self._driver.destroy(self.stream)
        finally:
            self._driver.unpin(self._host)


class Lanes:
    """Lanes of one GPU, as many as threads have ever wanted at once."""

    def __init__(self, driver: Driver, gpu: int) -> None:
        self._driver, self._gpu = driver, gpu
        self._idle: list[Lane] = []
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def one(self) -> Iterator[Lane]:
        """A lane that nobody else uses meanwhile, its GPU current."""
        with self._lock:
            lane = self._idle.pop() if self._idle else None
        with self._driver.on(self._gpu):
            lane = lane or Lane(self._driver)
            try:
                yield lane
            finally:
                with self._lock:
                    self._idle.append(lane)

    def close(self) -> None:
        """Give all back."""
        with self._lock, self._driver.on(self._gpu):
            while self._idle:
                self._idle.pop().close()
