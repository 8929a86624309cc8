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


class Watchdog:
    """Asks the ranks of the instance that serves for signs of life, in a thread.

    Args:
        active: the instance that serves now, if one does.
        patience_s: for an answer.
    """

    def __init__(self, active: Callable[[], Instance | None], patience_s: float) -> None:
        self._active, self._patience_s = active, patience_s
        self._asked: dict[tuple[Instance, int], tuple[Future[Any], float]] = {}
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="anabranch-watchdog")
        self._thread.start()

    def close(self) -> None:
        """End it. Idempotent."""
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._is_over.wait(self._patience_s / 4):
            instance = self._active()
            if instance is None or instance.is_broken or instance.is_closed:
                self._asked.clear()
                continue
            now = time.monotonic()
            self._asked = {
                (instance, device): self._asked.get((instance, device)) or (instance.call(device, "ping"), now)
                for device in instance.devices
            }
            for (_, device), (future, since) in list(self._asked.items()):
                if future.done():
                    del self._asked[instance, device]
                elif now - since > self._patience_s:
                    logger.error(
                        "device %d: its rank gives no sign of life for %g s, and is ended", device, self._patience_s
                    )
                    instance.kill(device)
