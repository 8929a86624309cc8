"""How long a pipeline schedule takes: the table of `anabranch.cluster.schedules` with durations, sends and recomputation.

    table = schedule("gpipe", stages=4, micro_batches=8)
    simulate(table, Durations.even(4, forward_s=1e-3)).step_s

A stage does its slots in the table's order and waits for what it needs; sends go over one link for each direction of each pair of stages,
one message at a time, while stages work on.
"""
# Shapes: C chunks, K stages

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from anabranch.cluster.events import Task, run_tasks
from anabranch.cluster.schedules import BACKWARD, FORWARD, WEIGHT, Kind, Schedule, Slot
from anabranch.errors import InputError

__all__ = ["Bar", "Durations", "Timeline", "is_recomputed", "simulate"]


@dataclass(frozen=True, kw_only=True)
class Durations:
    """Seconds of one micro-batch in each chunk, and of what goes between chunks.

    Attributes:
        forward_C: of a chunk's forward.
        backward_C: of its whole backward, without recomputation.
        weight_C: what part of ``backward_C`` goes into gradients of weights, where the schedule has slots for these. Default: half.
        send_C: of the output of a chunk to the next, and of the gradient back; the last one's is not sent. Default: nothing.
        latency_s: of every message, on top.
        recomputes: whether backward does the forward again, and for how many of the micro-batches, see `GPipe`: ``always``,
            ``except_last``, ``never``.
    """

    forward_C: tuple[float, ...]
    backward_C: tuple[float, ...]
    weight_C: tuple[float, ...] | None = None
    send_C: tuple[float, ...] | None = None
    latency_s: float = 0.0
    recomputes: str = "never"

    @classmethod
    def even(cls, chunks: int, *, forward_s: float, backward_s: float | None = None, **others: Any) -> Self:
        """All chunks alike; backward takes twice the forward unless it is given."""
        back = 2 * forward_s if backward_s is None else backward_s
        return cls(forward_C=(forward_s,) * chunks, backward_C=(back,) * chunks, **others)

    def replace(self, **values: Any) -> Self:
        """The same with other values."""
        return replace(self, **values)


@dataclass(frozen=True)
class Bar:
    """What a stage did from when to when; ``is_again`` is the forward that is done again before a backward."""

    slot: Slot
    start_s: float
    end_s: float
    is_again: bool = False


@dataclass(frozen=True)
class Timeline:
    """A schedule in time.

    Attributes:
        schedule: the table.
        bars: one of each slot, in its order, and one before it where a forward is done again.
        sends: (from stage, to stage, start, end) of each message.
    """

    schedule: Schedule
    bars: tuple[Bar, ...]
    sends: tuple[tuple[int, int, float, float], ...]

    @property
    def step_s(self) -> float:
        """From the first slot's start to the last one's end."""
        return max(bar.end_s for bar in self.bars)

    @property
    def busy_K(self) -> tuple[float, ...]:
        """Seconds that each stage worked."""
        busy = [0.0] * self.schedule.num_stages
        for bar in self.bars:
            busy[bar.slot.stage] += bar.end_s - bar.start_s
        return tuple(busy)

    @property
    def idle(self) -> float:
        """Share of all stages' time in which they wait: the bubble."""
        whole = self.step_s * self.schedule.num_stages
        return 1 - sum(self.busy_K) / whole if whole else 0.0

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "step_s": self.step_s,
            "idle": self.idle,
            "busy_s": list(self.busy_K),
            "bars": [
                {
                    "stage": bar.slot.stage,
                    "micro_batch": bar.slot.micro_batch,
                    "kind": "again" if bar.is_again else bar.slot.kind,
                    "visit": bar.slot.visit,
                    "start_s": bar.start_s,
                    "end_s": bar.end_s,
                }
                for bar in self.bars
            ],
        }


def simulate(schedule: Schedule, durations: Durations) -> Timeline:
    """The schedule in time. Raises InputError for another number of durations than chunks, and for ones that are no durations."""
    _check(schedule, durations)
    number: dict[tuple[Kind, int, int], int] = {}
    tasks: list[Task] = []
    slots: list[tuple[Slot, int, bool]] = []
    # A stage's work in its order; what it needs is filled in below, when all work and all sends have their numbers.
    for slot in schedule.slots:
        chunk, stage = schedule.chunk_of(slot), ("stage", slot.stage)
        if slot.kind == BACKWARD and is_recomputed(durations.recomputes, slot.micro_batch, schedule.num_micro_batches):
            # It needs no gradient, so it comes before that does.
            slots.append((slot, len(tasks), True))
            tasks.append(Task(stage, durations.forward_C[chunk]))
        number[slot.kind, slot.micro_batch, chunk] = len(tasks)
        slots.append((slot, len(tasks), False))
        tasks.append(Task(stage, _seconds(schedule, durations, slot)))
    links: list[tuple[int, int, int]] = []
    for slot, place, is_again in slots:
        after = []
        chunk = schedule.chunk_of(slot)
        for stage_of, micro_batch, kind, visit in () if is_again else schedule.needs(slot):
            other = visit * schedule.num_stages + stage_of
            needed = number[kind, micro_batch, other]
            if stage_of != slot.stage:
                # An output, or the gradient of one.
                taken = 0.0 if durations.send_C is None else durations.send_C[min(chunk, other)]
                needed, source = len(tasks), needed
                links.append((stage_of, slot.stage, needed))
                tasks.append(Task(("link", stage_of, slot.stage), taken, (source,), durations.latency_s))
            after.append(needed)
        tasks[place] = replace(tasks[place], after=tuple(after))
    done = run_tasks(tasks, in_order=[("stage", stage) for stage in range(schedule.num_stages)])
    return Timeline(
        schedule,
        tuple(Bar(slot, done[place].start_s, done[place].end_s, is_again) for slot, place, is_again in slots),
        tuple((source, target, done[task].start_s, done[task].end_s) for source, target, task in links),
    )


def is_recomputed(recomputes: str, micro_batch: int, num_micro_batches: int) -> bool:
    """Whether backward does the forward of a micro-batch again."""
    return recomputes == "always" or (recomputes == "except_last" and micro_batch < num_micro_batches - 1)


def _seconds(schedule: Schedule, durations: Durations, slot: Slot) -> float:
    chunk = schedule.chunk_of(slot)
    forward, backward = durations.forward_C[chunk], durations.backward_C[chunk]
    if slot.kind == FORWARD:
        return forward
    weight = 0.0
    if schedule.has_weight_slots:
        weight = backward / 2 if durations.weight_C is None else durations.weight_C[chunk]
    if slot.kind == WEIGHT:
        return weight
    return backward - weight


def _check(schedule: Schedule, durations: Durations) -> None:
    for name in ("forward_C", "backward_C", "weight_C", "send_C"):
        values: Sequence[float] | None = getattr(durations, name)
        if values is not None and len(values) != schedule.num_chunks:
            raise InputError(f"{name} has {len(values)} durations, and the schedule has {schedule.num_chunks} chunks")
    if durations.recomputes not in ("always", "except_last", "never"):
        raise InputError(f"recomputes is {durations.recomputes!r}; use always, except_last or never")
    if durations.weight_C is not None and schedule.has_weight_slots:
        for chunk, (weight, backward) in enumerate(zip(durations.weight_C, durations.backward_C, strict=True)):
            if weight > backward:
                raise InputError(f"weight_C of chunk {chunk} is {weight}, more than its whole backward, {backward}")
