"""Discrete-event execution of a schedule: what a device does when nano-operations share it, and a picture of it.

Each resource has a stream that runs its nano-operations in the schedule's order, layer after layer. The first of a stream starts when all
that it waits for is done and its share fits beside what runs; the schedule's order decides between streams, and nothing overtakes one
that is ready and only waits for its share. A nano-operation at share R takes D / P(R) (`ShareTable`).
"""

from dataclasses import dataclass
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

from anabranch.errors import InputError
from anabranch.files import atomic_write_text
from anabranch.serving.planning.cost import RESOURCES, Resource
from anabranch.serving.planning.graph import NanoGraph
from anabranch.serving.planning.interference import ShareTable

# Of sums of shares, which are tenths in floating point.
SLACK = 1e-9

# Simulated until a schedule is taken to be steady.
LAYERS = 6

# Of them are not counted.
WARM = 2


@dataclass(frozen=True)
class Schedule:
    """An order of a layer's nano-operations (their numbers) and their shares; without shares nothing slows anything (stage I)."""

    graph: NanoGraph
    order: tuple[int, ...]
    shares: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        if sorted(self.order) != list(range(len(self.graph.ops))):
            raise InputError(f"order is {self.order}; it must have each of {len(self.graph.ops)} nano-operations once")
        place = {number: at for at, number in enumerate(self.order)}
        for number, others in enumerate(self.graph.before):
            late = [other for other in others if place[other] > place[number]]
            if late:
                raise InputError(
                    f"{self.graph.ops[number].name} stands before {self.graph.ops[late[0]].name}, which it waits for"
                )
        if self.shares is not None:
            wrong = [share for share in self.shares if not 0 < share <= 1]
            if len(self.shares) != len(self.order) or wrong:
                raise InputError(
                    f"shares are {self.shares}; there must be one above 0 and at most 1 for each nano-operation"
                )


@dataclass(frozen=True)
class Span:
    """Nano-operation ``number`` of a layer ran from ``start_s`` to ``end_s``."""

    number: int
    layer: int
    start_s: float
    end_s: float


@dataclass(frozen=True)
class Timeline:
    """What happened, in the order of starts."""

    schedule: Schedule
    spans: tuple[Span, ...]
    num_layers: int

    @property
    def makespan_s(self) -> float:
        """Until the last is done."""
        return max((span.end_s for span in self.spans), default=0.0)

    @cached_property
    def layer_ends(self) -> list[float]:
        """When the last nano-operation of each layer is done."""
        ends = [0.0] * self.num_layers
        for span in self.spans:
            ends[span.layer] = max(ends[span.layer], span.end_s)
        return ends

    @property
    def period_s(self) -> float:
        """Seconds of a layer in steady state: the mean over the layers after the first `WARM`."""
        warm = min(WARM, self.num_layers - 1)
        start = self.layer_ends[warm - 1] if warm else 0.0
        return (self.layer_ends[-1] - start) / (self.num_layers - warm)

    def busy(self) -> dict[str, float]:
        """Share of the time that each resource works, at the speed it works: what an operation alone would have taken over what it took."""
        found = dict.fromkeys(RESOURCES, 0.0)
        for span in self.spans:
            op = self.schedule.graph.ops[span.number]
            found[op.resource] += op.duration_s
        return {name: seconds / self.makespan_s if self.spans else 0.0 for name, seconds in found.items()}


def simulate(
    schedule: Schedule, table: ShareTable | None = None, *, num_layers: int = 1, is_elastic: bool = True
) -> Timeline:
    """Run ``num_layers`` layers after each other. ``table`` is needed where the schedule has shares.

    Raises InputError if it is missing.
    """
    if schedule.shares is not None and table is None:
        raise InputError("a schedule with shares needs a share table")
    run = _Run(schedule, table, num_layers, is_elastic and schedule.shares is not None)
    return Timeline(schedule, tuple(run.spans()), num_layers)


