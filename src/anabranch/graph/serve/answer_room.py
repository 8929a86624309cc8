"""`AnswerRoom`: how many bytes of answers a server keeps, of those that are made and those that are not read yet.

What an answer will take, as far as that is known, is kept for it before anything is computed (`HeldAnswer.reserve`): who finds no room is
told so at once, and not when most of it is made. What was not needed is given back row by row. An answer that is made and becomes larger
than was thought takes more where there is room, the oldest of its address also beyond the share of that; so one that was let in is not
given up for another that came later. Where there is no room left, the answer that has been read for longest, if for more than `PATIENCE_S`,
makes some: a slow reader is one who is slow while others wait.
"""

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Literal

from anabranch.graph.serve.gate import LateError
from anabranch.graph.serve.requests import RequestError
from anabranch.sharing import most_beside

PATIENCE_S = 2.0

# Of the room that others leave, so much is for one address.
SHARE = 0.5
Lack = Literal["share", "room"]


class AnswerRoom:
    """For several threads.

    Args:
        limit: bytes.
        on_cut: called, in any thread, for each answer that makes room.
        clock: seconds, monotonic.

    Attributes:
        num_bytes: that are kept.
    """

    def __init__(
        self, limit: int, on_cut: Callable[[], None] = lambda: None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.num_bytes = 0
        self._limit, self._on_cut, self._clock = limit, on_cut, clock
        self._lock = threading.Lock()
        self._of_source: Counter[str] = Counter()
        # Those that are read, the one that has been for longest first.
        self._read: dict[HeldAnswer, float] = {}
        # Those that are made, for each address in the order in which they were let in.
        self._made: defaultdict[str, dict[HeldAnswer, None]] = defaultdict(dict)

    def enter(self, source: str, *, is_sure: bool = False) -> "HeldAnswer":
        """A place for an answer, to be closed when nothing is left of it.

        Args:
            source: the address that asks.
            is_sure: its bytes are taken where there is no room, too: something was changed, and who asked for it has to be told.
        """
        return HeldAnswer(self, source, is_sure)

    def _keep(self, held: "HeldAnswer", num_bytes: int, *, is_made: bool) -> None:
        """Count bytes of an answer that are made, or will be, and then no more than anyone may have."""
        gone: list[HeldAnswer] = []
        with self._lock:
            if held.is_closed:
                # Its time was over.
                raise LateError
            if is_made:
                more = max(num_bytes - held.reserved, 0)
                held.reserved -= num_bytes - more
                held.num_bytes += num_bytes - more
            else:
                more = max(min(num_bytes, int(SHARE * self._limit) - held.num_bytes), 0)
            why_not = self._why_not(held, more)
            while why_not is not None:
                late = self._late(held, why_not)
                if late is None:
                    break
                self._forget(late)
                gone.append(late)
                why_not = self._why_not(held, more)
            if why_not is None:
                self.num_bytes += more
                self._of_source[held.source] += more
                if is_made:
                    held.num_bytes += more
                else:
                    held.reserved += more
                    self._made[held.source].setdefault(held)
        for late in gone:
            self._on_cut()
            late.cut()
        if why_not is not None:
            raise self._refusal(held, more, why_not)

    def _why_not(self, held: "HeldAnswer", more: int) -> Lack | None:
        """What ``more`` bytes of an answer lack."""
        if held.is_sure or not more:
            return None
        own = self._of_source[held.source]
        if (
            own
            and own + more > most_beside(self.num_bytes - own, self._limit, SHARE)
            and not self._is_first(held, more)
        ):
            return "share"
        return "room" if self.num_bytes + more > self._limit else None

    def _is_first(self, held: "HeldAnswer", more: int) -> bool:
        """Whether it was let in before all of its address that are made, and has no more than anyone may."""
        made = self._made.get(held.source)
        return made is not None and next(iter(made), None) is held and held.num_bytes + more <= SHARE * self._limit

    def _late(self, held: "HeldAnswer", why_not: Lack) -> "HeldAnswer | None":
        """The answer that makes room: of the same address where that has too much."""
        now = self._clock()
        for other, since in self._read.items():
            if now - since > PATIENCE_S and (why_not == "room" or other.source == held.source):
                return other
        return None

    def _refusal(self, held: "HeldAnswer", more: int, why_not: Lack) -> RequestError:
        most = int(SHARE * self._limit)
        if held.num_bytes + more > most:
            return RequestError(
                400, "over_limit", f"the answer has over {most:,} bytes, which is the limit; ask for fewer at once"
            )
        whose = "answers to this address" if why_not == "share" else "answers to others"
        message = f"{whose} take all the room there is until they are read; try again"
        return RequestError(429, "overloaded", message, headers={"Retry-After": "1"})

    def _forget(self, held: "HeldAnswer") -> None:
        """With the lock. A second call does nothing."""
        self._read.pop(held, None)
        self._is_made(held)
        self._give_back(held, held.num_bytes)
        held.num_bytes, held.is_closed = 0, True

    def _is_made(self, held: "HeldAnswer") -> None:
        """Nothing more of it comes."""
        self._keep_reserved(held, 0)
        made = self._made.get(held.source, {})
        made.pop(held, None)
        if not made:
            self._made.pop(held.source, None)

    def _keep_reserved(self, held: "HeldAnswer", num_bytes: int) -> None:
        spare = max(held.reserved - num_bytes, 0)
        held.reserved -= spare
        self._give_back(held, spare)

    def _give_back(self, held: "HeldAnswer", num_bytes: int) -> None:
        self.num_bytes -= num_bytes
        self._of_source[held.source] -= num_bytes
        if not self._of_source[held.source]:
            del self._of_source[held.source]


class HeldAnswer:
    """An answer that is kept.

    Attributes:
        source: see `AnswerRoom.enter`.
        is_sure: see there.
        num_bytes: of it that are kept.
        reserved: bytes that are kept for what is not made yet.
        is_closed: nothing is left of it.
    """

    def __init__(self, room: AnswerRoom, source: str, is_sure: bool) -> None:
        self.source, self.is_sure, self.is_closed = source, is_sure, False
        self.num_bytes = self.reserved = 0
        self._room = room
        self._cut: Callable[[], None] = lambda: None

    def reserve(self, num_bytes: int) -> None:
        """Keep so many bytes, or as many as one answer may have, for what will be made; raises as `more`."""
        self._room._keep(self, num_bytes, is_made=False)

    def keep_reserved(self, num_bytes: int) -> None:
        """No more than so many bytes come yet, as far as is known."""
        with self._room._lock:
            self._room._keep_reserved(self, num_bytes)

    def more(self, num_bytes: int) -> None:
        """Some more of it is made. Raises RequestError where that has no room, LateError if it was closed meanwhile."""
        self._room._keep(self, num_bytes, is_made=True)

    def is_whole(self, cut: Callable[[], None]) -> None:
        """It is made and begins to be read; ``cut`` ends that, in whatever thread it is called."""
        self._cut = cut
        with self._room._lock:
            if not self.is_closed:
                self._room._is_made(self)
                self._room._read[self] = self._room._clock()

    def sent(self, num_bytes: int) -> None:
        """So much of it was handed on."""
        with self._room._lock:
            gone = min(num_bytes, self.num_bytes)
            self.num_bytes -= gone
            self._room._give_back(self, gone)

    def cut(self) -> None:
        """Others need its room."""
        self._cut()

    def close(self) -> None:
        """Nothing is left of it. A second call does nothing."""
        with self._room._lock:
            self._room._forget(self)
