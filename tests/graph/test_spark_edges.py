"""From edges in Parquet to results in Parquet on Spark. The operators are tested without Java in test_spark_workers.py."""

import json
import math
import os
import shutil
import subprocess
import sys
import threading

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from anabranch.errors import AnabranchError, BackendError, DataError, InputError
from anabranch.graph import FastRP, Graph, PowerWalk, read_graph, write_graph
from anabranch.graph.fastrp import from_edges as fastrp_edges
from anabranch.graph.fully_ppr import EdgeFiles, FullyPPR, FullyPPRResult, fully_ppr
from anabranch.graph.spark.run import Run
from anabranch.graph.spark.session import session
from spark_graphs import need_spark, random_edges, with_spark, write_edges

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def spark():
    need_spark()
    with session() as found:
        yield found


def bound(walks, pairs):
    """Two estimates of the same scores differ by more in any of so many pairs with probability below 2e-6 (Hoeffding, both sides)."""
    return 2 * math.sqrt(math.log(2 * pairs / 1e-6) / (2 * walks))


def dense(result, names):
    """Scores as a matrix in the order of ``names``."""
    place = {name: number for number, name in enumerate(names)}
    found = np.zeros((len(names), len(names)))
    for name in names:
        for to, score in result.top_named(name):
            found[place[name], place[to]] = score
    return found


def names_of(graph):
    return list(range(graph.num_nodes)) if graph.names is None else graph.names.tolist()


def one_file(folder, path):
    """The same edges in a single file, for the embedded engine."""
    tables = [pq.read_table(file) for file in sorted(folder.glob("*.parquet"))]
    pq.write_table(pa.concat_tables(tables), path)
    return path


@slow
@with_spark
def test_scores_from_a_folder_of_named_edges(spark, tmp_path, monkeypatch):
    """The front door, strings, hubs in pieces, duplicates, dead ends; equal to the embedded engine within the bound.

    The driver gets no frame of as many rows as there are nodes, let alone edges.
    """
    kind, seen = type(spark.range(1)), []
    before = kind.collect
    monkeypatch.setattr(kind, "collect", lambda frame: seen.append(before(frame)) or seen[-1])
    for name in ("toPandas", "toArrow", "toLocalIterator"):
        monkeypatch.setattr(kind, name, lambda *_, name=name: pytest.fail(f"{name} brings a frame to the driver"))
    source, target, weight = random_edges(1, names=lambda node: f"n{node:02}")
    edges = write_edges(tmp_path / "edges", source, target, weight)
    out = tmp_path / "scores"
    options = {"walks": 3000, "alpha": 0.7, "top_k": None, "dangling": "source"}
    stored = fully_ppr(
        EdgeFiles(edges, directed=True),
        engine="spark",
        spark=spark,
        out=str(out),
        theta=8,
        gamma=3000,
        partitions=2,
        **options,
    )
    assert seen
    assert max(map(len, seen)) < 40
    graph = read_graph(one_file(tmp_path / "edges", tmp_path / "one.parquet"), directed=True)
    names = names_of(graph)
    local = fully_ppr(graph, engine="local", **options)
    found = dense(stored.load(), names)
    assert np.abs(found - dense(local, names)).max() < bound(3000, len(names) ** 2)
    assert found.sum(1) == pytest.approx(np.ones(len(names)), abs=1e-5)
    assert stored.num_nodes == len(names) == 40
    assert stored.top_named("n03", 2) == stored.load().top_named("n03", 2)
    table = spark.read.parquet(str(out))
    assert dict(table.dtypes) == {"source": "string", "target": "string", "score": "float"}
    assert not (tmp_path / "scores.parts").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["edges", "one.parquet", "scores"]


@slow
@with_spark
@pytest.mark.parametrize("dangling", ["absorb", "uniform"])
def test_every_rule_for_dead_ends(spark, tmp_path, dangling):
    source, target, weight = random_edges(2)
    far = 10**15 * (source - 7), 10**15 * (target - 7)  # any 64-bit numbers
    edges = write_edges(tmp_path / "edges", *far, weight)
    options = {"walks": 2000, "alpha": 0.7, "top_k": None, "dangling": dangling}
    given = EdgeFiles(f"file://{edges}", directed=True)
    stored = fully_ppr(given, engine="spark", spark=spark, out=tmp_path / "out", gamma=2000, partitions=3, **options)
    graph = read_graph(one_file(tmp_path / "edges", tmp_path / "one.parquet"), directed=True)
    names = names_of(graph)
    local = dense(fully_ppr(graph, engine="local", **options), names)
    assert np.abs(dense(stored.load(), names) - local).max() < bound(2000, len(names) ** 2)
    assert min(names) < 0


