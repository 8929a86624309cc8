"""Processes that are forked while another thread compiles: they find Numba as it is between two kernels, not in the middle of one.

Numba compiles under one lock for the whole process. A child that is forked while another thread has it would wait for that thread, which it
has not, for ever, and what that thread had begun (types, libraries of LLVM) would be half there. So a fork waits until no other thread
compiles: as long as one kernel takes, seconds where it was not kept from before. Programs that are started (`subprocess`, multiprocessing's
"spawn") do not wait.
"""

# Its handler has to come after ours, as it does if it is registered before: who compiles logs, too.
import logging  # noqa: F401
import os
import sys
import threading
from typing import Any

# Threads that fork and have the lock; one at most, but for the moment in which it goes from one to the next.
_forking: set[int] = set()


def _compiler_lock() -> Any:
    """Numba's, None where it is not loaded, or only half."""
    return getattr(sys.modules.get("numba.core.compiler_lock"), "global_compiler_lock", None)


def before() -> None:
    """Wait for whoever compiles."""
    lock = _compiler_lock()
    if lock is not None:
        lock.acquire()
        _forking.add(threading.get_ident())


def after_in_parent() -> None:
    """Let others compile again."""
    if threading.get_ident() in _forking:
        _forking.discard(threading.get_ident())
        _compiler_lock().release()


def after_in_child() -> None:
    """The same; where the wait was broken off by an interrupt, nobody is left who could give the lock back, so it is made anew."""
    lock = _compiler_lock()
    if threading.get_ident() in _forking:
        lock.release()
    elif lock is not None:
        lock._lock = threading.RLock()
    _forking.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=before, after_in_parent=after_in_parent, after_in_child=after_in_child)
