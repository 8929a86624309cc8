"""`Lag`: up to when all that an upstream had sent of a stream has been read.

What a slow reader does not take lies in buffers: in this process up to `Upstream`'s bound, then in the systems of both sides, megabytes
together. So the moment at which bytes are taken says nothing of when they were made. While little is found at once none of those buffers
was full, and what was taken is all there was. Once much was found, it is not known how much more there is, until the reader has waited for
a while for what comes: so long it takes what lies on the other side to arrive.

And what comes beside the answer (pings, comments of servers that keep the line alive) says that it is still under way, not what was made
meanwhile: that is known up to where the answer, or what is told of it, last grew. Something may have held that back, and let all of it go
at one moment; behind it lies then what was made since the moment before, and is not to be seen yet. What is examined on the way (a content
filter, a guardrail) may come a constant time after it was made: that is no longer than the first text took.
"""

from collections.abc import Callable

# Found at once, it is much: fewer than a connection is read ahead by before it is read no more.
AHEAD_BYTES = 64 << 10

# What comes within so many seconds came at one moment.
MOMENT_S = 0.1

# Waited for what comes since much was found, in all: a round trip and more, and the time that megabytes take on a line.
CAUGHT_UP_S = 1.0


class Lag:
    """See the module.

    Attributes:
        is_behind: much was found at once, and it is not known yet that no more of it is there.
        known_at: the latest moment, by ``now``, at which the answer grew and all that was sent had been read.
        before_at: likewise at the moment before.
        first_at: when the first text was read; None until then.
        ended_at: when the end of the answer was read, whatever lay behind it; None until then.
        texts, text_bytes: that had come by then, see `Tally`.

    Args:
        now: seconds, monotonic.
        since: when its request was sent, until when nothing can have been.
    """

    def __init__(self, now: Callable[[], float], since: float) -> None:
        self._now, self._since = now, since
        self.known_at = self.before_at = self._moment_at = since
        self.texts = self.text_bytes = 0
        self.is_behind = False
        self._waited_s = 0.0
        self._told: tuple[int, bool] = (0, False)
        self.first_at: float | None = None
        self.ended_at: float | None = None

    def waited(self, seconds: float) -> None:
        """Nothing was there, and it took so long until something came, or nobody waited any more."""
        self._waited_s += seconds

    def took(self, size: int, texts: int, text_bytes: int, told: tuple[int, bool] = (0, False)) -> None:
        """All that was there has been taken: ``size`` bytes of it.

        Args:
            size: see above.
            texts, text_bytes: that have come by now.
            told: tokens that its upstream says it is by now, and whether it has come to its end.
        """
        now = self._now()
        if self.first_at is None and texts:
            self.first_at = now
        if self.ended_at is None and told[1]:
            self.ended_at = now
        if size > AHEAD_BYTES:
            self.is_behind, self._waited_s = True, 0.0
        elif self._waited_s >= CAUGHT_UP_S:
            self.is_behind = False
        if not self.is_behind and (texts, text_bytes, told) != (self.texts, self.text_bytes, self._told):
            if now - self._moment_at > MOMENT_S:
                self.before_at, self._moment_at = self.known_at, now
            self.known_at, self.texts, self.text_bytes, self._told = now, texts, text_bytes, told

    @property
    def held_s(self) -> float:
        """Seconds for which what came last may have been held back, at most, and as much was made behind it.

        That is since its answer grew at the moment before; and each text may have come as long after it was made as the first did after
        its request. What was let go at once may have gone that way too, so both count.
        """
        first_s = self.known_at - self._since if self.first_at is None else self.first_at - self._since
        return self.known_at - self.before_at + first_s
