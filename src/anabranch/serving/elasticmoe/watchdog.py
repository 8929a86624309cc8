"""`Watchdog`: a rank that has stopped, without having died, is ended: what becomes of it then is a recovery."""

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from anabranch.serving.elasticmoe.instance import Instance

__all__ = ["Watchdog"]

logger = logging.getLogger(__name__)


class _Ping:
    """A question to one rank.

    Attributes:
        future: its answer.
        heard: seconds of `time.monotonic` at which the rank gave its last sign of life.
    """

    def __init__(self, future: Future[Any], heard: float) -> None:
        self.future, self.heard = future, heard
        future.add_done_callback(self._answered)

    def _answered(self, future: Future[Any]) -> None:
        self.heard = time.monotonic()


class Watchdog:
    """Asks the ranks of the instance that serves for signs of life, in a thread.

    Args:
        active: the instance that serves now, if one does.
        patience_s: from a rank's last sign of life to its end.
    """

    def __init__(self, active: Callable[[], Instance | None], patience_s: float) -> None:
        self._active, self._patience_s = active, patience_s
        self._pings: dict[tuple[Instance, int], _Ping] = {}
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="anabranch-watchdog")
        self._thread.start()

    def close(self) -> None:
        """End it. Idempotent."""
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        wait_s = self._patience_s / 4
        while not self._is_over.wait(wait_s):
            wait_s = min(self._patience_s / 4, self._look())

    def _look(self) -> float:
        """Ask ranks that have answered once more, end those that are too late; gives the seconds until the next one would be."""
        instance = self._active()
        if instance is None or instance.is_broken or instance.is_closed:
            self._pings.clear()
            return self._patience_s
        before, self._pings = self._pings, {}
        left_s = self._patience_s
        for device in instance.devices:
            ping = before.get((instance, device))
            if ping is None or ping.future.done():
                ping = _Ping(instance.call(device, "ping"), time.monotonic() if ping is None else ping.heard)
            silent_s = time.monotonic() - ping.heard
            if silent_s < self._patience_s:
                self._pings[instance, device] = ping
                left_s = min(left_s, self._patience_s - silent_s)
                continue
            logger.error("device %d: its rank gives no sign of life for %g s, and is ended", device, self._patience_s)
            instance.kill(device)
        return left_s
