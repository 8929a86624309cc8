"""What to do with the ranks that are left: which sample goes where, which layer goes where, and at which clock. Nothing runs here.

    made = plan(Grid.full(replicas=8, stages=12).without([3]), [1e-3] * 64, global_batch=1024, micro_batches=16, previous=before)
    made.bounds, made.columns, made.frequency_P, made.step_s

In this order, as in ElasWave (arXiv 2510.00606; its objective is not published, this one is ours): the samples of a column (a micro-batch
of all replicas) are cut over the ranks that a stage has left (*dataflow*, always); layers move where that makes a step shorter by more than
a threshold (*graph*, exact searches over contiguous stages of unequal speed); what is still slowest gets a higher clock (*frequency*).
Random numbers need no plan: they are functions of what is computed.
"""
# Shapes: L layers, P stages, M columns

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from anabranch.cluster.elastic.cuts import bounds
from anabranch.cluster.elastic.layout import Grid, Layout, Move, moves
from anabranch.cluster.elastic.stages import Memory, minimax, shortest, stage_at
from anabranch.cluster.elastic.timing import EAGER, TABLES, StepTime, simulate_ranks
from anabranch.errors import InputError

__all__ = ["ElasticPlan", "Policy", "cut_samples", "frequencies", "plan"]


@dataclass(frozen=True, kw_only=True)
class Policy:
    """How a loss is answered.

    Attributes:
        threshold: least gain of a step, as a share of it, for which layers move.
        expected_steps: for which a gain is expected to last; times the gain it must be above what the move costs.
        bytes_s: what a link carries, for the cost of a move and of the reduction of gradients; None for links that cost nothing.
        moves_layers: whether layers move at all.
        max_frequency, min_frequency: of a rank's clock, over the one it runs at.
        power_save: lower the clocks of stages that wait.
        schedule_names: tables that a step may have: those of `anabranch.cluster.SCHEDULES` with one visit; ``eager``: the order that
            unequal stages come to where backward goes first; ``decoupled``: likewise, with gradients of weights as work of their own.
            The fastest is taken, the first of those that are as fast. What is put off is kept until then, without a limit.
    """

    threshold: float = 0.03
    expected_steps: int = 1000
    bytes_s: float | None = None
    moves_layers: bool = True
    max_frequency: float = 1.0
    min_frequency: float = 0.5
    power_save: bool = False
    schedule_names: tuple[str, ...] = ("1f1b", EAGER)

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1:
            raise InputError(f"threshold is {self.threshold}; use 0 to 1")
        if not self.schedule_names or set(self.schedule_names) - set(TABLES):
            raise InputError(f"schedule_names are {self.schedule_names}; use some of {list(TABLES)}")
        if self.expected_steps < 1:
            raise InputError(f"expected_steps is {self.expected_steps}; use at least 1")
        if self.bytes_s is not None and not self.bytes_s > 0:
            raise InputError(f"bytes_s is {self.bytes_s}; it must be above 0")
        if not 0 < self.min_frequency <= 1 <= self.max_frequency < math.inf:
            raise InputError(
                f"frequencies are {self.min_frequency} to {self.max_frequency}; the least is above 0 and at most 1, the most at least 1"
            )


@dataclass(frozen=True)
class ElasticPlan:
    """What `plan` found.

    Attributes:
        layout: ranks of stages and layers of stages.
        columns: of each column, where its samples begin and end.
        cuts_P: of each stage, of each column, ``[ranks + 1]``: where each rank's samples begin, and the end.
        frequency_P: of each stage's clock, over the usual one.
        moves: what must travel, where the plan was made from a layout.
        schedule_name: of the table that the step has.
        timed: one step of it, simulated, with the order of each rank's slots.
        reduce_s: of gradients and weights in the slowest stage, after the pipeline.
        moves_layers: whether stages got other layers.
        warnings: for people.
    """

    layout: Layout
    columns: tuple[tuple[int, int], ...]
    cuts_P: tuple[tuple[tuple[int, ...], ...], ...]
    frequency_P: tuple[float, ...]
    moves: tuple[Move, ...]
    schedule_name: str
    timed: StepTime
    reduce_s: float
    moves_layers: bool
    warnings: tuple[str, ...] = field(default=())

    @property
    def bounds(self) -> tuple[int, ...]:
        """Where stages begin, see `Layout`."""
        return self.layout.bounds

    @property
    def step_s(self) -> float:
        """Of one step, predicted."""
        return self.timed.step_s + self.reduce_s

    def samples_of(self, rank: int) -> list[range]:
        """The samples of a rank, in each column."""
        stage = self.layout.grid.stage_of(rank)
        place = self.layout.grid.stages[stage].index(rank)
        return [range(cut[place], cut[place + 1]) for cut in self.cuts_P[stage]]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "stages": [
                {
                    "stage": number,
                    "ranks": list(ranks),
                    "layers": [part.start, part.stop - 1],
                    "samples": [sum(map(len, self.samples_of(rank))) for rank in ranks],
                    "frequency": self.frequency_P[number],
                    "busy_s": max(self.timed.busy[rank] for rank in ranks),
                }
                for number, (ranks, part) in enumerate(zip(self.layout.grid.stages, self.layout.parts, strict=True))
            ],
            "bounds": list(self.bounds),
            "moves": [[move.layer, move.first, move.end, move.source, move.target] for move in self.moves],
            "moves_layers": self.moves_layers,
            "step_s": self.step_s,
            "reduce_s": self.reduce_s,
            "schedule": self.schedule_name,
            "idle": self.timed.idle,
            "warnings": list(self.warnings),
        }


