"""`Invitation`: who of those that wait is next, and whom others make room for, where several keys share an engine (`Seats`)."""

from collections.abc import Collection
from typing import Literal

from anabranch.serving.core.places import Places
from anabranch.serving.core.seats import Lack
from anabranch.serving.core.state import RequestState
from anabranch.serving.core.tables import BlockTables
from anabranch.serving.core.tier import Memory


class Invitation:
    """Made anew for each step.

    Args:
        places: who runs and who waits.
        tables: where blocks come from.
        memory: decides, beside the free blocks, whether one may join those that run.

    Attributes:
        state: one that waits, for which there is a way; None for none, and once it is taken.
    """

    def __init__(self, places: Places, tables: BlockTables, memory: Memory | None) -> None:
        self._places, self._tables, self._memory = places, tables, memory
        self.state: RequestState | None = None

    def renew(self, step: int) -> None:
        """Find the next that waits and for which there is a way, and have others make room before ``step`` if it takes that."""
        self.state = None
        places = self._places
        if not places.seats.is_shared or not len(places.waiting):
            return
        passed: set[str] = set()
        if places.is_full:
            passed = places.seats.in_vain(places.waiting.keys(), places.running, step)
        while (state := self._next(passed)) is not None:
            lack = self._clear_way(state, step)
            if lack is None:
                self.state = state
            # What becomes free is for this one: smaller ones that took it would keep a large one out for ever.
            if lack is None or lack == "room":
                return
            passed.add(state.key)

    def take(self) -> RequestState | None:
        """The one that is invited, and then the next that wait, whatever they lack; None if there is none."""
        state, self.state = self.state or self._next(), None
        return state

    def _next(self, passed: Collection[str] = ()) -> RequestState | None:
        """The next that waits, but for those of the keys in ``passed``; None if there is none."""
        waiting, seats = self._places.waiting, self._places.seats
        if not seats.is_shared:
            return waiting.peek()
        keys = waiting.keys().difference(passed)
        first = seats.longest_without(keys)
        if first is not None:
            return waiting.first_of(first)
        return waiting.peek(seats.passed_over(keys).union(passed))

    def _clear_way(self, state: RequestState, step: int) -> Lack | Literal["step"] | None:
        """What one that waits lacks to start when the steps under way have run, after others have made room for it if they have to.

        None for nothing; ``step`` where another computes its beginning just now.
        """
        places, tables = self._places, self._tables
        while True:
            lack: Lack = "seat"
            short = 0
            if not places.is_full:
                cached = tables.look_up(state)
                if cached is None:
                    return "step"
                short = tables.short(state, cached, tables.promised(places.running), is_later=True)
                if short <= 0 and self._is_admitted(state):
                    return None
                lack = "room"
            other = places.seats.who_rises(lack, state, places.running, step, short)
            if other is None:
                return lack
            places.make_way(other)

    def _is_admitted(self, state: RequestState) -> bool:
        memory, running = self._memory, self._places.running
        if memory is None or not running:
            return True
        return memory.admits([state_expects(each, memory) for each in running], state_expects(state, memory))


def state_expects(state: RequestState, memory: Memory) -> tuple[int, int]:
    """The tokens that a request has, and those that it is expected to give still."""
    return len(state.tokens), memory.remaining(state.num_output, state.most_tokens - state.num_prompt)
