"""`Watchdog`: a process of a group that has stopped, without having died, is ended: what becomes of it then is a recovery.

Watched are all of them: the ranks that serve and those on standby, the memory manager, and the fork server.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from anabranch.errors import AnabranchError

__all__ = ["Watchdog", "Watched", "in_thread"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Watched:
    """One process.

    Attributes:
        key: tells it from all others, and from the one that takes its place.
        name: for the log.
        ping: asks for a sign of life.
        kill: ends it.
        is_alive: whether there is a process.
        lost: called once where there is none; None where that is told by other ways.
        start_s: seconds that its first sign of life may take, if that is longer than later ones may: it is looked after while it starts.
    """

    key: tuple[object, ...]
    name: str
    ping: Callable[[], "Future[Any]"]
    kill: Callable[[], None]
    is_alive: Callable[[], bool] = lambda: True
    lost: Callable[[], object] | None = None
    start_s: float = 0.0


class _Ping:
    """A question to one process.

    Attributes:
        future: its answer.
        heard: seconds of `time.monotonic` at which the process gave its last sign of life, or was first asked.
        has_begun: it has given one.
    """

    def __init__(self, future: Future[Any], heard: float, *, has_begun: bool = False) -> None:
        self.future, self.heard, self.has_begun = future, heard, has_begun
        future.add_done_callback(self._answered)

    def _answered(self, future: Future[Any]) -> None:
        self.heard = time.monotonic()


class Watchdog:
    """Asks processes for signs of life, in a thread.

    While the watchdog itself stood still, with its machine or for want of a processor, nobody was asked: that counts as nobody's silence.

    Args:
        watched: the processes there are now.
        patience_s: from a process's last sign of life to its end.
    """

    def __init__(self, watched: Callable[[], Iterable[Watched]], patience_s: float) -> None:
        self._watched, self._patience_s = watched, patience_s
        self._pings: dict[tuple[object, ...], _Ping] = {}
        self._lost: set[tuple[object, ...]] = set()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="anabranch-watchdog")
        self._thread.start()

    def close(self) -> None:
        """End it. Idempotent."""
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        wait_s, began = self._patience_s / 4, time.monotonic()
        while not self._is_over.wait(wait_s):
            self._forgive(time.monotonic() - began - wait_s)
            began = time.monotonic()
            # Not so short that a clock of floats would stand still.
            wait_s = min(self._patience_s / 4, max(self._look(), self._patience_s * 1e-6))

    def _forgive(self, late_s: float) -> None:
        """What it was late by is no silence of those that it watches, if that is more than they differ by."""
        if late_s > self._patience_s / 4:
            for ping in self._pings.values():
                ping.heard = min(ping.heard + late_s, time.monotonic())

    def _look(self) -> float:
        """Ask those that have answered once more, end those that are too late; gives the seconds until the next one would be."""
        before, self._pings = self._pings, {}
        left_s, watched = self._patience_s, list(self._watched())
        self._lost &= {each.key for each in watched}
        for each in watched:
            if not each.is_alive():
                self._tell_lost(each)
                continue
            ping = before.get(each.key)
            if ping is None or ping.future.done():
                heard = time.monotonic() if ping is None else ping.heard
                ping = _Ping(each.ping(), heard, has_begun=ping is not None)
            silent_s = time.monotonic() - ping.heard
            patience_s = self._patience_s if ping.has_begun else max(self._patience_s, each.start_s)
            if silent_s < patience_s:
                self._pings[each.key] = ping
                left_s = min(left_s, patience_s - silent_s)
                continue
            logger.error("%s gives no sign of life for %g s, and is ended", each.name, patience_s)
            # That it is gone is found out the next time.
            each.kill()
        return left_s

    def _tell_lost(self, each: Watched) -> None:
        if each.lost is not None and each.key not in self._lost:
            self._lost.add(each.key)
            logger.error("%s has ended", each.name)
            each.lost()


def in_thread(function: Callable[[], Any], name: str) -> "Future[Any]":
    """What a function gives or raises that may wait for ever, in a thread of its own."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(function())
        except Exception as error:
            if not isinstance(error, AnabranchError | ConnectionError):
                logger.error("a bug: %s", name, exc_info=error)
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name=name).start()
    return future
