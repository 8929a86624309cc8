"""The other side of `anabranch.sandbox`: a process that answers requests within limits of time and memory.

A line in is a number and JSON; the line out is the same number and JSON (``answer`` or ``error``). They go through the two file
descriptors that the command line names: anything may print to the standard ones. It imports nothing that takes long to start.
"""

import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["OUT_OF_MEMORY", "Limits", "serve"]

OUT_OF_MEMORY = 3  # exit code


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one request may take.

    Attributes:
        seconds: of computing.
        memory: bytes of address space of the process.
        is_beyond_start: ``memory`` counts from what the process has before its first request.
        stack: bytes of stack; None for as much as the system gives.
    """

    seconds: float
    memory: int
    is_beyond_start: bool = False
    stack: int | None = None

    @property
    def memory_text(self) -> str:
        """``memory`` for a message."""
        return f"{self.memory >> 30} GiB" if self.memory >= 1 << 30 else f"{self.memory >> 20} MiB"


def serve(answer: Callable[[bytes], dict[str, Any]], limits: Limits) -> None:
    """Answer requests until there are no more; call it when all is imported, which does not count.

    Args:
        answer: from a request in JSON to {"answer": text or list} or {"error": text}.
        limits: of each request. What passes them ends the process.
    """
    # The mask of the thread that started this process is ours too, and would hold back the signal that ends it.
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
    requests, answers = open(int(sys.argv[1]), "rb"), open(int(sys.argv[2]), "wb")  # for its whole life
    _limit(limits)
    try:
        for line in requests:
            number, _, request = line.partition(b" ")
            with _limited_time(limits.seconds):
                text = json.dumps(answer(request))
            answers.write(b"%s %s\n" % (number, text.encode()))
            answers.flush()
    except MemoryError:
        os._exit(OUT_OF_MEMORY)


def _limit(limits: Limits) -> None:
    """Memory and stack, where the system can: Windows has no such limits, and macOS takes that of memory for none it knows."""
    with contextlib.suppress(ImportError):
        import resource

        memory = limits.memory + (_address_space() if limits.is_beyond_start else 0)
        for kind, wanted in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_STACK, limits.stack)):
            if wanted is None:
                continue
            with contextlib.suppress(ValueError, OSError):
                hard = resource.getrlimit(kind)[1]
                resource.setrlimit(kind, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def _address_space() -> int:
    """Bytes that this process has now; a generous guess where the system does not say."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 1 << 30


@contextlib.contextmanager
def _limited_time(seconds: float) -> Iterator[None]:
    """Ends the process after so much computing, in the middle of whatever it does; on Windows only who waits for it does."""
    if not hasattr(signal, "setitimer"):
        yield
        return
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    yield
    signal.setitimer(signal.ITIMER_PROF, 0)
