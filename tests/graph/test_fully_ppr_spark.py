"""Both plans on Spark. The operators are tested without it (test_fully_ppr_rounds.py); here is what needs a JVM, which takes minutes."""

import importlib.util
import os
import shutil
import sys
import threading

import numpy as np
import pyarrow as pa
import pytest
from scipy import stats

from anabranch.errors import AnabranchError, BackendError, DataError, InputError
from anabranch.graph import Graph
from anabranch.graph.fully_ppr import FullyPPR, FullyPPRResult, fully_ppr
from anabranch.graph.fully_ppr.devices import big_moves, make_records
from anabranch.graph.fully_ppr.partitioned import best_table, move_table, moved_table, records_from, records_table
from anabranch.graph.fully_ppr.rounds import (
    UNIT,
    Rows,
    Rules,
    Schedule,
    best_rows,
    merged,
    move,
    newcomers,
    run_rounds,
    split,
)
from anabranch.graph.fully_ppr.spark import _rows_for, choose_plan
from anabranch.graph.ppr import power_iteration
from anabranch.graph.rows import SparseRows
from anabranch.graph.spark.session import check_java, check_packages, session, spark_bytes


def random_graph(seed=0, nodes=40, edges=160, **options):
    rng = np.random.default_rng(seed)
    source, target = rng.integers(0, nodes, (2, edges))
    return Graph.from_edges(source, target, rng.lognormal(0, 1, edges), True, nodes + 1, **options)


def same_rows(left, right):
    return all(np.array_equal(getattr(left, name), getattr(right, name)) for name in ("source", "key", "count"))


# Without Spark: the operators on Arrow tables


@pytest.mark.parametrize("visits", [False, True])
def test_records_survive_a_table(visits):
    graph = random_graph()
    records = make_records(graph, theta=3, moves=big_moves(graph, 0.2, cap=12), visits=visits)
    for part in range(3):
        held, ids = split(records, part, 3)
        table = records_table(ids, held, 3)
        shuffled = table.take(np.random.default_rng(part).permutation(len(ids)))
        parts = pa.concat_tables([shuffled.slice(0, 5), shuffled.slice(5)])
        found_ids, found = records_from(parts, graph.num_nodes)
        assert np.array_equal(found_ids, ids)
        assert np.array_equal(table["bucket"].to_numpy(), np.full(len(ids), part))
        for name in ("indptr", "kind", "code", "keep", "other"):
            assert np.array_equal(getattr(found, name), getattr(held, name))
        assert (found.share is None) is not visits
        if visits:
            assert np.array_equal(found.share, held.share)


def test_a_round_of_tables_is_a_round():
    graph = random_graph()
    records, rules = make_records(graph, theta=3), Rules(1, 0.2, 0, False, graph.num_nodes)
    walks = newcomers(np.arange(graph.num_nodes), 9)
    live, done = move(walks, records, None, rules, 4)
    found = []
    for part in range(2):
        held, ids = split(records, part, 2)
        here = walks.key % 2 == part
        table = pa.table(
            {
                "bucket": walks.key[here] % 2,
                "source": walks.source[here],
                "key": walks.key[here],
                "count": walks.count[here],
            }
        )
        found.append(move_table(table, records_table(ids, held, 2), rules, 4, 2))
    whole = pa.concat_tables(found).to_pandas() if importlib.util.find_spec("pandas") else pa.concat_tables(found)
    columns = {name: np.asarray(whole[name]) for name in ("what", "bucket", "source", "key", "count")}
    for what, expected, of in ((0, live, "key"), (1, done, "source")):
        chosen = columns["what"] == what
        rows = Rows(*(columns[name][chosen] for name in ("source", "key", "count")))
        assert same_rows(merged(rows), merged(expected))
        assert np.array_equal(columns["bucket"][chosen], columns[of][chosen] % 2)
    assert columns["count"][columns["what"] == 2].sum() == graph.num_nodes  # rows that were in it
    assert move_table(table.slice(0, 0), records_table(ids, held, 2), rules, 4, 2).equals(moved_table([]))


def test_the_best_of_a_bucket_as_a_table():
    ends = pa.table({"bucket": [0, 0, 0], "source": [4, 2, 4], "key": [1, 2, 0], "count": [3, 5, 1]})
    found = best_table(ends, 1, 0.0, 5, np.array(list("abcde"), object))
    assert found.to_pydict() == {
        "source": [2, 4],
        "target": [2, 1],
        "score": [1.0, 0.75],
        "source_name": ["c", "e"],
        "target_name": ["c", "b"],
    }


