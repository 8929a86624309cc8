"""`BodyRoom`: how many bytes of bodies a server keeps, of requests that it has not let in: those that come, or wait to be read.

A body counts by what has come of it, not by what it says it will be, so that nobody takes room with nothing. Where there is no room left,
the body that has been coming for longest, if for more than `PATIENCE_S`, makes room: a slow sender is one who is slow while others wait.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Literal, Self

from anabranch.sharing import most_beside
from anabranch.web.api_error import ApiError

__all__ = ["BodyRoom", "Kept"]

PATIENCE_S = 2.0
Lack = Literal["share", "room"]


class BodyRoom:
    """For one thread (an event loop).

    Args:
        limit: bytes.
        share: of what others leave, that one source may have; see `most_beside`. What comes first from a source is taken where there is
            room.
        status: of a refusal.
        refused: told of each.
        clock: seconds, monotonic.

    Attributes:
        limit: may be changed; what is kept stays.
        num_bytes: that are kept.
    """

    def __init__(
        self,
        limit: int,
        share: float,
        status: int,
        refused: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.num_bytes = 0
        self.limit, self._share, self._status, self._refused, self._clock = limit, share, status, refused, clock
        self._of_source: Counter[str] = Counter()
        # Those that come, the one that has been coming for longest first.
        self._coming: dict[Kept, float] = {}

    def enter(self, source: str, length: int | None) -> "Kept":
        """A place for a body, to be closed when nothing is left of it.

        Args:
            source: whose it is: an API key, or an address.
            length: bytes that it says it has, if it does.

        Raises ApiError with ``Retry-After``, before anything is read, where there is no room for those bytes.
        """
        late = [kept for kept in self._coming if self._is_late(kept)]
        why_not = self._why_not(source, length or 1, late)
        if why_not is not None:
            raise self._refusal(why_not)
        kept = Kept(self, source)
        self._coming[kept] = self._clock()
        return kept

    def _why_not(self, source: str, more: int, gone: "Sequence[Kept]" = ()) -> Lack | None:
        """What ``more`` bytes of a source lack, even were those ``gone``."""
        total = self.num_bytes - sum(kept.num_bytes for kept in gone)
        own = self._of_source[source] - sum(kept.num_bytes for kept in gone if kept.source == source)
        if own and own + more > most_beside(total - own, self.limit, self._share):
            return "share"
        return "room" if total + more > self.limit else None

    def _is_late(self, kept: "Kept") -> bool:
        return self._clock() - self._coming[kept] > PATIENCE_S

    def _keep(self, kept: "Kept", more: int) -> None:
        while (why_not := self._why_not(kept.source, more)) is not None:
            # Nobody else gives way to one who has too much.
            slow = (other for other in self._coming if why_not == "room" or other.source == kept.source)
            slowest = next(slow, None)
            if slowest is None or slowest is kept or not self._is_late(slowest):
                raise self._refusal(why_not)
            slowest.cut_off()
        self.num_bytes += more
        self._of_source[kept.source] += more
        kept.num_bytes += more

    def _refusal(self, why_not: Lack) -> ApiError:
        self._refused()
        whose = "this sender's bodies take" if why_not == "share" else "bodies of other requests take"
        message = f"overloaded: {whose} all the room there is until they are read; try again in 1 s"
        headers = {"Retry-After": "1", "x-should-retry": "true", "connection": "close"}
        return ApiError(self._status, "overloaded", message, type="rate_limit_error", headers=headers)

    def _forget(self, kept: "Kept") -> None:
        self._coming.pop(kept, None)
        self.num_bytes -= kept.num_bytes
        self._of_source[kept.source] -= kept.num_bytes
        kept.num_bytes = 0
        if not self._of_source[kept.source]:
            del self._of_source[kept.source]


class Kept:
    """A body that is kept. Also a context manager that closes it.

    Attributes:
        source: see `BodyRoom.enter`.
        num_bytes: that have come.
    """

    def __init__(self, room: BodyRoom, source: str) -> None:
        self.source, self.num_bytes = source, 0
        self._room = room
        self._left: asyncio.Timeout | None = None

    def more(self, num_bytes: int, left: asyncio.Timeout) -> None:
        """Some more of it comes, and ``left`` is the time that it has. Raises ApiError where that has no room."""
        self._left = left
        self._room._keep(self, num_bytes)

    def is_whole(self) -> None:
        """It has come, and is kept however long it has to wait."""
        self._room._coming.pop(self, None)

    def cut_off(self) -> None:
        """It has been coming for too long."""
        if self._left is not None:
            self._left.reschedule(asyncio.get_running_loop().time())
        self.close()

    def close(self) -> None:
        """Nothing is left of it. A second call does nothing."""
        self._room._forget(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
