"""`Admission`: whether a sender has room for one more request: in the counts of this process, and in those that processes share."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from anabranch.errors import RateError
from anabranch.gateway.config.limits import LimitsConfig
from anabranch.gateway.core.held_body import HeldBody
from anabranch.gateway.in_flight import InFlight
from anabranch.gateway.store import KeyRecord, RateLimits
from anabranch.gateway.store.limits import SLACK


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one sender; None is no limit.

    Attributes:
        rpm, tpm: requests and tokens a minute.
        most: requests at a time.
    """

    rpm: int | None
    tpm: int | None
    most: int | None

    @property
    def has_any(self) -> bool:
        """There is something to be counted."""
        return self.rpm is not None or self.tpm is not None or self.most is not None


def limits_of(record: KeyRecord | None, limits: LimitsConfig) -> Limits:
    """Those of a key; what it does not say is the gateway's."""
    if record is None:
        return Limits(limits.rpm, limits.tpm, limits.max_in_flight)
    return Limits(record.rpm or limits.rpm, record.tpm or limits.tpm, record.max_in_flight or limits.max_in_flight)


@dataclass(frozen=True, slots=True)
class Left:
    """Of one of a sender's limits.

    Attributes:
        limit: a minute.
        remaining: that may be taken now.
        reset_s: seconds until all of it may, if nothing is.
    """

    limit: int
    remaining: int
    reset_s: float


class SharedCounts(Protocol):
    """What several processes count together. Where that cannot be asked, it says yes: each process still has its own counts."""

    async def admit(self, whose: str, id: str, tokens: int, limits: Limits) -> bool:
        """Count a request in: all limits are taken from, or none. Whether tokens were taken, which `correct` may be told of.

        Raises RateError.
        """

    async def look(self, whose: str, limits: Limits) -> None:
        """Whether `admit` could let any request through now; nothing is taken. Raises RateError."""

    def level(self, whose: str, limit: str, per_minute: int) -> float | None:
        """What may be taken now of a limit, ``rpm`` or ``tpm``, as far as this process has been told; None if it has not been."""

    def leave(self, whose: str, id: str) -> None:
        """A request is under way no more."""

    def correct(self, whose: str, tokens: int, tpm: int) -> None:
        """``tokens`` more were used than `admit` was told; negative if fewer. Only where it took some."""


class Admission:
    """Who may enter. The counts of this process are asked first: whoever has no room there has none in all.

    Args:
        rates, senders: of this process.
        shared: of all; None if each process is on its own.
    """

    def __init__(self, rates: RateLimits, senders: InFlight, shared: SharedCounts | None = None) -> None:
        self._rates, self._senders, self._shared = rates, senders, shared

    def place(self, whose: str, limits: Limits, held: HeldBody | None = None) -> None:
        """A place among the requests of this process, before it is known what is asked: that of its body if that was held.

        `enter` is told of it; where it does not come to that, `give_back` is. Raises RateError where it has none.
        """
        if held is None or not held.take_place():
            self._senders.enter(whose, limits.most)

    def give_back(self, whose: str) -> None:
        """A place that nobody entered with."""
        self._senders.leave(whose)

    async def enter(
        self,
        whose: str,
        id: str,
        tokens: int,
        limits: Limits,
        held: HeldBody | None = None,
        *,
        has_place: bool = False,
    ) -> bool:
        """Count a request of about ``tokens`` in, in its `place` if it has one, else in one that it is given; `leave` counts it out.

        Returns whether its tokens count in all processes, for `correct`. Raises RateError, and it is not counted, and has no place.
        """
        if not has_place:
            self.place(whose, limits, held)
        try:
            return await self._take(whose, id, tokens, limits)
        except BaseException:
            self._senders.leave(whose)
            raise

    async def count(self, whose: str, id: str, limits: Limits) -> None:
        """Count what is answered at once as a request, without tokens. Raises RateError."""
        await self._take(whose, id, 0, Limits(limits.rpm, None, None))

    async def _take(self, whose: str, id: str, tokens: int, limits: Limits) -> bool:
        if limits.rpm is not None or limits.tpm is not None:
            self._rates.admit(whose, tokens, rpm=limits.rpm, tpm=limits.tpm)
        if self._shared is None or not limits.has_any:
            return False
        try:
            return await self._shared.admit(whose, id, tokens, limits)
        except RateError:
            # It was not let in.
            self._rates.give_back(whose, tokens, rpm=limits.rpm, tpm=limits.tpm)
            raise

    async def hold(self, whose: str, limits: Limits) -> Callable[[], None]:
        """A place among the requests of this process for one whose body is still to come.

        Returns what gives it back. Raises RateError, and it is not counted, where a request has no room even by what is known before it
        is read.
        """
        await self.look(whose, limits)
        self._senders.enter(whose, limits.most)
        return partial(self._senders.leave, whose)

    async def look(self, whose: str, limits: Limits) -> None:
        """Whether a request has room by what is known before it is read; nothing is taken. Raises RateError."""
        self._senders.look(whose, limits.most)
        self._rates.look(whose, rpm=limits.rpm, tpm=limits.tpm)
        if self._shared is not None and limits.has_any:
            await self._shared.look(whose, limits)

    def left(self, whose: str, limits: Limits) -> dict[str, Left]:
        """What is left of a sender's limits, by ``requests`` and ``tokens``; of those that it has."""
        found = {}
        for name, limit, per_minute in (("requests", "rpm", limits.rpm), ("tokens", "tpm", limits.tpm)):
            if per_minute is None:
                continue
            level = self._rates.level(whose, limit, per_minute)
            shared = None if self._shared is None else self._shared.level(whose, limit, per_minute)
            level = level if shared is None else min(level, shared)
            reset_s = (per_minute - level) * 60 / per_minute
            found[name] = Left(per_minute, max(0, math.floor(level + SLACK)), reset_s)
        return found

    def leave(self, whose: str, id: str) -> None:
        """A request that entered has ended."""
        self._senders.leave(whose)
        if self._shared is not None:
            self._shared.leave(whose, id)

    def correct(self, whose: str, tokens: int, tpm: int | None, *, is_shared: bool) -> None:
        """``tokens`` more were used than `enter` was told; negative if fewer. It may be told more than once, as more is known.

        Args:
            whose: of whom.
            tokens: see above.
            tpm: of his limits.
            is_shared: as `enter` said.
        """
        self._rates.correct(whose, tokens, tpm=tpm)
        if self._shared is not None and tpm is not None and is_shared:
            self._shared.correct(whose, tokens, tpm)
