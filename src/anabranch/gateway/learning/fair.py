"""No key teaches a strategy more than its share.

A strategy's regression takes in every outcome with the same weight, so whoever sends most decides. Here each key's part of it is
bounded, whatever it sends, as one bounds what a user contributes to a statistic or a model that others use (Amin, Kulesza, Munoz and
Vassilvitskii, "Bounding user contributions", ICML 2019; McMahan et al., arXiv 1710.06963, section 2). The bound is a share and no
fixed number, since a number that lets a busy key teach lets it drown a quiet one; and what is beyond it is left out and not kept for
later, so that a burst buys nothing. What remains is what a share can do: the mean of scores between 0 and 1 that one key has a share s
of is moved by it by s at most.
"""

import time
from collections import Counter, deque
from collections.abc import Callable

from anabranch.gateway.config.strategies import FeedbackConfig
from anabranch.gateway.store.limits import Bucket, take


class FairShare:
    """What of the outcomes of one kind a strategy takes in.

    Args:
        config: see there.
        clock: seconds, never running back.
    """

    def __init__(self, config: FeedbackConfig, clock: Callable[[], float] = time.monotonic) -> None:
        self.config, self._clock = config, clock
        # Keys of the outcomes taken in last, and how many each has.
        self._last: deque[str] = deque()
        self._count: Counter[str] = Counter()
        self._free: dict[str, Bucket] = {}

    def __len__(self) -> int:
        return len(self._last)

    def count(self, key: str) -> int:
        """Outcomes of a key among the last ``window``."""
        return self._count[key]

    def admit(self, key: str, num_keys: int) -> bool:
        """Whether one more outcome of ``key`` is taken in; then it counts. ``num_keys``: senders that there are; one alone has no limit."""
        if num_keys > 1 and not self._has_room(key) and not self._take_free(key):
            return False
        self._last.append(key)
        self._count[key] += 1
        while len(self._last) > self.config.window:
            oldest = self._last.popleft()
            self._count[oldest] -= 1
            if not self._count[oldest]:
                del self._count[oldest]
        return True

    def _has_room(self, key: str) -> bool:
        """With as few senders as two, each may have half."""
        active = len(self._count) + (key not in self._count)
        share = max(self.config.share, 1 / max(2, active))
        return self._count[key] + 1 <= share * min(len(self._last) + 1, self.config.window)

    def _take_free(self, key: str) -> bool:
        # Limits are by the minute: on a clock that is sixty times slower, by the hour.
        bucket, wait_s = take(self._free.get(key), 1, self.config.free, self._clock() / 60)
        self._free[key] = bucket
        return wait_s == 0.0
