"""Graphs made of objects of other libraries. Nothing is imported that the caller has not imported."""
# Shapes: N nodes, E edges

from typing import Any

import numpy as np

from anabranch.errors import InputError, first_line
from anabranch.graph.formats.build import Rules
from anabranch.graph.formats.layout import Dialect
from anabranch.graph.formats.matrices import of_entries
from anabranch.graph.formats.parquet import choose_columns, graph_of, looked
from anabranch.graph.store import Graph
from anabranch.graph.table_columns import Column
from anabranch.graph.table_look import EdgeTable


def from_networkx(graph: Any, weight: str | None = "weight", **options: Any) -> Graph:
    """The graph of a networkx one.

    Nodes keep their order; they become names unless they are the integers 0 ... N - 1, in any order, which stay what they are.

    Args:
        graph: a ``Graph``, ``DiGraph`` or a multigraph, whose parallel edges are duplicates.
        weight: the edge attribute that is the weight, 1 for edges without it if others have it, or if edges are parallel: they count as
            many as they are (networkx's own rules). None for a graph without weights, where they are one edge.
        options: ``duplicates``, ``drop_zero`` and ``allow_negative`` of `Graph.from_edges`.

    Raises:
        InputError: not a networkx graph, or a weight that is not a positive finite number, naming the edge.
    """
    if not all(hasattr(graph, name) for name in ("nodes", "edges", "is_directed")):
        raise InputError(f"from_networkx needs a networkx graph, not {type(graph).__name__}")
    nodes = list(graph.nodes)
    is_plain = all(isinstance(node, (int, np.integer)) and not isinstance(node, bool) for node in nodes)
    is_plain = is_plain and set(nodes) == set(range(len(nodes)))
    place = {node: node if is_plain else number for number, node in enumerate(nodes)}
    ends = np.array([(place[u], place[v]) for u, v in graph.edges()], np.int64).reshape(-1, 2)
    values = None if weight is None else [value for _, _, value in graph.edges(data=weight)]
    if values is not None and all(value is None for value in values) and not _has_parallel(ends, graph.is_directed()):
        values = None
    weight_E = None if values is None else _numbers(values, [(u, v) for u, v in graph.edges()])
    names = None if is_plain else nodes
    return Graph.from_edges(
        ends[:, 0], ends[:, 1], weight_E, bool(graph.is_directed()), len(nodes), names=names, **options
    )


def _has_parallel(ends: np.ndarray, is_directed: bool) -> bool:
    """Whether an edge of ``ends`` [E, 2] is there more than once, as multigraphs have them."""
    ordered = ends if is_directed else np.sort(ends, axis=1)
    return len(np.unique(ordered, axis=0)) < len(ordered)


def _numbers(values: list[Any], edges: list[Any]) -> np.ndarray:
    """Weights as numbers, 1 where there is none. Raises InputError naming the edge."""
    found = np.ones(len(values))
    for place, value in enumerate(values):
        if value is None:
            continue
        if not isinstance(value, (int, float, np.integer, np.floating)):
            raise InputError(f"edge {edges[place]} has the weight {value!r}, which is not a number")
        try:
            found[place] = value
        except OverflowError:
            # An integer beyond float64. Not in full: it may have more digits than Python writes.
            raise InputError(
                f"edge {edges[place]} has a weight of {int(value).bit_length():,} bits; weights must be finite (as 32-bit numbers)"
            ) from None
    return found


def from_igraph(graph: Any, weight: str | None = "weight", name: str | None = "name", **options: Any) -> Graph:
    """The graph of an igraph one.

    Args:
        graph: an ``igraph.Graph``; parallel edges are duplicates, and count as many as they are where no edge has a weight.
        weight: the edge attribute that is the weight, if there is such a one; None for a graph without weights.
        name: the vertex attribute that is the name, likewise.
        options: as of `from_networkx`.

    Raises:
        InputError: not an igraph graph, or a weight that is not a positive finite number, naming the edge.
    """
    if not all(hasattr(graph, method) for method in ("get_edgelist", "vcount", "is_directed")):
        raise InputError(f"from_igraph needs an igraph graph, not {type(graph).__name__}")
    edges = graph.get_edgelist()
    ends = np.array(edges, np.int64).reshape(-1, 2)
    weight_E = None
    if weight is not None and weight in graph.es.attributes():
        values = graph.es[weight]
        missing = next((place for place, value in enumerate(values) if value is None), None)
        if missing is not None:
            raise InputError(f"edge {edges[missing]} has no {weight!r}, others have")
        weight_E = _numbers(values, edges)
    elif weight is not None and _has_parallel(ends, graph.is_directed()):
        weight_E = np.ones(len(ends))
    names = graph.vs[name] if name is not None and name in graph.vs.attributes() else None
    return Graph.from_edges(
        ends[:, 0], ends[:, 1], weight_E, bool(graph.is_directed()), graph.vcount(), names=names, **options
    )


