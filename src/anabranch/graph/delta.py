"""A graph with some edges more and some fewer, and nodes that are new: what an index that is kept up to date goes over to.

Edges are rows ``(u, v)`` or ``(u, v, weight)``, or a *tuple* of columns, ``(source, target)`` or ``(source, target, weight)``. Ends are ids
or names, as everywhere (`Graph.resolve`); a float is the whole number that it is, as in a table whose third column are weights. Old nodes
keep their ids, new ones come after them.
"""
# Shapes: N nodes, E edges

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from anabranch.bounds import LARGEST_INT, is_whole, near_name, shown
from anabranch.errors import InputError
from anabranch.graph.checks import is_known
from anabranch.graph.coerce import as_graph
from anabranch.graph.masks import unmasked
from anabranch.graph.store import Graph

# Kinds of names in messages.
_WORDS: dict[type, str] = {str: "text", int: "numbers", float: "floats"}


def with_changes(graph: Any, added: Any = None, removed: Any = None, *, num_nodes: int | None = None) -> Graph:
    """The graph that building from all edges, old ones less ``removed`` and then ``added``, would give.

    Takes passes over all edges, and memory of a second graph. To set a weight, remove the edge and add it.

    Args:
        graph: whatever `as_graph` takes, which stays as it is.
        added: edges. One that is there already gets the sum of both weights (without weights, it stays as it is). Names that are
            not known are new nodes, in the order in which they first come (sources before targets); of numbers, the next free ones are.
        removed: edges, without weights; of an undirected graph in either direction.
        num_nodes: nodes afterwards, those that no edge has included. Default: as many as the edges need.

    Raises:
        InputError: an edge to remove that is not there, a weight that is not positive or that the graph has no place for, ends that are
            no nodes and cannot be new ones.
    """
    graph = as_graph(graph, allow_negative=True)
    index = {} if graph.names is None else {name: place for place, name in enumerate(graph.names.tolist())}
    source_E, target_E, weight_E = graph.edges()
    if removed is not None:
        ends, weight = _columns(removed, "edges to remove")
        if weight is not None:
            raise InputError("edges to remove have a third column; an edge is removed whole, write its two ends alone")
        ends = [_plain(graph, column) for column in ends]
        gone = [_known(graph, index, column) for column in ends]
        kept = _without(graph, source_E, target_E, gone[0], gone[1], ends)
        source_E, target_E = source_E[kept], target_E[kept]
        weight_E = None if weight_E is None else weight_E[kept]
    names = graph.names
    count = graph.num_nodes
    if added is not None:
        ends, weight = _columns(added, "edges to add")
        if weight is not None and weight_E is None:
            raise InputError("edges to add have weights and the graph has none; leave the third column out")
        new, names, count = _with_new(graph, index, [_plain(graph, column) for column in ends])
        source_E, target_E = np.append(source_E, new[0]), np.append(target_E, new[1])
        if weight_E is not None:
            weight_E = np.append(weight_E, _weights(weight, len(new[0])))
    count = _checked_count(num_nodes, count, names)
    made = Graph.from_edges(source_E, target_E, weight_E, graph.is_directed, count, names=names)
    return replace(made, by_name=graph.by_name)


def _columns(edges: Any, what: str) -> tuple[list[list[Any]], list[Any] | None]:
    """Sources and targets, and weights or None."""
    edges = unmasked(edges, what)
    if isinstance(edges, tuple) and len(edges) in (2, 3) and all(_is_column(part) for part in edges):
        columns = [_listed(part) for part in edges]
    else:
        try:
            rows = [_row(row) for row in (edges.tolist() if isinstance(edges, np.ndarray) else edges)]
        except TypeError:
            raise InputError(f"{what} are rows (u, v) or (u, v, weight), or a tuple of columns") from None
        width = len(rows[0]) if rows else 2
        bad = next((place for place, row in enumerate(rows) if len(row) != width or width not in (2, 3)), None)
        if bad is not None:
            raise InputError(f"{what}: row {bad} has {len(rows[bad])} parts; all must be (u, v), or all (u, v, weight)")
        columns = [list(column) for column in zip(*rows, strict=True)] if rows else [[], []]
    if len({len(column) for column in columns}) > 1:
        lengths = ", ".join(f"{len(column):,}" for column in columns)
        raise InputError(f"{what}: the columns are of different lengths ({lengths})")
    return columns[:2], columns[2] if len(columns) > 2 else None


