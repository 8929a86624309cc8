"""Operations of one layer, nano-operations, and which of them wait for which.

An operation o over tokens [0, B) becomes nano-operations o_1 ... o_n over consecutive ranges. o_i comes before p_j exactly if o comes
before p in the layer and their ranges meet. Layers follow each other: the first operation of the next layer waits for the last one of
this layer in the same way. No torch, no numpy.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from anabranch.errors import ConfigError, InputError
from anabranch.serving.planning.cost import (
    TILE,
    Resource,
    Workload,
    op_cost,
    span_of,
)
from anabranch.serving.planning.hardware import Hardware
from anabranch.serving.planning.shape import ModelShape

# Of the collectives: two all-gathers and an all-reduce, or two all-reduces.
Form = Literal["gather", "reduce"]
Cuts = Mapping[str, Sequence[int]]


@dataclass(frozen=True)
class Operation:
    """One operation of a layer.

    Attributes:
        name: unique in the layer.
        resource: what it is bound by; two of one resource do not run at the same time.
        start, end: tokens of the batch it is about.
        after: names of operations it waits for.
        duration: (number of tokens) -> seconds, alone on the device.
    """

    name: str
    resource: Resource
    start: int
    end: int
    after: tuple[str, ...]
    duration: Callable[[int], float] = field(compare=False, repr=False)


@dataclass(frozen=True)
class NanoOp:
    """A part of an operation: tokens ``start`` to ``end``. ``index`` counts the parts; ``duration_s`` is alone on the device."""

    op: str
    index: int
    start: int
    end: int
    resource: Resource
    duration_s: float

    @property
    def name(self) -> str:
        """``kqv.0``."""
        return f"{self.op}.{self.index}"


@dataclass(frozen=True)
class LayerGraph:
    """Operations of a layer in an order that keeps ``after``. ``first`` waits for ``last`` of the layer before."""

    operations: tuple[Operation, ...]
    batch: int
    first: tuple[str, ...]
    last: tuple[str, ...]

    def __post_init__(self) -> None:
        seen: set[str] = set()
        for operation in self.operations:
            late = [name for name in operation.after if name not in seen]
            if late:
                raise InputError(f"operation {operation.name} waits for {late[0]!r}, which does not come before it")
            if operation.name in seen:
                raise InputError(f"two operations are named {operation.name!r}")
            seen.add(operation.name)

    def split(self, cuts: Cuts | None = None) -> "NanoGraph":
        """Nano-operations. ``cuts``: for each operation the tokens at which it is cut; cuts outside its range do nothing.

        Raises InputError for an operation that is not there.
        """
        cuts = cuts or {}
        names = {operation.name for operation in self.operations}
        unknown = [name for name in cuts if name not in names]
        if unknown:
            raise InputError(f"there is no operation {unknown[0]!r} to cut; known: {', '.join(sorted(names))}")
        made = []
        for operation in self.operations:
            ranges = split_range(operation.start, operation.end, cuts.get(operation.name, ()))
            for index, (start, end) in enumerate(ranges):
                seconds = operation.duration(end - start)
                made.append(NanoOp(operation.name, index, start, end, operation.resource, seconds))
        return NanoGraph(self, tuple(made))


@dataclass(frozen=True)
class NanoGraph:
    """Nano-operations of a layer, and by number what each waits for."""

    layer: LayerGraph
    ops: tuple[NanoOp, ...]
    known: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)  # what the simulator works out once

    @cached_property
    def before(self) -> tuple[tuple[int, ...], ...]:
        """For each nano-operation, those of the same layer that it waits for."""
        by_name = self._by_name()
        after = {operation.name: operation.after for operation in self.layer.operations}
        return tuple(
            tuple(other for name in after[op.op] for other in by_name.get(name, ()) if meet(op, self.ops[other]))
            for op in self.ops
        )

    @cached_property
    def before_next(self) -> tuple[tuple[int, ...], ...]:
        """For each nano-operation, those of the layer before that it waits for."""
        by_name = self._by_name()
        ends = [other for name in self.layer.last for other in by_name.get(name, ())]
        return tuple(
            tuple(other for other in ends if meet(op, self.ops[other])) if op.op in self.layer.first else ()
            for op in self.ops
        )

    @cached_property
    def totals(self) -> dict[str, float]:
        """Seconds of each resource, every nano-operation at full speed."""
        found: dict[str, float] = {}
        for op in self.ops:
            found[op.resource] = found.get(op.resource, 0.0) + op.duration_s
        return found

    @property
    def sequential_s(self) -> float:
        """One after the other."""
        return sum(op.duration_s for op in self.ops)

    @property
    def bound_s(self) -> float:
        """No schedule takes less a layer: the busiest resource."""
        return max(self.totals.values(), default=0.0)

    @property
    def cuts(self) -> dict[str, list[int]]:
        """What `LayerGraph.split` took."""
        found: dict[str, list[int]] = {}
        for op in self.ops:
            if op.index:
                found.setdefault(op.op, []).append(op.start)
        return found

    def _by_name(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for number, op in enumerate(self.ops):
            found.setdefault(op.op, []).append(number)
        return found


def split_range(start: int, end: int, cuts: Sequence[int]) -> list[tuple[int, int]]:
    """[start, end) cut at ``cuts``; empty ranges give nothing."""
    inside = sorted({cut for cut in cuts if start < cut < end})
    edges = [start, *inside, end]
    return [(low, high) for low, high in itertools.pairwise(edges) if high > low]


def even_cuts(batch: int, parts: int, tile: int = TILE) -> list[int]:
    """Where to cut [0, batch) into at most ``parts`` parts of whole tiles; a batch below two tiles is not cut."""
    tiles = batch // tile
    parts = max(min(parts, tiles), 1)
    return [tile * (tiles * number // parts) for number in range(1, parts)]


def meet(first: Any, second: Any) -> bool:
    """Whether two ranges share a token."""
    return max(first.start, second.start) < min(first.end, second.end)


def layer_graph(model: ModelShape, hardware: Hardware, workload: Workload, form: Form = "gather") -> LayerGraph:
    """The mean layer of a model on devices.

    With one device: KQV -> attention of decodes and of prompts -> O -> (gate ->) up and gate -> down. With several, ``gather`` puts
    all-gathers behind attention and O and an all-reduce behind down; ``reduce`` all-reduces behind O and down. Both move as much.
    """
    if form not in ("gather", "reduce"):
        raise ConfigError(f"form is {form!r}; it must be 'gather' or 'reduce'")
    attention = ("decode_attention", "prefill_attention")
    gate = ("gate",) if model.is_routed else ()
    order: list[tuple[str, tuple[str, ...]]] = [("kqv", ()), *((name, ("kqv",)) for name in attention)]
    is_split = hardware.num_devices > 1
    if is_split and form == "gather":
        order += [("ag_attention", attention), ("o", ("ag_attention",)), ("ag_o", ("o",))]
        last = "ag_o"
    else:
        order += [("o", attention)]
        last = "o"
        if is_split:
            order += [("ar_o", ("o",))]
            last = "ar_o"
    for name in (*gate, "up_gate", "down"):
        order.append((name, (last,)))
        last = name
    if is_split:
        order.append(("ar_down", (last,)))
        last = "ar_down"
    made: list[Operation] = []
    for name, after in order:
        start, end = span_of(name, workload)
        if end > start:
            there = tuple(other for other in after if other in {operation.name for operation in made})
            made.append(_operation(name, start, end, there, model, hardware, workload))
    return LayerGraph(tuple(made), workload.dense_batch, ("kqv",), (last,))


def _operation(
    name: str,
    start: int,
    end: int,
    after: tuple[str, ...],
    model: ModelShape,
    hardware: Hardware,
    workload: Workload,
) -> Operation:
    def duration(num_tokens: int) -> float:
        return op_cost(name, model, hardware, workload, num_tokens).duration_s / model.num_layers

    resource = op_cost(name, model, hardware, workload, end - start).resource
    return Operation(name, resource, start, end, after, duration)
