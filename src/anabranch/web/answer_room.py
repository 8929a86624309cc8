"""`AnswerRoom`: how many bytes of answers a server keeps: those that are made, and those that their readers have not taken yet.

    held = room.enter("team-a", cut)      # cut() ends it
    held.more(4096)                       # as it is made, or before, where it is known what it will take
    held.is_read()                        # it is made; its reader takes it
    held.close()

An answer counts until it has been read, so that who asks for much and reads slowly fills no memory. Each source may have a part of what
the others leave. Where an answer grows and there is no room, those that have been read for longer than `PATIENCE_S` make some, of the
source that has most first (of its own, where its part is used up): a slow reader is one who is slow while others wait. If none does, it
is refused. Of those of a source that are made, the first is looked at as if it were alone: so they are made one after the other rather
than all of them in part. One that is alone may be larger than the part, up to what one source may have and then one more of what is left
(three quarters of all, where a part is half), if others have so little that this much stays free. Nobody else is cut for it.
"""

import time
from collections.abc import Callable

from anabranch.sharing import most_beside
from anabranch.web.api_error import ApiError
from anabranch.web.room import PATIENCE_S, Held, Lack, Room

__all__ = ["AnswerRoom", "HeldAnswer"]


class AnswerRoom(Room):
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
        # Those with bytes that are made, by source in the order in which they began; and since when the others are read, in that order.
        self._made: dict[str, dict[HeldAnswer, None]] = {}
        self._read: dict[HeldAnswer, float] = {}

    def enter(self, source: str, cut: Callable[[], None]) -> "HeldAnswer":
        """A place for an answer, to be closed when nothing is left of it; ``cut`` ends it, for it makes room for others."""
        return HeldAnswer(self, source, cut)

    def _keep(self, held: "HeldAnswer", more: int) -> None:
        most = int(self._most_with_one)
        if held.num_bytes + more > most:
            self._refused()
            what = f"the answer takes over {most:,} bytes, which is all the room that the server has for one answer"
            raise ApiError(400, "over_limit", f"{what}; ask for less at once")
        while (why_not := self._lack(held, more)) is not None:
            late = self._late(held.source if why_not == "share" else None)
            if late is None:
                raise self._no_room(why_not)
            late.cut_off()
        if held not in self._read:
            self._made.setdefault(held.source, {}).setdefault(held)
        self._add(held, more)

    def _lack(self, held: "HeldAnswer", more: int) -> Lack | None:
        made = list(self._made.get(held.source, ()))
        if made and made[0] is not held:
            return self._why_not(held.source, more)
        total, own = self.num_bytes + more, self._of_source[held.source]
        part = self._part(held.source)
        read = own - sum(each.num_bytes for each in made or [held])
        is_alone = not read or read + held.num_bytes + more <= part
        if self._share < 1 and own + more > part and not (is_alone and total <= self._most_with_one):
            return "share"
        return "room" if total > self.limit else None

    @property
    def _most_with_one(self) -> float:
        """Bytes of all that are kept, where one answer is larger than the part of its source: another key has its part of the rest."""
        part = most_beside(0, self.limit, self._share)
        return part + most_beside(part, self.limit, self._share)

    def _late(self, source: str | None) -> "HeldAnswer | None":
        """Who makes room, of one source or of all."""
        now = self._clock()
        late = [
            held
            for held, since in self._read.items()
            if now - since > PATIENCE_S and held.num_bytes and source in (None, held.source)
        ]
        return max(late, key=lambda held: self._of_source[held.source], default=None)

    def _no_room(self, why_not: Lack) -> ApiError:
        what = (
            "answers to this sender take their part of the room" if why_not == "share" else "answers take all the room"
        )
        return self._refusal(f"{what} that the server has for them, until they are read")

    def _is_read(self, held: "HeldAnswer") -> None:
        self._is_made(held)
        self._read.setdefault(held, self._clock())

    def _is_made(self, held: "HeldAnswer") -> None:
        made = self._made.get(held.source, {})
        made.pop(held, None)
        if not made:
            self._made.pop(held.source, None)

    def _forget(self, held: Held) -> None:
        if isinstance(held, HeldAnswer):
            self._is_made(held)
            self._read.pop(held, None)
        super()._forget(held)


class HeldAnswer(Held):
    """An answer that is kept. See `Held`."""

    def __init__(self, room: AnswerRoom, source: str, cut: Callable[[], None]) -> None:
        super().__init__(room, source)
        self._room, self._cut = room, cut

    def more(self, num_bytes: int) -> None:
        """It takes so many bytes more. Raises ApiError with ``Retry-After`` where that has no room."""
        self._room._keep(self, num_bytes)

    def is_read(self) -> None:
        """It is made, or goes to its reader as it is. A second call does nothing."""
        self._room._is_read(self)

    def cut_off(self) -> None:
        """Others need its room."""
        self.close()
        self._cut()
