"""Where parts of a list of layers begin, searched by what a whole partition costs, whatever that is.

    quickest(6, 4, ends=range(1, 6), cost=lambda bounds: step_of(bounds), starts=[(1, 2, 3)], most=500)

`anabranch.cluster.partitions` finds the best partition exactly where its cost is that of its largest part, or a sum over parts. The time
of a step is neither: what is sent runs beside what is computed, and a pipeline fills and drains. So it is asked for, partition by
partition: of all of them where they are few, else of those that are better, boundary by boundary, from several starts.
"""
# Shapes: L layers, K parts

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce
from itertools import combinations, pairwise
from typing import Any

__all__ = ["Bounds", "quickest"]

Bounds = tuple[int, ...]


def quickest(
    num_parts: int,
    ends: Sequence[int],
    cost: Callable[[Bounds], Any],
    starts: Sequence[Bounds],
    most: int,
    least: Callable[[Bounds], Any] | None = None,
) -> Bounds:
    """The bounds of least cost: of all, or of those that moves of boundaries lead to.

    Args:
        num_parts: K.
        ends: where a part may begin, in order; bounds are K - 1 of them.
        cost: of bounds; anything that can be compared. Equal ones go by the bounds themselves.
        starts: bounds to begin at where there are more than ``most`` in all; at least one.
        most: calls of ``cost``; each start has one in any case, unless all calls go to starts and ``least`` says that it is no better.
        least: of bounds, quickly: no more than their cost. Where that is above the cost of others already, the cost is not asked for; it
            counts as a call all the same, so that what is found does not depend on it. None where nothing is known.
    """
    known: dict[Bounds, tuple[Any, Bounds]] = {}

    def rank(bounds: Bounds) -> tuple[Any, Bounds]:
        if bounds not in known:
            known[bounds] = (cost(bounds), bounds)
        return known[bounds]

    def is_better(there: Bounds, here: Bounds) -> bool:
        if there not in known and least is not None and least(there) > rank(here)[0]:
            return False
        return rank(there) < rank(here)

    def best_of(some: Iterable[Bounds]) -> Bounds:
        return reduce(lambda here, there: there if is_better(there, here) else here, some)

    if math.comb(len(ends), num_parts - 1) <= most:
        return best_of(combinations(ends, num_parts - 1))
    begins = sorted(set(starts))
    if len(begins) >= most:
        return best_of(begins if least is None else sorted(begins, key=least))
    # The best start has the first turn; what it leaves of the calls is the next one's.
    asked = set(begins)
    return min([_descend(start, ends, is_better, asked, most) for start in sorted(begins, key=rank)], key=rank)


def _descend(
    start: Bounds, ends: Sequence[int], is_better: Callable[[Bounds, Bounds], bool], asked: set[Bounds], most: int
) -> Bounds:
    """From one partition to a better one, until none is better or calls are used up."""
    here, has_moved = start, True
    while has_moved:
        has_moved = False
        for there in _moves(here, ends):
            if there not in asked and len(asked) >= most:
                return here
            asked.add(there)
            if is_better(there, here):
                here, has_moved = there, True
                break
    return here


def _moves(bounds: Bounds, ends: Sequence[int]) -> Iterator[Bounds]:
    """Neighbouring boundaries together, one of them or several, a place up or down: a layer goes from one part to another one."""
    at = {end: place for place, end in enumerate(ends)}
    places = [at[bound] for bound in bounds]
    for count in range(1, len(places) + 1):
        for first in range(len(places) - count + 1):
            for step in (1, -1):
                moved = [place + step * (first <= number < first + count) for number, place in enumerate(places)]
                if 0 <= moved[0] and moved[-1] < len(ends) and all(a < b for a, b in pairwise(moved)):
                    yield tuple(ends[place] for place in moved)
