"""What Spark's workers and driver do between edges in Parquet and results, as functions of tables: no Java is needed here."""

import json
import sys
import types
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import BackendError, CapacityError, DataError, InputError
from anabranch.graph import FastRP, Graph, PowerWalk, write_graph
from anabranch.graph.counters import VANISH
from anabranch.graph.fastrp.start import degree_scale
from anabranch.graph.fastrp.stored import StoredVectors
from anabranch.graph.fastrp.worker import (
    NODES,
    batch_sums,
    combined_rows,
    listed_rows,
    partial_rows,
    start_rows,
    to_array,
    to_binary,
    total_rows,
)
from anabranch.graph.fully_ppr import EdgeFiles, FullyPPR, FullyPPRResult, StoredScores, fully_ppr
from anabranch.graph.fully_ppr.devices import INNER, NODE, make_records, slot_shares
from anabranch.graph.fully_ppr.edge_records import bucket_records, plan_hubs, upper_entries
from anabranch.graph.fully_ppr.from_edges import cut_rows, scores_table
from anabranch.graph.fully_ppr.partitioned import records_from
from anabranch.graph.fully_ppr.rounds import Rules, Schedule, run_rounds
from anabranch.graph.ppr.rules import Transition
from anabranch.graph.spark.edges import _note
from anabranch.graph.spark.files import as_text, first_line, is_uri, why_unread
from anabranch.graph.stored_folder import FACTS, WALKS
from spark_graphs import random_edges


def graph_of(seed=0, **options):
    source, target, weight = random_edges(seed)
    return Graph.from_edges(source, target, weight, True, 40, **options)


# Records


