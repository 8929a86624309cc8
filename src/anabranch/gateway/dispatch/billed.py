"""What a provider may have billed for an attempt that brought no whole answer. Never less: what is charged must cover the invoice.

nothing     it never went out, or the provider said no: an error with a status, before anything was made
as told     the provider said how many tokens it was
the most    all else. A whole answer is made to its end, whoever waits for it: the prompt and all that was asked for at most.
            A stream ends soon after its connection: what came, and what can have been made in the time of which nothing came.
"""

import math
from dataclasses import replace

from anabranch.gateway.dispatch.plan import Attempt
from anabranch.gateway.providers.provider import Failure, Usage

# A proxy before the provider gave up waiting: what it waited for may have been made.
GAVE_UP = frozenset({408, 504, 524})

# Tokens that are made until it is seen that a connection is gone, however fast that is.
FEW = 8

# Of text at least, in the mean, for a token: less than the four of English.
LEAST_BYTES = 3


def may_be_billed(attempt: Attempt, failure: Failure | None) -> bool:
    """Whether a provider may bill an attempt of which nothing has come; ``failure`` is None if it was cancelled."""
    if attempt.call is None or not attempt.call.is_sent:
        return False
    if failure is None or attempt.has_begun:
        return True
    if failure.status is not None:
        return failure.status in GAVE_UP
    return failure.kind != "connect" or attempt.http_status is not None


def tokens_of(texts: int, text_bytes: int) -> int:
    """Tokens of so many chunks with text, and so many bytes of it; rather more than less."""
    return max(texts, -(-text_bytes // LEAST_BYTES))


def broken_off(most: Usage, told: Usage | None, seen: int, rate: float | None, silent_s: float) -> Usage:
    """The most that a stream may be billed which ended before it told.

    Args:
        most: whatever happens.
        told: by the provider so far; None for nothing.
        seen: completion tokens that came.
        rate: completion tokens a second; None if it is not known.
        silent_s: seconds in which tokens may have been made that did not come.
    """
    # Some say 0 before they know.
    begun = told if told is not None and told.prompt else Usage(most.prompt)
    said = begun.completion
    seen = max(seen, said)
    made = most.completion if rate is None else seen + FEW + math.ceil(rate * silent_s)
    return replace(begun, completion=max(said, min(made, most.completion)), is_estimated=True)
