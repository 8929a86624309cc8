"""When to ask a second deployment beside the first: after a high quantile of how long the first token took lately."""

from collections import deque

# Observations looked back on, at least.
KEPT = 200

# Observations between two looks at the quantile.
EVERY = 10


class HedgeDelay:
    """Rolling quantile of first-token times (of whole answers, where nothing streams).

    Args:
        quantile: of what was observed.
        min_s: never less than this.
        samples: before so many are seen nothing is hedged.
    """

    __slots__ = ("_delay_s", "_min_s", "_quantile", "_samples", "_seen", "_since")

    def __init__(self, quantile: float = 0.95, min_s: float = 0.0, samples: int = 20) -> None:
        self._quantile, self._min_s, self._samples = quantile, min_s, samples
        self._seen: deque[float] = deque(maxlen=max(KEPT, samples))
        self._since = 0
        self._delay_s: float | None = None

    def observe(self, seconds: float) -> None:
        """One more."""
        self._seen.append(seconds)
        self._since += 1
        if len(self._seen) >= self._samples and (self._since >= EVERY or self._delay_s is None):
            self._since = 0
            ranked = sorted(self._seen)
            self._delay_s = max(self._min_s, ranked[min(int(self._quantile * len(ranked)), len(ranked) - 1)])

    @property
    def delay_s(self) -> float | None:
        """Seconds to wait; None while too little is known."""
        return self._delay_s
