"""FullyPPR on this machine: exactness, distributions, same bytes for any chunks and threads, files, errors."""

import json
import threading
from dataclasses import replace

import igraph
import networkx as nx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from anabranch.errors import AnabranchError, CapacityError, DataError, InputError
from anabranch.graph import Graph
from anabranch.graph.datasets import load_dataset
from anabranch.graph.fully_ppr import FullyPPR, FullyPPRResult, chunks, fully_ppr
from anabranch.graph.fully_ppr.chunks import begun
from anabranch.graph.fully_ppr.options import choose_chunk, exact_bytes, walk_bytes
from anabranch.graph.powerwalk import PowerWalk


def random_graph(seed, nodes=30, edges=120, directed=True, weighted=True, **options):
    rng = np.random.default_rng(seed)
    source, target = rng.integers(0, nodes, (2, edges))
    weight = rng.lognormal(0, 1, edges) if weighted else None
    return Graph.from_edges(source, target, weight, directed, nodes + 1, **options)  # the last one is isolated


def dense_solve(graph, alpha=0.15, dangling="source"):
    """pi of all sources by linear algebra, [N, N]."""
    count = graph.num_nodes
    adjacency = graph.to_scipy(np.float64).toarray()
    strength = adjacency.sum(1)
    found = np.empty((count, count))
    for source in range(count):
        step = np.divide(adjacency, strength[:, None], out=np.zeros_like(adjacency), where=strength[:, None] > 0)
        for node in np.flatnonzero(strength == 0):
            step[node] = 1 / count
            if dangling != "uniform":
                step[node] = np.eye(count)[source if dangling == "source" else node]
        found[source] = np.linalg.solve(np.eye(count) - (1 - alpha) * step.T, alpha * np.eye(count)[source])
    return found


def same(left, right):
    return (
        np.array_equal(left.rows.indptr, right.rows.indptr)
        and np.array_equal(left.rows.ids, right.rows.ids)
        and np.array_equal(left.rows.values, right.rows.values)
        and np.array_equal(left.sources, right.sources)
    )


def karate_weighted():
    graph = nx.karate_club_graph()
    ends = np.array(graph.edges)
    return Graph.from_edges(ends[:, 0], ends[:, 1], [graph.edges[edge]["weight"] for edge in graph.edges])


def p_value(result, expected, walks):
    """Chi-square of the ends of walks over all sources, cells expected less than 5 times pooled."""
    statistic, degrees = 0.0, 0
    for row, share in zip(result.to_scipy().toarray(), expected, strict=True):
        large = share * walks >= 5
        cells = np.append(row[large] * walks, (row * walks)[~large].sum())
        wished = np.append(share[large] * walks, (share * walks)[~large].sum())
        cells, wished = cells[wished > 1e-9], wished[wished > 1e-9]
        statistic += ((cells - wished) ** 2 / wished).sum()
        degrees += len(cells) - 1
    return stats.chi2.sf(statistic, degrees)


# By hand


def test_a_path_by_hand():
    # 0 -> 1 -> 2, alpha .2, ends: .2, .8 x .2, then back to 0: pi = (.2, .16, .128) / (1 - .512)
    graph = Graph.from_edges([0, 1], [1, 2], directed=True)
    found = fully_ppr(graph, 0.2, method="exact", sources=[0])
    ids, scores = found.top(0)
    assert ids.tolist() == [0, 1, 2]
    assert scores == pytest.approx(np.array([0.2, 0.16, 0.128]) / (1 - 0.512 + 0.8**3 * 0.0), abs=1e-8)


def test_a_star_by_hand():
    # From the hub of a star with 4 leaves: x = .2 + .8 y, y = .8 x  ->  x = .2 / .36, each leaf .8 x / 4
    found = fully_ppr(Graph.from_edges([0] * 4, [1, 2, 3, 4]), 0.2, method="exact")
    assert found.top(0)[1] == pytest.approx([0.2 / 0.36, *[0.04 / 0.36 * 4 / 4] * 4][:1] + [0.8 * 0.2 / 0.36 / 4] * 4)
    assert found.top(0)[0].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("method", ["walks", "decompose", "exact"])
@pytest.mark.parametrize("estimator", ["endpoint", "fullpath"])
def test_an_isolated_node_has_itself_alone(method, estimator):
    ids, scores = fully_ppr(random_graph(0), method=method, estimator=estimator).top(30)
    assert (ids.tolist(), scores.tolist()) == ([30], [pytest.approx(1, abs=1e-8)])


# Exact


@pytest.mark.parametrize("dangling", ["source", "absorb", "uniform"])
@pytest.mark.parametrize(("directed", "weighted"), [(True, True), (False, True), (True, False)])
def test_exact_scores_solve_the_equations(dangling, directed, weighted):
    graph = random_graph(1, directed=directed, weighted=weighted)
    found = fully_ppr(graph, method="exact", dangling=dangling, top_k=None, tol=1e-10)
    assert np.abs(found.to_scipy().toarray() - dense_solve(graph, dangling=dangling)).max() < 1e-9


