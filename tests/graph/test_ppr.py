import importlib
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
from anabranch.graph.ppr.factor import as_it_is
from anabranch.graph.ppr.push import PushBuffers
from anabranch.graph.rows import order_top, top_of_dense

solver = importlib.import_module("anabranch.graph.ppr.solve")  # its function of that name hides it
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
    factors = {few: prepare(transition, few) for few in (0, 2, 8)} | {"as it is": as_it_is(transition)}
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
        (lambda: PageRank(tol=0), "tol is 0"),
        (lambda: PageRank(tol=float("nan")), "tol is nan"),
        (lambda: PageRank(dangling="lost"), "dangling is 'lost'"),
        (lambda: PageRank(walks=0), "walks is 0"),
        (lambda: PageRank(seed=-1), "seed is -1"),
        (lambda: monte_carlo(graph, 0, seed=1.5), "seed is 1.5"),
        (lambda: monte_carlo(graph, 0, mode="ends"), "mode is 'ends'"),
        (lambda: PageRank().personalized(graph, -1), "node -1 is not one of"),
        (lambda: PageRank().personalized(graph, 1.0), "node ids are integers"),
        (lambda: PageRank().personalized(graph, [[1]]), "seeds have the shape"),
        (lambda: PageRank().personalized(graph, ([1, 2], [1.0])), "weights of the shape"),
        (lambda: PageRank().personalized(graph, {1: "much"}), "weights of seeds are numbers"),
        (lambda: PageRank().personalized(graph, {1: float("nan")}), "seed 1 has the weight nan"),
        (lambda: PageRank().scores(Graph.from_edges([], [])), "no nodes"),
        (lambda: PageRank().scores(Graph.from_edges([0], [1], [-2.0], allow_negative=True)), "not negative"),
        (lambda: PageRank().personalized(graph, 30), "node 30 is not one of the 30 nodes"),
        (lambda: PageRank().personalized(graph, []), "seeds have the shape"),
        (lambda: PageRank().personalized(graph, {1: -1.0}), "seed 1 has the weight -1.0"),
        (lambda: PageRank().personalized(graph, {1: 0.0}), "all seeds have the weight 0"),
        (lambda: PageRank().personalized(graph, 1, top_k=0), "top_k is 0"),
    ):
        with pytest.raises(InputError, match=message.replace(".", r"\.")):
            call()


@pytest.mark.parametrize("name", ["igraph", "networkx"])
def test_global_and_personalised_scores_equal_other_libraries(name):
    """Directed, weighted, with dead ends; other libraries send those to the restart distribution, as `restart` does."""
    graph = random_graph(6)
    source, target, weight = graph.edges()
    if name == "igraph":
        igraph = pytest.importorskip("igraph")
        made = igraph.Graph(30, np.stack([source, target], 1), directed=True)
        scores = made.pagerank(weights=weight.tolist())
        one = made.personalized_pagerank(reset_vertices=[3], weights=weight.tolist())
    else:
        networkx = pytest.importorskip("networkx")
        made = networkx.DiGraph()
        made.add_nodes_from(range(30))
        made.add_weighted_edges_from(zip(source.tolist(), target.tolist(), weight.tolist(), strict=True))
        scores = list(networkx.pagerank(made, tol=1e-12, max_iter=1000).values())
        one = list(networkx.pagerank(made, personalization={3: 1.0}, tol=1e-12, max_iter=1000).values())
    ours = PageRank(tol=1e-11)
    assert np.abs(ours.scores(graph) - scores).sum() < 1e-8
    assert np.abs(ours.vector(graph, 3) - one).sum() < 1e-8
    assert np.abs(PageRank(tol=1e-11, dangling="uniform").scores(graph) - scores).sum() < 1e-8


@settings(max_examples=25)
@given(
    st.integers(0, 10_000),
    st.booleans(),
    st.sampled_from(DANGLING),
    st.sampled_from([1e-1, 1e-3, 1e-6]),
    st.floats(0.02, 0.9),
)
def test_every_method_keeps_its_promise(seed, directed, dangling, tol, alpha):
    """The L1 error is within the tolerance for any graph, alpha and policy."""
    graph = random_graph(seed, num_nodes=25, num_edges=60, directed=directed)
    node = seed % 25
    exact = dense_ppr(graph, node, dangling, alpha)
    for method in ("auto", "solve", "power", "push"):
        found = PageRank(alpha, method, tol, dangling).vector(graph, node)
        assert np.abs(found - exact).sum() <= tol + 1e-12, method
        assert found.min() >= -tol