@slow
@with_spark
def test_partitions_and_layout_of_the_files_do_not_show(spark, tmp_path):
    source, target, _ = random_edges(3)
    tables = []
    for number, (files, partitions) in enumerate([(1, 1), (4, 3)]):
        order = np.random.default_rng(number).permutation(len(source))
        edges = write_edges(tmp_path / f"edges{number}", source[order], target[order], files=files)
        out = tmp_path / f"out{number}"
        fully_ppr(
            edges,
            engine="spark",
            spark=spark,
            out=out,
            walks=50,
            alpha=0.5,
            gamma=50,
            partitions=partitions,
            seed=5,
            top_k=4,
        )
        assert not json.loads((out / "_anabranch.json").read_text())["facts"]["is_directed"]
        tables.append(FullyPPRResult.load(out))
    left, right = tables
    for name in ("indptr", "ids", "values"):
        assert np.array_equal(getattr(left.rows, name), getattr(right.rows, name))
    assert left.names is None  # 0 ... 39
    other = fully_ppr(edges, engine="spark", spark=spark, out=out, walks=50, alpha=0.7, gamma=50, seed=6, top_k=4)
    assert not np.array_equal(other.rows.values, right.rows.values)


@slow
@with_spark
def test_what_write_graph_noted_counts(spark, tmp_path):
    graph = Graph.from_edges([0, 1], [1, 2], [1.0, 3.0], True, 6)
    write_graph(graph, tmp_path / "graph.parquet")
    stored = fully_ppr(
        tmp_path / "graph.parquet",
        engine="spark",
        spark=spark,
        out=tmp_path / "out",
        walks=40,
        alpha=0.5,
        sources=[5, 2],
    )
    assert stored.num_nodes == 6
    assert stored.load().sources.tolist() == [2, 5]
    assert stored.top_named(5) == [(5, 1.0)]  # isolated
    assert stored.facts["is_directed"]


@slow
@with_spark
def test_names_and_direction_that_write_graph_noted_count(spark, tmp_path):
    write_graph(Graph.from_edges([0, 1], [1, 2], directed=True, names=[5, 6, 9]), tmp_path / "graph.parquet")
    stored = fully_ppr(
        tmp_path / "graph.parquet", engine="spark", spark=spark, out=tmp_path / "out", walks=40, alpha=0.5, sources=[5]
    )
    assert stored.num_nodes == 3
    assert stored.facts["is_directed"]


@slow
@with_spark
def test_bad_edges_are_named_and_leave_nothing(spark, tmp_path):
    def tried(match, kind, **columns):
        folder = tmp_path / "bad"
        folder.mkdir()
        pq.write_table(pa.table(columns), folder / "part.parquet")
        out = tmp_path / "out"
        with pytest.raises(kind, match=match):
            fully_ppr(str(folder), engine="spark", spark=spark, out=out, walks=10)
        assert not out.exists()
        assert not (tmp_path / "out.parts").exists()
        shutil.rmtree(folder)

    tried("the target is missing .null. in 1 of 2 rows", DataError, source=[1, 2], target=[3, None])
    tried("the weight must be not negative in 1 of 2 rows", DataError, source=[1, 2], target=[3, 4], weight=[1.0, -1.0])
    tried("the weight must be finite", DataError, source=[1, 2], target=[3, 4], weight=[1.0, 1e300])
    tried("not 0 .*in 1 of 1 rows", DataError, source=[1], target=[3], weight=[0.0])
    tried("holds no edges", DataError, source=pa.array([], pa.int64()), target=pa.array([], pa.int64()))
    tried("node ids are integers or text", DataError, source=[1.5], target=[3.0])
    tried("where an edge needs two", DataError, source=[1])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty cannot be read as Parquet: it holds no Parquet files$"):
        fully_ppr(tmp_path / "empty", engine="spark", spark=spark, out=tmp_path / "out")
    for edges, match in (
        ("nowhere.parquet", "Path does not exist"),
        (f"file://{tmp_path}/nowhere", "cannot be read as Parquet"),
    ):
        with pytest.raises(DataError, match=match):
            fully_ppr(edges, engine="spark", spark=spark, out=tmp_path / "out")
    edges = write_edges(tmp_path / "edges", *random_edges(1))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(DataError, match=r"holds thesis\.txt, which would be lost"):
        fully_ppr(edges, engine="spark", spark=spark, out=tmp_path / "mine")
    with pytest.raises(DataError, match="it is a file"):
        fully_ppr(edges, engine="spark", spark=spark, out=tmp_path / "mine" / "thesis.txt")
    with pytest.raises(
        DataError, match=r"cannot make the folder file:/proc/none/out\.parts: nothing may be written there"
    ):
        fully_ppr(edges, engine="spark", spark=spark, out="/proc/none/out")
    for place in ("edges", "edges/scores", "."):
        with pytest.raises(InputError, match="choose a folder apart from theirs"):
            fully_ppr(edges, engine="spark", spark=spark, out=tmp_path / place)
    spark.read.parquet(edges).write.parquet(str(tmp_path / "of_others"))
    with pytest.raises(DataError, match=r"holds part-.*parquet, which would be lost"):
        fully_ppr(edges, engine="spark", spark=spark, out=tmp_path / "of_others")
    with pytest.raises(InputError, match="the graph has no node 99"):
        fully_ppr(edges, engine="spark", spark=spark, out=tmp_path / "out", sources=[3, 99], walks=5)
    with pytest.raises(InputError, match="long ids"):
        fully_ppr(edges, engine="spark", spark=spark, out=tmp_path / "out", sources=["x"], walks=5)
    assert not (tmp_path / "out.parts").exists()


