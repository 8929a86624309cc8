"""About how long exact solutions and decompositions take on a graph, for the choice between them alone.

By counts of what each of them does, and nanoseconds of one core of a shared machine (the record of benchmarks/fully_ppr): they tell what
is much quicker, not how long it takes. They depend on the graph and on what is asked for, never on threads, memory or clocks.
"""
# Shapes: N nodes, M stored edges, S sources, L components

import math

import numpy as np

from anabranch.graph.ppr.blocks import LARGE as LARGE_COMPONENT
from anabranch.graph.ppr.blocks import LOOKS, MOST_ROUNDS, SLACK, Blocks
from anabranch.graph.ppr.factor import may_gain, prepare
from anabranch.graph.ppr.pagerank import LARGE
from anabranch.graph.ppr.rules import Transition
from anabranch.graph.projection import BLOCK
from anabranch.graph.store import Graph

# A step of a walk of the index; an edge that a decomposition follows; an entry of the index that it adds up.
STEP_NS, FLOW_NS, ENTRY_NS = 80.0, 5.0, 1.2
# Of one source in a block of them, each round: an edge, and a node. Of one by itself, each pass: an edge, with its share of nodes.
BLOCK_EDGE_NS, BLOCK_NODE_NS, EDGE_NS = 0.1, 3.0, 1.0
# Of a vector that is solved: a node, in all that is done once with it; an entry of rows that were eliminated.
NODE_NS, ROW_NS = 5.0, 2.0
# An edge or node in a trial to eliminate; where there is none, in an order by degree.
TRIAL_NS, ORDER_NS = 500.0, 10.0

# Passes of conjugate gradients, and of BiCGSTAB, over rounds of Chebyshev's iteration.
SYMMETRIC_PASSES, DIRECTED_PASSES = 0.5, 1.0

# Nodes from which is looked how far rounds of decomposition reach.
SAMPLE = 32


def is_exact_quicker(
    transition: Transition, tol: float, walks: int, rounds: int, num_sources: int | None = None
) -> bool:
    """Whether exact solutions of so many sources (all of them: None) take less time than an index and decompositions.

    Whether eliminating nodes is worth it is known when it was tried, and it is tried where the answer lies on it.
    """
    graph = transition.graph
    sources = max(graph.num_nodes if num_sources is None else num_sources, 1)
    decomposed = decompose_ns(graph, walks, transition.alpha, rounds, sources)
    if decomposed < NODE_NS * graph.num_nodes:
        return False
    whole = whole_ns(transition, tol, sources)
    if whole <= decomposed or len(graph.indices) > LARGE:
        return whole <= decomposed
    return eliminated_ns(transition, tol, sources) <= decomposed


def decompose_ns(graph: Graph, walks: int, alpha: float, rounds: int, num_sources: int) -> float:
    """Nanoseconds of one source's share of an index of all nodes, and of one decomposition, about.

    A decomposition follows flows for some rounds, and adds up the rows of the index of the nodes that it then is at: a few dozen nodes of a
    sparse graph, nearly all nodes of a dense one, where this is most of the work.
    """
    size, steps = graph.num_nodes, walks / alpha
    edges, reached = reach_of(graph, rounds)
    index = STEP_NS * steps * size / max(num_sources, 1)
    return index + FLOW_NS * edges + ENTRY_NS * reached * min(size, steps)


def reach_of(graph: Graph, rounds: int) -> tuple[float, float]:
    """Edges that flows from one node follow in so many rounds, and nodes they are at then: means over `SAMPLE` nodes."""
    size = graph.num_nodes
    sample = np.unique(np.linspace(0, size - 1, min(SAMPLE, size)).astype(np.int64)) if size else np.empty(0, np.int64)
    degree_N = np.diff(graph.indptr)
    edges = reached = 0
    for node in sample.tolist():
        # Two rounds ago, and now.
        before, here = None, np.array([node])
        for done in range(rounds):
            number = int(degree_N[here].sum())
            edges += number
            there, left = _next(graph, here, degree_N, number), rounds - done - 1
            if np.array_equal(there, here) or (before is not None and np.array_equal(there, before)):
                # And so in all rounds to come, or there and back again, as between the sides of a bipartite graph.
                edges += left // 2 * number + (left - left // 2) * int(degree_N[there].sum())
                here = here if left % 2 else there
                break
            before, here = here, there
        reached += len(here)
    return edges / max(len(sample), 1), reached / max(len(sample), 1)


