"""The policy of the second place for keys and values: which blocks are kept there, and whether a request should be let in at all.

`LruTier` is the `KVTier` of NanoFlow's offload: a block is saved when it becomes full or when it is evicted, the least recently used one
makes way, and a request that comes back, or the next round of its conversation, loads instead of computing again. Slots are
logical: the engine keeps the hot ones in host memory and the rest on disk.

`PeakMemory` lets a request in only if the keys and values of all that run are expected to fit at their peak: running requests go on for
what is left of the mean output, and free their memory when they end.
"""

from collections import OrderedDict
from collections.abc import Iterable

from anabranch.errors import InputError


class LruTier:
    """`KVTier` of ``num_slots`` blocks.

    Args:
        num_slots: blocks that host memory and disk hold together.
        is_eager: save a block as soon as it is full; else only when it is evicted.
    """

    def __init__(self, num_slots: int, *, is_eager: bool = False) -> None:
        if num_slots < 1:
            raise InputError(f"num_slots is {num_slots}; it must be at least 1")
        self.num_slots, self.is_eager = num_slots, is_eager
        # The least recently used first.
        self._slots: OrderedDict[bytes, int] = OrderedDict()
        self._free = list(range(num_slots - 1, -1, -1))
        self._pinned: set[bytes] = set()
        self.saved = self.loaded = self.dropped = self.refused = 0

    def __len__(self) -> int:
        """Blocks that are held."""
        return len(self._slots)

    def filled(self, key: bytes, block: int) -> int | None:
        """Where to save a block that has become full; None unless it ``is_eager``."""
        return self._save(key) if self.is_eager else None

    def evicted(self, key: bytes, block: int) -> int | None:
        """Where to save a block that is about to go; None if it is there already, or all slots are being read."""
        return self._save(key)

    def holds(self, key: bytes) -> bool:
        """Whether `load` would find it."""
        return key in self._slots

    def load(self, key: bytes) -> int:
        """Its slot, which stays as it is until `formed`. Raises InputError for an unknown key."""
        if key not in self._slots:
            raise InputError(f"no block of key {key.hex()[:16]} is held; ask `holds` first")
        self._slots.move_to_end(key)
        self._pinned.add(key)
        self.loaded += 1
        return self._slots[key]

    def formed(self) -> None:
        """Slots that were loaded may be used again."""
        self._pinned.clear()

    def reset(self) -> None:
        """Forget everything."""
        self._slots.clear()
        self._pinned.clear()
        self._free = list(range(self.num_slots - 1, -1, -1))

    def _save(self, key: bytes) -> int | None:
        if key in self._slots:
            self._slots.move_to_end(key)
            return None
        if not self._free and not self._drop():
            self.refused += 1
            return None
        slot = self._slots[key] = self._free.pop()
        self.saved += 1
        return slot

    def _drop(self) -> bool:
        """Free the slot of the least recently used block that is not being read."""
        oldest = next((key for key in self._slots if key not in self._pinned), None)
        if oldest is None:
            return False
        self._free.append(self._slots.pop(oldest))
        self.dropped += 1
        return True


class PeakMemory:
    """Admission by the predicted peak of keys and values.

    A request of c tokens that is expected to write r more has c + t of them t steps from now, and none from step r on. The peak of the
    sum over requests is at one of their ends.

    Args:
        capacity: tokens that fit.
        most: tokens that one request keeps at most, as behind a window; None for all it has.
        mean_output: expected output until some were seen.
        weight: of each new observation in the mean.
    """

    def __init__(
        self, capacity: int, *, most: int | None = None, mean_output: float = 256.0, weight: float = 0.02
    ) -> None:
        if capacity < 1 or mean_output <= 0 or not 0 < weight <= 1:
            raise InputError(
                f"capacity, mean_output and weight are {capacity}, {mean_output} and {weight}; use 1 or more, above 0, in (0, 1]"
            )
        self.capacity, self.most, self.mean_output, self.weight = capacity, most, mean_output, weight

    def saw(self, num_output: int) -> None:
        """A request ended after so many tokens."""
        self.mean_output += self.weight * (num_output - self.mean_output)

    def remaining(self, num_output: int, max_tokens: int) -> int:
        """Tokens that a request which has written ``num_output`` of at most ``max_tokens`` is expected to write still; at least 1."""
        expected = self.mean_output if num_output < self.mean_output else num_output + self.mean_output / 2
        return max(round(min(expected, max_tokens) - num_output), 1)

    @staticmethod
    def peak(requests: Iterable[tuple[int, int]], keeps: int | None = None) -> int:
        """The largest sum at any step to come of (tokens now, tokens expected still), of which each keeps at most ``keeps``."""
        by_end = sorted(requests, key=lambda pair: -pair[1])
        most = held = 0
        # Those that last at least as long as this one.
        for count, (tokens, left) in enumerate(by_end, start=1):
            held += tokens
            then = held + count * left
            if keeps is not None:
                then = sum([min(now + left, keeps) for now, _ in by_end[:count]])
            most = max(most, then)
        return most

    def admits(self, running: Iterable[tuple[int, int]], candidate: tuple[int, int]) -> bool:
        """Whether the candidate fits beside what runs; alone it always does, as the scheduler refuses what can never run."""
        running = list(running)
        return not running or self.peak([*running, candidate], self.most) <= self.capacity
