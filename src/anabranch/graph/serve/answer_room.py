"""`AnswerRoom`: how many bytes of answers a server keeps, of those that are made and those that are not read yet.

An answer counts by what is made of it, so that nobody takes room by asking. Where there is none left, the answer that has been read for
longest, if for more than `PATIENCE_S`, makes room: a slow reader is one who is slow while others wait.
"""

import threading
import time
from collections import Counter
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

    def enter(self, source: str, *, is_sure: bool = False) -> "HeldAnswer":
        """A place for an answer, to be closed when nothing is left of it.

        Args:
            source: the address that asks.
            is_sure: its bytes are taken where there is no room, too: something was changed, and who asked for it has to be told.
        """
        return HeldAnswer(self, source, is_sure)

    def _keep(self, held: "HeldAnswer", more: int) -> None:
        gone: list[HeldAnswer] = []
        with self._lock:
            if held.is_closed:
                # Its time was over.
                raise LateError
            why_not = None if held.is_sure else self._why_not(held, more)
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
                held.num_bytes += more
        for late in gone:
            self._on_cut()
            late.cut()
        if why_not is not None:
            raise self._refusal(held, more, why_not)

    def _why_not(self, held: "HeldAnswer", more: int) -> Lack | None:
        """What ``more`` bytes of an answer lack."""
        own = self._of_source[held.source]
        if own and own + more > most_beside(self.num_bytes - own, self._limit, SHARE):
            return "share"
        return "room" if self.num_bytes + more > self._limit else None

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
        self._give_back(held, held.num_bytes)
        held.is_closed = True

    def _give_back(self, held: "HeldAnswer", num_bytes: int) -> None:
        self.num_bytes -= num_bytes
        self._of_source[held.source] -= num_bytes
        held.num_bytes -= num_bytes
        if not self._of_source[held.source]:
            del self._of_source[held.source]


class HeldAnswer:
    """An answer that is kept.

    Attributes:
        source: see `AnswerRoom.enter`.
        is_sure: see there.
        num_bytes: of it that are kept.
        is_closed: nothing is left of it.
    """

    def __init__(self, room: AnswerRoom, source: str, is_sure: bool) -> None:
        self.source, self.is_sure, self.num_bytes, self.is_closed = source, is_sure, 0, False
        self._room = room
        self._cut: Callable[[], None] = lambda: None

    def more(self, num_bytes: int) -> None:
        """Some more of it is made. Raises RequestError where that has no room, LateError if it was closed meanwhile."""
        self._room._keep(self, num_bytes)

    def is_whole(self, cut: Callable[[], None]) -> None:
        """It is made and begins to be read; ``cut`` ends that, in whatever thread it is called."""
        self._cut = cut
        with self._room._lock:
            if not self.is_closed:
                self._room._read[self] = self._room._clock()

    def sent(self, num_bytes: int) -> None:
        """So much of it was handed on."""
        with self._room._lock:
            self._room._give_back(self, min(num_bytes, self.num_bytes))

    def cut(self) -> None:
        """Others need its room."""
        self._cut()

    def close(self) -> None:
        """Nothing is left of it. A second call does nothing."""
        with self._room._lock:
            self._room._forget(self)
