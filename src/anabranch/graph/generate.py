"""Random graphs of known shape, for tests, benchmarks and tries at any size; one seed is one graph.

    rmat(scale=20, num_edges=20_000_000, seed=0)

- `rmat`: R-MAT ("R-MAT: a recursive model for graph mining", Chakrabarti, Zhan and Faloutsos, SDM 2004), the generator of Graph500
- `power_law`: expected degrees of a power law ("The average distances in random graphs with given expected degrees", Chung and Lu, PNAS
  2002), ends drawn by weight; `planted` adds communities to it
- `barabasi_albert`: preferential attachment ("Emergence of scaling in random networks", Barabasi and Albert, Science 1999)
- `erdos_renyi`: every edge with one probability (Gilbert, 1959), by skips over the edges left out (Batagelj and Brandes, 2005)
- `random_regular`: stubs paired at random, loops and doubles left out
- `star`, `hubs`: a few nodes joined to all

Departures: drawn edges that fall together are one edge, so `rmat`, `power_law` and `planted` have somewhat fewer than are asked for;
R-MAT's ids are shuffled (`shuffle=False` leaves them), as Graph500 does. All graphs are without weights; `random_weights` gives some.
Randomness is that of `anabranch.graph.random`, keyed by (seed, edge) or (seed, node);
one stream draws `barabasi_albert` and the orders that shuffle.
"""
# Shapes: N nodes, E edges drawn, C communities

from typing import Any

import numba as nb
import numpy as np

from anabranch.errors import InputError
from anabranch.graph import csr
from anabranch.graph.alias import build_alias, pick
from anabranch.graph.coerce import as_graph
from anabranch.graph.random import mix, next_bits, stream, to_unit
from anabranch.graph.store import Graph


def rmat(
    scale: int,
    num_edges: int,
    *,
    probabilities: tuple[float, float, float, float] = (0.57, 0.19, 0.19, 0.05),
    directed: bool = False,
    shuffle: bool = True,
    seed: int = 0,
) -> Graph:
    """R-MAT: each edge falls, ``scale`` times, into a quarter of the matrix.

    Args:
        scale: there are 2**scale nodes, up to 2**31.
        num_edges: edges drawn; those that fall together are one.
        probabilities: of the quarters (low, low), (low, high), (high, low), (high, high). Default: Graph500's.
        directed: whether (u, v) differs from (v, u).
        shuffle: give nodes random ids, so that a hub may be anywhere.
        seed: of everything.

    Raises:
        InputError: an argument out of range.
    """
    _at_least(scale=(scale, 0), num_edges=(num_edges, 0))
    if scale > 31:
        raise InputError(f"scale is {scale}; it must be at most 31")
    if len(probabilities) != 4 or min(probabilities) < 0 or not np.isclose(sum(probabilities), 1):
        raise InputError(f"probabilities are {probabilities}; they must be four, not negative, that add up to 1")
    a, b, c, _ = probabilities
    cuts = np.array([a, a + b, a + b + c])
    source_E, target_E = np.empty(num_edges, np.int32), np.empty(num_edges, np.int32)
    _draw_rmat(_seed(seed), scale, cuts, source_E, target_E)
    if shuffle:
        new_id_N = _shuffled(_seed(seed), 1 << scale).astype(np.int32)
        source_E, target_E = new_id_N[source_E], new_id_N[target_E]
    return Graph.from_edges(source_E, target_E, None, directed, 1 << scale)


def power_law(
    num_nodes: int,
    num_edges: int,
    *,
    exponent: float = 2.5,
    max_degree: float | None = None,
    directed: bool = False,
    seed: int = 0,
) -> Graph:
    """Chung-Lu: both ends of each edge drawn by weight, node i's falling as (i + i0) ** (-1 / (exponent - 1)); node 0 is the largest hub.

    Args:
        num_nodes: N.
        num_edges: edges drawn; loops are left out, and those that fall together are one.
        exponent: of the degree distribution, above 2.
        max_degree: expected degree of node 0, which fixes i0. Default: sqrt(N x mean degree), where few edges fall together.
        directed: whether (u, v) differs from (v, u).
        seed: of everything.

    Raises:
        InputError: an argument out of range.
    """
    return planted(num_nodes, num_edges, 1, exponent=exponent, max_degree=max_degree, directed=directed, seed=seed)[0]