def test_exact_scores_are_those_of_networkx_and_igraph():
    graph = karate_weighted()
    found = fully_ppr(graph, method="exact", top_k=None, tol=1e-10).to_scipy().toarray()
    source, target, weight = graph.edges()
    other = nx.Graph()
    other.add_weighted_edges_from(zip(source.tolist(), target.tolist(), weight.tolist(), strict=True))
    peer = igraph.Graph(
        list(zip(source.tolist(), target.tolist(), strict=True)), edge_attrs={"weight": weight.tolist()}
    )
    for node in range(graph.num_nodes):
        theirs = nx.pagerank(other, 0.85, personalization={node: 1}, tol=1e-14, max_iter=1000)
        assert found[node] == pytest.approx([theirs[at] for at in range(graph.num_nodes)], abs=1e-8)
        theirs = peer.personalized_pagerank(damping=0.85, reset_vertices=node, weights="weight")
        assert found[node] == pytest.approx(theirs, abs=1e-8)


def test_a_wide_tolerance_is_kept_by_push():
    graph = random_graph(2)
    found = fully_ppr(graph, method="exact", top_k=None, tol=0.02)
    error = np.abs(found.to_scipy().toarray() - dense_solve(graph)).sum(1)
    assert error.max() <= 0.02
    assert error.max() > 1e-6  # not the power iteration


# Walks


@pytest.mark.parametrize("dangling", ["source", "absorb", "uniform"])
def test_ends_of_walks_have_the_exact_distribution(dangling):
    graph = random_graph(3, nodes=15, edges=45)
    found = fully_ppr(graph, 0.2, walks=20_000, top_k=None, method="walks", dangling=dangling)
    assert p_value(found, dense_solve(graph, 0.2, dangling), 20_000) > 1e-3
    counts = found.to_scipy().toarray() * 20_000
    assert counts == pytest.approx(counts.round(), abs=2e-2)
    assert (counts.round().sum(1) == 20_000).all()


@pytest.mark.parametrize("name", ["karate", "lesmis"])
def test_ends_of_walks_on_real_graphs(name):
    graph = karate_weighted() if name == "karate" else load_dataset("lesmis").graph
    found = fully_ppr(graph, 0.2, walks=20_000, top_k=None, method="walks", seed=1)
    assert p_value(found, dense_solve(graph, 0.2), 20_000) > 1e-3
    plain = Graph(graph.indptr, graph.indices)
    assert p_value(found, dense_solve(plain, 0.2), 20_000) < 1e-9  # weights matter


def test_visits_are_right_and_vary_less_than_ends():
    graph = random_graph(4)
    expected = dense_solve(graph)
    error = {
        estimator: np.abs(
            fully_ppr(graph, walks=5000, method="walks", estimator=estimator, top_k=None).to_scipy() - expected
        ).sum()
        for estimator in ("endpoint", "fullpath")
    }
    assert error["fullpath"] < 0.7 * error["endpoint"]
    found = fully_ppr(graph, walks=200_000, method="walks", estimator="fullpath", top_k=None)
    assert np.abs(found.to_scipy() - expected).max() < 0.005
    assert found.rows.sums() == pytest.approx(np.ones(31), abs=1e-5)


def test_the_bound_of_an_accuracy_holds():
    graph = karate_weighted()
    eps, delta, p_f = 0.5, 0.02, 0.1
    found = fully_ppr(graph, eps=eps, delta=delta, p_f=p_f, method="walks", top_k=None)
    assert found.facts["walks"] == 1399  # (2 + 1/3) ln 20 / (.25 x .02)
    expected = dense_solve(graph)
    large = expected >= delta
    missed = np.abs(found.to_scipy().toarray() - expected)[large] > eps * expected[large]
    assert missed.mean() < p_f


@pytest.mark.parametrize("top_k", [1, 3, 31, 500, None])
def test_rows_are_the_first_of_the_whole_rows(top_k):
    graph = random_graph(5)
    whole = fully_ppr(graph, walks=300, method="walks", top_k=None)
    found = fully_ppr(graph, walks=300, method="walks", top_k=top_k)
    for node in range(31):
        ids, scores = whole.top(node)
        assert (np.diff(scores) <= 0).all()
        order = np.lexsort((ids, -scores))
        assert np.array_equal(order, np.arange(len(ids)))  # ties by rising id
        assert np.array_equal(found.top(node)[0], ids[:top_k])
        assert np.array_equal(found.top(node, 2)[1], scores[: min(2, top_k or 2)])


def test_a_least_score_cuts_rows():
    graph = random_graph(5)
    for method in ("walks", "decompose", "exact"):
        whole = fully_ppr(graph, method=method, top_k=None)
        found = fully_ppr(graph, method=method, top_k=None, min_score=0.05)
        assert found.rows.values.min() >= np.float32(0.05)
        assert len(found.rows.ids) == (whole.rows.values >= 0.05).sum()


@pytest.mark.parametrize("dangling", ["source", "absorb", "uniform"])
def test_decomposition_is_near_the_truth_and_nearer_with_each_round(dangling):
    graph = random_graph(4)
    expected = dense_solve(graph, dangling=dangling)
    error = []
    for rounds in (0, 2, 8, 40):
        found = fully_ppr(graph, method="decompose", rounds=rounds, top_k=None, dangling=dangling)
        error.append(np.abs(found.to_scipy() - expected).sum(1).mean())
    assert error[1] < 0.6 * error[0]
    assert error[2] < 0.6 * error[1]
    assert error[3] < 0.01


