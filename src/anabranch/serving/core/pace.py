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

    def slowdown(self, now: float, since: float = -math.inf) -> float:
        """How many times slower it has become by what is overdue now; 1 as long as nothing is.

        ``since``: what was waited for before does not count.
        """
        self._advance(now)
        if self._busy_s <= 0:
            return 1.0
        overdue_s = max(0.0, min(self._elapsed_s, now - since) - self._busy_s / self._times)
        # A queue that stands still for hours is as good as dead.
        fade = min(overdue_s / self._window_s, 100.0)
        return 1 + overdue_s * math.exp(fade) / self._busy_s

    def _advance(self, now: float) -> None:
        if self._since is not None and now > self._since:
            self._elapsed_s += now - self._since
            self._since = now


class Pace:
    """What a request and what a token of its prompt add to the time between two first tokens: a line fitted to the faded past.

    Both are at least zero. As long as prompts were of about one length there is no telling them apart, and all is the requests', or of
    shorter ones the tokens': a prompt is then expected too early rather than refused for what others took, shorter or longer ones.
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

    @property
    def mean_tokens(self) -> float:
        """Of the prompts; 0 before there was any."""
        return self._tokens / self._count if self._count else 0.0

    def expected_s(self, count: int, num_tokens: int) -> float | None:
        """Seconds that ``count`` requests of ``num_tokens`` in all take; None before any did."""
        if self._seconds <= 0:
            return None
        mean_tokens, mean_s = self._tokens / self._count, self._seconds / self._count
        variance = self._squares / self._count - mean_tokens * mean_tokens
        # Lengths that do not differ by a tenth.
        if variance <= 0.01 * mean_tokens * mean_tokens:
            return mean_s * (min(count, num_tokens / mean_tokens) if mean_tokens else count)
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

    Args:
        window_s: see `DrainRate`.
        is_passed: those that wait long do not hold up those that come later (other keys make room for each, and prompts share the steps).
            What one took is then at most what it has waited itself; and only prompts that are no longer than one that comes, or than
            those that were served, tell it of a standstill.

    Attributes:
        waiting: since when each waits, the one that came first first.
        rate: of requests.
    """

    def __init__(self, window_s: float, *, is_passed: bool = False) -> None:
        self.waiting: dict[W, float] = {}
        self.rate, self._pace, self._is_passed = DrainRate(window_s), Pace(window_s), is_passed
        self._window_s, self._left_at = window_s, -math.inf

    def join(self, one: W, now: float) -> None:
        """One more."""
        self.waiting[one] = now
        self.rate.resume(now)

    def leave(self, one: W, now: float, *, is_served: bool) -> None:
        """One has its first token, or has gone away without it; nothing for one that is not here."""
        joined = self.waiting.pop(one, None)
        if joined is None:
            return
        self._left_at = now
        if is_served:
            if self._is_passed:
                self.rate.forget(joined, now)
            self._pace.took(one.num_tokens, self.rate.drained(1, now))
        else:
            # Only those that still wait tell of a standstill.
            self.rate.forget(next(iter(self.waiting.values()), now), now)
        if not self.waiting:
            self.rate.pause(now)

    def expected_s(self, key: str, num_tokens: int, now: float) -> float | None:
        """Seconds to the first token of a prompt that joined now; None while nothing is known of the pace, or only of long ago.

        The latter is when nobody has waited for a window: only who is let in renews it. Keys take turns, so of each other key only so much
        is before it as there is of its own.
        """
        if not self.waiting and now - self._left_at > self._window_s:
            return None
        counts: Counter[str] = Counter({key: 1})
        tokens: Counter[str] = Counter({key: num_tokens})
        for one in self.waiting:
            counts[one.key] += 1
            tokens[one.key] += one.num_tokens
        expected_s = self._pace.expected_s(
            sum(min(count, counts[key]) for count in counts.values()),
            sum(min(count, tokens[key]) for count in tokens.values()),
        )
        return None if expected_s is None else expected_s * self.rate.slowdown(now, self._stands_since(num_tokens, now))

    def _stands_since(self, num_tokens: int, now: float) -> float:
        """Since when those wait that tell a prompt of so many tokens of a standstill."""
        if not self._is_passed:
            return -math.inf
        longest = max(num_tokens, self._pace.mean_tokens)
        return min((since for one, since in self.waiting.items() if one.num_tokens <= longest), default=now)
