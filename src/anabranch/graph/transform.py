"""What `Graph` can be asked and turned into: the work behind its methods, as functions of a graph."""
# Shapes: N nodes, M stored edges, S nodes of a subgraph

from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike

from anabranch.bounds import shown
from anabranch.errors import InputError
from anabranch.graph import csr
from anabranch.graph.checks import checked_weights
from anabranch.graph.masks import unmasked

QUANTILES = {"min": 0.0, "p25": 0.25, "median": 0.5, "p75": 0.75, "p90": 0.9, "p99": 0.99, "max": 1.0}


class Rows(Protocol):
    """What is read of a `anabranch.graph.store.Graph`, which calls these functions and so is not imported here."""

    @property
    def indptr(self) -> np.ndarray: ...  # noqa: D102
    @property
    def indices(self) -> np.ndarray: ...  # noqa: D102
    @property
    def weights(self) -> np.ndarray | None: ...  # noqa: D102
    @property
    def names(self) -> np.ndarray | None: ...  # noqa: D102
    @property
    def is_directed(self) -> bool: ...  # noqa: D102
    @property
    def num_nodes(self) -> int: ...  # noqa: D102
    @property
    def num_edges(self) -> int: ...  # noqa: D102
    @property
    def num_self_loops(self) -> int: ...  # noqa: D102
    @property
    def degree_N(self) -> np.ndarray: ...  # noqa: D102
    @property
    def nbytes(self) -> int: ...  # noqa: D102
    def edges(self) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]: ...  # noqa: D102


