"""`Seats`: for whom a place in the steps is, and who makes room. A seat is one of the places (``max_seqs``), with keys and values for it.

A request that runs keeps its seat while nobody lacks one. Where several keys have requests, a key that waits is let in like this:

1. A key without any seat goes before those that have some, the one that has been without for longest first.
2. Otherwise keys take turns by tokens (`WaitingQueue`); those with two seats more than another key that waits, for which no more has been
   computed, are passed over.
3. If there is no seat for it, or no room for its keys and values, one of the others makes room: for a key without a seat any other
   (a seat that is a key's last one only if none has several, or what these have beyond their last is not room enough); for a key that
   has some, one that has two more, and for which no less has been computed. Of these it is the key with most seats (most blocks, where
   these lack), then the one with most computed, and its request of last rank.
4. Nobody makes room before ``min_run`` steps from when it computed what it never had before. So nothing is thrown away again and again,
   and whoever is first in rank gets on by as many steps each time: every request ends.

Who made room waits before those of its own key that came after it, is charged for what it has left alone, and goes on behind what the
prefix cache has of it; its output is the same. Where what runs fits in the cache, a key without a seat has one within ``min_run`` steps
and those that requests need to get back to where they were; with more keys than seats, that for each time that all seats change hands
before it. With one key nothing of this happens.

What is computed for a key counts from when it came, and it begins as who has least: keys that were here for long owe nothing for it.
Nobody falls further behind the one with most than all seats compute in ``min_run`` steps of one token: who asked for little for long may
then have more for about as long, not until it has had as much.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Literal

from anabranch.serving.core.state import RequestState

# A seat, or blocks for one.
Lack = Literal["seat", "room"]


class Seats:
    """Keys and what they have.

    Args:
        min_run: see above.
        seats: that there are.
    """

    def __init__(self, min_run: int, seats: int) -> None:
        self._min_run, self._most_behind = min_run, min_run * seats
        self._keys: dict[str, _Key] = {}
        # Of what happened to keys.
        self._serial = 0

    @property
    def is_shared(self) -> bool:
        """Whether several keys have requests."""
        return len(self._keys) > 1

    # What happens

    def come(self, key: str) -> None:
        """A request of a key is there, and has no seat."""
        held = self._keys.get(key)
        if held is None:
            least = min([other.computed for other in self._keys.values()], default=0)
            held = self._keys[key] = _Key(least, self._next())
        held.requests += 1

    def go(self, key: str) -> None:
        """One without a seat has ended."""
        held = self._keys[key]
        held.requests -= 1
        if not held.requests:
            del self._keys[key]

    def sit(self, key: str) -> None:
        """One has got a seat."""
        self._keys[key].seats += 1

    def rise(self, key: str) -> None:
        """One has given its seat back."""
        held = self._keys[key]
        held.seats -= 1
        if not held.seats:
            held.without_since = self._next()

    def computed(self, tokens: Mapping[str, int]) -> None:
        """So many tokens are computed in a step, by key."""
        for key, count in tokens.items():
            self._keys[key].computed += count
        least = max(held.computed for held in self._keys.values()) - self._most_behind
        for held in self._keys.values():
            held.computed = max(held.computed, least)

    def _next(self) -> int:
        self._serial += 1
        return self._serial

    # What follows

    def has_seat(self, key: str) -> bool:
        """Whether a key has any."""
        return self._keys[key].seats > 0

    def longest_without(self, waiting: Collection[str]) -> str | None:
        """Of keys that wait the one whose turn it is to get its first seat; None if all have one."""
        without = [key for key in waiting if not self._keys[key].seats]
        return min(without, key=lambda key: self._keys[key].without_since, default=None)

    def passed_over(self, waiting: Collection[str]) -> set[str]:
        """Of keys that wait those that have too much beside the others."""
        if len(waiting) < 2:
            return set()
        poorest = min([self._keys[key] for key in waiting], key=lambda held: (held.seats, held.computed))
        return {key for key in waiting if self._keys[key].owes(poorest)}

    def had_run(self, state: RequestState, step: int) -> bool:
        """Whether a request may be asked to make room before this step."""
        return 0 <= state.ahead_since <= step - self._min_run

    def in_vain(self, waiting: Collection[str], running: Iterable[RequestState], step: int) -> set[str]:
        """Of keys that wait those to which none of those that run gives its seat now."""
        keys = self._keys
        givers = [keys[key] for key in {each.key for each in running if self.had_run(each, step)}]
        first = any(held.seats >= self._fewest for held in givers)
        return {
            key
            for key in waiting
            if not (any(held.owes(keys[key]) for held in givers if held.seats > 2) if keys[key].seats else first)
        }

    @property
    def _fewest(self) -> int:
        """Seats of a key that gives one to a key without any."""
        return min(2, max(held.seats for held in self._keys.values()))

    def who_rises(
        self, lack: Lack, state: RequestState, running: Iterable[RequestState], step: int, short: int = 0
    ) -> RequestState | None:
        """Of those that run the one that makes room for one that waits; None if nobody has to, or not yet.

        ``short``: blocks that it lacks.
        """
        own = self._keys[state.key]
        fewest = self._fewest if lack == "seat" else 1

        def gives(key: str) -> bool:
            other = self._keys[key]
            return key != state.key and (other.owes(own) if own.seats else other.seats >= fewest)

        found = [
            each for each in running if each.rank[0] >= state.rank[0] and gives(each.key) and self.had_run(each, step)
        ]
        if not found:
            return None
        blocks: Counter[str] = Counter()
        if lack == "room":
            found = self._beyond_last(found, short) or found
            for each in found:
                blocks[each.key] += len(each.blocks)
        keys = self._keys
        return max(found, key=lambda each: (blocks[each.key], keys[each.key].seats, keys[each.key].computed, each.rank))

    def _beyond_last(self, found: Sequence[RequestState], short: int) -> list[RequestState]:
        """Those whose keys keep a seat though they rise; none if that is not room enough."""
        left = {each.key: self._keys[each.key].seats - 1 for each in found}
        able = []
        for each in sorted(found, key=lambda each: each.rank, reverse=True):
            if left[each.key]:
                left[each.key] -= 1
                able.append(each)
        return able if sum(len(each.blocks) for each in able) >= short else []


class _Key:
    """What one key has.

    Attributes:
        requests: that have not ended.
        seats: of these.
        computed: tokens, and what others had when it came.
        without_since: when it was last left without a seat, or came.
    """

    __slots__ = ("computed", "requests", "seats", "without_since")

    def __init__(self, computed: int, now: int) -> None:
        self.requests = self.seats = 0
        self.computed, self.without_since = computed, now

    def owes(self, other: "_Key") -> bool:
        """Whether it has so many seats more that one less still leaves it no fewer, and no less was computed for it."""
        return self.seats >= other.seats + 2 and self.computed >= other.computed
