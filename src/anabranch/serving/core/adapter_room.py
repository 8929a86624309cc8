"""`AdapterRoom`: what requests under way use of the memory for adapters, and what has room beside it.

An adapter takes its bytes once, however many requests use it. Those that are pinned are always there, so that a request takes none for
them, and gives none by its end. Memory that holds an adapter which nobody uses is free.
"""

import itertools
import math
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property
from typing import Generic

from anabranch.serving.core.adapter_entry import Entry, H

__all__ = ["AdapterRoom", "Waiter"]


@dataclass(eq=False)
class Waiter(Generic[H]):
    """A request and what it is for.

    Attributes:
        id, key: of the request.
        entries: its adapters, with their weights.
        ready: done when they are in memory.
        until: when it is refused, in seconds; once it has waited.
        came: when it began to wait, by a count.
        held_s: for how long it has had the right of way.
    """

    id: str
    key: str
    entries: tuple[tuple[Entry[H], float], ...]
    ready: "Future[None]" = field(default_factory=Future)
    until: float = 0.0
    came: int = 0
    held_s: float = 0.0

    @cached_property
    def adapters(self) -> frozenset[Entry[H]]:
        """Its adapters."""
        return frozenset(entry for entry, _ in self.entries)

    @property
    def is_there(self) -> bool:
        """Whether all of them are in memory."""
        return all(entry.held is not None for entry in self.adapters)


class AdapterRoom(Generic[H]):
    """See the module. Not for several threads at once.

    Attributes:
        most_bytes: that all adapters may take.
        pinned: those that stay in memory; one that is still to be read is as any other.
        used: those of requests under way.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes = most_bytes
        self.pinned: list[Entry[H]] = []
        self.used: set[Entry[H]] = set()
        self._leases: dict[str, Waiter[H]] = {}
        self._serial = itertools.count(1)

    def lease(self, id: str) -> Waiter[H] | None:
        """A request under way; None for one that is not."""
        return self._leases.get(id)

    def touch(self, entry: Entry[H]) -> None:
        """An adapter is the most recently used."""
        entry.used_at = next(self._serial)

    def begin(self, one: Waiter[H]) -> None:
        """A request uses its adapters from now on."""
        for entry, _ in one.entries:
            entry.uses += 1
            self.touch(entry)
            entry.used_by[one.key] = (entry.used_at, math.inf)
        self.used |= one.adapters
        self._leases[one.id] = one

    def end(self, id: str) -> list[Entry[H]] | None:
        """A request does not any more; those that nobody uses then. None for one that has not begun."""
        lease = self._leases.pop(id, None)
        if lease is None:
            return None
        for entry, _ in lease.entries:
            entry.uses -= 1
        idle = [entry for entry in lease.adapters if not entry.uses]
        self.used.difference_update(idle)
        return idle

    def own(self, key: str) -> set[Entry[H]]:
        """What the requests of a key that are under way use."""
        return {entry for lease in self._leases.values() if lease.key == key for entry in lease.adapters}

    def adds_nothing(self, one: Waiter[H]) -> bool:
        """Whether a request uses nothing but what is pinned or in use."""
        return all(entry.stays or entry in self.used for entry in one.adapters)

    def fits(self, one: Waiter[H]) -> bool:
        """Whether a request has room now; one that adds nothing has, also where that which is in use has none for what is still read."""
        return (self.adds_nothing(one) and one.is_there) or self._bytes_of(self.used | one.adapters) <= self.most_bytes

    def fits_ever(self, one: Waiter[H]) -> bool:
        """Whether a request has room where nobody else is."""
        return self._bytes_of(one.adapters) <= self.most_bytes

    def fits_beside_own(self, one: Waiter[H]) -> bool:
        """Whether what its own key uses leaves a request room."""
        return self._bytes_of(self.own(one.key) | one.adapters) <= self.most_bytes

    def closable(self, one: Waiter[H]) -> list[Entry[H]]:
        """What could fall idle to make room for a request: what others alone use, and it does not; the least used first."""
        kept = self.own(one.key) | one.adapters
        found = [entry for entry in self.used if not entry.stays and entry not in kept]
        return sorted(found, key=lambda entry: (entry.uses, entry.used_at))

    def num_needed(self, one: Waiter[H], closable: Sequence[Entry[H]]) -> int:
        """How many of ``closable``, the first of them, have to fall idle for a request; all are in use."""
        total = self._bytes_of(self.used | one.adapters)
        for number, entry in enumerate(closable):
            if total <= self.most_bytes:
                return number
            total -= entry.size
        return len(closable)

    def spares(self, one: Waiter[H], head: Waiter[H], needed: Iterable[Entry[H]]) -> bool:
        """Whether ``head`` has room beside a request too, once nobody uses what is ``needed``."""
        later = (self.used.difference(needed)) | head.adapters | one.adapters
        return self.adds_nothing(one) or self._bytes_of(later) <= self.most_bytes

    def _bytes_of(self, entries: Iterable[Entry[H]]) -> int:
        """Of these adapters and of those that stay."""
        pinned = sum(entry.size for entry in self.pinned)
        return pinned + sum(entry.size for entry in entries if not entry.stays)
