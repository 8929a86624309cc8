"""Other ways to personalised PageRank, each at its best: what it may have beforehand, what it prepares once, and one query.

A peer gets the graph in its own form (a matrix, its own graph object), which is not timed. ``prepare`` is what it does once for any number
of queries, which is. A query is then asked for at the loosest of its settings that keeps the error.

    fast-pagerank, igraph, networkx, scikit-network    their own calls, which prepare within each
    scipy power        x <- c P' x + alpha s, as lean as scipy lets it be; `Block` is the same for many sources at once
    scipy splu         I - c P' factored once (SuperLU, minimum degree, no pivoting: the matrix is an M-matrix)
    CHOLMOD            D - c W factored once, undirected graphs; where scikit-sparse is installed
    NetworKit          its approximate PageRank (push), by the lazy walk's alpha; graphs without loops, which it counts twice
    PyG get_ppr        PyTorch Geometric's push, graphs without weights

Factors of dense graphs are dense too, and are left out where edges a node are more than `FILLS`: they take minutes and gigabytes, and
a query from them reads more than all edges several times.
"""
# Shapes: N nodes, B sources at once

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import csc_array, csr_array, csr_matrix, diags_array

from anabranch.graph import Graph

Scores = Callable[[int], np.ndarray]
TOLERANCES = [10.0**-power for power in range(1, 15)]
PACKAGES = {
    "fast-pagerank": "fast_pagerank",
    "igraph": "igraph",
    "networkx": "networkx",
    "scikit-network": "sknetwork",
    "networkit": "networkit",
    "torch-geometric": "torch_geometric",
    "scikit-sparse": "sksparse",
}

# Stored edges a node.
FILLS = 30

# Processor seconds of a query, beyond which a peer cannot win.
SLOW_S = 0.5


class Peer(NamedTuple):
    """One contestant on one graph.

    Attributes:
        name: it goes by.
        prepare: what it does once, and gives to ``query``.
        query: of what is prepared and a tolerance, dense scores of a node.
    """

    name: str
    prepare: Callable[[], Any]
    query: Callable[[Any, float], Scores]


def installed() -> list[str]:
    """Packages of peers that are there; the others are named."""
    there = [name for name, module in PACKAGES.items() if importlib.util.find_spec(module)]
    if missing := [name for name in PACKAGES if name not in there]:
        print(f"not installed, left out: {', '.join(missing)}", file=sys.stderr)
    return there


def peers(graph: Graph, alpha: float) -> Iterator[Peer]:
    """All that are installed and can take the graph."""
    there = {name for name, module in PACKAGES.items() if importlib.util.find_spec(module)}
    if "fast-pagerank" in there:
        yield fast_pagerank(graph, alpha)
    if "igraph" in there:
        yield igraph(graph, alpha)
    if "networkx" in there:
        yield networkx(graph, alpha)
    if "scikit-network" in there:
        yield from scikit_network(graph, alpha)
    yield scipy_power(graph, alpha)
    if len(graph.indices) <= FILLS * graph.num_nodes:
        yield splu(graph, alpha)
    if "scikit-sparse" in there and not graph.is_directed and len(graph.indices) <= FILLS * graph.num_nodes:
        yield cholmod(graph, alpha)
    if "networkit" in there and not graph.num_self_loops:
        yield networkit(graph, alpha)
    if "torch-geometric" in there and graph.weights is None:
        yield geometric(graph, alpha)


def accurate(peer: Peer, prepared: Any, truth: dict[int, np.ndarray], error: float) -> tuple[Scores, float] | None:
    """Its scores at the loosest tolerance that keeps within ``error`` at every source, and that; None, and it is said, where none does."""
    peer.query(prepared, TOLERANCES[0])(next(iter(truth)))  # compiles what it compiles
    for tol in TOLERANCES:
        scores, is_good = peer.query(prepared, tol), True
        for node, truth_N in truth.items():
            begin = time.process_time()
            is_good = is_good and float(np.abs(scores(node) - truth_N).sum()) <= error
            if time.process_time() - begin > SLOW_S:
                print(f"{peer.name}: more than {SLOW_S} s a query at a tolerance of {tol:g}, left out", file=sys.stderr)
                return None
            if not is_good:
                break
        if is_good:
            return scores, tol
    print(f"{peer.name}: no tolerance gives an error of {error:g}", file=sys.stderr)
    return None


def nothing() -> None:
    """What most peers prepare."""


