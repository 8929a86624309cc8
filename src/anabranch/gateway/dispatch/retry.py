"""What follows a failure: which kinds are tried again, how long to wait, and how many attempts all requests together may add.

Two tables that ask two things of a failure:

    ACTION    where the request goes next; also by what the words of a refusal sound like (`Failure.cause`)
    OUTCOME   what it says of the deployment; by status, `code` and `type` alone (`Failure.kind`)
"""

import random
from collections import OrderedDict
from typing import Literal

from anabranch.gateway.dispatch.breaker import Outcome
from anabranch.gateway.dispatch.window import SlidingSum
from anabranch.gateway.providers.provider import FailureKind

Action = Literal["retry", "fall_back", "give_up"]

ACTION: dict[FailureKind, Action] = {
    "connect": "retry",
    "timeout": "retry",
    "first_token": "retry",
    "conflict": "retry",
    "rate_limit": "retry",
    "busy": "retry",
    "server": "retry",
    "garbage": "retry",
    "cut": "retry",
    # Asked again, the same model would say the same, and be billed for it again.
    "excess": "fall_back",
    "context": "fall_back",
    "filter": "fall_back",
    "unsupported": "fall_back",
    "unavailable": "fall_back",
    "refused": "fall_back",
    # The breaker opens: another deployment has its own account, else the next model is asked.
    "credit": "retry",
    "auth": "retry",
    # Another deployment has its own key, or may have what was not found.
    "forbidden": "retry",
    "missing": "retry",
    "not_found": "retry",
    "request": "give_up",
    "deadline": "give_up",
}

# Of the request itself, or of what the config says of key and address: the same model would fail of it later too, so that whoever answers
# in its place does so for good.
LASTING: frozenset[FailureKind] = frozenset(
    {"excess", "context", "filter", "unsupported", "auth", "forbidden", "missing", "not_found"}
)

OUTCOME: dict[FailureKind, Outcome] = {
    "connect": "failure",
    "timeout": "failure",
    "first_token": "failure",
    "rate_limit": "failure",
    "server": "failure",
    "garbage": "failure",
    "cut": "failure",
    "deadline": "failure",
    "credit": "fatal",
    "auth": "fatal",
    "missing": "failure",
    # It says itself that it is well.
    "busy": "ignored",
    "excess": "ignored",
    "conflict": "ignored",
    "context": "ignored",
    "filter": "ignored",
    "unsupported": "ignored",
    "request": "ignored",
    "forbidden": "ignored",
    "not_found": "ignored",
    "unavailable": "ignored",
    "refused": "ignored",
}

# Asked again, the same deployment would refuse again: another one, else the next model.
IN_VAIN: tuple[FailureKind, ...] = ("forbidden", "missing", "not_found", "credit", "busy")

# Refusals that are the request's own, until several senders in a row have met one: then they are the deployment's. A 400 or 422 never is:
# however many senders make the same mistake, others make none.
DISPUTED: tuple[FailureKind, ...] = ("forbidden", "not_found")

# While nobody is served between them, these cast doubt on a deployment: where another one or another model can be had without an extra
# attempt, a request had better begin there. Nobody is refused for it.
DOUBTED: tuple[FailureKind, ...] = ("forbidden", "missing", "not_found", "credit")


# Of all extra attempts, what one of several senders may have beyond its own right.
OF_ALL = 0.25

# Senders whose attempts are counted apart; those seen last.
KEPT = 1000


def backoff(retry: int, base_s: float, most_s: float, rng: random.Random) -> float:
    """Seconds before retry number ``retry`` (from 0): full jitter, U(0, min(most, base * 2^retry))."""
    return rng.uniform(0.0, min(most_s, base_s * 2 ** min(retry, 60)))


class _Sender:
    """What one sender has asked and added."""

    __slots__ = ("extra", "held", "requests")

    def __init__(self, window_s: float) -> None:
        self.requests, self.extra, self.held = SlidingSum(window_s), SlidingSum(window_s), 0


class RetryBudget:
    """Bounds extra attempts to a share of the requests of a window, so that an outage does not multiply load.

    A request that begins on a deployment which has been failing *holds* one extra attempt from the start; if none is left to hold, it had
    better begin elsewhere. Otherwise a deployment that fails 30 times of 100 would use up a budget of 20 and fail the other 10.

    Nobody uses up what others need. Of several senders each has a right to the share of its own requests, and to its part of ``least``,
    whatever the others do; beyond that it takes of what all have left, until it has had `OF_ALL` of everything. So all together they come
    to at most ``least`` more than the larger of ``least`` and the share of all requests.

    Args:
        share: of requests in the window.
        least: extra attempts that any window may have.
        window_s: seconds.
    """

    def __init__(self, share: float, least: int, window_s: float) -> None:
        self._share, self._least, self._window_s = share, least, window_s
        self._requests, self._extra = SlidingSum(window_s), SlidingSum(window_s)
        self._senders: OrderedDict[str, _Sender] = OrderedDict()
        self.held = 0

    def request(self, now: float, sender: str = "") -> None:
        """A request of a sender has come."""
        self._requests.add(now)
        self._of(sender).requests.add(now)

    def room(self, now: float) -> float:
        """Extra attempts that may still be made."""
        return self._most(now) - self._extra.at(now) - self.held

    def take(self, now: float, holds: bool = False, sender: str = "") -> bool:
        """Make an extra attempt, if there is room or the request holds one."""
        if holds:
            self.release(sender)
        elif not self._has_room(now, sender, 0):
            return False
        self._extra.add(now)
        self._of(sender).extra.add(now)
        return True

    def hold(self, now: float, beside: int = 0, sender: str = "") -> bool:
        """Keep one extra attempt for later, if there is room ``beside`` so many that may be needed too.

        `take` or `release` ends it.
        """
        if not self._has_room(now, sender, beside):
            return False
        self.held += 1
        self._of(sender).held += 1
        return True

    def release(self, sender: str = "") -> None:
        """Give a held attempt back."""
        self.held -= 1
        own = self._of(sender)
        own.held = max(0, own.held - 1)

    def state(self, now: float) -> dict[str, float]:
        """For the page."""
        return {
            "requests": self._requests.at(now),
            "extra": self._extra.at(now),
            "held": self.held,
            "room": self.room(now),
        }

    def _most(self, now: float) -> float:
        return max(self._least, self._share * self._requests.at(now))

    def _has_room(self, now: float, sender: str, beside: int) -> bool:
        own = self._of(sender)
        # Itself among them.
        active = 1 + sum(one is not own and one.requests.at(now) > 0 for one in self._senders.values())
        wanted, by_share = own.extra.at(now) + own.held + 1, self._share * own.requests.at(now)
        if active > 1 and wanted + beside <= max(by_share, self._least / active):
            return True
        most = self._most(now) if active == 1 else max(by_share, OF_ALL * self._most(now))
        return self.room(now) - beside >= 1 and wanted <= most

    def _of(self, sender: str) -> _Sender:
        found = self._senders.get(sender)
        if found is None:
            found = self._senders[sender] = _Sender(self._window_s)
            if len(self._senders) > KEPT:
                self._senders.popitem(last=False)
        else:
            self._senders.move_to_end(sender)
        return found