# Errors


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyspark", None)
    with pytest.raises(BackendError, match=r"engine 'spark' .*needs .*pyspark; pip install 'anabranch\[spark\]'"):
        check_packages()
    with pytest.raises(BackendError, match=r"needs .*pyspark"):
        fully_ppr(random_graph(), walks=10, engine="spark")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("JAVA_HOME", raising=False)
    with pytest.raises(BackendError, match="needs Java 17"):
        check_java()


def test_no_sources_are_refused():
    with pytest.raises((InputError, BackendError), match=r"no sources|needs"):
        fully_ppr(random_graph(), sources=[], walks=3, engine="spark")


def test_rows_come_in_the_order_of_the_sources():
    rows = SparseRows(np.array([0, 2, 3]), np.array([5, 6, 7]), np.array([0.5, 0.4, 0.9]), 9, np.array([2, 8]))
    found = _rows_for(rows, np.array([8, 3, 2]))
    assert found.indptr.tolist() == [0, 1, 1, 3]
    assert found.ids.tolist() == [7, 5, 6]
    assert found.nodes.tolist() == [8, 3, 2]


def test_methods_of_one_machine_are_refused():
    for method in ("decompose", "exact"):
        with pytest.raises(InputError, match=f"method '{method}' runs on this machine alone"):
            fully_ppr(random_graph(), method=method, engine="spark")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("512m", 512 << 20), ("4g", 4 << 30), ("4GB", 4 << 30), ("2048", 2048 << 20), ("1t", 1 << 40)],
)
def test_sizes_in_spark_s_words(text, expected):
    assert spark_bytes(text) == expected


def test_a_plan_is_chosen_by_bytes():
    graph = random_graph()
    assert choose_plan("auto", graph, 1e9) == "broadcast"
    assert choose_plan("auto", graph, 100) == "partitioned"
    assert choose_plan("partitioned", graph, 1e9) == "partitioned"


# With Spark


@pytest.fixture(scope="module")
def spark():
    if importlib.util.find_spec("pyspark") is None or importlib.util.find_spec("pandas") is None:
        pytest.skip("pyspark or pandas is not installed (extra: spark)")
    if shutil.which("java") is None and "JAVA_HOME" not in os.environ:
        pytest.skip("there is no Java")
    before = {name: os.environ.get(name) for name in ("PYSPARK_PYTHON", "SPARK_LOCAL_IP")}
    with session() as found:
        assert {name: os.environ.get(name) for name in before} == before  # put back
        yield found


slow = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.filterwarnings("ignore::ResourceWarning")]


def with_marks(test):
    for mark in slow:
        test = mark(test)
    return test


@with_marks
@pytest.mark.parametrize("estimator", ["endpoint", "fullpath"])
def test_the_broadcast_plan_is_the_embedded_engine_to_the_bit(spark, estimator, tmp_path):
    graph = random_graph(names=[f"n{i}" for i in range(41)])
    options = {"walks": 60, "estimator": estimator, "sources": [7, 40, 3, 21], "top_k": 5, "seed": 3}
    local = fully_ppr(graph, engine="local", **options)
    model = FullyPPR(engine="spark", plan="broadcast", spark=spark, partitions=3, **options).fit(graph)
    for name in ("indptr", "ids", "values", "nodes"):
        assert np.array_equal(getattr(model.result_.rows, name), getattr(local.rows, name))
    assert model.result_.top_named("n7") == local.top_named("n7")
    seen = []
    out = tmp_path / "scores"
    FullyPPR(
        engine="spark", plan="broadcast", spark=spark, out=out, progress=lambda *of: seen.append(of), **options
    ).fit(graph)
    assert seen[-1] == (4, 4)
    found = FullyPPRResult.load(out)
    assert found.facts["plan"] == "broadcast"
    for node in (7, 40, 3, 21):
        for left, right in zip(found.top(node), local.top(node), strict=True):
            assert np.array_equal(left, right)
    assert [path.name for path in tmp_path.iterdir()] == ["scores"]
    table = spark.read.parquet(str(out))  # others can read it
    assert table.columns == ["source", "target", "score", "source_name", "target_name"]
    assert table.count() == len(local.rows.ids)


