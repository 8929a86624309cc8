"""Who has what: live ranks of each stage, the layers of each stage, and each rank's slice of each layer (interleaved ZeRO).

    grid = Grid.full(replicas=8, stages=12)
    layout = Layout(grid.without([3]), bounds=(6, 12, ...), num_layers=64)
    layout.slices(layer=0, size=4096)         # (rank, first, end) of each owner: every layer is cut by itself

A layer that moves from one stage to another so is one transfer per rank, over as many links, and no other layer is touched. `moves` says
what must travel from one layout to another; `census` checks that every number has exactly one owner.
"""
# Shapes: L layers

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Self

from anabranch.cluster.elastic.cuts import bounds, recut
from anabranch.errors import InputError

__all__ = ["Grid", "Layout", "Move", "census", "layout_from", "layout_to", "moves", "steps_of"]


@dataclass(frozen=True)
class Grid:
    """Ranks in stages.

    Attributes:
        stages: the live ranks of each stage, in order; ranks are names, and need not be 0, 1, 2, ....
        replicas: D, how many a stage has where none is lost.
    """

    stages: tuple[tuple[int, ...], ...]
    replicas: int

    @classmethod
    def full(cls, *, replicas: int, stages: int) -> Self:
        """Stage p has the ranks p D to p D + D - 1."""
        for name, number in (("replicas", replicas), ("stages", stages)):
            if number < 1:
                raise InputError(f"{name} is {number}; use at least 1")
        return cls(tuple(tuple(range(p * replicas, (p + 1) * replicas)) for p in range(stages)), replicas)

    @property
    def ranks(self) -> tuple[int, ...]:
        """All, stage by stage."""
        return tuple(rank for stage in self.stages for rank in stage)

    def stage_of(self, rank: int) -> int:
        """The stage that a rank is in. Raises InputError for one that is in none."""
        for number, stage in enumerate(self.stages):
            if rank in stage:
                return number
        raise InputError(f"rank {rank} is in no stage; there are {list(self.ranks)}")

    def without(self, lost: Collection[int]) -> Self:
        """The grid after a loss; a stage may then be empty. Raises InputError for a rank that is in no stage."""
        for rank in lost:
            self.stage_of(rank)
        return replace(self, stages=tuple(tuple(r for r in stage if r not in lost) for stage in self.stages))

    def with_rank(self, rank: int) -> Self:
        """The grid with one more rank, in the first of the stages with fewest. Raises InputError for one that is there."""
        if rank in self.ranks:
            raise InputError(f"rank {rank} is in stage {self.stage_of(rank)} already")
        least = min(range(len(self.stages)), key=lambda number: (len(self.stages[number]), number))
        grown = tuple((*stage, rank) if number == least else stage for number, stage in enumerate(self.stages))
        return replace(self, stages=grown)

    def healed(self) -> Self:
        """No stage is empty: one that is gets a rank of the largest stage, and is no stage any more where none can give one.

        Raises InputError where no rank is left.
        """
        stages = [list(stage) for stage in self.stages]
        if not any(stages):
            raise InputError("no rank is left")
        for number in range(len(stages)):
            if stages[number]:
                continue
            giver = max(range(len(stages)), key=lambda other: (len(stages[other]), other))
            if len(stages[giver]) > 1:
                stages[number].append(stages[giver].pop())
        return replace(self, stages=tuple(tuple(stage) for stage in stages if stage))


@dataclass(frozen=True)
class Move:
    """Numbers ``first`` to ``end`` of a layer's parameters, with their optimizer state, from one rank to another."""

    layer: int
    first: int
    end: int
    source: int
    target: int


