"""What a `LiveIndex` does by itself: it brings the log to the disk every so often, and writes a snapshot once the log is long."""

import contextlib
import logging
import threading
import time
from pathlib import Path
from typing import Any, Protocol

from anabranch import machine
from anabranch.errors import AnabranchError, DataError
from anabranch.graph.interrupts import Interrupts
from anabranch.graph.live.folder import write_snapshot
from anabranch.graph.live.group import Groups
from anabranch.graph.live.logs import Logs

logger = logging.getLogger(__name__)


class RetiredError(DataError):
    """The index takes no changes any more."""


class Live(Protocol):
    """What is looked at of a `LiveIndex`."""

    path: Path
    index: Any
    base: str
    snapshot_bytes: int
    num_named: int
    logs: Logs
    groups: Groups
    is_closed: bool

    def check(self) -> None:
        """Raise DataError where no changes are taken any more."""

    def snapshot(self) -> None:
        """Write one."""

    def new_names(self) -> list[Any]:
        """Names that changes brought."""


class Flusher:
    """Brings the log of an index to the disk every so many seconds, until it is closed."""

    def __init__(self, live: Live, every_s: float) -> None:
        self._live, self._every_s, self._end = live, every_s, threading.Event()
        self._thread = threading.Thread(target=self._run, name="flush", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        logs = self._live.logs
        while not self._end.wait(self._every_s):
            log = logs.current
            try:
                # One that was replaced meanwhile is on the disk.
                if log is not None and log.failure is None:
                    logs.sync(log)
            except (AnabranchError, OSError) as error:
                logger.error("%s: no changes are taken any more: %s", self._live.path, error)

    def close(self) -> None:
        """End the thread."""
        self._end.set()
        self._thread.join()


class Snapshots:
    """Writes snapshots of an index, one at a time.

    Attributes:
        lock: held while one is written.
        thread: that writes one, or wrote the last; None before the first.
    """

    def __init__(self, live: Live) -> None:
        self._live, self.lock = live, threading.Lock()
        self.thread: threading.Thread | None = None
        self._retry_bytes = 0

    def begin_if_due(self) -> None:
        """Write one in a thread if the log is long and none is being written."""
        live = self._live
        if live.logs.size <= max(live.snapshot_bytes, self._retry_bytes):
            return
        if live.is_closed or (self.thread is not None and self.thread.is_alive()):
            return
        self.thread = threading.Thread(target=self._write_or_warn, name="snapshot", daemon=True)
        self.thread.start()

    def join(self) -> None:
        """Wait for the thread, unless this is it."""
        if self.thread is not None and self.thread is not threading.current_thread():
            self.thread.join()

    def _write_or_warn(self) -> None:
        live = self._live
        try:
            live.snapshot()
        except RetiredError:
            logger.debug("%s was closed before its snapshot", live.path)
        except Exception as error:
            # Not at every change from now on.
            self._retry_bytes = live.logs.size + live.snapshot_bytes
            logger.warning("%s: a snapshot could not be written, the log goes on: %s", live.path, error)

    def write(self) -> None:
        """See `LiveIndex.snapshot`."""
        live = self._live
        with Interrupts(), self.lock, contextlib.ExitStack() as turn:
            turn.enter_context(live.groups.turn)
            with live.groups.changed:
                live.check()
            if live.logs.current is None:
                return
            try:
                self._write(turn)
            except BaseException:
                live.logs.counts.failed += 1
                raise
            live.logs.counts.snapshots += 1
            live.logs.counts.snapshot_at = time.time()
            self._retry_bytes = 0

    def _write(self, turn: contextlib.ExitStack) -> None:
        live = self._live
        number = live.logs.rotate()
        is_copied = 2 * live.index.size_bytes < machine.room_bytes()
        state, names = live.index._state(copy=is_copied), live.new_names()
        if is_copied:
            # The rest is between this thread and the disk.
            turn.close()
        if names:
            state["meta"] = {**state["meta"], "names": names}
        write_snapshot(live.logs.folder, state, live.base, number, live.num_named)
        live.logs.forget_older()
