"""`Turnstile`: a lock that is had in turn: who lets go of it and comes again is behind whoever waits."""

import threading
from types import TracebackType

__all__ = ["Turnstile"]


class Turnstile:
    """With ``with``, of one thread at a time; it is not to be entered again within."""

    def __init__(self) -> None:
        # Who waits has the first, so that whoever comes next waits for that.
        self._next, self._inside = threading.Lock(), threading.Lock()

    def __enter__(self) -> None:
        with self._next:
            self._inside.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._inside.release()
