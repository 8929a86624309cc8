"""`Held`: what is kept of many senders within bounds that are of all of them, so that nobody's pushes out what others have."""

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Held(Generic[K, V]):
    """Values by (sender, key). Beyond a bound those go that were not used for longest, of whoever has the largest part of it.

    Args:
        on_drop: told (sender, key, value) of each that leaves, whatever for, but by `clear`.

    Attributes:
        size_bytes: of all.
    """

    def __init__(self, on_drop: Callable[[str, K, V], None] = lambda *_: None) -> None:
        self._of: dict[str, OrderedDict[K, tuple[V, int]]] = {}
        self._bytes: dict[str, int] = {}
        self._most: float = math.inf
        self._most_bytes: float = math.inf
        self._count = self.size_bytes = 0
        self._on_drop = on_drop

    def __len__(self) -> int:
        return self._count

    def bound(self, most: float, most_bytes: float) -> None:
        """How many there may be from now on, and how many bytes; what is beyond goes at once."""
        self._most, self._most_bytes = most, most_bytes
        self._shrink("")

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
        """Keep a value in place of that before it; False, and it is not kept, if it is larger than all room there is."""
        self.drop(sender, key)
        if num_bytes > self._most_bytes:
            return False
        self._of.setdefault(sender, OrderedDict())[key] = value, num_bytes
        self._bytes[sender] = self._bytes.get(sender, 0) + num_bytes
        self._count += 1
        self.size_bytes += num_bytes
        self._shrink(sender)
        return True

    def drop(self, sender: str, key: K) -> None:
        """Forget one, if it is there."""
        own = self._of.get(sender)
        if own is None or key not in own:
            return
        value, num_bytes = own.pop(key)
        self._count -= 1
        self.size_bytes -= num_bytes
        self._bytes[sender] -= num_bytes
        if not own:
            del self._of[sender], self._bytes[sender]
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
        self._bytes.clear()
        self._count = self.size_bytes = 0

    def _shrink(self, newest: str) -> None:
        while self._count > self._most or self.size_bytes > self._most_bytes:
            fullest = self._fullest(newest)
            self.drop(fullest, next(iter(self._of[fullest])))

    def _fullest(self, newest: str) -> str:
        """Who holds most. That of the newest is seen without a look at all others, if it holds its part or more."""
        if newest in self._of and self._part(newest) * len(self._of) >= 1:
            return newest
        return max(self._of, key=self._part)

    def _part(self, sender: str) -> float:
        return max(len(self._of[sender]) / max(self._most, 1), self._bytes[sender] / max(self._most_bytes, 1))
