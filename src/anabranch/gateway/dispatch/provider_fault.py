"""What a provider says went wrong, whoever wrote it, as the dispatcher may trust it.

It decides where the request goes next, what is held against the deployment, how long that rests and what the attempt is charged: a word
that is none of the vocabulary, or a time without end, would break that off in the middle, with the attempt still counted in.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from numbers import Real
from typing import Any, TypeVar, get_args

from anabranch.gateway.logged_error import plain
from anabranch.gateway.plain_values import said, truth_of, whole_of
from anabranch.gateway.providers.error_body import MESSAGE_LETTERS, RETRY_AFTER_S, WORD_LETTERS
from anabranch.gateway.providers.provider import Failure, FailureKind, Headers, Provider, UpstreamError
from anabranch.gateway.providers.vocabulary import Hint
from anabranch.web.turns import plainly

__all__ = ["STATUSES", "OddFailureError", "UnreadRefusalError", "as_failure", "checked", "refusal"]

logger = logging.getLogger(__name__)

T = TypeVar("T", bound=str)

KINDS: tuple[FailureKind, ...] = get_args(FailureKind)
HINTS: tuple[Hint, ...] = get_args(Hint)

# Some servers answer with one beyond 599.
STATUSES = range(100, 1000)

# Of an answer that may have been made, and billed, though none came.
MAY_BE_MADE: tuple[FailureKind, ...] = ("timeout", "first_token", "cut", "deadline")

# Of a message: ours quote one of an upstream, and say more.
LETTERS = 4 * MESSAGE_LETTERS


class OddFailureError(ValueError):
    """What a provider gave is no `Failure`: which field, what stands there, and what may."""


class UnreadRefusalError(ValueError):
    """A provider fails, its cause, at saying what an answer means that is none; ``status`` is that of the answer."""

    def __init__(self, status: int) -> None:
        super().__init__(f"an answer of status {status} could not be read")
        self.status = status


def as_failure(error: Exception, name: str) -> UpstreamError:
    """What went wrong at deployment ``name``. An exception that a provider may not raise, or that says nothing which can be read, is a
    fault of the provider, not of the request."""
    status = error.status if isinstance(error, UnreadRefusalError) else None
    if isinstance(error, UnreadRefusalError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, UpstreamError):
        try:
            return checked(error)
        except Exception as odd:
            error = odd
    logger.error("the provider of deployment %s failed", name, exc_info=error)
    return UpstreamError(
        Failure(
            kind="garbage",
            message=f"the provider of {name} failed ({type(plain(error)).__name__}); the log says how",
            status=status,
        )
    )


def refusal(provider: Provider, status: int, headers: Headers, body: bytes) -> UpstreamError:
    """What ``provider`` makes of an answer that is none. Raises UnreadRefusalError for whatever it fails with.

    The answer has a status, whether its provider says so or not: by it is told that nothing was made, and is billed. One that says in other
    words that something may have been keeps its silence.
    """
    try:
        failure = plainly(lambda: _failure(provider.error(status, headers, body)))
    except Exception as error:
        raise UnreadRefusalError(status) from error
    if failure.status is None and failure.kind not in MAY_BE_MADE:
        failure = replace(failure, status=status)
    return UpstreamError(failure)


def checked(error: UpstreamError) -> UpstreamError:
    """What it says, by itself: nothing else of it is trusted. Raises OddFailureError, or whatever reading it fails with."""
    return plainly(lambda: UpstreamError(_failure(error.failure)))


def _failure(given: Any) -> Failure:
    """The same, of plain values. Raises OddFailureError."""
    if not isinstance(given, Failure):
        raise OddFailureError(f"a failure is {type(given).__name__}; it must be a Failure")
    crowded = truth_of(given.is_crowded)
    if crowded is None:
        raise OddFailureError(f"is_crowded of a failure is {said(given.is_crowded)}; it must be True or False")
    message = _text("message", given.message, LETTERS)
    if message is None:
        raise OddFailureError("message of a failure is None; it must be a text")
    kind = _word("kind", given.kind, KINDS)
    return Failure(
        kind=kind,
        message=message,
        status=_status(given.status),
        retry_after_s=_seconds(given.retry_after_s),
        type=_text("type", given.type, WORD_LETTERS),
        code=_text("code", given.code, WORD_LETTERS),
        is_crowded=crowded,
        param=_text("param", given.param, WORD_LETTERS),
        hint=None if given.hint is None else _word("hint", given.hint, HINTS),
    )


def _word(name: str, given: Any, known: Sequence[T]) -> T:
    found = [word for word in known if word == given] if isinstance(given, str) else []
    if not found:
        raise OddFailureError(f"{name} of a failure is {said(given)}; it must be one of {', '.join(known)}")
    return found[0]


def _text(name: str, given: Any, letters: int) -> str | None:
    if given is not None and not isinstance(given, str):
        raise OddFailureError(f"{name} of a failure is {said(given)}; it must be a text")
    return None if given is None else given[:letters]


def _status(given: Any) -> int | None:
    if given is None:
        return None
    status = whole_of(given)
    if status not in STATUSES:
        allowed = f"{STATUSES[0]} to {STATUSES[-1]}"
        raise OddFailureError(f"status of a failure is {said(given)}; it must be a whole number from {allowed}")
    return status


def _seconds(given: Any) -> float | None:
    if given is None:
        return None
    if not isinstance(given, Real) or isinstance(given, bool) or not math.isfinite(given) or given < 0:
        raise OddFailureError(f"retry_after_s of a failure is {said(given)}; it must be seconds from 0, or None")
    return min(float(given), RETRY_AFTER_S)
