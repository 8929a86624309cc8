"""Interrupts (Ctrl-C) that wait for a moment at which what is being changed is whole."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Interrupts:
    """Whether one has come.

    Attributes:
        has_come: since the work began.
    """

    def __init__(self) -> None:
        self.has_come = False

    def check(self) -> None:
        """Raise KeyboardInterrupt if one has come: called where work may end."""
        if self.has_come:
            raise KeyboardInterrupt


@contextmanager
def held_back() -> Iterator[Interrupts]:
    """Hold SIGINT back while arrays are changed; at the end it goes to whoever would have had it.

    Only the main thread is ever interrupted, so elsewhere there is nothing to hold back.
    """
    found = Interrupts()
    if threading.current_thread() is not threading.main_thread():
        yield found
        return
    before: Callable[[int, FrameType | None], Any] | int | None = signal.getsignal(signal.SIGINT)
    if not callable(before):
        # Ignored, left to the system, or set by something that is not Python.
        yield found
        return

    def note(number: int, frame: FrameType | None) -> None:
        found.has_come = True

    signal.signal(signal.SIGINT, note)
    is_raised = False
    try:
        yield found
    except KeyboardInterrupt:
        # By `check`: it has been told.
        is_raised = True
        raise
    finally:
        signal.signal(signal.SIGINT, before)
        if found.has_come and not is_raised:
            before(signal.SIGINT, None)
