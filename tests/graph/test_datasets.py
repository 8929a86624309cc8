"""Every shipped graph has the size its table says; what is not there, or damaged, is said."""

import gzip
import sys

import numpy as np
import pytest
from scipy.io import savemat
from scipy.sparse import csr_array

from anabranch.errors import BackendError, ConfigError, DataError
from anabranch.graph import datasets
from anabranch.graph.datasets import load_dataset
from real_data import needs_data

# name: nodes, edges, self-loops, directed, labels, labels in all, nodes with a label
FACTS = {
    "blogcatalog": (10312, 333983, 0, False, 39, 14476, 10312),
    "ppi": (3890, 38739, 894, False, 50, 6640, 3890),
    "dblp": (51264, 127968, 0, False, 60, 51264, 51264),
    "dblp_weighted": (27199, 66832, 0, False, 4, None, 27199),
    "cora": (2708, 5429, 0, True, 7, 2708, 2708),
}


@pytest.mark.parametrize("name", FACTS)
@needs_data("graphs")
def test_shipped_graphs(name):
    data = load_dataset(name)
    nodes, edges, loops, directed, labels, pairs, labelled = FACTS[name]
    graph = data.graph
    assert (graph.num_nodes, graph.num_edges, graph.num_self_loops, graph.is_directed) == (
        nodes,
        edges,
        loops,
        directed,
    )
    assert data.labels_NC.shape == (nodes, labels)
    assert data.labels_NC.dtype == bool
    assert pairs is None or data.labels_NC.sum() == pairs
    assert (np.asarray(data.labels_NC.sum(1)) > 0).sum() == labelled
    assert f"{nodes:,}" in (datasets.__doc__ or "")
    assert f"{edges:,}" in (datasets.__doc__ or "")


@pytest.mark.parametrize(("name", "nodes", "edges"), [("karate", 34, 78), ("lesmis", 77, 254)])
def test_graphs_of_networkx(name, nodes, edges):
    networkx = pytest.importorskip("networkx")
    data = load_dataset(name)
    assert (data.graph.num_nodes, data.graph.num_edges, data.graph.is_directed) == (nodes, edges, False)
    theirs = {"karate": networkx.karate_club_graph, "lesmis": networkx.les_miserables_graph}[name]()
    weight = "weight" if name == "lesmis" else None
    assert np.array_equal(data.graph.to_scipy().toarray(), networkx.to_numpy_array(theirs, weight=weight))
    if name == "karate":
        assert data.classes == ("Mr. Hi", "Officer")
        assert [data.classes[label] for label in data.labels_NC.toarray().argmax(1)] == [
            c for _, c in theirs.nodes(data="club")
        ]
    else:
        assert data.graph.names_of([0]).tolist() == [next(iter(theirs.nodes))]
        assert data.labels_NC is None


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "graphs").mkdir()
    monkeypatch.setenv("ANABRANCH_DATA", str(tmp_path))
    return tmp_path / "graphs"


def write_lines(path, text):
    with gzip.open(path, "wt") as file:
        file.write(text)


def test_edge_lists_and_labels_by_hand(folder):
    write_lines(folder / "ppi.edgelist.gz", "0 1\n1 2\n2 2\n")
    write_lines(folder / "ppi.labels.gz", "0 3\n\n1 3\n")
    data = load_dataset("ppi")
    assert data.graph.num_nodes == 4  # node 3 has labels and no edge
    assert data.graph.num_edges == 3
    assert data.labels_NC.toarray().astype(int).tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 0], [1, 0, 1]]


def test_mat_by_hand(folder):
    network = csr_array([[0.0, 1, 0], [1, 0, 0], [0, 0, 0]])
    savemat(folder / "blogcatalog.mat", {"network": network, "group": csr_array([[1.0, 0], [0, 1], [1, 1]])})
    data = load_dataset("blogcatalog")
    assert data.graph.num_nodes == 3
    assert data.labels_NC.toarray().astype(int).tolist() == [[1, 0], [0, 1], [1, 1]]


def test_a_name_that_is_not_known():
    with pytest.raises(ConfigError, match="no graph 'blog'; known: blogcatalog, ppi"):
        load_dataset("blog")


def test_data_that_is_not_there(folder, monkeypatch):
    with pytest.raises(DataError, match=r"there is no .*ppi\.edgelist\.gz"):
        load_dataset("ppi")
    monkeypatch.delenv("ANABRANCH_DATA")
    with pytest.raises(DataError, match="ANABRANCH_DATA"):
        load_dataset("cora")


DAMAGED = {
    "not gzip": ("ppi", {"ppi.edgelist.gz": b"0 1\n", "ppi.labels.gz": b""}),
    "cut gzip": (
        "ppi",
        {"ppi.edgelist.gz": gzip.compress(b"0 1\n" * 50)[:-12], "ppi.labels.gz": gzip.compress(b"0\n")},
    ),
    "a word": ("ppi", {"ppi.edgelist.gz": gzip.compress(b"0 1\n1 x\n"), "ppi.labels.gz": gzip.compress(b"0\n")}),
    "one column": ("ppi", {"ppi.edgelist.gz": gzip.compress(b"0\n1\n"), "ppi.labels.gz": gzip.compress(b"0\n")}),
    "no edge": ("ppi", {"ppi.edgelist.gz": gzip.compress(b""), "ppi.labels.gz": gzip.compress(b"0\n")}),
    "a negative node": ("ppi", {"ppi.edgelist.gz": gzip.compress(b"0 -1\n"), "ppi.labels.gz": gzip.compress(b"0\n")}),
    "a negative label": ("ppi", {"ppi.edgelist.gz": gzip.compress(b"0 1\n"), "ppi.labels.gz": gzip.compress(b"-1\n")}),
    "labels of words": ("ppi", {"ppi.edgelist.gz": gzip.compress(b"0 1\n"), "ppi.labels.gz": gzip.compress(b"a\n")}),
    "not mat": ("blogcatalog", {"blogcatalog.mat": b"nothing of the kind" * 20}),
    "an empty mat": ("blogcatalog", {"blogcatalog.mat": b""}),
    "not npz": ("cora", {"cora.npz": b"PK nothing"}),
    "an empty npz": ("dblp_weighted", {"dblp_weighted.npz": b""}),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_named(folder, case):
    name, files = DAMAGED[case]
    for file, content in files.items():
        (folder / file).write_bytes(content)
    with pytest.raises(DataError, match=next(iter(files)).split(".")[0]):
        load_dataset(name)


def test_an_npz_without_its_arrays(folder):
    np.savez(folder / "cora.npz", other=np.arange(3))
    with pytest.raises(DataError, match=r"cora.npz.*adj_shape"):
        load_dataset("cora")


def test_without_networkx(monkeypatch):
    monkeypatch.setitem(sys.modules, "networkx", None)
    with pytest.raises(BackendError, match=r"the graph 'karate' needs networkx; pip install 'anabranch\[graph\]'"):
        load_dataset("karate")
