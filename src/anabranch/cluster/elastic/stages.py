"""Which layers each stage has, where stages are not equally fast: two exact searches over contiguous cuts.

`minimax` makes the slowest stage as fast as it can be, and moves as little as that allows; `shortest` looks at the whole step, in which
stages in front begin earlier.
"""
# Shapes: L layers, P stages

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from anabranch.errors import InputError

__all__ = ["Memory", "minimax", "shortest", "stage_at"]

Numbers = Sequence[float] | np.ndarray


@dataclass(frozen=True)
class Memory:
    """What layers take of a rank.

    Attributes:
        replicated_L: bytes that each rank of the stage has (weights, gradients).
        sharded_L: bytes that they share (optimizer state).
        cap: of a rank.
    """

    replicated_L: tuple[float, ...]
    sharded_L: tuple[float, ...]
    cap: float

    def of(self, part: range, ranks: int) -> float:
        """Bytes of each of ``ranks`` ranks that have these layers."""
        return sum(self.replicated_L[n] + self.sharded_L[n] / ranks for n in part)


def minimax(
    cost_L: Numbers,
    scale_P: Numbers,
    *,
    boundary_L: Numbers | None = None,
    memory: Memory | None = None,
    ranks_P: Sequence[int] | None = None,
    kept: tuple[int, ...] | None = None,
    size_L: Sequence[int] | None = None,
) -> tuple[int, ...] | None:
    """Bounds of P contiguous stages that are not empty, so that the slowest is as fast as it can be; exact, O(P L^2).

    A stage takes its layers' costs, and that of the boundary behind it, times its scale. Among the best it is one that moves least of
    ``size_L`` from ``kept``, and of these the one with the smallest bounds. None where ``memory`` allows none.
    """
    own = _spans(cost_L, scale_P, boundary_L, memory, ranks_P)
    length, stages = len(cost_L), len(scale_P)
    best = np.full((stages + 1, length + 1), np.inf)
    best[stages, length] = 0.0
    for p in reversed(range(stages)):
        best[p] = np.maximum(own[p], best[p + 1][None, :]).min(axis=1)
    limit = best[0, 0]
    if not math.isfinite(limit):
        return None
    allowed = own <= limit * (1 + 1e-12)
    weights = np.ones(length) if size_L is None else np.asarray(size_L, float)
    least = np.full((stages + 1, length + 1), np.inf)
    least[stages, length] = 0.0
    moved = np.zeros((stages, length + 1, length + 1))
    if kept is not None:
        for p in range(stages):
            away = np.concatenate(([0.0], np.cumsum([weights[n] * (stage_at(kept, n) != p) for n in range(length)])))
            moved[p] = away[None, :] - away[:, None]
    for p in reversed(range(stages)):
        least[p] = np.where(allowed[p], moved[p] + least[p + 1][None, :], np.inf).min(axis=1)
    found, first = [], 0
    for p in range(stages - 1):
        options = np.where(allowed[p, first], moved[p, first] + least[p + 1], np.inf)
        first = int(np.flatnonzero(options <= least[p, first] * (1 + 1e-12))[0])
        found.append(first)
    return tuple(found)


def shortest(
    cost_L: Numbers,
    scale_P: Numbers,
    micro_batches: int,
    *,
    boundary_L: Numbers | None = None,
    memory: Memory | None = None,
    ranks_P: Sequence[int] | None = None,
) -> tuple[int, ...] | None:
    """Bounds of the stages whose step has the least lower bound: a stage cannot begin before those in front of it have begun, nor end
    before they can end, and works M times in between. The largest of these sums is what an eager order comes near to.

    So stages in front may have more than those behind. Exact, O(P L^2); of the best the smallest bounds. None where ``memory`` allows none.
    """
    own = _spans(cost_L, scale_P, boundary_L, memory, ranks_P)
    length, stages = len(cost_L), len(scale_P)
    best = np.full((stages + 1, length + 1), np.inf)
    best[stages, length] = 0.0
    for p in reversed(range(stages)):
        best[p] = np.maximum(micro_batches * own[p], own[p] + best[p + 1][None, :]).min(axis=1)
    limit = best[0, 0]
    if not math.isfinite(limit):
        return None
    found, first = [], 0
    for p in range(stages - 1):
        options = np.maximum(micro_batches * own[p, first], own[p, first] + best[p + 1])
        end = int(np.flatnonzero(options <= limit * (1 + 1e-12))[0])
        # What is left for those behind, however much earlier they could be done.
        limit -= own[p, first, end]
        first = end
        found.append(first)
    return tuple(found)


def _spans(
    cost_L: Numbers,
    scale_P: Numbers,
    boundary_L: Numbers | None,
    memory: Memory | None,
    ranks_P: Sequence[int] | None,
) -> np.ndarray:
    """``[P, L + 1, L + 1]``: what stage p takes with the layers from i to before e; infinite where it may not be."""
    costs = np.asarray(cost_L, float)
    length, stages = len(costs), len(scale_P)
    if stages > length:
        raise InputError(f"{length} layers cannot be {stages} stages that are not empty; use at most {length}")
    edge = np.zeros(length) if boundary_L is None else np.asarray(boundary_L, float).copy()
    edge[-1] = 0.0
    total = np.concatenate(([0.0], np.cumsum(costs)))
    span = total[None, :] - total[:, None]
    own = np.array(scale_P)[:, None, None] * (span + np.concatenate(([0.0], edge))[None, None, :])
    own[:, np.tril_indices(length + 1)[0], np.tril_indices(length + 1)[1]] = np.inf
    if memory is not None:
        counts = [1] * stages if ranks_P is None else ranks_P
        for p in range(stages):
            taken = np.asarray(memory.replicated_L) + np.asarray(memory.sharded_L) / counts[p]
            sums = np.concatenate(([0.0], np.cumsum(taken)))
            # Sums of floats: what fits exactly must not fail by their last digit.
            own[p][(sums[None, :] - sums[:, None]) > memory.cap * (1 + 1e-12)] = np.inf
    return own


def stage_at(at: Sequence[int], layer: int) -> int:
    """The stage that a layer is in, by where stages begin."""
    return sum(bound <= layer for bound in at)
