"""`Held`: what is kept of many senders within bounds that are of all of them, so that nobody's pushes out what others have."""

import heapq
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")

# Entries that are true no more, beside as many as there are true ones.
_SLACK = 64


class _Largest:
    """Who has most of something, without a look at everybody; of those who have as much, whoever has had it for longest.

    Attributes:
        of: how much each has.
    """

    def __init__(self) -> None:
        self.of: dict[str, int] = {}
        # Each entry was true once; the newest of each is. The number says when that was.
        self._heap: list[tuple[int, int, str]] = []
        self._entry: dict[str, tuple[int, int, str]] = {}
        self._number = 0

    def add(self, who: str, amount: int) -> None:
        """So much more, or less; whoever has none left is not known any more."""
        self.of[who] = self.of.get(who, 0) + amount
        self._number += 1
        self._entry[who] = entry = (-self.of[who], self._number, who)
        heapq.heappush(self._heap, entry)
        if len(self._heap) > 2 * len(self._entry) + _SLACK:
            self._heap = list(self._entry.values())
            heapq.heapify(self._heap)

    def forget(self, who: str) -> None:
        """He has nothing."""
        del self.of[who], self._entry[who]

    def first(self) -> str:
        """Who it is; there has to be somebody."""
        while self._entry.get(self._heap[0][2]) is not self._heap[0]:
            heapq.heappop(self._heap)
        return self._heap[0][2]


class Held(Generic[K, V]):
    """Values by (sender, key). Beyond a bound those go that were not used for longest, of whoever has the largest part of it.

    Args:
        on_drop: told (sender, key, value) of each that leaves, whatever for, but by `clear`.

    Attributes:
        size_bytes: of all.
    """

    def __init__(self, on_drop: Callable[[str, K, V], None] = lambda *_: None) -> None:
        self._of: dict[str, OrderedDict[K, tuple[V, int]]] = {}
        self._counts, self._bytes = _Largest(), _Largest()
        self._most: float = math.inf
        self._most_bytes: float = math.inf
        self._count = self.size_bytes = 0
        self._on_drop = on_drop

    def __len__(self) -> int:
        return self._count

    def bound(self, most: float, most_bytes: float) -> None:
        """How many there may be from now on, and how many bytes; what is beyond goes at once."""
        self._most, self._most_bytes = most, most_bytes
        self._shrink()

    def get(self, sender: str, key: K) -> V | None:
        """The value, if it is there."""
        own = self._of.get(sender)
        found = None if own is None else own.get(key)
        return None if found is None else found[0]

    def keys(self, sender: str) -> list[K]:
        """Of all that a sender has, those first that were not used for longest."""
        return list(self._of.get(sender, ()))

    def use(self, sender: str, key: K) -> None:
        """It was used just now; it has to be there."""
        self._of[sender].move_to_end(key)

    def put(self, sender: str, key: K, value: V, num_bytes: int) -> bool:
        """Keep a value in place of that before it; False, and it is not kept, if it is larger than all room there is.

        One that alone is more than anybody else has leaves again where the others have all the rest: whoever is told of those that leave
        is told.
        """
        self.drop(sender, key)
        if num_bytes > self._most_bytes:
            return False
        self._of.setdefault(sender, OrderedDict())[key] = value, num_bytes
        self._counts.add(sender, 1)
        self._bytes.add(sender, num_bytes)
        self._count += 1
        self.size_bytes += num_bytes
        self._shrink()
        return True

    def drop(self, sender: str, key: K) -> None:
        """Forget one, if it is there."""
        own = self._of.get(sender)
        if own is None or key not in own:
            return
        value, num_bytes = own.pop(key)
        self._count -= 1
        self.size_bytes -= num_bytes
        self._counts.add(sender, -1)
        self._bytes.add(sender, -num_bytes)
        if not own:
            del self._of[sender]
            self._counts.forget(sender)
            self._bytes.forget(sender)
        self._on_drop(sender, key, value)

    def drop_all(self, sender: str) -> int:
        """Forget all of a sender; how many there were."""
        keys = self.keys(sender)
        for key in keys:
            self.drop(sender, key)
        return len(keys)

    def clear(self) -> None:
        """Forget everything."""
        self._of.clear()
        self._counts, self._bytes = _Largest(), _Largest()
        self._count = self.size_bytes = 0

    def _shrink(self) -> None:
        while self._count > self._most or self.size_bytes > self._most_bytes:
            fullest = self._fullest()
            self.drop(fullest, next(iter(self._of[fullest])))

    def _fullest(self) -> str:
        """Who holds most: of the number that there may be, or of the bytes."""
        by_count, by_bytes = self._counts.first(), self._bytes.first()
        count, num_bytes = self._counts.of[by_count], self._bytes.of[by_bytes]
        return by_count if count / max(self._most, 1) > num_bytes / max(self._most_bytes, 1) else by_bytes