def test_sources_without_a_score_of_that_size_keep_their_empty_rows(tmp_path):
    graph = random_graph(5)
    for suffix in (".anb", ".parquet"):
        found = fully_ppr(graph, walks=100, min_score=0.5, out=tmp_path / f"x{suffix}")
        length = np.diff(found.rows.indptr)
        assert (length == 0).any()
        assert found.top(30)[0].tolist() == [30]
        assert found.top(int(np.argmin(length)))[0].tolist() == []


# The same, however it is made


@pytest.mark.parametrize("method", ["walks", "decompose", "exact"])
def test_threads_and_chunks_change_nothing(method, monkeypatch, tmp_path):
    graph = random_graph(6, nodes=400, edges=2000)
    one = fully_ppr(graph, method=method, walks=200, workers=1, tol=1e-6)
    for chunk in (61, 150):
        for workers in (1, 3):
            monkeypatch.setattr("anabranch.graph.fully_ppr.api.choose_chunk", lambda *_, chunk=chunk: chunk)
            assert same(one, fully_ppr(graph, method=method, walks=200, workers=workers, tol=1e-6))
            found = fully_ppr(graph, method=method, walks=200, workers=workers, tol=1e-6, out=tmp_path / f"{chunk}")
            assert same(one, found)
            (tmp_path / f"{chunk}").unlink()
    if method != "exact":
        assert not same(one, fully_ppr(graph, method=method, walks=200, seed=1))


@given(st.integers(0, 100), st.sampled_from(["endpoint", "fullpath"]))
def test_a_source_s_row_does_not_depend_on_the_others(seed, estimator):
    graph = random_graph(7)
    chosen = np.random.default_rng(seed).permutation(31)[:7]
    whole = fully_ppr(graph, walks=50, method="walks", estimator=estimator, seed=seed)
    part = fully_ppr(graph, walks=50, method="walks", estimator=estimator, seed=seed, sources=chosen)
    assert part.sources.tolist() == chosen.tolist()
    for node in chosen.tolist():
        for left, right in zip(whole.top(node), part.top(node), strict=True):
            assert np.array_equal(left, right)


def test_seeds_of_any_size_are_taken():
    graph = random_graph(7)
    assert same(fully_ppr(graph, walks=9, seed=-1), fully_ppr(graph, walks=9, seed=2**64 - 1))
    assert not same(fully_ppr(graph, walks=9, seed=-1), fully_ppr(graph, walks=9, seed=1))


# What "auto" means


def chosen(graph, num_sources=None, *, is_kept=False, begun=None, **options):
    """Method of "auto" on this machine."""
    return FullyPPR(**options)._options().choose_method(graph, "local", num_sources, is_kept=is_kept, begun=begun)


def test_auto_takes_the_least_work():
    small, large = random_graph(0), random_graph(0, nodes=50_000, edges=200_000)
    assert chosen(small) == "exact"
    assert chosen(large) == "decompose"
    assert chosen(large, walks=10) == "walks"
    assert chosen(large, eps=0.5, delta=0.01, p_f=0.1) == "walks"
    assert chosen(small, method="walks") == "walks"
    model = FullyPPR()
    assert model._options().choose_method(small, "spark") == "walks"
    tight = walk_bytes(large) + 5_000_000  # neither an index of 100 walks nor a factor fits
    assert chosen(large, memory_limit=tight) == "walks"
    assert FullyPPR(memory_limit=100)._choose_engine(large, FullyPPR(memory_limit=100)._options()) == "spark"
    assert model._choose_engine(large, model._options()) == "local"


def test_auto_solves_where_a_decomposition_would_read_most_of_the_graph():
    # Sixty neighbours each: neighbours of neighbours are everybody, and every one's walks are added up for every source.
    dense = random_graph(0, nodes=2_000, edges=60_000, directed=False)
    sparse = random_graph(0, nodes=10_000, edges=30_000, directed=False)
    assert chosen(dense) == "exact"
    assert chosen(sparse) == "decompose"
    assert chosen(dense, memory_limit=int(exact_bytes(dense, 1)) - 1) != "exact"
    # Twenty rounds reach everybody on the sparse one too.
    assert chosen(sparse, rounds=20) == "exact"
    # An index of all nodes is too much for one source.
    assert chosen(sparse, 1) == "exact"


def test_auto_solves_where_the_index_alone_does_not_fit():
    path = Graph.from_edges(np.arange(19_999), np.arange(1, 20_000))
    assert chosen(path) == "decompose"
    assert chosen(path, memory_limit=60_000_000) == "exact"


