"""Graphs go out and come back through every format and library; files of other hands are read as they are meant; limits change no byte."""

import bz2
import gzip
import lzma
import types
import warnings
from pathlib import Path

import networkx
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.io import mmwrite, savemat
from scipy.sparse import coo_array, csc_array, csr_array, save_npz

from anabranch.errors import CapacityError, DataError, InputError
from anabranch.graph import Graph
from anabranch.graph.formats import (
    build,
    from_igraph,
    from_networkx,
    from_pyg,
    from_table,
    from_torch,
    lines,
    read_graph,
    to_igraph,
    to_networkx,
    to_table,
    write_graph,
)
from anabranch.graph.generate import power_law
from graphs import edge_lists, graphs

LIMIT = 1 << 20


def text_file(tmp_path, text, name="g.txt"):
    path = tmp_path / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def rows(graph):
    """Edges by name, as a set."""
    source, target, weight = graph.edges()
    ends = zip(graph.names_of(source).tolist(), graph.names_of(target).tolist(), strict=True)
    return {(*pair, None if weight is None else float(weight[place])) for place, pair in enumerate(ends)}


# Edge lists and CSV


def test_the_plainest_file(tmp_path):
    graph = read_graph(text_file(tmp_path, "0 1\n1 2\n"))
    assert graph.equals(Graph.from_edges([0, 1], [1, 2]))


@pytest.mark.parametrize(
    "text",
    [
        "0 1 0.5\n1 2 2\n",
        "0\t1\t0.5\n1\t2\t2\n",
        "0,1,0.5\n1,2,2\n",
        "0,1,0.5\r\r\n1,2,2\r\r\n\r\n",
        "0, 1, 0.5\r\n1 , 2,2\r\n",
        "0;1;0.5\n1;2;2",
        "0|1|.5\n1|2|2.\n",
        "  0   1\t5e-1  \n\n\t\n1 2 +2.0e0",
        "# a comment\n% another\n0 1 0.5\n# between\n1 2 2\n#",
        "\ufeff0 1 0.5\n1 2 2\n",
        "source,target,weight\n0,1,0.5\n1,2,2\n",
        "weight,SRC,Dst\n0.5,0,1\n2,1,2\n",
        "person friend strength\n0 1 0.5\n1 2 2\n",
        '"from","to","weight"\n"0","1","0.5"\n1,2,2\n',
    ],
)
def test_ways_of_writing_a_list_of_edges(tmp_path, text):
    graph = read_graph(text_file(tmp_path, text), ids="numbers")
    assert graph.equals(Graph.from_edges([0, 1], [1, 2], [0.5, 2]))


@pytest.mark.parametrize("opener", [gzip.open, bz2.open, lzma.open])
def test_compressed_files_are_told_by_their_bytes(tmp_path, opener):
    with opener(tmp_path / "any.name", "wb") as file:
        file.write(b"0 1\n1 2\n")
    assert read_graph(tmp_path / "any.name").equals(Graph.from_edges([0, 1], [1, 2]))


def test_numbers_that_are_not_dense_become_names_in_rising_order(tmp_path):
    graph = read_graph(text_file(tmp_path, "30 10\n10 20\n30 -5\n"))
    assert graph.names.tolist() == [-5, 10, 20, 30]
    assert graph.names.dtype == np.int64
    assert rows(graph) == {(10, 30, None), (10, 20, None), (-5, 30, None)}
    # One missing number is enough; with "numbers" or num_nodes it is an isolated node.
    gap = text_file(tmp_path, "0 1\n1 3\n")
    assert read_graph(gap).names.tolist() == [0, 1, 3]
    assert read_graph(gap, ids="numbers").equals(Graph.from_edges([0, 1], [1, 3]))
    assert read_graph(gap, num_nodes=6).equals(Graph.from_edges([0, 1], [1, 3], num_nodes=6))
    assert read_graph(text_file(tmp_path, "0 1\n"), ids="names").names.tolist() == [0, 1]
    far = read_graph(text_file(tmp_path, f"0 {2**62}\n{2**62} -{2**62}\n"))
    assert far.names.tolist() == [-(2**62), 0, 2**62]


def test_text_becomes_names_in_rising_order(tmp_path):
    graph = read_graph(text_file(tmp_path, "eve ann\nann bob\n1 eve\n"))
    assert graph.names.tolist() == ["1", "ann", "bob", "eve"]
    assert rows(graph) == {("ann", "eve", None), ("ann", "bob", None), ("1", "eve", None)}
    assert read_graph(text_file(tmp_path, "01 1\n"), ids="text").names.tolist() == ["01", "1"]
    assert read_graph(text_file(tmp_path, '"01" "1"\n')).names.tolist() == ["01", "1"]  # in quotes: text
    quoted = read_graph(text_file(tmp_path, 'a,b\n"a, ""b""",b\n"",é\n', "g.csv"), header=False)
    assert quoted.names.tolist() == ["", "a", 'a, "b"', "b", "é"]


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("a,b,time\n0,1,7\n", {}, None),  # with a header, a weight must be called so
        ("a,b,time\n0,1,7\n", {"weight": "time"}, 7),
        ("a,b,time\n0,1,7\n", {"weight": 2}, 7),
        ("0,1,7\n", {"weight": None}, None),
        ("0,1,7\n", {}, 7),
        ("0,1,x,7\n", {"weight": 3}, 7),
        ("x,0,1\n", {"source": 1, "target": 2, "weight": None}, None),
        ("x,y,0,1,7\n9,9,0,1,7\n", {"source": "0", "target": "1", "weight": None, "header": True, "ids": "text"}, None),
        ("t,source,w,target\n5,0,7,1\n", {}, 7),
        ("5,7\n0,1\n", {"header": True}, None),
        ("id,source,target\n5,0,1\n", {}, None),
    ],
)
def test_columns(tmp_path, text, options, expected):
    graph = read_graph(text_file(tmp_path, text), **options)
    assert graph.num_edges == 1
    assert (None if graph.weights is None else graph.weights[0]) == expected


