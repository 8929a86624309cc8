"""`OverloadError`: a request is refused now, and told when to come back."""

import math

from anabranch.errors import LimitError

__all__ = ["REASONS", "OverloadError", "overloaded", "seconds_until"]

# The official Python client gives up rather than wait longer.
MOST_RETRY_S = 120.0

# Retry-After has whole seconds.
LEAST_RETRY_S = 1.0
REASONS = ("in_flight", "queued", "queued_tokens", "key_concurrency", "key_share", "deadline")


class OverloadError(LimitError):
    """The engine has no room for a request now.

    Attributes:
        reason: one of `REASONS`, a label for metrics.
        status: the HTTP status to answer with.
        retry_after_s: seconds after which there should be room, 1 to 120.
    """

    def __init__(self, message: str, *, reason: str, status: int, retry_after_s: float) -> None:
        super().__init__(message, retry_after_s)
        self.reason, self.status = reason, status


def overloaded(reason: str, text: str, wait_s: float, status: int) -> OverloadError:
    """The refusal of a request for which there should be room in ``wait_s`` seconds."""
    retry_after_s = min(max(float(math.ceil(min(wait_s, MOST_RETRY_S))), LEAST_RETRY_S), MOST_RETRY_S)
    return OverloadError(
        f"overloaded: {text}; try again in {retry_after_s:.0f} s",
        reason=reason,
        status=status,
        retry_after_s=retry_after_s,
    )


def seconds_until(amount: float, rate: float | None) -> float:
    """Seconds until ``amount`` has drained; at an unknown pace the shortest wait there is, at none at all endless."""
    if amount <= 0 or rate is None:
        return 0.0
    return amount / rate if rate > 0 else math.inf