@pytest.mark.parametrize("workers", [1, 64])
def test_auto_does_not_look_at_threads_and_uses_no_more_than_fit(workers):
    graph = random_graph(0, nodes=1000, edges=40_000, directed=False)
    limit = int(exact_bytes(graph, 2))
    model = FullyPPR(memory_limit=limit, workers=workers, top_k=5, sources=[0, 1, 2, 3, 4, 5, 6, 7]).fit(graph)
    assert model.result_.facts["method"] == "exact"
    options = model._options()
    fitting = options.fitting_workers(graph, "exact", 8, is_kept=True)
    assert fitting == 1 if workers == 1 else 1 <= fitting < 8
    assert options.needed(graph, "exact", fitting, 8, is_kept=True) <= limit
    # Rows that are kept are there twice while they are put together.
    kept, written = (options.needed(graph, "exact", 1, 8, is_kept=is_kept) for is_kept in (True, False))
    assert kept - written == pytest.approx(2 * 8 * options.row_bytes(graph, "exact"))
    plenty = FullyPPR(memory_limit=10**12, workers=workers)._options()
    assert plenty.fitting_workers(graph, "exact", 8, is_kept=True) == min(workers, 8)


def test_auto_does_not_look_at_what_memory_is_free(monkeypatch):
    graph = random_graph(0, nodes=1000, edges=40_000, directed=False)
    assert chosen(graph) == "exact"
    monkeypatch.setattr("anabranch.machine.room_bytes", lambda *_: 1_000_000)
    assert chosen(graph) == "exact"
    assert FullyPPR()._choose_engine(graph, FullyPPR()._options()) == "local"
    with pytest.raises(CapacityError, match=r"method 'exact' .* a memory_limit that is free now"):
        fully_ppr(graph)
    monkeypatch.setattr("anabranch.machine.whole_bytes", lambda *_: 2_000_000)
    assert chosen(graph) == "walks"


@pytest.mark.parametrize("method", ["exact", "decompose"])
def test_a_run_goes_on_by_the_method_that_it_began_with(method, tmp_path, monkeypatch):
    graph, cancel = random_graph(0, nodes=300, edges=3000), threading.Event()
    out, sources = tmp_path / "x", list(range(200))
    monkeypatch.setattr("anabranch.graph.fully_ppr.options.is_exact_quicker", lambda *_: method == "exact")
    with pytest.raises(AnabranchError, match="cancelled"):
        fully_ppr(graph, sources=sources, out=out, workers=1, cancel=cancel, progress=lambda *_: cancel.set())
    monkeypatch.setattr("anabranch.graph.fully_ppr.options.is_exact_quicker", lambda *_: method != "exact")
    # As when the machine says that it has less: not even engine and method "walks" come instead.
    monkeypatch.setattr("anabranch.machine.whole_bytes", lambda *_: 1000)
    found = fully_ppr(graph, sources=sources, out=out, workers=4)
    assert found.facts["method"] == method
    assert same(found, fully_ppr(graph, sources=sources, method=method, engine="local", memory_limit=10**12))
    # A method that is named is another run.
    assert chosen(graph, begun={"method": "exact"}, method="walks") == "walks"
    assert chosen(graph, begun={"method": "exact"}, walks=5) == "walks"


def test_what_lies_at_out_and_is_no_run_does_not_choose(tmp_path):
    graph = random_graph(0)
    assert begun(tmp_path / "x") is None
    assert begun("s3a://bucket/x") is None
    (tmp_path / "x.parts").mkdir()
    for text in ("", "{", "[]", '{"job": 3}', '{"job": {"facts": [1]}}', '{"job": {"facts": {"method": "other"}}}'):
        (tmp_path / "x.parts" / "manifest.json").write_text(text)
        assert chosen(graph, begun=begun(tmp_path / "x")) == "exact"
        with pytest.raises(DataError, match="remove"):
            fully_ppr(graph, out=tmp_path / "x")


def test_auto_counts_rows():
    # Exact rows are of 12 bytes an entry, those of a decomposition of 8.
    graph = random_graph(0, nodes=2000, edges=60_000, directed=False)
    options = FullyPPR(top_k=None)._options()
    exact, decompose, walks = (
        options.needed(graph, name, 1, 2001, is_kept=True) for name in ("exact", "decompose", "walks")
    )
    assert walks < decompose < exact
    for limit, method in ((exact, "exact"), (exact - 1, "decompose"), (decompose - 1, "walks")):
        assert chosen(graph, is_kept=True, top_k=None, memory_limit=int(limit)) == method
    # What goes to a file is not kept.
    assert chosen(graph, top_k=None, memory_limit=int(exact) - 1) == "exact"
    model = FullyPPR(top_k=None, memory_limit=int(decompose) - 1, workers=1).fit(graph)
    assert model.result_.facts["method"] == "walks"


def test_chunks_fit_the_memory():
    assert choose_chunk(64_000, 2, 100, 1e12) == 1000
    assert choose_chunk(10**9, 2, 100, 1e12) == 4096
    assert choose_chunk(64_000, 2, 100, 6000) == 10  # 2 x 3 chunks of 100 bytes a row
    assert choose_chunk(3, 8, 100, 0) == 1


def test_bytes_that_walks_read_by_hand():
    graph = random_graph(0, weighted=False)
    assert walk_bytes(graph) == 32 * 8 + 4 * len(graph.indices)
    graph = random_graph(0)
    assert walk_bytes(graph) == 32 * 8 + 12 * len(graph.indices)
    arrays = graph.alias
    assert walk_bytes(graph) == graph.indptr.nbytes + graph.indices.nbytes + arrays.nbytes


