"""`AdapterLine`: requests that wait for memory for their adapters, and whose turn it is.

1. Keys take turns: the key that has waited for longest since it last had its turn is first, with the first of its requests; a key's
   second request comes behind the first of each. A request that is cancelled changes nobody else's place, and one that is replaced hands
   on its own, with its time.
2. Whoever has room begins. The first that has none, though what its own key uses would leave it some, has the right of way (backfilling
   with a reservation for the head, Lifka 1995): as many of the adapters in use as have to fall idle for it, the least used ones, are closed
   to all others, and whoever begins meanwhile leaves it what room it will have then. A sixth of a request's waiting time later one more
   adapter is closed to others, and so on, as those that were chosen may be in use for long. Each time that a turn was taken all that have
   room begin first, before anything is kept for the next: what stood idle for one is not kept idle for another, nor for more of its key.
   Who has the right of way keeps it, also where one before it in line could have it now.
3. So a request that adds no bytes, since its adapters are pinned or in use, waits only where one of them is closed; never for pinned ones.
4. A request waits for so long at most, and is refused then. A key whose request leaves without having begun is without the right of way
   for as long as that had it: it keeps others waiting for half of the time at most. One that never had it gives its place to the next of
   its key, if that comes within the time that it may wait.

A key with one request at a time therefore begins within (n + 1) L seconds, whatever the others do, where n other keys wait as it comes and
no request lasts for longer than L; if that is no longer than it may wait, and its adapters were in memory before, so that their sizes are
known.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Generic

from anabranch.serving.core.adapter_entry import Entry, H
from anabranch.serving.core.adapter_room import AdapterRoom, Waiter

__all__ = ["AdapterLine"]

# Of the time that a request may wait, the part after which one more adapter is closed for it.
_STEP = 1 / 6


class AdapterLine(Generic[H]):
    """See the module. Not for several threads at once.

    Args:
        wait_s: how long each may wait.
        room: what is in use; requests begin in it.
    """

    def __init__(self, wait_s: float, room: AdapterRoom[H]) -> None:
        self._wait_s, self._room = wait_s, room
        # By key and id.
        self._waiters: dict[str, dict[str, Waiter[H]]] = {}
        self._serial = itertools.count()
        # Of keys that wait: when they last had their turn.
        self._served: dict[str, int] = {}
        # Until when a key is without the right of way; and the place that its next request has, and until when.
        self._vain: dict[str, float] = {}
        self._kept: dict[str, tuple[int, float]] = {}
        # Who has the right of way, when it came to it, until when that is counted, and what may be closed for it.
        self._head: Waiter[H] | None = None
        self._head_since = self._counted_until = 0.0
        self._closable: list[Entry[H]] = []

    def __len__(self) -> int:
        return sum(map(len, self._waiters.values()))

    def __contains__(self, id: str) -> bool:
        return any(id in own for own in self._waiters.values())

    def __iter__(self) -> Iterator[Waiter[H]]:
        """In the order of turns, those without the right of way last."""
        ranked = []
        for key, own in self._waiters.items():
            first, *_ = ordered = sorted(own.values(), key=lambda one: one.came)
            place = max(first.came, self._served.get(key, -1))
            ranked += [((key in self._vain, number, place), one) for number, one in enumerate(ordered)]
        return (one for _, one in sorted(ranked, key=lambda pair: pair[0]))

    @property
    def head(self) -> Waiter[H] | None:
        """The one that has the right of way."""
        return self._head

    def of_key(self, key: str) -> int:
        """How many of a key wait."""
        return len(self._waiters.get(key, ()))

    def join(self, one: Waiter[H], now: float) -> None:
        """One more; one that was here before has the place and the time that it had."""
        if not one.until:
            kept, until = self._kept.pop(one.key, (0, now))
            one.came, one.until = kept if until > now else next(self._serial), now + self._wait_s
        self._waiters.setdefault(one.key, {})[one.id] = one

    def replace(self, id: str, one: Waiter[H]) -> bool:
        """One more takes over the place of one of its key, its time and its right of way; False where that is not here."""
        own = self._waiters.get(one.key, {})
        if id not in own:
            return False
        before = own.pop(id)
        own[one.id] = one
        one.came, one.until, one.held_s = before.came, before.until, before.held_s
        if before is self._head:
            # For how long it has had that goes on, and so does what is closed for it.
            self._head, self._closable = one, [entry for entry in self._closable if entry not in one.adapters]
        return True

    def go(self, now: float) -> list[Waiter[H]]:
        """Begin those that may now; they are those."""
        self._vain = {key: until for key, until in self._vain.items() if until > now}
        self._kept = {key: kept for key, kept in self._kept.items() if kept[1] > now}
        self._closable = [entry for entry in self._closable if entry in self._room.used]
        order = sorted(self, key=lambda one: one is not self._head)
        left, head = self._take_turns(order)
        if len(left) < len(order):
            left = self._begin_if(left, self._room.fits)
            # Its own key may be what leaves the head no room now.
            left, head = self._take_turns(left)
        self._give(head, now)
        left = self._begin_if(left, lambda one: self._room.fits(one) and self.spares(one, now))
        return [one for one in order if one not in left]

    def leave(self, id: str, now: float) -> Waiter[H] | None:
        """One is gone and has not begun; None for one that is not here."""
        one = next((own[id] for own in self._waiters.values() if id in own), None)
        if one is None:
            return None
        had_turn = one is self._head
        if had_turn:
            self._give(None, now)
        self._remove(one, is_turn=had_turn)
        if one.held_s:
            self._vain[one.key] = max(self._vain.get(one.key, now), now + one.held_s)
        return one

    def over(self, now: float) -> list[Waiter[H]]:
        """Those that have waited for as long as they may, which are gone now."""
        found = [one for own in self._waiters.values() for one in own.values() if one.until <= now]
        for one in found:
            self.leave(one.id, now)
            if not one.held_s and not self.of_key(one.key):
                self._kept[one.key] = (one.came, now + self._wait_s)
        return found

    def spares(self, one: Waiter[H], now: float) -> bool:
        """Whether a request may begin as far as that goes which has the right of way."""
        if self._head is None:
            return True
        needed, closed = self._closed(now)
        return not any(entry in one.adapters for entry in closed) and self._room.spares(one, self._head, needed)

    def closed(self, now: float) -> set[Entry[H]]:
        """Adapters that are closed to all but the one that has the right of way."""
        return set(self._closed(now)[1])

    def _closed(self, now: float) -> tuple[list[Entry[H]], list[Entry[H]]]:
        """Those that have to fall idle for it, and those that are closed, these among them."""
        if self._head is None:
            return [], []
        num_needed = self._room.num_needed(self._head, self._closable)
        num_more = int((now - self._head_since) / (_STEP * self._wait_s)) if self._wait_s else 0
        return self._closable[:num_needed], self._closable[: num_needed + num_more]

    def next_end(self) -> float | None:
        """When the next has waited for as long as it may; None if nobody waits."""
        return min((one.until for own in self._waiters.values() for one in own.values()), default=None)

    def _take_turns(self, waiters: list[Waiter[H]]) -> tuple[list[Waiter[H]], Waiter[H] | None]:
        """Begin those whose turn it is, as far as there is room; the others, and the first that has none and may have the right of way."""
        left = []
        for number, one in enumerate(waiters):
            if self._room.fits(one):
                self._begin(one, is_turn=True)
                continue
            left.append(one)
            if self._may_lead(one):
                return left + waiters[number + 1 :], one
        return left, None

    def _begin_if(self, waiters: list[Waiter[H]], may: Callable[[Waiter[H]], bool]) -> list[Waiter[H]]:
        """Begin those that may, out of turn; the others."""
        left = []
        for one in waiters:
            if may(one):
                self._begin(one, is_turn=False)
            else:
                left.append(one)
        return left

    def _may_lead(self, one: Waiter[H]) -> bool:
        """Whether a request that has no room may have the right of way."""
        return one.key not in self._vain and self._room.fits_beside_own(one)

    def _begin(self, one: Waiter[H], *, is_turn: bool) -> None:
        self._remove(one, is_turn=is_turn)
        self._room.begin(one)

    def _remove(self, one: Waiter[H], *, is_turn: bool) -> None:
        own = self._waiters[one.key]
        del own[one.id]
        if not own:
            del self._waiters[one.key]
            self._served.pop(one.key, None)
        elif is_turn:
            self._served[one.key] = next(self._serial)

    def _give(self, head: Waiter[H] | None, now: float) -> None:
        """Somebody has the right of way, or nobody."""
        if self._head is not None:
            self._head.held_s += now - self._counted_until
        self._counted_until = now
        if head is not self._head:
            self._closable = [] if head is None else self._room.closable(head)
            self._head, self._head_since = head, now
