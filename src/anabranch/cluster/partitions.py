"""Contiguous partitions of a list of layers: no part costs more than it must, exactly.

    partition([1, 2, 3, 4], 2).bounds        # (3,): parts 1 + 2 + 3 and 4; the largest costs 6

The largest part is what a pipeline's clock waits for, so `minimax` makes that as small as it can be (a dynamic program over prefix sums,
O(K L^2)). GPipe (arXiv 1811.06965) minimises the variance of the parts, which is the objective `variance`. Among the best partitions it is
the one with the smallest list of bounds, so the result does not depend on how it was found.
"""
# Shapes: L layers, K parts

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from anabranch.errors import InputError

__all__ = ["Objective", "Partition", "check_balance", "partition", "partition_at", "partition_ends"]

Objective = Literal["minimax", "variance"]


@dataclass(frozen=True)
class Partition:
    """K contiguous parts of L layers.

    Attributes:
        bounds: where part 1, 2, ... K - 1 begins; part 0 begins at 0.
        costs: of each part, with what its boundary costs.
        num_layers: L.
    """

    bounds: tuple[int, ...]
    costs: tuple[float, ...]
    num_layers: int

    @property
    def parts(self) -> tuple[range, ...]:
        """The layers of each part."""
        ends = (*self.bounds, self.num_layers)
        return tuple(range(start, end) for start, end in zip((0, *self.bounds), ends, strict=True))

    @property
    def balance(self) -> tuple[int, ...]:
        """How many layers each part has."""
        return tuple(len(part) for part in self.parts)

    @property
    def bottleneck(self) -> float:
        """What the most expensive part costs."""
        return max(self.costs)

    def part_of(self, layer: int) -> int:
        """The part that a layer is in."""
        return sum(bound <= layer for bound in self.bounds)


def partition(
    cost_L: Sequence[float],
    num_parts: int,
    *,
    boundary_L: Sequence[float] | None = None,
    memory_L: Sequence[float] | None = None,
    cap: float = math.inf,
    fits: Callable[[int, int], np.ndarray] | None = None,
    uncut: Sequence[range] = (),
    objective: Objective = "minimax",
) -> Partition:
    """The best partition of L layers into ``num_parts`` parts that are not empty.

    Args:
        cost_L: of each layer, in any unit, at least 0.
        num_parts: K.
        boundary_L: what it costs a part to end behind this layer (sending its output), in the same unit; nothing by default. The last
            layer's does not count.
        memory_L: of each layer, in any unit.
        cap: the most memory of a part.
        fits: of a part's number and the layer that it begins at: whether it may end behind that layer, the next one, ... the last one, as
            bool [L - first]. For room that depends on the place of a part; in addition to ``cap``. None for no such bound.
        uncut: layers that stay together, such as those that share a pool of experts.
        objective: ``minimax`` (the largest part is smallest) or ``variance`` (the sum of squares is).

    Raises InputError for numbers that are none, more parts than layers, and where no partition keeps ``cap`` and ``uncut``: it names the
    layer or the group that makes it impossible.
    """
    costs_L = _numbers(cost_L, "cost_L")
    length = len(costs_L)
    if not 1 <= num_parts <= length:
        raise InputError(f"{length} layers cannot be {num_parts} parts that are not empty; use 1 to {length}")
    boundary = np.zeros(length) if boundary_L is None else _numbers(boundary_L, "boundary_L", length).copy()
    boundary[-1] = 0.0
    memory = np.zeros(length) if memory_L is None else _numbers(memory_L, "memory_L", length)
    may_end = _ends(length, uncut)
    _check_room(memory, cap, uncut)
    # best[k, i]: of layers i to the end in k parts. From the back, so that the walk from the front meets the smallest bounds first.
    best = np.full((num_parts + 1, length + 1), np.inf)
    best[0, length] = 0.0
    for parts in range(1, num_parts + 1):
        # Not where too few layers are left, or too few came before.
        for first in range(num_parts - parts, length - parts + 1):
            options = _options(first, best[parts - 1], costs_L, boundary, memory, cap, may_end, objective)
            if fits is not None and np.isfinite(options).any():
                options = np.where(fits(num_parts - parts, first), options, np.inf)
            best[parts, first] = options.min(initial=np.inf)
    whole = best[num_parts, 0]
    if not math.isfinite(whole):
        raise InputError(_why_not(length, num_parts, memory, cap, may_end, fits is not None))
    # A later part may be anything that is no worse than the whole: of minimax, below its largest part.
    bounds: list[int] = []
    first, limit = 0, whole
    for parts in range(num_parts, 0, -1):
        options = _options(first, best[parts - 1], costs_L, boundary, memory, cap, may_end, objective)
        if fits is not None:
            options = np.where(fits(num_parts - parts, first), options, np.inf)
        end = first + 1 + int(np.flatnonzero(options <= limit)[0])
        if objective == "variance":
            limit = best[parts - 1, end]
        bounds.append(end)
        first = end
    starts = [0, *bounds[:-1]]
    costs = tuple(
        float(costs_L[start:end].sum() + boundary[end - 1]) for start, end in zip(starts, bounds, strict=True)
    )
    return Partition(tuple(bounds[:-1]), costs, length)


