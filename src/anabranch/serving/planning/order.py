"""Stage I: in which order nano-operations start, if none slows another and no two of one resource run at once.

It is a job shop of three machines. `branch_and_bound` finds the shortest single layer, `milp` the shortest layer or the shortest steady
state (scipy's HiGHS), `improve` goes from list scheduling by local search and is what large graphs get.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence

from anabranch.errors import CapacityError
from anabranch.extras import require
from anabranch.serving.planning.cost import RESOURCES
from anabranch.serving.planning.graph import NanoGraph
from anabranch.serving.planning.simulate import LAYERS, Schedule, simulate

Objective = Callable[[tuple[int, ...]], float]


def layer_time(graph: NanoGraph, order: Sequence[int], num_layers: int = 1) -> float:
    """Stage I's objective: the makespan of one layer, or the period of several."""
    return simulate(Schedule(graph, tuple(order)), num_layers=num_layers).period_s


def tails(graph: NanoGraph) -> list[float]:
    """For each nano-operation the longest path from its start to the end of the layer."""
    found = [0.0] * len(graph.ops)
    for number in reversed(range(len(graph.ops))):
        found[number] += graph.ops[number].duration_s
        for other in graph.before[number]:
            found[other] = max(found[other], found[number])
    return found


def list_order(graph: NanoGraph, priority: Sequence[float] | None = None) -> tuple[int, ...]:
    """List scheduling: whenever a resource is free, start the ready nano-operation of the longest tail (or highest ``priority``)."""
    priority = tails(graph) if priority is None else priority
    free = dict.fromkeys(RESOURCES, 0.0)
    end: dict[int, float] = {}
    order: list[int] = []
    while len(order) < len(graph.ops):
        ready = [
            number
            for number in range(len(graph.ops))
            if number not in end and all(other in end for other in graph.before[number])
        ]
        starts = {
            number: max([free[graph.ops[number].resource], *(end[other] for other in graph.before[number])])
            for number in ready
        }
        first = min(starts.values())
        chosen = min(
            (number for number in ready if starts[number] == first), key=lambda number: (-priority[number], number)
        )
        end[chosen] = first + graph.ops[chosen].duration_s
        free[graph.ops[chosen].resource] = end[chosen]
        order.append(chosen)
    return tuple(order)