def test_a_header_is_found_or_said(tmp_path):
    assert read_graph(text_file(tmp_path, "a b\nc d\n")).num_edges == 2  # text over text is data
    assert read_graph(text_file(tmp_path, "a b\nc d\n"), header=True).names.tolist() == ["c", "d"]
    assert read_graph(text_file(tmp_path, "a b\n1 2\n")).names.tolist() == [1, 2]  # text over numbers is a header
    assert read_graph(text_file(tmp_path, "a b weight\nc d 3\n")).weights.tolist() == [3, 3]
    assert read_graph(text_file(tmp_path, "source target\nc d\n")).names.tolist() == ["c", "d"]


def test_directions_and_duplicates(tmp_path):
    path = text_file(tmp_path, "0 1 2\n1 0 5\n0 1 1\n1 1 4\n")
    assert read_graph(path).weights.tolist() == [8, 8, 4]
    assert read_graph(path, duplicates="max").weights.tolist() == [5, 5, 4]
    assert read_graph(path, duplicates="first", directed=True).weights.tolist() == [2, 5, 4]
    assert read_graph(text_file(tmp_path, "0 1 0\n1 2 1\n"), drop_zero=True, ids="numbers").num_edges == 1
    assert read_graph(text_file(tmp_path, "a b 0\nc d 1\n"), drop_zero=True).names.tolist() == ["c", "d"]
    assert read_graph(text_file(tmp_path, "0 1 -2\n"), allow_negative=True).weights.tolist() == [-2, -2]


@given(
    st.lists(
        st.one_of(
            st.floats(2.0**-126, 3e38).map(repr),
            st.integers(1, 10**30).map(str),
            st.from_regex(r"[0-9]{1,20}(\.[0-9]{1,20})?([eE][+-]?[0-9]{1,2})?", fullmatch=True),
        ).filter(lambda text: 1e-37 < float(text) < 3e38),
        min_size=1,
        max_size=20,
    )
)
def test_numbers_are_read_as_python_reads_them(texts):
    block = np.frombuffer("\n".join(texts).encode(), np.uint8)
    fields, problem = lines.Splitter(None, lines.WHITESPACE, "#", (0,)).split(block, 1)
    assert problem is None
    assert lines.numbers(fields, 0, "weight").tolist() == [float(text) for text in texts]


@given(st.lists(st.integers(-(2**63), 2**63 - 1).map(lambda n: f"{n:+d}" if n % 3 else str(n)), min_size=1))
def test_whole_numbers_are_read_as_python_reads_them(texts):
    block = np.frombuffer("\n".join(texts).encode(), np.uint8)
    fields, _ = lines.Splitter(None, lines.WHITESPACE, "#", (0,)).split(block, 1)
    assert lines.integers(fields, 0, "id").tolist() == [int(text) for text in texts]


FIELD = st.text(st.characters(codec="utf-8", exclude_characters="\0\n\r"), max_size=5)


@given(st.lists(st.tuples(FIELD, FIELD), min_size=1))
def test_fields_are_split_as_the_csv_module_does(table):
    text = "\n".join(",".join('"' + field.replace('"', '""') + '"' for field in row) for row in table)
    fields, problem = lines.Splitter(None, ord(","), "", (0, 1)).split(np.frombuffer(text.encode(), np.uint8), 1)
    assert problem is None
    assert [[fields.value(0, row), fields.value(1, row)] for row in range(len(table))] == list(map(list, table))


# There and back


TEXTS = ("anb", "edges", "edges.gz", "csv", "csv.gz", "parquet")


@given(graphs(), st.sampled_from(TEXTS), st.sampled_from([None, LIMIT]))
@settings(max_examples=60)
def test_what_is_written_comes_back(tmp_path_factory, graph, ending, limit):
    path = tmp_path_factory.mktemp("g") / f"g.{ending}"
    if ending != "anb" and graph.names is not None:
        graph = graph.subgraph(
            np.flatnonzero(graph.reversed.degree_N + graph.degree_N)
        )  # nodes without edges cannot be told
        assume(graph.num_nodes)
    if not graph.num_edges and ending != "anb":
        write_graph(graph, path)
        if ending.startswith(("csv", "edges")):
            with pytest.raises(DataError, match="holds no edges"):
                read_graph(path)
        else:
            assert read_graph(path).difference(graph) is None
        return
    write_graph(graph, path)
    options = {"directed": graph.is_directed} if ending.startswith("csv") else {}
    if graph.names is None and ending.startswith("csv"):
        options["num_nodes"] = graph.num_nodes
    if graph.names is not None and graph.names.dtype.kind != "O":
        options["ids"] = "names"
    if ending != "anb":
        options["memory_limit"] = limit
    found = read_graph(path, **options)
    if graph.names is not None and ending != "anb":
        order = np.argsort([str(name) for name in graph.names] if graph.names.dtype.kind == "O" else graph.names)
        graph = graph.subgraph(order)  # names come back in rising order
    assert found.difference(graph) is None


@given(
    graphs(named=False),
    st.sampled_from(["mtx", "mtx.gz", "metis", "metis.gz", "npz", "mat"]),
    st.sampled_from([None, LIMIT]),
)
@settings(max_examples=60)
def test_what_is_written_as_a_matrix_comes_back(tmp_path_factory, graph, ending, limit):
    graph = Graph(graph.indptr, graph.indices, graph.weights, graph.is_directed)
    if ending.startswith("metis"):
        source, target, weight = graph.edges()
        kept = source != target
        graph = Graph.from_edges(
            source[kept], target[kept], None if weight is None else np.ceil(weight[kept]), False, graph.num_nodes
        )
    path = tmp_path_factory.mktemp("g") / f"g.{ending}"
    write_graph(graph, path)
    options = {} if ending in ("npz", "mat") else {"memory_limit": limit}
    found = read_graph(path, directed=graph.is_directed, **options)
    if graph.weights is not None and (graph.weights == 1).all() and not ending.startswith("metis"):
        graph = graph.with_weights(None)  # a matrix of ones is a graph without weights
    assert found.difference(graph) is None