@slow
@with_spark
def test_a_stopped_run_goes_on_and_a_failed_one_leaves_what_was_there(spark, tmp_path, monkeypatch):
    edges, out, event = write_edges(tmp_path / "edges", *random_edges(4)), tmp_path / "out", threading.Event()
    options = {"engine": "spark", "spark": spark, "walks": 20, "alpha": 0.4, "gamma": 5, "partitions": 2, "out": out}
    whole = fully_ppr(edges, **{**options, "out": tmp_path / "whole"}).load()
    rounds = []

    def progress(done, total):
        rounds.append((done, total))
        if len(rounds) == 6:
            event.set()

    with pytest.raises(AnabranchError, match="cancelled after 6 rounds"):
        FullyPPR(**options, progress=progress, cancel=event).fit(edges)
    assert not out.exists()
    with pytest.raises(DataError, match="parts of another run"):
        fully_ppr(edges, **{**options, "walks": 21})
    made = []
    before = Run.step
    monkeypatch.setattr(Run, "step", lambda run, name, make: before(run, name, lambda: made.append(name) or make()))
    model = FullyPPR(**options).fit(edges)
    assert made == ["scores"]  # neither edges nor records again
    assert len(model.rounds_) > 6
    assert rounds[0][1] == 40 * 20
    for name in ("indptr", "ids", "values"):
        assert np.array_equal(getattr(model.result_.rows, name), getattr(whole.rows, name))

    # What fails on the way leaves the scores of before.
    def breaks(run, name, make):
        if name == "scores":
            raise BackendError("a worker was lost")
        return before(run, name, make)

    kept = sorted(path.name for path in out.iterdir())
    monkeypatch.setattr(Run, "step", breaks)
    with pytest.raises(BackendError, match="a worker was lost"):
        fully_ppr(edges, **{**options, "seed": 9})
    assert sorted(path.name for path in out.iterdir()) == kept
    monkeypatch.setattr(Run, "step", before)
    again = fully_ppr(edges, **{**options, "seed": 9})
    assert not np.array_equal(again.rows.values, whole.rows.values)
    assert not [path for path in tmp_path.iterdir() if ".old-" in path.name or path.name.endswith(".parts")]


@slow
@with_spark
@pytest.mark.parametrize("dangling", ["source", "absorb"])
def test_decomposition_is_as_near_to_the_truth_as_on_one_machine(spark, tmp_path, dangling):
    source, target, weight = random_edges(8, names=lambda node: f"n{node:02}")
    edges = write_edges(tmp_path / "edges", source, target, weight)
    options = {"alpha": 0.5, "method": "decompose", "index_walks": 50, "rounds": 2, "top_k": None, "dangling": dangling}
    given = EdgeFiles(edges, directed=True)
    stored = fully_ppr(given, engine="spark", spark=spark, out=tmp_path / "out", partitions=2, gamma=50, **options)
    graph = read_graph(one_file(tmp_path / "edges", tmp_path / "one.parquet"), directed=True)
    names = names_of(graph)
    exact = dense(fully_ppr(graph, method="exact", tol=1e-10, alpha=0.5, top_k=None, dangling=dangling), names)
    found = dense(stored.load(), names)
    here = dense(fully_ppr(graph, engine="local", **options), names)
    assert found.sum(1) == pytest.approx(np.ones(len(names)), abs=1e-5)
    error, expected = (np.abs(of - exact).sum(1).mean() for of in (found, here))
    # Estimates are not divided by what they should sum to before they are mixed, so they are a little wider.
    assert error < 1.25 * expected
    some = fully_ppr(
        given,
        engine="spark",
        spark=spark,
        out=tmp_path / "some",
        partitions=2,
        gamma=50,
        **{**options, "top_k": 3},
        sources=["n05"],
    )
    assert some.load().names[some.load().sources].tolist() == ["n05"]
    assert some.top_named("n05") == [
        (name, pytest.approx(score, rel=1e-5)) for name, score in stored.top_named("n05", 3)
    ]