def test_a_mixture_of_seeds_is_the_mixture_of_answers():
    graph = random_graph(7)
    for dangling in DANGLING:
        exact = [dense_ppr(graph, node, dangling) for node in (7, 3, 29)]
        for method in ("solve", "power", "push"):
            ours = PageRank(tol=1e-12, method=method, dangling=dangling)
            mixed = ours.vector(graph, ([7, 3, 29, 3], [2.0, 0.5, 1.0, 0.5]))
            assert np.abs(mixed - np.dot([0.5, 0.25, 0.25], exact)).sum() < 1e-11
            assert np.array_equal(mixed, ours.vector(graph, {3: 1e300, 7: 2e300, 29: 1e300}))


def restarting(graph, seeds, alpha=ALPHA):
    """networkx's own answer: what stands at a dead end goes to the personalization vector."""
    import networkx

    source, target, weight = graph.edges()
    made = networkx.DiGraph()
    made.add_nodes_from(range(graph.num_nodes))
    made.add_weighted_edges_from(zip(source.tolist(), target.tolist(), weight.tolist(), strict=True))
    if not graph.is_directed:
        made.add_weighted_edges_from(zip(target.tolist(), source.tolist(), weight.tolist(), strict=True))
    scores = networkx.pagerank(made, 1 - alpha, personalization=seeds, tol=1e-15, max_iter=5000)
    return np.array([scores[node] for node in range(graph.num_nodes)])


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 10_000),
    st.booleans(),
    st.dictionaries(st.integers(0, 24), st.sampled_from([0.1, 1.0, 7.5]), min_size=1, max_size=6),
    st.sampled_from([0.05, 0.15, 0.5]),
)
def test_dead_ends_lead_to_the_set_as_in_networkx(seed, directed, seeds, alpha):
    graph = random_graph(seed, num_nodes=25, num_edges=60, directed=directed)
    expected = restarting(graph, seeds, alpha)
    for method in ("solve", "power", "push"):
        found = PageRank(alpha, method, tol=1e-11).vector(graph, seeds)
        assert np.abs(found - expected).max() < 1e-9, method
    rows = power_rows(graph, [seeds, 3], alpha, tol=1e-11)
    assert np.abs(dense(rows.row(0), 25) - expected).max() < 1e-9
    batch = PageRank(alpha, tol=1e-11).batch(graph, [3, seeds])
    assert np.abs(dense(batch.row(1), 25) - expected).max() < 1e-9
    walked = monte_carlo(graph, seeds, alpha, walks=4000, seed=seed)
    assert np.abs(dense(walked, 25) - expected).sum() < 0.25


@pytest.mark.parametrize("mode", ["fullpath", "endpoint"])
def test_walks_start_over_at_a_seed_drawn_anew(mode):
    graph, seeds = random_graph(4), {0: 1.0, 8: 1.0, 9: 2.0}
    expected, former = restarting(graph, seeds), PageRank(tol=1e-10, dangling="source").vector(graph, seeds)
    found = dense(monte_carlo(graph, seeds, walks=60_000, mode=mode, seed=1), 30)
    assert np.abs(found - expected).sum() < 0.03
    assert np.abs(former - expected).sum() > 0.1  # or this would tell nothing


def test_one_seed_starts_over_where_it_started():
    graph = random_graph(9)
    for node in (0, 7, 29):
        assert PageRank(tol=1e-12).vector(graph, node) == pytest.approx(
            PageRank(tol=1e-12, dangling="source").vector(graph, node), abs=1e-12
        )


def test_rounds_of_power_iteration_count_steps():
    """R rounds hold walks of fewer than R steps: they lack (1 - alpha)^R, here without dead ends."""
    ring = Graph.from_edges(np.arange(9), (np.arange(9) + 1) % 9, directed=True)
    for rounds in range(1, 8):
        found = power_iteration(ring, 0, max_rounds=rounds)
        assert found.tolist() == pytest.approx([ALPHA * 0.85**step if step < rounds else 0 for step in range(9)])


