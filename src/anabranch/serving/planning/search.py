"""The two-stage search for a pipeline: how to cut a layer's operations, in which order to start the parts, what share each gets.

Stage I takes structures (form of the collectives, cuts in whole tiles) and orders them without interference (`order`). Stage II keeps
an order and chooses shares from {0.1 ... 1.0} for the shortest steady state under the share table. Then cuts are added where they
help, as long as they do. Everything is counted in evaluations, so the result does not depend on the machine's speed unless
``budget_s`` ends it early; it is never worse than running whole operations one after the other.
"""

import itertools
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from anabranch.errors import ConfigError, DataError, InputError
from anabranch.files import atomic_write_json, parse_json
from anabranch.serving.planning.cost import ATTENTION, TILE, Workload, estimate
from anabranch.serving.planning.graph import Cuts, Form, LayerGraph, NanoGraph, layer_graph
from anabranch.serving.planning.hardware import Hardware
from anabranch.serving.planning.interference import PAPER_TABLE, ShareTable
from anabranch.serving.planning.order import find_order, linear_orders, neighbours
from anabranch.serving.planning.shape import ModelShape
from anabranch.serving.planning.simulate import LAYERS, Schedule, Timeline, simulate

logger = logging.getLogger(__name__)

SCHEMA = 2
# Of a workload, in a pipeline's key.
LENGTHS = ("prompt", "output", "dense_batch")
LEVELS = tuple(tenth / 10 for tenth in range(1, 11))

# Structures of stage I that go on to stage II.
KEPT = 3

# Relative; less is none.
GAIN = 1e-6


