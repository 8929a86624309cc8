"""Interrupts (Ctrl-C, alarms, and whatever else has a handler in Python) that wait for a moment at which nothing is half done."""

import _signal  # signal.getsignal makes an enum of what it finds, which takes longer than all else here
import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

Handler = Callable[[int, FrameType | None], Any]

# Those that come from outside and can be held back: not the ones that a fault of the program raises, which must not wait.
_FAULTS = {"SIGKILL", "SIGSTOP", "SIGSEGV", "SIGBUS", "SIGFPE", "SIGILL", "SIGABRT", "SIGTRAP", "SIGSYS"}
SIGNALS = tuple(
    int(one) for one in signal.Signals if one.name not in _FAULTS and not one.name.startswith(("SIGRT", "CTRL_"))
)
_SIGINT = int(signal.SIGINT)


class Interrupts:
    """Holds signals back while it is entered; at the end they go to whoever would have had them.

    A handler may raise, so that what runs ends in the middle. So this is entered before a lock is taken, and left after that is given back.
    Only the main thread is ever interrupted: elsewhere there is nothing to hold back, nor inside of another one. Signals that the system
    handles, or that are ignored, stay as they are; so do real-time signals.

    Args:
        passes: what is entered inside may end its work where it looks (`check`) for interrupts that are held back here.

    Attributes:
        has_come: whether one came since.
    """

    __slots__ = ("_came", "_held", "_outer", "_passes", "has_come")

    def __init__(self, *, passes: bool = False) -> None:
        self.has_come, self._passes = False, passes
        self._outer: Interrupts | None = None
        # What is held back, with the handlers of before; and what came of it, in that order, and was not told.
        self._held: list[tuple[int, Handler]] = []
        self._came: list[int] = []

    @property
    def is_holding(self) -> bool:
        """Whether an interrupt would be held back."""
        return bool(self._held)

    @property
    def is_due(self) -> bool:
        """Whether one came whose handler was not called."""
        return bool(self._came)

    def check(self) -> None:
        """Where work may end: raise KeyboardInterrupt if one has come that would have been that."""
        if self._outer is not None and self._outer._passes:
            self._outer.check()
        if self._came and _SIGINT in self._came and (_SIGINT, signal.default_int_handler) in self._held:
            self._came.remove(_SIGINT)
            raise KeyboardInterrupt

    def tell(self) -> None:
        """Where nothing is held and nothing half done: call the handlers of all that came, which may raise."""
        while self._came:
            number = self._came.pop(0)
            dict(self._held)[number](number, None)

    def __enter__(self) -> Self:
        if threading.get_ident() == threading.main_thread().ident:
            try:
                for number in SIGNALS:
                    before = _signal.getsignal(number)
                    # Not where it is ignored, left to the system, or held back already.
                    if not callable(before):
                        continue
                    if isinstance(outer := getattr(before, "__self__", None), Interrupts):
                        self._outer = outer
                        continue
                    self._held.append((number, before))
                    _signal.signal(number, self._note)
            except BaseException:
                # Of a handler that was not held back yet.
                self._give_back()
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._held:
            held = self._held.copy()
            self._give_back()
            # Also one that came just now.
            if self._came:
                handlers = dict(held)
                _tell([(number, handlers[number]) for number in self._came])

    def _give_back(self) -> None:
        """Set the handlers of before, all of them, also where one of them is called meanwhile and raises."""
        raised: BaseException | None = None
        while self._held:
            try:
                while self._held:
                    _signal.signal(*self._held[-1])
                    self._held.pop()
            except BaseException as error:
                raised = error
        if raised is not None:
            raise raised

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.has_come = True
        # Once, as the system holds it back.
        if number not in self._came:
            self._came.append(number)


def _tell(came: list[tuple[int, Handler]]) -> None:
    """Call handlers, each also where the one before raises."""
    if came:
        number, handler = came[0]
        try:
            handler(number, None)
        finally:
            _tell(came[1:])
