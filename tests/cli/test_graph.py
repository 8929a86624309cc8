"""``anabranch graph``: every command from files to files, what ``--json`` promises, and what mistakes give."""

import json
import re
import shutil
import socket
import subprocess
import sys
import threading

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from anabranch.cli.graph.info import DATA_SETS
from anabranch.cli.graph.vectors import Vectors, read_vectors, write_vectors
from anabranch.errors import DataError
from anabranch.graph import HNSW, FastRP, Graph, PageRank, PowerWalk, datasets, load_dataset, read_graph
from anabranch.graph.disk import DiskIndex
from anabranch.graph.names import Names, read_names, write_names


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Where commands run: a small weighted graph with names, vectors, an index of each kind, clicks."""
    folder = tmp_path_factory.mktemp("graph")
    names = ["ann", "bob", "cat", "dan", "eve", "x=1"]
    edges = [
        ("ann", "bob", 2),
        ("bob", "cat", 1),
        ("cat", "ann", 1),
        ("cat", "dan", 3),
        ("dan", "eve", 1),
        ("eve", "x=1", 1),
    ]
    (folder / "edges.csv").write_text("source,target,weight\n" + "".join(f"{s},{t},{w}\n" for s, t, w in edges))
    (folder / "numbers.txt").write_text("0 1\n1 2\n2 0\n2 3\n")
    (folder / "seeds.csv").write_text("node,weight\nann,1\ndan,3\n")
    (folder / "labels.csv").write_text(
        "node,label\n" + "".join(f"{name},{'ab'[i % 2]}\n" for i, name in enumerate(names))
    )
    (folder / "clicks.csv").write_text("node,term,item\nann,jazz,i1\nbob,jazz,i1\nbob,jazz,i2\ncat,rock,i3\n")
    vectors = np.random.default_rng(0).normal(size=(300, 6)).astype(np.float32)
    np.save(folder / "v.npy", vectors)
    made = HNSW(6, M=8, ef_construction=40)
    made.add(vectors, workers=1)
    made.save(folder / "v.anb")
    small = HNSW(6, M=8, ef_construction=40)
    small.add(vectors[:6], workers=1)
    small.save(folder / "named.anb")
    write_names(folder / "named.anb", Names(names))
    return folder


@pytest.fixture
def run(here, place, monkeypatch):
    """A command in its folder: what it prints, which must be without error."""
    monkeypatch.chdir(place)

    def command(*arguments):
        code, out, err = here("graph", *arguments)
        assert code == 0, err
        return out

    return command


@pytest.fixture
def facts(run):
    """A command with ``--json``: its one object."""
    return lambda *arguments: json.loads(run(*arguments, "--json"))


def last(out):
    """The labels of the last two lines."""
    return [line[:8].strip() for line in out.splitlines()[-2:]]


# info


def test_info_tells_what_the_library_tells(run, facts, place):
    graph = read_graph(place / "edges.csv")
    found = facts("info", "edges.csv")
    assert found.items() >= {"graph": "edges.csv", "labels": None, "wrote": [], **graph.describe()}.items()
    out = run("info", "edges.csv")
    assert "6 nodes, 6 edges   undirected, weighted" in out
    assert out.splitlines()[-1].startswith("next    anabranch graph ppr edges.csv cat")


def test_info_converts_and_draws(run, place):
    out = run("info", "edges.csv", "--out", "graph.anb", "--picture", "degrees.png")
    assert last(out) == ["wrote", "next"]
    assert (place / "degrees.png").read_bytes().startswith(b"\x89PNG")
    assert Graph.load(place / "graph.anb").names_of([0, 5]).tolist() == ["ann", "x=1"]
    run("info", "graph.anb", "--picture", "degrees.svg", "--directed")
    assert "edges in" in (place / "degrees.svg").read_text()


def test_info_of_other_files(facts, run):
    found = facts("info", "named.anb")
    assert (found["kind"], found["count"], found["dim"], found["named"]) == ("hnsw index", 6, 6, True)
    assert "mean degree" in run("info", "named.anb")


def test_data_sets_are_listed(facts):
    assert facts("info")["data_sets"] == DATA_SETS
    assert set(DATA_SETS) == set(datasets._READERS)


def test_columns_directions_and_ids(facts, place):
    (place / "odd.tsv").write_text("when\tto\tfrom\n7\t1\t0\n8\t2\t1\n")
    found = facts("info", "odd.tsv", "--columns", "from,to", "--directed")
    assert (found["nodes"], found["directed"], found["weighted"]) == (3, True, False)
    assert facts("info", "odd.tsv", "--columns", "2,1,0")["weight"]["sum"] == 15
    assert facts("info", "numbers.txt", "--ids", "text")["named"] is True


# ppr


def test_ppr_of_one_node_and_of_weighted_ones(facts, run, place):
    graph = read_graph(place / "edges.csv")
    found = facts("ppr", "edges.csv", "ann", "--top", 3)
    ids, scores = PageRank().personalized(graph, graph.ids_of(["ann"]), 3)
    assert [row["node"] for row in found["ranking"]] == graph.names_of(ids).tolist()
    np.testing.assert_allclose([row["score"] for row in found["ranking"]], scores)
    assert found["seeds"] == [{"node": "ann", "weight": 1.0}]
    weighted = facts("ppr", "edges.csv", "ann", "dan=3", "--top", 3)["ranking"]
    assert facts("ppr", "edges.csv", "--seeds", "seeds.csv", "--top", 3)["ranking"] == weighted
    ids, scores = PageRank().personalized(graph, (graph.ids_of(["ann", "dan"]), [1, 3]), 3)
    np.testing.assert_allclose([row["score"] for row in weighted], scores)
    assert facts("ppr", "edges.csv", "x=1")["seeds"] == [{"node": "x=1", "weight": 1.0}]  # a name with = in it
    assert last(run("ppr", "edges.csv", "ann", "--out", "one.csv")) == ["wrote", "next"]
    assert (place / "one.csv").read_text().startswith('"node","score"\n"ann",0.')


def test_ppr_from_anywhere_is_pagerank(facts, place):
    score_N = PageRank(alpha=0.2).scores(read_graph(place / "numbers.txt"))
    found = facts("ppr", "numbers.txt", "--alpha", 0.2)
    assert found["seeds"] is None
    assert [row["node"] for row in found["ranking"]] == np.argsort(-score_N, kind="stable").tolist()


@pytest.mark.parametrize("name", ["all.parquet", "all.csv", "all.anb"])
def test_ppr_of_all(facts, place, name):
    found = facts("ppr", "edges.csv", "--all", "--method", "exact", "--top", 2, "--out", name, "--workers", 1)
    assert (found["sources"], found["entries"], found["wrote"]) == (6, 12, name)
    graph = read_graph(place / "edges.csv")
    ids, _ = PageRank().personalized(graph, 3, 2)
    if name == "all.anb":
        from anabranch.graph.fully_ppr import FullyPPRResult

        assert FullyPPRResult.load(place / name).top(3)[0].tolist() == ids.tolist()
        return
    from pyarrow import csv

    table = (parquet.read_table if name == "all.parquet" else csv.read_csv)(place / name).to_pylist()
    assert [row["target"] for row in table if row["source"] == 3] == ids.tolist()
    assert {row["source_name"] for row in table} == set(graph.names)


def test_walks_are_indexed_and_asked(facts, place):
    found = facts("index", "edges.csv", "--walks", 40, "--out", "walks.anb", "--seed", 3, "--workers", 1)
    assert (found["nodes"], found["walks"]) == (6, 40)
    graph = read_graph(place / "edges.csv")
    ids, scores = PowerWalk(walks=40, seed=3).build(graph).query(0, 3)
    ranking = facts("ppr", "edges.csv", "ann", "--index", "walks.anb", "--top", 3)["ranking"]
    assert [row["node"] for row in ranking] == graph.names_of(ids).tolist()
    np.testing.assert_allclose([row["score"] for row in ranking], scores)


def test_an_index_of_walks_goes_along_with_its_graph(facts, run, place):
    """As building the graph of all edges anew, and its index, would: by tables of edges, with a node that is new."""
    facts("index", "edges.csv", "--walks", 40, "--out", "before.anb", "--seed", 3, "--workers", 1)
    (place / "new.csv").write_text("source,target,weight\nann,zoe,2\nzoe,dan,1\n")
    (place / "gone.csv").write_text("source,target\ncat,ann\n")
    options = ["--add", "new.csv", "--remove", "gone.csv", "--out", "after.anb", "--out-graph", "after_graph.anb"]
    found = facts("rewalk", "before.anb", "edges.csv", *options, "--workers", 1)
    assert [found[name] for name in ("nodes", "new_nodes", "edges", "added", "removed")] == [7, 1, 7, 2, 1]
    graph = Graph.load(place / "after_graph.anb")
    assert graph.names.tolist() == ["ann", "bob", "cat", "dan", "eve", "x=1", "zoe"]
    fresh = PowerWalk(walks=40, seed=3).build(graph).query(6, 3)
    ranking = facts("ppr", "after_graph.anb", "zoe", "--index", "after.anb", "--top", 3)["ranking"]
    assert [row["node"] for row in ranking] == graph.names_of(fresh[0]).tolist()
    np.testing.assert_allclose([row["score"] for row in ranking], fresh[1])
    out = run("rewalk", "after.anb", "after_graph.anb", "--add", "gone.csv", "--out", "b.anb", "--out-graph", "c.anb")
    assert last(out) == ["wrote", "next"]


# embed


@pytest.mark.parametrize("name", ["e.npy", "e.npz", "e.parquet", "e.csv", "e.tsv"])
def test_embed_writes_every_kind_of_file(facts, place, name):
    found = facts("embed", "edges.csv", "--dim", 8, "--seed", 2, "--out", name, "--workers", 1)
    assert (found["nodes"], found["dim"], found["method"], found["wrote"]) == (6, 8, "fastrp", [name])
    graph = read_graph(place / "edges.csv")
    held = read_vectors(place / name)
    np.testing.assert_array_equal(held.array, FastRP(dim=8, seed=2, threads=1).fit_transform(graph))
    assert (None if held.names is None else held.names.tolist()) == (None if name == "e.npy" else graph.names.tolist())


def test_embed_trains_tests_and_draws(facts, run, place):
    options = ["--method", "graphvite", "--dim", 4, "--epochs", 20, "--workers", 1, "--set", "partitions=1", "--quiet"]
    found = facts("embed", "edges.csv", "--out", "g.npy", *options, "--labels", "labels.csv", "--train", 0.5)
    assert found["params"]["partitions"] == 1
    assert found["classification"]["labels"] == 2
    assert 0 <= found["classification"]["micro_f1"] <= 1
    out = run("embed", "karate", "--dim", 8, "--out", "k.npy", "--labels", "own", "--train", 0.5, "--map", "map.svg")
    assert "micro F1" in out
    assert last(out) == ["wrote", "next"]
    drawn = (place / "map.svg").read_text()
    assert "karate   fastrp, principal components" in drawn
    # The node with most edges.
    assert "<!-- 33 -->" in drawn
    assert facts("embed", "karate", "--out", "k.npy", "--set", "beta=-0.9")["params"]["beta"] == -0.9


# index and search


def test_index_and_search_find_what_the_library_finds(facts, run, place):
    found = facts(
        "index", "v.npy", "--out", "i.anb", "--metric", "cosine", "--m", 8, "--ef-construction", 40, "--workers", 1
    )
    assert (found["vectors"], found["dim"], found["metric"], found["named"]) == (300, 6, "cosine", False)
    index = HNSW.load(place / "i.anb")
    ids, distances = index.search(index.vectors([7]), 4)
    result = facts("search", "i.anb", "--rows", "7", "--top", 3)["results"][0]
    assert result["ids"] == ids[0, 1:].tolist()
    np.testing.assert_allclose(result["distances"], distances[0, 1:], rtol=1e-6)
    assert len(facts("search", "i.anb", "--rows", "0-4,7", "--top", 3)["results"]) == 6
    assert facts("search", "i.anb", "7", "--top", 3)["results"][0] == result
    by_file = facts("search", "i.anb", "--queries", "v.npy", "--top", 1)["results"]
    assert [row["ids"] for row in by_file] == [[number] for number in range(300)]
    assert last(run("search", "i.anb", "--rows", "7", "--out", "near.parquet")) == ["wrote", "next"]
    assert parquet.read_table(place / "near.parquet").to_pydict()["id"][:3] == ids[0, 1:].tolist()


def test_an_index_on_disk_finds_what_the_library_finds(facts, run, place):
    made = facts("index", "v.npy", "--disk", "--memory", "8MiB", "--out", "disk.anb", "--m", 8, "--workers", 1)
    assert (made["vectors"], made["dtype"], made["shards"], made["memory_limit"]) == (300, "pq6", 1, 8 << 20)
    assert made["memory_bytes"] <= 8 << 20
    assert made["size_bytes"] == (place / "disk.anb").stat().st_size
    rows = np.load(place / "v.npy")
    with DiskIndex(place / "disk.anb") as index:
        ids, distances = index.search(rows[[7]], 4)
    found = facts("search", "disk.anb", "--rows", "7", "--top", 3, "--check")
    assert found["results"][0]["ids"] == ids[0, 1:].tolist()
    np.testing.assert_allclose(found["results"][0]["distances"], distances[0, 1:], rtol=1e-6)
    assert found["recall"] == 1.0
    only = facts("search", "disk.anb", "--rows", "4", "--only", "10-19,290", "--check", "-k", 6)
    assert (set(only["results"][0]["ids"]) <= {*range(10, 20), 290}, only["recall"]) == (True, 1.0)
    assert "blocks" in facts("search", "disk.anb", "--sample", 20, "--curve", "c.svg")["curve"][0]
    told = facts("info", "disk.anb")
    assert (told["kind"], told["count"], told["code_bytes"], told["named"]) == ("disk vector index", 300, 6, False)
    assert last(run("index", "v.npy", "--disk", "--code-bytes", 3, "--out", "d2.anb", "--m", 8)) == ["wrote", "next"]


def test_an_index_in_memory_goes_to_disk_with_its_names(facts, place):
    made = facts("index", "named.anb", "--disk", "--out", "named-disk.anb")
    assert (made["vectors"], made["named"]) == (6, True)
    found = facts("search", "named-disk.anb", "ann", "-k", 2)["results"]
    assert found == facts("search", "named.anb", "ann", "-k", 2)["results"]
    np.save(place / "six.npy", np.load(place / "v.npy")[:6])
    assert facts("index", "six.npy", "--disk", "--out", "sd.anb", "--names", "edges.csv")["named"] is True
    assert facts("search", "sd.anb", "ann", "-k", 2)["results"][0]["names"] == found[0]["names"]


def test_names_go_from_vectors_to_results(facts, run, place):
    write_vectors(place / "named.parquet", Vectors(np.load(place / "v.npy")[:6], read_names(place / "named.anb").array))
    assert facts("index", "named.parquet", "--out", "n.anb")["named"] is True
    found = facts("search", "n.anb", "ann", "x=1", "-k", 2)["results"]
    assert [row["query"] for row in found] == ["ann", "x=1"]
    assert found[0]["names"] == read_names(place / "n.anb").of(np.array(found[0]["ids"]))
    assert re.search(r"^ann +\w", run("search", "n.anb", "ann", "-k", 2), re.MULTILINE)
    np.save(place / "six.npy", np.load(place / "v.npy")[:6])
    assert facts("index", "six.npy", "--out", "n.anb", "--names", "edges.csv")["named"] is True
    assert facts("search", "n.anb", "ann", "-k", 2)["results"] == found[:1]
    assert facts("index", "six.npy", "--out", "n.anb")["named"] is False  # and the names of the index before are gone
    assert read_names(place / "n.anb") is None


def test_only_what_a_filter_lets_through_is_found(facts):
    base = ("search", "v.anb", "--rows", "4", "-k", 6, "--ef", 300)
    everything = facts(*base)["results"][0]["ids"]
    assert facts(*base, "--without", f"{everything[0]},{everything[2]}")["results"][0]["ids"][:4] == [
        id for id in everything if id not in (everything[0], everything[2])
    ]
    found = facts(*base, "--only", "10-19,290", "--check")
    assert set(found["results"][0]["ids"]) <= {*range(10, 20), 290}
    assert (len(found["results"][0]["ids"]), found["recall"]) == (6, 1.0)


def test_elements_are_let_through_by_name_and_deleted_ones_are_told_by_name(facts, here, place):
    write_vectors(place / "o.parquet", Vectors(np.load(place / "v.npy")[:6], read_names(place / "named.anb").array))
    facts("index", "o.parquet", "--out", "o.anb")
    assert facts("search", "o.anb", "ann", "--only", "bob,x=1")["results"][0]["ids"] in ([1, 5], [5, 1])
    assert set(facts("search", "o.anb", "ann", "--without", "bob,x=1")["results"][0]["ids"]) == {2, 3, 4}
    facts("remove", "o.anb", "cat")
    code, _, err = here("graph", "search", "o.anb", "ann", "cat")
    assert (code, err) == (2, "error: 'cat' was deleted from the index\n")


def test_elements_are_taken_out_brought_in_and_moved(facts, run, place):
    rows = np.load(place / "v.npy")
    facts("index", "v.npy", "--out", "c.anb", "--m", 6, "--ef-construction", 30, "--workers", 1)
    found = facts("remove", "c.anb", "7", "9")
    assert (found["removed"], found["vectors"], found["deleted"]) == (2, 298, 2)
    found = facts("remove", "c.anb", "--rows", "0-5", "--compact", "--out", "d.anb")
    assert (found["vectors"], found["deleted"], found["wrote"]) == (292, 0, "d.anb")
    assert found["size_bytes"]["after"] < found["size_bytes"]["before"]
    assert sorted(HNSW.load(place / "d.anb").ids.tolist()) == [6, 8, *range(10, 300)]
    np.save(place / "two.npy", rows[:2] + 1)
    found = facts("update", "d.anb", "two.npy", "--rows", "8,400")
    assert (found["new"], found["moved"], found["vectors"]) == (1, 1, 293)
    np.testing.assert_array_equal(HNSW.load(place / "d.anb").vectors([8, 400]), rows[:2] + 1)
    # Without ids they come after the largest.
    assert facts("update", "d.anb", "two.npy")["new"] == 2
    assert HNSW.load(place / "d.anb").ids.max() == 402
    assert last(run("update", "d.anb", "two.npy", "--rows", "8,400")) == ["wrote", "next"]
    assert last(run("remove", "d.anb", "8")) == ["wrote", "next"]


def test_names_come_and_move_with_their_vectors(facts, here, place):
    rows, names = np.load(place / "v.npy"), read_names(place / "named.anb").array
    write_vectors(place / "named.parquet", Vectors(rows[:6], names))
    facts("index", "named.parquet", "--out", "m.anb")
    write_vectors(place / "more.parquet", Vectors(rows[10:12], np.array([names[2], "new one"], object)))
    found = facts("update", "m.anb", "more.parquet")
    assert (found["new"], found["moved"]) == (1, 1)
    assert read_names(place / "m.anb").array.tolist() == [*names.tolist(), "new one"]
    np.testing.assert_array_equal(HNSW.load(place / "m.anb").vectors([2, 6]), rows[10:12])
    facts("remove", "m.anb", names[0])
    assert facts("search", "m.anb", "new one", "-k", 9)["results"][0]["names"].count(names[0]) == 0
    assert "vectors of v.npy have none" in one_line(here("graph", "update", "m.anb", "v.npy"))


def test_an_empty_index_takes_names(facts, here, place):
    rows = np.load(place / "v.npy")
    HNSW(6, workers=1).save(place / "e.anb")
    write_vectors(place / "e.parquet", Vectors(rows[:2], np.array(["ann", "bob"], object)))
    found = facts("update", "e.anb", "e.parquet")
    assert (found["new"], found["vectors"]) == (2, 2)
    assert read_names(place / "e.anb").array.tolist() == ["ann", "bob"]
    assert facts("search", "e.anb", "ann")["results"][0]["names"] == ["bob"]
    # One that holds elements without names does not.
    facts("index", "v.npy", "--out", "f.anb")
    assert "calls vectors by names, the index by ids" in one_line(here("graph", "update", "f.anb", "e.parquet"))


def test_the_former_name_of_workers_is_taken(facts, here, place):
    found = [facts("search", "v.anb", "--rows", "0", name, 1)["results"] for name in ("--workers", "--threads")]
    assert found[0] == found[1]
    assert "--workers" in one_line(here("graph", "search", "v.anb", "--rows", "0", "--threads", "0"))


def test_changes_that_a_server_took_are_read_and_not_written_over(facts, here, place):
    from anabranch.graph.live import LiveIndex

    facts("index", "v.npy", "--out", "l.anb", "--workers", 1)
    with LiveIndex.open(place / "l.anb") as live:
        live.delete([7])
        live.upsert([500], np.load(place / "v.npy")[:1] + 3)
    assert facts("info", "l.anb")["count"] == 300
    assert "ids[0] is 7, which is not in the index" in one_line(here("graph", "search", "l.anb", "7"))
    assert facts("search", "l.anb", "500", "-k", 1)["results"][0]["query"] == 500
    for line in ("remove l.anb 1", "update l.anb v.npy", "index v.npy --out l.anb"):
        assert "l.anb.live holds changes of l.anb, which would be lost" in one_line(here("graph", *line.split()))
    assert facts("remove", "l.anb", "500", "--out", "merged.anb")["vectors"] == 299


def test_names_that_a_server_took_are_read(facts, here, place):
    from anabranch.graph.live import LiveIndex
    from anabranch.graph.names import read_names

    rows, names = np.load(place / "v.npy")[:20], [f"n{number}" for number in range(20)]
    parquet.write_table(pa.table({"name": names, "vector": rows.tolist()}), place / "named.parquet")
    facts("index", "named.parquet", "--out", "n.anb", "--workers", 1)
    with LiveIndex.open(place / "n.anb") as live:
        live.upsert_named(["new", "n3"], rows[:2] + 3)
        live.delete_named(["n1"])
    assert facts("search", "n.anb", "new", "-k", 1)["results"][0]["names"] == ["n3"]
    assert (facts("info", "n.anb")["count"], facts("info", "n.anb")["named"]) == (20, True)
    assert "n.anb.live holds changes of n.anb" in one_line(here("graph", "remove", "n.anb", "new"))
    facts("remove", "n.anb", "n3", "--out", "less.anb")
    assert read_names(place / "less.anb").array.tolist() == [*names, "new"]
    assert facts("search", "less.anb", "new", "-k", 30)["results"][0]["names"].count("n3") == 0

    assert 7 not in HNSW.load(place / "merged.anb")


@pytest.mark.parametrize(
    "line", ["remove w.anb 1", "update w.anb v.npy --rows 300-599", "index v.npy --out w.anb --m 8"]
)
def test_a_server_takes_no_changes_of_an_index_while_it_is_written_over(facts, here, place, monkeypatch, line):
    """What came between the first look and the end would be lost; so would what another of these commands writes."""
    from anabranch.graph.live import LiveIndex

    facts("index", "v.npy", "--out", "w.anb", "--workers", 1)
    own, refused = HNSW.save, []

    def late(self, path):
        own(self, path)
        with pytest.raises(DataError, match="is written by another process"):
            live.delete([7])
        with monkeypatch.context() as patch:
            patch.setattr(HNSW, "save", own)
            other = threading.Thread(target=lambda: refused.append(here("graph", "remove", "w.anb", "1")))
            other.start()
            other.join()

    with LiveIndex.open(place / "w.anb") as live:
        monkeypatch.setattr(HNSW, "save", late)
        facts(*line.split())
        monkeypatch.undo()
        monkeypatch.chdir(place)
        assert "w.anb.live is written by another process" in one_line(refused[0])
        assert not (place / "w.anb.live").exists()
        with pytest.raises(DataError, match="read it again"):
            live.delete([7])
    with LiveIndex.open(place / "w.anb") as live:
        live.delete([7])
        assert "which would be lost" in one_line(here("graph", *line.split()))
    (place / "w.anb").unlink()
    shutil.rmtree(place / "w.anb.live")


def test_recall_is_measured_and_drawn(facts, run, place):
    found = facts("search", "v.anb", "--check", "--ef", 300, "--sample", 50)
    assert found["recall"] == 1.0  # as many as there are
    assert found["results"] is None
    low = facts("search", "v.anb", "--check", "--ef", 10, "--sample", 300)["recall"]
    assert 0.3 < low < 1.0
    truth = np.argsort(((np.load(place / "v.npy") - np.load(place / "v.npy")[4]) ** 2).sum(1), kind="stable")[1:6]
    assert (
        facts("search", "v.anb", "--rows", "4", "--ef", 300, "--top", 5, "--check")["results"][0]["ids"]
        == truth.tolist()
    )
    curve = facts("search", "v.anb", "--curve", "curve.svg", "--sample", 20)["curve"]
    assert [point["ef"] for point in curve] == [11, 16, 32, 64, 128, 256, 512]
    assert curve[-1]["recall"] == 1.0
    assert "recall@10" in (place / "curve.svg").read_text()
    out = run("search", "v.anb", "--check", "--sample", 20)
    # The first search waits for kernels: that is a time, and no rate.
    assert "20 elements drawn" in out
    assert "/s" not in out


def test_many_equal_vectors_can_still_be_found(facts, place):
    np.save(place / "same.npy", np.append(np.ones((200, 6)), np.load(place / "v.npy")[:50], axis=0).astype(np.float32))
    assert facts("index", "same.npy", "--out", "same.anb", "--m", 4)["unreachable"] == 0
    assert facts("search", "same.anb", "--rows", "210", "--check", "--ef", 250)["recall"] == 1.0


# rank


def test_rank_counts_clicks(facts, run, place):
    found = facts("rank", "clicks.csv", "jazz", "--node", "ann", "--save", "m.anb", "--out", "ranked.csv")
    assert (found["clicks"], found["nodes"], found["terms"], found["items"]) == (4, 3, 2, 3)
    assert found["rankings"] == {"jazz": [{"item": "i1", "score": 2.0}, {"item": "i2", "score": 1.0}]}
    assert found["wrote"] == ["ranked.csv", "m.anb"]
    assert (place / "ranked.csv").read_text().splitlines()[1] == '"jazz",1,"i1",2'
    assert facts("rank", "m.anb", "jazz", "--node", "ann")["rankings"] == found["rankings"]
    assert facts("rank", "clicks.csv")["rankings"] == {}
    assert facts("rank", "clicks.csv", "--test", "clicks.csv")["ndcg"] > 0.5
    out = run("rank", "clicks.csv", "jazz", "rock")
    assert re.search(r"^jazz +1 +i1 +2$", out, re.MULTILINE)
    assert last(out)[-1] == "next"


# Mistakes


def one_line(found):
    code, out, err = found
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err.removeprefix("error: ").rstrip("\n")


MISTAKES = [
    ("index v.npy --out x.anb --memory 1GiB", "--memory is only for --disk"),
    ("index v.npy --out x.anb --code-bytes 3", "--code-bytes is for --disk"),
    ("index v.npy --out x.anb --disk --memory 8", "--memory is '8'; give a number of bytes with a unit"),
    (
        "index v.npy --out x.anb --disk --memory 1MiB",
        "memory is 1,048,576 bytes, and an index on disk of 300 vectors of 6 numbers needs",
    ),
    (
        "index v.npy --out x.anb --disk --code-bytes 7",
        "code_bytes is 7; vectors of 6 numbers have codes of 1 to 6 bytes",
    ),
    ("index v.npy --out x.anb --disk --dtype i8", "--dtype is i8; with --disk"),
    ("index v.npy --out x.anb --disk --metric l1", "metric is 'l1'"),
    ("index v.npy --out x.anb --disk --walks 5", "--disk is for vectors"),
    ("index labels.csv --out x.anb --disk", "--disk reads vectors a piece at a time: from .npy"),
    ("index nowhere.npy --out x.anb --disk", "there is no file nowhere.npy"),
    ("index v.npy --out x.anb --disk --names edges.csv", "--names is of a graph with 6 nodes; there are 300 vectors"),
    ("index cut.anb --out x.anb --disk", "cut.anb"),
    ("inf", "no such command 'inf'; did you mean 'info'? (see anabranch graph --help)"),
    (
        "info edges.csv --pictur x.png",
        "no such option: --pictur; did you mean --picture? (see anabranch graph info --help)",
    ),
    ("ppr", "missing argument 'GRAPH' (see anabranch graph ppr --help)"),
    ("info nowhere.csv", "there is no file nowhere.csv, and no graph 'nowhere.csv'; known: blogcatalog"),
    ("info .", "is a folder, not a file"),
    ("info edges.csv --picture x.gif", "'x.gif' is not a picture file"),
    ("info edges.csv --out x.dat", "the format of 'x.dat' is unknown"),
    ("info edges.csv --columns a", "--columns is 'a'; write SOURCE,TARGET"),
    ("info edges.csv --columns a,b", "edges.csv has no column 'a'"),
    ("info edges.csv --ids numbers", "edges.csv, line 2: the source 'ann' is not a whole number"),
    ("info edges.csv --ids nmbers", "ids is 'nmbers'"),
    ("info bad.csv", "bad.csv"),
    ("info negative.csv", "negative.csv"),
    ("info nan.csv", "nan.csv"),
    ("info cut.anb", "cut.anb"),
    ("info flipped.anb", "flipped.anb"),
    ("ppr edges.csv bbo", "the graph has no node 'bbo'; did you mean 'bob'?"),
    ("ppr edges.csv bob=x", "'bob=x' is neither a node nor NODE=WEIGHT: 'x' is not a number"),
    ("ppr edges.csv bob=-1", "the weight -1"),
    ("ppr edges.csv bob=nan", "the weight nan"),
    ("ppr numbers.txt ann", "there is no node 'ann': the nodes of this graph have no names"),
    ("ppr numbers.txt 9", "node 9 is not one of the 4 nodes"),
    ("ppr numbers.txt -- -1", "node -1 is not one of the 4 nodes"),
    ("ppr edges.csv ann --alpha 0", "alpha is 0"),
    ("ppr edges.csv ann --alpha 1", "alpha is 1"),
    ("ppr edges.csv ann --method quick", "method is 'quick'"),
    ("ppr edges.csv ann --dangling sink", "dangling"),
    ("ppr edges.csv ann --top 0", "--top is '0': it must be"),
    ("ppr edges.csv ann --tol -1", "tol"),
    ("ppr edges.csv ann --out x.txt", "--out is 'x.txt'; its name must end in .parquet"),
    ("ppr edges.csv ann --engine spark", "--engine spark is for --all"),
    ("ppr edges.csv ann --seeds seeds.csv", "give seeds as arguments or with --seeds, not both"),
    ("ppr edges.csv --seeds nowhere.csv", "there is no file nowhere.csv"),
    ("ppr edges.csv --seeds words.csv", "words.csv, row 0: the weight 'much' is not a number"),
    ("ppr edges.csv --seeds unknown.csv", "unknown.csv: is the column 'label' a weight"),
    ("ppr edges.csv --all", "name a file with --out FILE"),
    ("ppr edges.csv --all --out x.npy", "--out is 'x.npy'; its name must end in .anb"),
    ("ppr edges.csv --all --out x.csv --engine cloud", "engine is 'cloud'"),
    ("ppr edges.csv --all --out x.csv --method guess", "method is 'guess'"),
    ("ppr edges.csv ann --index v.anb", "v.anb holds a hnsw index, not a powerwalk-index"),
    ("ppr edges.csv --index v.anb", "--index answers for seeds"),
    ("rewalk walks.anb edges.csv --out z.anb --out-graph y.anb", "name a table of edges with --add"),
    ("rewalk v.anb edges.csv --add seeds.csv --out z.anb --out-graph y.anb", "v.anb holds a hnsw index"),
    ("ppr empty.csv", "empty.csv"),
    ("embed edges.csv", "missing option '--out'"),
    ("embed edges.csv --out x.bin", "--out is 'x.bin'; its name must end in .npy"),
    ("embed edges.csv --out x.npy --method word2vec", "--method is 'word2vec'; use one of fastrp, graphvite"),
    ("embed edges.csv --out x.npy --dim 0", "--dim is '0'"),
    ("embed edges.csv --out x.npy --set bta=1", "did you mean beta?"),
    ("embed edges.csv --out x.npy --set beta=high", "beta"),
    ("embed edges.csv --out x.npy --epochs 3", "--epochs is for graphvite"),
    ("embed edges.csv --out x.npy --labels own", "edges.csv has no labels of its own"),
    ("embed edges.csv --out x.npy --labels seeds.csv --train 2", "--train is 2.0"),
    ("embed edges.csv --out x.npy --labels unknown.csv", "unknown.csv: the graph has no node 'zoe'"),
    ("embed edges.csv --out x.npy --labels labels.csv --train 0.01", "of 6 labelled nodes"),
    ("embed edges.csv --out x.npy --labels gaps.csv", "gaps.csv, row 1: an empty cell"),
    ("index nowhere.npy --out x.anb", "there is no file nowhere.npy"),
    ("index edges.csv --out x.anb", "edges.csv"),
    ("index ragged.parquet --out x.anb", "ragged.parquet, row 1: a vector of 1 numbers, the first has 2"),
    ("index nan.npy --out x.anb", "nan.npy, row 2: a number is not finite"),
    ("index flat.npy --out x.anb", "flat.npy holds float32 of the shape [6]"),
    ("index words.npy --out x.anb", "words.npy holds"),
    ("index none.npy --out x.anb", "none.npy holds no vectors"),
    ("index cut.npy --out x.anb", "cut.npy"),
    ("index objects.npy --out x.anb", "objects.npy"),
    ("index zero.npy --out x.anb --metric cosine", "zero.npy, row 1: all numbers are 0, which has no cosine"),
    ("index v.npy --out x.anb --metric manhattan", "metric is 'manhattan'"),
    ("index v.npy --out x.anb --m 1", "M is 1"),
    ("index v.npy --out x.anb --ef-construction 0", "ef_construction is 0"),
    ("index v.npy --out x.anb --dtype f8", "dtype is 'f8'"),
    ("index v.npy --out x.anb --names edges.csv", "--names is edges.csv with 6 nodes; there are 300 vectors"),
    ("index v.npy --out x.anb --names numbers.txt", "whose nodes have no names"),
    ("search nowhere.anb --rows 1", "nowhere.anb"),
    ("search v.npy --rows 1", "v.npy is not one of our array files"),
    ("search cut.anb --rows 1", "cut.anb"),
    ("search flippedv.anb --rows 1", "flippedv.anb is damaged"),
    ("search v.anb", "nothing to search for"),
    ("search v.anb --rows 300", "300, which is not in the index"),
    ("search v.anb --rows 1-", "--rows is '1-'; write ids as 0,7 or 0-9"),
    ("search v.anb --rows one", "--rows is 'one'"),
    ("search v.anb ann", "there is no element 'ann': the index has no names, only ids"),
    ("search named.anb zoe", "'zoe'"),
    ("search v.anb --rows 1 --queries v.npy", "give only one of"),
    ("search v.anb --queries narrow.npy", "narrow.npy has vectors of 2 numbers, the index of 6"),
    ("search v.anb --rows 1 --ef 0", "--ef is '0'"),
    ("search v.anb --rows 1 --top 0", "--top is '0'"),
    ("search mismatch.anb --rows 1", "mismatch.anb.names belongs to another index"),
    ("rank nowhere.csv", "nowhere.csv"),
    ("rank edges.csv", "clicks have no column 'node'"),
    ("rank clicks.csv jazz --node zoe", "'zoe'"),
    ("rank clicks.csv jazz --isolation -1", "F is -1"),
    ("rank clicks.csv --columns a,b", "--columns is 'a,b'"),
    ("rank clicks.csv --out x.csv", "give a term to rank items for"),
    ("rank clicks.csv --save x.csv", "its name must end in .anb"),
    ("rank cut.anb jazz", "cut.anb"),
    ("serve nowhere.anb", "cannot read nowhere.anb"),
    ("serve cut.anb --port 0 -q", "cut.anb"),
    ("serve v.anb named.anb --port 0 -q", "named.anb is a second index of vectors"),
    ("serve v.anb --port 99999", "port is 99999"),
    ("serve v.anb --host nowhere.invalid", "cannot listen at 'nowhere.invalid'"),
    ("serve v.anb --port 0 --max-k 0", "k is 0"),
    ("serve v.anb --port 0 --timeout 0", "timeout_s is 0.0"),
    ("serve v.anb --port 0 --watch 0", "--watch is 0.0"),
    ("serve v.anb --port 0 --fsync often", "fsync is 'often'"),
    ("serve v.anb --port 0 --dim 3", "--dim 3 --metric l2 do not fit: the index holds vectors of 6 numbers, l2"),
    ("serve no1.anb no2.anb --port 0 --dim 3", "--dim begins one index, and no1.anb and no2.anb are not there"),
    ("remove v.anb", "nothing to remove"),
    ("remove v.anb 1 --rows 2", "give either names of elements or --rows, not both"),
    ("remove v.anb 1 1", "ids[1] is 1, which stands there before"),
    ("remove v.anb 9999", "ids[0] is 9999, which is not in the index"),
    ("remove named.anb nobody", "there is no 'nobody'"),
    ("update v.anb v.npy --rows 0,1", "--rows names 2 elements, v.npy has 300 vectors"),
    ("update v.anb edges.csv", "edges.csv"),
    ("search v.anb --rows 1 --only 1 --without 2", "give only one of --only and --without"),
    ("search v.anb --rows 1 --only x", "--only is 'x'; write ids as 0,7 or 0-9"),
    ("search v.anb --rows 0-99999999999", "at most 10,000,000 are taken"),
]


@pytest.fixture(scope="module")
def spoilt(place):
    """Files that are wrong in one way each."""
    (place / "bad.csv").write_text("source,target\na,b\nc\n")
    (place / "negative.csv").write_text("source,target,weight\na,b,-1\n")
    (place / "nan.csv").write_text("source,target,weight\na,b,nan\n")
    (place / "empty.csv").write_text("")
    (place / "unknown.csv").write_text("node,label\nzoe,1\n")
    (place / "words.csv").write_text("node,weight\nann,much\n")
    (place / "gaps.csv").write_text("node,label\nann,a\nbob,\n")
    read_graph(place / "edges.csv").save(place / "whole.anb")
    whole, vectors = (place / "whole.anb").read_bytes(), (place / "v.anb").read_bytes()
    (place / "cut.anb").write_bytes(whole[:-70])
    for name, content, at in (
        ("flipped.anb", whole, whole.index(b"annbob")),
        ("flippedv.anb", vectors, len(vectors) - 200),
    ):
        (place / name).write_bytes(content[:at] + bytes([content[at] ^ 64]) + content[at + 1 :])
    good = np.load(place / "v.npy")
    good[2, 1] = np.nan
    np.save(place / "nan.npy", good[:5])
    np.save(place / "flat.npy", good[0])
    np.save(place / "words.npy", np.array([["a", "b"]]))
    np.save(place / "none.npy", np.empty((0, 6), np.float32))
    np.save(place / "objects.npy", np.array([[None]]), allow_pickle=True)
    np.save(place / "zero.npy", np.array([[1, 2], [0, 0]], np.float32))
    np.save(place / "narrow.npy", np.ones((2, 2), np.float32))
    (place / "cut.npy").write_bytes((place / "v.npy").read_bytes()[:-10])
    parquet.write_table(pa.table({"vector": [[1.0, 2.0], [1.0]]}), place / "ragged.parquet")
    (place / "mismatch.anb").write_bytes(vectors)
    (place / "mismatch.anb.names").write_bytes((place / "named.anb.names").read_bytes())


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes(here, place, spoilt, monkeypatch, arguments, message):
    monkeypatch.chdir(place)
    before = set(place.iterdir())
    assert message in one_line(here("graph", *arguments.split()))
    assert set(place.iterdir()) == before  # nothing is written, not even half


def test_a_port_that_is_taken(here, place, monkeypatch):
    monkeypatch.chdir(place)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port}: address already in use" in one_line(here("graph", "serve", "v.anb", "--port", port))


def test_spark_that_is_not_installed(here, place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setitem(sys.modules, "pyspark", None)
    message = one_line(here("graph", "ppr", "edges.csv", "--all", "--engine", "spark", "--out", "spark_out", "--quiet"))
    assert "pip install 'anabranch[spark]'" in message
    assert not (place / "spark_out").exists()


def test_without_the_extra_help_works_and_commands_say_what_is_missing():
    script = """