@dataclass(frozen=True)
class Pipeline:
    """What a search found.

    Attributes:
        key: the model, the devices and the lengths it is for.
        hardware: profile of the devices.
        form: of the collectives.
        schedule: nano-operations, order, shares.
        period_s: of a layer in steady state, simulated.
        sequential_s: whole operations one after the other.
        split_s: the parts one after the other: what splitting alone costs.
        evaluations: simulations that it took.
        is_complete: whether the time sufficed.
    """

    key: dict[str, Any]
    hardware: Hardware
    form: Form
    schedule: Schedule
    period_s: float
    sequential_s: float
    split_s: float
    evaluations: int = 0
    is_complete: bool = True

    @property
    def speedup(self) -> float:
        """Over whole operations one after the other."""
        return self.sequential_s / self.period_s

    def timeline(self, table: ShareTable | None = None, num_layers: int = 3) -> Timeline:
        """Simulate it."""
        return simulate(self.schedule, table or PAPER_TABLE, num_layers=num_layers)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: cuts, order and shares by name."""
        ops = self.schedule.graph.ops
        shares = self.schedule.shares or (1.0,) * len(ops)
        return {
            "schema": SCHEMA,
            "key": self.key,
            "hardware": self.hardware.to_dict(),
            "form": self.form,
            "cuts": self.schedule.graph.cuts,
            "order": [ops[number].name for number in self.schedule.order],
            "shares": {op.name: share for op, share in zip(ops, shares, strict=True)},
            "period_s": self.period_s,
            "sequential_s": self.sequential_s,
            "split_s": self.split_s,
            "speedup": self.speedup,
            "evaluations": self.evaluations,
            "is_complete": self.is_complete,
        }

    def save(self, path: str | Path) -> None:
        """As JSON, all or nothing."""
        atomic_write_json(path, self.to_dict())


def key_of(model: ModelShape, hardware: Hardware, workload: Workload, table: ShareTable) -> dict[str, Any]:
    """What a pipeline depends on: it is searched again when any of this changes. Of what was measured the machine, not the figures."""
    numbers = {name: getattr(workload, name) for name in LENGTHS}
    made = {
        "model": {"name": model.name, "bytes": [model.weight_bytes, model.kv_bytes], **_widths(model)},
        "hardware": hardware.identity,
        "workload": numbers,
        "table": table.identity,
    }
    return json.loads(json.dumps(made))


def _widths(model: ModelShape) -> dict[str, Any]:
    layers = [[part.num_layers, part.hidden_dim, part.num_experts, part.top_k] for part in model.feed_forwards]
    return {"size": [model.dim, model.num_heads, model.num_kv_heads, model.head_dim], "layers": layers}


def load_pipeline(
    path: str | Path, model: ModelShape, hardware: Hardware, workload: Workload, table: ShareTable = PAPER_TABLE
) -> Pipeline | None:
    """A saved pipeline; None where there is none, or it is for another model, device or lengths.

    Raises DataError if the file is malformed.
    """
    if not Path(path).exists():
        return None
    values = _values(path)
    if values.get("schema") != SCHEMA or values.get("key") != key_of(model, hardware, workload, table):
        return None
    return _pipeline(values, path, model, hardware, workload)


def read_pipeline(path: str | Path, model: ModelShape) -> Pipeline:
    """A saved pipeline for a model of this shape, whatever the device, the lengths and the bytes of its weights that it was searched for.

    Raises DataError if the file is malformed, ConfigError if it is for a model of another shape.
    """
    values = _values(path)
    if values.get("schema") != SCHEMA:
        raise DataError(f"{path} is a pipeline of another version ({values.get('schema')!r}); search it again")
    try:
        saved, numbers = values["key"]["model"], values["key"]["workload"]
        theirs = {name: saved[name] for name in ("size", "layers")}
        hardware = Hardware.from_dict(values["hardware"])
        workload = Workload(**{name: numbers[name] for name in LENGTHS})
    except (KeyError, TypeError, ConfigError) as error:
        raise DataError(f"{path} is no pipeline ({error}); remove it to search again") from None
    if theirs != json.loads(json.dumps(_widths(model))):
        raise ConfigError(
            f"{path} is a pipeline for {saved.get('name')!r}, a model of another shape than {model.name!r}"
        )
    return _pipeline(values, path, model, hardware, workload)


def _values(path: str | Path) -> dict[str, Any]:
    try:
        values = parse_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is no pipeline ({error}); remove it to search again") from None
    if not isinstance(values, dict):
        raise DataError(f"{path} is no pipeline; remove it to search again")
    return values


def _pipeline(
    values: dict[str, Any], path: str | Path, model: ModelShape, hardware: Hardware, workload: Workload
) -> Pipeline:
    """What `Pipeline.to_dict` gave."""
    try:
        graph = layer_graph(model, hardware, workload, values["form"]).split(values["cuts"])
        number = {op.name: at for at, op in enumerate(graph.ops)}
        order = tuple(number[name] for name in values["order"])
        shares = tuple(values["shares"][op.name] for op in graph.ops)
        schedule = Schedule(graph, order, shares)
        numbers = [values[name] for name in ("period_s", "sequential_s", "split_s", "evaluations", "is_complete")]
    except (KeyError, TypeError, InputError, ConfigError) as error:
        raise DataError(f"{path} is no pipeline ({error}); remove it to search again") from None
    return Pipeline(values["key"], hardware, values["form"], schedule, *numbers)


class _Search:
    """Counts evaluations and looks at the clock."""

    def __init__(self, table: ShareTable, levels: Sequence[float], evaluations: int, budget_s: float) -> None:
        self.table, self.levels, self.left = table, tuple(levels), evaluations
        self.deadline = time.monotonic() + budget_s
        self.spent, self.is_late = 0, False

    @property
    def is_over(self) -> bool:
        """Evaluations or time are used up."""
        self.is_late = self.is_late or time.monotonic() > self.deadline
        return self.is_late or self.spent >= self.left

    def period(self, graph: NanoGraph, order: tuple[int, ...], shares: Sequence[float]) -> float:
        """Seconds of a layer in steady state."""
        self.spent += 1
        return simulate(Schedule(graph, order, tuple(shares)), self.table, num_layers=LAYERS).period_s


def search(
    model: ModelShape,
    hardware: Hardware,
    workload: Workload | None = None,
    *,
    table: ShareTable = PAPER_TABLE,
    evaluations: int = 20_000,
    budget_s: float = 60.0,
    overlap: Sequence[str] = ("memory", "network"),
) -> Pipeline:
    """The best pipeline found for a model on devices.

    Args:
        model: its shape.
        hardware: the devices.
        workload: lengths and batch.
        table: R -> P.
        evaluations: simulations of stage II to spend; the same number gives the same pipeline.
        budget_s: seconds after which the best so far is taken.
        overlap: resources that may run beside others; for ablations.

    Raises CapacityError if the weights do not fit.
    """
    workload = workload or Workload()
    found = estimate(model, hardware, workload)
    forms: tuple[Form, ...] = ("gather", "reduce") if hardware.num_devices > 1 else ("gather",)
    graphs = {form: layer_graph(model, hardware, workload, form) for form in forms}
    uncut = {form: graph.split() for form, graph in graphs.items()}
    form = min(forms, key=lambda form: uncut[form].sequential_s)
    key = key_of(model, hardware, workload, table)
    alone = Schedule(uncut[form], tuple(range(len(uncut[form].ops))), (1.0,) * len(uncut[form].ops))
    uncut_s = uncut[form].sequential_s
    sequential = Pipeline(key, hardware, form, alone, uncut_s, uncut_s, uncut_s)
    if workload.dense_batch < 2 * TILE or not overlap:
        return sequential
    if not found.pays:
        logger.warning(
            "T_R is %.2f: memory bounds %s on %s at %d tokens, so splitting batches gains nothing; asynchronous scheduling does",
            found.t_r,
            model.name,
            hardware.name,
            workload.dense_batch,
        )
    state = _Search(table, LEVELS, evaluations, budget_s)
    best: Pipeline | None = None
    for form, cuts in _structures(graphs, state):
        found_here = _staged(sequential, form, graphs[form], cuts, state, overlap, share_of_budget=0.12)
        best = found_here if best is None or found_here.period_s < best.period_s else best
    best = sequential if best is None else _grow(best, graphs, state, overlap)
    best = best if best.period_s < sequential.period_s * (1 - GAIN) else sequential
    return replace(best, evaluations=state.spent, is_complete=not state.is_late)


def _structures(graphs: dict[Form, LayerGraph], state: _Search) -> list[tuple[Form, Cuts]]:
    """Stage I: two parts of each operation, cut at every tile between a quarter and three quarters of the batch; the best few by period."""
    found: list[tuple[float, float, Form, Cuts]] = []
    for form, graph in graphs.items():
        for cut in range(TILE, graph.batch, TILE):
            if not graph.batch / 4 <= cut <= 3 * graph.batch / 4 and graph.batch >= 4 * TILE:
                continue
            if found and state.is_over:
                break
            cuts = {operation.name: [cut] for operation in graph.operations}
            nano = graph.split(cuts)
            _, period = find_order(nano, evaluations=30)
            found.append((period, nano.sequential_s, form, cuts))
    found.sort(key=lambda entry: entry[:3])
    return [(form, cuts) for _, _, form, cuts in found[:KEPT]]


def _staged(
    origin: Pipeline,
    form: Form,
    layer: LayerGraph,
    cuts: Cuts,
    state: _Search,
    overlap: Sequence[str],
    share_of_budget: float,
) -> Pipeline:
    """Both stages for one structure."""
    graph = layer.split(cuts)
    order, _ = find_order(graph, evaluations=60)
    limit = state.spent + int(share_of_budget * state.left)
    order, shares, period = find_shares(graph, order, state, overlap=overlap, limit=limit)
    schedule = Schedule(graph, order, shares)
    return replace(origin, form=form, schedule=schedule, period_s=period, split_s=graph.sequential_s)


def _grow(best: Pipeline, graphs: dict[Form, LayerGraph], state: _Search, overlap: Sequence[str]) -> Pipeline:
    """Add a cut to one operation, or take one away, as long as it helps."""
    is_better = True
    while is_better and not state.is_over:
        is_better = False
        for cuts in _recut(best.schedule.graph):
            if state.is_over:
                break
            found = _staged(best, best.form, graphs[best.form], cuts, state, overlap, share_of_budget=0.04)
            if found.period_s < best.period_s * (1 - GAIN):
                best, is_better = found, True
                break
    return best


def _recut(graph: NanoGraph) -> Iterator[Cuts]:
    """One cut more through the largest part of an operation, attention first (it is read once however it is cut); one cut less."""
    cuts = graph.cuts
    names = sorted({op.op for op in graph.ops}, key=lambda name: (name not in ATTENTION, name))
    for name in names:
        parts = [op for op in graph.ops if op.op == name]
        largest = max(parts, key=lambda op: (op.end - op.start, -op.start))
        middle = (largest.start + largest.end) // (2 * TILE) * TILE
        if largest.start < middle < largest.end:
            yield {**cuts, name: sorted([*cuts.get(name, []), middle])}
    for name in names:
        if cuts.get(name):
            yield {**cuts, name: cuts[name][1:]}


def find_shares(
    graph: NanoGraph,
    order: tuple[int, ...],
    state: _Search,
    *,
    overlap: Sequence[str] = ("memory", "network"),
    limit: int | None = None,
) -> tuple[tuple[int, ...], tuple[float, ...], float]:
    """Stage II: shares, and the order polished under them. Small graphs are tried out whole, others by coordinate descent.

    Returns order, shares and period.
    """
    limit = state.left if limit is None else min(limit, state.left)
    if len(state.levels) ** len(graph.ops) <= EXHAUSTIVE:
        return _all_shares(graph, state)
    best = _first_shares(graph, order, state, overlap)
    while state.spent < limit and not state.is_over:
        before = best[2]
        best = _descend(graph, *best, state, overlap, limit)
        best = _reorder(graph, *best, state, limit)
        if best[2] >= before * (1 - GAIN):
            break
    return best


# Assignments of shares that are tried one by one.
EXHAUSTIVE = 1500


def _all_shares(graph: NanoGraph, state: _Search) -> tuple[tuple[int, ...], tuple[float, ...], float]:
    """Every order with every assignment of shares."""
    best: tuple[float, tuple[int, ...], tuple[float, ...]] | None = None
    for order in linear_orders(graph):
        for shares in itertools.product(state.levels, repeat=len(graph.ops)):
            found = (state.period(graph, order, shares), order, shares)
            if best is None or found[0] < best[0] * (1 - 1e-12):
                best = found
    assert best is not None
    return best[1], best[2], best[0]


def _first_shares(
    graph: NanoGraph, order: tuple[int, ...], state: _Search, overlap: Sequence[str]
) -> tuple[tuple[int, ...], tuple[float, ...], float]:
    """The best assignment of one share to each of memory and network; those that may not overlap get the whole device.

    Products are promised the least level, and take what is left.
    """
    best: tuple[float, tuple[float, ...]] | None = None
    least = state.levels[0]
    for memory in state.levels if "memory" in overlap else (1.0,):
        for network in state.levels if "network" in overlap else (1.0,):
            if state.is_over and best is not None:
                break
            by = {"compute": least, "memory": memory, "network": network}
            shares = tuple(by[op.resource] for op in graph.ops)
            found = (state.period(graph, order, shares), shares)
            best = found if best is None or found < best else best
    assert best is not None
    return order, best[1], best[0]


def _descend(
    graph: NanoGraph,
    order: tuple[int, ...],
    shares: tuple[float, ...],
    period: float,
    state: _Search,
    overlap: Sequence[str],
    limit: int,
) -> tuple[tuple[int, ...], tuple[float, ...], float]:
    """One pass over the nano-operations, each to its best share while the others keep theirs."""
    for number in order:
        resource = graph.ops[number].resource
        if resource != "compute" and resource not in overlap:
            continue
        for level in state.levels:
            if level == shares[number]:
                continue
            if state.spent >= limit or state.is_over:
                return order, shares, period
            tried = (*shares[:number], level, *shares[number + 1 :])
            found = state.period(graph, order, tried)
            if found < period * (1 - GAIN):
                shares, period = tried, found
    return order, shares, period


def _reorder(
    graph: NanoGraph, order: tuple[int, ...], shares: tuple[float, ...], period: float, state: _Search, limit: int
) -> tuple[tuple[int, ...], tuple[float, ...], float]:
    """One pass of moves in the order under these shares."""
    is_better = True
    while is_better:
        is_better = False
        for other in neighbours(graph, order):
            if state.spent >= limit or state.is_over:
                return order, shares, period
            found = state.period(graph, other, shares)
            if found < period * (1 - GAIN):
                order, period, is_better = other, found, True
                break
    return order, shares, period
