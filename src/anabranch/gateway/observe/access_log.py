"""`AccessLog`: one JSON object a line for each request, written by a thread, so that no request waits for a disk.

What a full disk or a slow pipe leaves no room for is left out and counted; requests go on. A line is written whole or, where the file
refuses the rest of it, ended before the next.
"""

import json
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from anabranch.errors import ConfigError

logger = logging.getLogger(__name__)
STDOUT = "-"

# Lines that wait, at most.
MOST = 10_000

# Of one write, and how long `close` waits for what is left.
GATHERED = 256
LEAVE_S = 2.0


class AccessLog:
    """One log. Its methods may be called from any thread, and do not wait.

    Args:
        path: of the file, made if it is not there and appended to, by several processes too; ``-`` is stdout.
        on_dropped: called, in any thread, with how many lines were left out.
        most: lines that may wait to be written.

    Raises ConfigError if the file cannot be opened.
    """

    def __init__(self, path: str, on_dropped: Callable[[int], None] = lambda count: None, most: int = MOST) -> None:
        self.path, self._on_dropped, self._most = path, on_dropped, most
        self._lines: deque[Mapping[str, Any]] = deque()
        self._wake, self._ends, self._is_to_reopen = threading.Event(), False, False
        self._is_broken = self._has_rest = False
        self._file = self._opened()
        self._thread = threading.Thread(target=self._run, name="anabranch-access-log", daemon=True)
        self._thread.start()

    def put(self, line: Mapping[str, Any]) -> None:
        """Have a line written, which nobody changes any more."""
        if len(self._lines) >= self._most or self._ends:
            self._on_dropped(1)
            return
        self._lines.append(line)
        self._wake.set()

    def reopen(self) -> None:
        """Go on in the file that is at the path by then: the old one was moved away."""
        self._is_to_reopen = True
        self._wake.set()

    def close(self) -> None:
        """Write what waits, and end; what cannot be written within `LEAVE_S` is given up."""
        self._ends = True
        self._wake.set()
        self._thread.join(LEAVE_S)
        if self._thread.is_alive():
            logger.warning("the access log %s does not take its last %d lines", self.path, len(self._lines))

    def _opened(self) -> int:
        if self.path == STDOUT:
            return os.dup(1)
        try:
            return os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o640)
        except (OSError, ValueError) as error:
            reason = (getattr(error, "strerror", None) or str(error)).lower()
            raise ConfigError(f"log.access: cannot write to {self.path!r}: {reason}") from None

    # The rest runs in the thread.

    def _run(self) -> None:
        while not (self._ends and not self._lines):
            self._wake.wait()
            self._wake.clear()
            if self._is_to_reopen:
                self._is_to_reopen = False
                self._reopen()
            while self._lines:
                self._write([self._lines.popleft() for _ in range(min(GATHERED, len(self._lines)))])
        os.close(self._file)

    def _reopen(self) -> None:
        try:
            new = self._opened()
        except ConfigError as error:
            logger.error("%s; it goes on where it was", error)
            return
        os.close(self._file)
        self._file, self._has_rest = new, False

    def _write(self, lines: list[Mapping[str, Any]]) -> None:
        # One write of whole lines: several processes may append to one file.
        data = b"".join(json.dumps(line, separators=(",", ":")).encode() + b"\n" for line in lines)
        if self._has_rest:
            data = b"\n" + data
        left = memoryview(data)
        try:
            while left:
                left = left[os.write(self._file, left) :]
                self._has_rest = bool(left) and data[len(data) - len(left) - 1] != ord("\n")
        except OSError as error:
            if not self._is_broken:
                logger.error("the access log %s cannot be written: %s; lines are left out", self.path, error.strerror)
            self._is_broken = True
            self._on_dropped(bytes(left).count(b"\n"))
            return
        if self._is_broken:
            logger.warning("the access log %s can be written again", self.path)
        self._is_broken = False