def test_awkward_names_come_back(tmp_path):
    names = sorted(["a b", "#x", '"', "1", "-2", "a,b", "a\tb", " c", "", "é"])
    graph = Graph.from_edges(np.arange(9), np.arange(1, 10), names=names)
    for ending in ("edges", "csv", "parquet", "anb"):
        write_graph(graph, tmp_path / f"g.{ending}")
        assert read_graph(tmp_path / f"g.{ending}").difference(graph) is None
    plain = Graph.from_edges([0], [1], names=["x", "y"])
    write_graph(plain, tmp_path / "g.edges")
    assert (tmp_path / "g.edges").read_text() == "# anabranch graph: 2 nodes by name, undirected\nx\ty\n"


def test_other_readers_read_what_is_written(tmp_path):
    graph = Graph.from_edges([0, 1, 1], [1, 2, 1], [0.5, 2, 3])
    write_graph(graph, tmp_path / "g.edges")
    other = networkx.read_weighted_edgelist(tmp_path / "g.edges", nodetype=int)
    assert from_networkx(other).equals(graph)
    write_graph(graph, tmp_path / "g.csv")
    assert (tmp_path / "g.csv").read_text() == "source,target,weight\n0,1,0.5\n1,1,3\n1,2,2\n"
    write_graph(graph, tmp_path / "g.mtx")
    from scipy.io import loadmat, mmread
    from scipy.sparse import load_npz

    expected = graph.to_scipy().toarray()
    assert np.array_equal(mmread(tmp_path / "g.mtx").toarray(), expected)
    write_graph(graph, tmp_path / "g.npz")
    assert np.array_equal(load_npz(tmp_path / "g.npz").toarray(), expected)
    write_graph(graph, tmp_path / "g.mat")
    assert np.array_equal(loadmat(tmp_path / "g.mat")["network"].toarray(), expected)
    write_graph(Graph.from_edges([0, 1], [1, 2], [5, 7], num_nodes=4), tmp_path / "g.metis")
    assert (tmp_path / "g.metis").read_text() == "4 2 001\n2 5\n1 5 3 7\n2 7\n\n"


def test_weights_come_back_to_the_bit(tmp_path):
    weight = np.random.default_rng(0).random(2000).astype(np.float32) * np.float32(10.0) ** np.arange(-20, 20).repeat(
        50
    )
    graph = Graph.from_edges(np.arange(2000), np.arange(1, 2001), weight)
    for ending in ("edges", "csv", "mtx", "parquet", "anb"):
        write_graph(graph, tmp_path / f"g.{ending}")
        assert read_graph(tmp_path / f"g.{ending}").difference(graph) is None


def test_graphs_are_written_in_parts_of_whole_rows(tmp_path, monkeypatch):
    from anabranch.graph.formats import write

    graph = Graph.from_edges(np.arange(50), np.arange(1, 51) % 50, directed=True)
    monkeypatch.setattr(write, "PART", 7)
    for ending in ("edges", "parquet", "mtx"):
        write_graph(graph, tmp_path / f"g.{ending}")
        assert read_graph(tmp_path / f"g.{ending}", directed=True).difference(graph) is None


# Bounded memory


