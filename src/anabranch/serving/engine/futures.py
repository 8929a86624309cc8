"""`both`: one future for two; `after`: one that follows another."""

import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Executor, Future, InvalidStateError
from contextlib import suppress
from typing import Any

__all__ = ["after", "both"]


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


def after(first: "Future[Any] | None", executor: Executor, work: Callable[[], Any]) -> "Future[Any]":
    """``work`` in a thread of ``executor`` once ``first`` is done, at once where there is none; it raises what ``first`` raises.

    To cancel it cancels ``first``, and work that has not begun.
    """
    made: Future[Any] = Future()

    def run() -> None:
        if not made.set_running_or_notify_cancel():
            return
        try:
            made.set_result(work())
        except BaseException as error:
            made.set_exception(error)

    def begin(future: "Future[Any] | None") -> None:
        error = None if future is None else CancelledError() if future.cancelled() else future.exception()
        # Whoever waited may have cancelled.
        with suppress(InvalidStateError):
            if isinstance(error, CancelledError):
                made.cancel()
            elif error is not None:
                made.set_exception(error)
            else:
                try:
                    executor.submit(run)
                except RuntimeError:
                    # It was shut down: the engine ends.
                    made.cancel()

    if first is None:
        begin(None)
    else:
        made.add_done_callback(lambda future: first.cancel() if future.cancelled() else None)
        first.add_done_callback(begin)
    return made