def _next(graph: Graph, here: np.ndarray, degree_N: np.ndarray, number: int) -> np.ndarray:
    """Targets of all edges of some nodes, rising."""
    length = degree_N[here]
    place = np.arange(number) + np.repeat(graph.indptr[here] - np.cumsum(length) + length, length)
    is_there_N = np.zeros(graph.num_nodes, bool)
    is_there_N[graph.indices[place]] = True
    return np.flatnonzero(is_there_N)


def whole_ns(transition: Transition, tol: float, num_sources: int) -> float:
    """Nanoseconds of one source's exact solution where nothing is eliminated, and of its share of what is made once, about."""
    graph = transition.graph
    size, edges = graph.num_nodes, len(graph.indices)
    if not Blocks.suits(transition, tol):
        return (
            _trial_ns(transition) / num_sources + NODE_NS * size + _passes(transition, tol) * EDGE_NS * (edges + size)
        )
    each = BLOCK_EDGE_NS * edges + BLOCK_NODE_NS * size
    # A block is as much work for one source as for all that it has room for.
    blocks = -(-num_sources // BLOCK) * BLOCK / num_sources
    once = (LOOKS * BLOCK * each + _trial_ns(transition)) / num_sources
    return once + blocks * each * rounds_of(reach_after(transition), tol) + NODE_NS * size


def eliminated_ns(transition: Transition, tol: float, num_sources: int) -> float:
    """As `whole_ns`, after a trial to eliminate: by what remains, or as a whole where the trial leaves it so."""
    factor = prepare(transition)
    if not len(factor.diagonal_P):
        return whole_ns(transition, tol, num_sources)
    graph, core = transition.graph, factor.core
    rows = len(factor.upper.indices) + len(factor.lower.indices)
    once = _trial_ns(transition) / num_sources
    entries = len(core.indices) + len(core.diagonal_C)
    return once + NODE_NS * graph.num_nodes + ROW_NS * rows + _passes(transition, tol) * EDGE_NS * entries


def _trial_ns(transition: Transition) -> float:
    """Of `anabranch.graph.ppr.factor.prepare`, which is not asked of a large graph."""
    graph = transition.graph
    if len(graph.indices) > LARGE:
        return 0.0
    return (TRIAL_NS if may_gain(transition) else ORDER_NS) * (len(graph.indices) + graph.num_nodes)


def _passes(transition: Transition, tol: float) -> float:
    """Of the Krylov method over edges."""
    share = DIRECTED_PASSES if transition.graph.is_directed else SYMMETRIC_PASSES
    return max(1.0, share * rounds_of(reach_after(transition), tol))


def rounds_of(reach: float, tol: float) -> float:
    """Rounds of Chebyshev's iteration to an error of ``tol`` where all other eigenvalues are at most ``reach``; at most `MOST_ROUNDS`."""
    fall = -math.log(reach / (1.0 + math.sqrt(1.0 - reach * reach))) if reach > 0.0 else math.inf
    wanted = max(-math.log(tol), 1.0)
    return MOST_ROUNDS if fall * MOST_ROUNDS <= wanted else max(1.0, wanted / fall)


def reach_after(transition: Transition) -> float:
    """1 - alpha times the second eigenvalue of a step within components, in size, by a few products; 1 - alpha for directed graphs."""
    graph, stay = transition.graph, 1.0 - transition.alpha
    if graph.is_directed or not len(graph.indices):
        return stay
    label_N = graph.components()
    strength_N = graph.strength_N.astype(np.float64)
    strength_L = np.bincount(label_N, strength_N)
    is_large_N = (np.bincount(label_N) >= LARGE_COMPONENT)[label_N] & (strength_N > 0)
    if not is_large_N.any():
        return stay
    matrix = graph.to_scipy(np.float64)
    inverse_N = np.divide(1.0, strength_N, out=np.zeros(len(strength_N)), where=strength_N > 0)
    safe_L = np.where(strength_L > 0, strength_L, 1.0)
    here_N = np.where(is_large_N, np.random.default_rng(0).standard_normal(graph.num_nodes), 0.0)
    grown = 0.0
    for look in range(LOOKS + 1):
        level_L = np.bincount(label_N, strength_N * here_N) / safe_L
        here_N = np.where(is_large_N, here_N - level_L[label_N], 0.0)
        grown = math.sqrt(float((strength_N * here_N * here_N).sum()))
        if not grown > 0.0:
            return min(SLACK, stay)
        here_N /= grown
        if look < LOOKS:
            here_N = inverse_N * (matrix @ here_N)
    return min(stay * grown + SLACK, stay)