def test_power_stops_by_its_tolerance():
    ring = Graph.from_edges(np.arange(9), (np.arange(9) + 1) % 9, directed=True)
    for tol in (1e-1, 1e-5):
        missing = 1 - power_iteration(ring, 0, tol=tol).sum()
        assert 0.85 * tol < missing <= tol


def test_push_stays_where_the_scores_are():
    count = 5000
    ring = Graph.from_edges(np.arange(count), (np.arange(count) + 1) % count)
    found = forward_push(ring, 77, tol=1e-3)
    assert found.error <= 1e-3
    assert len(found.ids) < 300
    assert found.edges < 20_000
    assert (
        np.abs(dense((found.ids, found.scores), count) - power_iteration(ring, 77, tol=1e-13)).sum()
        <= found.error + 1e-12
    )
    buffers = PushBuffers(count)
    for node in (3, 4, 3):
        again = forward_push(ring, node, tol=1e-3, buffers=buffers, top_k=5)
        assert again.ids.tolist() == forward_push(ring, node, tol=1e-3).ids[:5].tolist()
        assert not buffers.flow_N.any()
        assert not buffers.result_N.any()
        assert not buffers.state_N.any()
    stopped = forward_push(ring, 77, tol=1e-9, max_edges=50)
    assert 50 <= stopped.edges < 60
    assert stopped.error == pytest.approx(1 - stopped.scores.sum())


def test_what_the_krylov_method_leaves_gauss_seidel_finishes(monkeypatch):
    graph = random_graph(9, directed=False)
    transition = Transition(graph)
    factor = prepare(transition, few=0)
    real = solver._conjugate

    def broken(*arguments):
        real(*arguments)
        arguments[-1][0][:] = np.nan
        return np.nan, 3

    monkeypatch.setattr(solver, "_conjugate", broken)
    ids, share = parse_seeds(graph, 5)
    found_N, error, _ = solve(transition, factor, ids, transition.start(ids, share), 1e-10)
    assert error <= 1e-10
    assert np.abs(found_N - dense_ppr(graph, 5)).sum() <= 1e-10


def test_elimination_leaves_an_exact_system_and_says_its_size():
    star = Graph.from_edges(np.zeros(50, int), np.arange(1, 51))
    factor = prepare(Transition(star))
    assert len(factor.diagonal_P) == 51  # leaves, then the hub, which has no neighbour left
    assert len(factor.core.diagonal_C) == 0
    ids, share = parse_seeds(star, 3)
    found_N, error, passes = solve(Transition(star), factor, ids, share, 1e-6)
    assert (error, passes) == (0.0, 0)
    assert np.abs(found_N - dense_ppr(star, 3)).sum() < 1e-14
    clique = Graph.from_edges(*np.triu_indices(30, 1))
    kept = prepare(Transition(clique))
    assert len(kept.core.diagonal_C) == 30
    assert len(kept.core.values) == 0  # all alike: no values are stored
    assert sorted(kept.order_N.tolist()) == list(range(30))
    assert kept.nbytes < 20_000


def test_a_query_takes_what_another_graph_left():
    ours = PageRank(tol=1e-10)
    one, other = random_graph(1), random_graph(2, num_nodes=50)
    for graph in (one, other, one):
        for method in ("solve", "push"):
            ours.set_params(method=method)
            assert np.abs(ours.vector(graph, 4) - dense_ppr(graph, 4)).sum() < 1e-9
    ours.set_params(alpha=0.5)
    assert np.abs(ours.vector(one, 4) - dense_ppr(one, 4, alpha=0.5)).sum() < 1e-9
    assert ours.get_params()["alpha"] == 0.5


def test_threads_that_ask_a_graph_that_is_not_prepared():
    graph = random_graph(3, num_nodes=200, num_edges=900)
    exact = [dense_ppr(graph, node) for node in range(40)]
    ours = PageRank(tol=1e-9)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda node: ours.vector(graph, node), range(40)))
    assert max(np.abs(one - other).sum() for one, other in zip(found, exact, strict=True)) <= 1e-9


