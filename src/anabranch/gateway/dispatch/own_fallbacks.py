"""Fallbacks for what is a request's own: free of the budget of extra attempts, and bounded for each sender by what comes of them.

    a prompt too long, a filter's refusal, an answer too large    the next model is asked, at most `FURTHER` of them in one request
    said in words alone, which the sender may have written        one further model
    not supported there, so that nothing was sent                 as many as there are

A sender who has had `LEAST` such requests in a minute that came to nothing, and none that was answered, has no more of them asked further:
they would take of what others ask of those models. Each that was answered gives the right to one more. So does one that has not been
refused for `SETTLED_S`, as long as no more came to nothing than were answered: what is refused is mostly refused soon, and an answer may
take minutes, for which a batch does not wait. Where a further model takes only so many requests or tokens in a minute, those that are not
answered yet have at most a quarter of that beside: what is refused late would take the rest from others.
"""

import asyncio
import math
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress

from anabranch.gateway.dispatch.window import SlidingSum
from anabranch.gateway.providers.provider import Failure, FailureKind

# Of the request itself, whichever deployment of the model had it.
OWN: frozenset[FailureKind] = frozenset({"excess", "context", "filter", "unsupported"})

# Further models that one request is asked of. What is beyond costs extra attempts, as after an outage.
FURTHER = 3

# Requests of a sender that may come to nothing in a window, and be asked at once, while none was answered.
LEAST = 10
WINDOW_S = 60.0

# After which one that is under way is taken for one that will be answered.
SETTLED_S = 1.0

# At the latest, who waits looks whether one has become so, or one that came to nothing is forgotten.
_LOOK_S = 0.25

# Senders whose requests are counted apart; those seen last.
KEPT = 1000


def is_free(failure: Failure, further: int) -> bool:
    """Whether the next model is asked beside the budget of extra attempts, by a request that was asked of so many further ones so."""
    if failure.cause not in OWN:
        return False
    return failure.kind == "unsupported" or further < (1 if failure.kind == "request" else FURTHER)


class OwnFallbacks:
    """Of one sender: its requests that further models are asked for what is their own."""

    def __init__(self) -> None:
        self._answered, self._in_vain = SlidingSum(WINDOW_S), SlidingSum(WINDOW_S)
        # Under way, and of these the ones that are not settled.
        self._under_way, self._young = 0, SlidingSum(SETTLED_S)
        self._changed = asyncio.Event()

    async def enter(self, now: Callable[[], float], spare: float = math.inf) -> float | None:
        """When one more request went on, for `leave`; None where it may not. Where that depends on those under way, it waits for them.

        Args:
            now: the clock.
            spare: so many more may be under way than have the right to it, as they are taken for ones that will be answered.
        """
        while (room := LEAST + self._answered.at(now()) - self._in_vain.at(now())) >= 1:
            if self._awaited(now(), spare) < room:
                self._under_way += 1
                self._young.add(since := now())
                return since
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await self._changed.wait()
        return None

    def _awaited(self, now: float, spare: float) -> float:
        """Of those under way, how many are to be seen to the end before others go on; less than 0 where others make up for them."""
        if self._in_vain.at(now) > self._answered.at(now):
            return self._under_way
        young = self._young.at(now)
        return max(young - (self._under_way - young), self._under_way - spare)

    def leave(self, since: float, now: float, is_answered: bool) -> None:
        """One that entered is over. Whatever it failed of: the sender may have brought that about, or have gone before it was known."""
        self._under_way -= 1
        self._young.at(now)
        self._young.take_back(since, 1.0)
        (self._answered if is_answered else self._in_vain).add(now)
        self._changed.set()
        self._changed = asyncio.Event()


class AllOwnFallbacks:
    """By sender."""

    def __init__(self) -> None:
        self._senders: OrderedDict[str, OwnFallbacks] = OrderedDict()

    def of(self, sender: str) -> OwnFallbacks:
        """Those of one; whoever has entered keeps it until it leaves."""
        found = self._senders.setdefault(sender, OwnFallbacks())
        self._senders.move_to_end(sender)
        if len(self._senders) > KEPT:
            self._senders.popitem(last=False)
        return found