def from_pyg(data: Any, weight: str | None = "auto", directed: bool | None = None, **options: Any) -> Graph:
    """The graph of a PyTorch Geometric ``Data`` (anything with an ``edge_index`` [2, E]).

    Args:
        data: its edges are entries of a matrix, as there: an undirected edge stands in it both ways.
        weight: the attribute that is the weight, [E] or [E, 1]; None for none. "auto" takes ``edge_weight``, else an ``edge_attr`` of
            that shape.
        directed: None looks whether the matrix is symmetric; False demands it.
        options: as of `from_networkx`.

    Raises:
        InputError: no ``edge_index`` of that shape, no such attribute, or as in `Graph.from_edges`.
    """
    if getattr(data, "edge_index", None) is None:
        raise InputError(f"from_pyg needs an object with an edge_index, not {type(data).__name__}")
    index = _array(data.edge_index)
    if index.ndim != 2 or index.shape[0] != 2:
        raise InputError(f"edge_index has the shape {index.shape}; it must be [2, edges]")
    value = None
    if weight == "auto":
        value = getattr(data, "edge_weight", None)
        attribute = getattr(data, "edge_attr", None)
        if value is None and attribute is not None and _array(attribute).size == index.shape[1]:
            value = attribute
    elif weight is not None:
        value = getattr(data, weight, None)
        if value is None:
            raise InputError(f"the data have no {weight!r}")
    weight_E = None if value is None else _array(value)
    if weight_E is not None and weight_E.ndim == 2 and weight_E.shape[1] == 1:
        weight_E = weight_E[:, 0]
    return of_entries(
        index[0], index[1], weight_E, getattr(data, "num_nodes", None), Rules(directed=directed, **options)
    )


def from_torch(matrix: Any, directed: bool | None = None, **options: Any) -> Graph:
    """The graph of a sparse torch tensor [N, N], COO, CSR or CSC; entry (u, v) is the weight of u -> v, entries given twice are added.

    Args:
        matrix: the tensor, on any device.
        directed: None looks whether it is symmetric; False demands it.
        options: ``drop_zero`` (default True) and ``allow_negative`` of `Graph.from_edges`.

    Raises:
        InputError: not a sparse square tensor, or as in `Graph.from_edges`.
    """
    layout = str(getattr(matrix, "layout", None)).removeprefix("torch.")
    if layout not in ("sparse_coo", "sparse_csr", "sparse_csc"):
        raise InputError(
            f"from_torch needs a sparse tensor (COO, CSR or CSC), not {layout if layout != 'None' else type(matrix).__name__}"
        )
    if len(matrix.shape) != 2 or matrix.shape[0] != matrix.shape[1]:
        raise InputError(f"an adjacency matrix is square, this one has the shape {tuple(matrix.shape)}")
    if layout == "sparse_coo":
        # As given; duplicates are added below.
        index = _array(matrix._indices())
        source, target, value = index[0], index[1], matrix._values()
    elif layout == "sparse_csr":
        target, value = _array(matrix.col_indices()), matrix.values()
        source = np.repeat(np.arange(matrix.shape[0]), np.diff(_array(matrix.crow_indices())))
    else:
        source, value = _array(matrix.row_indices()), matrix.values()
        target = np.repeat(np.arange(matrix.shape[0]), np.diff(_array(matrix.ccol_indices())))
    if value.ndim != 1:
        raise InputError(f"entries of the matrix have the shape {tuple(value.shape[1:])}; they must be single numbers")
    rules = Rules(directed=directed, **{"drop_zero": True, **options})
    return of_entries(source, target, _array(value), int(matrix.shape[0]), rules)


def _array(tensor: Any) -> np.ndarray:
    """A numpy array of a tensor, on whatever device, or of what numpy takes."""
    if hasattr(tensor, "detach"):
        tensor = tensor.detach().cpu()
        if str(tensor.dtype) == "torch.bfloat16":
            tensor = tensor.float()
        return tensor.numpy()
    return np.asarray(tensor)


def from_table(
    table: Any,
    source: Column = None,
    target: Column = None,
    weight: Column = "auto",
    directed: bool | None = None,
    **options: Any,
) -> Graph:
    """The graph of a table of edges: a `pyarrow.Table`, or what `pyarrow.table` takes (a dict of columns, a pandas or polars frame).

    Args:
        table: one edge a row.
        source, target, weight: columns by name or number; by default those with well-known names, else the first two and no weight.
        directed: default what Gephi's column Type says, else False.
        options: ``ids``, ``num_nodes``, ``duplicates``, ``drop_zero`` and ``allow_negative`` of `read_graph`.

    Raises:
        InputError: no such column. DataError: ids or weights that are not what they must be, naming the row.
    """
    import pyarrow as pa

    try:
        table = table if isinstance(table, pa.Table) else pa.table(table)
    except (TypeError, ValueError, pa.ArrowException) as error:
        raise InputError(f"from_table needs a table, not {type(table).__name__}: {first_line(error)}") from None
    dialect = Dialect(source=source, target=target, weight=weight)
    rules = looked(EdgeTable.of("the table", table), Rules(directed=directed, **options), dialect)
    columns = choose_columns("the table", table.schema, dialect)
    batch = [table.column(column) for column in columns]
    return graph_of("the table", table.schema, columns, [batch], rules)


def note_of(graph: Graph) -> str:
    """What is kept beside a table of edges: nodes, direction, and whether ends are names that may be numbers."""
    kind = "directed" if graph.is_directed else "undirected"
    return f"{graph.num_nodes} {kind}{'' if graph.names is None else ' named'}"


def edge_columns(
    graph: Graph, source_E: np.ndarray, target_E: np.ndarray, weight_E: np.ndarray | None, names: bool
) -> dict[str, Any]:
    """Columns of some edges for a table."""
    import pyarrow as pa

    columns: dict[str, Any] = {"source": source_E, "target": target_E}
    if names and graph.names is not None:
        if graph.names.dtype.kind == "O" and not all(isinstance(name, str) for name in graph.names.tolist()):
            raise InputError("names can be written if all are integers or all are text")
        kind = pa.string() if graph.names.dtype.kind == "O" else None
        columns = {end: pa.array(graph.names[ids], kind) for end, ids in columns.items()}
    if weight_E is not None:
        columns["weight"] = weight_E
    return columns