# Files


@pytest.mark.parametrize("suffix", [".anb", ".parquet"])
@pytest.mark.parametrize("named", [None, "text", "numbers"])
@pytest.mark.parametrize("some", [False, True])
def test_written_is_what_would_be_in_memory(suffix, named, some, tmp_path):
    names = {None: None, "text": [f"né{i}" for i in range(31)], "numbers": np.arange(31) * 10}[named]
    graph = random_graph(8, names=names)
    sources = [5, 30, 2] if some else None
    kept = fully_ppr(graph, walks=100, method="walks", sources=sources)
    streamed = fully_ppr(graph, walks=100, method="walks", sources=sources, out=tmp_path / f"out{suffix}")
    kept.save(tmp_path / f"saved{suffix}")
    for found in (streamed, FullyPPRResult.load(tmp_path / f"saved{suffix}"), FullyPPR.load(tmp_path / f"out{suffix}")):
        assert same(kept, found)
        assert (
            found.facts
            == kept.facts
            == {
                "method": "walks",
                "alpha": 0.15,
                "dangling": "source",
                "top_k": 100,
                "min_score": 0.0,
                "seed": 0,
                "walks": 100,
                "estimator": "endpoint",
            }
        )
        assert found.num_nodes == 31
        first = found.top_named(names[5] if named else 5, 1)
        assert first == kept.top_named(names[5] if named else 5, 1)
        assert first[0][0] == (names[5] if named else 5)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"out{suffix}", f"saved{suffix}"]


def test_parquet_has_the_columns_of_the_schema(tmp_path):
    graph = random_graph(8, names=[f"n{i}" for i in range(31)])
    found = fully_ppr(graph, walks=100, out=tmp_path / "x.parquet")
    table = pq.read_table(tmp_path / "x.parquet")
    assert table.column_names == ["source", "target", "score", "source_name", "target_name"]
    assert [str(kind) for kind in table.schema.types] == ["int64", "int64", "float", "string", "string"]
    assert table.equals(found.to_arrow())
    assert table["target_name"].to_pylist() == [f"n{i}" for i in table["target"].to_pylist()]


def test_a_graph_without_edges_and_no_sources(tmp_path):
    graph = Graph.from_edges([], [], num_nodes=3)
    for method in ("walks", "decompose", "exact"):
        found = fully_ppr(graph, method=method, out=tmp_path / f"{method}.parquet")
        assert [found.top(node)[0].tolist() for node in range(3)] == [[0], [1], [2]]
        empty = fully_ppr(graph, method=method, sources=[], out=tmp_path / f"{method}-empty.anb")
        assert empty.num_sources == 0
        assert fully_ppr(graph, method=method, sources=[]).num_sources == 0


# Stopping and going on


def stopped_after(model, graph, chunks):
    """Fit until so many chunks are done, then cancel."""
    event, seen = threading.Event(), []

    def progress(done, total):
        seen.append((done, total))
        if len(seen) > chunks:
            event.set()

    model.set_params(progress=progress, cancel=event)
    with pytest.raises(AnabranchError, match=r"cancelled after .* of 400 sources"):
        model.fit(graph)
    return seen


@pytest.mark.parametrize("suffix", [".anb", ".parquet"])
def test_a_stopped_run_goes_on_where_it_was(suffix, tmp_path):
    graph, out = random_graph(9, nodes=399, edges=2000), tmp_path / f"x{suffix}"
    model = FullyPPR(walks=50, workers=1, out=out)
    seen = stopped_after(model, graph, 10)
    assert seen[0] == (0, 400)
    assert not out.exists()
    parts = tmp_path / f"x{suffix}.parts"
    chunks = sorted(parts.glob("chunk-*"))
    assert 10 <= len(chunks) < 30
    before = {path: path.stat().st_mtime_ns for path in chunks}
    again: list[tuple[int, int]] = []
    touched = []

    def progress(done, total):
        again.append((done, total))
        touched.append({path: path.stat().st_mtime_ns for path in before})

    found = FullyPPR(walks=50, workers=2, out=out, progress=progress).fit(graph).result_
    assert again[0] == (7 * len(chunks), 400)  # 400 sources, 7 a chunk
    assert again[-1] == (400, 400)
    assert touched[0] == before  # not made again
    assert same(found, fully_ppr(graph, walks=50))
    assert not parts.exists()


def test_parts_of_another_run_are_refused(tmp_path):
    graph, out = random_graph(9, nodes=399, edges=2000), tmp_path / "x"
    stopped_after(FullyPPR(walks=50, workers=1, out=out), graph, 3)
    other_graph = random_graph(10, nodes=399, edges=2000)
    for changed, changed_graph in (
        ({"walks": 51}, graph),
        ({"seed": 1}, graph),
        ({"sources": [1, 2]}, graph),
        ({}, other_graph),
    ):
        with pytest.raises(DataError, match=r"x\.parts holds parts of another run .* remove it"):
            FullyPPR(**{"walks": 50, "out": out, **changed}).fit(changed_graph)
    assert same(FullyPPR(walks=50, out=out).fit(graph).result_, fully_ppr(graph, walks=50))


