"""`both`: one future for two."""

import threading
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from typing import Any

__all__ = ["both"]


def both(first: "Future[Any] | None", second: "Future[Any] | None") -> "Future[Any] | None":
    """What is done when both are: it gives what they give, or raises what one of them raises first. To cancel it cancels both.

    None where there is neither; where there is one, that.
    """
    if first is None or second is None:
        return first if second is None else second
    parts = first, second
    made: Future[Any] = Future()
    lock = threading.Lock()
    left = {0, 1}

    def done(number: int, future: "Future[Any]") -> None:
        with lock:
            left.discard(number)
            is_last = not left
        # Whoever waited may have cancelled, or been told of an error already.
        with suppress(InvalidStateError):
            if future.cancelled():
                made.cancel()
            elif (error := future.exception()) is not None:
                made.set_exception(error)
            elif is_last and not made.done():
                made.set_result(tuple(part.result() for part in parts))

    def told(future: "Future[Any]") -> None:
        if future.cancelled():
            for part in parts:
                part.cancel()

    made.add_done_callback(told)
    first.add_done_callback(lambda future: done(0, future))
    second.add_done_callback(lambda future: done(1, future))
    return made