def planted(
    num_nodes: int,
    num_edges: int,
    num_communities: int,
    *,
    mixing: float = 0.1,
    exponent: float = 2.5,
    max_degree: float | None = None,
    directed: bool = False,
    seed: int = 0,
) -> tuple[Graph, np.ndarray]:
    """`power_law` with communities: an edge ends in its source's community, except for a share ``mixing`` that ends anywhere.

    Args:
        num_nodes: N.
        num_edges: edges drawn.
        num_communities: C, of about N / C random nodes each.
        mixing: the share of edges that do not care, 0 to 1 (some of those fall into the community all the same).
        exponent, max_degree, directed, seed: as in `power_law`.

    Returns:
        The graph, and int32 [N], each node's community.

    Raises:
        InputError: an argument out of range.
    """
    _at_least(num_nodes=(num_nodes, 1), num_edges=(num_edges, 0), num_communities=(num_communities, 1))
    if num_communities > num_nodes:
        raise InputError(f"num_communities is {num_communities}; it must be at most {num_nodes}, the nodes")
    if not 0 <= mixing <= 1:
        raise InputError(f"mixing is {mixing}; it must be 0 to 1")
    if not exponent > 2:
        raise InputError(f"exponent is {exponent}; it must be above 2, or the mean degree has no limit")
    weight_N = _falling(num_nodes, num_edges, exponent, max_degree)
    community_N = (_shuffled(_seed(seed), num_nodes) % num_communities).astype(np.int32)
    # Nodes by community: tables of all communities lie one after another.
    order_N = np.argsort(community_N, kind="stable")
    start_C = np.concatenate([[0], np.cumsum(np.bincount(community_N, minlength=num_communities))])
    everyone = build_alias(np.array([0, num_nodes]), weight_N)
    inside = build_alias(start_C, weight_N[order_N])
    source_E, target_E = np.empty(num_edges, np.int64), np.empty(num_edges, np.int64)
    _draw_planted(
        _seed(seed),
        1.0 if num_communities == 1 else mixing,
        community_N,
        order_N,
        start_C,
        everyone.keep_M,
        everyone.other_M,
        inside.keep_M,
        inside.other_M,
        source_E,
        target_E,
    )
    kept = source_E != target_E
    return Graph.from_edges(source_E[kept], target_E[kept], None, directed, num_nodes), community_N


def _falling(num_nodes: int, num_edges: int, exponent: float, max_degree: float | None) -> np.ndarray:
    """float64 [N], expected degrees that fall as a power law, node 0's being ``max_degree`` (found by halving an interval of i0)."""
    mean = 2 * num_edges / num_nodes
    top = np.sqrt(num_nodes * max(mean, 1.0)) if max_degree is None else float(max_degree)
    if not top > 0:
        raise InputError(f"max_degree is {max_degree}; it must be above 0")
    power, number_N = -1 / (exponent - 1), np.arange(num_nodes, dtype=np.float64)
    low, high = 1e-9, 1e3 * num_nodes
    for _ in range(100):
        offset = np.sqrt(low * high)
        weight_N = ((number_N + offset) / offset) ** power  # node 0 has 1
        if 2 * num_edges / weight_N.sum() > top:
            low = offset
        else:
            high = offset
    return weight_N


def barabasi_albert(num_nodes: int, edges_each: int, seed: int = 0) -> Graph:
    """Preferential attachment: nodes come one by one, each with ``edges_each`` edges to distinct nodes that are there, drawn by degree.

    A graph of ``edges_each`` * (``num_nodes`` - ``edges_each``) edges, undirected, without weights or self-loops. The first node that comes
    with edges has them to all of the ``edges_each`` nodes before it.

    Raises:
        InputError: unless 1 <= edges_each < num_nodes.
    """
    _at_least(num_nodes=(num_nodes, 0))
    if not isinstance(edges_each, (int, np.integer)) or not 1 <= edges_each < num_nodes:
        raise InputError(f"edges_each is {edges_each}; it must be 1 to {num_nodes - 1}, below the number of nodes")
    ids = csr.id_type(num_nodes, 2 * num_nodes * edges_each)
    end_E2 = np.empty((edges_each * (num_nodes - edges_each), 2), ids)
    _attach(end_E2, edges_each, _seed(seed))
    return Graph.from_edges(end_E2[:, 0], end_E2[:, 1], num_nodes=num_nodes)


