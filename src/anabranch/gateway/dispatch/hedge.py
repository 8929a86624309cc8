"""When to ask a second deployment beside the first: after the 95th percentile of how long the first token took lately."""

from collections import deque

QUANTILE = 0.95
KEPT = 200  # observations looked back on
FEWEST = 20  # before these are seen nothing is hedged
EVERY = 10  # observations between two looks at the quantile


class HedgeDelay:
    """Rolling quantile of first-token times (of whole answers, where nothing streams)."""

    __slots__ = ("_delay_s", "_seen", "_since")

    def __init__(self) -> None:
        self._seen: deque[float] = deque(maxlen=KEPT)
        self._since = 0
        self._delay_s: float | None = None

    def observe(self, seconds: float) -> None:
        """One more."""
        self._seen.append(seconds)
        self._since += 1
        if len(self._seen) >= FEWEST and (self._since >= EVERY or self._delay_s is None):
            self._since = 0
            ranked = sorted(self._seen)
            self._delay_s = ranked[min(int(QUANTILE * len(ranked)), len(ranked) - 1)]

    @property
    def delay_s(self) -> float | None:
        """Seconds to wait; None while too little is known."""
        return self._delay_s
