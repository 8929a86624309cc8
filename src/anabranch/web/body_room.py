"""`BodyRoom`: how many bytes of bodies a server keeps, of requests that it has not let in: those that come, or wait to be read.

A body counts by what has come of it, not by what it says it will be, so that nobody takes room with nothing. Where there is no room left,
the body that has been coming for longest, if for more than `PATIENCE_S`, makes room: a slow sender is one who is slow while others wait.
"""

import asyncio
import time
from collections.abc import Callable

from anabranch.web.api_error import ApiError
from anabranch.web.room import PATIENCE_S, Held, Lack, Room

__all__ = ["PATIENCE_S", "BodyRoom", "Kept"]


class BodyRoom(Room):
    """See `Room`."""

    def __init__(
        self,
        limit: int,
        share: float,
        status: int,
        refused: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__(limit, share, status, refused, clock)
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
            raise self._no_room(why_not)
        kept = Kept(self, source)
        self._coming[kept] = self._clock()
        return kept

    def _is_late(self, kept: "Kept") -> bool:
        return self._clock() - self._coming[kept] > PATIENCE_S

    def _keep(self, kept: "Kept", more: int) -> None:
        while (why_not := self._why_not(kept.source, more)) is not None:
            # Nobody else gives way to one who has too much.
            slow = (other for other in self._coming if why_not == "room" or other.source == kept.source)
            slowest = next(slow, None)
            if slowest is None or slowest is kept or not self._is_late(slowest):
                raise self._no_room(why_not)
            slowest.cut_off()
        self._add(kept, more)

    def _no_room(self, why_not: Lack) -> ApiError:
        whose = "this sender's bodies take" if why_not == "share" else "bodies of other requests take"
        return self._refusal(f"{whose} all the room there is until they are read", connection="close")

    def _forget(self, held: Held) -> None:
        if isinstance(held, Kept):
            self._coming.pop(held, None)
        super()._forget(held)


class Kept(Held):
    """A body that is kept; ``num_bytes`` have come. See `Held`."""

    def __init__(self, room: BodyRoom, source: str) -> None:
        super().__init__(room, source)
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