@with_marks
def test_the_partitioned_plan_is_its_rounds_in_one_process_to_the_bit(spark):
    """With hubs cut into pieces, big moves, several pipelines, an adapted gamma and fractions of visits; two runs."""
    graph = random_graph(2)
    options = {"walks": 30, "alpha": 0.4, "estimator": "fullpath", "seed": 5, "top_k": 7}
    cluster = {
        "engine": "spark",
        "plan": "partitioned",
        "spark": spark,
        "big_moves": 2,
        "theta": 4,
        "memory_limit": 24 * 500,
    }
    model = FullyPPR(**options, **cluster, partitions=2).fit(graph)
    records = make_records(graph, theta=4, moves=big_moves(graph, 0.4, 2), visits=True)
    schedule = Schedule.make(41, 30, 0.4, 24 * 500)
    rules = Rules(5, 0.4, 0, True, 41, UNIT)
    rows, score = best_rows(run_rounds(records, np.arange(41), schedule, rules), 7, 0.0)
    assert model.rounds_ == schedule.log
    assert len({entry.gamma for entry in schedule.log}) > 1
    assert np.array_equal(model.result_.rows.ids, rows.key)
    assert np.array_equal(model.result_.rows.values, score)


@with_marks
def test_a_stopped_partitioned_run_goes_on(spark, tmp_path):
    graph, out, event = random_graph(3), tmp_path / "scores", threading.Event()
    options = {"walks": 20, "alpha": 0.4, "engine": "spark", "plan": "partitioned", "spark": spark, "partitions": 2}
    rounds = []

    def progress(done, total):
        rounds.append(done)
        if len(rounds) == 6:
            event.set()

    with pytest.raises(AnabranchError, match="cancelled after 6 rounds"):
        FullyPPR(**options, out=out, gamma=5, progress=progress, cancel=event).fit(graph)
    assert not out.exists()
    with pytest.raises(DataError, match="holds parts of another run"):
        FullyPPR(**{**options, "walks": 21}, out=out, gamma=5).fit(graph)
    model = FullyPPR(**options, out=out, gamma=5).fit(graph)
    schedule = Schedule.make(41, 20, 0.4, 1e9, 5)
    records = make_records(graph, moves=big_moves(graph, 0.4, 2))
    rows, score = best_rows(run_rounds(records, np.arange(41), schedule, Rules(0, 0.4, 0, False, 41)), 100, 0.0)
    assert model.rounds_ == schedule.log
    assert np.array_equal(model.result_.rows.ids, rows.key)
    assert np.array_equal(model.result_.rows.values, score)


def trust_graph(nodes=10_680, edges=24_316):
    """A graph of the size of the PGP web of trust: new nodes prefer those with many edges."""
    rng = np.random.default_rng(0)
    source = np.arange(1, nodes)
    target = (source * rng.random(nodes - 1) ** 2).astype(int)
    more = rng.integers(0, nodes, edges - nodes + 1)
    near = (more * rng.random(len(more)) ** 2).astype(int)
    weight = rng.lognormal(0, 1, edges)
    return Graph.from_edges(np.append(source, more), np.append(target, near), weight, num_nodes=nodes)


@with_marks
def test_both_plans_at_the_size_of_a_web_of_trust(spark):
    graph = trust_graph()
    options = {"walks": 50, "alpha": 0.3, "top_k": None}
    local = fully_ppr(graph, engine="local", **options)
    broadcast = fully_ppr(graph, engine="spark", plan="broadcast", spark=spark, **options)
    for name in ("indptr", "ids", "values"):
        assert np.array_equal(getattr(broadcast.rows, name), getattr(local.rows, name))
    model = FullyPPR(engine="spark", plan="partitioned", spark=spark, big_moves=3, **options).fit(graph)
    found = model.result_
    assert found.rows.sums() == pytest.approx(np.ones(graph.num_nodes), abs=1e-5)
    # The same distribution: ends of 50 walks of 200 sources against exact scores, and against those of the embedded engine
    for result in (local, found):
        statistic, degrees = 0.0, 0
        for node in range(0, graph.num_nodes, 53):
            share = power_iteration(graph, node, 0.3, tol=1e-8)
            row = np.zeros(graph.num_nodes)
            ids, scores = result.top(node)
            row[ids] = scores
            large = share * 50 >= 3
            cells, wished = (np.append(of[large], of[~large].sum()) * 50 for of in (row, share))
            kept = wished > 1e-6
            statistic += ((cells[kept] - wished[kept]) ** 2 / wished[kept]).sum()
            degrees += kept.sum() - 1
        assert stats.chi2.sf(statistic, degrees) > 1e-3