def transition(graph: Graph, dtype: Any = np.float64) -> csr_array:
    """P', rows by target; columns of nodes without edges are empty."""
    weights, strength_N = graph.to_scipy(np.float64), graph.strength_N
    inverse_N = np.divide(1.0, strength_N, out=np.zeros(len(strength_N)), where=strength_N > 0)
    return csr_array((diags_array(inverse_N) @ weights).T).astype(dtype)


def fast_pagerank(graph: Graph, alpha: float) -> Peer:
    """Power iteration in numpy and scipy."""
    from fast_pagerank import pagerank_power

    matrix = csr_matrix(graph.to_scipy(np.float64))

    def query(_: Any, tol: float) -> Scores:
        def scores(node: int) -> np.ndarray:
            start_N = np.zeros(graph.num_nodes)
            start_N[node] = 1
            return pagerank_power(matrix, p=1 - alpha, personalize=start_N, tol=tol)

        return scores

    return Peer("fast-pagerank", nothing, query)


def igraph(graph: Graph, alpha: float) -> Peer:
    """PRPACK, exact: it has no tolerance."""
    import igraph as library

    # It counts a loop of an undirected graph twice; in both directions, every edge counts as stored.
    one_way = graph.is_directed or graph.num_self_loops > 0
    source, target, weight = graph.edges()
    if one_way:
        source = np.repeat(np.arange(graph.num_nodes), graph.degree_N)
        target, weight = graph.indices, graph.weights
    made = library.Graph(graph.num_nodes, np.stack([source, target], 1), directed=one_way)
    if weight is not None:
        made.es["weight"] = weight.tolist()
    name = None if weight is None else "weight"

    def scores(node: int) -> np.ndarray:
        return np.array(made.personalized_pagerank(damping=1 - alpha, reset_vertices=[node], weights=name))

    return Peer("igraph", nothing, lambda _, tol: scores)


def networkx(graph: Graph, alpha: float) -> Peer:
    """Power iteration in scipy, from and to dictionaries."""
    import networkx as library

    kind = library.DiGraph if graph.is_directed else library.Graph
    drawn = library.from_scipy_sparse_array(csr_matrix(graph.to_scipy(np.float64)), create_using=kind)

    def query(_: Any, tol: float) -> Scores:
        def scores(node: int) -> np.ndarray:
            found = library.pagerank(drawn, 1 - alpha, {node: 1.0}, max_iter=500, tol=tol / graph.num_nodes)
            return np.fromiter(found.values(), np.float64, graph.num_nodes)

        return scores

    return Peer("networkx", nothing, query)


def scikit_network(graph: Graph, alpha: float) -> Iterator[Peer]:
    """Each of its solvers."""
    from sknetwork.ranking import PageRank

    matrix = csr_matrix(graph.to_scipy(np.float64))
    for solver in ("piteration", "diteration", "bicgstab", "lanczos", "RH"):

        def query(_: Any, tol: float, solver: str = solver) -> Scores:
            ranking = PageRank(1 - alpha, solver, n_iter=500, tol=tol)
            return lambda node: ranking.fit_predict(matrix, weights={node: 1.0})

        yield Peer(f"scikit-network, {solver}", nothing, query)


def scipy_power(graph: Graph, alpha: float) -> Peer:
    """One source at a time; the number of rounds is what the tolerance says of walks that are still under way."""

    def query(matrix: csr_array, tol: float) -> Scores:
        rounds = int(np.ceil(np.log(tol) / np.log(1 - alpha)))

        def scores(node: int) -> np.ndarray:
            score_N = np.zeros(graph.num_nodes)
            score_N[node] = 1
            for _ in range(rounds):
                score_N = matrix @ score_N
                score_N[node] += alpha
            return score_N

        return scores

    return Peer("scipy power", lambda: (1 - alpha) * transition(graph), query)


def splu(graph: Graph, alpha: float) -> Peer:
    """Exact, from factors of the system that is symmetric in its pattern."""
    from scipy.sparse.linalg import splu as factor

    strength_N = np.where(graph.strength_N > 0, graph.strength_N, 1.0)
    weights = graph.to_scipy(np.float64)

    def prepare() -> Any:
        system = csc_array(diags_array(strength_N) - (1 - alpha) * weights.T)
        return factor(
            system, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0, options={"SymmetricMode": not graph.is_directed}
        )

    def query(factors: Any, tol: float) -> Scores:
        def scores(node: int) -> np.ndarray:
            right_N = np.zeros(graph.num_nodes)
            right_N[node] = alpha
            return strength_N * factors.solve(right_N)

        return scores

    return Peer("scipy splu", prepare, query)