def _is_column(part: Any) -> bool:
    return isinstance(part, list | tuple) or (isinstance(part, np.ndarray) and part.ndim == 1)


def _row(row: Any) -> tuple[Any, ...]:
    if isinstance(row, str | bytes):
        raise TypeError("a name is no edge")
    return tuple(row)


def _listed(column: Any) -> list[Any]:
    return column.tolist() if hasattr(column, "tolist") else list(column)


def _numbers(column: Sequence[Any]) -> np.ndarray:
    """Ids of nodes without names. A float is one where it is whole: tables of ends and weights are of one type."""
    try:
        found = np.asarray(column, np.int64) if not len(column) else np.asarray(column)
        whole = found.astype(np.int64) if found.dtype.kind in "iuf" else None
    except (ValueError, OverflowError, TypeError) as error:
        raise InputError(f"ends of edges are numbers of nodes, this graph has no names: {error}") from None
    if whole is None or found.ndim != 1 or not (whole == found).all() or (whole < 0).any():
        raise InputError("ends of edges are whole numbers from 0: this graph has no names")
    return whole


def _plain(graph: Graph, column: Sequence[Any]) -> list[Any]:
    """Ends of edges of a graph with names: a float is a name where names are floats, and elsewhere the whole number that it is."""
    ends = [end.item() if isinstance(end, np.generic) else end for end in column]
    kinds = _kinds(graph)
    if graph.names is None or float in kinds:
        return ends
    for place, end in enumerate(ends):
        if isinstance(end, bool) and bool not in kinds:
            # Which Python takes for 0 and 1.
            raise InputError(f"the end {end} of an edge is no node: it is neither a name nor a whole number")
        if isinstance(end, float):
            if not end.is_integer():
                raise InputError(f"the end {shown(end)} of an edge is no node: it is neither a name nor a whole number")
            ends[place] = int(end)
    return ends


def _kinds(graph: Graph) -> set[type]:
    """Types of the names there are."""
    if graph.names is None or graph.names.dtype.kind in "iu":
        return {int}
    return {type(name) for name in graph.names.tolist()} or {str}


def _known(graph: Graph, index: dict[Any, int], column: Sequence[Any]) -> np.ndarray:
    """Ids of nodes that are there."""
    if graph.names is None:
        return graph.check_nodes(_numbers(column)) if len(column) else np.empty(0, np.int64)
    return np.array([_place(graph, index, end) for end in column], np.int64)


def _place(graph: Graph, index: dict[Any, int], end: Any) -> int:
    """The id of a node of a graph with names."""
    if not _is_name(graph, end):
        return int(graph.check_nodes([end])[0])
    if not is_known(end, index):
        raise InputError(f"the graph has no node {shown(end)}{near_name(end, index)}, and so none of its edges")
    return index[end]


def _is_name(graph: Graph, end: Any) -> bool:
    """Numbers are ids, unless the graph says that its callers mean names."""
    return graph.by_name or not isinstance(end, int | np.integer)


