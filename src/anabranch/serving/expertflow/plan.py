"""PLEC, the predicted plan of slots: Belady's rule on a predicted reference string, with loads as early as they do no harm.

The paper gives an example: layers need {e12, e13, e14} and {e22, e23}, four slots; e12, e13, e14 and e22 are loaded, and as soon as e12
has been used its slot loads e23. Our rule yields it: simulate Belady's replacement over the string; each load it makes may begin once the
expert it replaces has had its last use before. So there are never more loads than clairvoyant replacement makes (with a true string), and
none waits longer than it must.
"""

import heapq
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from anabranch.serving.expertflow.layout import Expert

# More than experts in a step.
PLACES = 1 << 16

# A position that never comes.
NEVER = PLACES << 32


@dataclass(frozen=True, slots=True)
class PlannedLoad:
    """A load of the plan.

    Attributes:
        expert: what to load.
        at: step of the string that needs it.
        victim: what it replaces; None for a free slot.
        after: step in which the victim is used last before; -1 if it is not used again.
    """

    expert: Expert
    at: int
    victim: Expert | None
    after: int


class Reference:
    """A predicted reference string: experts of layer after layer, the likeliest first.

    Attributes:
        steps: experts of each step (a layer of this forward pass, then of the next ones).
        certain: steps that are loaded for; the others only say what is worth keeping.
    """

    def __init__(self, steps: Sequence[Iterable[Expert]], certain: int | None = None) -> None:
        self.steps: list[list[Expert]] = [list(dict.fromkeys(step)) for step in steps]
        self.certain = len(self.steps) if certain is None else certain
        self._uses: dict[Expert, list[int]] = {}
        for at, step in enumerate(self.steps):
            for place, expert in enumerate(step):
                self._uses.setdefault(expert, []).append(at * PLACES + place)

    def remove(self, at: int, expert: Expert) -> None:
        """The use of an expert in step ``at`` is over."""
        uses = self._uses.get(expert, [])
        found = bisect_left(uses, at * PLACES)
        if found < len(uses) and uses[found] < (at + 1) * PLACES:
            del uses[found]
            self.steps[at].remove(expert)

    def set(self, at: int, experts: Iterable[Expert]) -> None:
        """What step ``at`` really needs."""
        for expert in self.steps[at]:
            uses = self._uses[expert]
            del uses[bisect_left(uses, at * PLACES)]
        self.steps[at] = list(dict.fromkeys(experts))
        for place, expert in enumerate(self.steps[at]):
            uses = self._uses.setdefault(expert, [])
            uses.insert(bisect_left(uses, at * PLACES), at * PLACES + place)

    def next_use(self, expert: Expert, position: int) -> int:
        """First use behind ``position`` (step * PLACES + place); NEVER if there is none."""
        uses = self._uses.get(expert)
        if not uses or uses[-1] <= position:
            return NEVER
        return uses[0] if uses[0] > position else uses[bisect_right(uses, position)]


def belady_plan(
    reference: Reference,
    first: int,
    resident: Sequence[Expert],
    free: int,
    *,
    fits: Callable[[Expert], bool] = lambda expert: True,
    unwanted: frozenset[Expert] = frozenset(),
    worth: Callable[[Expert], float] = lambda expert: 0.0,
    limit: int = NEVER,
) -> list[PlannedLoad]:
    """The loads that Belady's rule makes for the string from step ``first`` on.

    Args:
        reference: the string.
        first: step to begin with.
        resident: what is in slots or on the way there, the least recently used first.
        free: empty slots.
        fits: of which experts these slots are; others are left out.
        unwanted: among those never used again, these go first (predicted for this layer, but not wanted by it).
        worth: among the others, those of least worth go first; then the least recently used.
        limit: loads after which the plan may end.
    """
    plan: list[PlannedLoad] = []
    last = dict.fromkeys(resident, -1)  # step of the last use in the plan
    # The top is replaced first: farthest next use, then unwanted, least worth, least recently used.
    heap = []
    start = first * PLACES - 1
    for order, expert in enumerate(resident):
        next_use = reference.next_use(expert, start)
        # No two experts have the same, so what comes after it does not matter.
        if next_use < NEVER:
            heap.append((-next_use, True, 0.0, 0, expert))
        else:
            heap.append((-NEVER, expert not in unwanted, worth(expert), order - NEVER, expert))
    heapq.heapify(heap)
    for at in range(first, reference.certain):
        for place, expert in enumerate(reference.steps[at]):
            if not fits(expert):
                continue
            position = at * PLACES + place
            if expert not in last:
                if free:
                    free, victim, after = free - 1, None, -1
                else:
                    victim = _farthest(heap, last, reference, position, frozenset(reference.steps[at]))
                    if victim is None:
                        return plan
                    after = last.pop(victim)
                plan.append(PlannedLoad(expert, at, victim, after))
                if len(plan) >= limit:
                    return plan
            last[expert] = at
            next_use = reference.next_use(expert, position)
            heapq.heappush(heap, (-next_use, True, worth(expert) if next_use == NEVER else 0.0, position, expert))
    return plan


def _farthest(
    heap: list, last: dict[Expert, int], reference: Reference, position: int, needed: frozenset[Expert]
) -> Expert | None:
    """What is replaced at ``position``, one that the step ``needed`` only if there is nothing else.

    Entries made before a later use of the same expert are stale and are dropped.
    """
    kept = []
    while heap:
        entry = heapq.heappop(heap)
        expert = entry[-1]
        if expert not in last or -entry[0] != reference.next_use(expert, position - 1):
            continue
        if expert not in needed:
            break
        kept.append(entry)
    else:
        entry = kept.pop(0) if kept else None
    for other in kept:
        heapq.heappush(heap, other)
    return None if entry is None else entry[-1]
