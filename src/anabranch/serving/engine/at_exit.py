"""Threads that compute end before the interpreter does: what the system's libraries have begun in one cannot be cut off there.

A thread that comes back from native code into an interpreter that is going away is ended by force, and the process with it (SIGABRT).
"""

import atexit
import ctypes
import threading
import time
from collections.abc import Callable
from weakref import WeakKeyDictionary

__all__ = ["end_before_exit", "interrupt"]

# Seconds that all of them together have: what a step, or one read of a model's file, takes at most.
END_S = 20.0

_THREADS: "WeakKeyDictionary[threading.Thread, Callable[[], None]]" = WeakKeyDictionary()


def end_before_exit(thread: threading.Thread, end: Callable[[], None]) -> None:
    """Have ``end`` called, and ``thread`` waited for, if it still runs when the interpreter ends."""
    _THREADS[thread] = end


def interrupt(thread: threading.Thread) -> None:
    """Raise SystemExit in a thread, at the next Python instruction that it comes to."""
    if thread.ident is not None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))


@atexit.register
def _end_all() -> None:
    running = [(thread, end) for thread, end in _THREADS.items() if thread.is_alive()]
    for _, end in running:
        end()
    end_s = time.monotonic() + END_S
    for thread, _ in running:
        thread.join(max(0.0, end_s - time.monotonic()))