def _without(
    graph: Graph,
    source_E: np.ndarray,
    target_E: np.ndarray,
    gone_source: np.ndarray,
    gone_target: np.ndarray,
    named: list[list[Any]],
) -> np.ndarray:
    """bool [E], the edges that stay."""
    size = max(graph.num_nodes, 1)
    if not graph.is_directed:
        gone_source, gone_target = np.minimum(gone_source, gone_target), np.maximum(gone_source, gone_target)
    key_E, gone = source_E.astype(np.int64) * size + target_E, gone_source * size + gone_target
    # Rows of a graph are in order, so keys are.
    place = np.searchsorted(key_E, gone)
    there = np.zeros(len(gone), bool)
    inside = place < len(key_E)
    there[inside] = key_E[place[inside]] == gone[inside]
    if not there.all():
        row = int(np.flatnonzero(~there)[0])
        raise InputError(
            f"the graph has no edge ({shown(named[0][row])}, {shown(named[1][row])}) that could be removed (row {row} of those to remove)"
        )
    kept = np.ones(len(key_E), bool)
    kept[place] = False
    return kept


def _with_new(
    graph: Graph, index: dict[Any, int], ends: list[list[Any]]
) -> tuple[list[np.ndarray], np.ndarray | None, int]:
    """Ids of both ends, names of all nodes, and their number."""
    old = graph.num_nodes
    if graph.names is None:
        columns = [_numbers(column) for column in ends]
        return columns, None, max(old, *(int(column.max(initial=-1)) + 1 for column in columns))
    is_number = graph.names.dtype.kind in "iu"
    kinds = _kinds(graph)
    fresh: list[Any] = []
    for end in (*ends[0], *ends[1]):
        if not _is_name(graph, end):
            _place(graph, index, end)
        elif not is_known(end, index):
            _check_name(graph, kinds, end)
            index[end] = old + len(fresh)
            fresh.append(end)
    names = graph.names
    if fresh:
        names = np.empty(old + len(fresh), object)
        names[:old] = graph.names
        for place, name in enumerate(fresh, old):
            # One by one: of a tuple numpy would make several.
            names[place] = name
        names = names.astype(graph.names.dtype) if is_number else names
    columns = [
        np.array([index[end] if _is_name(graph, end) else int(end) for end in column], np.int64) for column in ends
    ]
    return columns, names, old + len(fresh)


def _check_name(graph: Graph, kinds: set[type], name: Any) -> None:
    """Raise InputError for what a new node cannot be called, in a graph whose names are of these kinds."""
    assert graph.names is not None  # asked of graphs with names alone
    is_number = graph.names.dtype.kind in "iu"
    fits = type(name) in kinds and name is not None and name == name
    if fits and is_number:
        limits = np.iinfo(graph.names.dtype)
        fits = limits.min <= name <= limits.max
    try:
        hash(name)
    except TypeError:
        fits = False
    if not fits:
        called = (
            "numbers of 64 bits"
            if is_number
            else " or ".join(sorted(_WORDS.get(kind, kind.__name__) for kind in kinds))
        )
        raise InputError(f"{shown(name)} cannot be the name of a new node: nodes of this graph are called by {called}")


def _weights(weight: Sequence[Any] | None, count: int) -> np.ndarray:
    if weight is None:
        return np.ones(count, np.float32)
    try:
        found = np.asarray(weight, np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"weights of edges to add are numbers: {error}") from None
    with np.errstate(over="ignore"):
        small = found.astype(np.float32)
    bad = np.flatnonzero(~(np.isfinite(small) & (small > 0)))
    if bad.size:
        raise InputError(f"edge {bad[0]} to add has the weight {weight[bad[0]]}; weights must be finite and positive")
    return small


def _checked_count(num_nodes: int | None, count: int, names: np.ndarray | None) -> int:
    """Nodes afterwards."""
    if num_nodes is None:
        return count
    if not is_whole(num_nodes) or not count <= num_nodes <= LARGEST_INT:
        raise InputError(f"num_nodes is {shown(num_nodes)}; old nodes and edges need at least {count:,}")
    if names is not None and num_nodes > count:
        raise InputError(
            f"num_nodes is {num_nodes} and {count:,} nodes have names; nodes without an edge would have none"
        )
    return int(num_nodes)
