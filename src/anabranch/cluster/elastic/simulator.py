"""How long a step takes after losses, by several ways to go on: ours, ReCycle's and TorchFT's, on one schedule table.

    compare(replicas=8, stages=12, layer_costs=[1e-3] * 64, micro_batches=16, micro_batch=8, lost=[3])

All three keep the global batch, begin with the same stages, and run the same tables (1F1B, or eager where that is faster) with the same
durations of layers:

    elaswave   a column's samples are cut over the ranks a stage has left, and layers move (`anabranch.cluster.elastic.planner`)
    recycle    whole micro-batches of a lost rank go to the others of its stage, in turns (ReCycle, SOSP 2024); layers stay. Every rank and
               every micro-batch is simulated
    torchft    a pipeline that lost a rank is dropped; the others take its micro-batches

and where they are asked for (``also``), with no limit of memory for what is put off:

    recycle-decoupled    ReCycle's, with gradients of weights as work of their own, for when a rank would wait
    recycle-staggered    its whole method: besides, each stage takes its optimizer's step when its own gradients are there, and goes on, so
                         that what is put off fills the beginning of the next step. Seconds from one step's end to the next one's
    elaswave-decoupled   ours with such a backward (`anabranch cluster coordinate --decoupled`)
"""
# Shapes: D replicas, P stages, M micro-batches

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from anabranch.cluster.elastic.layout import Grid, Layout
from anabranch.cluster.elastic.planner import ElasticPlan, Policy, plan
from anabranch.cluster.elastic.timing import DECOUPLED, EAGER, precedence, share_of, simulate_ranks, table_for
from anabranch.cluster.events import Task, run_tasks
from anabranch.cluster.partitions import partition
from anabranch.cluster.schedules import FORWARD, WEIGHT, Kind, Schedule
from anabranch.errors import InputError

__all__ = ["ARMS", "MORE_ARMS", "Compared", "compare", "recycle_step_s", "staggered_step_s", "torchft_step_s"]

ARMS = ("elaswave", "recycle", "torchft")
MORE_ARMS = ("recycle-decoupled", "recycle-staggered", "elaswave-decoupled")
_MOST_TASKS = 400_000
# Steps after each other that are simulated where one runs into the next; the first half is not counted.
_STEPS = 8


