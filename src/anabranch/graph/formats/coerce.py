"""The one door for graphs: a `Graph` from whatever people have at hand."""

import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from anabranch.errors import InputError
from anabranch.graph.formats.objects import from_igraph, from_networkx, from_pyg, from_table, from_torch
from anabranch.graph.formats.read import read_graph
from anabranch.graph.sparse import wide_rows
from anabranch.graph.store import Graph

ACCEPTED = (
    "a Graph or TypedGraph, the path of a file, a networkx or igraph graph, a scipy or torch sparse matrix, PyG data,"
    " a table of edges (pyarrow, pandas, polars), edges [E, 2], or a tuple (source, target) or (source, target, weight)"
)


def as_graph(graph: Any, *, allow_negative: bool = False) -> Graph:
    """A graph from any of these; every estimator and function of `anabranch.graph` takes what this takes.

    - a `Graph`: itself
    - a path (text or `pathlib.Path`): the graph in that file, as `anabranch.graph.read_graph` reads it by default
    - a networkx graph: weights are the attribute ``weight``, 1 for edges without it if others have it; directed as it says
    - an igraph graph: the attributes ``weight`` and ``name`` where there are such; directed as it says
    - a scipy sparse matrix or array of any format, or a torch sparse tensor (CSR, CSC or COO): the adjacency matrix, directed where it
      is not symmetric; entries given twice are added up
    - PyTorch Geometric data: ``edge_index`` holds entries of that matrix
    - a table of edges (`pyarrow.Table` or batch, pandas or polars frame), undirected, columns as `anabranch.graph.formats.from_table`
      finds them
    - a `TypedGraph`: its relations together, by their weights
    - edges, undirected: integers [E, 2], or a tuple (source, target) or (source, target, weight), by the rules of `Graph.from_edges`

    Names come along (`Graph.names`). What came from networkx, a file or a table is spoken to in its own names (`Graph.by_name`).

    Args:
        graph: one of the above.
        allow_negative: whether weights may be negative.

    Raises:
        InputError: for anything else, and as `Graph.from_edges`. DataError, CapacityError: as `read_graph`.
    """
    if not isinstance(graph, Graph) and isinstance(getattr(graph, "relations", None), Mapping):
        # A `TypedGraph`, which reads files by what is beside here.
        graph = graph.graph
    if isinstance(graph, Graph):
        if graph.weights is not None and not allow_negative and len(graph.weights) and graph.weights.min() < 0:
            raise InputError("the graph has negative weights; pass allow_negative=True where they are meant")
        return graph
    found = _maker(graph)
    if found is None:
        shape = f" of shape {graph.shape}" if hasattr(graph, "shape") else ""
        raise InputError(f"a {type(graph).__name__}{shape} is no graph; give {ACCEPTED}")
    make, by_name = found
    made = make(graph, allow_negative=allow_negative)
    return replace(made, by_name=True) if by_name and made.names is not None else made


def _maker(graph: Any) -> tuple[Callable[..., Graph], bool] | None:
    """What makes a graph of this, and whether its nodes are then called by their names; None for what is no graph."""
    kinds: list[tuple[Any, Callable[..., Graph], bool]] = [
        (isinstance(graph, str | os.PathLike), read_graph, True),
        (_is_of(graph, "torch") and hasattr(graph, "layout"), from_torch, False),
        (_is_table(graph), from_table, True),
        (getattr(graph, "edge_index", None) is not None, from_pyg, False),
        (all(hasattr(graph, name) for name in ("nodes", "adj", "is_directed")), from_networkx, True),
        # An integer is always a number of a vertex there, and a name text.
        (all(hasattr(graph, name) for name in ("get_edgelist", "vcount", "is_directed")), from_igraph, False),
        (hasattr(graph, "tocsr") and hasattr(graph, "nnz"), _from_scipy, False),
        (isinstance(graph, tuple) and len(graph) in (2, 3), _from_lists, False),
        (isinstance(graph, np.ndarray) and graph.ndim == 2 and graph.shape[1] == 2, _from_pairs, False),
    ]
    return next(((make, by_name) for is_it, make, by_name in kinds if is_it), None)


def _is_of(graph: Any, package: str) -> bool:
    """Whether this is an object of a package, which is not imported to find out."""
    return any(kind.__module__.partition(".")[0] == package for kind in type(graph).__mro__)


def _is_table(graph: Any) -> bool:
    return hasattr(graph, "__arrow_c_stream__") or (_is_of(graph, "pandas") and hasattr(graph, "columns"))


def _from_scipy(matrix: Any, allow_negative: bool) -> Graph:
    return Graph.from_scipy(wide_rows(matrix, "an adjacency matrix"), allow_negative=allow_negative)


def _from_lists(edges: Any, allow_negative: bool) -> Graph:
    return Graph.from_edges(*edges, allow_negative=allow_negative)


def _from_pairs(edges: np.ndarray, allow_negative: bool) -> Graph:
    return Graph.from_edges(edges[:, 0], edges[:, 1])