def test_damaged_parts_are_refused(tmp_path):
    graph, out = random_graph(9, nodes=399, edges=2000), tmp_path / "x"
    stopped_after(FullyPPR(walks=50, workers=1, out=out), graph, 3)
    chunk = next((tmp_path / "x.parts").glob("chunk-*"))
    content = bytearray(chunk.read_bytes())
    content[-70] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(DataError, match="damaged"):
        FullyPPR(walks=50, out=out).fit(graph)
    (tmp_path / "x.parts" / "manifest.json").write_text("{")
    with pytest.raises(DataError, match="not readable; remove"):
        FullyPPR(walks=50, out=out).fit(graph)


@pytest.mark.parametrize("chunk", [0, -1, 1.5, "a", None, True, 10**30, 7, 10**9])
def test_a_manifest_that_was_written_by_hand_loses_nothing(tmp_path, chunk):
    graph, out = random_graph(9, nodes=399, edges=2000), tmp_path / "x"
    stopped_after(FullyPPR(walks=50, workers=1, out=out), graph, 3)
    path = tmp_path / "x.parts" / "manifest.json"
    manifest = json.loads(path.read_text())
    if chunk == manifest["chunk"]:
        chunk += 1
    path.write_text(json.dumps({**manifest, "chunk": chunk}))
    with pytest.raises(DataError, match=r"remove .*x\.parts to start anew"):
        FullyPPR(walks=50, out=out).fit(graph)
    assert not out.exists()


def test_parts_go_as_they_are_put_together():
    """All rows would be in memory twice."""
    graph = random_graph(9, nodes=399, edges=2000)
    job = chunks.Job(graph, np.arange(400), True, {}, np.float32, 7)
    whole = fully_ppr(graph, walks=50).rows
    held = {number: whole.take(np.arange(7 * number, 7 * number + 7)) for number in (1, 0)}
    found = chunks._together(job, held)
    assert held == {}
    expected = whole.take(np.arange(14))
    for name in ("indptr", "ids", "values"):
        assert np.array_equal(getattr(found, name), getattr(expected, name))


def test_a_run_in_memory_can_be_cancelled():
    event = threading.Event()
    event.set()
    with pytest.raises(AnabranchError, match="cancelled after 0 of 31"):
        fully_ppr(random_graph(0), walks=10, cancel=event)


def test_powerwalk_answers_from_these_rows():
    graph = random_graph(2, directed=False)
    found = fully_ppr(graph, walks=500, method="walks", estimator="fullpath", top_k=None)
    index = PowerWalk.from_rows(graph, found.rows, alpha=0.15)
    expected = dense_solve(graph)[3]
    error = []
    for rounds in (0, 3):
        ids, scores = index.query(3, rounds=rounds)
        error.append(np.abs(np.bincount(ids, scores, 31) - expected).sum())
    assert error[0] == pytest.approx(np.abs(found.to_scipy().toarray()[3] - expected).sum(), abs=1e-4)
    assert error[1] < 0.7 * error[0]


# Errors


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alpha": 0}, "alpha is 0"),
        ({"alpha": 1}, "alpha is 1"),
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"walks": 0}, "walks is 0"),
        ({"walks": 1.5}, "walks is 1.5"),
        ({"walks": 9, "eps": 0.1}, "walks and eps are both given"),
        ({"eps": 0.1}, "eps is given without delta"),
        ({"eps": 0.1, "delta": 0.1, "p_f": 2}, "p_f is 2"),
        ({"eps": 0.1, "delta": 0.1, "p_f": 0.1, "estimator": "fullpath"}, "for estimator 'endpoint'"),
        ({"eps": 1e-4, "delta": 1e-4, "p_f": 0.1}, "number of walks for this eps"),
        ({"walks": 10**7, "estimator": "fullpath"}, "would not fit 32 bits"),
        ({"top_k": 0}, "top_k is 0"),
        ({"min_score": -0.1}, "min_score is -0.1"),
        ({"engine": "dask"}, "engine is 'dask'; it must be one of auto, local, spark"),
        ({"method": "push"}, "method is 'push'"),
        ({"estimator": "middle"}, "estimator is 'middle'"),
        ({"dangling": "die"}, "dangling is 'die'"),
        ({"index_walks": 0}, "index_walks is 0"),
        ({"rounds": -1}, "rounds is -1"),
        ({"tol": 0}, "tol is 0"),
        ({"memory_limit": 0}, "memory_limit is 0"),
        ({"memory_limit": float("inf")}, "memory_limit is inf; it must be a positive number of bytes, or None"),
        ({"memory_limit": float("nan")}, "memory_limit is nan"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"workers": 0}, "workers is 0"),
        ({"plan": "both"}, "plan is 'both'"),
        ({"partitions": 0}, "partitions is 0"),
        ({"gamma": 0}, "gamma is 0"),
        ({"theta": 1}, "theta is 1"),
        ({"big_moves": 1}, "big_moves is 1"),
    ],
)
def test_bad_arguments_are_named(options, words):
    with pytest.raises(InputError, match=words):
        FullyPPR(**options)