@dataclass(frozen=True)
class Compared:
    """Seconds of a step.

    Attributes:
        whole_s: before any loss.
        step_s: by arm; infinite where an arm cannot go on.
        plan: ours.
        lost: which ranks.
    """

    whole_s: float
    step_s: dict[str, float]
    plan: ElasticPlan
    lost: tuple[int, ...]

    def ratio(self, arm: str) -> float:
        """The throughput of ours over that of another."""
        return self.step_s[arm] / self.step_s["elaswave"]

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; an arm that cannot go on has None."""
        return {
            "lost": list(self.lost),
            "whole_s": self.whole_s,
            "step_s": {arm: taken if math.isfinite(taken) else None for arm, taken in self.step_s.items()},
            "throughput_over": {
                arm: self.ratio(arm) if math.isfinite(taken) else None
                for arm, taken in self.step_s.items()
                if arm != "elaswave"
            },
            "plan": self.plan.to_dict(),
        }


def compare(
    *,
    replicas: int,
    stages: int,
    layer_costs: Sequence[float],
    micro_batches: int,
    micro_batch: int,
    lost: Sequence[int],
    policy: Policy | None = None,
    also: Sequence[str] = (),
    **options: Any,
) -> Compared:
    """A step of each arm after ``lost`` ranks went; rank r is replica r mod D of stage r // D.

    Args:
        replicas, stages: D, P.
        layer_costs: seconds of forward and backward of each layer, for one sample.
        micro_batches: M of each replica.
        micro_batch: its samples, b; the global batch is D M b.
        lost: ranks.
        policy: of ours.
        also: of `MORE_ARMS`.
        options: ``memory``, ``send_L``, ``size_L`` as of `plan`; sends are ours alone, so others are not slowed by them.

    Raises InputError for ranks that there are not, lost twice, or all of them, and for arms that there are not.
    """
    policy = policy or Policy()
    if wrong := [arm for arm in also if arm not in MORE_ARMS]:
        raise InputError(f"also has {wrong[0]!r}; use some of {list(MORE_ARMS)}")
    grid = Grid.full(replicas=replicas, stages=stages)
    if len(set(lost)) < len(lost):
        raise InputError(f"lost is {list(lost)}; a rank is lost once")
    if micro_batch < 1:
        raise InputError(f"micro_batch is {micro_batch}; use at least 1")
    if 2 * replicas * stages * micro_batches > _MOST_TASKS:
        raise InputError(
            f"{replicas} replicas, {stages} stages and {micro_batches} micro-batches are too many to simulate"
        )
    before = Layout(grid, partition(list(layer_costs), stages).bounds, len(layer_costs))
    shared: dict[str, Any] = {
        "global_batch": replicas * micro_batches * micro_batch,
        "micro_batches": micro_batches,
        "policy": policy,
        **options,
    }
    whole = plan(grid, layer_costs, previous=before, **shared)
    # All arms begin with what is best for ranks of equal speed.
    before = whole.layout
    left = grid.without(lost)
    holders = {rank: before.holders(rank, len(grid.ranks)) for rank in lost}
    ours = plan(left, layer_costs, previous=before, holders=holders, **shared)
    stage_s = [micro_batch * sum(layer_costs[n] for n in part) for part in before.parts]
    names, reduce_s = policy.schedule_names, whole.reduce_s
    found = {
        "elaswave": ours.step_s,
        "recycle": recycle_step_s(left, stage_s, micro_batches, names) + reduce_s,
        "torchft": torchft_step_s(grid, left, stage_s, micro_batches, names) + reduce_s,
    }
    for arm in also:
        if arm == "recycle-decoupled":
            found[arm] = recycle_step_s(left, stage_s, micro_batches, (*names, DECOUPLED)) + reduce_s
        elif arm == "recycle-staggered":
            found[arm] = staggered_step_s(left, stage_s, micro_batches, optimizer_s=reduce_s)
        else:
            apart = replace(policy, schedule_names=(*names, DECOUPLED))
            found[arm] = plan(left, layer_costs, previous=before, holders=holders, **{**shared, "policy": apart}).step_s
    return Compared(whole.step_s, found, ours, tuple(sorted(lost)))


def recycle_step_s(
    left: Grid, stage_s: Sequence[float], micro_batches: int, schedule_names: Sequence[str] = ("1f1b", EAGER)
) -> float:
    """A step where a lost rank's micro-batches go to the others of its stage, whole and in turns; infinite where a stage is lost.

    Args:
        left: with its stages as they were, and the ranks p D to p D + D - 1 in stage p.
        stage_s: forward and backward of one micro-batch in each stage.
        micro_batches: M of each of D pipelines.
        schedule_names: of each pipeline, as of `Policy`; the best counts.
    """
    if not all(left.stages):
        return math.inf
    found = []
    for name in schedule_names:
        table, keeps_order = table_for(name, len(stage_s), micro_batches)
        tasks = [task for task, _ in _rerouted(left, table, stage_s, keeps_order=keeps_order)]
        # Pipelines that share ranks may wait for each other where each keeps its order.
        with suppress(InputError):
            found.append(
                max(
                    done.end_s
                    for done in run_tasks(tasks, in_order={task.resource for task in tasks} if keeps_order else ())
                )
            )
    return min(found, default=math.inf)


def staggered_step_s(left: Grid, stage_s: Sequence[float], micro_batches: int, *, optimizer_s: float = 0.0) -> float:
    """From one step's end to the next one's where stages wait for their own gradients alone; infinite where a stage is lost.

    Args:
        left, stage_s, micro_batches: as of `recycle_step_s`.
        optimizer_s: from the last gradient of a stage until its ranks have the next weights.
    """
    if not all(left.stages):
        return math.inf
    table, _ = table_for(DECOUPLED, len(stage_s), micro_batches)
    each = len(table.slots) * left.replicas
    steps = max(2, min(_STEPS, _MOST_TASKS // each))
    tasks: list[Task] = []
    ends = []
    for _ in range(steps):
        first, ahead = len(tasks), tuple(range(len(tasks) - len(stage_s), len(tasks))) if tasks else ()
        own = _rerouted(left, table, stage_s, keeps_order=False, first=first, ahead=ahead)
        last: list[list[int]] = [[] for _ in stage_s]
        for number, (task, (stage, kind)) in enumerate(own, first):
            tasks.append(task)
            if kind == WEIGHT:
                last[stage].append(number)
        tasks += [Task(("optimizer", stage), optimizer_s, tuple(numbers)) for stage, numbers in enumerate(last)]
        ends.append(len(tasks))
    done = run_tasks(tasks)
    end_s = [max(one.end_s for one in done[:end]) for end in ends]
    half = steps // 2
    return (end_s[-1] - end_s[half - 1]) / (steps - half)


def _rerouted(
    left: Grid,
    table: Schedule,
    stage_s: Sequence[float],
    *,
    keeps_order: bool,
    first: int = 0,
    ahead: Sequence[int] = (),
) -> list[tuple[Task, tuple[int, Kind]]]:
    """Tasks of all pipelines, by clock, or in order of precedence where each rank does what is ready; each with its stage and kind.

    Args:
        left, table, stage_s: see `recycle_step_s`.
        keeps_order: whether ranks keep to the table's order.
        first: number of the first task.
        ahead: by stage, the task that must be done before any of its forward.
    """
    replicas = left.replicas

    def rank_of(pipeline: int, stage: int, micro_batch: int) -> int:
        home = stage * replicas + pipeline
        if home in left.stages[stage]:
            return home
        ranks = left.stages[stage]
        # Of several lost ranks of a stage each begins elsewhere, so that the turns are even.
        lost = [n for n in range(replicas) if stage * replicas + n not in ranks]
        return ranks[(lost.index(pipeline) * table.num_micro_batches + micro_batch) % len(ranks)]

    order = [(slot, pipeline) for slot in table.slots for pipeline in range(replicas)]
    if not keeps_order:
        order.sort(key=lambda one: (precedence(one[0]), one[1]))
    number = {
        (pipeline, slot.stage, slot.micro_batch, slot.kind): place
        for place, (slot, pipeline) in enumerate(order, first)
    }
    tasks = []
    for slot, pipeline in order:
        after = [number[pipeline, stage, m, kind] for stage, m, kind, _ in table.needs(slot)]
        if ahead and slot.kind == FORWARD:
            after.append(ahead[slot.stage])
        taken = share_of(slot.kind, table) * stage_s[slot.stage]
        task = Task(rank_of(pipeline, slot.stage, slot.micro_batch), taken, tuple(after))
        tasks.append((task, (slot.stage, slot.kind)))
    return tasks


def torchft_step_s(
    whole: Grid,
    left: Grid,
    stage_s: Sequence[float],
    micro_batches: int,
    schedule_names: Sequence[str] = ("1f1b", EAGER),
) -> float:
    """A step where pipelines that lost a rank are dropped and the others take their micro-batches; infinite where none is whole."""
    replicas, stages = whole.replicas, len(stage_s)
    alive = set(left.ranks)
    sound = [d for d in range(replicas) if all(stage[d] in alive for stage in whole.stages)]
    if not sound:
        return math.inf
    each = math.ceil(micro_batches * replicas / len(sound))
    # Pipelines are alike: one of them is simulated.
    one = Layout(Grid.full(replicas=1, stages=stages), tuple(range(1, stages)), stages)
    cuts_P = [[(m, m + 1) for m in range(each)]] * stages
    free = {"send_L": [0.0] * stages, "frequency_P": [1.0] * stages}
    return min(simulate_ranks(one, cuts_P, stage_s, name, **free).step_s for name in schedule_names)
