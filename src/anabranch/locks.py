"""Locks between processes: files that the system frees when their holder dies."""

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from anabranch.files import explained

try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None  # type: ignore[assignment]

__all__ = ["is_locked", "lock_open", "locked"]

_POLL_S = 0.05  # between two looks whether the other process is done


@contextmanager
def locked(path: str | Path, *, wait_s: float = 0.0, on_wait: Callable[[], object] = lambda: None) -> Iterator[bool]:
    """Hold the lock file ``path`` (hidden, named ``.NAME.lock``) meanwhile; yields False if another process has it.

    The system frees the lock when a process dies, however it dies; what is left of the file then means nothing. The folder must be
    there. Where there are no locks (Windows, some network file systems) everybody gets it. A copy of the process (fork) does not have it:
    what it leaves stays its parent's.

    Args:
        path: the file; it is removed afterwards.
        wait_s: seconds to wait for the other process, ``math.inf`` for as long as it takes. Default: do not wait.
        on_wait: called once if there is something to wait for.

    Raises DataError if the file cannot be made.
    """
    handle = None if fcntl is None else _lock(Path(path))
    end = time.monotonic() + wait_s
    if fcntl is not None and handle is None and wait_s > 0:
        on_wait()
    while fcntl is not None and handle is None and time.monotonic() < end:
        time.sleep(_POLL_S)
        handle = _lock(Path(path))
    if fcntl is None or handle is not None:
        try:
            owner = os.getpid()
            yield True
        finally:
            if handle is not None and owner != os.getpid():
                os.close(handle)
            elif handle is not None:
                # While it is still held: whoever opened the file before sees that it is no longer there, and makes another.
                Path(path).unlink(missing_ok=True)
                os.close(handle)
    else:
        yield False


def lock_open(handle: int) -> bool:
    """Whether this process has now locked an open file itself, by whatever name it was opened, until ``handle`` is closed.

    False where another has. Everybody gets it where there are no locks, see `locked`.
    """
    return _try_lock(handle)


def is_locked(path: str | Path) -> bool:
    """Whether a process holds the lock file ``path`` now."""
    try:
        handle = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        return not _try_lock(handle, shared=True)
    finally:
        os.close(handle)


def _lock(path: Path) -> int | None:
    """An open handle of the lock file with its lock, or None if another process has it."""
    while True:
        with explained(path):
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _try_lock(handle):
                os.close(handle)
                return None
            # The holder before may have removed the file after we opened it: a lock on what nobody else can find is none.
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _try_lock(handle: int, *, shared: bool = False) -> bool:
    if fcntl is None:
        return True
    try:
        fcntl.flock(handle, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
            raise
    return True
