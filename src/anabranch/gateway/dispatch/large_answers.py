"""`LargeAnswers`: how many bytes of large whole answers are held until they have been read, and how many of them for one sender.

    with room.enter("team-a") as held:
        await held.more(4096)              # as it comes, before more of it is asked for

An answer counts by what has come of it, not by what it may come to: so one whose upstream stops in the middle holds no more than that, and
takes nothing while it is waited for. A sender may have a part of what the others leave; beyond that its answers wait, and their upstreams
with them, the oldest first. Lest answers that have come in part wait for each other for ever, one may go on beyond the room, whatever it
comes to. Senders take turns at that: one whose answer has had it for more than `PATIENCE_S` gives it up to who waits, and gets it again
for that answer alone. So what is held beyond the room is one answer, and one more of each sender whose upstream was that slow.
"""

import asyncio

from anabranch.web.room import PATIENCE_S, Held, Shared

__all__ = ["HELD_BYTES", "PATIENCE_S", "SHARE", "LargeAnswer", "LargeAnswers"]

# Of all, as they came. One of them at a time takes some three times as much, while it is read and written.
HELD_BYTES = 128 << 20

# Of that which others leave, so much is for one sender.
SHARE = 0.5

_Piece = tuple["LargeAnswer", int, "asyncio.Future[None]"]


class LargeAnswers(Shared):
    """For one event loop. See `Shared`: its sources are senders."""

    def __init__(self, limit: int = HELD_BYTES, share: float = SHARE) -> None:
        super().__init__(limit, share)
        self._num_entered = 0
        # The order of the senders is that of their turns.
        self._waiting: dict[str, list[_Piece]] = {}
        # By sender the answer of which there is more than there is room for; the one that goes on, and since when.
        self._beyond: dict[str, LargeAnswer] = {}
        self._going: LargeAnswer | None = None
        self._since = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def enter(self, sender: str) -> "LargeAnswer":
        """A place for an answer, of which nothing is held yet; to be closed when nothing of it is."""
        self._num_entered += 1
        return LargeAnswer(self, sender, self._num_entered)

    async def _more(self, held: "LargeAnswer", num_bytes: int) -> None:
        # Others of its sender that wait go before it, but where it is its turn.
        is_first = held is self._going or held.source not in self._waiting
        if is_first and self._has_taken(held, num_bytes):
            return
        piece = (held, num_bytes, asyncio.get_running_loop().create_future())
        self._waiting.setdefault(held.source, []).append(piece)
        self._let_in()
        try:
            await piece[2]
        except asyncio.CancelledError:
            self._leave(held.source, piece)
            self._let_in()
            raise

    def _has_taken(self, held: "LargeAnswer", num_bytes: int) -> bool:
        if self._of_source[held.source] + num_bytes <= self._part(held.source):
            self._add(held, num_bytes)
            return True
        if held is not self._going:
            return False
        held.num_beyond += num_bytes
        return True

    def _let_in(self) -> None:
        """Whoever may go on does."""
        for sender in list(self._waiting):
            while (piece := self._oldest(sender)) is not None and self._has_taken(*piece[:2]):
                piece[2].set_result(None)
                self._leave(sender, piece)
        if self._waiting:
            self._let_one_go_on()

    def _let_one_go_on(self) -> None:
        loop = asyncio.get_running_loop()
        left_s = self._since + PATIENCE_S - loop.time()
        if self._going is not None and left_s > 0:
            self._look_again(left_s)
            return
        sender = next((sender for sender in self._waiting if self._next_beyond(sender) is not None), None)
        piece = None if sender is None else self._next_beyond(sender)
        if sender is None or piece is None:
            return
        held, num_bytes, future = piece
        self._going, self._since = held, loop.time()
        self._beyond[sender] = held
        held.num_beyond += num_bytes
        future.set_result(None)
        self._leave(sender, piece)
        if sender in self._waiting:
            # The next turn is another sender's.
            self._waiting[sender] = self._waiting.pop(sender)
        if self._waiting:
            self._look_again(PATIENCE_S)

    def _oldest(self, sender: str, only: "LargeAnswer | None" = None) -> _Piece | None:
        """Of what a sender waits with, that of the answer which began first; of one answer alone, if that is said."""
        pieces = [piece for piece in self._waiting.get(sender, ()) if only in (None, piece[0]) and not piece[2].done()]
        return min(pieces, key=lambda piece: piece[0].number, default=None)

    def _next_beyond(self, sender: str) -> _Piece | None:
        """What of a sender may go on beyond the room; None while more of another of its answers is there already."""
        return self._oldest(sender, self._beyond.get(sender))

    def _look_again(self, seconds: float) -> None:
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(seconds, self._look)

    def _look(self) -> None:
        self._timer = None
        self._let_in()

    def _leave(self, sender: str, piece: _Piece) -> None:
        """It waits no more."""
        pieces = self._waiting.get(sender, [])
        if piece in pieces:
            pieces.remove(piece)
        if not pieces:
            self._waiting.pop(sender, None)

    def _forget(self, held: Held) -> None:
        super()._forget(held)
        if isinstance(held, LargeAnswer):
            held.num_beyond = 0
        if self._beyond.get(held.source) is held:
            del self._beyond[held.source]
        if self._going is held:
            self._going = None
        self._let_in()


class LargeAnswer(Held):
    """What is held of one. See `Held`: ``num_bytes`` of it are of the room.

    Attributes:
        number: of a later one it is greater.
        num_beyond: bytes beyond the room.
    """

    def __init__(self, room: LargeAnswers, sender: str, number: int) -> None:
        super().__init__(room, sender)
        self._room, self.number, self.num_beyond = room, number, 0

    async def more(self, num_bytes: int) -> None:
        """So many bytes more of it have come: wait until there is room for them."""
        await self._room._more(self, num_bytes)
