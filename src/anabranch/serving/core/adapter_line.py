"""`AdapterLine`: requests that wait for memory for their adapters, and whose turn it is.

Keys take turns: a key's next request is a turn behind its last one, and behind the turn that goes (start-time fair queueing, Goyal, Vin and
Cheng 1996). The first in that order has the right of way: whoever else begins meanwhile has to fit beside it and what is in use
(backfilling with a reservation for the head, Lifka 1995), so that what it waits for falls idle. Never has it a request that is kept from
its room by what its own key uses. It lasts as long as a request may wait: then that is refused, and for as long again its key waits
without the right. So whoever is kept waiting by a key that will not have its room is kept for half of the time at most.
"""

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

__all__ = ["AdapterLine", "Waiter"]

E = TypeVar("E")


@dataclass(eq=False)
class Waiter(Generic[E]):
    """A request and what it is for.

    Attributes:
        id, key: of the request.
        entries: its adapters, with their weights.
        ready: done when they are in memory.
        until: when it is refused, in seconds; while it waits.
        place: its turn, and when it came; while it waits.
    """

    id: str
    key: str
    entries: tuple[tuple[E, float], ...]
    ready: "Future[None]" = field(default_factory=Future)
    until: float = 0.0
    place: tuple[int, int] = (0, 0)

    @property
    def adapters(self) -> set[E]:
        """Its adapters."""
        return {entry for entry, _ in self.entries}


class AdapterLine(Generic[E]):
    """See the module. Not for several threads at once.

    Args:
        wait_s: how long each may wait.
    """

    def __init__(self, wait_s: float) -> None:
        self._wait_s = wait_s
        self._waiters: dict[str, Waiter[E]] = {}
        self._serial = itertools.count()
        # The turn that goes, the last one of each key, and until when a key waits without the right of way.
        self._turn, self._turns, self._vain = 0, dict[str, int](), dict[str, float]()

    def __len__(self) -> int:
        return len(self._waiters)

    def __iter__(self) -> Iterator[Waiter[E]]:
        """In the order of turns."""
        return iter(sorted(self._waiters.values(), key=lambda waiter: waiter.place))

    def of_key(self, key: str) -> int:
        """How many of a key wait."""
        return sum(waiter.key == key for waiter in self._waiters.values())

    def join(self, waiter: Waiter[E], now: float) -> None:
        """One more; one that was here before has the place and the time that it had."""
        if not waiter.until:
            turn = max(self._turn, self._turns.get(waiter.key, -1)) + 1
            self._turns[waiter.key] = turn
            waiter.place, waiter.until = (turn, next(self._serial)), now + self._wait_s
        self._waiters[waiter.id] = waiter

    def leave(self, id: str) -> Waiter[E] | None:
        """One is gone, or begins; None for one that is not here."""
        waiter = self._waiters.pop(id, None)
        if waiter is not None:
            self._turn = max(self._turn, waiter.place[0])
        if not self._waiters:
            self._turns.clear()
        return waiter

    def over(self, now: float) -> list[Waiter[E]]:
        """Those that have waited for as long as they may, which are gone now."""
        found = [waiter for waiter in self._waiters.values() if waiter.until <= now]
        for waiter in found:
            self.leave(waiter.id)
            self._vain[waiter.key] = now + self._wait_s
        return found

    def head(self, now: float, leaves_room: Callable[[Waiter[E]], bool]) -> Waiter[E] | None:
        """The one that has the right of way; ``leaves_room``: whether what its own key uses leaves one room."""
        self._vain = {key: until for key, until in self._vain.items() if until > now}
        return next((one for one in self if one.key not in self._vain and leaves_room(one)), None)

    def able(self, now: float, fits: Callable[..., bool], leaves_room: Callable[[Waiter[E]], bool]) -> list[Waiter[E]]:
        """Those that have room now, in order; ``fits(one, *others)``: beside all that is in use and the others."""
        found: list[Waiter[E]] = []
        head = self.head(now, leaves_room)
        for one in self:
            if fits(one, *found, *(() if head is None or head is one else (head,))):
                found.append(one)
                head = None if head is one else head
        return found

    def next_end(self) -> float | None:
        """When the next has waited for as long as it may; None if nobody waits."""
        return min((waiter.until for waiter in self._waiters.values()), default=None)
