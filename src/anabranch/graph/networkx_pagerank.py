"""`networkx.pagerank` in compiled code: see `anabranch.graph.networkx_backend`."""
# Shapes: N nodes, E edges in each direction they lead, Z entries of the matrix

from dataclasses import dataclass, field
from typing import Any

import numba as nb
import numpy as np


@dataclass(frozen=True, eq=False)
class Matrix:
    """Transition probabilities by columns: what flows into each node.

    Attributes:
        indptr, sources, values: rows of in-edges; float64 values are the edge's weight over the sum of its source's.
        dangling: ids of nodes whose weights sum to 0.
    """

    indptr: np.ndarray
    sources: np.ndarray
    values: np.ndarray
    dangling: np.ndarray


@dataclass(eq=False)
class Converted:
    """A networkx graph as this backend keeps it.

    Attributes:
        nodes: as the graph has them, [N].
        source_E, target_E: int64 ids; an undirected edge stands both ways, a self-loop once, parallel ones each.
        attribute_E: float64 values of edge attributes that were asked for.
        source: the networkx graph itself.
    """

    nodes: list[Any]
    source_E: np.ndarray
    target_E: np.ndarray
    attribute_E: dict[Any, np.ndarray]
    source: Any
    _matrices: dict[Any, Matrix] = field(default_factory=dict)

    __networkx_backend__ = "anabranch"

    def is_directed(self) -> bool:
        """As networkx asks it."""
        return self.source.is_directed()

    def is_multigraph(self) -> bool:
        """As networkx asks it."""
        return self.source.is_multigraph()

    def __len__(self) -> int:
        return len(self.nodes)

    def matrix(self, weight: Any) -> Matrix:
        """Of an edge attribute, or of edges that all count 1 for None. Made once."""
        if weight not in self._matrices:
            if weight is not None and weight not in self.attribute_E:
                # Asked of a graph that was converted for another attribute.
                self.attribute_E |= convert(self.source, {weight: 1}, False).attribute_E
            value_E = np.ones(len(self.source_E)) if weight is None else self.attribute_E[weight]
            self._matrices[weight] = _matrix(len(self.nodes), self.source_E, self.target_E, value_E)
        return self._matrices[weight]


def convert(graph: Any, edge_attrs: dict[Any, Any], every: bool) -> Converted:
    """A networkx graph, with these edge attributes (and what edges count that lack them), or with ``every`` one that is a number."""
    nodes = list(graph)
    place = {node: number for number, node in enumerate(nodes)}
    edges = list(graph.edges(data=True))
    source = np.fromiter((place[u] for u, _, _ in edges), np.int64, len(edges))
    target = np.fromiter((place[v] for _, v, _ in edges), np.int64, len(edges))
    wanted = dict(edge_attrs)
    if every:
        wanted |= {name: 1 for _, _, facts in edges for name, value in facts.items() if isinstance(value, int | float)}
    # Both ways, but for loops.
    again = np.flatnonzero(source != target) if not graph.is_directed() else np.empty(0, np.int64)
    attributes = {}
    for name, default in wanted.items():
        try:
            value = np.fromiter((facts.get(name, default) for _, _, facts in edges), np.float64, len(edges))
        except (TypeError, ValueError):
            # Of those that nobody asked for, some are no numbers everywhere.
            if name in edge_attrs:
                raise
            continue
        attributes[name] = np.append(value, value[again])
    return Converted(nodes, np.append(source, target[again]), np.append(target, source[again]), attributes, graph)


def _matrix(num_nodes: int, source_E: np.ndarray, target_E: np.ndarray, value_E: np.ndarray) -> Matrix:
    from scipy.sparse import coo_array

    # Rows are targets; parallel edges are added up.
    entries = coo_array((value_E, (target_E, source_E)), shape=(num_nodes, num_nodes)).tocsr()
    sum_N = np.asarray(entries.sum(axis=0), np.float64)
    inverse_N = np.divide(1.0, sum_N, out=np.zeros(num_nodes), where=sum_N != 0)
    values = entries.data * inverse_N[entries.indices]
    dangling = np.flatnonzero(inverse_N == 0)
    return Matrix(entries.indptr.astype(np.int64), entries.indices.astype(np.int64), values, dangling)


def pagerank(
    graph: Converted,
    alpha: float = 0.85,
    personalization: dict[Any, float] | None = None,
    max_iter: int = 100,
    tol: float = 1.0e-6,
    nstart: dict[Any, float] | None = None,
    weight: Any = "weight",
    dangling: dict[Any, float] | None = None,
) -> dict[Any, float]:
    """PageRank of the nodes, as `networkx.pagerank` defines it.

    Args:
        graph: as converted.
        alpha: damping.
        personalization: where walks start over, by node; None for anywhere.
        max_iter: rounds.
        tol: rounds end when scores change by less than N tol in all.
        nstart: scores to start from, by node.
        weight: the edge attribute, or None.
        dangling: where walks go from nodes without out-edges; None for the personalization.

    Raises:
        ZeroDivisionError: a personalization of 0 in all. networkx.PowerIterationFailedConvergence: after ``max_iter`` rounds.
        TypeError: ``alpha`` or ``tol`` are no real numbers.
    """
    import networkx

    count = len(graph)
    if not count:
        return {}
    matrix, even_N = graph.matrix(weight), np.full(count, 1.0 / count)
    x_N = even_N if nstart is None else _shares(graph, nstart)
    start_N = even_N if personalization is None else _shares(graph, personalization, refused=True)
    dangling_N = start_N if dangling is None else _shares(graph, dangling)
    damping, most = _real("alpha", alpha), count * _real("tol", tol)
    for _ in range(max_iter):
        next_N = np.empty(count)
        change = _round(
            matrix.indptr,
            matrix.sources,
            matrix.values,
            matrix.dangling,
            dangling_N,
            start_N,
            damping,
            x_N,
            next_N,
        )
        x_N = next_N
        if change < most:
            return dict(zip(graph.nodes, x_N.tolist(), strict=True))
    raise networkx.PowerIterationFailedConvergence(max_iter)


def _shares(graph: Converted, values: dict[Any, float], refused: bool = False) -> np.ndarray:
    """float64 [N] that sums to 1 of values by node, 0 for those without; ZeroDivisionError if all are 0 and that is ``refused``."""
    found_N = np.array([values.get(node, 0) for node in graph.nodes], np.float64)
    if refused and found_N.sum() == 0:
        raise ZeroDivisionError
    return found_N / found_N.sum()


def _real(name: str, value: Any) -> float:
    """A number, also of numpy or as an array of one. Raises TypeError for others, as text that spells one: networkx raises it, too."""
    found = np.asarray(value)
    if isinstance(value, list | tuple) or found.size != 1 or found.dtype.kind not in "biuf":
        raise TypeError(f"{name} is {value!r:.80}; it must be a real number")
    return float(found.reshape(()))


@nb.njit(cache=True, nogil=True)
def _round(indptr, sources, values, dangling, dangling_N, start_N, alpha, x_N, next_N):
    """One round; by how much the scores change in all."""
    stuck = 0.0
    for place in range(len(dangling)):
        stuck += x_N[dangling[place]]
    change = 0.0
    for node in range(len(x_N)):
        total = 0.0
        for edge in range(indptr[node], indptr[node + 1]):
            total += x_N[sources[edge]] * values[edge]
        next_N[node] = alpha * (total + stuck * dangling_N[node]) + (1.0 - alpha) * start_N[node]
        change += abs(next_N[node] - x_N[node])
    return change
