"""Ctrl-C, SIGTERM and a terminal that is closed as a request to stop, so that training can save before it ends; and other processes that
have ended.
"""

import re
import signal
import threading
from types import FrameType
from typing import Any, Self

from anabranch.interrupts import is_ending

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """A context in which the first SIGINT, SIGTERM or SIGHUP is only noted, in ``received``; the second acts as it would outside.

    Within `anabranch.interrupts.Ending` KeyboardInterrupt is raised where it is left, if one was noted and nothing else was raised.

    SIGHUP stays ignored where it is (``nohup``). Signals reach the main thread alone, so in another thread nothing is caught.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            ignored = signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            caught = [number for number in _SIGNALS if not (ignored and number == signal.SIGHUP)]
            self._previous = {number: signal.signal(number, self._note) for number in caught}
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def __exit__(self, raised: type[BaseException] | None, *_: object) -> None:
        self._restore()
        if self.received is not None and raised is None and is_ending():
            raise KeyboardInterrupt


# What gloo and NCCL say where the other end is gone.
_LOST = re.compile(
    r"connection (was )?(closed|reset) by (remote )?peer|broken pipe|ncclRemoteError|remote process exited",
    re.IGNORECASE,
)


def has_lost_process(error: BaseException) -> bool:
    """Whether an error of a collective operation, or one that it caused, says that another process is gone."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, RuntimeError) and _LOST.search(str(found)):
            return True
        found = found.__cause__ or found.__context__
    return False
