"""Hypothesis strategies for graphs and lists of edges, shared by the tests of `anabranch.graph`."""

from hypothesis import strategies as st

from anabranch.graph import Graph

EXACT = st.sampled_from([0.25, 0.5, 1.0, 3.0])  # sums of these are exact


@st.composite
def edge_lists(draw, weighted=None, max_nodes=9, max_edges=25):
    """source, target, weight or None, and a number of nodes that may leave some without edges."""
    num_nodes = draw(st.integers(1, max_nodes))
    node = st.integers(0, num_nodes - 1)
    ends = draw(st.lists(st.tuples(node, node), max_size=max_edges))
    is_weighted = draw(st.booleans()) if weighted is None else weighted
    weight = draw(st.lists(EXACT, min_size=len(ends), max_size=len(ends))) if is_weighted else None
    return [u for u, _ in ends], [v for _, v in ends], weight, num_nodes


@st.composite
def graphs(draw, directed=None, weighted=None, named=None):
    """Small graphs with loops, duplicates, isolated nodes, and no, numeric or text names."""
    source, target, weight, num_nodes = draw(edge_lists(weighted))
    numbers, text = [10 * n + 3 for n in range(num_nodes)], [f"node {n}" for n in range(num_nodes)]
    names = draw(st.sampled_from([None, numbers, text])) if named is None else (text if named else None)
    is_directed = draw(st.booleans()) if directed is None else directed
    return Graph.from_edges(source, target, weight, is_directed, num_nodes, names=names)
