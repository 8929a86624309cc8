"""`DirectFile`: reading past the page cache. What is read takes no second place in memory, and no time to be put there."""

import errno
import mmap
import os
import threading
from pathlib import Path

import numpy as np

from anabranch.lm.stored_file import state_of, written_to
from anabranch.nn import kernels
from anabranch.nn.kernels.binding import Kernel
from anabranch.nn.kernels.transfers import CACHED, DIRECT

__all__ = ["DirectFile"]

# What places and lengths must be whole numbers of, on every device that we know.
BLOCK = 4096

# Bytes of a thread's buffer.
CHUNK = 4 << 20

# Largest piece of a file that the system keeps or forgets as a whole.
FOLIO = 2 << 20

READ_DIRECT = Kernel(
    "anabranch_read_direct",
    "file: int, offset: int64, L, into: uint8[L] array out, buffer: uint8[Q] array out, Q",
    where=(f"Q > 0 and Q % {BLOCK} == 0",),
    result="int64",
)


class DirectFile:
    """A file to read from, through the page cache or past it; for several threads at once.

    Past it: where the file system has O_DIRECT, whole blocks go from the device into a buffer of the reading thread and from there where
    they are wanted, in about 0.6 of the time of a read through the cache and an eighth of the processor's. Elsewhere the file is read as
    usual, and the system is told to forget it. Raises OSError for a file that cannot be opened.

    Attributes:
        is_direct: whether there is O_DIRECT; no longer once the file system has refused such a read.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._cached = path, os.open(path, os.O_RDONLY)
        self._was = state_of(self._cached)
        self._direct = _open_direct(path)
        self.is_direct = self._direct is not None
        self._own = threading.local()

    def read(self, offset: int, into: memoryview, *, past_cache: bool = False) -> int:
        """Read from ``offset`` on until ``into`` is full or the file ends; gives the bytes read."""
        if past_cache and self.is_direct:
            try:
                return self._in_blocks(offset, into)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                # The file system opens such files, and does not read them.
                self.is_direct = False
        count = self._through_cache(offset, into)
        if past_cache:
            _forget(self._cached, offset, count)
        return count

    def check(self) -> None:
        """Raise CheckpointError where the file is no longer what it was when it was opened; what was read of it may be of both."""
        if state_of(self._cached) != self._was:
            raise written_to(self._path)

    def source(self, *, past_cache: bool = False) -> tuple[int, int] | None:
        """(kind, handle) of `transfers.Piece`, for who reads it himself; None if the system would have to be told to forget it after."""
        if not past_cache:
            return CACHED, self._cached
        return (DIRECT, self._direct) if self.is_direct and self._direct is not None else None

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._cached)
        if self._direct is not None:
            os.close(self._direct)

    def _through_cache(self, offset: int, into: memoryview) -> int:
        done = 0
        while done < len(into) and (count := os.preadv(self._cached, [into[done:]], offset + done)):
            done += count
        return done

    def _in_blocks(self, offset: int, into: memoryview) -> int:
        assert self._direct is not None
        if not hasattr(self._own, "buffer"):
            # Its pages are whole blocks.
            self._own.buffer = np.frombuffer(mmap.mmap(-1, CHUNK), np.uint8)
        place, buffer = np.frombuffer(into, np.uint8), self._own.buffer
        if kernels.load() is None:
            return self._block_by_block(offset, place, buffer)
        done = READ_DIRECT(self._direct, offset, place, buffer)
        if done < 0:
            raise OSError(-done, os.strerror(-done))
        return done

    def _block_by_block(self, offset: int, place: np.ndarray, buffer: np.ndarray) -> int:
        """As the compiled one, where that could not be compiled."""
        assert self._direct is not None
        done = 0
        while done < len(place):
            first = (offset + done) // BLOCK * BLOCK
            skipped = offset + done - first
            size = min(CHUNK, -(-(skipped + len(place) - done) // BLOCK) * BLOCK)
            count = min(os.preadv(self._direct, [buffer[:size].data], first) - skipped, len(place) - done)
            if count <= 0:
                break
            place[done : done + count] = buffer[skipped : skipped + count]
            done += count
        return done


def _open_direct(path: Path) -> int | None:
    if not hasattr(os, "O_DIRECT"):
        return None
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        # A file system without it.
        return None


def _forget(handle: int, offset: int, length: int) -> None:
    """Let the page cache drop this part of a file. What is kept in one piece is dropped only whole, so neighbours go as well."""
    if hasattr(os, "posix_fadvise"):
        start = offset // FOLIO * FOLIO
        os.posix_fadvise(handle, start, -(-(offset + length) // FOLIO) * FOLIO - start, os.POSIX_FADV_DONTNEED)
