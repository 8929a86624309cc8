"""`OutputSpeed`: how fast a deployment makes tokens at most, as its operator declared it.

Nobody sees when a token was made: a stream shows texts, and tells how many tokens it was at its end. So how fast a deployment is cannot be
learned from streams without letting what one tenant's answer looks like set what all others pay. It is declared, for each answer that is
made, and no stream changes it. One that ended whole can only show that what is declared is too low: it told more tokens than can have been
made so fast in all its time. That is said in the log and in the metrics, for the operator to mend. What an upstream gives out of a cache of
its own is as fast: so that one such answer does not end the alarm, it is said of the fastest of the last hour.
"""

import logging
import math
from collections import deque

from anabranch.gateway.dispatch.billed import FEW

logger = logging.getLogger(__name__)

# Seconds for which a stream that was faster is told of.
TOLD_S = 3600.0

# Within them the log speaks of a faster stream again once it is faster by so much.
AGAIN = 1.25


class OutputSpeed:
    """Of one deployment.

    Attributes:
        declared: tokens a second of one answer, at most.

    Args:
        name: of the deployment.
        declared: see above.
    """

    def __init__(self, name: str, declared: float) -> None:
        self.name, self.declared = name, declared
        # When, and how fast: those that none was as fast as since, so that the first of the last hour is the fastest.
        self._faster: deque[tuple[float, float]] = deque()
        self._logged = (-math.inf, 0.0)

    def at_most(self, seconds: float, answers: int = 1) -> int:
        """Tokens that can be made in so many seconds of answers that are made at the same time."""
        return math.ceil(self.declared * answers * max(0.0, seconds))

    def told(self, tokens: int, seconds: float, answers: int, margin_s: float, now: float) -> None:
        """A stream came to so many tokens, as its provider told, from its request to its end.

        One that was left just then would have been charged ``margin_s`` and a few tokens more: what is within that shows nothing.

        Args:
            tokens, seconds: see above.
            answers: that it made at the same time.
            margin_s: see above.
            now: on the clock by which `exceeded` is asked.
        """
        if tokens <= self.at_most(seconds + margin_s, answers) + FEW * answers:
            return
        speed = tokens / answers / max(seconds, 1e-3)
        while self._faster and self._faster[-1][1] <= speed:
            self._faster.pop()
        self._faster.append((now, speed))
        at, logged = self._logged
        if now - at < TOLD_S and speed < AGAIN * logged:
            return
        self._logged = (now, speed)
        logger.warning(
            "deployment %s told %d tokens for %d answer(s) in %.2f s, %.0f a second of each, and its output_speed is %g: a stream of it "
            "that is left may be charged less than it is billed. Unless the answer was one that it kept, declare output_speed = %d",
            self.name,
            tokens,
            answers,
            seconds,
            speed,
            self.declared,
            math.ceil(speed),
        )

    def exceeded(self, now: float) -> float:
        """Tokens a second of the fastest whole stream of the last hour that was faster than is declared; 0 for none."""
        while self._faster and now - self._faster[0][0] >= TOLD_S:
            self._faster.popleft()
        fastest = self._faster[0][1] if self._faster else 0.0
        return fastest if fastest > self.declared else 0.0

    def adopt(self, other: "OutputSpeed") -> None:
        """Take over what streams of the same deployment showed."""
        self._faster = deque(one for one in other._faster if one[1] > self.declared)
        self._logged = other._logged if self._faster else (-math.inf, 0.0)
