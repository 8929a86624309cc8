"""Requests and tokens a minute, by token buckets: pure functions of a bucket's state and the time.

A bucket holds what one minute allows and fills up evenly. Over any t seconds no more than ``per_minute * (1 + t / 60)`` can be taken.
"""

import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from anabranch.errors import RateError

REMEMBERED = 100_000

# Of a token: what rounding may take away.
SLACK = 1e-9


@dataclass(frozen=True, slots=True)
class Bucket:
    """State of a limit.

    Attributes:
        level: what may be taken now; negative while what was used beyond the estimate is worked off.
        at_s: when that was so, by a clock that never runs back.
    """

    level: float
    at_s: float


def refill(bucket: Bucket | None, per_minute: int, now_s: float) -> Bucket:
    """The bucket at ``now_s``; a new one is full."""
    if bucket is None:
        return Bucket(float(per_minute), now_s)
    passed_s = max(0.0, now_s - bucket.at_s)
    return Bucket(min(float(per_minute), bucket.level + passed_s * per_minute / 60), max(now_s, bucket.at_s))


def take(bucket: Bucket | None, amount: float, per_minute: int, now_s: float) -> tuple[Bucket, float | None]:
    """Take ``amount`` if it is there.

    Returns:
        The bucket afterwards, and the seconds to wait: 0.0 if it was taken, None if it never can be (more than a minute allows).
    """
    full = refill(bucket, per_minute, now_s)
    if amount <= full.level + SLACK:
        return Bucket(full.level - amount, full.at_s), 0.0
    if amount > per_minute:
        return full, None
    return full, (amount - full.level) * 60 / per_minute


class RateLimits:
    """Buckets of many senders, in this process; the least recently seen are forgotten, and are full again by then."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: OrderedDict[tuple[str, str], Bucket] = OrderedDict()

    def admit(self, whose: str, tokens: int, *, rpm: int | None, tpm: int | None) -> None:
        """Let one request of about ``tokens`` through; both limits are taken from, or none.

        Raises RateError with the seconds to wait.
        """
        for key, bucket in self._taken(whose, tokens, rpm=rpm, tpm=tpm):
            self._put(key, bucket)

    def look(self, whose: str, *, rpm: int | None, tpm: int | None) -> None:
        """Whether `admit` could let any request through now, however short; nothing is taken. Raises RateError as it does."""
        self._taken(whose, 0, rpm=rpm, tpm=tpm)

    def _taken(
        self, whose: str, tokens: int, *, rpm: int | None, tpm: int | None
    ) -> list[tuple[tuple[str, str], Bucket]]:
        """The buckets as they are after a request."""
        now_s, taken = self._clock(), []
        for limit, amount, per_minute in (("rpm", 1, rpm), ("tpm", tokens, tpm)):
            if per_minute is None:
                continue
            bucket, wait_s = take(self._buckets.get((whose, limit)), amount, per_minute, now_s)
            if wait_s != 0.0:
                raise rate_refusal(limit, amount, per_minute, wait_s)
            taken.append(((whose, limit), bucket))
        return taken

    def level(self, whose: str, limit: str, per_minute: int) -> float:
        """What may be taken now of a limit, ``rpm`` or ``tpm``."""
        return refill(self._buckets.get((whose, limit)), per_minute, self._clock()).level

    def correct(self, whose: str, tokens: int, *, tpm: int | None) -> None:
        """``tokens`` more were used than `admit` was told; negative if fewer."""
        if tpm is not None:
            bucket = refill(self._buckets.get((whose, "tpm")), tpm, self._clock())
            self._put((whose, "tpm"), Bucket(min(float(tpm), bucket.level - tokens), bucket.at_s))

    def give_back(self, whose: str, tokens: int, *, rpm: int | None, tpm: int | None) -> None:
        """Undo `admit`: the request was not let in after all."""
        now_s = self._clock()
        for limit, amount, per_minute in (("rpm", 1, rpm), ("tpm", tokens, tpm)):
            if per_minute is not None:
                bucket = refill(self._buckets.get((whose, limit)), per_minute, now_s)
                self._put((whose, limit), Bucket(min(float(per_minute), bucket.level + amount), bucket.at_s))

    def _put(self, key: tuple[str, str], bucket: Bucket) -> None:
        self._buckets[key] = bucket
        self._buckets.move_to_end(key)
        while len(self._buckets) > REMEMBERED:
            self._buckets.popitem(last=False)


def rate_refusal(limit: str, amount: int, per_minute: int, wait_s: float | None) -> RateError:
    """What a sender is told who must wait so many seconds; None if no wait helps."""
    what = "requests" if limit == "rpm" else "tokens"
    if wait_s is None:
        message = f"a request of {amount:,} tokens is more than the {per_minute:,} a minute that this key may use"
    else:
        message = f"this key may use {per_minute:,} {what} a minute; try again in {max(wait_s, 0.1):.1f} s"
    return RateError(message, limit=limit, retry_after_s=wait_s)
