"""`StepPlan`: how a step of any size is cut, in which order its parts start, and what share of the device each gets.

A pipeline is searched for one batch; steps have other sizes and other mixtures of decodes and prompts. Cuts keep their place as a
share of the operation's range, and a part of a step takes order and share from the part of the pipeline that covers its middle.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from anabranch.serving.planning.cost import Resource
from anabranch.serving.planning.graph import NanoGraph
from anabranch.serving.planning.order import list_order, order_by
from anabranch.serving.planning.search import Pipeline
from anabranch.serving.planning.simulate import Schedule

# What a runner runs of a layer, and what bounds it where no pipeline says so.
OPERATIONS: dict[str, Resource] = {
    "kqv": "compute",
    "decode_attention": "memory",
    "prefill_attention": "compute",
    "o": "compute",
    "up_gate": "compute",
    "down": "compute",
}


@dataclass(frozen=True)
class Part:
    """A part of an operation, as shares of its range: where it ends, its place in the order, its share of the device."""

    end: float
    rank: int
    share: float


@dataclass(frozen=True)
class StepPlan:
    """Cuts, order and shares of steps.

    Attributes:
        cuts: for each operation the shares of its range at which it is cut.
        resources: what bounds each operation; decides which of them run side by side.
        parts: of each operation, in the order of their ranges; empty where list scheduling orders and nothing is shared out.
    """

    cuts: Mapping[str, Sequence[float]]
    resources: Mapping[str, Resource]
    parts: Mapping[str, tuple[Part, ...]]

    @classmethod
    def of_cuts(cls, cuts: Mapping[str, Sequence[float]] | None = None) -> "StepPlan":
        """These cuts (None: halves of every operation), ordered by list scheduling."""
        return cls(dict.fromkeys(OPERATIONS, (0.5,)) if cuts is None else dict(cuts), OPERATIONS, {})

    @classmethod
    def of(cls, pipeline: Pipeline) -> "StepPlan":
        """What was searched, less the collectives, which one device does not have."""
        schedule = pipeline.schedule
        graph = schedule.graph
        spans = {each.name: (each.start, each.end) for each in graph.layer.operations if each.name in OPERATIONS}
        rank = {number: place for place, number in enumerate(schedule.order)}
        shares = schedule.shares or (1.0,) * len(graph.ops)
        resources, parts = dict(OPERATIONS), {}
        for name, (start, end) in spans.items():
            numbers = [number for number, op in enumerate(graph.ops) if op.op == name]
            resources[name] = graph.ops[numbers[0]].resource
            parts[name] = tuple(
                Part((graph.ops[number].end - start) / (end - start), rank[number], shares[number])
                for number in numbers
            )
        return cls({name: tuple(part.end for part in of[:-1]) for name, of in parts.items()}, resources, parts)

    def schedule(self, graph: NanoGraph) -> Schedule:
        """Order and shares for the nano-operations of a step."""
        if not self.parts:
            return Schedule(graph, list_order(graph))
        spans = {each.name: (each.start, each.end) for each in graph.layer.operations}
        found = []
        for op in graph.ops:
            start, end = spans[op.op]
            middle = ((op.start + op.end) / 2 - start) / (end - start)
            known = self.parts.get(op.op)
            # An operation that the searched batch did not have, such as decodes for a batch of prompts, goes as early as it may.
            first = Part(1.0, -1, 1.0)
            found.append(next((part for part in known if middle <= part.end), known[-1]) if known else first)
        order = order_by(graph, [part.rank for part in found])
        return Schedule(graph, order, tuple(part.share for part in found))
