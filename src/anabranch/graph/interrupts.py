"""Interrupts (Ctrl-C) that wait for a moment at which nothing is half done."""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self


class Interrupts:
    """Holds SIGINT back while it is entered; at the end it goes to whoever would have had it.

    So it is entered before a lock is taken, and left after that is given back. Only the main thread is ever interrupted: elsewhere there is
    nothing to hold back, nor inside of another one.

    Attributes:
        has_come: whether one came since.
    """

    __slots__ = ("_before", "_is_told", "has_come")

    def __init__(self) -> None:
        self.has_come = self._is_told = False
        self._before: Callable[[int, FrameType | None], Any] | None = None

    @property
    def is_holding(self) -> bool:
        """Whether an interrupt would be held back."""
        return self._before is not None

    def check(self) -> None:
        """Where work may end: raise KeyboardInterrupt if one has come that would have been that."""
        if self.has_come and self._before is signal.default_int_handler:
            self._is_told = True
            raise KeyboardInterrupt

    def __enter__(self) -> Self:
        if threading.get_ident() == threading.main_thread().ident:
            before = signal.getsignal(signal.SIGINT)
            # Not where it is ignored, left to the system, or held back already.
            if callable(before) and not isinstance(getattr(before, "__self__", None), Interrupts):
                signal.signal(signal.SIGINT, self._note)
                self._before = before
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        before = self._before
        if before is not None:
            signal.signal(signal.SIGINT, before)
            self._before = None
            if self.has_come and not self._is_told:
                before(signal.SIGINT, None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.has_come = True
