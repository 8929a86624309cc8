import numpy as np
import pytest

from anabranch.errors import InputError
from anabranch.graph import Graph
from anabranch.graph.ppr import (
    PageRank,
    Transition,
    forward_push,
    monte_carlo,
    parse_seeds,
    power_block,
    power_iteration,
    power_rows,
    prepare,
    solve,
)

ALPHA = 0.15
DANGLING = ("source", "absorb", "uniform")


def random_graph(seed, num_nodes=30, num_edges=70, directed=True, weighted=True):
    """With dangling nodes, isolated nodes and self-loops where directed."""
    generator = np.random.default_rng(seed)
    ends = generator.integers(0, num_nodes - 2, (2, num_edges))
    if directed:
        ends[0][ends[0] % 7 == 0] += 1  # multiples of 7 have no way out
    weight = generator.lognormal(0, 1.5, num_edges) if weighted else None
    return Graph.from_edges(ends[0], ends[1], weight, directed, num_nodes)


def dense_ppr(graph, node, dangling="source", alpha=ALPHA):
    """By linear algebra, one node, straight from the definition of the walk."""
    matrix = graph.to_scipy(np.float64).toarray()
    count = len(matrix)
    for row in range(count):
        if matrix[row].sum() == 0:
            matrix[row] = {"source": np.eye(count)[node], "absorb": np.eye(count)[row], "uniform": np.ones(count)}[
                dangling
            ]
        matrix[row] /= matrix[row].sum()
    return alpha * np.linalg.solve(np.eye(count) - (1 - alpha) * matrix.T, np.eye(count)[node])


def dense(found, count):
    ids, scores = found
    result = np.zeros(count)
    result[ids] = scores
    return result


def pushed(transition, node, tol):
    found = forward_push(transition, node, tol=tol)
    return dense((found.ids, found.scores), transition.num_nodes)


def solved(transition, factor, node, tol):
    ids, share = parse_seeds(transition.graph, node)
    found_N, error, _ = solve(transition, factor, ids, transition.start(ids, share), tol)
    assert error <= tol
    return transition.finish(found_N, ids, share)


@pytest.mark.parametrize("dangling", DANGLING)
@pytest.mark.parametrize("directed", [True, False])
@pytest.mark.parametrize("weighted", [True, False])
def test_every_exact_method_against_linear_algebra(dangling, directed, weighted):
    graph = random_graph(3, directed=directed, weighted=weighted)
    transition = Transition(graph, ALPHA, dangling)
    exact = [dense_ppr(graph, node, dangling) for node in range(graph.num_nodes)]
    block_NB = power_block(transition, range(graph.num_nodes), tol=1e-12)
    factors = {few: prepare(transition, few) for few in (0, 2, 8)}
    for node in range(graph.num_nodes):
        found = {
            "power": power_iteration(transition, node, tol=1e-12),
            "block": block_NB[:, node],
            "push": pushed(transition, node, 1e-12),
            **{f"solve {few}": solved(transition, factor, node, 1e-12) for few, factor in factors.items()},
        }
        for name, score_N in found.items():
            assert np.abs(score_N - exact[node]).sum() <= 2e-12, (name, node)
            assert score_N.sum() == pytest.approx(1, abs=2e-12)


@pytest.mark.parametrize("dangling", DANGLING)
@pytest.mark.parametrize("mode", ["fullpath", "endpoint"])
def test_walks_agree_with_linear_algebra(dangling, mode):
    graph = random_graph(4)
    for node in (0, 7, 29):  # dangling, dangling with in-edges, isolated
        exact = dense_ppr(graph, node, dangling)
        found = dense(monte_carlo(graph, node, walks=40_000, mode=mode, dangling=dangling, seed=1), 30)
        assert np.abs(found - exact).sum() < 0.04
        assert found.sum() == pytest.approx(1)


def test_rows_of_blocks_and_the_estimator_agree():
    graph = random_graph(5)
    seeds = [0, [1, 2], {3: 0.25, 29: 0.75}, ([4, 5], [1.0, 3.0])]
    rows = power_rows(graph, seeds, tol=1e-12, block=3)
    exact = PageRank(tol=1e-12).batch(graph, seeds)
    for number, of in enumerate(seeds):
        for method in ("auto", "solve", "power", "push"):
            ids, scores = PageRank(tol=1e-12, method=method).personalized(graph, of)
            assert np.all(np.diff(scores) <= 0)
            assert np.abs(dense((ids, scores), 30) - dense(rows.row(number), 30)).sum() < 1e-11
        assert np.array_equal(exact.row(number)[0], rows.row(number)[0])


def test_bad_input_names_what_is_wrong():
    graph = random_graph(0)
    for call, message in (
        (lambda: PageRank(alpha=1.0), "alpha is 1.0"),
        (lambda: PageRank(method="magic"), "method is 'magic'"),
        (lambda: PageRank().personalized(graph, 30), "node 30 is not one of the 30 nodes"),
        (lambda: PageRank().personalized(graph, []), "seeds have the shape"),
        (lambda: PageRank().personalized(graph, {1: -1.0}), "seed 1 has the weight -1.0"),
        (lambda: PageRank().personalized(graph, {1: 0.0}), "all seeds have the weight 0"),
        (lambda: PageRank().personalized(graph, 1, top_k=0), "top_k is 0"),
    ):
        with pytest.raises(InputError, match=message.replace(".", r"\.")):
            call()