def plan(
    grid: Grid,
    layer_costs: Sequence[float],
    *,
    global_batch: int,
    micro_batches: int,
    block: int = 1,
    memory: Memory | None = None,
    send_L: Sequence[float] | None = None,
    size_L: Sequence[int] | None = None,
    previous: Layout | None = None,
    holders: dict[int, tuple[int, ...]] | None = None,
    policy: Policy | None = None,
) -> ElasticPlan:
    """The plan for the ranks of ``grid``: a pure function, so it is the same wherever it is made.

    Args:
        grid: the live ranks; `Grid.healed` is applied to it.
        layer_costs: seconds of forward and backward of each layer, for one sample.
        global_batch: B, kept whatever is lost.
        micro_batches: M.
        block: samples that stay together, see `anabranch.cluster.ElasticTrainer`.
        memory: what layers take, and a rank has.
        send_L: seconds to send the output of a layer, for one sample.
        size_L: numbers of each layer's parameters; with it moves are listed, and the reduction is timed (4 bytes a number).
        previous: the layout until now. Stages keep their layers unless it is worth a move.
        holders: who keeps snapshots of ranks that are lost.
        policy: thresholds and clocks.

    Raises InputError for a batch without samples, and for more stages than layers.
    """
    policy = policy or Policy()
    costs = _costs(layer_costs)
    if global_batch < 1 or micro_batches < 1 or block < 1:
        raise InputError(
            f"global_batch is {global_batch}, micro_batches {micro_batches}, block {block}; use at least 1 of each"
        )
    grid = grid.healed()
    sizes = [0] * len(costs) if size_L is None else list(size_L)
    if len(sizes) != len(costs) or (send_L is not None and len(send_L) != len(costs)):
        raise InputError(f"there are {len(costs)} layers; give as many sizes and sends")
    columns, cuts_P = cut_samples(grid, global_batch, micro_batches, block)
    # Whoever has one sample more in a column takes turns, so a stage is as fast as its mean share.
    share_P = [global_batch / micro_batches / len(ranks) for ranks in grid.stages]
    sends = np.zeros(len(costs)) if send_L is None else np.asarray(send_L, float)
    warnings: list[str] = []

    def timed(at: tuple[int, ...], frequency_P: Sequence[float]) -> tuple[StepTime, str]:
        layout = Layout(grid, at, len(costs))
        found = [
            (simulate_ranks(layout, cuts_P, costs, name, send_L=sends, frequency_P=frequency_P), name)
            for name in policy.schedule_names
        ]
        return min(found, key=lambda one: one[0].step_s)

    kept = previous.bounds if previous is not None and len(previous.bounds) == len(grid.stages) - 1 else None
    chosen = _graph(grid, costs, sends, sizes, share_P, memory, kept, policy, warnings)
    if kept is not None and policy.moves_layers and not warnings:
        usual = [1.0] * len(grid.stages)
        filled = shortest(
            costs,
            share_P,
            micro_batches,
            boundary_L=sends,
            memory=memory,
            ranks_P=[len(ranks) for ranks in grid.stages],
        )

        def whole_s(at: tuple[int, ...]) -> float:
            return timed(at, usual)[0].step_s + _reduce_s(Layout(grid, at, len(costs)), sizes, policy)

        chosen = min((at for at in (chosen, filled) if at is not None), key=whole_s)
        if chosen != kept and _fits(grid, kept, memory):
            old_s, new_s = whole_s(kept), whole_s(chosen)
            moved_bytes = 4.0 * sum(sizes[n] for n in range(len(costs)) if stage_at(kept, n) != stage_at(chosen, n))
            # A number's parameter and two moments.
            cost_s = 0.0 if policy.bytes_s is None else 3 * moved_bytes / policy.bytes_s
            if not (old_s - new_s > policy.threshold * old_s and (old_s - new_s) * policy.expected_steps > cost_s):
                chosen = kept
    layout = Layout(grid, chosen, len(costs))
    time_P = [share * float(costs[part].sum()) for share, part in zip(share_P, _indices(layout), strict=True)]
    frequency_P = frequencies(time_P, policy)
    step, name = timed(chosen, frequency_P)
    found: list[Move] = []
    if previous is not None and size_L is not None:
        found = moves(previous, layout, sizes, alive=grid.ranks, holders=holders)
    return ElasticPlan(
        layout,
        columns,
        cuts_P,
        tuple(frequency_P),
        tuple(found),
        name,
        step,
        _reduce_s(layout, sizes, policy),
        previous is not None and previous.bounds != chosen,
        tuple(warnings),
    )


