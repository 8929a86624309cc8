"""Graphs out: into files, objects of other libraries and tables. Each takes whatever `as_graph` does."""

import os
from typing import Any

import numpy as np

from anabranch.bounds import shown
from anabranch.errors import InputError
from anabranch.extras import require
from anabranch.graph.arguments import as_path
from anabranch.graph.formats.coerce import as_graph
from anabranch.graph.formats.objects import edge_columns, note_of
from anabranch.graph.formats.parquet import NOTE
from anabranch.graph.formats.read import ENDINGS, FORMATS
from anabranch.graph.formats.write import WRITERS, name_of


def write_graph(graph: Any, path: str | os.PathLike[str], *, format: str | None = None) -> None:
    """Write a graph, all or nothing. `read_graph` gives it back, except where the format cannot hold it (see `docs/systems/graph.md`).

    Args:
        graph: whatever `as_graph` takes.
        path: the file; text whose name ends in ``.gz`` is compressed.
        format: one of `FORMATS`. Default: by the ending.

    Raises:
        InputError: an unknown format, no graph, or one that the format cannot hold (names, self-loops ...).
        DataError, CapacityError: the place cannot be written, or its disk is full.
    """
    path = as_path(path)
    kind = ENDINGS.get(name_of(path).suffix.lower()) if format is None else format
    if not isinstance(kind, str) or kind not in FORMATS:
        what = f"of {shown(path.name)}" if format is None else shown(format)
        raise InputError(f"the format {what} is unknown; give one of {', '.join(FORMATS)}")
    if path.suffix in (".bz2", ".xz") or (path.suffix == ".gz" and kind not in ("csv", "edges", "mtx", "metis")):
        raise InputError(f"{path}: {kind!r} cannot be written compressed like that; text can as .gz")
    WRITERS[kind](as_graph(graph, allow_negative=True), path)


def to_networkx(graph: Any) -> Any:
    """A networkx ``Graph`` or ``DiGraph``; nodes are the graph's names, or its ids. Raises BackendError where networkx is not installed."""
    require("networkx", by="to_networkx")
    import networkx

    graph = as_graph(graph, allow_negative=True)
    made = networkx.DiGraph() if graph.is_directed else networkx.Graph()
    names = range(graph.num_nodes) if graph.names is None else graph.names.tolist()
    made.add_nodes_from(names)
    source_E, target_E, weight_E = graph.edges()
    ends = [(names[u], names[v]) for u, v in zip(source_E.tolist(), target_E.tolist(), strict=True)]
    if weight_E is None:
        made.add_edges_from(ends)
    else:
        made.add_weighted_edges_from((u, v, w) for (u, v), w in zip(ends, weight_E.tolist(), strict=True))
    return made


def to_igraph(graph: Any) -> Any:
    """An ``igraph.Graph`` with the attributes ``name`` and ``weight`` where there are some. Raises BackendError without igraph."""
    require("igraph", by="to_igraph")
    import igraph

    graph = as_graph(graph, allow_negative=True)
    source_E, target_E, weight_E = graph.edges()
    made = igraph.Graph(
        n=graph.num_nodes, edges=np.column_stack([source_E, target_E]).tolist(), directed=graph.is_directed
    )
    if weight_E is not None:
        made.es["weight"] = weight_E.tolist()
    if graph.names is not None:
        made.vs["name"] = graph.names.tolist()
    return made


def to_table(graph: Any, names: bool = True) -> Any:
    """The edges as a `pyarrow.Table` with the columns ``source``, ``target`` and (perhaps) ``weight``, an undirected edge once.

    Args:
        graph: whatever `as_graph` takes.
        names: whether ends are outside names, where the graph has some; otherwise ids.
    """
    import pyarrow as pa

    graph = as_graph(graph, allow_negative=True)
    source_E, target_E, weight_E = graph.edges()
    return pa.table(edge_columns(graph, source_E, target_E, weight_E, names)).replace_schema_metadata(
        {NOTE: note_of(graph)}
    )