class _Run:
    """The event loop. A job is layer * n + number; streams hold jobs in the order of the schedule."""

    def __init__(self, schedule: Schedule, table: ShareTable | None, num_layers: int, is_elastic: bool) -> None:
        graph, order, self.count = schedule.graph, schedule.order, len(schedule.order)
        self.resources = [op.resource for op in graph.ops]
        self.shares = schedule.shares or (0.0,) * self.count
        self.seconds = [
            op.duration_s / (table.speed(op.resource, share) if share and table is not None else 1.0)
            for op, share in zip(graph.ops, self.shares, strict=True)
        ]
        if is_elastic:
            self.seconds = [
                op.duration_s if op.resource == "compute" else seconds
                for op, seconds in zip(graph.ops, self.seconds, strict=True)
            ]
        self.is_elastic = is_elastic
        waiting, self.followers = dependences(graph, num_layers)
        self.waiting = list(waiting)
        self.streams = {
            name: [
                layer * self.count + number
                for layer in range(num_layers)
                for number in order
                if self.resources[number] == name
            ]
            for name in RESOURCES
        }
        place = {number: at for at, number in enumerate(order)}
        self.rank = [job // self.count * self.count + place[job % self.count] for job in range(self.count * num_layers)]
        self.heads = dict.fromkeys(RESOURCES, 0)
        self.running: dict[Resource, int] = {}
        self.begun: dict[int, float] = {}
        # Of a product: if nothing changes.
        self.ends: dict[int, float] = {}
        self.now, self.used = 0.0, 0.0
        # Share of what runs and is no product.
        self.others = 0.0

    def spans(self) -> list[Span]:
        """Run to the end."""
        while True:
            before = self.others
            self._start()
            if not self.running:
                break
            self._adjust(before)
            self.now = min([self.ends[job] for job in self.running.values()])
            before = self.others
            self._finish()
            self._adjust(before)
        return [
            Span(job % self.count, job // self.count, start, self.ends[job])
            for job, start in sorted(self.begun.items(), key=lambda item: (item[1], self.rank[item[0]]))
        ]

    def _start(self) -> None:
        ready = []
        for name, jobs in self.streams.items():
            head = self.heads[name]
            if name not in self.running and head < len(jobs) and not self.waiting[jobs[head]]:
                ready.append((self.rank[jobs[head]], jobs[head], name))
        if len(ready) > 1:
            ready.sort()
        for _, job, name in ready:
            share = self.shares[job % self.count]
            if self.used + share > 1 + SLACK:
                # Nothing overtakes it.
                break
            self.used += share
            self.heads[name] += 1
            self.running[name] = job
            self.begun[job] = self.now
            seconds = self.seconds[job % self.count]
            if name != "compute":
                self.others += share
            elif self.is_elastic:
                seconds /= 1 - self.others
            self.ends[job] = self.now + seconds

    def _adjust(self, before: float) -> None:
        """The share of what is no product was ``before``: what is left of a product goes on at another speed."""
        job = self.running.get("compute")
        if job is None or not self.is_elastic or before == self.others:
            return
        if self.begun[job] < self.now:
            self.ends[job] = self.now + (self.ends[job] - self.now) * (1 - before) / (1 - self.others)
        else:
            self.ends[job] = self.now + self.seconds[job % self.count] / (1 - self.others)

    def _finish(self) -> None:
        until = self.now * (1 + 1e-12)
        for name in [name for name, job in self.running.items() if self.ends[job] <= until]:
            job = self.running.pop(name)
            self.used -= self.shares[job % self.count]
            if name != "compute":
                self.others -= self.shares[job % self.count]
            for follower in self.followers[job]:
                self.waiting[follower] -= 1
        # So that tenths do not add up to what is not there.
        if len(self.running) <= ("compute" in self.running):
            self.others = 0.0
            self.used = self.shares[self.running["compute"] % self.count] if self.running else 0.0


def dependences(graph: NanoGraph, num_layers: int) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...]]:
    """How many jobs each job waits for, and who waits for it; worked out once for a graph."""
    known: dict[int, Any] = graph.known
    if num_layers in known:
        return known[num_layers]
    count = len(graph.ops)
    waiting = [0] * (count * num_layers)
    followers: list[list[int]] = [[] for _ in waiting]
    for layer in range(num_layers):
        for number in range(count):
            job = layer * count + number
            earlier = [layer * count + other for other in graph.before[number]]
            if layer:
                earlier += [(layer - 1) * count + other for other in graph.before_next[number]]
            waiting[job] = len(earlier)
            for other in earlier:
                followers[other].append(job)
    return known.setdefault(num_layers, (tuple(waiting), tuple(map(tuple, followers))))


