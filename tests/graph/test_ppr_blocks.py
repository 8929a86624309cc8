import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.graph import Graph
from anabranch.graph.fully_ppr import fully_ppr
from anabranch.graph.ppr import PageRank, Transition, parse_seeds, power_iteration
from anabranch.graph.ppr.blocks import Blocks
from anabranch.graph.rows import SparseRows

ALPHA = 0.15


def undirected(seed, num_nodes=40, num_edges=70, weighted=True):
    """Several components, among them single edges and isolated nodes; self-loops."""
    generator = np.random.default_rng(seed)
    ends = generator.integers(0, num_nodes - 8, (2, num_edges))
    ends = np.append(ends, [[num_nodes - 8, num_nodes - 6], [num_nodes - 7, num_nodes - 6]], axis=1)
    weight = generator.lognormal(0, 1.5, ends.shape[1]) if weighted else None
    return Graph.from_edges(*ends, weight, num_nodes=num_nodes)


def dense_rows(blocks, graph, queries, top_k=None):
    found = SparseRows.from_rows(
        blocks.rows([parse_seeds(graph, seeds) for seeds in queries], top_k), graph.num_nodes, dtype=np.float64
    )
    return found.to_scipy().toarray()


@settings(max_examples=25)
@given(
    st.integers(0, 10_000),
    st.booleans(),
    st.sampled_from(["source", "absorb", "uniform"]),
    st.sampled_from([0.5, 1e-3, 1e-6, 1e-11]),
    st.floats(0.02, 0.9),
)
def test_every_query_keeps_its_promise(seed, weighted, dangling, tol, alpha):
    graph = undirected(seed, weighted=weighted)
    transition = Transition(graph, alpha, dangling)
    queries = [*range(0, 40, 3), 39, {1: 2.0, 38: 1.0, 33: 0.5}, [2, 34]]
    assert Blocks.suits(transition, tol)
    found = dense_rows(Blocks(transition, tol), graph, queries)
    for seeds, score_N in zip(queries, found, strict=True):
        assert np.abs(score_N - power_iteration(transition, seeds, tol=1e-13)).sum() <= tol + 1e-12


def test_a_query_does_not_depend_on_what_is_asked_beside_it():
    graph = undirected(1, num_nodes=100, num_edges=600)
    blocks = Blocks(Transition(graph), 1e-6)
    together = dense_rows(blocks, graph, range(100))
    for node in (0, 31, 32, 99):
        assert np.array_equal(dense_rows(blocks, graph, [node])[0], together[node])
        assert np.array_equal(dense_rows(blocks, graph, [7, node, 3])[1], together[node])


def test_rounds_are_few(monkeypatch):
    """About the root of power iteration's: 12 for 1e-4 on a graph whose second eigenvalue is large, where power iteration takes 57."""
    count = 400
    ring = Graph.from_edges(np.arange(count), (np.arange(count) + 1) % count)
    rounds = []
    blocks = __import__("anabranch.graph.ppr.blocks", fromlist=["_round"])
    real = blocks._round
    monkeypatch.setattr(blocks, "_round", lambda *arguments: (rounds.append(1), real(*arguments)))
    found = dense_rows(Blocks(Transition(ring), 1e-4), ring, [5])[0]
    assert np.abs(found - power_iteration(ring, 5, tol=1e-12)).sum() <= 1e-4
    assert len(rounds) <= 20


def test_small_components_do_not_slow_the_large_one():
    """A single edge, on which walks go to and fro for ever, beside a graph that mixes at once."""
    generator = np.random.default_rng(0)
    ends = np.append(generator.integers(0, 300, (2, 9000)), [[300], [301]], axis=1)
    blocks = Blocks(Transition(Graph.from_edges(*ends)), 1e-8)
    label = blocks.label_N
    assert blocks.reach_K[label[0]] < 0.3
    assert blocks.reach_K[label[300]] == 0.85
    found = dense_rows(blocks, blocks.transition.graph, [300, 5, 301, [7, 300]])
    for score_N, seeds in zip(found, [300, 5, 301, [7, 300]], strict=True):
        assert np.abs(score_N - power_iteration(blocks.transition, seeds, tol=1e-13)).sum() <= 1e-8


def test_what_rounding_keeps_from_the_tolerance_power_iteration_finishes(monkeypatch):
    monkeypatch.setattr("anabranch.graph.ppr.blocks.MOST_ROUNDS", 2)
    graph = undirected(3)
    found = dense_rows(Blocks(Transition(graph), 1e-8), graph, [3, 4])
    for score_N, node in zip(found, (3, 4), strict=True):
        assert np.abs(score_N - power_iteration(graph, node, tol=1e-13)).sum() <= 1e-8


@pytest.fixture
def clique_like():
    """A graph of which nothing can be eliminated."""
    generator = np.random.default_rng(0)
    return Graph.from_edges(*generator.integers(0, 60, (2, 2400)), num_nodes=60)


def test_batches_and_all_sources_of_a_dense_graph_go_by_blocks(clique_like, monkeypatch):
    asked = []
    real = Blocks.rows
    monkeypatch.setattr(
        Blocks, "rows", lambda self, parsed, top_k: (asked.append(len(parsed)), real(self, parsed, top_k))[1]
    )
    exact = np.array([power_iteration(clique_like, node, tol=1e-13) for node in range(60)])
    rows = PageRank(tol=1e-9).batch(clique_like, range(60), top_k=5)
    assert asked == [60]
    assert [ids.tolist() for ids, _ in rows] == [np.argsort(-row, kind="stable")[:5].tolist() for row in exact]
    asked.clear()
    found = fully_ppr(clique_like, method="exact", tol=1e-9, top_k=None, workers=2)
    assert sum(asked) == 60
    assert np.abs(found.rows.to_scipy().toarray() - exact).sum(1).max() <= 1e-9
    asked.clear()
    # Wide, of a graph that is eliminated, directed, or few: one after another.
    path = Graph.from_edges(np.arange(50), np.arange(1, 51))
    for graph, queries, options in (
        (path, range(20), {}),
        (clique_like.to_directed(), range(20), {}),
        (clique_like, range(3), {}),
        (clique_like, range(20), {"method": "push"}),
        (clique_like, range(20), {"tol": 1e-15}),
    ):
        PageRank(**options).batch(graph, queries)
    assert asked == []
