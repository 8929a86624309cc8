"""Pipeline schedules as tables: who works on which micro-batch when. One table type for all of them.

    table = schedule("gpipe", stages=4, micro_batches=8)
    table.num_clocks                  # 22 = 2 (M + K - 1)
    print(table)                      # a row per stage, a column per clock

A *chunk* is what a stage works through in one go: a contiguous part of the model. Chunk ``visit * K + stage`` of ``K * visits`` lies on
``stage``; with one visit a stage has one chunk. Clocks count in units of one piece of work each; how long it really takes says
`anabranch.cluster.simulation`.

    gpipe        all forward, then all backward in reverse (Huang et al., arXiv 1811.06965): M + K - 1 clocks each
    1f1b         backward as soon as it can: at most K micro-batches in flight (PipeDream-flush, arXiv 2006.09503)
    interleaved  1f1b over several visits of each stage (Megatron-LM, arXiv 2104.04473), here for any M
    zero-bubble  ZB-H1 (Qi et al., arXiv 2401.10241): gradients of weights are work of their own, which fills what would be idle
"""
# Shapes: K stages, M micro-batches, V visits, C = K V chunks

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any, Literal

from anabranch.errors import InputError

__all__ = ["BACKWARD", "FORWARD", "SCHEDULES", "WEIGHT", "Kind", "Schedule", "Slot", "schedule"]

Kind = Literal["forward", "backward", "weight"]
FORWARD: Kind = "forward"
BACKWARD: Kind = "backward"
WEIGHT: Kind = "weight"
_LETTERS = {FORWARD: "F", BACKWARD: "B", WEIGHT: "W"}
_MOST = 2**20


@dataclass(frozen=True, order=True)
class Slot:
    """One piece of work.

    Attributes:
        clock: when, from 0.
        stage: who.
        micro_batch: on what.
        kind: ``forward``; ``backward``, of which a schedule with ``weight`` slots leaves the gradients of weights to those.
        visit: which of the stage's chunks, from 0.
    """

    clock: int
    stage: int
    micro_batch: int
    kind: Kind
    visit: int = 0


# What a slot is about, without its clock: (stage, micro-batch, kind, visit).
_Work = tuple[int, int, Kind, int]


