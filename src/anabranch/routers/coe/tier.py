"""What an `ExpertStore` decides, without threads and clocks: who is resident, who must go, which group of requests is next.

Eviction takes the resident of least worth that nobody uses:

    lru    least recently asked for
    lfu    least often asked for, then least recently
    rate   least rate * load time / bytes, then least recently: what reloading it would cost, per byte that it holds

where the rate is an exponentially decayed one (half-life 5 minutes unless told otherwise).
"""

import math
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from anabranch.errors import InputError

Eviction = Literal["rate", "lru", "lfu"]
EVICTIONS = ("rate", "lru", "lfu")
R = TypeVar("R")


@dataclass(slots=True)
class Usage:
    """How an expert has been asked for.

    Attributes:
        half_life_s: of the rate.
        count: requests.
        last_s: of the latest; -inf before the first.
        rate: requests a second at ``last_s``, decayed.
    """

    half_life_s: float
    count: int = 0
    last_s: float = -math.inf
    rate: float = 0.0

    def touch(self, now_s: float) -> None:
        """A request. At a steady rate r the estimate settles at r."""
        self.rate = self.rate_at(now_s) + math.log(2) / self.half_life_s
        self.count += 1
        self.last_s = now_s

    def rate_at(self, now_s: float) -> float:
        """The rate, decayed to now."""
        return self.rate * 2 ** -((now_s - self.last_s) / self.half_life_s) if self.count else 0.0


@dataclass(slots=True)
class Resident:
    """An expert in a tier, or on its way there.

    Attributes:
        num_bytes: that it holds, from the moment its loading begins.
        value: what the loader gave; meaningless until ``is_ready``.
        is_ready: loaded whole.
        pins: users; it stays while there are any.
        load_s: seconds its loading took.
        since_s: when it was ready.
        spare_until_s: fetched ahead and not asked for yet: goes last until then.
    """

    num_bytes: int
    value: Any = None
    is_ready: bool = False
    pins: int = 0
    load_s: float = 0.0
    since_s: float = -math.inf
    spare_until_s: float = -math.inf


@dataclass(slots=True)
class Tier:
    """A memory of limited size.

    Attributes:
        name: for messages.
        capacity_bytes: never passed, not even while something is on its way in.
        eviction: who goes first.
        residents: by expert.
        used_bytes: by all of them.
        peak_bytes: most so far.
    """

    name: str
    capacity_bytes: int
    eviction: Eviction
    residents: dict[str, Resident] = field(default_factory=dict)
    used_bytes: int = 0
    peak_bytes: int = 0

    def __post_init__(self) -> None:
        if self.capacity_bytes < 1:
            raise InputError(f"the capacity of {self.name} is {self.capacity_bytes} bytes; it must be above 0")
        if self.eviction not in EVICTIONS:
            raise InputError(f"eviction is {self.eviction!r}; it must be one of {', '.join(EVICTIONS)}")

    def ready(self, expert: str) -> Resident | None:
        """A resident that is loaded whole."""
        found = self.residents.get(expert)
        return found if found is not None and found.is_ready else None

    def victims(self, num_bytes: int, usage: dict[str, Usage], now_s: float) -> list[str] | None:
        """Experts to evict so that ``num_bytes`` more fit, least worth first; None if too many are in use."""
        missing = self.used_bytes + num_bytes - self.capacity_bytes
        if missing <= 0:
            return []
        free = [name for name, resident in self.residents.items() if resident.is_ready and not resident.pins]
        free.sort(key=lambda name: self._worth(name, usage[name], now_s))
        chosen: list[str] = []
        for name in free:
            chosen.append(name)
            missing -= self.residents[name].num_bytes
            if missing <= 0:
                return chosen
        return None

    def _worth(self, name: str, usage: Usage, now_s: float) -> tuple[float, ...]:
        resident = self.residents[name]
        spared, last_s = float(resident.spare_until_s > now_s), max(usage.last_s, resident.since_s)
        if self.eviction == "lru":
            return spared, last_s
        if self.eviction == "lfu":
            return spared, usage.count, last_s
        return spared, usage.rate_at(now_s) * resident.load_s / max(resident.num_bytes, 1), last_s

    def begin(self, expert: str, num_bytes: int) -> Resident:
        """Take room for an expert that is about to be loaded."""
        assert expert not in self.residents
        assert self.used_bytes + num_bytes <= self.capacity_bytes
        self.residents[expert] = Resident(num_bytes)
        self.used_bytes += num_bytes
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)
        return self.residents[expert]

    def drop(self, expert: str) -> Resident:
        """Give its room back."""
        resident = self.residents.pop(expert)
        self.used_bytes -= resident.num_bytes
        return resident


class ExpertQueue(Generic[R]):
    """Requests grouped by the expert they need, so that one load serves many.

    Served next is the largest group whose expert is resident, else the largest group; among equals the one with the oldest request. But a
    request that was passed over ``max_passes`` times makes its group urgent, and urgent groups go first, oldest request first: with batches
    of any size, none is passed over more than ``max_passes`` times plus once for every other expert.

    Args:
        max_passes: batches of others that may go first.
        batch: most requests of a group to serve at once; None for all. A limit adds a pass for every older batch.
    """

    def __init__(self, *, max_passes: int = 8, batch: int | None = None) -> None:
        if max_passes < 0 or (batch is not None and batch < 1):
            raise InputError(
                f"max_passes is {max_passes} and batch {batch}; they must be at least 0 and at least 1 (or None)"
            )
        self.max_passes, self.batch = max_passes, batch
        # Number of the request, batches before it came, request.
        self._groups: dict[str, deque[tuple[int, int, R]]] = {}
        self._pushed = self._popped = 0

    def __len__(self) -> int:
        return sum(map(len, self._groups.values()))

    def push(self, expert: str, request: R) -> None:
        """Add a request."""
        self._groups.setdefault(expert, deque()).append((self._pushed, self._popped, request))
        self._pushed += 1

    def pop(self, resident: Collection[str] = ()) -> tuple[str, list[R]] | None:
        """The next expert and requests of it, oldest first; None if there are none."""
        if not self._groups:
            return None
        expert = self.peek(resident)[0]
        group = self._groups[expert]
        taken = [group.popleft()[2] for _ in range(len(group) if self.batch is None else min(self.batch, len(group)))]
        if not group:
            del self._groups[expert]
        self._popped += 1
        return expert, taken

    def peek(self, resident: Collection[str] = ()) -> list[str]:
        """Experts in the order they would be served if nothing came or was loaded: what to fetch ahead."""

        def order(expert: str) -> tuple[int, ...]:
            number, before, _ = self._groups[expert][0]
            if self._popped - before >= self.max_passes:
                return 0, number, 0, 0
            return 1, int(expert not in resident), -len(self._groups[expert]), number

        return sorted(self._groups, key=order)


def quantile(values: Iterable[float], share: float) -> float | None:
    """The smallest value that this share of the values does not pass; None if there are none."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else None
