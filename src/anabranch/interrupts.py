"""Signals that end work of many parts, such as a study: also where a part would only note one, save what it has, and come back early."""

import os
import signal
import threading
from contextvars import ContextVar, Token
from types import FrameType
from typing import Any, Self

# Ctrl-C raises KeyboardInterrupt by itself.
_SIGNALS = (signal.SIGTERM, signal.SIGHUP)
# Not told by handlers: where all signals are ignored there is none.
_IS_ENDING: ContextVar[bool] = ContextVar("is_ending", default=False)


class Ending:
    """A context in which SIGTERM and SIGHUP raise KeyboardInterrupt, as SIGINT does.

    Trainings note signals instead, and save; within this context they raise it as well, once they have saved
    (`anabranch.train.interrupt.Interrupts`): their caller would take what has half been learned for what it asked for. SIGHUP stays ignored
    where it is (``nohup``). Signals reach the main thread alone, so in another thread nothing is caught.

    Args:
        ends_trainings: raise it there, too; otherwise the first signal that a training notes lets its caller go on, and the second raises.
    """

    def __init__(self, *, ends_trainings: bool = True) -> None:
        self._ends_trainings = ends_trainings
        self._previous: dict[signal.Signals, Any] = {}
        self._process = os.getpid()
        self._outside: Token[bool] | None = None

    def __enter__(self) -> Self:
        if self._ends_trainings:
            self._outside = _IS_ENDING.set(True)
        if threading.current_thread() is threading.main_thread():
            caught = [number for number in _SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._end) for number in caught}
        return self

    def _end(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            # A copy of the process, which is ended by whoever made it.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        raise KeyboardInterrupt

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self._outside is not None:
            _IS_ENDING.reset(self._outside)


def is_ending() -> bool:
    """Whether this is within an `Ending` that ends trainings."""
    return _IS_ENDING.get()