@dataclass(frozen=True)
class Schedule:
    """A table of slots, in order of clock and stage.

    Attributes:
        name: of the schedule.
        num_stages, num_micro_batches, num_visits: K, M, V.
        slots: all work.
    """

    name: str
    num_stages: int
    num_micro_batches: int
    num_visits: int
    slots: tuple[Slot, ...]

    @property
    def num_chunks(self) -> int:
        """C, of all stages."""
        return self.num_stages * self.num_visits

    @property
    def num_clocks(self) -> int:
        """Clocks from the first slot to the last."""
        return max(slot.clock for slot in self.slots) + 1

    @cached_property
    def has_weight_slots(self) -> bool:
        """Whether gradients of weights are work of their own."""
        return any(slot.kind == WEIGHT for slot in self.slots)

    def of_stage(self, stage: int) -> tuple[Slot, ...]:
        """What one stage does, in order."""
        return tuple(slot for slot in self.slots if slot.stage == stage)

    def chunk_of(self, slot: Slot) -> int:
        """The chunk that a slot works through."""
        return slot.visit * self.num_stages + slot.stage

    def needs(self, slot: Slot) -> tuple[_Work, ...]:
        """The work that must be done before a slot: (stage, micro-batch, kind, visit) of each."""
        return _needs((slot.stage, slot.micro_batch, slot.kind, slot.visit), self.num_stages, self.num_visits)

    @property
    def most_in_flight(self) -> int:
        """The most pairs of micro-batch and visit that one stage holds: forward is done, the last of its backward is not."""
        last = WEIGHT if self.has_weight_slots else BACKWARD
        most = 0
        for stage in range(self.num_stages):
            held = 0
            for slot in self.of_stage(stage):
                held += (slot.kind == FORWARD) - (slot.kind == last)
                most = max(most, held)
        return most

    @property
    def idle(self) -> float:
        """Share of clocks, over all stages, in which nothing is done: the bubble where all slots take equally long."""
        return 1 - len(self.slots) / (self.num_clocks * self.num_stages)

    def check(self) -> None:
        """Raise InputError unless every stage does everything once, one thing at a clock, after all that it needs."""
        kinds = (FORWARD, BACKWARD, WEIGHT) if self.has_weight_slots else (FORWARD, BACKWARD)
        wanted = {
            (stage, micro_batch, kind, visit)
            for stage in range(self.num_stages)
            for micro_batch in range(self.num_micro_batches)
            for kind in kinds
            for visit in range(self.num_visits)
        }
        work = [(slot.stage, slot.micro_batch, slot.kind, slot.visit) for slot in self.slots]
        found = Counter(work)
        for what, count in found.items():
            if count > 1:
                raise InputError(f"{_told(what)} is in the table {count} times")
            if what not in wanted:
                raise InputError(f"{_told(what)} is in the table, and there is no such work")
        if missing := wanted - set(work):
            raise InputError(f"{_told(min(missing))} is not in the table")
        busy = Counter((slot.stage, slot.clock) for slot in self.slots)
        if twice := [place for place, count in busy.items() if count > 1]:
            raise InputError(f"stage {twice[0][0]} does {busy[twice[0]]} things at clock {twice[0][1]}")
        clock_of = {what: slot.clock for what, slot in zip(work, self.slots, strict=True)}
        for what, clock in clock_of.items():
            for needed in _needs(what, self.num_stages, self.num_visits):
                if clock_of[needed] >= clock:
                    raise InputError(
                        f"{_told(what)} is at clock {clock}, and {_told(needed)}, which it needs, at {clock_of[needed]}"
                    )

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "name": self.name,
            "stages": self.num_stages,
            "micro_batches": self.num_micro_batches,
            "visits": self.num_visits,
            "clocks": self.num_clocks,
            "idle": self.idle,
            "in_flight": self.most_in_flight,
            "slots": [
                {
                    "clock": slot.clock,
                    "stage": slot.stage,
                    "micro_batch": slot.micro_batch,
                    "kind": slot.kind,
                    "visit": slot.visit,
                }
                for slot in self.slots
            ],
        }

    def __str__(self) -> str:
        width = len(str(self.num_micro_batches - 1)) + 1 + (self.num_visits > 1)
        rows = [[" " * width] * self.num_clocks for _ in range(self.num_stages)]
        for slot in self.slots:
            # The second visit of a stage has small letters, a third and later ones too.
            letter = _LETTERS[slot.kind] if slot.visit == 0 else _LETTERS[slot.kind].lower()
            mark = "'" * max(slot.visit - 1, 0)
            rows[slot.stage][slot.clock] = f"{letter}{slot.micro_batch}{mark}".ljust(width)
        return "\n".join(f"{stage}: {' '.join(row).rstrip()}" for stage, row in enumerate(rows))


def _needs(work: _Work, num_stages: int, num_visits: int) -> tuple[_Work, ...]:
    stage, micro_batch, kind, visit = work
    chunk, last = visit * num_stages + stage, num_stages * num_visits - 1

    def at(chunk: int, kind: Kind) -> _Work:
        return chunk % num_stages, micro_batch, kind, chunk // num_stages

    if kind == WEIGHT:
        return (at(chunk, BACKWARD),)
    if kind == FORWARD:
        return (at(chunk - 1, FORWARD),) if chunk else ()
    return (at(chunk, FORWARD), *([at(chunk + 1, BACKWARD)] if chunk < last else []))


def _told(work: _Work) -> str:
    stage, micro_batch, kind, visit = work
    return f"{kind} of micro-batch {micro_batch} at stage {stage}" + (f", visit {visit}," if visit else "")


def _gpipe(num_stages: int, num_micro_batches: int, num_visits: int) -> list[list[_Work]]:
    forward = range(num_micro_batches)
    return [
        [(stage, m, FORWARD, 0) for m in forward] + [(stage, m, BACKWARD, 0) for m in reversed(forward)]
        for stage in range(num_stages)
    ]


def _interleaved(num_stages: int, num_micro_batches: int, num_visits: int) -> list[list[_Work]]:
    """Megatron-LM's order, with as much more warm-up as it takes where K does not go into M. With one visit it is 1F1B."""
    for more in range(num_micro_batches * num_visits + 1):
        orders = _interleaved_after(more, num_stages, num_micro_batches, num_visits)
        try:
            _clocked(orders, num_stages, num_visits)
        except InputError:
            continue
        return orders
    raise AssertionError("all forward before all backward always goes on")


