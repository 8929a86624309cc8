"""`Turns`: a few threads that work for several sources in turn, so that who asks for much waits for itself alone."""

import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from anabranch.serving.core.client import BusyError

__all__ = ["Turns"]

T = TypeVar("T")


class Turns:
    """Threads, and who is next: the source that was served longest ago, each in the order of coming. Safe for threads.

    What is cancelled before its turn never runs, and no longer counts.

    Args:
        name: of the threads.
        what: waits here, for messages: ``grammars wait to be compiled``.
        threads: at most; they begin when they are needed.
        at_once: most that run for one source; None for as many as there are threads.
        most_waiting: of one source; None for any number.
    """

    def __init__(
        self, name: str, what: str, *, threads: int, at_once: int | None = None, most_waiting: int | None
    ) -> None:
        self._what, self._at_once, self._most_waiting = what, at_once or threads, most_waiting
        self._threads = ThreadPoolExecutor(threads, name)
        self._lock = threading.RLock()
        # By source, the one whose turn is next first.
        self._waiting: OrderedDict[Hashable, deque[tuple[Future[Any], Callable[[], Any]]]] = OrderedDict()
        self._running: Counter[Hashable] = Counter()
        self._is_closed = False

    def submit(self, source: Hashable, function: Callable[..., T], *args: Any, **kwargs: Any) -> "Future[T]":
        """What a function returns or raises, called when it is the turn of ``source``.

        Raises BusyError where too many of it wait, and once this is closed.
        """
        future: Future[T] = Future()
        with self._lock:
            if self._is_closed:
                raise BusyError(f"closed: no more {self._what}")
            own = self._waiting.setdefault(source, deque())
            if self._most_waiting is not None and len(own) >= self._most_waiting:
                raise BusyError(f"busy: {len(own)} {self._what}; ask again")
            own.append((future, partial(function, *args, **kwargs)))
            future.add_done_callback(partial(self._left, source))
            # With the lock, as the threads end once this is closed.
            self._threads.submit(self._work)
        return future

    def close(self) -> None:
        """Cancel what waits; what runs is not waited for. Idempotent."""
        with self._lock:
            self._is_closed = True
            waiting = [future for own in self._waiting.values() for future, _ in own]
        for future in waiting:
            future.cancel()
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _left(self, source: Hashable, future: "Future[Any]") -> None:
        """One that is done was cancelled if it still waits."""
        with self._lock:
            own = self._waiting.get(source, deque())
            kept = deque(each for each in own if each[0] is not future)
            if len(kept) < len(own):
                self._keep(source, kept)

    def _keep(self, source: Hashable, own: deque[tuple["Future[Any]", Callable[[], Any]]]) -> None:
        if own:
            self._waiting[source] = own
        else:
            self._waiting.pop(source, None)

    def _work(self) -> None:
        """In a thread: whatever may run, until nothing may. One whose source has enough under way is run by the thread that ends that."""
        while self.run_next():
            pass

    def run_next(self) -> bool:
        """Run, in this thread, what is next; whether there was anything that may run."""
        taken = self._take()
        if taken is None:
            return False
        source, future, function = taken
        try:
            result = function()
        except BaseException as error:
            self._ended(source)
            future.set_exception(error)
        else:
            self._ended(source)
            future.set_result(result)
        return True

    def _take(self) -> tuple[Hashable, "Future[Any]", Callable[[], Any]] | None:
        with self._lock:
            for source in self._waiting:
                if self._running[source] < self._at_once:
                    break
            else:
                return None
            own = self._waiting.pop(source)
            future, function = own.popleft()
            # Behind all others.
            self._keep(source, own)
            if not future.set_running_or_notify_cancel():
                return self._take()
            self._running[source] += 1
            return source, future, function

    def _ended(self, source: Hashable) -> None:
        with self._lock:
            self._running[source] -= 1
            if not self._running[source]:
                del self._running[source]
            # Behind whoever came while it was served.
            if source in self._waiting:
                self._waiting.move_to_end(source)