def erdos_renyi(num_nodes: int, mean_degree: float, *, directed: bool = False, seed: int = 0) -> Graph:
    """Every edge (no loops) with the probability mean_degree / (N - 1); ``mean_degree`` is of out-edges where directed.

    Raises:
        InputError: a mean degree below 0 or above N - 1.
    """
    _at_least(num_nodes=(num_nodes, 1))
    if not 0 <= mean_degree <= max(num_nodes - 1, 0):
        raise InputError(f"mean_degree is {mean_degree}; it must be 0 to {num_nodes - 1}")
    if mean_degree == 0:
        return Graph.from_edges([], [], None, directed, num_nodes)
    probability = mean_degree / (num_nodes - 1)
    count_N = np.zeros(num_nodes, np.int64)
    none = np.empty(0, np.int64)
    _skip(_seed(seed), num_nodes, probability, directed, count_N, none, none, True)
    place_N = np.concatenate([[0], np.cumsum(count_N)])
    source_E, target_E = np.empty(place_N[-1], np.int64), np.empty(place_N[-1], np.int64)
    _skip(_seed(seed), num_nodes, probability, directed, place_N[:-1], source_E, target_E, False)
    return Graph.from_edges(source_E, target_E, None, directed, num_nodes)


def random_regular(num_nodes: int, degree: int, *, seed: int = 0) -> Graph:
    """``degree`` stubs at every node, paired at random; loops and doubles are left out, so a few nodes have less. Undirected.

    Raises:
        InputError: N x degree is odd, or an argument out of range.
    """
    _at_least(num_nodes=(num_nodes, 1), degree=(degree, 0))
    if degree >= num_nodes:
        raise InputError(f"degree is {degree}; it must be at most {num_nodes - 1}")
    if num_nodes * degree % 2:
        raise InputError(f"num_nodes x degree is {num_nodes} x {degree}, which is odd; an edge has two ends")
    stubs = _shuffled(_seed(seed), num_nodes * degree) // max(degree, 1)
    source_E, target_E = stubs[0::2], stubs[1::2]
    kept = source_E != target_E
    return Graph.from_edges(source_E[kept], target_E[kept], None, False, num_nodes)


def star(num_leaves: int, *, directed: bool = False) -> Graph:
    """Node 0 joined to each of the others; directed, every leaf points to it."""
    _at_least(num_leaves=(num_leaves, 0))
    return Graph.from_edges(
        np.arange(1, num_leaves + 1), np.zeros(num_leaves, np.int64), None, directed, num_leaves + 1
    )


def hubs(num_nodes: int, num_hubs: int, *, mean_degree: float = 0.0, seed: int = 0) -> Graph:
    """The first ``num_hubs`` nodes joined to every node, on top of `erdos_renyi` edges. Undirected."""
    _at_least(num_nodes=(num_nodes, 1), num_hubs=(num_hubs, 0))
    if num_hubs > num_nodes:
        raise InputError(f"num_hubs is {num_hubs}; it must be at most {num_nodes}, the nodes")
    source_E, target_E, _ = erdos_renyi(num_nodes, mean_degree, seed=seed).edges()
    hub_E, other_E = (array.ravel() for array in np.divmod(np.arange(num_hubs * num_nodes), num_nodes))
    kept = hub_E < other_E
    return Graph.from_edges(
        np.append(source_E, hub_E[kept]), np.append(target_E, other_E[kept]), None, False, num_nodes
    )


def random_weights(graph: Any, low: float = 0.0, high: float = 1.0, *, seed: int = 0) -> Graph:
    """The graph (whatever `as_graph` takes) with weights uniform in (low, high], the same in both directions of an undirected edge.

    Raises:
        InputError: bounds that are not 0 <= low < high.
    """
    if not 0 <= low < high < np.inf:
        raise InputError(f"low is {low} and high is {high}; they must be 0 <= low < high")
    graph = as_graph(graph, allow_negative=True)
    weights = np.empty(len(graph.indices), np.float32)
    _draw_weights(_seed(seed), graph.indptr, graph.indices, graph.is_directed, low, high, weights)
    return graph.with_weights(weights)