import sys
for name in ("numba", "scipy", "starlette"):
    sys.modules[name] = None
import anabranch.graph
from anabranch.cli.main import main
assert main(["graph", "ppr", "--help"]) == 0
sys.exit(main(["graph", "info", "karate"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr == "error: anabranch graph needs numba, scipy and starlette; pip install 'anabranch[graph]'\n"


def test_a_table_of_vectors_is_checked(tmp_path):
    parquet.write_table(pa.table({"id": [3, 1], "x": [1.0, 2.0], "y": [0.5, None]}), tmp_path / "gap.parquet")
    with pytest.raises(DataError, match="row 1: 'y' is empty"):
        read_vectors(tmp_path / "gap.parquet")
    parquet.write_table(pa.table({"id": [3, 3], "x": [1.0, 2.0]}), tmp_path / "twice.parquet")
    with pytest.raises(DataError, match="has the name '3' twice"):
        read_vectors(tmp_path / "twice.parquet")
    parquet.write_table(pa.table({"id": [3, 1], "x": [1.0, 2.0]}), tmp_path / "good.parquet")
    found = read_vectors(tmp_path / "good.parquet")
    assert found.names.tolist() == [3, 1]
    assert found.array.tolist() == [[1.0], [2.0]]
    np.savez(tmp_path / "two.npz", a=np.ones(2), b=np.ones(2))
    with pytest.raises(DataError, match="holds a, b"):
        read_vectors(tmp_path / "two.npz")


def test_shipped_graphs_are_read_by_name(facts):
    assert facts("info", "karate")["labels"] == 2
    assert facts("info", "lesmis")["nodes"] == load_dataset("lesmis").graph.num_nodes


@pytest.mark.parametrize(
    "command",
    [
        "info e.csv --out ./e.csv",
        "embed e.csv --out e.csv",
        "embed e.csv --out link.csv",
        "ppr e.csv --all --out e.csv",
        "ppr e.csv a --out e.csv",
        "ppr e.csv --seeds s.csv --out s.csv",
        "index e.csv --out e.csv",
        "index e.csv --walks 2 --out e.csv",
        "rank c.csv jazz --out c.csv",
    ],
)
def test_no_command_writes_over_what_it_reads(command, tmp_path, monkeypatch, here):
    monkeypatch.chdir(tmp_path)
    texts = {
        "e.csv": "from,to,weight\na,b,1\nb,c,1\n",
        "s.csv": "node,weight\na,1\n",
        "c.csv": "node,term,item\nu,jazz,i\n",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "link.csv").symlink_to("e.csv")
    code, _, err = here("graph", *command.split())
    assert code == 2
    assert "is read, and would be lost if it were written; name another file" in err
    assert {name: (tmp_path / name).read_text() for name in texts} == texts