def cholmod(graph: Graph, alpha: float) -> Peer:
    """Exact, by CHOLMOD's supernodes or its simple columns, whichever it thinks better."""
    strength_N = np.where(graph.strength_N > 0, graph.strength_N, 1.0)
    weights = graph.to_scipy(np.float64)

    def prepare() -> Any:
        return _cholesky(csc_array(diags_array(strength_N) - (1 - alpha) * weights))

    def query(solve: Callable[[np.ndarray], np.ndarray], tol: float) -> Scores:
        def scores(node: int) -> np.ndarray:
            right_N = np.zeros(graph.num_nodes)
            right_N[node] = alpha
            return strength_N * solve(right_N)

        return scores

    return Peer("CHOLMOD", prepare, query)


def _cholesky(system: Any) -> Callable[[np.ndarray], np.ndarray]:
    from sksparse import cholmod as library

    if hasattr(library, "cho_factor"):
        return library.cho_factor(system).solve
    return library.cholesky(system)


def networkit(graph: Graph, alpha: float) -> Peer:
    """Push of the lazy walk, which stays where it is half of the time: its alpha is alpha / (2 - alpha) of ours."""
    import networkit as library

    library.setNumberOfThreads(1)
    source, target, weight = graph.edges()
    made = library.Graph(graph.num_nodes, weighted=weight is not None, directed=graph.is_directed)
    for place, (u, v) in enumerate(zip(source.tolist(), target.tolist(), strict=True)):
        made.addEdge(u, v, *([] if weight is None else [float(weight[place])]))

    def query(_: Any, tol: float) -> Scores:
        push = library.scd.ApproximatePageRank(made, alpha / (2 - alpha), tol / max(len(graph.indices), 1))

        def scores(node: int) -> np.ndarray:
            found_N = np.zeros(graph.num_nodes)
            pairs = push.run(node)
            ids, values = zip(*pairs, strict=True)
            found_N[list(ids)] = values
            return found_N

        return scores

    return Peer("NetworKit", nothing, query)


def geometric(graph: Graph, alpha: float) -> Peer:
    """``torch_geometric.utils.get_ppr``, compiled by numba; a residual of ``eps`` a degree is left."""
    import torch
    from torch_geometric.utils import get_ppr

    source = np.repeat(np.arange(graph.num_nodes), graph.degree_N)
    edges = torch.from_numpy(np.stack([source, graph.indices.astype(np.int64)]))

    def query(_: Any, tol: float) -> Scores:
        eps = tol / max(len(graph.indices), 1)

        def scores(node: int) -> np.ndarray:
            index, value = get_ppr(edges, alpha, eps, torch.tensor([node]), graph.num_nodes)
            found_N = np.zeros(graph.num_nodes)
            found_N[index[1].numpy()] = value.numpy()
            return found_N

        return scores

    return Peer("PyG get_ppr", nothing, query)


class Block:
    """Scipy with many right-hand sides: one product with a dense block a round, ``width`` sources at once.

    Args:
        graph: the graph.
        alpha: probability to end a walk.
        dtype: float32 where the error allows it, else float64.
        width: B.
    """

    def __init__(self, graph: Graph, alpha: float, dtype: Any, width: int) -> None:
        self.matrix = ((1 - alpha) * transition(graph, np.float64)).astype(dtype)
        self.alpha, self.dtype, self.width, self.num_nodes = alpha, dtype, width, graph.num_nodes

    def scores(self, nodes: np.ndarray, rounds: int) -> Iterator[np.ndarray]:
        """Dense scores [N, B], block after block; the start itself counts as no round."""
        for first in range(0, len(nodes), self.width):
            chosen = nodes[first : first + self.width]
            column = np.arange(len(chosen))
            score_NB = np.zeros((self.num_nodes, len(chosen)), self.dtype)
            score_NB[chosen, column] = 1
            for _ in range(rounds):
                score_NB = self.matrix @ score_NB
                score_NB[chosen, column] += self.dtype(self.alpha)
            yield score_NB

    def rounds_for(self, nodes: np.ndarray, exact_SN: np.ndarray, error: float) -> int | None:
        """The fewest rounds with a mean L1 error of at most ``error`` at these sources; None where rounding stands against it."""
        for rounds in range(1, 400):
            found_SN = np.concatenate([score_NB.T for score_NB in self.scores(nodes, rounds)])
            if np.abs(found_SN - exact_SN).sum(1).mean() <= error:
                return rounds
        return None
