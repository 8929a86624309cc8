"""Fitted embeddings on the command line: ``tune``, ``embed --save``, ``transform``, ``resume``, ``predict``; and knobs by ``--set``."""

import json

import numpy as np
import pytest
from pyarrow import parquet

from anabranch.cli.graph.vectors import read_vectors
from anabranch.graph import FastRP, FullyPPR, GraphVite, PageRank, PowerWalk, TypedGraph, load_dataset, read_graph
from anabranch.graph.evaluate import hold_out_edges
from anabranch.graph.fully_ppr import FullyPPRResult

NAMES = ["ann", "bob", "cat", "dan", "eve", "fay"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    ends = [(0, 1, 2), (1, 2, 1), (2, 0, 1), (2, 3, 3), (3, 4, 1), (4, 5, 1)]
    (folder / "edges.csv").write_text(
        "source,target,weight\n" + "".join(f"{NAMES[u]},{NAMES[v]},{w}\n" for u, v, w in ends)
    )
    (folder / "new.csv").write_text("source,target,weight\nzoe,ann,1\nzoe,yan,2\nyan,bob,1\n")
    (folder / "features.csv").write_text("node,x0,x1\nyan,0.5,1.5\nzoe,1.0,2.0\nold,0,0\n")
    (folder / "pairs.csv").write_text("source,target\nann,bob\nann,fay\nfay,eve\n")
    (folder / "numbers.csv").write_text("source,target\n0,1\n1,2\n2,0\n2,3\n")
    graph = read_graph(folder / "edges.csv")
    features = np.arange(12.0).reshape(6, 2)
    FastRP(8, keep_powers=True, features=features, feature_ratio=0.5, self_weight=1.0).fit(graph).save(folder / "f.anb")
    graph.save(folder / "graph.anb")
    return folder


@pytest.fixture
def facts(here, place, monkeypatch):
    monkeypatch.chdir(place)

    def command(*arguments):
        code, out, err = here("graph", *arguments, "--json")
        assert code == 0, err
        return json.loads(out)

    return command


@pytest.fixture
def said(here, place, monkeypatch):
    monkeypatch.chdir(place)

    def command(*arguments):
        code, out, err = here("graph", *arguments)
        assert code == 0, err
        return out

    return command


def test_fastrp_from_a_graph_to_vectors_of_new_nodes(facts, said, place):
    facts("embed", "edges.csv", "--dim", 8, "--out", "v.npy", "--save", "m.anb")
    model = FastRP.load(place / "m.anb")
    found = facts("transform", "m.anb", "--edges", "new.csv", "--out", "new.parquet")
    assert (found["method"], found["nodes"], found["new"]) == ("fastrp", 2, True)
    rows, names = model.edges_of_new(["zoe", "zoe", "yan"], ["ann", "yan", "bob"], [1, 2, 1])
    held = read_vectors(place / "new.parquet")
    assert held.names.tolist() == names == ["zoe", "yan"]
    np.testing.assert_array_equal(held.array, model.transform(rows, names=names))
    # Of nodes that were fitted.
    facts("transform", "m.anb", "eve", "bob", "--out", "two.csv")
    held = read_vectors(place / "two.csv")
    assert held.names.tolist() == ["eve", "bob"]
    np.testing.assert_allclose(held.array, model.vectors(["eve", "bob"]), rtol=1e-6)
    said("transform", "m.anb", "--out", "all.npy")
    np.testing.assert_array_equal(np.load(place / "all.npy"), np.load(place / "v.npy"))


def test_features_of_new_nodes(facts, place):
    facts("transform", "f.anb", "--edges", "new.csv", "--features", "features.csv", "--out", "f.npz")
    model = FastRP.load(place / "f.anb")
    rows, names = model.edges_of_new(["zoe", "zoe", "yan"], ["ann", "yan", "bob"], [1, 2, 1])
    expected = model.transform(rows, features=[[1.0, 2.0], [0.5, 1.5]], names=names)
    np.testing.assert_allclose(read_vectors(place / "f.npz").array, expected, rtol=1e-6)


def test_edges_are_scored(facts, said, place):
    facts("embed", "edges.csv", "--dim", 8, "--out", "v.npy", "--save", "m.anb")
    found = facts("predict", "m.anb", "pairs.csv", "--top", 2, "--out", "scores.parquet")
    vectors = np.load(place / "v.npy").astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    expected = [vectors[0] @ vectors[1], vectors[0] @ vectors[5], vectors[5] @ vectors[4]]
    table = parquet.read_table(place / "scores.parquet").to_pydict()
    assert (table["source"], table["target"]) == (["ann", "ann", "fay"], ["bob", "fay", "eve"])
    assert table["score"] == pytest.approx(expected)
    assert [one["score"] for one in found["ranking"]] == pytest.approx(sorted(expected, reverse=True)[:2])
    assert "rank" in said("predict", "m.anb", "pairs.csv")


def test_graphvite_goes_on(facts, said, place):
    options = ("--method", "graphvite", "--dim", 4, "--epochs", 20, "--set", "partitions=2")
    facts("embed", "edges.csv", *options, "--out", "g.npy", "--save", "g.anb")
    found = facts("resume", "g.anb", "edges.csv", "--epochs", 10, "--save", "more.anb", "--out", "more.npy")
    assert found["wrote"] == ["more.anb", "more.npy"]
    graph = read_graph(place / "edges.csv")
    expected = GraphVite(4, epochs=20, partitions=2).fit(graph).resume(graph, 10)
    np.testing.assert_array_equal(np.load(place / "more.npy"), expected.transform())
    np.testing.assert_array_equal(GraphVite.load(place / "more.anb").context_ND, expected.context_ND)
    facts("transform", "more.anb", "fay", "--out", "fay.csv")
    np.testing.assert_allclose(read_vectors(place / "fay.csv").array, expected.transform(["fay"]), rtol=1e-6)
    scores = facts("predict", "more.anb", "pairs.csv")["ranking"]
    pairs = [("ann", "bob"), ("ann", "fay"), ("fay", "eve")]
    wanted = dict(zip(pairs, expected.predict(pairs).tolist(), strict=True))
    assert {(one["source"], one["target"]): one["score"] for one in scores} == pytest.approx(wanted)
    assert "trained" in said("resume", "g.anb", "edges.csv", "--epochs", 5, "--save", "more.anb")


def test_tune_finds_what_the_library_finds(facts, said, place):
    found = facts("tune", "karate", "--trials", 3, "--dim", 16, "--hide", 0.2, "--out", "trials.csv")
    graph = load_dataset("karate").graph
    expected = FastRP().tune(None, edges=hold_out_edges(graph, 0.2, 0), trials=3, dim=16)
    assert (found["objective"], found["beta"], found["score"]) == (
        "auc",
        expected.best.beta,
        max(t.score for t in expected.trials),
    )
    assert found["weights"] == list(expected.best.weights)
    assert [one["score"] for one in found["trials"]] == [trial.score for trial in expected.trials]
    assert (place / "trials.csv").read_text().count("\n") == 4
    assert found["next"].startswith("anabranch graph embed karate --set beta=")
    printed = said("tune", "karate", "--labels", "own", "--train", "0.5", "--trials", 1, "--dim", 8)
    assert "macro_f1" in printed
    assert "--set weights=[0," in printed


def test_knobs_of_walks(facts, place):
    graph = read_graph(place / "edges.csv")
    facts("index", "edges.csv", "--walks", 30, "--set", "mode=endpoint", "--set", "keep=3", "--out", "w.anb")
    loaded = PowerWalk.load(place / "w.anb", graph)
    assert (loaded.mode, loaded.keep, loaded.walks) == ("endpoint", 3, 30)
    found = facts(
        "ppr", "edges.csv", "ann", "--index", "w.anb", "--set", "rounds=4", "--set", "eps=0", "--set", "bound=true"
    )
    nodes, scores = loaded.query("ann", 10, 4, 0)
    assert [one["node"] for one in found["ranking"]] == nodes.tolist()
    assert [one["score"] for one in found["ranking"]] == pytest.approx(scores.tolist())
    assert found["bound"] == loaded.inspect("ann", 4, 0)["bound"]
    assert "bound" not in facts("ppr", "edges.csv", "ann", "--index", "w.anb", "--set", "bound=false")


def test_a_word_that_is_no_truth_value_asks_for_no_bound(facts, place, here):
    """It counted as true: "no" told the bound."""
    facts("index", "edges.csv", "--walks", 5, "--out", "w.anb")
    code, _, told = here("graph", "ppr", "edges.csv", "ann", "--index", "w.anb", "--set", "bound=no")
    assert code == 2
    assert "bound is 'no'; it must be True or False" in told


def test_knobs_of_all(facts, place):
    options = {"eps": 0.5, "delta": 0.1, "p_f": 0.1}
    facts(
        "ppr", "edges.csv", "--all", "--out", "all.anb", *(w for k, v in options.items() for w in ("--set", f"{k}={v}"))
    )
    expected = FullyPPR(**options, top_k=10, engine="local").fit(read_graph(place / "edges.csv")).result_
    found = FullyPPRResult.load(place / "all.anb")
    assert found.facts["walks"] == expected.facts["walks"]
    assert found.top_named("ann") == expected.top_named("ann")
    facts("ppr", "edges.csv", "--all", "--walks", 50, "--set", "estimator=fullpath", "--out", "visits.anb")
    assert FullyPPRResult.load(place / "visits.anb").facts["estimator"] == "fullpath"


def test_edges_of_several_kinds(facts, place):
    (place / "typed.csv").write_text("kind,source,target\ncites,p,q\ncites,q,r\nwrote,ann,p\nwrote,bob,r\n")
    edges = {"cites": (["p", "q"], ["q", "r"]), "wrote": (["ann", "bob"], ["p", "r"])}
    typed = TypedGraph.from_edges(edges, weights={"cites": 3})
    options = ("typed.csv", "--relation", "kind", "--weight-of", "cites=3")
    found = facts("ppr", *options, "ann")
    nodes, scores = PageRank().personalized(typed, "ann", 10)
    assert [one["node"] for one in found["ranking"]] == nodes.tolist()
    assert [one["score"] for one in found["ranking"]] == pytest.approx(scores.tolist())
    drawn = facts("ppr", *options, "ann", "--share", "relations")["ranking"]
    by_kind = TypedGraph.from_edges(edges, weights={"cites": 3}, share="relations")
    assert drawn[0]["score"] == pytest.approx(PageRank().personalized(by_kind, "ann")[1][0])
    facts("embed", *options, "--dim", 4, "--out", "t.npz")
    np.testing.assert_array_equal(read_vectors(place / "t.npz").array, FastRP(4).fit_transform(typed))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("transform none.anb --out v.npy", "there is no file none.anb"),
        ("transform edges.csv --out v.npy", "edges.csv is no file of ours"),
        ("transform graph.anb --out v.npy", "graph.anb holds a graph"),
        ("transform f.anb --out v.txt", "must end in .npy"),
        ("transform f.anb nobody --out v.npy", "no node 'nobody'"),
        ("transform f.anb ann --edges new.csv --out v.npy", "not both"),
        ("transform f.anb --features features.csv --out v.npy", "give their --edges"),
        ("transform f.anb --edges pairs.csv --out v.npy", "node 'ann' was fitted"),
        ("transform f.anb --edges new.csv --out v.npy", "give those of the new nodes, 2 each"),
        ("transform f.anb --edges new.csv --features pairs.csv --out v.npy", "vectors are numbers"),
        ("resume f.anb edges.csv --save m.anb", "a FastRP, which is not trained"),
        ("resume f.anb edges.csv --save m.txt", "must end in .anb"),
        ("predict f.anb new.csv", "no node 'zoe'"),
        ("predict f.anb edges.csv --out s.txt", "must end in"),
        ("embed edges.csv --out v.npy --save m.npz", "must end in .anb"),
        (
            "embed edges.csv --method graphvite --set normalize=no --out v.npy",
            "normalize is 'no'; it must be True or False",
        ),
        (
            "embed edges.csv --method graphvite --set epochs=1e19 --out v.npy",
            "epochs is 1e+19; it must be a finite number",
        ),
        ("tune edges.csv --labels own", "no labels of its own"),
        ("tune edges.csv --objective micro_f1", "are for --labels"),
        ("tune edges.csv --set bet=1", "did you mean beta"),
        ("tune edges.csv --hide 2", "fraction is 2.0"),
        ("index edges.csv --walks 5 --set kep=1 --out w.anb", "did you mean keep"),
        ("index edges.csv --walks 5 --set walks=1 --out w.anb", "has an option of its own"),
        ("index v.npy --set keep=1 --out w.anb", "--set is for --walks"),
        ("ppr edges.csv ann --weight-of a=1", "go with --relation"),
        ("ppr edges.csv ann --relation kind", "no column 'kind'; there are source, target, weight"),
        ("ppr edges.csv ann --relation weight --weight-of x=1", "no relation 'x'"),
        ("ppr edges.csv ann --relation weight --weight-of 1=much", "write KIND=WEIGHT"),
        ("embed edges.csv --relation weight --share kinds --out v.npy", "share is 'kinds'"),
        ("ppr edges.csv ann --set rounds=3", "--set is for --all and --index"),
        ("ppr edges.csv --all --out a.anb --set top_k=3", "use --top"),
        ("ppr edges.csv --all --out a.anb --set progress=1", "cannot set progress from a command line"),
        ("ppr edges.csv --all --out a.anb --set eps=0.5", "eps is given without delta"),
        ("ppr edges.csv --all --out a.anb --set gama=5", "did you mean gamma"),
    ],
)
def test_mistakes(here, place, monkeypatch, arguments, message):
    monkeypatch.chdir(place)
    code, out, err = here("graph", *arguments.split())
    assert (code, out, len(err.strip().splitlines())) == (2, "", 1), err
    assert message in err
