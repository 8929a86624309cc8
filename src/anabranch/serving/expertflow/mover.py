"""`Mover`: threads that move what an `ExpertCache` asks for, while another computes.

Threads *pull*: a free one asks the cache for the next load under the lock, and moves it without. Nothing is queued, so a
correction changes what is loaded next at once. A load that nobody wants any more is given up between its pieces.
"""

import threading
import time
from types import TracebackType
from typing import Self

from anabranch.errors import AnabranchError, DataError
from anabranch.serving.expertflow.arena import Arena
from anabranch.serving.expertflow.cache import ExpertCache, Load
from anabranch.serving.expertflow.tiers import Tier


class Mover:
    """Moves experts from a tier into an arena.

    Args:
        cache: decides; touch it under ``lock`` only.
        tier: whence.
        arena: where to.
        workers: threads.
        retries: more tries after a load has failed.
        retry_s: pause before the first of them; it doubles.
        timeout_s: longest wait of a layer for one load.
    """

    def __init__(
        self,
        cache: ExpertCache,
        tier: Tier,
        arena: Arena,
        *,
        workers: int = 3,
        retries: int = 2,
        retry_s: float = 0.01,
        timeout_s: float = 120.0,
    ) -> None:
        self.cache, self.tier, self.arena = cache, tier, arena
        self.retries, self.retry_s, self.timeout_s = retries, retry_s, timeout_s
        self.num_retried = 0
        self.lock = threading.RLock()
        self._work, self._done = threading.Condition(self.lock), threading.Condition(self.lock)
        self._closing = False
        self._broken: BaseException | None = None
        self._threads = [threading.Thread(target=self._run, name=f"experts-{n}", daemon=True) for n in range(workers)]
        for thread in self._threads:
            thread.start()

    def pump(self) -> None:
        """There may be something to load now. Hold the lock.

        One thread is woken, and wakes the next if it finds something: each that looks in vain holds up whoever computes.
        """
        self._work.notify()

    def go_on(self) -> None:
        """Whoever computes will do so for a while, without the interpreter or the lock."""

    def wait(self) -> None:
        """Until some load has ended. Hold the lock. Raises DataError if what is wanted cannot be loaded."""
        begin = time.perf_counter()
        self.check()
        ended = self._done.wait(self.timeout_s)
        self.cache.stalled(time.perf_counter() - begin)
        self.check()
        if not ended:
            raise DataError(f"no expert came within {self.timeout_s:g} s; is the disk or device gone?")

    def check(self) -> None:
        """Raise what has gone wrong. Hold the lock."""
        self.cache.check_failure()
        if self._broken is not None:
            raise DataError(f"experts are no longer loaded: {self._broken}") from self._broken
        if self._closing:
            raise DataError("experts are no longer loaded: the offload was closed")

    def close(self) -> None:
        """End the threads (a load under way ends first) and close the tier."""
        with self.lock:
            self._closing = True
            self._work.notify_all()
            self._done.notify_all()
        for thread in self._threads:
            thread.join()
        self.tier.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _run(self) -> None:
        try:
            while (load := self._next()) is not None:
                self._move(load)
        except BaseException as error:
            # A thread that dies in silence would leave layers waiting.
            with self.lock:
                self._broken = error
                self._done.notify_all()

    def _next(self) -> Load | None:
        with self.lock:
            while not self._closing:
                load = self.cache.next_load()
                if load is not None:
                    self._work.notify()
                    return load
                self._work.wait()
        return None

    def _move(self, load: Load, first: int = 0) -> None:
        """Try until it works or there have been enough tries, of which ``first`` were elsewhere."""
        pause_s, error = self.retry_s, None
        for turn in range(first, self.retries + 1):
            if turn:
                with self.lock:
                    self.num_retried += 1
                time.sleep(pause_s)
                pause_s *= 2
            try:
                finished = self._try(load)
            except (OSError, RuntimeError, AnabranchError) as failure:
                error = failure
                continue
            if finished:
                with self.lock:
                    self.cache.loaded(load)
                    self._tell()
            return
        assert error is not None
        with self.lock:
            self.cache.failed(load, error)
            self._tell()

    def _try(self, load: Load) -> bool:
        """Whether it was moved; False if it was given up."""
        kind = self.cache.layout.kind(load.expert)
        self.arena.wait_unused(kind, load.slot)
        for _ in self.tier.load(load.expert, self.arena.slot(kind, load.slot)):
            if load.cancelled:
                with self.lock:
                    # It may be wanted again meanwhile.
                    if load.cancelled:
                        self.cache.cancelled(load)
                        self._tell()
                        return False
        return True

    def _tell(self) -> None:
        # The thread that says so looks for more work itself.
        self._done.notify_all()
