"""Cuts of ordered things over owners, and what must travel when the cut changes: samples, slices of a layer, snapshots.

    bounds(10, 3)                 # (0, 4, 7, 10): sizes differ by at most one
    recut(bounds(10, 3), bounds(10, 2))
    # [(0, 0, 0, 4), (1, 0, 4, 5), (1, 1, 5, 7), (2, 1, 7, 10)]: from owner, to owner, first, end

Two cuts into a and b parts overlap in at most a + b - 1 pieces, which is how many messages a boundary between stages needs.
"""
# Shapes: R owners

from collections.abc import Iterable, Sequence
from itertools import pairwise

from anabranch.errors import InputError

__all__ = ["bounds", "covers", "piece_of", "recut"]


def bounds(count: int, owners: int, turn: int = 0) -> tuple[int, ...]:
    """``[R + 1]``: owner i has the things from ``bounds[i]`` to ``bounds[i + 1]``; where it does not go up some have one more.

    Those that do are the first ones from owner ``turn`` on, round the ring, so that over many cuts nobody has more than others.

    Raises InputError for a negative count, and for fewer than one owner.
    """
    if count < 0:
        raise InputError(f"count is {count}; use at least 0")
    if owners < 1:
        raise InputError(f"owners is {owners}; use at least 1")
    each, more = divmod(count, owners)
    found = [0]
    for owner in range(owners):
        found.append(found[-1] + each + ((owner - turn) % owners < more))
    return tuple(found)


def recut(old: Sequence[int], new: Sequence[int]) -> list[tuple[int, int, int, int]]:
    """What goes from which owner of the old cut to which of the new one: (from, to, first, end), in order, none empty.

    Raises InputError for cuts that are not of the same things.
    """
    for name, cut in (("old", old), ("new", new)):
        if len(cut) < 2 or any(first > second for first, second in pairwise(cut)):
            raise InputError(f"{name} is {tuple(cut)}; give where each owner begins, and the end, in order")
    if old[0] != new[0] or old[-1] != new[-1]:
        raise InputError(
            f"old cuts {old[0]} to {old[-1]}, and new {new[0]} to {new[-1]}; both must cut the same things"
        )
    found = []
    source = target = 0
    while source < len(old) - 1 and target < len(new) - 1:
        first, end = max(old[source], new[target]), min(old[source + 1], new[target + 1])
        if first < end:
            found.append((source, target, first, end))
        if old[source + 1] <= new[target + 1]:
            source += 1
        else:
            target += 1
    return found


def piece_of(cut: Sequence[int], owner: int) -> range:
    """What one owner has."""
    return range(cut[owner], cut[owner + 1])


def covers(ranges: Iterable[Sequence[int]], first: int, end: int) -> bool:
    """Whether (first, end) of ranges that do not overlap hold all of ``first`` to ``end``."""
    return sum(max(min(high, end) - max(low, first), 0) for low, high in ranges) == end - first
