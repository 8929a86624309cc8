"""How long a step of unequal stages takes, rank by rank: one task for each slot of the schedule's table and each rank of its stage.

A rank waits for the ranks of the stage before it (behind it, for gradients) that have samples of its own, and for no others. What it sends
takes the receiver's time for these samples (`send_L`) between the two, and nobody's processor.
"""
# Shapes: P stages, M micro-batches

from collections.abc import Sequence
from dataclasses import dataclass

from anabranch.cluster.elastic.cuts import recut
from anabranch.cluster.elastic.layout import Layout
from anabranch.cluster.elastic.stages import Numbers
from anabranch.cluster.events import Task, run_tasks
from anabranch.cluster.schedules import BACKWARD, FORWARD, SCHEDULES, WEIGHT, Kind, Schedule, Slot, schedule

__all__ = [
    "DECOUPLED",
    "EAGER",
    "FORWARD_SHARE",
    "TABLES",
    "StepTime",
    "precedence",
    "share_of",
    "simulate_ranks",
    "table_for",
]

# Of a layer's forward and backward, what the forward takes.
FORWARD_SHARE = 1 / 3
# The order that ranks of unequal speed come to by themselves, where backward goes first and nobody waits who could work.
EAGER = "eager"
# Likewise with a backward in two parts: gradients of weights are work of their own, for when nothing else can be done (ReCycle).
DECOUPLED = "decoupled"
# Tables of unequal stages, by name. A stage has one visit.
TABLES: tuple[str, ...] = (*(name for name in SCHEDULES if name != "interleaved"), EAGER, DECOUPLED)
_PRECEDENCE = {BACKWARD: 0, FORWARD: 1, WEIGHT: 2}

# Of a stage, of a column, where each rank's samples begin, and the end.
Cuts = Sequence[Sequence[Sequence[int]]]


@dataclass(frozen=True)
class StepTime:
    """A step in time.

    Attributes:
        step_s: from the first slot to the last one's end.
        busy: seconds that each rank worked.
        orders: of each rank, (kind, micro-batch) of what it did, in order; those in which it has no sample are left out.
    """

    step_s: float
    busy: dict[int, float]
    orders: dict[int, tuple[tuple[Kind, int], ...]]

    @property
    def idle(self) -> float:
        """Share of all ranks' time in which they wait."""
        whole = self.step_s * len(self.busy)
        return 1 - sum(self.busy.values()) / whole if whole else 0.0

    def in_flight(self, rank: int) -> int:
        """The most micro-batches that a rank holds, between their forward and the last of their backward."""
        held = most = 0
        last = WEIGHT if any(kind == WEIGHT for kind, _ in self.orders[rank]) else BACKWARD
        for kind, _ in self.orders[rank]:
            held += (kind == FORWARD) - (kind == last)
            most = max(most, held)
        return most


def share_of(kind: Kind, table: Schedule) -> float:
    """Of forward and backward together, what a slot takes."""
    if kind == FORWARD:
        return FORWARD_SHARE
    return (1 - FORWARD_SHARE) / (2 if table.has_weight_slots else 1)


def table_for(name: str, stages: int, micro_batches: int) -> tuple[Schedule, bool]:
    """A table by name, and whether ranks keep to its order: of `EAGER` and `DECOUPLED` they do what is ready, see `precedence`."""
    like = {EAGER: "1f1b", DECOUPLED: "zero-bubble"}
    return schedule(like.get(name, name), stages=stages, micro_batches=micro_batches), name not in like


def precedence(slot: Slot) -> tuple[int, Slot]:
    """Of what is ready at once the least is done: what others wait for most, first; gradients of weights last."""
    return _PRECEDENCE[slot.kind], slot


def simulate_ranks(
    layout: Layout,
    cuts_P: Cuts,
    cost_L: Numbers,
    name: str,
    *,
    send_L: Numbers,
    frequency_P: Sequence[float],
) -> StepTime:
    """The step of a table, with each rank's own samples.

    Args:
        layout: layers and ranks of stages.
        cuts_P: of each stage and column, where each rank's samples begin; see `anabranch.cluster.elastic.planner.cut_samples`.
        cost_L: seconds of forward and backward, for one sample.
        name: of the table, one of `TABLES`.
        send_L: seconds to send a layer's output, for one sample.
        frequency_P: of each stage's clock, over the usual one.
    """
    stages = layout.grid.stages
    table, keeps_order = table_for(name, len(stages), len(cuts_P[0]))
    second_P = [sum(cost_L[n] for n in part) / clock for part, clock in zip(layout.parts, frequency_P, strict=True)]
    send_P = [send_L[part[-1]] for part in layout.parts]
    # Who has what of whom: (stage, column) to (place there, place in the next stage, samples).
    overlaps = {
        (p, m): [(a, b, end - first) for a, b, first, end in recut(cuts_P[p][m], cuts_P[p + 1][m])]
        for p in range(len(stages) - 1)
        for m in range(table.num_micro_batches)
    }
    number: dict[tuple[Kind, int, int, int], int] = {}
    order: list[tuple[Slot, int, int]] = []
    # Of what is ready at once the first in the list is done.
    by_clock = table.slots if keeps_order else sorted(table.slots, key=precedence)
    for slot in by_clock:
        cut = cuts_P[slot.stage][slot.micro_batch]
        for place in range(len(stages[slot.stage])):
            if cut[place] < cut[place + 1]:
                number[slot.kind, slot.micro_batch, slot.stage, place] = len(order)
                order.append((slot, place, cut[place + 1] - cut[place]))
    tasks = []
    for slot, place, samples in order:
        p, m, kind = slot.stage, slot.micro_batch, slot.kind
        after, delay = [], 0.0
        if kind == WEIGHT:
            after.append(number[BACKWARD, m, p, place])
        elif kind == FORWARD and p:
            found = [(a, n) for a, b, n in overlaps[p - 1, m] if b == place]
            after += [number[FORWARD, m, p - 1, a] for a, _ in found]
            delay = send_P[p - 1] * max(n for _, n in found)
        elif kind == BACKWARD:
            after.append(number[FORWARD, m, p, place])
            found = [(b, n) for a, b, n in overlaps[p, m] if a == place] if p < len(stages) - 1 else []
            after += [number[BACKWARD, m, p + 1, b] for b, _ in found]
            delay = send_P[p] * max((n for _, n in found), default=0)
        tasks.append(Task((p, place), share_of(kind, table) * second_P[p] * samples, tuple(after), delay))
    everyone = [(p, place) for p, ranks in enumerate(stages) for place in range(len(ranks))]
    done = run_tasks(tasks, in_order=everyone if keeps_order else ())
    busy = dict.fromkeys(layout.grid.ranks, 0.0)
    began: dict[int, list[tuple[float, float, int]]] = {rank: [] for rank in layout.grid.ranks}
    for number_of, ((slot, place, _), when) in enumerate(zip(order, done, strict=True)):
        rank = stages[slot.stage][place]
        busy[rank] += when.end_s - when.start_s
        began[rank].append((when.start_s, when.end_s, number_of))
    orders = {
        rank: tuple((order[n][0].kind, order[n][0].micro_batch) for _, _, n in sorted(times))
        for rank, times in began.items()
    }
    return StepTime(max((when.end_s for when in done), default=0.0), busy, orders)
