"""How fast a queue drains, and what of it each request and each token of a prompt takes."""

import math


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