@pytest.fixture
def factors_made(monkeypatch):
    """Names of the factors that are made, in order."""
    made = []
    pagerank = importlib.import_module("anabranch.graph.ppr.pagerank")
    for name in ("prepare", "as_it_is"):
        real = getattr(pagerank, name)

        def counted(*arguments, name=name, real=real):
            made.append(name)
            return real(*arguments)

        monkeypatch.setattr(pagerank, name, counted)
    return made


def test_auto_prepares_when_queries_have_cost_as_much(factors_made):
    graph = Graph.from_edges(*np.random.default_rng(0).integers(0, 400, (2, 2000)), num_nodes=400)
    ours = PageRank(tol=1e-8)
    for number in range(40):
        found = dense(ours.personalized(graph, number), 400)
        assert np.abs(found - power_iteration(graph, number, tol=1e-12)).sum() <= 1e-8
        assert len(factors_made) == 1 or number > 2
    # Once each: for the first queries, and for the others.
    assert factors_made == ["as_it_is", "prepare"]
    # A batch knows how many come; whoever says so needs none to come.
    for large in (lambda ours: ours.batch(graph, range(20)), lambda ours: ours.prepare(graph)):
        factors_made.clear()
        large(PageRank(tol=1e-8))
        assert factors_made == ["prepare"]
    factors_made.clear()
    PageRank(tol=1e-8).batch(graph, range(2))
    PageRank(method="push").prepare(graph)
    assert factors_made == ["as_it_is"]


def test_a_first_query_of_a_wide_tolerance_looks_around_itself_alone(factors_made):
    count = 5000
    ring = Graph.from_edges(np.arange(count), (np.arange(count) + 1) % count)
    ours = PageRank(tol=1e-3)
    ids, scores = ours.personalized(ring, 77)
    assert len(ids) < 300
    assert factors_made == []
    assert np.all(np.diff(scores) <= 0)
    assert np.abs(dense((ids, scores), count) - power_iteration(ring, 77, tol=1e-13)).sum() <= 1e-3
    assert np.array_equal(ours.personalized(ring, 77, top_k=3)[0], ids[:3])
    assert np.array_equal(ours.vector(ring, 77), dense((ids, scores), count))
    assert ours._last.reads < 20_000


def test_a_large_graph_is_never_eliminated_nor_its_edges_copied(monkeypatch, factors_made):
    monkeypatch.setattr("anabranch.graph.ppr.pagerank.LARGE", 10)
    graph = random_graph(5, directed=False)
    if graph.num_self_loops:
        source, target, weight = graph.edges()
        kept = source != target
        graph = Graph.from_edges(source[kept], target[kept], weight[kept], num_nodes=30)
    ours = PageRank(tol=1e-10).prepare(graph)
    assert factors_made == ["as_it_is"]
    core = ours._last.make_factor()[0].core
    assert np.shares_memory(core.indices, graph.indices)
    assert np.shares_memory(core.values, graph.weights)
    assert np.abs(ours.vector(graph, 3) - dense_ppr(graph, 3)).sum() <= 1e-10


def peak_of(work):
    """Most bytes that arrays made in Python held at once; kernels here make none that matter."""
    tracemalloc.start()
    work()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def unseen(graph):
    """The same arrays without degrees, sums and whatever else a graph remembers."""
    return Graph(graph.indptr, graph.indices, graph.weights, graph.is_directed)


