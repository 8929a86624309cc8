"""How fast a queue drains, and what of it each request and each token of a prompt takes."""

import math
from collections import Counter
from typing import Generic, Protocol, TypeVar


class DrainRate:
    """How fast something drains while there is something to drain, the past fading with e^(-t / window).

    Idle time does not count: an engine without work is not slow. A queue that stands still does, once nothing has gone for longer
    than it takes on average.
    """

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        # Faded sums: what has gone, the time before it, how many times.
        self._amount = self._busy_s = self._times = 0.0
        # Busy since something has gone.
        self._elapsed_s = 0.0
        # Up to when that is brought; None while idle.
        self._since: float | None = None

    def resume(self, now: float) -> None:
        """There is something to drain."""
        if self._since is None:
            self._since = now

    def pause(self, now: float) -> None:
        """There is nothing left."""
        self._advance(now)
        self._since = None

    def drained(self, amount: float, now: float) -> float:
        """So much has gone; gives the busy seconds since the last time."""
        self._advance(now)
        took_s = self._elapsed_s
        kept = math.exp(-self._elapsed_s / self._window_s)
        self._amount = self._amount * kept + amount
        self._busy_s = self._busy_s * kept + self._elapsed_s
        self._times = self._times * kept + 1
        self._elapsed_s = 0.0
        return took_s

    def forget(self, since: float, now: float) -> None:
        """What was waited for before ``since`` did not come, and shall not count."""
        self._advance(now)
        self._elapsed_s = min(self._elapsed_s, now - since)

    def per_s(self, now: float) -> float | None:
        """Amount per second; None before anything has drained."""
        self._advance(now)
        if self._busy_s <= 0:
            return None
        return self._amount / self._busy_s / self.slowdown(now)

    def slowdown(self, now: float) -> float:
        """How many times slower it has become by what is overdue now; 1 as long as nothing is."""
        self._advance(now)
        if self._busy_s <= 0:
            return 1.0
        overdue_s = max(0.0, self._elapsed_s - self._busy_s / self._times)
        # A queue that stands still for hours is as good as dead.
        fade = min(overdue_s / self._window_s, 100.0)
        return 1 + overdue_s * math.exp(fade) / self._busy_s

    def _advance(self, now: float) -> None:
        if self._since is not None and now > self._since:
            self._elapsed_s += now - self._since
            self._since = now


class Pace:
    """What a request and what a token of its prompt add to the time between two first tokens: a line fitted to the faded past.

    Both are at least zero. As long as prompts were of about one length there is no telling them apart, and all is the requests': a
    long prompt is then expected too early rather than refused for what short ones took.
    """

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._count = self._tokens = self._seconds = self._squares = self._products = 0.0  # faded sums

    def took(self, num_tokens: int, seconds: float) -> None:
        """A request of so many prompt tokens got its first token, so many seconds after the one before."""
        kept = math.exp(-seconds / self._window_s)
        self._count = self._count * kept + 1
        self._tokens = self._tokens * kept + num_tokens
        self._seconds = self._seconds * kept + seconds
        self._squares = self._squares * kept + num_tokens * num_tokens
        self._products = self._products * kept + num_tokens * seconds

    def expected_s(self, count: int, num_tokens: int) -> float | None:
        """Seconds that ``count`` requests of ``num_tokens`` in all take; None before any did."""
        if self._seconds <= 0:
            return None
        mean_tokens, mean_s = self._tokens / self._count, self._seconds / self._count
        variance = self._squares / self._count - mean_tokens * mean_tokens
        per_token = 0.0
        # Lengths that differ by a tenth.
        if variance > 0.01 * mean_tokens * mean_tokens:
            slope = (self._products / self._count - mean_tokens * mean_s) / variance
            # Up to where a request alone costs nothing.
            per_token = min(max(slope, 0.0), mean_s / mean_tokens)
        return (mean_s - per_token * mean_tokens) * count + per_token * num_tokens


class Waits(Protocol):
    """One that waits for its first token."""

    @property
    def key(self) -> str:
        """Whose it is."""

    @property
    def num_tokens(self) -> int:
        """Of its prompt."""


W = TypeVar("W", bound=Waits)


class Line(Generic[W]):
    """Requests that wait for their first tokens, and how fast these come.

    Attributes:
        waiting: since when each waits, the one that came first first.
        rate: of requests.
    """

    def __init__(self, window_s: float) -> None:
        self.waiting: dict[W, float] = {}
        self.rate, self._pace = DrainRate(window_s), Pace(window_s)
        self._window_s, self._left_at = window_s, -math.inf

    def join(self, one: W, now: float) -> None:
        """One more."""
        self.waiting[one] = now
        self.rate.resume(now)

    def leave(self, one: W, now: float, *, is_served: bool) -> None:
        """One has its first token, or has gone away without it; nothing for one that is not here."""
        if self.waiting.pop(one, None) is None:
            return
        self._left_at = now
        if is_served:
            self._pace.took(one.num_tokens, self.rate.drained(1, now))
        else:
            # Only those that still wait tell of a standstill.
            self.rate.forget(next(iter(self.waiting.values()), now), now)
        if not self.waiting:
            self.rate.pause(now)

    def is_old(self, now: float) -> bool:
        """Whether what is known of the pace is of long ago: nobody has waited for a window."""
        return not self.waiting and now - self._left_at > self._window_s

    def expected_s(self, key: str, num_tokens: int, now: float) -> float | None:
        """Seconds to the first token of a prompt that joined now; None before anything is known of the pace.

        Keys take turns, so of each other key only so much is before it as there is of its own.
        """
        counts: Counter[str] = Counter({key: 1})
        tokens: Counter[str] = Counter({key: num_tokens})
        for one in self.waiting:
            counts[one.key] += 1
            tokens[one.key] += one.num_tokens
        expected_s = self._pace.expected_s(
            sum(min(count, counts[key]) for count in counts.values()),
            sum(min(count, tokens[key]) for count in tokens.values()),
        )
        return None if expected_s is None else expected_s * self.rate.slowdown(now)