def partition_at(bounds: Sequence[int], cost_L: Sequence[float]) -> Partition:
    """The partition with these bounds, which are in order and inside of the layers; its costs are those of the layers alone."""
    ends = (*bounds, len(cost_L))
    costs = tuple(float(sum(cost_L[start:end])) for start, end in zip((0, *bounds), ends, strict=True))
    return Partition(tuple(bounds), costs, len(cost_L))


def partition_ends(length: int, uncut: Sequence[range] = ()) -> list[int]:
    """Where a part of L layers may begin, beside 0. Raises InputError for groups that are not of the layers."""
    return [int(layer) + 1 for layer in np.flatnonzero(_ends(length, uncut)[:-1])]


def _options(
    first: int,
    rest: np.ndarray,
    cost_L: np.ndarray,
    boundary: np.ndarray,
    memory: np.ndarray,
    cap: float,
    may_end: np.ndarray,
    objective: str,
) -> np.ndarray:
    """For each end of the part that begins at ``first``: what the whole costs then, infinite where it may not end there."""
    own = np.cumsum(cost_L[first:]) + boundary[first:]
    after = rest[first + 1 :]
    total = np.maximum(own, after) if objective == "minimax" else own**2 + after
    return np.where(may_end[first:] & (np.cumsum(memory[first:]) <= cap), total, np.inf)


def _ends(length: int, uncut: Sequence[range]) -> np.ndarray:
    """bool [L]: whether a part may end behind a layer."""
    may_end = np.ones(length, bool)
    for group in uncut:
        if not len(group):
            continue
        if not (0 <= group[0] and group[-1] < length and group.step == 1):
            raise InputError(f"uncut has {group}, and there are {length} layers; give ranges of layers with step 1")
        may_end[group.start : group.stop - 1] = False
    return may_end


def _check_room(memory: np.ndarray, cap: float, uncut: Sequence[range]) -> None:
    worst = int(memory.argmax())
    if memory[worst] > cap:
        raise InputError(f"layer {worst} takes {memory[worst]:g}, and a part holds {cap:g}; raise cap")
    for group in uncut:
        if (taken := float(memory[group.start : group.stop].sum())) > cap:
            raise InputError(
                f"layers {group.start} to {group.stop - 1} stay together and take {taken:g}, and a part holds {cap:g}; raise cap"
            )


def _why_not(length: int, num_parts: int, memory: np.ndarray, cap: float, may_end: np.ndarray, has_fits: bool) -> str:
    most = int(may_end.sum())
    if most < num_parts:
        return f"{length} layers, of which some stay together, cannot be {num_parts} parts; use at most {most}, or let groups be cut"
    if has_fits:
        return f"no {num_parts} parts of {length} layers fit where each of them is; use more parts or raise cap"
    return f"layers take {memory.sum():g} in all, and {num_parts} parts of at most {cap:g} do not hold them; use more parts or raise cap"


def _numbers(values: Sequence[float], name: str, length: int | None = None) -> np.ndarray:
    found = np.asarray(values, np.float64)
    if found.ndim != 1 or not len(found) or (length is not None and len(found) != length):
        wanted = "at least one" if length is None else str(length)
        raise InputError(f"{name} has shape {list(found.shape)}; give one number for each layer, {wanted}")
    wrong = np.flatnonzero(~np.isfinite(found) | (found < 0))
    if len(wrong):
        raise InputError(f"{name} of layer {wrong[0]} is {found[wrong[0]]}; give finite numbers of at least 0")
    return found


def check_balance(balance: Sequence[int], length: int) -> Partition:
    """The partition that a user gave as layers per part. Raises InputError unless they are positive and sum to ``length``."""
    wrong = [count for count in balance if count < 1]
    if wrong or sum(balance) != length:
        said = f"balance is {list(balance)}"
        if wrong:
            raise InputError(
                f"{said}, which has the entry {wrong[0]} and sums to {sum(balance)}; every part of the {length} layers needs one"
            )
        raise InputError(
            f"{said}, which sums to {sum(balance)}, and the model has {length} layers; "
            f"stages={len(balance)} would choose a balance that fits"
        )
    ends = np.cumsum(balance)
    return Partition(tuple(int(end) for end in ends[:-1]), tuple(float(count) for count in balance), length)