@pytest.mark.parametrize("kind", ["numbers", "names", "text"])
@pytest.mark.parametrize("directed", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_limit_changes_no_byte(tmp_path, kind, directed, weighted):
    generator = np.random.default_rng(0)
    source, target = generator.zipf(1.3, 60_000) % 5000, generator.integers(0, 5000, 60_000)
    weight = generator.random(60_000).astype(np.float32) if weighted else None  # sums depend on their order
    ends = (source * 7 + 1, target * 7 + 1) if kind == "names" else (source, target)
    shown = [[f"n{u}" for u in end] if kind == "text" else end.tolist() for end in ends]
    table = {"source": shown[0], "target": shown[1]} | ({"weight": weight} if weighted else {})
    pq.write_table(pa.table(table), tmp_path / "g.parquet", row_group_size=10_000)
    columns = [*shown, *([weight.tolist()] if weighted else [])]
    text = "\n".join("\t".join(map(str, row)) for row in zip(*columns, strict=True))
    (tmp_path / "g.edges").write_text(text)
    for ending in ("edges", "parquet"):
        expected = read_graph(tmp_path / f"g.{ending}", directed=directed)
        for limit in (LIMIT, 1 << 22):
            found = read_graph(tmp_path / f"g.{ending}", directed=directed, memory_limit=limit, spill_folder=tmp_path)
            assert found.difference(expected) is None
        if kind == "numbers" and len(np.unique(np.append(source, target))) == 5000:
            made = Graph.from_edges(source, target, weight, directed)
            assert made.difference(expected) is None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["g.edges", "g.parquet"]  # nothing is left behind


@given(edge_lists(max_nodes=30, max_edges=80), st.booleans(), st.integers(1, 40))
def test_segments_of_any_size_give_the_same_graph(edges, directed, capacity):
    source, target, weight, num_nodes = edges
    expected = Graph.from_edges(source, target, weight, directed, num_nodes)
    chunks = [
        (
            np.array(source[k::3], np.int64),
            np.array(target[k::3], np.int64),
            None if weight is None else np.array(weight[k::3], np.float32),
        )
        for k in range(3)
    ]
    each = 12 + (24 if weight is not None else 0)
    limit = 8 * (num_nodes + 1) + 3 * each * capacity
    options = {"directed": directed, "is_weighted": weight is not None, "duplicates": "add", "drop_zero": False}
    ends = zip(source, target, strict=True)
    touched = [{u} if directed else {u, v} for u, v in ends]
    longest = max(sum(node in nodes for nodes in touched) for node in range(num_nodes))
    if longest > 2 * capacity:
        with pytest.raises(CapacityError, match=f"the longest of {longest} edges"):
            build.compress_in_segments(lambda: chunks, num_nodes, limit=limit, folder=None, rows=10, **options)
        return
    found = build.compress_in_segments(lambda: chunks, num_nodes, limit=limit, folder=None, rows=10, **options)
    assert Graph(*found, directed).difference(expected) is None


def test_segments_by_hand():
    # Rows of 2, 0, 3, 1, 9, 1 edges in segments of up to 5: the fifth row is larger and stands alone.
    indptr = np.array([0, 2, 2, 5, 6, 15, 16])
    assert build.segment_bounds(indptr, 5).tolist() == [0, 3, 4, 5, 6]
    assert build.segment_bounds(indptr, 100).tolist() == [0, 6]
    assert build.segment_bounds(np.array([0]), 5).tolist() == [0]


def test_a_large_graph_is_mapped_from_a_file_that_has_no_name(tmp_path):
    source = np.arange(200_000)
    graph = Graph.from_edges(source, (source * 7 + 1) % 200_000, directed=True)
    write_graph(graph, tmp_path / "g.parquet")
    limit = 3 << 20  # 1.6 MB of rows, 0.8 MB of edges
    found = read_graph(tmp_path / "g.parquet", memory_limit=limit, spill_folder=tmp_path)
    assert found.difference(graph) is None
    in_rows = read_graph(tmp_path / "g.parquet", memory_limit=64 << 20)
    assert in_rows.difference(graph) is None
    assert [path.name for path in tmp_path.iterdir()] == ["g.parquet"]


def test_limits_that_do_not_suffice(tmp_path):
    path = text_file(tmp_path, "\n".join(f"{n} {n + 1}" for n in range(200_000)))
    with pytest.raises(
        CapacityError, match=r"memory_limit is 1,048,576 bytes; 200,001 rows, the longest of 2 edges, need at least"
    ):
        read_graph(path, memory_limit=LIMIT)
    star = text_file(tmp_path, "\n".join(f"0 {n}" for n in range(1, 50_000)))
    with pytest.raises(CapacityError, match="the longest of 49,999 edges"):
        read_graph(star, memory_limit=LIMIT)
    for limit, words in (
        (1000, "memory_limit is 1000; it must be a whole number from 1,048,576"),
        (1.5, "must be a whole number"),
    ):
        with pytest.raises(InputError, match=words):
            read_graph(path, memory_limit=limit)
    with pytest.raises(InputError, match=r"spill_folder is .*none', which is no folder"):
        read_graph(path, memory_limit=LIMIT, spill_folder=tmp_path / "none")


def test_blocks_of_any_size_give_the_same_rows_and_lines(tmp_path):
    path = text_file(tmp_path, "# c\n" + "\n".join(f"{n} {n + 1}" for n in range(50)) + "\n\nx y")
    for size in (1, 7, 64, 1 << 20):
        found = [(bytes(text), line) for text, line in lines.blocks(path, size)]
        assert b"".join(text for text, _ in found) == path.read_bytes()
        assert all(
            line == 1 + b"".join(text for text, _ in found[:place]).count(b"\n")
            for place, (_, line) in enumerate(found)
        )


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="asks Linux for the highest resident size")
def test_twenty_million_edges_in_sixty_four_megabytes(tmp_path):
    graph = power_law(2_000_000, 20_000_000)
    write_graph(graph, tmp_path / "g.txt")
    graph.save(tmp_path / "g.anb")
    del graph
    read_graph(text_file(tmp_path, "0 1\n", "small.txt"), memory_limit=LIMIT)  # kernels are loaded before
    limit = 64 << 20
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    found = read_graph(tmp_path / "g.txt", memory_limit=limit, spill_folder=tmp_path)
    assert resident("VmHWM") - before <= limit
    assert found.difference(Graph.load(tmp_path / "g.anb", mmap=True)) is None


