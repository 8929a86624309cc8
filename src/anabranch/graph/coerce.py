"""A `Graph` from what people have at hand."""

from typing import Any

import numpy as np

from anabranch.errors import InputError
from anabranch.graph.store import Graph


def as_graph(graph: Any, *, allow_negative: bool = False) -> Graph:
    """A graph from any of these, directed where its matrix is not symmetric.

    - a `Graph`: itself
    - a scipy sparse matrix or array of any format, or a torch sparse tensor (CSR or COO): the adjacency matrix; entries given
      twice are added up
    - edges, undirected: integers [E, 2], or a tuple (source, target) or (source, target, weight), by the rules of `Graph.from_edges`

    Raises InputError for anything else, and as `Graph.from_edges`.
    """
    if isinstance(graph, Graph):
        if graph.weights is not None and not allow_negative and len(graph.weights) and graph.weights.min() < 0:
            raise InputError("the graph has negative weights; pass allow_negative=True where they are meant")
        return graph
    if type(graph).__module__.partition(".")[0] == "torch":
        graph = _from_torch(graph)
    if hasattr(graph, "tocsr") and hasattr(graph, "nnz"):
        matrix = graph.tocsr(copy=True)
        matrix.sum_duplicates()
        return Graph.from_scipy(matrix, allow_negative=allow_negative)
    if isinstance(graph, tuple) and len(graph) in (2, 3):
        return Graph.from_edges(*graph, allow_negative=allow_negative)
    if isinstance(graph, np.ndarray) and graph.ndim == 2 and graph.shape[1] == 2:
        return Graph.from_edges(graph[:, 0], graph[:, 1])
    shape = f" of shape {graph.shape}" if hasattr(graph, "shape") else ""
    raise InputError(
        f"a {type(graph).__name__}{shape} is no graph; give a Graph, a scipy or torch sparse matrix, edges [E, 2], or a tuple"
        " (source, target) or (source, target, weight)"
    )


def _from_torch(tensor: Any) -> Any:
    """The scipy matrix of a torch sparse tensor."""
    import torch
    from scipy.sparse import coo_array, csr_array

    if tensor.layout == torch.sparse_csr:
        parts = (tensor.values(), tensor.col_indices(), tensor.crow_indices())
        return csr_array(tuple(part.detach().cpu().numpy() for part in parts), shape=tuple(tensor.shape))
    if tensor.layout == torch.sparse_coo:
        tensor = tensor.detach().cpu().coalesce()
        return coo_array((tensor.values().numpy(), tuple(tensor.indices().numpy())), shape=tuple(tensor.shape))
    raise InputError(
        f"a torch tensor of layout {tensor.layout} is no graph; give one of torch.sparse_csr or torch.sparse_coo"
    )