@pytest.mark.parametrize(("directed", "weighted"), [(False, False), (False, True), (True, True)])
def test_memory_is_what_the_formula_says(directed, weighted):
    """In units of nodes and edges, so that nothing depends on the machine."""
    generator = np.random.default_rng(0)
    ends = generator.integers(0, 4000, (2, 60_000))
    ends = ends[:, ends[0] != ends[1]]
    weight = generator.lognormal(0, 1, ends.shape[1]) if weighted else None
    dense = Graph.from_edges(*ends, weight, directed, 4000)
    # Of which most is eliminated.
    sparse = Graph.from_edges(*ends[:, :8000], None if weight is None else weight[:8000], directed, 4000)
    for name, graph, work in (
        ("scores", dense, lambda graph: PageRank(tol=1e-4).scores(graph)),
        ("once", dense, lambda graph: PageRank().vector(graph, 7)),
        ("prepared", sparse, lambda graph: PageRank().prepare(graph).vector(graph, 7)),
        ("prepared, whole", dense, lambda graph: PageRank().prepare(graph).vector(graph, 7)),
    ):
        nodes, edges = graph.num_nodes, len(graph.indices)
        of_query = PageRank.peak_bytes(nodes, edges, weighted, directed, prepared=name.startswith("prepared"))
        formula = 40 * nodes if name == "scores" else of_query
        # Kernels are compiled or loaded.
        work(unseen(graph))
        made = unseen(graph)
        peak = peak_of(lambda work=work, made=made: work(made))
        assert peak <= formula + 50_000, (name, peak / nodes, peak / edges)
        # And is no loose bound, but where it turns out that nothing goes.
        assert peak >= 0.4 * formula or name == "prepared, whole", (name, peak / nodes, peak / edges)
        if name == "scores" or not directed:
            assert "reversed" not in vars(made) or made.reversed is made


def test_global_scores_of_walks_that_are_lost_are_scaled_within_the_tolerance():
    """Most walks of this graph are lost at once, so what is left must be known better than the tolerance."""
    star = Graph.from_edges(np.arange(1, 50), np.zeros(49, int), directed=True)
    matrix = star.to_scipy(np.float64).toarray()
    matrix[0] = 1 / 50
    exact = ALPHA / 50 * np.linalg.solve(np.eye(50) - 0.85 * matrix.T, np.ones(50))
    for tol in (0.5, 1e-2, 1e-6, 1e-12):
        for dangling in ("source", "uniform"):
            found = PageRank(tol=tol, dangling=dangling).scores(star)
            assert np.abs(found - exact).sum() <= tol
            assert found.sum() == pytest.approx(1, abs=1e-12)
    absorbed = PageRank(tol=1e-12, dangling="absorb").scores(star)
    matrix[0] = np.eye(50)[0]
    assert np.abs(absorbed - ALPHA / 50 * np.linalg.solve(np.eye(50) - 0.85 * matrix.T, np.ones(50))).sum() <= 1e-12


def test_threads_share_one_object():
    graph = random_graph(3, num_nodes=200, num_edges=900)
    ours = PageRank(tol=1e-9).prepare(graph)
    alone = [ours.vector(graph, node) for node in range(100)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda node: ours.vector(graph, node), range(100)))
    assert all(np.array_equal(a, b) for a, b in zip(alone, together, strict=True))


def test_walks_are_shared_out_exactly_and_repeat():
    graph = random_graph(4)
    seeds = {1: 1.0, 2: 1.0, 4: 1.0}
    ids, scores = monte_carlo(graph, seeds, walks=100, mode="endpoint", dangling="absorb", seed=3)
    assert np.round(scores * 100) == pytest.approx(scores * 100)
    assert scores.sum() == pytest.approx(1)
    again = monte_carlo(graph, seeds, walks=100, mode="endpoint", dangling="absorb", seed=3)
    assert np.array_equal(ids, again[0])
    assert np.array_equal(scores, again[1])
    unbiased = monte_carlo(graph, 1, walks=50, unbiased=True, dangling="absorb")[1].sum()
    assert unbiased != 1
    assert unbiased == pytest.approx(1, abs=0.5)
    assert len(monte_carlo(graph, 1, walks=1, max_steps=1)[0]) <= 2


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0]), min_size=1, max_size=40), st.integers(1, 45))
def test_the_best_of_a_dense_row_are_ordered_with_ties_by_id(values, top_k):
    score_N = np.array(values)
    positive = [node for node in range(len(values)) if values[node] > 0]
    expected = sorted(positive, key=lambda node: (-values[node], node))
    for kept in (top_k, None):
        ids, scores = top_of_dense(score_N, kept)
        assert ids.tolist() == expected[:kept]
        assert scores.tolist() == [values[node] for node in expected[:kept]]
    ids, copies = np.arange(len(values))[::-1].copy(), score_N[::-1].copy()
    count = order_top(ids, copies, len(ids), top_k)
    everything = sorted(range(len(values)), key=lambda node: (-values[node], node))
    assert ids[:count].tolist() == everything[:top_k]