def violations(timeline: Timeline) -> list[str]:
    """What breaks a rule: one resource twice at a time, more than the whole device shared out, a start before what it waits for."""
    graph, shares = timeline.schedule.graph, timeline.schedule.shares
    end = {(span.layer, span.number): span.end_s for span in timeline.spans}
    tiny = 1e-9 * max(timeline.makespan_s, 1e-30)
    found = []
    for span in timeline.spans:
        earlier = [(span.layer, other) for other in graph.before[span.number]]
        if span.layer:
            earlier += [(span.layer - 1, other) for other in graph.before_next[span.number]]
        name = f"{graph.ops[span.number].name} of layer {span.layer}"
        found += [
            f"{name} starts before {graph.ops[key[1]].name} is done"
            for key in earlier
            if end[key] > span.start_s + tiny
        ]
        beside = [
            other
            for other in timeline.spans
            if other.start_s <= span.start_s + tiny and other.end_s > span.start_s + tiny
        ]
        same = [other for other in beside if graph.ops[other.number].resource == graph.ops[span.number].resource]
        if len(same) > 1:
            found.append(f"{name} shares its resource with another")
        if shares is not None:
            total = sum(shares[other.number] for other in beside)
            if total > 1 + 1e-6:
                found.append(f"{total:.2f} of the device is shared out when {name} starts")
    if len(end) != len(graph.ops) * timeline.num_layers:
        found.append(f"{len(end)} of {len(graph.ops) * timeline.num_layers} nano-operations ran")
    return found


_COLOURS = {"compute": "#0072b2", "memory": "#d55e00", "network": "#009e73"}


def gantt(timeline: Timeline, *, width: int = 1100, row: int = 46) -> str:
    """The timeline as an SVG: a row for each resource, bars as high as their share."""
    graph, shares = timeline.schedule.graph, timeline.schedule.shares
    rows = [name for name in RESOURCES if any(op.resource == name for op in graph.ops)]
    left, top = 80, 28
    scale = (width - left - 10) / max(timeline.makespan_s, 1e-30)
    height = top + row * len(rows) + 24
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="16">{timeline.num_layers} layers in {timeline.makespan_s * 1e3:.3f} ms</text>',
    ]
    for at, name in enumerate(rows):
        parts.append(f'<text x="8" y="{top + row * at + row / 2:.1f}">{name}</text>')
    for span in timeline.spans:
        op = graph.ops[span.number]
        share = 1.0 if shares is None else shares[span.number]
        if op.resource == "compute":
            share = min(op.duration_s / (span.end_s - span.start_s), 1.0) if span.end_s > span.start_s else 1.0
        high = (row - 6) * share
        base = top + row * (rows.index(op.resource) + 1) - 4
        start, long = left + span.start_s * scale, (span.end_s - span.start_s) * scale
        label = f"{op.name} [{op.start}, {op.end}) layer {span.layer}, share {share:.1f}, {(span.end_s - span.start_s) * 1e6:.0f} us"
        parts.append(
            f'<rect x="{start:.2f}" y="{base - high:.2f}" width="{max(long, 0.3):.2f}" height="{high:.2f}" '
            f'fill="{_COLOURS[op.resource]}" fill-opacity="{0.55 if span.layer % 2 else 0.85}" stroke="white" stroke-width="0.6">'
            f"<title>{escape(label)}</title></rect>"
        )
        if long > 7 * len(op.name):
            parts.append(f'<text x="{start + 3:.2f}" y="{base - 4:.2f}" fill="white">{escape(op.name)}</text>')
    return "\n".join([*parts, "</svg>", ""])


def save_gantt(timeline: Timeline, path: str | Path) -> None:
    """Write `gantt`, all or nothing."""
    atomic_write_text(path, gantt(timeline))
