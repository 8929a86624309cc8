"""How the log tells of an exception that may quote what somebody asked."""

from pathlib import Path

from anabranch.web.turns import UnusualError, words

__all__ = ["plain", "raised", "words"]


def plain(error: BaseException) -> BaseException:
    """What was raised in truth, where it is told as an `UnusualError`."""
    return error.__cause__ or error if isinstance(error, UnusualError) else error


def raised(error: BaseException) -> str:
    """What was raised and where, without its text: ``KeyError at anthropic.py:120``."""
    error = plain(error)
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = "" if trace is None else f" at {Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}"
    return type(error).__name__ + where