def cut_samples(
    grid: Grid, global_batch: int, micro_batches: int, block: int = 1
) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[tuple[int, ...], ...], ...]]:
    """(columns, cuts of each stage, see `ElasticPlan`): contiguous, between blocks, as even as they can be, extra blocks in turns."""
    blocks = math.ceil(global_batch / block)
    edges = bounds(blocks, micro_batches)

    def sample(at: int) -> int:
        return min(at * block, global_batch)

    cuts_P = []
    for ranks in grid.stages:
        cuts, turn = [], 0
        for first, end in pairwise(edges):
            cuts.append(tuple(sample(first + at) for at in bounds(end - first, len(ranks), turn)))
            turn += (end - first) % len(ranks)
        cuts_P.append(tuple(cuts))
    columns = tuple((sample(first), sample(end)) for first, end in pairwise(edges))
    return columns, tuple(cuts_P)


def frequencies(time_P: Sequence[float], policy: Policy) -> list[float]:
    """The clock of each stage: the slowest one's is raised until it is as fast as the second; with `power_save` others are lowered."""
    found = [1.0] * len(time_P)
    slowest = max(range(len(time_P)), key=lambda n: time_P[n])
    others = [taken for n, taken in enumerate(time_P) if n != slowest]
    if others and max(others) > 0:
        found[slowest] = min(policy.max_frequency, time_P[slowest] / max(others))
    if policy.power_save:
        wait = max(taken / clock for taken, clock in zip(time_P, found, strict=True))
        for n, taken in enumerate(time_P):
            if n != slowest and wait > 0:
                found[n] = max(policy.min_frequency, min(1.0, taken / wait))
    return found


def _graph(
    grid: Grid,
    costs: np.ndarray,
    sends: np.ndarray,
    sizes: Sequence[int],
    share_P: Sequence[float],
    memory: Memory | None,
    kept: tuple[int, ...] | None,
    policy: Policy,
    warnings: list[str],
) -> tuple[int, ...]:
    """Bounds of the best stages; those that were, where layers may not move or nothing fits."""
    counts = [len(ranks) for ranks in grid.stages]
    if kept is not None and not policy.moves_layers:
        return kept
    options: dict[str, Any] = {"boundary_L": sends, "ranks_P": counts, "kept": kept, "size_L": sizes}
    found = minimax(costs, share_P, memory=memory, **options)
    if found is not None:
        return found
    assert memory is not None
    warnings.append(
        f"no cut into {len(counts)} stages of {counts} ranks fits {memory.cap:g} bytes a rank; layers stay where they are"
    )
    if kept is not None:
        return kept
    unbounded = minimax(costs, share_P, **options)
    assert unbounded is not None
    return unbounded


def _fits(grid: Grid, at: tuple[int, ...], memory: Memory | None) -> bool:
    if memory is None:
        return True
    layout = Layout(grid, at, len(memory.replicated_L))
    return all(memory.of(part, len(ranks)) <= memory.cap for part, ranks in zip(layout.parts, grid.stages, strict=True))


def _reduce_s(layout: Layout, sizes: Sequence[int], policy: Policy) -> float:
    """Gradients to the owners of slices, and weights back, in the slowest stage."""
    if policy.bytes_s is None:
        return 0.0
    travels = [
        2 * 4 * sum(sizes[n] for n in part) * (len(ranks) - 1) / len(ranks)
        for ranks, part in zip(layout.grid.stages, layout.parts, strict=True)
    ]
    return max(travels) / policy.bytes_s


def _indices(layout: Layout) -> list[list[int]]:
    return [list(part) for part in layout.parts]


def _costs(layer_costs: Sequence[float]) -> np.ndarray:
    found = np.asarray(layer_costs, float)
    wrong: Any = np.flatnonzero(~np.isfinite(found) | (found < 0)) if found.ndim == 1 else []
    if found.ndim != 1 or not len(found) or len(wrong):
        raise InputError(
            f"layer_costs has shape {list(found.shape)}, wrong {list(wrong)}; give seconds of at least 0 for each layer"
        )
    return found