@pytest.mark.parametrize(
    ("sources", "words"),
    [
        ([31], "node 31"),
        ([-1], "node -1"),
        ([2, 3, 2], "source 2 is given 2 times"),
        (["a"], "no node 'a'"),
        ([0.5], "integers"),
        ([[1]], "shape"),
    ],
)
def test_bad_sources_are_named(sources, words):
    with pytest.raises(InputError, match=words):
        fully_ppr(random_graph(0), sources=sources)


def test_bad_graphs_are_refused():
    with pytest.raises(InputError, match="no nodes"):
        fully_ppr(Graph.from_edges([], []))
    with pytest.raises(InputError, match="not negative"):
        fully_ppr(Graph.from_edges([0, 1], [1, 2], [1, -1], allow_negative=True))


def test_too_little_memory_says_how_much_is_needed(tmp_path):
    graph = random_graph(0, nodes=5000, edges=20_000)
    with pytest.raises(CapacityError, match=r"needs about [\d.]+ MiB, [\d.]+ MiB are allowed; use out=FILE"):
        fully_ppr(graph, walks=100, engine="local", memory_limit=1_000_000, workers=1)
    with pytest.raises(CapacityError, match="use a smaller top_k"):
        fully_ppr(graph, walks=100, engine="local", memory_limit=200_000, workers=1, out=tmp_path / "x")
    found = fully_ppr(graph, walks=100, engine="local", memory_limit=1_000_000, workers=1, out=tmp_path / "x")
    assert same(found, fully_ppr(graph, walks=100))


def test_results_refuse_what_they_do_not_have(tmp_path):
    found = fully_ppr(random_graph(0), sources=[4, 2], walks=10)
    for node, words in (
        (3, "node 3 is not one of the 2 sources"),
        (99, "node 99"),
        (-1, "node -1"),
        ("a", "not an id"),
    ):
        with pytest.raises(InputError, match=words):
            found.top(node)
    with pytest.raises(InputError, match="k is 0"):
        found.top(4, 0)
    with pytest.raises(InputError, match="call fit"):
        FullyPPR().top(0)
    named = fully_ppr(random_graph(0, names=[f"n{i}" for i in range(31)]), walks=10)
    with pytest.raises(InputError, match="no node 'x'"):
        named.top_named("x")


def test_bad_files_are_refused(tmp_path):
    found = fully_ppr(random_graph(0), walks=10)
    found.save(tmp_path / "x.anb")
    content = (tmp_path / "x.anb").read_bytes()
    for name, bad in (
        ("short", content[:-100]),
        ("foreign", b"hello"),
        ("flipped", content[:-65] + b"\xff" + content[-64:]),
    ):
        (tmp_path / name).write_bytes(bad)
        with pytest.raises(DataError):
            FullyPPRResult.load(tmp_path / name)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    (tmp_path / "folder").mkdir()
    pq.write_table(found.to_arrow().replace_schema_metadata(None), tmp_path / "plain.parquet")
    pq.write_table(found.to_arrow().drop_columns("score"), tmp_path / "column.parquet")
    for name in ("bad.parquet", "folder", "plain.parquet", "none.parquet"):
        with pytest.raises(DataError, match="cannot read the scores"):
            FullyPPRResult.load(tmp_path / name)
    with pytest.raises(DataError, match="no column 'score'"):
        FullyPPRResult.load(tmp_path / "column.parquet")
    with pytest.raises(DataError, match="is a folder"):
        fully_ppr(random_graph(0), walks=10, out=tmp_path / "folder")
    with pytest.raises(DataError):
        fully_ppr(random_graph(0), walks=10, out=tmp_path / "bad.parquet" / "x")


def test_parameters_are_kept():
    model = FullyPPR(walks=7, top_k=3)
    assert model.get_params()["walks"] == 7
    assert FullyPPR(**model.get_params()).get_params() == model.get_params()
    assert model.set_params(seed=4).fit(random_graph(0)).result_.facts["seed"] == 4
    assert json.dumps(model.result_.facts)


def test_the_function_is_found_where_the_package_of_its_name_is():
    from anabranch.graph import fully_ppr as found

    graph = random_graph(3)
    np.testing.assert_array_equal(found(graph, top_k=3).top(2), fully_ppr(graph, top_k=3).top(2))
    assert found.FullyPPR is FullyPPR


FACTS = {"kind": "scores", "num_nodes": 3, "is_all": True, "ordered": True, "facts": {}}
ROWS = {"source": [0, 1, 2], "target": [1, 2, 0], "score": [0.5, 0.5, 0.5]}


