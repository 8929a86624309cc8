"""`AdapterMemory`: which adapters of a shelf there are, which are in memory, and which leave it for one more.

Of those that nobody uses the least recently used leave first. But what a key has used within the last minute stays as long as something
else can go, up to an even part of the memory among the keys that used any within it: who asks for one after another pushes out its own.
One that several keys have used is of the part of each, so that nobody takes it out of another's by using it too.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Generic

from anabranch.errors import CapacityError
from anabranch.serving.core.adapter_entry import Entry, H
from anabranch.serving.core.adapter_room import AdapterRoom, Waiter
from anabranch.serving.core.client import BusyError

__all__ = ["AdapterMemory", "NoRoomError"]

# Seconds for which a key's part is kept for it.
KEPT_S = 60.0


class NoRoomError(BusyError):
    """There is none beside what others use."""


class AdapterMemory(Generic[H]):
    """See the module. Not for several threads at once.

    Args:
        room: what requests use, and what all may take.
        clock: seconds, monotonic.

    Attributes:
        entries: those that there are, by name.
        num_loads, num_evictions: how often one came into memory, and left it for another.
    """

    def __init__(self, room: AdapterRoom[H], clock: Callable[[], float] = time.monotonic) -> None:
        self._room, self._time = room, clock
        self.entries: dict[str, Entry[H]] = {}
        self.num_loads = self.num_evictions = 0

    def all(self) -> list[Entry[H]]:
        """Those that there are, and those that are unloaded or replaced and still in use."""
        return list(dict.fromkeys((*self.entries.values(), *self._room.used)))

    def hold(
        self,
        entry: Entry[H],
        held: H,
        *,
        before: Entry[H] | None = None,
        together: Iterable[Entry[H]] = (),
        key: str | None = None,
    ) -> None:
        """One more is in memory, and others are not any longer. Arguments and errors as of `find_room`."""
        entry.size = held.nbytes
        for other in self.find_room(entry, before=before, together=together, key=key):
            other.held = None
            self.num_evictions += 1
        entry.held, entry.version = held, held.version
        if entry.is_pinned:
            self._room.pinned.append(entry)
        self.num_loads += 1

    def retire(self, entry: Entry[H]) -> None:
        """An adapter that no request to come gets."""
        if not entry.uses:
            entry.held = None

    def end(self, id: str) -> bool:
        """A request uses its adapters no more; False for one that has not begun."""
        lease = self._room.lease(id)
        idle = self._room.end(id)
        if lease is not None:
            self._note_end(lease)
        for entry in idle or ():
            if self.entries.get(entry.name) is not entry:
                entry.held = None
        return idle is not None

    def find_room(
        self,
        entry: Entry[H],
        *,
        before: Entry[H] | None = None,
        together: Iterable[Entry[H]] = (),
        key: str | None = None,
    ) -> list[Entry[H]]:
        """Adapters that nobody uses and that have to go for one more.

        Args:
            entry: the one more, whose size is known.
            before: what it takes the place of.
            together: all that the request it is read for uses.
            key: of that request; None where an operator asks.

        Raises CapacityError where there never is room, `NoRoomError` where there is none now.
        """
        if (error := self.never(entry, together)) is not None:
            raise error
        others = [other for other in self.all() if other is not before or other.uses]
        total, most_bytes = entry.size + sum(other.nbytes for other in others), self._room.most_bytes
        leaving = []
        for other in self._idle(others, key):
            if total <= most_bytes:
                break
            leaving.append(other)
            total -= other.nbytes
        if total > most_bytes:
            raise NoRoomError(
                f"adapter {entry.name!r} takes {entry.size:,} bytes, and those in use {total - entry.size:,} of {most_bytes:,}; ask again"
            )
        return leaving

    def never(self, entry: Entry[H], together: Iterable[Entry[H]]) -> CapacityError | None:
        """Why there never is room for one more, if so. Arguments as of `find_room`."""
        pinned = sum(other.nbytes for other in self._room.pinned)
        mixed = sum(other.size for other in together if other is not entry and not other.stays)
        if pinned + mixed + entry.size <= self._room.most_bytes:
            return None
        beside = [f"{pinned:,} of those that are pinned"] if pinned else []
        beside += [f"{mixed:,} of the others in its mixture"] if mixed else []
        told = f" beside {' and '.join(beside)}" if beside else ""
        return CapacityError(
            f"adapter {entry.name!r} takes {entry.size:,} bytes{told}, and adapters may take {self._room.most_bytes:,}; allow more with "
            "engine.adapters.memory"
        )

    def _note_end(self, one: Waiter[H]) -> None:
        """Note when the key of a request that has ended last used its adapters."""
        now, still = self._time(), self._room.own(one.key)
        for entry in one.adapters - still:
            used_at, _ = entry.used_by[one.key]
            entry.used_by[one.key] = (used_at, now)
            # What keys have used longer ago counts no more, and many keys may come.
            entry.used_by = {key: use for key, use in entry.used_by.items() if use[1] > now - KEPT_S}

    def _idle(self, entries: Iterable[Entry[H]], key: str | None) -> list[Entry[H]]:
        """Those in memory that nobody uses, the first to go first: those that are nobody's part, of the key's own alone, of other keys'."""
        kept = self._kept(key)
        idle = [entry for entry in entries if entry.held is not None and not entry.uses and not entry.is_pinned]
        return sorted(idle, key=lambda each: (bool(kept[each]) + bool(kept[each] - {key}), each.used_at))

    def _kept(self, key: str | None) -> dict[Entry[H], set[str | None]]:
        """The keys whose part each is of: what a key has used of late, the most recently used first, up to its part.

        The parts are as large as if this key had one too.
        """
        since = self._time() - KEPT_S
        there = [entry for entry in self.all() if entry.held is not None and not entry.is_pinned]
        kept: dict[Entry[H], set[str | None]] = {entry: set() for entry in there}
        uses = [
            (used_at, other, entry)
            for entry in there
            for other, (used_at, ended) in entry.used_by.items()
            if ended > since
        ]
        part = self._room.most_bytes / max(len({key, *(other for _, other, _ in uses)} - {None}), 1)
        has = Counter[str]()
        for _, other, entry in sorted(uses, key=lambda use: use[0], reverse=True):
            has[other] += entry.nbytes
            if has[other] <= part:
                kept[entry].add(other)
        return kept