@dataclass(frozen=True)
class Layout:
    """A grid, and which layers each of its stages has.

    Attributes:
        grid: no stage of it is empty.
        bounds: where stage 1, 2, ... begins; as in `anabranch.cluster.Partition`.
        num_layers: L.
    """

    grid: Grid
    bounds: tuple[int, ...]
    num_layers: int

    def __post_init__(self) -> None:
        cut = (0, *self.bounds, self.num_layers)
        if len(self.bounds) != len(self.grid.stages) - 1 or any(a >= b for a, b in pairwise(cut)):
            raise InputError(
                f"bounds is {self.bounds}; {self.num_layers} layers need {len(self.grid.stages) - 1} bounds that grow, one less than stages"
            )
        if not all(self.grid.stages):
            raise InputError(f"stage {self.grid.stages.index(())} has no rank; heal the grid first")

    @property
    def parts(self) -> tuple[range, ...]:
        """The layers of each stage."""
        cut = (0, *self.bounds, self.num_layers)
        return tuple(range(first, end) for first, end in pairwise(cut))

    def stage_with(self, layer: int) -> int:
        """The stage that has a layer."""
        return sum(bound <= layer for bound in self.bounds)

    def layers_of(self, rank: int) -> range:
        """The layers of a rank's stage."""
        return self.parts[self.grid.stage_of(rank)]

    def slices(self, layer: int, size: int) -> list[tuple[int, int, int]]:
        """(rank, first, end) of each owner of a layer of ``size`` numbers, empty slices left out."""
        ranks = self.grid.stages[self.stage_with(layer)]
        cut = bounds(size, len(ranks))
        return [(rank, cut[n], cut[n + 1]) for n, rank in enumerate(ranks) if cut[n] < cut[n + 1]]

    def holders(self, rank: int, copies: int) -> tuple[int, ...]:
        """The ranks that keep a rank's snapshots: the next ones of its stage's ring, then those of the following stages."""
        grid = self.grid
        stage = grid.stage_of(rank)
        own = grid.stages[stage]
        place = own.index(rank)
        others = [other for n in range(1, len(grid.stages)) for other in grid.stages[(stage + n) % len(grid.stages)]]
        # The first copy is near; from the second on they lie in other stages, so that a stage that is lost is not all.
        near, far = (
            [*own[place + 1 :], *own[:place]],
            others[place % len(others) :] + others[: place % len(others)] if others else [],
        )
        order = [*near[:1], *far, *near[1:]]
        return tuple(order[:copies])


def moves(
    before: Layout,
    after: Layout,
    size_L: Sequence[int],
    *,
    alive: Collection[int] | None = None,
    holders: Mapping[int, Sequence[int]] | None = None,
) -> list[Move]:
    """What must travel from ``before`` to ``after``: pieces whose owner changes, and those that a lost owner's neighbour answers for.

    Args:
        before, after: of the same layers.
        size_L: numbers of each layer.
        alive: ranks that can give what they have; default: all.
        holders: of a lost rank, who keeps its snapshot; the first that is alive gives it.

    Raises InputError for a slice that no live rank has.
    """
    found = []
    for layer, size in enumerate(size_L):
        old, new = before.slices(layer, size), after.slices(layer, size)
        if not size:
            continue
        for source, target, first, end in recut(_cut(old), _cut(new)):
            owner, goal = old[source][0], new[target][0]
            giver = owner
            if alive is not None and owner not in alive:
                kept = [other for other in (holders or {}).get(owner, ()) if other in alive]
                if not kept:
                    raise InputError(f"rank {owner} is lost with its slice of layer {layer}, and no live rank keeps it")
                giver = kept[0]
            # What a neighbour kept is in a snapshot and not in its own slice, also where it stays there.
            if giver != goal or giver != owner:
                found.append(Move(layer, first, end, giver, goal))
    return found


def steps_of(before: Layout, after: Layout, sizes: Sequence[int], chunk: int) -> int:
    """For how many steps a stream goes on: a chunk of ``chunk`` numbers of each move a step, at least one step."""
    return max((math.ceil((move.end - move.first) / chunk) for move in moves(before, after, sizes)), default=1)


def _cut(slices: Sequence[tuple[int, int, int]]) -> list[int]:
    return [slices[0][1], *(end for _, _, end in slices)] if slices else [0, 0]


def census(layout: Layout, size_L: Sequence[int], owned: Mapping[int, Mapping[int, tuple[int, int]]]) -> None:
    """Raise InputError unless ``owned`` (by rank, by layer, first and end) is every number of every layer once, as the layout says."""
    for layer, size in enumerate(size_L):
        found = sorted(
            (first, end, rank) for rank, of in owned.items() for first, end in [of.get(layer, (0, 0))] if first < end
        )
        place = 0
        for first, end, rank in found:
            if first != place:
                said = "nobody has" if first > place else "two ranks have"
                raise InputError(
                    f"of layer {layer} {said} the numbers {min(first, place)} to {max(first, place)} (at rank {rank})"
                )
            place = end
        if place != size:
            raise InputError(f"of layer {layer} nobody has the numbers {place} to {size}")
        if [(rank, first, end) for first, end, rank in found] != layout.slices(layer, size):
            raise InputError(f"slices of layer {layer} are whole, and not where the layout says")


def layout_to(layout: Layout) -> dict[str, Any]:
    """JSON-ready."""
    return {
        "stages": [list(stage) for stage in layout.grid.stages],
        "replicas": layout.grid.replicas,
        "bounds": list(layout.bounds),
        "num_layers": layout.num_layers,
    }


def layout_from(told: Mapping[str, Any]) -> Layout:
    """What `layout_to` told."""
    grid = Grid(tuple(tuple(stage) for stage in told["stages"]), int(told["replicas"]))
    return Layout(grid, tuple(told["bounds"]), int(told["num_layers"]))