# FastRP


@slow
@with_spark
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"matrix": "symmetric", "direction": "in", "self_weight": 0.5},
        {"matrix": "adjacency", "direction": "both", "concatenate": True, "projection": "gaussian", "dtype": "float64"},
    ],
)
def test_vectors_from_edges_are_those_of_one_machine(spark, tmp_path, monkeypatch, options):
    monkeypatch.setattr(fastrp_edges, "TILE_BYTES", 16 * 4 * 8)  # tiles of few edges: buckets are cut
    source, target, weight = random_edges(5, names=lambda node: f"n{node}")
    edges = write_edges(tmp_path / "edges", source, target, weight)
    model = FastRP(
        16, (0, 1.0, 3.0), engine="spark", spark=spark, out=tmp_path / "out", partitions=3, seed=2, **options
    )
    found = model.fit_transform(EdgeFiles(edges, directed=True))
    graph = read_graph(one_file(tmp_path / "edges", tmp_path / "one.parquet"), directed=True)
    expected = FastRP(16, (0, 1.0, 3.0), seed=2, **options).fit_transform(graph)
    ids, vectors = found.load()
    assert ids.tolist() == graph.names.tolist()
    assert vectors.dtype == expected.dtype
    assert np.abs(vectors - expected).max() < 1e-5
    assert dict(spark.read.parquet(str(tmp_path / "out")).dtypes)["node"] == "string"


# PowerWalk


@slow
@with_spark
def test_an_index_from_edges_answers_as_one_built_here(spark, tmp_path):
    source, target, weight = random_edges(6, names=lambda node: f"n{node}")
    edges = write_edges(tmp_path / "edges", source, target, weight)
    graph = read_graph(one_file(tmp_path / "edges", tmp_path / "one.parquet"), directed=True)
    for mode in ("endpoint", "fullpath"):
        out = tmp_path / mode
        options = {"alpha": 0.6, "walks": 2000, "mode": mode, "estimate": "unbiased", "dtype": "f32"}
        PowerWalk(**options, engine="spark", spark=spark, partitions=2).build(EdgeFiles(edges, directed=True), out=out)
        found, here = PowerWalk.load(out, graph), PowerWalk(**options).build(graph)
        rows = []
        for walker in (found, here):
            matrix = np.zeros((40, 40))
            for node in range(40):
                ids, value = walker.fingerprint(node)
                matrix[node, ids] = value
            rows.append(matrix)
        # Visits of a walk are not independent; the sum of a walk's visits of a node exceeds the bound's 1 only by loops.
        assert np.abs(rows[0] - rows[1]).max() < bound(2000, 1600) * (1 if mode == "endpoint" else 2)
        assert found.query(3)[1].sum() == pytest.approx(1, abs=0.05)
        if mode == "fullpath":
            assert found.lost_mass == 0
    cut = tmp_path / "cut"
    PowerWalk(0.7, 50, keep=3, engine="spark", spark=spark).build(EdgeFiles(edges, directed=True), out=cut)
    assert np.diff(PowerWalk.load(cut, graph).rows.indptr).max() == 3


# By command


def run_command(*words, cwd):
    paths = os.pathsep.join(
        [os.path.dirname(os.path.dirname(read_graph.__code__.co_filename)).rsplit("/anabranch", 1)[0]]
    )
    environment = {**os.environ, "PYTHONPATH": paths}
    command = [sys.executable, "-m", "anabranch", "graph", *words]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


@slow
@with_spark
def test_by_command(spark, tmp_path):
    source, target, weight = random_edges(7, names=lambda node: f"n{node}")
    edges = write_edges(tmp_path / "edges", source, target, weight)
    done = run_command(
        "ppr",
        edges,
        "n3",
        "--all",
        "--engine",
        "spark",
        "--walks",
        "30",
        "--alpha",
        "0.5",
        "--out",
        "scores",
        "--json",
        "--quiet",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert facts["sources"] == 1
    assert facts["how"]["plan"] == "edges"
    assert FullyPPRResult.load(tmp_path / "scores").num_sources == 1
    done = run_command(
        "embed", edges, "--engine", "spark", "--dim", "8", "--set", "weights=[1.0]", "--out", "vectors", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "40 x 8 by fastrp" in done.stdout
    done = run_command(
        "index", edges, "--walks", "20", "--alpha", "0.5", "--engine", "spark", "--out", "index", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    one_file(tmp_path / "edges", tmp_path / "one.parquet")
    done = run_command("ppr", "one.parquet", "n3", "--index", "index", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ranking"][0]["node"] == "n3"
    done = run_command("ppr", "nowhere.parquet", "--all", "--engine", "spark", "--out", "none", cwd=tmp_path)
    assert done.returncode == 2
    assert "cannot be read as Parquet" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "none").exists()
