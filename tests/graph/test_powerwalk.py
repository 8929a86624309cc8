import os
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2, chisquare, ks_2samp

from anabranch.errors import DataError, InputError
from anabranch.graph import Graph
from anabranch.graph.array_file import kind_of, read_arrays, write_arrays
from anabranch.graph.datasets import load_dataset
from anabranch.graph.powerwalk import PowerWalk
from anabranch.graph.powerwalk.moves import binomial
from anabranch.graph.ppr import power_iteration, power_rows
from anabranch.graph.rows import SparseRows

ALPHA = 0.15
DANGLING = ("source", "absorb", "uniform")


def random_graph(seed, num_nodes=30, num_edges=80, directed=True, weighted=True):
    """With dangling nodes (multiples of 7), isolated ones (the last two) and self-loops where directed."""
    generator = np.random.default_rng(seed)
    ends = generator.integers(0, num_nodes - 2, (2, num_edges))
    if directed:
        ends[0][ends[0] % 7 == 0] += 1
    weight = generator.lognormal(0, 1.0, num_edges) if weighted else None
    return Graph.from_edges(ends[0], ends[1], weight, directed, num_nodes)


def connected(seed=0, num_nodes=40, directed=False, weighted=True):
    """A ring with chords: no dead ends."""
    generator = np.random.default_rng(seed)
    ring = np.arange(num_nodes)
    chords = generator.integers(0, num_nodes, (2, num_nodes))
    ends = np.concatenate([[ring, (ring + 1) % num_nodes], chords], axis=1)
    weight = generator.lognormal(0, 1.0, ends.shape[1]) if weighted else None
    return Graph.from_edges(ends[0], ends[1], weight, directed, num_nodes)


def dense_ppr(graph, node, dangling="source", alpha=ALPHA):
    matrix = graph.to_scipy(np.float64).toarray()
    count = len(matrix)
    for row in range(count):
        if matrix[row].sum() == 0:
            other = {"source": np.eye(count)[node], "absorb": np.eye(count)[row], "uniform": np.ones(count)}
            matrix[row] = other[dangling]
        matrix[row] /= matrix[row].sum()
    return alpha * np.linalg.solve(np.eye(count) - (1 - alpha) * matrix.T, np.eye(count)[node])


def spread(found, count):
    ids, scores = found
    result = np.zeros(count)
    result[ids] = scores
    return result