def subgraph(graph: Rows, nodes: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Arrays of the graph of these nodes. Raises InputError for a node given twice."""
    new_id_N = np.full(graph.num_nodes, -1, np.int64)
    new_id_N[nodes] = np.arange(len(nodes))
    twice = np.flatnonzero(new_id_N[nodes] != np.arange(len(nodes)))
    if twice.size:
        raise InputError(f"node {nodes[twice[0]]} is given twice; nodes of a subgraph are distinct")
    indptr = np.zeros(len(nodes) + 1, np.int64)
    old = csr.NO_WEIGHTS if graph.weights is None else graph.weights
    csr.select_rows(
        graph.indptr, graph.indices, old, nodes, new_id_N, indptr, np.empty(0, np.int64), csr.NO_WEIGHTS.copy(), True
    )
    count = int(indptr[-1])
    indices = np.empty(count, csr.id_type(len(nodes), count))
    weights = np.empty(count if graph.weights is not None else 0, np.float32)
    csr.select_rows(graph.indptr, graph.indices, old, nodes, new_id_N, indptr, indices, weights, False)
    csr.sort_rows(indptr, indices, weights)
    return indptr, indices, None if graph.weights is None else weights


def components(graph: Rows) -> np.ndarray:
    """int32 [N], numbered from the largest component, equals by their smallest node."""
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import connected_components

    if not graph.num_nodes:
        return np.empty(0, np.int32)
    shape, ones = (graph.num_nodes, graph.num_nodes), np.ones(len(graph.indices), np.int8)
    matrix = csr_array((ones, graph.indices, graph.indptr.astype(graph.indices.dtype)), shape=shape)
    count, label_N = connected_components(matrix, directed=True, connection="weak")
    first_C = np.full(count, graph.num_nodes)
    np.minimum.at(first_C, label_N, np.arange(graph.num_nodes))
    order_C = np.lexsort((first_C, -np.bincount(label_N, minlength=count)))
    rank_C = np.empty(count, np.int32)
    rank_C[order_C] = np.arange(count, dtype=np.int32)
    return rank_C[label_N]


def aligned_weights(graph: Rows, weights: ArrayLike) -> np.ndarray:
    """float32 [M] of weights given per stored edge or per edge. Raises InputError."""
    try:
        given = np.asarray(unmasked(weights, "weights"))
    except ValueError as error:
        raise InputError(f"weights must be one list of numbers: {error}") from None
    if given.shape == (graph.num_edges,) and not graph.is_directed and graph.num_edges != len(graph.indices):
        source_E, target_E, _ = graph.edges()
        checked = checked_weights(given, graph.num_edges, False, False)
        chunk = (source_E, target_E, checked)
        made = csr.compress(lambda: [chunk], graph.num_nodes, directed=False, is_weighted=True)[2]
        assert made is not None
        return made
    if given.shape != graph.indices.shape:
        raise InputError(
            f"weights have the shape {given.shape}; there are {len(graph.indices):,} stored edges and {graph.num_edges:,} edges"
        )
    checked = checked_weights(given, len(graph.indices), False, False)
    if not graph.is_directed and (differ := csr.count_asymmetric(graph.indptr, graph.indices, checked)):
        raise InputError(f"weights of an undirected edge must be the same in both directions; {differ:,} are not")
    return checked


def describe(graph: Rows) -> dict[str, Any]:
    """Facts of a graph, plain numbers and text that JSON can hold.

    ``nodes``, ``edges``, ``stored_edges``, ``directed``, ``weighted``, ``named``, ``self_loops``, ``isolated`` (no edge at all),
    ``dangling`` (no edge out; of undirected graphs the isolated ones), ``degree`` and (where directed) ``in_degree`` as mean and quantiles,
    ``weight`` as sum, least and largest, ``components`` (weakly connected), ``largest_component`` (nodes in it), ``bytes``.
    """
    out_N = graph.degree_N
    into_N = np.bincount(graph.indices, minlength=graph.num_nodes) if graph.is_directed else out_N
    label_N = components(graph)
    facts: dict[str, Any] = {
        "nodes": graph.num_nodes,
        "edges": graph.num_edges,
        "stored_edges": len(graph.indices),
        "directed": graph.is_directed,
        "weighted": graph.weights is not None,
        "named": graph.names is not None,
        "self_loops": graph.num_self_loops,
        "isolated": int(((out_N == 0) & (into_N == 0)).sum()),
        "dangling": int((out_N == 0).sum()),
        "degree": _spread(out_N),
    }
    if graph.is_directed:
        facts["in_degree"] = _spread(into_N)
    if graph.weights is not None and len(graph.weights):
        total = float(graph.edges()[2].sum(dtype=np.float64))  # type: ignore[union-attr]
        facts["weight"] = {"sum": total, "min": float(graph.weights.min()), "max": float(graph.weights.max())}
    facts["components"] = int(label_N.max()) + 1 if len(label_N) else 0
    facts["largest_component"] = int((label_N == 0).sum())
    facts["bytes"] = graph.nbytes
    return facts


def _spread(count_N: np.ndarray) -> dict[str, float | int]:
    """Mean, and quantiles that are values which occur."""
    if not len(count_N):
        return {}
    found = np.quantile(count_N, list(QUANTILES.values()), method="inverted_cdf")
    return {"mean": float(count_N.mean()), **{name: int(value) for name, value in zip(QUANTILES, found, strict=True)}}


def difference(first: Rows, second: Rows) -> str | None:
    """The first thing in which two graphs differ; None if they are equal to the byte."""
    if not isinstance(second, type(first)):
        raise InputError(f"other is {shown(second)}; it must be a Graph")
    if first.is_directed != second.is_directed:
        return "one is directed, the other is not"
    for name in ("indptr", "indices", "weights", "names"):
        ours, theirs = getattr(first, name), getattr(second, name)
        if (ours is None) != (theirs is None):
            return f"{name}: {'only the second has' if ours is None else 'only the first has'} them"
        if ours is None:
            continue
        if ours.shape != theirs.shape:
            return f"{name}: {len(ours):,} and {len(theirs):,} of them"
        if ours.dtype != theirs.dtype:
            return f"{name}: {ours.dtype} and {theirs.dtype}"
        places = np.flatnonzero(ours != theirs)
        if places.size:
            place = int(places[0])
            one, other = (array[place : place + 1].tolist()[0] for array in (ours, theirs))
            return f"{name}: {len(places):,} differ, first at {place}: {one!r} and {other!r}"
    return None
