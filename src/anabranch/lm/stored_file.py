"""`StoredFile`: bytes of a file of weights, read and never mapped.

Whoever maps a file that another process shortens is ended by the system (SIGBUS) at the next page behind its end, and finds other numbers
where it is written into. A read tells both, as an error of the one who reads.
"""

import os
import threading
import weakref
from pathlib import Path
from typing import BinaryIO

import numpy as np

from anabranch.errors import CheckpointError

__all__ = ["StoredFile", "state_of", "written_to"]


class StoredFile:
    """A file that is open as long as this is there, whatever becomes of its name; for several threads and forked processes at once.

    Raises OSError for one that cannot be opened.

    Attributes:
        path: its name when it was opened.
        size: bytes, then.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        self._finalizer = weakref.finalize(self, os.close, self._handle)
        self._was = self._now()
        self.size = self._was[0]
        self._lock = threading.Lock()

    def read(self, offset: int, num_bytes: int) -> np.ndarray:
        """So many bytes from ``offset`` on, uint8 in memory of their own.

        Raises CheckpointError where the file is no longer what it was when it was opened, or cannot be read.
        """
        found = np.empty(num_bytes, np.uint8)
        into, done = found.data, 0
        try:
            while done < num_bytes and (count := self._some(into[done:], offset + done)):
                done += count
        except OSError as error:
            raise CheckpointError(f"cannot read {self.path}: {error}") from None
        # Looked at behind the read, which may have met what was being written.
        self.check()
        if done < num_bytes:
            raise CheckpointError(f"{self.path} ends before byte {offset + num_bytes}; it is truncated, copy it again")
        return found

    def check(self) -> None:
        """Raise CheckpointError where the file is no longer what it was when it was opened."""
        if self._now() != self._was:
            raise written_to(self.path)

    def check_name(self) -> None:
        """Raise CheckpointError where the name is of another file by now: what was read by that belongs to that one."""
        try:
            is_same = os.path.samestat(os.stat(self.path), os.fstat(self._handle))
        except OSError:
            is_same = False
        if not is_same:
            raise CheckpointError(f"{self.path} was replaced while it was opened; read it again")

    def beginning(self) -> BinaryIO:
        """The file to read from its first byte on. Nobody else may read meanwhile."""
        os.lseek(self._handle, 0, os.SEEK_SET)
        return os.fdopen(os.dup(self._handle), "rb")

    def _some(self, into: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._handle, [into], offset)
        with self._lock:
            os.lseek(self._handle, offset, os.SEEK_SET)
            part = os.read(self._handle, len(into))
        into[: len(part)] = part
        return len(part)

    def _now(self) -> tuple[int, int]:
        return state_of(self._handle)


def state_of(handle: int) -> tuple[int, int]:
    """(bytes, time of change in nanoseconds) of an open file: whoever writes to it changes one of them."""
    found = os.fstat(handle)
    return found.st_size, found.st_mtime_ns


def written_to(path: Path) -> CheckpointError:
    """The error for a file that is no longer what it was when it was opened."""
    return CheckpointError(
        f"{path} was written to while it was in use; start again, and replace such a file by renaming another to its name"
    )
