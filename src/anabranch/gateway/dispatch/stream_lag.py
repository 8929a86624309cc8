"""`Lag`: up to when all that an upstream had sent of a stream has been read.

What a slow reader does not take lies in buffers: in this process up to `Upstream`'s bound, then in the systems of both sides, megabytes
together. So the moment at which bytes are taken says nothing of when they were made. While little is found at once none of those buffers
was full, and what was taken is all there was. Once much was found, it is not known how much more there is, until the reader has waited for
a while for what comes: so long it takes what lies on the other side to arrive.

And what comes beside the answer (pings, comments of servers that keep the line alive) says that it is still under way, not what was made
meanwhile: that is known up to where the answer, or what is told of it, last grew. Something may have held that back, and let all of it go
at one moment; behind it lies then what was made since the moment before, and is not to be seen yet.
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
        texts, text_bytes: that had come by then, see `Tally`.

    Args:
        now: seconds, monotonic.
        since: when its request was sent, until when nothing can have been.
    """

    def __init__(self, now: Callable[[], float], since: float) -> None:
        self._now = now
        self.known_at = self.before_at = self._moment_at = since
        self.texts = self.text_bytes = 0
        self.is_behind = False
        self._waited_s = 0.0
        self._told: object = None

    def waited(self, seconds: float) -> None:
        """Nothing was there, and it took so long until something came, or nobody waited any more."""
        self._waited_s += seconds

    def took(self, size: int, texts: int, text_bytes: int, told: object = None) -> None:
        """All that was there has been taken: ``size`` bytes of it; so much text has come by now, and so much is ``told`` of it."""
        if size > AHEAD_BYTES:
            self.is_behind, self._waited_s = True, 0.0
        elif self._waited_s >= CAUGHT_UP_S:
            self.is_behind = False
        if not self.is_behind and (texts, text_bytes, told) != (self.texts, self.text_bytes, self._told):
            now = self._now()
            if now - self._moment_at > MOMENT_S:
                self.before_at, self._moment_at = self.known_at, now
            self.known_at, self.texts, self.text_bytes, self._told = now, texts, text_bytes, told