def _interleaved_after(more: int, num_stages: int, num_micro_batches: int, num_visits: int) -> list[list[_Work]]:
    # Groups of K micro-batches go through all visits before the next group comes; the last group may be smaller.
    groups = [
        range(start, min(start + num_stages, num_micro_batches)) for start in range(0, num_micro_batches, num_stages)
    ]
    forward = [(m, visit) for group in groups for visit in range(num_visits) for m in group]
    backward = [(m, visit) for group in groups for visit in reversed(range(num_visits)) for m in group]
    orders = []
    for stage in range(num_stages):
        ahead = num_stages - stage - 1
        warm_up = ahead if num_visits == 1 else 2 * ahead + (num_visits - 1) * num_stages
        warm_up = min(warm_up + more, len(forward))
        order: list[_Work] = [(stage, m, FORWARD, visit) for m, visit in forward[:warm_up]]
        for (m, visit), (of, back) in zip(forward[warm_up:], backward, strict=False):
            order += [(stage, m, FORWARD, visit), (stage, of, BACKWARD, back)]
        order += [(stage, of, BACKWARD, back) for of, back in backward[len(forward) - warm_up :]]
        orders.append(order)
    return orders


def _zero_bubble(num_stages: int, num_micro_batches: int, num_visits: int) -> list[list[_Work]]:
    """ZB-H1: 1F1B whose gradients of weights come ``stage`` micro-batches later, where that stage would be idle."""
    orders = []
    for stage in range(num_stages):
        forward = iter(range(num_micro_batches))
        order: list[_Work] = [(stage, m, FORWARD, 0) for m in islice(forward, num_stages - stage)]
        for m in range(num_micro_batches):
            order.append((stage, m, BACKWARD, 0))
            if m >= stage:
                order.append((stage, m - stage, WEIGHT, 0))
            order += [(stage, following, FORWARD, 0) for following in [next(forward, None)] if following is not None]
        order += [(stage, m, WEIGHT, 0) for m in range(max(num_micro_batches - stage, 0), num_micro_batches)]
        orders.append(order)
    return orders


def _clocked(orders: Sequence[Iterable[_Work]], num_stages: int, num_visits: int) -> list[Slot]:
    """Each stage's work in its order, as early as it can be done. Raises InputError for orders that wait for each other."""
    waiting = [list(reversed(list(order))) for order in orders]
    done: dict[_Work, int] = {}
    slots: list[Slot] = []
    clock = 0
    while any(waiting):
        ready = [
            order[-1]
            for order in waiting
            if order and all(done.get(needed, clock) < clock for needed in _needs(order[-1], num_stages, num_visits))
        ]
        if not ready:
            stuck = next(order[-1] for order in waiting if order)
            raise InputError(f"the orders of stages wait for each other: {_told(stuck)} never comes")
        for work in ready:
            waiting[work[0]].pop()
            done[work] = clock
            stage, micro_batch, kind, visit = work
            slots.append(Slot(clock, stage, micro_batch, kind, visit))
        clock += 1
    return slots


_Order = Callable[[int, int, int], list[list[_Work]]]
_ORDERS: dict[str, _Order] = {
    "gpipe": _gpipe,
    "1f1b": _interleaved,
    "interleaved": _interleaved,
    "zero-bubble": _zero_bubble,
}
SCHEDULES: tuple[str, ...] = tuple(_ORDERS)


def schedule(name: str, *, stages: int, micro_batches: int, visits: int | None = None) -> Schedule:
    """The table of a schedule, checked.

    Args:
        name: one of `SCHEDULES`.
        stages: K.
        micro_batches: M; any number, also fewer than there are stages.
        visits: V, chunks of each stage. Default: 2 of ``interleaved``, which needs at least 2; others have 1.

    Raises InputError for another name, for numbers below 1, and for visits that the schedule does not make.
    """
    if name not in _ORDERS:
        raise InputError(f"schedule is {name!r}; use one of {', '.join(SCHEDULES)}")
    for what, number in (("stages", stages), ("micro_batches", micro_batches), ("visits", visits)):
        if number is not None and (not isinstance(number, int) or number < 1):
            raise InputError(f"{what} is {number!r}; use a whole number of at least 1")
    if visits is None:
        visits = 2 if name == "interleaved" else 1
    if (name == "interleaved") != (visits > 1):
        wanted = "at least 2 visits" if name == "interleaved" else "1 visit; interleaved makes more"
        raise InputError(f"visits is {visits}, and {name} makes {wanted}")
    if stages * micro_batches * visits > _MOST:
        raise InputError(
            f"a table of {stages} stages, {micro_batches} micro-batches and {visits} visits is too large to look at"
        )
    slots = _clocked(_ORDERS[name](stages, micro_batches, visits), stages, visits)
    made = Schedule(name, stages, micro_batches, visits, tuple(sorted(slots)))
    made.check()
    return made