@pytest.mark.parametrize("is_all", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        {"target": [7, 2, 0]},
        {"target": [-1, 2, 0]},
        {"target": [10**12, 2, 0]},
        {"source": [7, 1, 2]},
        {"source": [-1, 1, 2]},
        {"source": pa.array([None, 1, 2])},
        {"source": ["a", "b", "c"]},
        {"score": ["a", "b", "c"]},
        {"score": [[1.0], [2.0], [3.0]]},
        {"score": [float("nan"), 0.1, 0.1]},
        {"num_nodes": 2},
        {"num_nodes": -1},
        {"num_nodes": "3"},
        {"num_nodes": None},
        {"facts": None},
        {"num_nodes": 3.0},
    ],
)
def test_a_table_of_scores_that_says_something_else_than_it_holds_is_damaged(tmp_path, change, is_all):
    """Ids beyond the nodes were taken, and an index made of them wrote beyond its arrays."""
    facts = {**FACTS, "is_all": is_all, **{name: value for name, value in change.items() if name in FACTS}}
    rows = {**ROWS, **{name: value for name, value in change.items() if name in ROWS}}
    path = tmp_path / "s.parquet"
    for name, held in (("good", (FACTS | {"is_all": is_all}, ROWS)), ("bad", (facts, rows))):
        pq.write_table(pa.table(held[1]).replace_schema_metadata({b"anabranch": json.dumps(held[0]).encode()}), path)
        if name == "good":
            assert FullyPPRResult.load(path).num_nodes == 3
    with pytest.raises(DataError, match="is damaged"):
        FullyPPRResult.load(path)


CALLED = {"source_name": ["a", "b", "c"], "target_name": ["b", "c", "a"]}


@pytest.mark.parametrize(
    ("said", "change"),
    [
        ({}, {"source": [0, 0, 2], "target": [1, 1, 0]}),
        ({}, {**CALLED, "target_name": ["x", "y", "z"]}),
        ({}, {**CALLED, "source_name": [None, "b", "c"]}),
        ({}, {"source_name": ["a"] * 3, "target_name": ["a"] * 3}),
        ({}, {"source_name": CALLED["source_name"]}),
        ({"ids": "names"}, {"score": pa.array([None, 0.5, 0.5])}),
        ({"ids": "names"}, {"score": [float("nan"), 0.5, 0.5]}),
        ({"ids": "names"}, {"score": ["a", "b", "c"]}),
        ({"ids": "names"}, {"source": pa.array([None, 1, 2])}),
        ({"ids": "names"}, {"source": [0, 0, 2], "target": [1, 1, 0]}),
    ],
)
def test_names_and_pairs_that_cannot_be_are_damage(tmp_path, said, change):
    """Rows came in an order of chance, or with numbers that are none."""
    path = tmp_path / "s.parquet"
    for rows in (ROWS, ROWS | change):
        table = pa.table(rows).replace_schema_metadata({b"anabranch": json.dumps(FACTS | said).encode()})
        pq.write_table(table, path)
        if rows is ROWS:
            assert FullyPPRResult.load(path).num_nodes == 3
    with pytest.raises(DataError, match="is damaged"):
        FullyPPRResult.load(path)


@pytest.mark.parametrize(
    ("said", "more"),
    [({"num_nodes": 2**31 - 1}, {}), ({"num_nodes": 2**40, "is_all": False}, CALLED)],
)
def test_a_small_file_of_many_nodes_asks_for_no_more_memory_than_there_is(tmp_path, monkeypatch, said, more):
    monkeypatch.setattr("anabranch.machine.room_bytes", lambda *_: 1 << 30)
    path = tmp_path / "s.parquet"
    table = pa.table(ROWS | more).replace_schema_metadata({b"anabranch": json.dumps(FACTS | said).encode()})
    pq.write_table(table, path)
    with pytest.raises(CapacityError, match=r"nodes need .* GiB for their rows alone, 1\.0 GiB of memory are free"):
        FullyPPRResult.load(path)


def _of_one_source(names):
    graph = Graph.from_edges([0, 1, 2], [1, 0, 3], names=names)
    return FullyPPR(walks=20, workers=1, sources=[0]).fit(graph).result_


@pytest.mark.parametrize("names", [["a", "b", "c", "d"], [5, 6, 7, 8]])
def test_nodes_that_parquet_tells_nothing_of_stay_without_a_name(tmp_path, names):
    """In an array file all of them were called "None"; numbers could not be saved again."""
    _of_one_source(names).save(tmp_path / "s.parquet")
    found = FullyPPRResult.load(tmp_path / "s.parquet")
    assert found.names.tolist() == [*names[:2], None, None]
    with pytest.raises(InputError, match=r"2 of 4 nodes have no name: .* save them as \.parquet"):
        found.save(tmp_path / "s.anb")
    found.save(tmp_path / "again.parquet")
    again = FullyPPRResult.load(tmp_path / "again.parquet")
    assert again.top_named(names[0]) == found.top_named(names[0])


@pytest.mark.parametrize("ending", [".anb", ".parquet"])
def test_names_are_saved_as_they_are_or_refused(tmp_path, ending):
    result = _of_one_source(["a", "b", "c", "d"])
    for names in ([1, 2, 3, 4], [2**63 + 1, 5, 6, 7]):
        replace(result, names=np.array(names, object)).save(tmp_path / f"s{ending}")
        assert FullyPPRResult.load(tmp_path / f"s{ending}").names[:2].tolist() == names[:2]
    for names in (["a", "a", "b", "c"], [5, 5, 6, 7]):
        with pytest.raises(InputError, match="several nodes are called"):
            replace(result, names=np.array(names, object)).save(tmp_path / f"t{ending}")
        assert not (tmp_path / f"t{ending}").exists()