def _seed(seed: int) -> np.uint64:
    """Any whole number as a key of streams."""
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)):
        raise InputError(f"seed is {seed!r}; it must be a whole number")
    return np.uint64(int(seed) & 0xFFFFFFFFFFFFFFFF)


def _at_least(**named: tuple[int, int]) -> None:
    for name, (value, least) in named.items():
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
            raise InputError(f"{name} is {value!r}; it must be a whole number, at least {least}")


@nb.njit(cache=True, nogil=True)
def _shuffled(seed, count):
    """0 ... count - 1 in random order (Fisher and Yates)."""
    order = np.arange(count)
    # No edge and no node has this key.
    state = stream(seed, -1)
    for last in range(count - 1, 0, -1):
        state, bits = next_bits(state)
        other = np.int64(to_unit(bits) * (last + 1))
        order[last], order[other] = order[other], order[last]
    return order


@nb.njit(cache=True, nogil=True)
def _draw_rmat(seed, scale, cuts, source_E, target_E):
    for edge in range(len(source_E)):
        state = stream(seed, edge)
        source, target = 0, 0
        for _ in range(scale):
            state, bits = next_bits(state)
            at = to_unit(bits)
            down, right = at >= cuts[1], (cuts[0] <= at < cuts[1]) or at >= cuts[2]
            source, target = 2 * source + down, 2 * target + right
        source_E[edge], target_E[edge] = source, target


@nb.njit(cache=True, nogil=True)
def _draw_planted(
    seed, mixing, community_N, order_N, start_C, keep_N, other_N, inside_N, inside_other_N, source_E, target_E
):
    for edge in range(len(source_E)):
        state, bits = next_bits(stream(seed, edge))
        source = pick(bits, 0, len(keep_N), keep_N, other_N)
        state, bits = next_bits(state)
        is_anywhere = mixing >= 1.0 or to_unit(bits) < mixing
        state, bits = next_bits(state)
        if is_anywhere:
            target = pick(bits, 0, len(keep_N), keep_N, other_N)
        else:
            first = start_C[community_N[source]]
            size = start_C[community_N[source] + 1] - first
            target = order_N[pick(bits, first, size, inside_N, inside_other_N)]
        source_E[edge], target_E[edge] = source, target


@nb.njit(cache=True, nogil=True)
def _attach(end_E2, edges_each, seed):
    state = mix(seed)
    filled = 0
    for node in range(edges_each, edges_each + len(end_E2) // edges_each):
        first = filled
        for place in range(edges_each):
            # Of the first node: all before it.
            target = place
            is_new = first == 0
            while not is_new:
                state, bits = next_bits(state)
                # An end of an earlier edge: in proportion to degrees.
                draw = np.int64(bits % np.uint64(2 * first))
                target = end_E2[draw >> 1, draw & 1]
                is_new = True
                for before in range(first, filled):
                    is_new = is_new and end_E2[before, 1] != target
            end_E2[filled, 0], end_E2[filled, 1] = node, target
            filled += 1


@nb.njit(cache=True, nogil=True)
def _skip(seed, num_nodes, probability, directed, place_N, source_E, target_E, count_only):
    scale = np.log1p(-probability) if probability < 1 else -np.inf
    for node in range(num_nodes):
        state = stream(seed, node)
        place, other = place_N[node], np.int64(-1 if directed else node)
        while True:
            state, bits = next_bits(state)
            skip = np.log(1.0 - to_unit(bits)) / scale if probability < 1 else 0.0
            if skip >= num_nodes - other:
                break
            other += 1 + np.int64(skip)
            if other >= num_nodes:
                break
            if other != node:
                if not count_only:
                    source_E[place], target_E[place] = node, other
                place += 1
        place_N[node] = place


@nb.njit(cache=True, nogil=True)
def _draw_weights(seed, indptr, indices, directed, low, high, weights):
    for node in range(len(indptr) - 1):
        for place in range(indptr[node], indptr[node + 1]):
            other = indices[place]
            first, second = (node, other) if directed or node < other else (other, node)
            _, bits = next_bits(stream(seed, first, second))
            weights[place] = max(np.float32(high - (high - low) * to_unit(bits)), np.float32(1e-38))