def entries_of(graph, theta):
    """Entries as Spark makes them."""
    source, target, weight = graph.edges()
    degree = np.diff(graph.indptr)
    hubs = [(int(hub), int(degree[hub])) for hub in np.flatnonzero(degree > theta)]
    known = plan_hubs(hubs, theta, graph.num_nodes)
    rows, sums = [], {}
    of = {hub: (count, leaves, first) for hub, count, leaves, first in known}
    for node, to, share in zip(source.tolist(), target.tolist(), weight.tolist(), strict=True):
        if node not in of:
            rows.append((node, NODE, 2 * to, share))
            continue
        count, leaves, first = of[node]
        place = to_place(graph, node, to)
        rows.append((first + place * leaves // count, INNER, 2 * to, share))
        sums[rows[-1][0]] = sums.get(rows[-1][0], 0.0) + share
    rows += upper_entries(known, sums, theta)
    rows += [(node, NODE, -1, 0.0) for node in range(graph.num_nodes)]
    return known, rows


def to_place(graph, node, to):
    row = graph.indices[graph.indptr[node] : graph.indptr[node + 1]]
    return int(np.searchsorted(row, to))


@pytest.mark.parametrize("theta", [2, 3, 50])
def test_records_of_edges_draw_neighbours_by_weight_and_none_is_larger_than_theta(theta):
    graph = graph_of()
    _, rows = entries_of(graph, theta)
    shuffled = [rows[place] for place in np.random.default_rng(1).permutation(len(rows))]
    names = ("record", "kind", "code", "weight")
    types = (pa.int64(), pa.int8(), pa.int64(), pa.float64())
    table = pa.table(
        {
            name: pa.array(column, kind)
            for name, kind, column in zip(names, types, zip(*shuffled, strict=True), strict=True)
        }
    )
    ids, records = records_from(bucket_records(table, 7), graph.num_nodes)
    assert ids.tolist() == list(range(len(ids)))
    assert records.largest <= theta

    def reached(record, share, found):
        slot = slot_shares(records, record)
        for code, part in zip(records.code[records.indptr[record] : records.indptr[record + 1]], slot, strict=True):
            assert code % 2 == 0
            if code // 2 < graph.num_nodes:
                found[code // 2] = found.get(code // 2, 0.0) + share * part
            else:
                assert records.kind[code // 2] == INNER
                reached(code // 2, share * part, found)
        return found

    for node in range(graph.num_nodes):
        assert records.kind[node] == NODE
        row = slice(graph.indptr[node], graph.indptr[node + 1])
        weight = graph.weights[row].astype(float)
        found = reached(node, 1.0, {})
        assert sorted(found) == graph.indices[row].tolist()
        assert [found[to] for to in sorted(found)] == pytest.approx(
            (weight / max(weight.sum(), 1e-9)).tolist(), abs=1e-6
        )


def test_records_of_edges_without_hubs_are_those_of_the_graph_to_the_bit():
    graph = graph_of(3)
    _, rows = entries_of(graph, 100)
    record, kind, code, weight = (np.array(column) for column in zip(*rows, strict=True))
    table = pa.table({"record": record, "kind": kind.astype(np.int8), "code": code, "weight": weight})
    ids, found = records_from(bucket_records(table, 2), graph.num_nodes)
    expected = make_records(graph)
    assert len(ids) == len(expected)
    for name in ("indptr", "kind", "code", "keep", "other"):
        assert np.array_equal(getattr(found, name), getattr(expected, name)), name


@given(degree=st.integers(3, 3000), theta=st.integers(2, 40))
@settings(deadline=None, max_examples=60)
def test_pieces_of_a_hub_have_room_and_their_weights_add_up(degree, theta):
    degree = max(degree, theta + 1)
    known = plan_hubs([(0, degree), (1, degree)], theta, 5)
    (_, _, leaves, first), (_, _, _, second) = known
    sizes = np.bincount(np.arange(degree) * leaves // degree, minlength=leaves)
    assert 0 < sizes.min()
    assert sizes.max() <= theta
    rows = upper_entries(known[:1], {first + place: float(size) for place, size in enumerate(sizes)}, theta)
    assert max(record for record, *_ in rows) < second
    for record in {record for record, *_ in rows}:
        assert sum(row[0] == record for row in rows) <= theta
    assert sum(weight for record, _, _, weight in rows if record == 0) == degree
    assert [record for record, kind, _, _ in rows if kind == NODE] == [0] * sum(row[0] == 0 for row in rows)
    # Every piece hangs below exactly one other.
    children = [code // 2 for _, _, code, _ in rows]
    assert sorted(children) == list(range(first, first + len(children)))


def test_walks_that_vanish_are_those_of_the_leaky_system():
    """Ends over walks are within Hoeffding's bound of (alpha (I - c P0)^-1), all of them at once with probability 1 - 1e-6."""
    graph, alpha, walks = graph_of(4), 0.3, 4000
    count = graph.num_nodes
    rules = Rules(7, alpha, VANISH, False, count)
    ended = run_rounds(make_records(graph), np.arange(count), Schedule.make(count, walks, alpha, 1e9, walks), rules)
    found = np.zeros((count, count))
    found[ended.source, ended.key] = ended.count / walks
    transition = Transition(graph, alpha, "source")
    matrix = graph.to_scipy(np.float64).toarray() * transition.inverse_N[:, None]
    exact = alpha * np.linalg.inv(np.eye(count) - (1 - alpha) * matrix)
    assert exact.sum(1).min() < 0.9  # some do vanish
    assert np.abs(found - exact).max() < np.sqrt(np.log(2 * count**2 / 1e-6) / (2 * walks))
    visits = run_rounds(
        make_records(graph),
        np.arange(count),
        Schedule.make(count, walks, alpha, 1e9, walks),
        Rules(7, alpha, VANISH, True, count),
    )
    seen = np.zeros((count, count))
    seen[visits.source, visits.key] = visits.count * alpha / walks
    assert np.abs(seen - exact).max() < 0.05


def test_the_best_of_some_sources():
    ends = pa.table({"bucket": [0, 0, 0, 0], "source": [4, 2, 4, 4], "key": [1, 2, 0, 7], "count": [3, 5, 1, 1]})
    assert scores_table(ends, 2, 0.0).to_pydict() == {
        "source": [2, 4, 4],
        "target": [2, 1, 0],
        "score": [1.0, np.float32(0.6), np.float32(0.2)],
    }
    assert scores_table(ends, 0, 0.3)["target"].to_pylist() == [2, 1]


def test_rows_of_an_index_are_cut_as_in_memory():
    ends = pa.table({"source": [4, 2, 4, 4, 4], "key": [1, 2, 0, 7, 1], "count": [3, 5, 1, 4, 2]})
    whole = cut_rows(ends, 0, 1.0).to_pydict()
    assert whole == {"source": [2, 4, 4, 4], "target": [2, 1, 7, 0], "count": [5, 5, 4, 1], "total": [5, 10, 10, 10]}
    assert cut_rows(ends, 2, 1.0)["target"].to_pylist() == [2, 1, 7]
    assert cut_rows(ends, 0, 0.5)["target"].to_pylist() == [2, 1]
    assert cut_rows(ends, 0, 0.51)["target"].to_pylist() == [2, 1, 7]
    assert len(cut_rows(ends.slice(0, 0), 3, 0.5)) == 0


# Vectors


def embed(model, graph, buckets, tiles):
    """The steps of a run in this process, with the operators of the cluster."""
    source, target, weight = graph.edges()
    degree = np.zeros(graph.num_nodes)
    np.add.at(degree, source, weight)
    value = weight / degree[source]
    keys = graph.names if graph.names is not None else np.arange(graph.num_nodes)
    scale = np.where(degree > 0, degree, degree[degree > 0].min())
    batch = pa.RecordBatch.from_pydict(
        {"node": np.arange(graph.num_nodes), "id": pa.array(list(keys)), "degree": scale}
    )
    before = start_rows(model, batch, graph.num_nodes, buckets)
    powers = [before]
    for _ in model.weights:
        parts = []
        for bucket in range(buckets):
            vectors = before.filter(pa.array(np.asarray(before["bucket"]) == bucket))
            for tile in range(tiles):
                here = (target % buckets == bucket) & (source % tiles == tile)
                entries = pa.table({"source": source[here], "target": target[here], "value": value[here]})
                parts.append(partial_rows(entries, vectors, model.dim, model.dtype, buckets))
        rows = pa.concat_tables(parts)
        before = pa.concat_tables(
            [
                total_rows(rows.filter(pa.array(np.asarray(rows["bucket"]) == bucket)), model.dim, model.dtype)
                for bucket in np.unique(rows["bucket"])
            ]
        )
        powers.append(before)
    found = []
    for bucket in range(buckets):
        nodes = np.arange(bucket, graph.num_nodes, buckets)
        marks = pa.table(
            {
                "bucket": np.full(len(nodes), bucket, np.int32),
                "node": nodes,
                "vector": pa.array([b""] * len(nodes), pa.binary()),
                "order": np.full(len(nodes), NODES),
            }
        )
        tables = [marks]
        for order, table in enumerate(powers):
            here = table.filter(pa.array(np.asarray(table["bucket"]) == bucket))
            if model.self_weight if order == 0 else model.weights[order - 1]:
                tables.append(here.append_column("order", pa.array(np.full(len(here), order))))
        found.append(combined_rows(model, pa.concat_tables(tables)))
    table = pa.concat_tables(found).sort_by("node").combine_chunks()
    sums = batch_sums(to_array(table["vector"], model.dtype))
    mean, square = sums[1:].reshape(2, -1) / sums[0]
    batch = table.to_batches()[0]
    listed = listed_rows(batch, model.dtype, mean, 1 / np.sqrt(square - mean**2))
    return np.array(listed["vector"].to_pylist())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"self_weight": 0.5},
        {"concatenate": True},
        {"projection": "gaussian", "normalize": False},
        {"dtype": "float64"},
    ],
)
@pytest.mark.parametrize("named", [False, True])
def test_vectors_by_the_operators_of_the_cluster_are_those_of_one_machine(options, named):
    graph = graph_of(5, **({"names": [f"node {i}" for i in range(40)]} if named else {}))
    model = FastRP(32, (0, 0.5, 2.0), **options)
    found = embed(model, graph, 3, 2)
    assert np.abs(found - model.fit_transform(graph)).max() < 1e-5


def test_degrees_are_scaled_as_on_one_machine():
    graph = graph_of(6)
    model = FastRP(8, (1.0,), beta=-0.7)
    degree = np.asarray(graph.strength_N, float)
    degree[degree == 0] = degree[degree > 0].min()
    batch = pa.RecordBatch.from_pydict({"node": np.arange(40), "id": np.arange(40), "degree": degree})
    rows = to_array(start_rows(model, batch, 40, 5)["vector"], "float32")
    length = np.abs(rows).max(1)
    expected = degree_scale(graph, -0.7, 8, np.float32)
    assert length[length > 0] == pytest.approx((expected * np.sqrt(8.0))[length > 0], rel=1e-6)  # s of 40 nodes is 8
    with pytest.raises(InputError, match="leave the range of float32"):
        start_rows(FastRP(8, (1.0,), beta=-60), batch, 40, 5)


def test_rows_survive_bytes():
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    column = pa.chunked_array([to_binary(x[:1]), to_binary(x[1:]).slice(1, 1), to_binary(x[:0])])
    assert to_array(column, "float32").tolist() == [x[0].tolist(), x[2].tolist()]
    assert to_array(to_binary(x[:0]), "float32", 3).shape == (0, 3)
    with pytest.raises(CapacityError, match="more partitions"):
        to_binary(np.broadcast_to(np.float64(0), (1 << 20, 1 << 9)))


# Results


def test_scores_whose_nodes_are_names_are_read(tmp_path):
    folder = tmp_path / "scores"
    folder.mkdir()
    pq.write_table(
        pa.table({"source": ["b", "b"], "target": ["b", "z"], "score": pa.array([0.7, 0.3], pa.float32())}),
        folder / "part-0.parquet",
    )
    pq.write_table(
        pa.table({"source": ["a"], "target": ["b"], "score": pa.array([1.0], pa.float32())}), folder / "part-1.parquet"
    )
    stored = StoredScores(f"file:{folder}")
    with pytest.raises(DataError, match=r"cannot read the scores in .* which is not whole"):
        _ = stored.facts
    with pytest.raises(DataError):
        stored.load()
    facts = {"num_nodes": 9, "is_all": True, "ordered": False, "ids": "names", "facts": {"alpha": 0.2}}
    (folder / FACTS).write_text(json.dumps(facts))
    assert stored.num_nodes == 9
    assert stored.facts == {"alpha": 0.2}
    assert stored.num_scores == 3
    assert stored.top_named("b") == [("b", pytest.approx(0.7)), ("z", pytest.approx(0.3))]
    assert stored.top("b", 1)[0].tolist() == ["b"]
    for bad, match in (("q", "not one of the sources"), (None, "not one of|no id"), (7, "no id")):
        with pytest.raises(InputError, match=match):
            stored.top(bad)
    with pytest.raises(InputError, match="k is 0"):
        stored.top("b", 0)
    result = FullyPPRResult.load(folder)
    assert result.names.tolist() == ["a", "b", "z"]
    assert result.top_named("b") == stored.top_named("b")
    assert result.top_named("a") == [("b", 1.0)]
    assert stored.num_sources == 2  # what is not here is looked for in all of it
    with pytest.raises(InputError, match="not on this machine"):
        StoredScores("s3a://bucket/scores").load()


def test_an_index_that_spark_wrote_is_read(tmp_path):
    graph = Graph.from_edges([0, 1], [1, 2], None, True, 3, names=["a", "b", "c"])
    folder = tmp_path / "index"
    folder.mkdir()
    table = pa.table(
        {"source": ["b", "a", "a", "c"], "target": ["c", "b", "a", "c"], "count": [4, 3, 5, 4], "total": [8, 9, 9, 4]}
    )
    pq.write_table(table, folder / "part-0.parquet")
    with pytest.raises(DataError, match="cannot read the index"):
        PowerWalk.load(folder, graph)
    params = PowerWalk(0.2, 4).stored_params()
    facts = {"kind": WALKS, "params": params, "graph": {"num_nodes": 3, "num_stored_edges": 2}}
    (folder / FACTS).write_text(json.dumps(facts))
    walker = PowerWalk.load(folder, graph)
    assert walker.rows.row(0)[0].tolist() == [0, 1]
    assert walker.rows.row(0)[1].tolist() == [5.0, 3.0]
    assert walker.lost_mass == pytest.approx(1 - 4 / 8)
    assert walker.query(2, 1, 0)[0].tolist() == [2]
    other = Graph.from_edges([0, 1, 2], [1, 2, 0], None, True, 3, names=["a", "b", "c"])
    with pytest.raises(DataError, match="index of another graph"):
        PowerWalk.load(folder, other)
    with pytest.raises(DataError, match="index of another graph: the graph has no node"):
        PowerWalk.load(folder, Graph.from_edges([0, 1], [1, 2], None, True, 3, names=["a", "b", "d"]))
    (folder / FACTS).write_text(json.dumps({**facts, "kind": "scores"}))
    with pytest.raises(DataError, match=r"cannot read the index of walks in .*, which holds the scores of another run"):
        PowerWalk.load(folder, graph)


def test_vectors_that_spark_wrote_are_read(tmp_path):
    pq.write_table(pa.table({"node": ["a", "b"], "vector": [[1.0, 2.0], [3.0, 4.0]]}), tmp_path / "part-0.parquet")
    stored = StoredVectors(str(tmp_path))
    with pytest.raises(DataError, match=r"cannot read the vectors in .* which is not whole"):
        stored.load()
    (tmp_path / FACTS).write_text(json.dumps({"num_nodes": 2, "dim": 2, "facts": {}}))
    stored = StoredVectors(str(tmp_path))
    assert stored.load()[0].tolist() == ["a", "b"]
    assert np.asarray(stored).tolist() == [[1.0, 2.0], [3.0, 4.0]]
    model = FastRP()
    model.embedding_ = stored
    with pytest.raises(InputError, match=r"the vectors lie in .*load\(\) reads them"):
        model.save(tmp_path / "model.anb")


# What is refused before Spark is asked


def test_uris_are_told_from_paths(tmp_path):
    assert is_uri("s3a://bucket/edges")
    assert is_uri("file:/edges")
    assert not is_uri("edges.parquet")
    assert not is_uri(r"C:\edges")
    assert as_text("s3a://bucket/a b") == "s3a://bucket/a b"
    assert as_text(tmp_path / "a b") == f"file://{tmp_path}/a b"
    with pytest.raises(InputError, match="give it as text"):
        as_text(Path("s3a://bucket/edges"))


def test_what_a_worker_raised_is_told_in_one_line():
    raised = "'Traceback (most recent call last):\n  File x\nanabranch.errors.InputError: degrees leave the range\n"
    text = f"An exception was thrown from the Python worker. Please see below.\n{raised}\tat org.apache.spark"
    assert first_line(RuntimeError(text)) == "degrees leave the range"
    assert first_line(RuntimeError("Job aborted.\n\tat org.apache")) == "Job aborted."
    assert first_line(RuntimeError()) == "RuntimeError"


def test_why_files_are_not_read():
    said = "[PATH_NOT_FOUND] Path does not exist: file:/e. SQLSTATE: 42K03\n\tat org.apache.spark"
    assert why_unread(RuntimeError(said)) == "Path does not exist: file:/e."
    said = "[UNABLE_TO_INFER_SCHEMA] Unable to infer schema for Parquet. It must be specified manually. SQLSTATE: 42KD9"
    assert why_unread(RuntimeError(said)) == "it holds no Parquet files"
    assert why_unread(RuntimeError("Could not read footer.")) == "Could not read footer."


def test_settings_that_do_not_go_with_files_are_refused(tmp_path):
    graph, out = graph_of(), tmp_path / "out"
    for call, match in (
        (lambda: fully_ppr("edges.parquet", engine="spark"), "give out=FOLDER"),
        (lambda: fully_ppr("edges.parquet", engine="spark", plan="broadcast", out=out), "plan 'broadcast'"),
        (lambda: fully_ppr("edges.parquet", engine="spark", method="exact", out=out), "runs on this machine alone"),
        (lambda: fully_ppr("edges.parquet", engine="spark", out=out, sources=[]), "no sources"),
        (
            lambda: fully_ppr("edges.parquet", engine="spark", method="decompose", dangling="uniform", out=out),
            "dangling='source' or 'absorb'",
        ),
        (lambda: fully_ppr("edges.parquet", engine="spark", out=out, sources=["a", "b", "a"]), "'a' is given 2 times"),
        (lambda: fully_ppr(EdgeFiles("edges")), "engine 'auto' takes a graph or its path"),
        (lambda: fully_ppr(EdgeFiles("edges"), engine="local"), "engine 'local' takes a graph or its path"),
        (lambda: FastRP(engine="spark").fit("edges"), "give out=FOLDER"),
        (lambda: FastRP(engine="spark", out=out).fit(graph), "not a Graph; engine='local' takes graphs"),
        (lambda: FastRP(engine="spark", out=out, keep_powers=True).fit("edges"), "keeps no powers"),
        (
            lambda: FastRP(engine="spark", out=out, features=np.ones((3, 2)), feature_ratio=0.5).fit("edges"),
            "no features",
        ),
        (lambda: FastRP(engine="cluster"), "engine is 'cluster'"),
        (lambda: PowerWalk(engine="spark").build("edges"), "give out=FOLDER|out=FOLDER"),
        (lambda: PowerWalk(engine="spark").build(graph), "takes the path of edges"),
        (lambda: PowerWalk().build(EdgeFiles("edges")), "a EdgeFiles is no graph"),
        (lambda: PowerWalk(engine="spark").build("edges", nodes=[1], out=out), "walks from every node"),
        (lambda: PowerWalk(engine="spark", moves="counts").build("edges", out=out), "moves is 'counts'"),
        (lambda: PowerWalk(engine="spark", track=True).build("edges", out=out), "track is True"),
        (lambda: PowerWalk(engine="spark", partitions=0), "partitions is 0"),
    ):
        with pytest.raises(InputError, match=match):
            call()
    assert not out.exists()


def test_without_pyspark_files_are_refused_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pyspark", None)
    for call in (
        lambda: FullyPPR(engine="spark", out=tmp_path / "out").fit("edges.parquet"),
        lambda: FastRP(engine="spark", out=tmp_path / "out").fit("edges"),
        lambda: PowerWalk(engine="spark").build("edges", out=tmp_path / "out"),
    ):
        with pytest.raises(BackendError, match=r"pip install 'anabranch\[spark\]'"):
            call()


def test_an_index_keeps_no_engine(tmp_path):
    assert not {"engine", "spark", "partitions", "workers"} & set(PowerWalk().stored_params())


@pytest.mark.parametrize(
    ("names", "directed", "noted"),
    [(None, True, (3, True)), (["a", "b", "c"], True, (None, True)), ([5, 6, 7], False, (None, False))],
)
def test_notes_of_local_files_tell_nodes_and_direction(tmp_path, names, directed, noted):
    """A directed graph with names was read as an undirected one."""
    write_graph(Graph.from_edges([0, 1], [1, 2], directed=directed, names=names), tmp_path / "g.parquet")
    read = types.SimpleNamespace(inputFiles=lambda: [(tmp_path / "g.parquet").as_uri()])
    assert _note(read) == noted
    # Of several each knows its own alone, and files elsewhere are not opened for it.
    assert _note(types.SimpleNamespace(inputFiles=lambda: [(tmp_path / "g.parquet").as_uri()] * 2)) is None
    assert _note(types.SimpleNamespace(inputFiles=lambda: ["hdfs://there/g.parquet"])) is None