def neighbours(graph: NanoGraph, order: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Orders with one nano-operation moved elsewhere, where what it waits for allows."""
    order = list(order)
    for at, number in enumerate(order):
        after = max((order.index(other) for other in graph.before[number]), default=-1)
        followers = [other for other in range(len(order)) if number in graph.before[other]]
        until = min((order.index(other) for other in followers), default=len(order))
        for place in range(after + 1, until):
            if place != at:
                rest = order[:at] + order[at + 1 :]
                yield (*rest[:place], number, *rest[place:])


def improve(
    graph: NanoGraph, order: Sequence[int], objective: Objective, *, evaluations: int = 2000, bound: float = 0.0
) -> tuple[tuple[int, ...], float]:
    """Hill climbing over `neighbours`: the first better one is taken, until none is, ``evaluations`` are spent or ``bound`` is reached."""
    best, value = tuple(order), objective(tuple(order))
    spent, is_better = 1, True
    while is_better and value > bound * (1 + 1e-9):
        is_better = False
        for other in neighbours(graph, best):
            if spent >= evaluations:
                return best, value
            found = objective(other)
            spent += 1
            if found < value * (1 - 1e-9):
                best, value, is_better = other, found, True
                break
    return best, value


def find_order(graph: NanoGraph, *, num_layers: int = LAYERS, evaluations: int = 400) -> tuple[tuple[int, ...], float]:
    """A good order of a graph of any size, exact up to `EXACT` nano-operations."""
    if len(graph.ops) <= EXACT:
        return min(
            ((order, layer_time(graph, order, num_layers)) for order in linear_orders(graph)),
            key=lambda pair: (pair[1], pair[0]),
        )

    def objective(order: tuple[int, ...]) -> float:
        return layer_time(graph, order, num_layers)

    by_start = [-float(op.start) for op in graph.ops]
    seeds = [list_order(graph), list_order(graph, by_start), tuple(range(len(graph.ops)))]
    start = min(seeds, key=lambda order: (objective(order), order))
    return improve(graph, start, objective, evaluations=evaluations, bound=graph.bound_s)


# Nano-operations; at most 720 orders.
EXACT = 6


def linear_orders(graph: NanoGraph) -> Iterator[tuple[int, ...]]:
    """Every order that keeps the dependences."""

    def grow(done: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if len(done) == len(graph.ops):
            yield done
        for number in range(len(graph.ops)):
            if number not in done and all(other in done for other in graph.before[number]):
                yield from grow((*done, number))

    return grow(())


def branch_and_bound(graph: NanoGraph, *, max_nodes: int = 200_000) -> tuple[tuple[int, ...], float]:
    """The order of the shortest single layer.

    Branches as Giffler and Thompson do: of the ready nano-operations, the one that could end first names a resource, and each of
    that resource that could start before then is tried. Bounds are tails and what each resource has left. Raises CapacityError after
    ``max_nodes`` nodes.
    """
    search = _BranchAndBound(graph, max_nodes)
    search.visit((), {}, dict.fromkeys(RESOURCES, 0.0))
    return search.best, search.value


class _BranchAndBound:
    def __init__(self, graph: NanoGraph, max_nodes: int) -> None:
        self.graph, self.max_nodes, self.nodes = graph, max_nodes, 0
        self.tails = tails(graph)
        self.best = list_order(graph)
        self.value = layer_time(graph, self.best)

    def visit(self, order: tuple[int, ...], end: dict[int, float], free: dict[str, float]) -> None:
        self.nodes += 1
        if self.nodes > self.max_nodes:
            raise CapacityError(
                f"branch and bound of {len(self.graph.ops)} nano-operations took more than {self.max_nodes} nodes; use find_order"
            )
        ops, before = self.graph.ops, self.graph.before
        if len(order) == len(ops):
            if max(end.values()) < self.value * (1 - 1e-12):
                self.best, self.value = order, max(end.values())
            return
        starts = {
            number: max([free[ops[number].resource], *(end[other] for other in before[number])])
            for number in range(len(ops))
            if number not in end and all(other in end for other in before[number])
        }
        if self._bound(starts, end, free) >= self.value * (1 - 1e-12):
            return
        first = min(starts, key=lambda number: (starts[number] + ops[number].duration_s, number))
        until = starts[first] + ops[first].duration_s
        rivals = [
            number
            for number in starts
            if ops[number].resource == ops[first].resource and (starts[number] < until or number == first)
        ]
        for number in sorted(rivals, key=lambda number: (-self.tails[number], number)):
            done = starts[number] + ops[number].duration_s
            self.visit((*order, number), {**end, number: done}, {**free, ops[number].resource: done})

    def _bound(self, starts: dict[int, float], end: dict[int, float], free: dict[str, float]) -> float:
        paths = max(start + self.tails[number] for number, start in starts.items())
        left = dict.fromkeys(RESOURCES, 0.0)
        for number, op in enumerate(self.graph.ops):
            if number not in end:
                left[op.resource] += op.duration_s
        return max(
            paths, max(free[name] + left[name] for name in RESOURCES if left[name]), max(end.values(), default=0.0)
        )


def milp(graph: NanoGraph, *, is_steady: bool = False, limit_s: float = 60.0) -> tuple[tuple[int, ...], float]:
    """The exact order by mixed-integer programming: shortest layer, or shortest period T of layers that follow each other.

    Variables: start s_i of each nano-operation, T, and for two of one resource who is first (y). One that comes first in a layer comes
    again only after the other: s_i - s_j + T >= d_j. Raises BackendError without scipy, CapacityError if the time does not suffice.
    """
    require("laws", by="an exact order")
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint
    from scipy.optimize import milp as solve

    count = len(graph.ops)
    # Seconds in which the solver's numbers are near 1.
    unit = graph.sequential_s or 1.0
    pairs = [
        (one, two)
        for one, two in itertools.combinations(range(count), 2)
        if graph.ops[one].resource == graph.ops[two].resource
    ]
    rules = _rules(graph, pairs, [op.duration_s / unit for op in graph.ops], is_steady)
    num = count + 1 + len(pairs)
    matrix = np.zeros((len(rules), num))
    for row, (_, terms) in enumerate(rules):
        for variable, factor in terms:
            matrix[row, variable] += factor
    found = solve(
        np.eye(num)[count],
        constraints=LinearConstraint(matrix, lb=np.array([least for least, _ in rules])),
        integrality=np.arange(num) > count,
        bounds=Bounds(np.zeros(num), np.where(np.arange(num) < count, LATEST, 1.0)),
        options={"time_limit": limit_s, "mip_rel_gap": 1e-6},
    )
    if found.status != 0:
        raise CapacityError(f"no exact order of {count} nano-operations in {limit_s:.0f} s: {found.message}")
    order = order_by(graph, found.x[:count])
    return order, float(found.x[count] * unit) if is_steady else layer_time(graph, order)


# Start, in times of one after the other.
LATEST = 3.0

# At least so much is the sum of these (variable, factor).
Rule = tuple[float, list[tuple[int, float]]]


def _rules(graph: NanoGraph, pairs: Sequence[tuple[int, int]], seconds: Sequence[float], is_steady: bool) -> list[Rule]:
    """The program's constraints. Variables: starts, T, then for each pair whether its first goes first."""
    period, big = len(graph.ops), LATEST + 1
    rules: list[Rule] = []
    for number in range(len(graph.ops)):
        rules += [(seconds[other], [(number, 1), (other, -1)]) for other in graph.before[number]]
        # Each comes again after itself, and after what it waits for in the layer before.
        if is_steady:
            rules.append((seconds[number], [(period, 1)]))
            rules += [(seconds[other], [(period, 1), (number, 1), (other, -1)]) for other in graph.before_next[number]]
        else:
            rules.append((seconds[number], [(period, 1), (number, -1)]))
    for first, (one, two) in enumerate(pairs, start=period + 1):
        rules.append((seconds[one] - big, [(two, 1), (one, -1), (first, -big)]))
        rules.append((seconds[two], [(one, 1), (two, -1), (first, big)]))
        if is_steady:
            rules.append((seconds[two] - big, [(one, 1), (two, -1), (period, 1), (first, -big)]))
            rules.append((seconds[one], [(two, 1), (one, -1), (period, 1), (first, big)]))
    return rules


def order_by(graph: NanoGraph, ranks: Sequence[float]) -> tuple[int, ...]:
    """Numbers by rank, such as times of starts; what a nano-operation waits for always stands before it."""
    order: list[int] = []
    while len(order) < len(graph.ops):
        ready = [
            number
            for number in range(len(graph.ops))
            if number not in order and all(other in order for other in graph.before[number])
        ]
        order.append(min(ready, key=lambda number: (round(float(ranks[number]), 12), number)))
    return tuple(order)