def same_index(one, other):
    pairs = zip(one._index.arrays().values(), other._index.arrays().values(), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


# -- the offline index


@pytest.mark.parametrize("mode", ["fullpath", "endpoint"])
@pytest.mark.parametrize("moves", ["walkers", "counts"])
def test_end_points_and_visits_have_the_right_distribution(mode, moves):
    """End points by chi-square against the exact vector; visits of a walk are correlated, so their mean by its own deviation."""
    graph = load_dataset("karate").graph
    exact = dense_ppr(graph, 0)
    walks = 200_000
    found = PowerWalk(walks=walks, mode=mode, moves=moves, dtype="f32").build(graph, nodes=[0])
    ids, counts = found.rows.row(0)
    count_N = spread((ids, counts), graph.num_nodes)
    if mode == "endpoint":
        assert count_N.sum() == walks
        assert chisquare(count_N, exact * walks).pvalue > 1e-3
    else:
        # alpha E[visits] = pi; a walk's visits of one node have a variance of at most E[visits^2] <= 2 / alpha^2 pi
        deviation = np.sqrt(2 * exact / walks)
        assert (np.abs(ALPHA * count_N / walks - exact) < 4 * deviation).all()


def test_full_paths_are_unbiased_over_many_small_indexes():
    """Chi-square of the mean over independent nodes' walks: estimates of 400 streams, whitened by their own covariance."""
    graph = load_dataset("karate").graph
    exact = dense_ppr(graph, 0)
    rows = []
    for seed in range(400):
        found = PowerWalk(walks=500, estimate="unbiased", dtype="f32", seed=seed).build(graph, nodes=[0])
        rows.append(spread(found.query(0, rounds=0), graph.num_nodes))
    error = np.mean(rows, 0) - exact
    covariance = np.cov(np.array(rows).T) / len(rows)
    statistic = error @ np.linalg.pinv(covariance, rcond=1e-10) @ error
    assert statistic < chi2.ppf(0.9999, graph.num_nodes) * 1.2  # Hotelling's is a little wider than chi-square


@pytest.mark.parametrize("moves", ["walkers", "counts", "rounding"])
def test_mean_visits_per_walk(moves):
    """1 / alpha, within 4 deviations of a geometric number's mean (sqrt(1 - alpha) / alpha each)."""
    graph, walks = connected(), 2000
    found = PowerWalk(walks=walks, moves=moves).build(graph)
    total = found._index.total_N.sum() / (walks * graph.num_nodes)
    assert abs(total - 1 / ALPHA) < 4 * np.sqrt(1 - ALPHA) / ALPHA / np.sqrt(walks * graph.num_nodes)


def test_walkers_are_conserved_by_counts_and_not_by_rounding():
    graph = connected()
    exact = PowerWalk(mode="endpoint", moves="counts").build(graph)
    assert set(exact._index.total_N) == {100}
    assert len(set(PowerWalk(mode="endpoint", moves="rounding").build(graph)._index.total_N)) > 1


@given(st.integers(0, 2**32), st.integers(0, 60), st.floats(0, 1))
def test_binomial_is_in_range(seed, count, chance):
    _, found = binomial(np.uint64(seed), count, chance)
    assert 0 <= found <= count
    assert binomial(np.uint64(seed), count, 0.0)[1] == 0
    assert binomial(np.uint64(seed), count, 1.0)[1] == count


@pytest.mark.parametrize("chance", [0.1, 0.5, 0.85])
def test_binomial_distribution(chance):
    state, drawn = np.uint64(5), []
    for _ in range(20_000):
        state, found = binomial(state, 12, chance)
        drawn.append(found)
    expected = np.random.default_rng(0).binomial(12, chance, 20_000)
    assert ks_2samp(drawn, expected).pvalue > 1e-3
    assert np.mean(drawn) == pytest.approx(12 * chance, abs=4 * np.sqrt(12 * chance * (1 - chance) / 20_000))


def test_moves_agree_with_each_other():
    graph, exact = connected(1), dense_ppr(connected(1), 3)
    for changes in ({"moves": "counts"}, {"moves": "rounding"}, {"long_path": True}, {}):
        found = PowerWalk(walks=20_000, dtype="f32", **changes).build(graph, nodes=[3])
        assert np.abs(spread(found.query(3, rounds=0), 40) - exact).sum() < 0.05, changes


def test_long_path_visits_a_fixed_number():
    found = PowerWalk(walks=90, long_path=True).build(connected())
    assert set(found._index.total_N) == {600}
    exact = dense_ppr(random_graph(2), 8)
    ends = PowerWalk(walks=30_000, long_path=True, mode="endpoint", dtype="f32").build(random_graph(2), nodes=[8])
    assert np.abs(spread(ends.query(8, rounds=0), 30) - exact).sum() < 0.05


@pytest.mark.parametrize("changes", [{}, {"moves": "counts"}, {"mode": "endpoint", "track": True}, {"long_path": True}])
def test_index_is_the_same_for_any_threads_chunks_and_sources(changes, monkeypatch):
    graph = random_graph(1, num_nodes=300, num_edges=900)
    one = PowerWalk(walks=20, **changes).build(graph)
    assert same_index(one, PowerWalk(walks=20, workers=2, **changes).build(graph))
    monkeypatch.setattr("anabranch.graph.powerwalk.index.CHUNK", 7)
    assert same_index(one, PowerWalk(walks=20, workers=3, **changes).build(graph))
    alone = PowerWalk(walks=20, **changes).build(graph, nodes=[123])
    assert np.array_equal(alone.rows.row(123)[0], one.rows.row(123)[0])
    assert not same_index(one, PowerWalk(walks=20, seed=1, **changes).build(graph))


def test_rows_are_ordered_and_cut():
    graph = connected(num_nodes=80)
    whole = PowerWalk(walks=50).build(graph)
    kept, most = PowerWalk(walks=50, keep=5).build(graph), PowerWalk(walks=50, mass=0.8).build(graph)
    for node in range(80):
        ids, counts = whole.rows.row(node)
        order = np.lexsort((ids, -counts.astype(float)))
        assert np.array_equal(order, np.arange(len(ids)))
        assert np.array_equal(kept.rows.row(node)[0], ids[:5])
        length = len(most.rows.row(node)[0])
        running = np.cumsum(counts, dtype=float) / counts.sum(dtype=float)
        assert running[length - 1] >= 0.8 > (running[length - 2] if length > 1 else 0)
    assert np.array_equal(whole._index.total_N, kept._index.total_N)
    assert whole.lost_mass == 0
    assert 0 < most.lost_mass <= 0.2
    assert kept._index.kept_N == pytest.approx([kept.fingerprint(node)[1].sum() for node in range(80)])


def test_half_precision_holds_counts_exactly_and_ends_at_its_largest():
    graph = Graph.from_edges([0, 1], [1, 0])
    half, full = (PowerWalk(walks=150, dtype=dtype).build(graph) for dtype in ("f16", "f32"))
    assert half._index.counts.dtype == np.float16
    assert np.array_equal(half._index.counts, full._index.counts)
    assert np.array_equal(half.query(0)[1], full.query(0)[1])
    lone = PowerWalk(walks=100_000).build(Graph.from_edges([0], [0], directed=True, num_nodes=1))
    assert np.isfinite(lone._index.counts).all()


def test_walks_cut_at_a_limit():
    graph, limit = connected(), 3
    found = PowerWalk(walks=20_000, max_steps=limit, dtype="f32").build(graph, nodes=[0])
    visits = found._index.total_N[0] / 20_000
    assert visits == pytest.approx(sum((1 - ALPHA) ** step for step in range(limit + 1)), abs=0.05)
    assert found.lost_mass == pytest.approx((1 - ALPHA) ** (limit + 1), abs=0.02)


# -- the online query


@pytest.mark.parametrize("dangling", DANGLING)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("directed", [True, False])
def test_many_rounds_are_power_iteration(dangling, weighted, directed):
    graph = random_graph(3, weighted=weighted, directed=directed)
    found = PowerWalk(walks=50, dangling=dangling).build(graph)
    for node in range(30):
        exact = dense_ppr(graph, node, dangling)
        score_N = spread(found.query(node, rounds=120, eps=0), 30)
        assert np.abs(score_N - exact).sum() < 2 * 0.85**120 / ALPHA + 1e-12
        for rounds in (0, 1, 2, 5):
            ids, score = found.query(node, rounds=rounds, eps=0)
            assert score.sum() == pytest.approx(1, abs=1e-6)
            assert (np.diff(score) <= 0).all()
            assert len(set(ids.tolist())) == len(ids)


def test_decomposition_is_the_stated_identity():
    """T rounds equal alpha sum_k c^k e P^k + c^T e P^T X, with X the dense matrix of fingerprints."""
    graph = connected(2, directed=True)
    found = PowerWalk(walks=30).build(graph)
    matrix = graph.to_scipy(np.float64).toarray()
    matrix /= matrix.sum(1, keepdims=True)
    prints_NN = np.array([spread(found.fingerprint(node), 40) for node in range(40)])
    start = np.eye(40)[7]
    for rounds in range(5):
        flow, result = start, np.zeros(40)
        for _ in range(rounds):
            result, flow = result + ALPHA * flow, 0.85 * flow @ matrix
        assert np.abs(spread(found.query(7, rounds=rounds, eps=0), 40) - (result + flow @ prints_NN)).sum() < 1e-12
        alone = found.query(7, rounds=rounds, eps=0, use_index=False)
        assert np.abs(spread(alone, 40) - result).sum() < 1e-12
        assert alone[1].sum() == pytest.approx(1 - 0.85**rounds)


def test_no_rounds_give_the_fingerprint():
    found = PowerWalk(walks=30).build(connected())
    for node in (0, 9):
        ids, score = found.query(node, rounds=0)
        expected, value = found.fingerprint(node)
        assert np.array_equal(ids, expected)
        assert score == pytest.approx(value, abs=1e-15)


def test_a_mixture_of_seeds_is_the_mixture_of_answers():
    for dangling in DANGLING:
        graph = random_graph(6)
        found = PowerWalk(walks=20, dangling=dangling).build(graph)
        mixed = spread(found.query({7: 1.0, 8: 2.0, 29: 1.0}, eps=0), 30)
        parts = [spread(found.query(node, eps=0), 30) for node in (7, 8, 29)]
        assert np.abs(mixed - np.dot([0.25, 0.5, 0.25], parts)).sum() < 1e-6
        assert np.array_equal(mixed, spread(found.query(([29, 8, 7], [0.5, 1.0, 0.5]), eps=0), 30))


@pytest.mark.parametrize("method", ["forward", "backward", "auto"])
@pytest.mark.parametrize("dangling", DANGLING)
def test_batches_equal_single_queries(method, dangling, monkeypatch):
    monkeypatch.setattr("anabranch.graph.powerwalk.batch.PIECE", 4)
    monkeypatch.setattr("anabranch.graph.powerwalk.batch.DEMAND", 9)
    graph = random_graph(7)
    found = PowerWalk(walks=20, dangling=dangling, workers=2).build(graph)
    queries = [5, 0, 7, [1, 2], 5, {29: 0.5, 3: 1.5}, *range(20)]
    for rounds in (0, 1, 2):
        for top_k in (None, 4):
            rows = found.query_batch(queries, top_k, rounds, eps=0, method=method)
            assert len(rows) == len(queries)
            for number, seeds in enumerate(queries):
                ids, score = found.query(seeds, top_k, rounds, eps=0)
                assert np.abs(spread(rows.row(number), 30) - spread((ids, score), 30)).max() < 1e-6
                assert rows.row(number)[1] == pytest.approx(score, abs=1e-6)
    assert len(found.query_batch([])) == 0


@settings(max_examples=15)
@given(st.integers(0, 1000), st.integers(0, 4), st.sampled_from(DANGLING))
def test_a_batch_of_everything_sums_to_one(seed, rounds, dangling):
    graph = random_graph(seed, num_nodes=20, num_edges=40)
    rows = PowerWalk(walks=5, dangling=dangling).build(graph).query_batch(range(20), rounds=rounds, eps=0)
    assert rows.sums() == pytest.approx(np.ones(20), abs=1e-5)


def test_flows_that_are_not_followed_are_counted():
    found = PowerWalk(walks=30).build(connected())
    exact = spread(found.query(0, rounds=4, eps=0), 40)
    facts = found.inspect(0, rounds=4, eps=0.01)
    assert facts["dropped"] > 0
    score_N = spread(found.query(0, rounds=4, eps=0.01), 40)
    assert score_N.sum() == pytest.approx(1 - facts["dropped"], abs=1e-9)
    assert (score_N <= exact + 0.2).all()
    assert found.inspect(0, rounds=4, eps=0)["dropped"] == 0
    assert facts["reads"] < found.inspect(0, rounds=4, eps=0)["reads"]
    assert facts["bound"] == pytest.approx(2 * 0.85**4 + facts["dropped"])


def test_an_index_of_hubs_answers_for_all():
    graph = connected(3, directed=True)
    hubs = PowerWalk(walks=2000, min_in_degree=3, dtype="f32").build(graph)
    chosen = np.flatnonzero(graph.reversed.degree_N >= 3)
    assert 0 < len(chosen) < 40
    assert np.array_equal(np.flatnonzero(hubs._index.has_N), chosen)
    for node in range(40):
        score_N = spread(hubs.query(node, rounds=2, eps=0), 40)
        assert np.abs(score_N - dense_ppr(graph, node)).sum() < 0.12
        assert score_N.sum() == pytest.approx(1, abs=1e-3)
    with pytest.raises(InputError, match="has no fingerprint"):
        hubs.query_batch(range(40), method="backward")
    with pytest.raises(InputError, match="has no fingerprint"):
        hubs.fingerprint(int(np.setdiff1d(np.arange(40), chosen)[0]))


def test_rounds_by_budget(monkeypatch):
    found = PowerWalk(walks=30).build(connected(num_nodes=200))
    monkeypatch.setattr("anabranch.graph.powerwalk.asking.BUDGET", 2000)
    assert 0 < found.inspect(0, "auto")["reads"] <= 2000
    monkeypatch.setattr("anabranch.graph.powerwalk.asking.BUDGET", 1)
    assert np.array_equal(found.query(0, rounds="auto")[0], found.query(0, rounds=0)[0])
    monkeypatch.setattr("anabranch.graph.powerwalk.asking.BUDGET", 10**9)
    assert np.array_equal(found.query(0, rounds="auto")[1], found.query(0, rounds=8)[1])


def test_a_batch_on_a_diffuse_graph_is_answered_exactly(monkeypatch):
    monkeypatch.setattr("anabranch.graph.powerwalk.asking.EXACT_ROUNDS", 3)
    generator = np.random.default_rng(0)
    ends = generator.integers(0, 100, (2, 300))
    graph = Graph.from_edges(*ends, num_nodes=100)
    rows = PowerWalk(walks=200).build(graph).query_batch(range(100), rounds="auto")
    for node in (0, 50):
        assert np.abs(spread(rows.row(node), 100) - power_iteration(graph, node)).sum() < 1.1e-4


def test_error_bounds():
    graph = connected(4, num_nodes=100)
    found = PowerWalk(walks=20).build(graph)
    raw = max(np.abs(spread(found.query(node, rounds=0), 100) - dense_ppr(graph, node)).sum() for node in range(100))
    assert found.error_bound(0, sample=100) == pytest.approx(raw, abs=1e-4)
    for rounds in range(4):
        worst = max(
            np.abs(spread(found.query(node, rounds=rounds, eps=0), 100) - dense_ppr(graph, node)).sum()
            for node in range(100)
        )
        assert worst <= found.error_bound(rounds, sample=100) + 1e-9 <= found.error_bound(rounds)
    assert found.error_bound(3) == pytest.approx(2 * 0.85**3)


def test_dead_ends_lead_to_the_set():
    graph = random_graph(3)
    seeds = {0: 1.0, 8: 1.0, 9: 2.0}
    exact = power_iteration(graph, seeds, tol=1e-13)
    model = PowerWalk(walks=20).build(graph)
    found = spread(model.query(seeds, rounds=150, eps=0), graph.num_nodes)
    assert np.abs(found - exact).max() < 1e-9
    for method in ("forward", "backward"):
        rows = model.query_batch([3, seeds], rounds=150, eps=0, method=method)
        assert np.abs(spread(rows.row(1), graph.num_nodes) - exact).max() < 1e-6
    former = power_iteration(graph, seeds, dangling="source", tol=1e-13)
    assert np.abs(former - exact).max() > 0.01
    kept = PowerWalk(walks=20, dangling="source").build(graph).query(seeds, rounds=150, eps=0)
    assert np.abs(spread(kept, graph.num_nodes) - former).max() < 1e-9


@pytest.mark.parametrize("dangling", DANGLING)
def test_edges_of_the_definition(dangling):
    graph = Graph.from_edges(
        [0, 1, 3], [1, 1, 4], directed=True, num_nodes=6
    )  # 0 -> 1 (loop), 3 -> 4 (dead end), 2 and 5 alone
    found = PowerWalk(walks=4000, dangling=dangling, dtype="f32").build(graph)
    if dangling != "uniform":
        assert [part.tolist() for part in found.query(2)] == [[2], [pytest.approx(1)]]  # isolated
        assert set(found.query(0)[0].tolist()) == {0, 1}  # unreachable nodes are absent
    for node in range(6):
        for rounds in (1, 3):
            error = spread(found.query(node, rounds=rounds), 6) - dense_ppr(graph, node, dangling)
            assert np.abs(error).sum() < 0.05, (node, rounds)


# -- keeping it


@pytest.mark.parametrize(
    "changes", [{}, {"mode": "endpoint", "track": True}, {"keep": 3, "track": True}, {"dtype": "f32"}]
)
def test_an_update_is_a_new_build_that_walks_less(changes):
    graph = random_graph(8, num_nodes=200, num_edges=260)
    source, target, weight = graph.edges()
    changed = Graph.from_edges(
        np.append(source, [3, 50]), np.append(target, [5, 51]), np.append(weight, [2, 9]), True, 200
    )
    found = PowerWalk(walks=15, **changes).build(graph)
    stale = found.update(changed)
    assert 0 < len(stale) < 150
    fresh = PowerWalk(walks=15, **changes).build(changed)
    assert same_index(found, fresh)
    assert np.array_equal(found.query(3)[1], fresh.query(3)[1])
    assert len(found.update(changed)) == 0


@settings(max_examples=15)
@given(st.integers(0, 10_000), st.booleans(), st.booleans(), st.sampled_from(DANGLING), st.sampled_from([0, 2]))
def test_an_update_by_edges_with_new_nodes_is_a_build_from_all_edges(seed, directed, weighted, dangling, least):
    """To the byte: the graph, every row, and so every answer."""
    graph = random_graph(seed, num_nodes=40, num_edges=60, directed=directed, weighted=weighted)
    options = {"walks": 8, "dangling": dangling, "min_in_degree": least}
    found = PowerWalk(**options).build(graph)
    generator = np.random.default_rng(seed)
    source, target, weight = graph.edges()
    gone = generator.permutation(len(source))[:4]
    # Some go to new nodes, some come from there.
    added = np.concatenate([generator.integers(0, 44, (5, 2)), [[3, 43], [42, 5]]])
    more = generator.lognormal(0, 1, len(added)).astype(np.float32)
    kept = np.delete(np.arange(len(source)), gone)
    weights = np.append(weight[kept], more) if weighted else None
    rebuilt = Graph.from_edges(
        np.append(source[kept], added[:, 0]), np.append(target[kept], added[:, 1]), weights, directed, 44
    )
    removed = np.stack([target[gone], source[gone]], 1) if not directed else (source[gone], target[gone])
    edges = (added[:, 0], added[:, 1], more) if weighted else added
    stale = found.update(edges_added=edges, edges_removed=removed)
    assert found.graph.equals(rebuilt)
    if least == 0:
        assert {40, 41, 42, 43} <= set(stale[:4].tolist())
    fresh = PowerWalk(**options).build(rebuilt)
    # A node whose in-edges went keeps its row; all others are those of a build.
    left = found._index.has_N & ~fresh._index.has_N
    assert least or not left.any()
    for node in np.flatnonzero(fresh._index.has_N):
        ids, scores = found.fingerprint(node)
        assert np.array_equal(ids, fresh.fingerprint(node)[0])
        # Sums over all rows decide the last digit under ``absorb``, and a kept row is one more.
        assert scores == pytest.approx(fresh.fingerprint(node)[1], rel=1e-12)
    if not left.any():
        assert same_index(found, fresh)


def test_new_nodes_answer_before_they_are_walked_and_after(tmp_path):
    """By exact scores of the new graph: within the error of an index that was built of it."""
    graph = connected(num_nodes=60)
    found = PowerWalk(walks=400, track=True).build(graph)
    stale = found.update(edges_added=[(3, 60), (60, 61), (61, 7)], refresh=False)
    assert set(stale[:2]) == {60, 61}
    waiting = found.query(61, rounds=3, eps=0)[1].sum()
    assert waiting == pytest.approx(1, abs=1e-6)
    found.refresh()
    fresh = PowerWalk(walks=400, track=True).build(found.graph)
    assert same_index(found, fresh)
    for node in (60, 61, 3, 30):
        error = np.abs(spread(found.query(node), 62) - dense_ppr(found.graph, node)).sum()
        assert error <= 0.85**2 * 0.35
    found.save(tmp_path / "new.anb")
    assert same_index(PowerWalk.load(tmp_path / "new.anb", found.graph), fresh)


def test_an_index_of_chosen_nodes_gets_no_rows_of_new_ones():
    found = PowerWalk(walks=5).build(connected(num_nodes=30), [1, 2, 3])
    found.update(edges_added=[(0, 30)])
    assert np.flatnonzero(found._index.has_N).tolist() == [1, 2, 3]
    ids, scores = found.query(30)
    assert 30 in ids[:2]
    assert scores.sum() == pytest.approx(1, abs=1e-4)


def test_a_graph_whose_nodes_are_others_is_no_successor():
    named = Graph.from_edges([0, 1], [1, 2], names=["a", "b", "c"])
    found = PowerWalk(walks=5).build(named)
    with pytest.raises(InputError, match="node 1 is 'x' in the graph and 'b' in the index"):
        found.update(Graph.from_edges([0, 1], [1, 2], names=["a", "x", "c"]))
    found.update(edges_added=[("c", "d")], edges_removed=[("b", "a")])
    assert found.graph.names.tolist() == ["a", "b", "c", "d"]
    assert same_index(found, PowerWalk(walks=5).build(found.graph))


def test_rows_can_wait_to_be_refreshed():
    graph = connected(num_nodes=60)
    source, target, weight = graph.edges()
    changed = Graph.from_edges(source, target, np.where(source == 4, 5 * weight, weight), num_nodes=60)
    found = PowerWalk(walks=10).build(graph)
    stale = found.update(changed, refresh=False)
    assert stale[0] in (4, *changed.neighbors(4))
    with pytest.raises(InputError, match="rows are stale"):
        found.save("nowhere")
    assert found.refresh(0.5) == -(-len(stale) // 2)
    assert np.array_equal(found.stale, stale[-(-len(stale) // 2) :])
    found.refresh()
    assert same_index(found, PowerWalk(walks=10).build(changed))


@pytest.mark.parametrize(
    "changes", [{}, {"dtype": "f32", "keep": 4}, {"track": True, "mode": "endpoint"}, {"min_in_degree": 3}]
)
def test_saved_mapped_and_streamed_indexes_are_the_same(changes, tmp_path):
    graph = random_graph(9, num_nodes=100, num_edges=300)
    found = PowerWalk(walks=15, seed=3, **changes).build(graph)
    found.save(tmp_path / "one")
    streamed = PowerWalk(walks=15, seed=3, workers=2, **changes).build(graph, out=tmp_path / "two")
    for other in (
        streamed,
        PowerWalk.load(tmp_path / "one", graph),
        PowerWalk.load(tmp_path / "one", graph, mmap=True),
        PowerWalk.load(tmp_path / "two", graph),
    ):
        assert same_index(found, other)
        assert other.get_params() | {"workers": None} == found.get_params()
        assert np.array_equal(found.query(5)[1], other.query(5)[1])
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]


def test_scores_from_elsewhere_serve_as_an_index():
    graph = connected(5)
    rows = power_rows(graph, range(40), tol=1e-12)
    found = PowerWalk.from_rows(graph, rows)
    half = PowerWalk.from_rows(graph, replace(rows.take(np.arange(39, 9, -1)), nodes=np.arange(39, 9, -1)), dtype="f16")
    for node in range(40):
        exact = dense_ppr(graph, node)
        for rounds in (0, 1, 3):
            assert np.abs(spread(found.query(node, rounds=rounds, eps=0), 40) - exact).sum() < 1e-6
        assert np.abs(spread(half.query(node, rounds=2, eps=0), 40) - exact).sum() < 2e-3
    with pytest.raises(InputError, match="reach nodes without out-edges"):
        PowerWalk.from_rows(random_graph(1), power_rows(random_graph(1), range(30)))
    with pytest.raises(InputError, match="41 columns"):
        PowerWalk.from_rows(graph, replace(rows, num_columns=41))
    with pytest.raises(InputError, match="of different nodes"):
        PowerWalk.from_rows(graph, replace(rows, nodes=np.zeros(40, np.int64)))


def test_a_failed_build_leaves_the_file_as_it_was(tmp_path):
    graph = random_graph(9)
    PowerWalk(walks=5).build(graph, out=tmp_path / "index")
    before = (tmp_path / "index").read_bytes()

    def stop(done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        PowerWalk(walks=9).build(graph, out=tmp_path / "index", progress=stop)
    assert (tmp_path / "index").read_bytes() == before
    assert os.listdir(tmp_path) == ["index"]


def test_files_that_do_not_fit_are_refused(tmp_path):
    graph = random_graph(9)
    PowerWalk(walks=5).build(graph).save(tmp_path / "index")
    with pytest.raises(DataError, match="index of another graph"):
        PowerWalk.load(tmp_path / "index", random_graph(10))
    data = bytearray((tmp_path / "index").read_bytes())
    (tmp_path / "short").write_bytes(data[:-70])
    data[-70] ^= 1
    (tmp_path / "flipped").write_bytes(data)
    graph.save(tmp_path / "graph")
    for name, message in (
        ("short", "truncated"),
        ("flipped", "checksum"),
        ("graph", "holds a graph"),
        ("none", "no such file"),
    ):
        with pytest.raises(DataError, match=message):
            PowerWalk.load(tmp_path / name, graph)


def test_sparse_rows_are_a_value(tmp_path):
    rows = SparseRows.from_rows([([3, 1], [0.5, 0.25]), ([], []), ([2], [1.0])], 4, nodes=np.array([7, 8, 9]))
    rows.save(tmp_path / "rows")
    again = SparseRows.load(tmp_path / "rows", mmap=True)
    assert [part.tolist() for part in again.row(0)] == [[3, 1], [0.5, 0.25]]
    assert again.nodes.tolist() == [7, 8, 9]
    assert again.sums().tolist() == [0.75, 0, 1]
    assert again.top(1).to_scipy().toarray().tolist() == [[0, 0, 0, 0.5], [0, 0, 0, 0], [0, 0, 1, 0]]
    assert again.take([2, 0]).row(1)[0].tolist() == [3, 1]
    with pytest.raises(InputError, match="row 3 is not one of the 3 rows"):
        again.row(3)
    with pytest.raises(InputError, match=r"^k is 0"):
        again.top(0)
    assert again.top(None) is again


def test_bad_arguments_name_what_is_wrong():
    graph = random_graph(0)
    found = PowerWalk(walks=3).build(graph)
    for call, message in (
        (lambda: PowerWalk(alpha=0), "alpha is 0"),
        (lambda: PowerWalk(alpha=1.0), "alpha is 1.0"),
        (lambda: PowerWalk(alpha=float("nan")), "alpha is nan"),
        (lambda: PowerWalk(walks=0), "walks is 0"),
        (lambda: PowerWalk(walks=10**8), "32 bits"),
        (lambda: PowerWalk(mode="path"), "mode is 'path'"),
        (lambda: PowerWalk(moves="fast"), "moves is 'fast'"),
        (lambda: PowerWalk(dtype="f8"), "dtype is 'f8'"),
        (lambda: PowerWalk(estimate="best"), "estimate is 'best'"),
        (lambda: PowerWalk(dangling="lost"), "dangling is 'lost'"),
        (lambda: PowerWalk(mass=0), "mass is 0"),
        (lambda: PowerWalk(keep=0), "keep is 0"),
        (lambda: PowerWalk(max_steps=0), "max_steps is 0"),
        (lambda: PowerWalk(min_in_degree=-1), "min_in_degree is -1"),
        (lambda: PowerWalk(seed=-1), "seed is -1"),
        (lambda: PowerWalk(workers=0), "workers is 0"),
        (lambda: PowerWalk(long_path=True, max_steps=3), "long_path goes with"),
        (lambda: PowerWalk().query(0), "no index yet"),
        (lambda: PowerWalk().build(graph, nodes=[30]), "node 30 is not one of"),
        (lambda: PowerWalk().build(Graph.from_edges([], [])), "no nodes"),
        (lambda: PowerWalk().build(Graph.from_edges([0], [1], [-1.0], allow_negative=True)), "not negative"),
        (lambda: found.query(30), "node 30 is not one of"),
        (lambda: found.query(-1), "node -1 is not one of"),
        (lambda: found.query(0, rounds=-1), "rounds is -1"),
        (lambda: found.query(0, rounds=1.5), "rounds is 1.5"),
        (lambda: found.query(0, eps=-1e-9), "eps is -1e-09"),
        (lambda: found.query(0, top_k=-3), "top_k is -3"),
        (lambda: found.query_batch([0], method="fast"), "method is 'fast'"),
        (lambda: found.query_batch([0], method="backward", rounds="auto"), "needs a number of rounds"),
        (lambda: found.query_batch([0, 31]), "node 31 is not one of"),
        (lambda: found.refresh(0), "fraction is 0"),
        (lambda: found.update(random_graph(0, num_nodes=29)), "the graph has 29 nodes"),
        (lambda: found.update(), "give the changed graph, or the edges"),
        (lambda: found.update(graph, edges_added=[(0, 1)]), "give the changed graph, or the edges"),
        (lambda: PowerWalk(walks=3, keep=2).build(graph).update(graph), "track=True"),
    ):
        with pytest.raises(InputError, match=message.replace(".", r"\.")):
            call()


def test_a_batch_of_isolated_nodes_alone():
    """Asking how their neighbourhoods overlap took the mean of nothing."""
    graph = Graph.from_edges([0], [1], num_nodes=5)
    rows = PowerWalk(walks=10).fit(graph).query_batch([3, 4], rounds=2, top_k=3)
    assert (rows.indptr.tolist(), rows.ids.tolist(), rows.values.tolist()) == ([0, 1, 2], [3, 4], [1.0, 1.0])


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("use_index", [False, True])
def test_flows_that_vanish_touch_nothing(weighted, use_index):
    """After a thousand rounds what is left of a flow is 0 in 64 bits, and 0 must not be taken for what was not touched before."""
    graph = connected(3, 12, weighted=weighted)
    model = PowerWalk(0.6, walks=50).build(graph)
    ids, scores = model.query(0, rounds=1000, eps=0, use_index=use_index)
    assert sorted(ids.tolist()) == list(range(12))
    assert (scores > 0).all()
    np.testing.assert_allclose(scores.sum(), 1, atol=1e-6)
    ids, scores = model.query_batch([0, 1], rounds=1000, eps=0).row(1)
    assert len(set(ids.tolist())) == len(ids) == 12


@pytest.mark.parametrize("again", [False, True])
def test_new_nodes_get_rows_also_after_one_lost_its_in_edges(tmp_path, again):
    graph = Graph.from_edges([0, 1, 2, 3, 1, 0], [1, 2, 0, 0, 3, 3], None, True, 4)
    found = PowerWalk(walks=2, min_in_degree=2, seed=1).build(graph)
    found.update(edges_removed=[(1, 3)])
    if again:
        found.save(tmp_path / "walks.anb")
        found = PowerWalk.load(tmp_path / "walks.anb", found.graph)
    assert found._index.has_N.tolist() == [True, False, False, True]
    # Two in a row, of which the first is not walked yet.
    found.update(edges_added=[(0, 4), (1, 4), (4, 0)], refresh=False)
    found.update(edges_added=[(0, 5), (1, 5)])
    assert found._index.has_N.tolist() == [True, False, False, True, True, True]
    chosen = PowerWalk(walks=2, seed=1).build(graph, nodes=[0, 1])
    if again:
        chosen.save(tmp_path / "walks.anb")
        chosen = PowerWalk.load(tmp_path / "walks.anb", graph)
    chosen.update(edges_added=[(0, 4), (1, 4)])
    assert chosen._index.has_N.tolist() == [True, True, False, False, False]


def test_rows_that_wait_stay_stale_through_another_change():
    graph = connected(num_nodes=60)
    found = PowerWalk(walks=2, seed=3).build(graph)
    first = found.update(edges_added=[(3, 40, 5.0)], refresh=False)
    second = found.update(edges_added=[(50, 51, 1e-3)], refresh=False)
    assert set(first) <= set(second)
    found.refresh()
    assert same_index(found, PowerWalk(walks=2, seed=3).build(found.graph))


def test_as_many_as_there_are_may_be_asked_for():
    found = PowerWalk(walks=2).build(connected(num_nodes=8))
    assert np.array_equal(found.query(5, top_k=10**30)[0], found.query(5)[0])


@pytest.mark.parametrize("far", [-1, 40, 10**8, 2**31 - 1])
def test_scores_of_nodes_that_are_none_are_refused(far):
    """Kernels wrote beyond their arrays: the process ended."""
    graph = Graph.from_edges(np.arange(40), (np.arange(40) * 7 + 1) % 40, num_nodes=40)
    rows = power_rows(graph, range(40))
    ids = np.array(rows.ids)
    ids[len(ids) // 2] = far
    with pytest.raises(InputError, match=r"rows are no scores of 40 nodes: row .* is out of range"):
        PowerWalk.from_rows(graph, replace(rows, ids=ids))
    starts = np.array(rows.indptr)
    starts[3] = 10**9
    with pytest.raises(InputError, match="out of range"):
        PowerWalk.from_rows(graph, replace(rows, indptr=starts))


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "f32"},
        {"alpha": 0.3},
        {"walks": 9},
        {"mode": "endpoint"},
        {"dangling": "uniform"},
        {"estimate": "unbiased"},
        {"seed": 3},
        {"keep": 2},
        {"mass": 0.5},
        {"track": True},
        {"max_steps": 5},
        {"min_in_degree": 1},
    ],
)
def test_an_index_is_asked_and_changed_with_the_arguments_that_it_was_built_with(tmp_path, change):
    """After ``dtype`` counts of 16 and of 32 bits were copied as if they were one; another ``alpha`` gave other scores without a word."""
    graph = Graph.from_edges(np.arange(40), (np.arange(40) * 7 + 1) % 40, num_nodes=40)
    found = PowerWalk(walks=20).build(graph)
    found.save(tmp_path / "w.anb")
    right = found.query(3)
    for one in (found, PowerWalk.load(tmp_path / "w.anb", graph)):
        before = one.get_params()
        one.set_params(**change)
        for ask in (
            lambda one=one: one.query(3),
            lambda one=one: one.update(edges_added=([0], [15])),
            lambda one=one: one.save(tmp_path / "x.anb"),
            lambda one=one: one.fingerprint(2),
        ):
            with pytest.raises(InputError, match="when this PowerWalk was fitted; fit again, or set it back"):
                ask()
        assert not (tmp_path / "x.anb").exists()
        one.set_params(**before)
        one.set_params(workers=1)
        for now, then in zip(one.query(3), right, strict=True):
            np.testing.assert_array_equal(now, then)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ([float("nan"), 0.5], "negative, or not finite"),
        ([float("inf"), 0.5], "negative, or not finite"),
        ([-0.5, 0.5], "negative, or not finite"),
        ([30.0, 30.0], "those of one sum to 60"),
    ],
)
def test_rows_that_are_no_scores_make_no_index(values, told):
    """Queries told them as they were."""
    graph = Graph.from_edges([0, 1], [1, 0])
    rows = SparseRows.from_rows([([0, 1], values), ([0, 1], [0.5, 0.5])], 2)
    with pytest.raises(InputError, match=told):
        PowerWalk.from_rows(graph, rows)


def test_a_file_whose_counts_are_of_another_type_than_it_says_is_damaged(tmp_path):
    """Rows that were walked again were counted in it: scores were wrong by a third."""
    graph = Graph.from_edges(np.arange(30), (np.arange(30) * 7 + 1) % 30, num_nodes=30)
    path = tmp_path / "w.anb"
    PowerWalk(walks=50, workers=1, dtype="f16").build(graph).save(path)
    found = read_arrays(path, kind_of(path))
    arrays = {name: np.array(array) for name, array in found.arrays.items()}
    meta = {**found.meta, "params": {**found.meta["params"], "dtype": "f32"}}
    write_arrays(path, kind_of(path), arrays, meta, found.version)
    with pytest.raises(DataError, match="its counts are float16, and it says f32"):
        PowerWalk.load(path, graph)
