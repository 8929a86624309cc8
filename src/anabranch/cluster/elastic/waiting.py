"""Who holds up the others, from what beats tell of waits.

    found = held_up(members, {0, 1, 2}, missing)         # Stuck(rank=1, by=0): rank 0 waits for long, and at its end is rank 1, which works

A rank that lives and is stuck (a disk, a debugger, an evaluation of its own) is not the one whose wait is long: that is its neighbours'
wait, and those who wait for them. A wait is for ranks; or for a word of the coordinator, and so for the ranks that have not told it what
it takes. Whoever is at the end of such a chain and has not waited itself for as long is the one. Where a chain has no end ranks wait for
each other, and none of them is.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["BEAT_S", "Pulse", "Standing", "Stuck", "Watch", "held_up"]

BEAT_S = 0.5
# What one beat tells may be over: others are to tell the same.
_SURE_S = 3 * BEAT_S
# How often, without a step in between, two ranks that lose their link may open it again, and ranks that wait for each other begin anew.
_MOST_TRIES = 3


class Pulse:
    """Tells a thread that wakes at each beat for how long its process stood still (a frozen container, a stopped machine, no processor).

    What others said meanwhile waits unread: by its own clock a process that has stood still would take all of them for silent.

    Args:
        now: when it begins.
    """

    def __init__(self, now: float) -> None:
        self._last = now

    def late_s(self, now: float) -> float:
        """Seconds by which this beat is late: time that passed for nobody here. Called at each."""
        late, self._last = max(now - self._last - BEAT_S, 0.0), now
        return late


@dataclass(frozen=True)
class Standing:
    """What a rank does, as its last beat told.

    Attributes:
        waits: None while it works; else ``{"ranks": [...]}``, ``{"what": a word of the coordinator}``, ``{"round": what all do}``, or
            nothing where the wait may last.
        is_long: whether it does so for longer than waits may last.
    """

    waits: dict[str, Any] | None = None
    is_long: bool = False

    @classmethod
    def heard(cls, waits: Any, is_long: Any) -> "Standing":
        """Of a beat. Raises ValueError for what is no wait."""
        if waits is not None and not (isinstance(waits, dict) and all(map(_is_sound, waits.items()))):
            raise ValueError(f"a wait for {waits!r}")
        return cls(waits, bool(is_long))


@dataclass(frozen=True)
class Stuck:
    """That ranks are held up.

    Attributes:
        rank: by whom; None where they wait for each other.
        by: one of those who wait.
    """

    rank: int | None
    by: int


def held_up(
    standing: Mapping[int, Standing],
    count: Collection[int],
    missing: Callable[[dict[str, Any]], Collection[int]],
) -> Stuck | None:
    """Of ranks that wait for long the first for whom something is to be done; None where all goes on.

    Args:
        standing: of all who are there.
        count: whose waits count.
        missing: of a wait for a word of the coordinator, for whom that waits.
    """
    for waiter in sorted(count):
        own = standing.get(waiter)
        if own is None or not own.waits or not own.is_long:
            continue
        ends = _ends(waiter, standing, missing)
        stuck = [rank for rank in ends if standing[rank].is_long]
        if stuck:
            return Stuck(stuck[0], waiter)
        if not ends:
            return Stuck(None, waiter)
    return None


class Watch:
    """What a coordinator has seen of links that were lost and have carried no step since, and of ranks that hold up others.

    Args:
        patience_s: between two that have a part in steps a link may be lost for so long before one of them is.
    """

    def __init__(self, patience_s: float = 0.0) -> None:
        self._patience_s = patience_s
        # Of two ranks, how often they have lost their link, and when first; and since when one of them says so in this epoch.
        self._tries: dict[tuple[int, int], tuple[int, float]] = {}
        self._doubts: dict[tuple[int, int], float] = {}
        self._knots = 0
        self._seen: tuple[Stuck | None, float] = (None, 0.0)

    def has_stepped(self, ranks: Collection[int]) -> None:
        """What carried a step of these ranks is sound."""
        self._tries = {pair: tried for pair, tried in self._tries.items() if not set(pair) <= set(ranks)}
        self._knots = 0

    def has_epoch(self) -> None:
        """What was said of an older epoch is over."""
        self._doubts.clear()
        self._seen = (None, 0.0)

    def has_stood_still(self, seconds: float) -> None:
        """For so long nothing was heard here, whatever was said."""
        self._doubts = {pair: since + seconds for pair, since in self._doubts.items()}
        self._tries = {pair: (count, first + seconds) for pair, (count, first) in self._tries.items()}
        self._seen = (self._seen[0], self._seen[1] + seconds)

    def lost_link(self, one: int, other: int, now: float, *, apart: Collection[int] = ()) -> list[int]:
        """``one`` says that its link to ``other`` is lost; whom to blame, the first first, where that was once too often.

        What the second of them says is the same. A link is one rank's fault as much as the other's: it is blamed on the one that has lost
        more links, and before that on one of those ``apart``, who have no part in steps yet and so have proved none.
        """
        pair = (min(one, other), max(one, other))
        if pair not in self._doubts:
            count, first = self._tries.get(pair, (0, now))
            self._tries[pair] = (count + 1, first)
            self._doubts[pair] = now
        count, first = self._tries[pair]
        is_apart = any(rank in apart for rank in pair)
        if count <= _MOST_TRIES or (now - first < self._patience_s and not is_apart):
            return []
        broken = {rank: sum(rank in tried for tried in self._tries) for rank in pair}
        return sorted((other, one), key=lambda rank: (rank not in apart, -broken[rank]))

    def forget(self, rank: int) -> None:
        """A rank is gone, and its links with it."""
        self._tries = {pair: tried for pair, tried in self._tries.items() if rank not in pair}

    def links(self, now: float) -> list[tuple[int, int]]:
        """Pairs whose link is to be opened again: the connection of one that has ended would have ended by now."""
        found = [pair for pair, since in self._doubts.items() if now - since >= BEAT_S]
        for pair in found:
            del self._doubts[pair]
        return found

    def sure(self, found: Stuck | None, now: float) -> Stuck | None:
        """What several beats have told alike."""
        if found is None or found != self._seen[0]:
            self._seen = (found, now)
            return None
        return found if now - self._seen[1] >= _SURE_S else None

    def knotted(self) -> bool:
        """Ranks wait for each other; whether that was once too often."""
        self._knots += 1
        return self._knots > _MOST_TRIES


def _ends(
    waiter: int, standing: Mapping[int, Standing], missing: Callable[[dict[str, Any]], Collection[int]]
) -> list[int]:
    """Ranks that work, for whom a rank waits in the end."""
    seen, found, left = {waiter}, [], [waiter]
    while left:
        waits = standing[left.pop()].waits or {}
        for rank in waits.get("ranks") or missing(waits):
            if rank in seen or rank not in standing:
                continue
            seen.add(rank)
            if standing[rank].waits is None:
                found.append(rank)
            else:
                left.append(rank)
    return sorted(found)


def _is_sound(item: tuple[Any, Any]) -> bool:
    name, value = item
    if name == "ranks":
        return isinstance(value, list) and all(isinstance(rank, int) for rank in value)
    return name in ("what", "round") and isinstance(value, str)