def resident(field):
    """Bytes of this process that are in memory, now or at most so far."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith(field))


# Files of other hands


def test_matrix_market_by_hand(tmp_path):
    head = "%%MatrixMarket matrix coordinate"
    lower = read_graph(text_file(tmp_path, f"{head} real symmetric\n% c\n3 3 3\n2 1 0.5\n3 2 2\n3 3 4\n"))
    assert lower.equals(Graph.from_edges([0, 1, 2], [1, 2, 2], [0.5, 2, 4]))
    again = read_graph(text_file(tmp_path, f"{head} real symmetric\n3 3 1\n2 1 0.5\n"), directed=True)
    assert again.equals(Graph.from_edges([0, 1], [1, 0], [0.5, 0.5], True, 3))
    pattern = read_graph(text_file(tmp_path, f"{head.upper()} PATTERN GENERAL\n\n3 3 2\n1 2\n2 3"))
    assert pattern.equals(Graph.from_edges([0, 1], [1, 2], None, True))
    both = read_graph(text_file(tmp_path, f"{head} integer general\n3 3 2\n1 2 7\n2 1 7\n"))
    assert both.equals(Graph.from_edges([0], [1], [7.0], False, 3))
    none = read_graph(text_file(tmp_path, f"{head} real general\n4 4 0\n"), directed=True)
    assert none.equals(Graph.from_edges([], [], None, True, 4).with_weights(None))
    unweighted = read_graph(text_file(tmp_path, f"{head} real general\n2 2 1\n1 2 7\n"), weight=None)
    assert unweighted.equals(Graph.from_edges([0], [1], None, True))


def test_matrix_market_of_scipy(tmp_path):
    matrix = coo_array(([1.5, 2, 3], ([0, 1, 3], [1, 2, 3])), shape=(4, 4))
    mmwrite(tmp_path / "g.mtx", matrix)
    assert read_graph(tmp_path / "g.mtx").equals(Graph.from_scipy(matrix))


def test_metis_by_hand(tmp_path):
    # The manual's first example: 7 nodes, 11 edges.
    rows = ["5 3 2", "1 3 4", "5 4 2 1", "2 3 6 7", "1 3 6", "5 4 7", "6 4"]
    graph = read_graph(text_file(tmp_path, "% c\n7 11\n" + "\n".join(rows) + "\n", "g.graph"))
    assert [set((graph.neighbors(n) + 1).tolist()) for n in range(7)] == [set(map(int, row.split())) for row in rows]
    # Sizes, two weights a node, and weights of edges: the first three numbers of each line are the node's own.
    full = read_graph(text_file(tmp_path, "2 1 111 2\n9 8 7 2 5\n6 5 4 1 5\n", "g.metis"))
    assert full.equals(Graph.from_edges([0], [1], [5.0]))
    assert read_graph(text_file(tmp_path, "3 1\n2\n1\n\n", "g.metis")).num_nodes == 3
    assert read_graph(text_file(tmp_path, "2 1\n2\n1\n", "g.metis"), directed=True).is_directed


@pytest.mark.parametrize("kind", [b"csr", b"csc"])
@pytest.mark.parametrize(
    ("indptr", "indices"),
    [
        ([0, 5, 2, -1], [9, 9, 9]),
        ([0, 1, 0, 3], [0, 1, 2]),
        ([0, 1, 2, 4], [0, 1, 2]),
        ([1, 1, 2, 3], [0, 1, 2]),
        ([0, 1, 2, 3], [0, 1, 3]),
        ([0, 1, 2, 3], [0, -1, 2]),
    ],
)
def test_npz_of_a_damaged_matrix_is_told(tmp_path, kind, indptr, indices):
    np.savez(tmp_path / "g.npz", indptr=indptr, indices=indices, data=np.ones(3), shape=[3, 3], format=kind)
    with pytest.raises(DataError, match=r"g\.npz"):
        read_graph(tmp_path / "g.npz")


def test_npz_of_scipy_and_of_others(tmp_path):
    matrix = csr_array([[0, 2.0, 0], [0, 0, 1], [0, 0, 3]])
    expected = Graph.from_scipy(matrix)
    for made in (matrix, csc_array(matrix), coo_array(matrix)):
        save_npz(tmp_path / "g.npz", made)
        assert read_graph(tmp_path / "g.npz").equals(expected)
    parts = {f"adj_{name}": getattr(matrix, name) for name in ("data", "indices", "indptr", "shape")}
    np.savez(tmp_path / "g.npz", **parts, labels=np.arange(3))
    assert read_graph(tmp_path / "g.npz").equals(expected)
    wide = {f"attr_{name}": getattr(csr_array((3, 7)), name) for name in ("data", "indices", "indptr", "shape")}
    np.savez(tmp_path / "g.npz", **parts, **wide)
    assert read_graph(tmp_path / "g.npz").equals(expected)
    assert read_graph(tmp_path / "g.npz", variable="adj").equals(expected)
    np.savez(tmp_path / "g.npz", row=[0, 1], col=[1, 0], weight=[2.0, 2.0], num_nodes=4)
    assert read_graph(tmp_path / "g.npz").equals(Graph.from_edges([0], [1], [2.0], False, 4))
    np.savez(tmp_path / "g.npz", edge_index=np.array([[0, 1], [1, 2]]))
    assert read_graph(tmp_path / "g.npz").equals(Graph.from_edges([0, 1], [1, 2], None, True))


def test_mat_files(tmp_path):
    matrix = csc_array(np.array([[0, 2.0], [2, 0]]))
    savemat(tmp_path / "g.mat", {"network": matrix, "group": csc_array((2, 5)), "other": np.eye(2)})
    assert read_graph(tmp_path / "g.mat").equals(Graph.from_edges([0], [1], [2.0]))
    assert read_graph(tmp_path / "g.mat", variable="other").num_self_loops == 2
    savemat(tmp_path / "two.mat", {"a": matrix, "b": matrix})
    assert read_graph(tmp_path / "two.mat", variable="b").num_edges == 1


def test_parquet_of_other_hands(tmp_path):
    table = pa.table(
        {
            "weight": pa.array([1, 2], pa.int8()),
            "dst": pa.array(["x", "y"]).dictionary_encode(),
            "src": pa.array(["y", "z"], pa.large_string()),
        }
    )
    pq.write_table(table, tmp_path / "g.parquet")
    assert rows(read_graph(tmp_path / "g.parquet")) == {("x", "y", 1), ("y", "z", 2)}
    pq.write_table(pa.table({"a": [0, 1], "b": pa.array([1, 2], pa.uint16()), "c": [5, 6]}), tmp_path / "g.parquet")
    assert read_graph(tmp_path / "g.parquet").equals(Graph.from_edges([0, 1], [1, 2]))
    assert read_graph(tmp_path / "g.parquet", weight="c").weights.tolist() == [5, 5, 6, 6]
    assert read_graph(tmp_path / "g.parquet", source="c", target="b", ids="text").names.tolist() == ["1", "2", "5", "6"]


def test_the_format_is_told_by_bytes_then_by_ending(tmp_path):
    graph = Graph.from_edges([0, 1], [1, 2])
    for ending in ("anb", "parquet", "npz", "mat", "mtx"):
        write_graph(graph, tmp_path / "misnamed.txt", format=ending)
        assert read_graph(tmp_path / "misnamed.txt").equals(graph)
    assert read_graph(text_file(tmp_path, "0 1\n1 2\n", "g.csv")).equals(graph)
    assert read_graph(text_file(tmp_path, "2 1\n2\n1\n", "g.any"), format="metis").num_edges == 1


def test_our_own_file_is_mapped_where_it_is_large(tmp_path):
    graph = Graph.from_edges(np.arange(100_000), np.arange(1, 100_001))
    write_graph(graph, tmp_path / "g.anb")
    assert read_graph(tmp_path / "g.anb", memory_limit=LIMIT).equals(graph)
    with pytest.raises(InputError, match="to_directed"):
        read_graph(tmp_path / "g.anb", directed=True)


# Other libraries


@given(graphs())
def test_networkx_there_and_back(graph):
    again = from_networkx(to_networkx(graph))
    if graph.weights is not None and not len(graph.weights):
        graph = graph.with_weights(None)
    assert again.difference(graph) is None


def test_networkx_by_hand():
    made = networkx.MultiDiGraph()
    made.add_edge("b", "a", weight=2)
    made.add_edge("b", "a", weight=3)
    made.add_edge("a", "c")
    graph = from_networkx(made)
    assert graph.names.tolist() == ["b", "a", "c"]
    assert rows(graph) == {("b", "a", 5), ("a", "c", 1)}
    assert from_networkx(made, weight=None).weights is None
    shuffled = networkx.Graph([(2, 0), (0, 1)])
    assert from_networkx(shuffled).equals(Graph.from_edges([2, 0], [0, 1]))  # the integers stay what they are
    assert from_networkx(networkx.grid_2d_graph(2, 2)).ids_of([(1, 1)]).tolist() == [3]
    assert from_networkx(networkx.empty_graph(3)).num_nodes == 3
    made.add_edge("a", "d", weight="heavy")
    with pytest.raises(InputError, match="has the weight 'heavy'"):
        from_networkx(made)


@given(graphs())
def test_igraph_there_and_back(graph):
    pytest.importorskip("igraph")
    assert from_igraph(to_igraph(graph)).difference(graph) is None


def test_igraph_by_hand():
    igraph = pytest.importorskip("igraph")
    made = igraph.Graph(n=4, edges=[(0, 1), (1, 0), (2, 2)], directed=False)
    # Parallel edges count as many as they are.
    assert from_igraph(made).equals(Graph.from_edges([0, 2], [1, 2], [2.0, 1.0], False, 4))
    made.es["weight"] = [1.0, None, 2.0]
    with pytest.raises(InputError, match=r"edge \(0, 1\) has no 'weight'"):
        from_igraph(made)


@pytest.mark.parametrize("make", [torch.tensor, np.array])
def test_pyg_data_are_read_without_their_library(make):
    index = make([[0, 1, 1, 2], [1, 0, 2, 1]])
    data = types.SimpleNamespace(edge_index=index, edge_weight=None, edge_attr=None, num_nodes=4)
    assert from_pyg(data).equals(Graph.from_edges([0, 1], [1, 2], None, False, 4))
    assert from_pyg(data, directed=True).is_directed
    data.edge_attr = make([[2.0], [2.0], [3.0], [3.0]])
    assert from_pyg(data).weights.tolist() == [2, 2, 3, 3]
    data.edge_attr = make([[2.0, 1], [2.0, 1], [3.0, 1], [3.0, 1]])  # features, not weights
    assert from_pyg(data).weights is None
    data.edge_weight = make([2.0, 1.0, 3.0, 3.0])
    assert from_pyg(data).is_directed
    with pytest.raises(InputError, match="not symmetric"):
        from_pyg(data, directed=False)
    with pytest.raises(InputError, match="no 'cost'"):
        from_pyg(data, weight="cost")


@given(graphs(named=False))
def test_torch_tensors(graph):
    matrix = graph.to_scipy().tocoo()
    index = np.stack([matrix.row, matrix.col]).astype(np.int64)
    tensor = torch.sparse_coo_tensor(
        torch.tensor(index), torch.tensor(matrix.data), matrix.shape, check_invariants=True
    )
    expected = Graph.from_scipy(matrix)
    assert from_torch(tensor).difference(expected) is None
    assert from_torch(tensor.to(torch.bfloat16)).difference(expected) is None
    csr = types.SimpleNamespace(
        layout="torch.sparse_csr",
        shape=matrix.shape,
        col_indices=lambda: graph.indices.copy(),
        crow_indices=lambda: graph.indptr,
        values=lambda: matrix.data,
    )
    assert from_torch(csr).difference(expected) is None


def test_torch_layouts():
    dense = torch.tensor([[0.0, 2], [0, 3]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch says once in a process that the layout is in beta
        csr = dense.to_sparse_csr()
    expected = Graph.from_scipy(csr_array(dense.numpy()))
    assert from_torch(csr).equals(expected)
    assert from_torch(dense.to_sparse_csc()).equals(expected)
    twice = torch.sparse_coo_tensor(
        torch.tensor([[0, 0], [1, 1]]), torch.tensor([1.0, 2.0]), (2, 2), check_invariants=True
    )
    assert from_torch(twice).weights.tolist() == [3]
    for bad, words in ((dense, "sparse tensor"), (torch.zeros(2, 3).to_sparse(), "square"), (3, "not int")):
        with pytest.raises(InputError, match=words):
            from_torch(bad)


@given(graphs(named=False))
def test_tables_there_and_back(graph):
    assert from_table(to_table(graph)).difference(graph) is None


def test_tables_by_hand():
    graph = Graph.from_edges([0, 1], [1, 2], [2, 3], names=["a", "b", "c"])
    assert to_table(graph).to_pydict() == {"source": ["a", "b"], "target": ["b", "c"], "weight": [2, 3]}
    assert to_table(graph, names=False).column_names == ["source", "target", "weight"]
    assert to_table(graph, names=False).to_pydict()["source"] == [0, 1]
    assert from_table({"u": ["a", "b"], "v": ["b", "c"], "w": [2, 3]}).equals(graph)
    assert from_table({"u": [0, 1], "v": [1, 2]}, directed=True).equals(Graph.from_edges([0, 1], [1, 2], None, True))


def test_a_line_without_an_end_is_told(tmp_path, monkeypatch):
    """Whatever a file of one line is, it is not read into memory whole, again and again."""
    from anabranch.graph.formats import lines

    monkeypatch.setattr(lines, "MOST_LINE", 1 << 12)
    path = tmp_path / "e.txt"
    path.write_bytes(b"1 2\n" + b"3" * 20_000)
    with pytest.raises(DataError, match=r"e.txt, line 2: a line of more than 0 MiB; this is no list of edges"):
        list(lines.blocks(path, 1 << 10))
    path.write_bytes(b"1 2\n" + b"3" * 3000 + b"\n4 5")
    assert [line for _, line in lines.blocks(path, 1 << 10)] == [1, 2, 3]


@pytest.mark.parametrize("before", ["", "# who knows whom\n", "1 2\n"])
@pytest.mark.parametrize("row", ["3", "3 4 ", "3,4,"])
def test_a_long_row_is_told_before_its_fields_are_counted(tmp_path, before, row):
    """Its fields would take a hundred times its bytes."""
    path = tmp_path / "e.txt"
    for end in ("", "\n", "\n5 6\n"):
        path.write_text(before + row * (3 << 20) + end)
        line = before.count("\n") + 1
        with pytest.raises(DataError, match=f"e.txt, line {line}: a line of more than 1 MiB; this is no list of edges"):
            read_graph(path)
    path.write_text("5 6" + " 7" * 1000 + "\n")
    assert read_graph(path).num_edges == 1


def test_sizes_beyond_memory_are_told(tmp_path):
    path = tmp_path / "m.mtx"
    path.write_text("%%MatrixMarket matrix coordinate pattern general\n900000000000 900000000000 1\n1 2\n")
    with pytest.raises(
        CapacityError, match=r"900,000,000,000 nodes need 13,411.0 GiB for their rows alone, .* GiB of memory are free"
    ):
        read_graph(path)


def test_no_memory_for_what_fits_no_limit_is_told(tmp_path, monkeypatch):
    from anabranch.graph import csr

    def fails(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(csr, "compress", fails)
    path = tmp_path / "e.txt"
    path.write_text("1 2\n")
    with pytest.raises(CapacityError, match=r"e.txt does not fit into memory \(1 edges so far\); give `memory_limit`"):
        read_graph(path)


@pytest.mark.parametrize(
    ("text", "names"),
    [
        # A first one tells that all are text, and 007 and 7 are two.
        ("source,target\n007,7\n7,8\n", ["007", "7", "8"]),
        ("007 7\n7 8\n", ["007", "7", "8"]),
        ("source,target\n0,5\n5,60\n", [0, 5, 60]),
    ],
)
def test_ids_that_begin_with_zeros_are_text(tmp_path, text, names):
    (tmp_path / "e.csv").write_text(text)
    assert read_graph(tmp_path / "e.csv").names.tolist() == names


def test_zeros_below_whole_numbers_are_told(tmp_path):
    """00501 and 501 were one node."""
    path = tmp_path / "e.csv"
    path.write_text("source,target\n10001,10002\n501,10001\n10002,00501\n")
    with pytest.raises(DataError, match=r"line 4: the target '00501' begins with 0, .*ids='text' .*ids='numbers'"):
        read_graph(path)
    assert read_graph(path, ids="text").num_nodes == 4
    assert read_graph(path, ids="numbers").num_nodes == 10003


def test_rows_below_names_may_begin_as_comments_do(tmp_path):
    """Rows of hashtags were lost without a word."""
    path = tmp_path / "e.csv"
    path.write_text(
        '# of today\nsource,target\n#python,#ai\n# a note, by ann\n##x,y\n%a,"#ai,b"\n#python,#ai,#ml\nann,#ai\n'
    )
    graph = read_graph(path, directed=True)
    assert edges_of(graph) == {("#python", "#ai"), ("%a", "#ai,b"), ("ann", "#ai")}
    # Whoever says what comments begin with is believed.
    assert edges_of(read_graph(path, directed=True, comment="#")) == {("%a", "#ai,b"), ("ann", "#ai")}
    with pytest.raises(DataError, match=r"line [1-9]: "):
        read_graph(path, comment="")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("ann,bob\n#ml,#ai\n", 2),
        ("#python,#ai\n#ai,#ml\nann,#ai\n", 1),
        ("#python,ai\nann,bob\n", 1),
        ("ann\tbob\n# a\tb\n##a\tb\n%x\ty\n", 4),
    ],
)
def test_lines_of_which_nobody_can_tell_if_they_are_rows_are_refused(tmp_path, text, line):
    path = tmp_path / "e.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=rf"line {line}: a comment, or a row"):
        read_graph(path)


@pytest.mark.parametrize(
    "text",
    [
        # As SNAP writes them, and Konect.
        "# Directed graph: x.txt\n# Nodes: 3 Edges: 2\n# FromNodeId\tToNodeId\n5\t6\n6\t7\n",
        "#from\tto\n5\t6\n6\t7\n",
        "% sym unweighted\n5 6\n#a b\n6 7\n",
        "5,6\n# a, b\n6,7\n",
        # Where ids are numbers no node is called so.
        "5,6\n#3,4\n6,7\n",
        "#nodes,5\n#edges,7\n5,6\n6,7\n",
        "#created,2020\n#author,ann\nsource,target\n5,6\n#3,4\n6,7\n",
    ],
)
def test_comments_are_left_out(tmp_path, text):
    (tmp_path / "e.txt").write_text(text)
    assert edges_of(read_graph(tmp_path / "e.txt", directed=True)) == {(5, 6), (6, 7)}


def test_comments_that_somebody_says_are_left_out(tmp_path):
    (tmp_path / "e.csv").write_text("#a,b\n#c,d\nann,bob\n#bob,cy\n")
    assert edges_of(read_graph(tmp_path / "e.csv", directed=True, comment="#")) == {("ann", "bob")}


def test_nodes_of_two_modes_are_no_names_of_columns(tmp_path):
    """The first edge was lost: what stood behind : or in () was taken for a type."""
    for first in ("u:1,v:7", "source:1,target:2", "from(a),to(b)", "Node 1,Node 2", "node-1,node-2", "v:2,u:1"):
        (tmp_path / "e.csv").write_text(f"{first}\nu:2,v:7\nu:2,v:8\n")
        assert read_graph(tmp_path / "e.csv", directed=True).num_edges == 3
    for first, second in (("node1,node2", "node2,node3"), ("node_2,node_1", "node_3,node_4"), ("id1 id2", "id2 id3")):
        (tmp_path / "e.csv").write_text(f"{first}\n{second}\n")
        assert read_graph(tmp_path / "e.csv", directed=True).num_edges == 2


@pytest.mark.parametrize(
    "text",
    [
        "#,source,target\n1,5,6\n2,6,7\n",
        "# weight source target\n1 5 6\n2 6 7\n",
        "# an export\n#weight,from,to\n1,5,6\n2,6,7\n",
        "No.,source,target\n1,5,6\n2,6,7\n",
    ],
)
def test_a_comment_may_name_the_columns(tmp_path, text):
    """The number of the row was an end."""
    (tmp_path / "e.csv").write_text(text)
    assert edges_of(read_graph(tmp_path / "e.csv", directed=True)) == {(5, 6), (6, 7)}


def test_all_rows_below_names_may_begin_as_comments_do(tmp_path):
    (tmp_path / "e.csv").write_text("source,target\n# of today\n#a,#b\n#b,#c\n")
    assert edges_of(read_graph(tmp_path / "e.csv", directed=True)) == {("#a", "#b"), ("#b", "#c")}
    (tmp_path / "e.csv").write_text("source,target\n# a, b\n")
    with pytest.raises(DataError, match=r"holds no edges, only the header in line 1"):
        read_graph(tmp_path / "e.csv")


def edges_of(graph):
    source, target, _ = graph.edges()
    return set(zip(graph.names[source].tolist(), graph.names[target].tolist(), strict=True))


@pytest.mark.parametrize("ending", ["csv", "tsv", "edges", "parquet", "anb"])
@pytest.mark.parametrize(
    "names",
    [
        [5, 6, 7],
        [1, 2, 3],
        [-3, 5, 2**62],
        ["", "1.0", "ann"],
        ["007", "1e5", "nan"],
        [-(2**63), 0, 2**63 - 1],
        ["(a", "b)", "\ufeffa"],
    ],
)
@pytest.mark.parametrize("weights", [None, [2.5, 1.5]])
def test_graphs_whose_nodes_look_like_numbers_come_back(tmp_path, ending, names, weights):
    """The file said how many nodes there are, and names of numbers were out of that range."""
    graph = Graph.from_edges([0, 1], [1, 2], weights, names=names)
    write_graph(graph, tmp_path / f"g.{ending}")
    assert read_graph(tmp_path / f"g.{ending}").difference(graph) is None
    assert from_table(to_table(graph)).difference(graph) is None


@pytest.mark.parametrize("ending", ["csv", "tsv", "edges"])
@pytest.mark.parametrize(("name", "what"), [("a\0b", "zero byte"), ("a\rb", "line break"), ("a\nb", "line break")])
def test_names_that_a_line_cannot_hold_are_not_written(tmp_path, ending, name, what):
    """One with a zero byte was written, and refused when it was read."""
    graph = Graph.from_edges([0], [1], names=[name, "b"])
    with pytest.raises(InputError, match=f"holds a {what}; write .parquet or .anb"):
        write_graph(graph, tmp_path / f"g.{ending}")
    assert not list(tmp_path.iterdir())
    write_graph(graph, tmp_path / "g.parquet")
    assert read_graph(tmp_path / "g.parquet").difference(graph) is None


@pytest.mark.parametrize("ending", [".gdf", ".gml", ".net", ".md", ".sql", ".json.gz"])
def test_text_of_other_programs_is_no_list_of_edges(tmp_path, ending):
    (tmp_path / f"g{ending}").write_text("nodedef>name VARCHAR,label VARCHAR\ns1,a\n")
    with pytest.raises(DataError, match="are not read; those of anb, edges, "):
        read_graph(tmp_path / f"g{ending}")
    assert read_graph(tmp_path / f"g{ending}", format="edges").num_edges == 2


def test_parquet_of_a_frame_has_its_index_first(tmp_path):
    """It stands last in the file, and was passed over."""
    frame = pd.DataFrame({"item": [2, 1, 4], "weight": [3, 4, 4], "user": [5, 9, 6]})
    frame.set_index("user").to_parquet(tmp_path / "e.parquet")
    assert edges_of(read_graph(tmp_path / "e.parquet", directed=True)) == {(5, 2), (9, 1), (6, 4)}
    # It may call the edges, where two others may be the ends.
    frame.rename(columns={"weight": "w2"}).set_index("user").to_parquet(tmp_path / "e.parquet")
    with pytest.raises(DataError, match=r"e\.parquet: which of its columns 'user', 'item', 'w2' are source and target"):
        read_graph(tmp_path / "e.parquet")
    # Whoever says numbers means those of the file.
    assert edges_of(read_graph(tmp_path / "e.parquet", directed=True, source=0, target=1)) == {(2, 3), (1, 4), (4, 4)}


def test_an_index_that_is_not_in_the_file_is_asked_for(tmp_path):
    """pandas writes one of even steps as a note alone."""
    frame = pd.DataFrame({"item": [2, 1], "w2": [3, 4]}, index=pd.RangeIndex(5, 9, 2, name="user"))
    frame.to_parquet(tmp_path / "e.parquet")
    with pytest.raises(DataError, match=r"e\.parquet: its index 'user' is not among its columns.*reset_index"):
        read_graph(tmp_path / "e.parquet")
    # Where names say which are ends, it is none.
    frame.set_axis(["source", "target"], axis=1).to_parquet(tmp_path / "e.parquet")
    assert edges_of(read_graph(tmp_path / "e.parquet", directed=True)) == {(2, 3), (1, 4)}


def test_a_matrix_in_parquet_is_no_table_of_edges(tmp_path):
    names = ["ann", "bob", "cy"]
    frame = pd.DataFrame(np.eye(3), index=names, columns=names)
    frame.to_parquet(tmp_path / "m.parquet")
    with pytest.raises(DataError, match=r"m\.parquet is a matrix"):
        read_graph(tmp_path / "m.parquet")
    with pytest.raises(DataError, match="the table is a matrix"):
        from_table(frame)


@pytest.mark.parametrize("text", ["person,source\nann,bob\n", "weight,sender\ncy,5\n", "to\tbe\nor\tnot\n"])
def test_a_first_line_with_one_word_of_ends_is_asked_for(tmp_path, text):
    """person and source were nodes, where other readers took them for names of columns."""
    path = tmp_path / "e.tsv"
    path.write_text(text)
    with pytest.raises(
        DataError, match=r"line 1: a row, or names of columns.* Begin the file with the line source,target"
    ):
        read_graph(path)
    assert read_graph(path, header=False, weight=None).num_edges == 2
