"""A graph equals a dict of dicts built edge by edge; what is asked of it, made of it, saved and loaded of it follows."""

import copy
import math
import pickle

import networkx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import coo_array, csr_array, random_array

from anabranch.errors import CapacityError, DataError, InputError
from anabranch.graph import Graph, csr, transform
from anabranch.graph.array_file import read_arrays, write_arrays
from anabranch.graph.store import GraphBytes
from graphs import edge_lists, graphs


def naive(source, target, weight, directed, num_nodes, duplicates="add"):
    """Rows as dicts, edge by edge."""
    rows = [{} for _ in range(num_nodes)]
    for place, (u, v) in enumerate(zip(source, target, strict=True)):
        w = 1.0 if weight is None else weight[place]
        for a, b in {(u, v)} if directed else {(u, v), (v, u)}:
            old = rows[a].get(b)
            rows[a][b] = w if old is None else {"add": old + w, "max": max(old, w), "first": old}[duplicates]
    return rows


def as_rows(graph):
    weights = np.ones(len(graph.indices)) if graph.weights is None else graph.weights
    return [
        dict(zip(graph.neighbors(n).tolist(), weights[graph.indptr[n] : graph.indptr[n + 1]].tolist(), strict=True))
        for n in range(graph.num_nodes)
    ]


def check_form(graph):
    """What every graph is like."""
    assert graph.indptr.dtype == np.int64
    assert graph.indices.dtype == np.int32
    assert graph.weights is None or graph.weights.dtype == np.float32
    assert csr.find_fault(graph.indptr, graph.indices, len(graph.indices)) == -1
    for array in (graph.indptr, graph.indices, graph.weights, graph.names):
        assert array is None or (not array.flags.writeable and type(array) is np.ndarray)
    if not graph.is_directed:
        plain = np.empty(0, np.float32) if graph.weights is None else graph.weights
        assert csr.count_asymmetric(graph.indptr, graph.indices, plain) == 0


# Building


def test_by_hand():
    graph = Graph.from_edges([0, 1, 1, 3, 0], [1, 0, 2, 3, 1], [1, 2, 3, 4, 5])
    # 0 - 1 is given three times: 1 + 2 + 5 = 8. The loop at 3 is stored once. Node 2 has only 1.
    assert graph.indptr.tolist() == [0, 1, 3, 4, 5]
    assert graph.indices.tolist() == [1, 0, 2, 1, 3]
    assert graph.weights.tolist() == [8, 8, 3, 3, 4]
    assert (graph.num_nodes, graph.num_edges, graph.num_self_loops) == (4, 3, 1)
    assert graph.degree_N.tolist() == [1, 2, 1, 1]
    assert graph.strength_N.tolist() == [8, 11, 3, 4]
    directed = Graph.from_edges([0, 1, 1, 3, 0], [1, 0, 2, 3, 1], [1, 2, 3, 4, 5], directed=True)
    assert directed.indptr.tolist() == [0, 1, 3, 3, 4]
    assert directed.indices.tolist() == [1, 0, 2, 3]
    assert directed.weights.tolist() == [6, 2, 3, 4]
    assert repr(directed) == "Graph(4 nodes, 4 edges, directed, weighted)"


@given(edge_lists(), st.booleans(), st.sampled_from(["add", "max", "first"]))
def test_equals_a_dict_of_dicts(edges, directed, duplicates):
    source, target, weight, num_nodes = edges
    graph = Graph.from_edges(source, target, weight, directed, num_nodes, duplicates=duplicates)
    check_form(graph)
    expected = naive(source, target, weight, directed, num_nodes, duplicates)
    if weight is None:
        expected = [dict.fromkeys(row, 1.0) for row in expected]
    assert as_rows(graph) == expected


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("directed", [False, True])
def test_equals_scipy_on_rows_of_every_length(directed, weighted):
    # Rows from empty to hundreds of edges, with many duplicates: each of the ways in which a row is sorted.
    generator = np.random.default_rng(0)
    source = np.minimum(generator.geometric(0.02, 20_000), 400) - 1
    target = generator.integers(0, 500, 20_000)
    weight = generator.integers(1, 5, 20_000) / 4 if weighted else None
    graph = Graph.from_edges(source, target, weight, directed, 500)
    matrix = coo_array((np.ones(20_000) if weight is None else weight, (source, target)), shape=(500, 500)).tocsr()
    if not directed:
        matrix = matrix + matrix.T - csr_array((matrix.diagonal(), np.arange(500), np.arange(501)), shape=(500, 500))
    if not weighted:
        matrix.data[:] = 1
    assert (graph.to_scipy(np.float64) != matrix).nnz == 0
    check_form(graph)


@given(edge_lists(weighted=True), st.randoms(use_true_random=False), st.booleans())
def test_order_and_direction_of_the_edges_do_not_matter(edges, random, directed):
    source, target, weight, num_nodes = edges
    order = list(range(len(source)))
    random.shuffle(order)
    turn = [not directed and random.random() < 0.5 for _ in order]
    moved = [(target[e], source[e]) if t else (source[e], target[e]) for e, t in zip(order, turn, strict=True)]
    changed = Graph.from_edges(
        [u for u, _ in moved], [v for _, v in moved], [weight[e] for e in order], directed, num_nodes
    )
    assert changed.equals(Graph.from_edges(source, target, weight, directed, num_nodes))


def test_sums_are_taken_in_double_precision_and_equal_in_both_rows():
    # In float32, adding 1 to 2**24 changes nothing: 2**24 + 1 + 1 would stay 2**24.
    graph = Graph.from_edges([0, 1, 0], [1, 0, 1], [2.0**24, 1, 1])
    assert graph.weights.tolist() == [2.0**24 + 2] * 2


@pytest.mark.parametrize("dtype", ["i1", "u1", "i2", "u4", "i8", "u8", ">i4", ">i8"])
def test_integers_of_any_kind(dtype):
    graph = Graph.from_edges(np.array([0, 2], dtype), np.array([1, 1], dtype))
    assert as_rows(graph) == [{1: 1.0}, {0: 1.0, 2: 1.0}, {1: 1.0}]


def test_no_edges_no_nodes_isolated_nodes():
    empty = Graph.from_edges([], [])
    assert (empty.num_nodes, empty.num_edges, empty.nbytes) == (0, 0, 8)
    alone = Graph.from_edges([], [], num_nodes=3)
    assert (alone.num_nodes, alone.degree_N.tolist(), alone.strength_N.tolist()) == (3, [0, 0, 0], [0, 0, 0])
    dangling = Graph.from_edges([0], [1], directed=True, num_nodes=3)
    assert dangling.degree_N.tolist() == [1, 0, 0]
    for graph in (empty, alone, dangling):
        check_form(graph)
        check_form(graph.reversed)
        assert graph.subgraph([]).num_nodes == 0
        assert graph.describe()["nodes"] == graph.num_nodes


def test_zero_and_negative_weights_where_they_are_asked_for():
    assert Graph.from_edges([0, 1], [1, 2], [0.0, 1], drop_zero=True).num_edges == 1
    assert Graph.from_edges([0, 1], [1, 2], [0.0, 1], drop_zero=True).num_nodes == 3
    assert Graph.from_edges([0], [1], [-2.0], allow_negative=True).weights.tolist() == [-2, -2]
    with pytest.raises(InputError, match=r"edge \(0, 1\) add up to 0"):
        Graph.from_edges([0, 0], [1, 1], [-2.0, 2.0], allow_negative=True)
    assert Graph.from_edges([0, 0], [1, 1], [-2.0, 2.0], allow_negative=True, drop_zero=True).num_edges == 0


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_ids_are_wide_where_they_must_be(monkeypatch, compiled):
    if not compiled:
        # The same lines: kernels of wide ids take half a minute to compile.
        for module in (csr, transform):
            for name, kernel in vars(module).items():
                if hasattr(kernel, "py_func"):
                    monkeypatch.setattr(module, name, kernel.py_func)
    narrow = Graph.from_edges([0, 0, 5], [1, 1, 3], [1, 2, 3])
    monkeypatch.setattr(csr, "INT32", 5)  # the 6 nodes do not fit
    wide = Graph.from_edges([0, 0, 5], [1, 1, 3], [1, 2, 3])
    assert wide.indices.dtype == np.int64
    assert wide.indices.tolist() == narrow.indices.tolist()
    assert wide.subgraph([0, 1]).indices.dtype == np.int32
    assert wide.reversed is wide
    monkeypatch.setattr(csr, "INT32", 6)  # six edges as given, but four that are stored: they fit
    assert Graph.from_edges([0, 0, 0], [1, 1, 1]).indices.dtype == np.int32
    assert Graph.from_edges([0, 0, 0, 0], [1, 1, 1, 1]).indices.dtype == np.int32


# Matrices


def test_matrices_by_hand():
    entries = [[0, 2, 0], [2, 0, 1], [0, 1, 5]]
    for matrix in (
        csr_array(entries),
        coo_array(entries),
        np.array(entries),
        csr_array(np.array(entries, float)).tocsc(),
    ):
        graph = Graph.from_scipy(matrix)
        assert not graph.is_directed
        assert as_rows(graph) == [{1: 2}, {0: 2, 2: 1}, {1: 1, 2: 5}]
    assert Graph.from_scipy(csr_array([[0, 1], [0, 0]])).is_directed
    assert Graph.from_scipy(csr_array([[0, 2], [1, 0]])).is_directed  # the weights differ
    assert Graph.from_scipy(csr_array([[0, 1], [1, 0]])).weights is None
    assert Graph.from_scipy(csr_array([[0, 2], [2, 0]])).weights.tolist() == [2, 2]
    assert Graph.from_scipy(csr_array([[False, True], [True, False]])).weights is None
    assert Graph.from_scipy(csr_array([[0, 1], [1, 0]]), directed=True).is_directed
    twice = coo_array(([1.0, 1, 2], ([0, 0, 1], [1, 1, 0])), shape=(2, 2))
    assert Graph.from_scipy(twice, directed=False).weights.tolist() == [2, 2]


@given(graphs())
def test_a_graph_is_the_graph_of_its_matrix(graph):
    again = Graph.from_scipy(graph.to_scipy(), graph.is_directed, names=graph.names)
    if graph.weights is not None and (graph.weights == 1).all():
        graph = graph.with_weights(None)  # a matrix of ones is a graph without weights
    assert again.difference(graph) is None


# Looking at it


@given(graphs())
def test_edges_build_the_graph_again(graph):
    source, target, weight = graph.edges()
    assert len(source) == graph.num_edges
    again = Graph.from_edges(source, target, weight, graph.is_directed, graph.num_nodes, names=graph.names)
    assert again.difference(graph) is None


@given(graphs())
def test_strength_is_the_sum_of_weights(graph):
    assert graph.strength_N.tolist() == [sum(row.values()) for row in as_rows(graph)]


def test_names():
    graph = Graph.from_edges([0, 1], [1, 2], names=["ann", "bob", "eve"])
    assert graph.ids_of(["eve", "ann"]).tolist() == [2, 0]
    assert graph.names_of([2, 0]).tolist() == ["eve", "ann"]
    with pytest.raises(InputError, match="no node 'bobb'; did you mean 'bob'"):
        graph.ids_of(["bobb"])
    with pytest.raises(InputError, match=r"no node \['a'\]"):
        graph.ids_of([["a"]])
    numbers = Graph.from_edges([0, 1], [1, 2], names=[100, 5, 7])
    assert numbers.names.dtype.kind == "i"
    assert numbers.ids_of(np.array([7, 100])).tolist() == [2, 0]
    with pytest.raises(InputError, match="no node 8"):
        numbers.ids_of([8])
    pairs = Graph.from_edges([0], [1], names=[(0, 0), (0, 1)])  # a list of tuples is a list of names
    assert pairs.ids_of([(0, 1)]).tolist() == [1]
    plain = Graph.from_edges([0], [1])
    assert plain.ids_of([1]).tolist() == [1]
    assert plain.names_of([1]).tolist() == [1]


def test_describe_by_hand():
    # 0 -> 1 -> 2 and a loop at 3; node 4 is alone. 2 and 4 have no edge out.
    graph = Graph.from_edges([0, 1, 3], [1, 2, 3], [1, 2, 3], directed=True, num_nodes=5)
    facts = graph.describe()
    assert facts["degree"] == {"mean": 0.6, "min": 0, "p25": 0, "median": 1, "p75": 1, "p90": 1, "p99": 1, "max": 1}
    assert {name: facts[name] for name in ("nodes", "edges", "stored_edges", "self_loops", "isolated", "dangling")} == {
        "nodes": 5,
        "edges": 3,
        "stored_edges": 3,
        "self_loops": 1,
        "isolated": 1,
        "dangling": 2,
    }
    assert facts["weight"] == {"sum": 6.0, "min": 1.0, "max": 3.0}
    assert (facts["components"], facts["largest_component"], facts["bytes"]) == (3, 3, 6 * 8 + 3 * 8)
    assert (facts["directed"], facts["weighted"], facts["named"]) == (True, True, False)
    assert facts["in_degree"]["max"] == 1
    assert graph.to_undirected().describe()["weight"]["sum"] == 6.0


# Other graphs of it


@given(graphs())
def test_reversed_twice_is_the_graph(graph):
    turned = graph.reversed
    check_form(turned)
    assert turned.reversed.difference(graph) is None
    rows = as_rows(graph)
    assert as_rows(turned) == [
        {u: row[v] for u, row in enumerate(rows) if v in row} if graph.is_directed else rows[v]
        for v in range(graph.num_nodes)
    ]


@given(graphs())
def test_undirected_is_symmetric_and_adds_both_directions(graph):
    flat = graph.to_undirected()
    check_form(flat)
    assert not flat.is_directed
    matrix, found = graph.to_scipy(np.float64).toarray(), flat.to_scipy(np.float64).toarray()
    both = matrix if not graph.is_directed else matrix + matrix.T - np.diag(matrix.diagonal())
    assert np.array_equal(found, both if graph.weights is not None else np.minimum(both, 1))
    assert flat.to_directed().is_directed
    assert flat.to_directed()._as_undirected(demanded=True).difference(flat) is None


@given(graphs(), st.data())
def test_subgraph_keeps_what_is_between_its_nodes(graph, data):
    nodes = data.draw(st.lists(st.integers(0, graph.num_nodes - 1), unique=True))
    part = graph.subgraph(nodes)
    check_form(part)
    assert as_rows(part) == [{nodes.index(v): w for v, w in as_rows(graph)[u].items() if v in nodes} for u in nodes]
    assert part.names.tolist() == graph.names_of(nodes).tolist() if nodes else len(part.names) == 0


@given(graphs())
def test_components_equal_networkx(graph):
    label = graph.components()
    made = networkx.Graph()
    made.add_nodes_from(range(graph.num_nodes))
    made.add_edges_from(zip(*(ends.tolist() for ends in graph.edges()[:2]), strict=True))
    expected = sorted(networkx.connected_components(made), key=lambda nodes: (-len(nodes), min(nodes)))
    assert [set(np.flatnonzero(label == number).tolist()) for number in range(len(expected))] == expected
    assert graph.largest_component().names.tolist() == graph.names_of(sorted(expected[0])).tolist()


def test_other_weights():
    graph = Graph.from_edges([0, 1, 1], [1, 2, 1], num_nodes=4)
    stored = graph.with_weights([1, 1, 2, 3, 3])  # rows: 0: 1; 1: 0 1 2; 2: 1
    assert as_rows(stored) == [{1: 1}, {0: 1, 1: 2, 2: 3}, {1: 3}, {}]
    assert graph.edges()[0].tolist() == [0, 1, 1]
    assert graph.with_weights([1, 2, 3]).equals(stored)
    assert stored.with_weights(None).equals(graph)
    with pytest.raises(InputError, match="same in both directions"):
        graph.with_weights([1, 9, 2, 3, 3])
    with pytest.raises(InputError, match=r"shape \(4,\); there are 5 stored edges and 3 edges"):
        graph.with_weights([1, 2, 3, 4])
    with pytest.raises(InputError, match="edge 1 has the weight -2"):
        graph.with_weights([1, -2, 3])


def test_differences_are_named():
    graph = Graph.from_edges([0, 1], [1, 2], [1, 2])
    for other, words in (
        (graph.to_directed(), "one is directed"),
        (graph.with_weights(None), "only the first has"),
        (graph.with_weights([1, 3]), "weights: 2 differ, first at 2"),
        (Graph.from_edges([0, 0], [1, 2], [1, 2]), "indptr: 1 differ, first at 1: 1 and 2"),
        (Graph.from_edges([0], [1], [1.0]), "indptr: 4 and 3"),
        (Graph.from_edges([0, 1], [1, 2], [1, 2], names="abc"), "names: only the second has"),
    ):
        assert words in graph.difference(other)
        assert not graph.equals(other)
    assert graph.equals(copy.deepcopy(graph))


# Bytes


@pytest.mark.parametrize("directed", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_formula_says_what_is_stored(directed, weighted):
    source, target = np.arange(99), np.arange(1, 100)
    graph = Graph.from_edges(source, target, np.ones(99) if weighted else None, directed)
    stored, build = Graph.estimate_bytes(100, 99, weighted, directed)
    # 101 places of 8 bytes; 99 or 198 edges of 4 or 8.
    assert stored == graph.nbytes == 101 * 8 + (99 if directed else 198) * (8 if weighted else 4)
    assert build == stored + 800 + (396 if weighted else 0)
    assert Graph.estimate_bytes(1 << 31, 10) == GraphBytes(8 * ((1 << 31) + 1) + 160, 16 * (1 << 31) + 8 + 160)


# On disk and in pickles


@given(graphs(), st.booleans())
def test_saved_and_loaded_it_is_the_same(tmp_path_factory, graph, mmap):
    path = tmp_path_factory.mktemp("g") / "g.anb"
    graph.save(path)
    again = Graph.load(path, mmap=mmap)
    check_form(again)
    assert again.difference(graph) is None
    assert Graph.load(path, mmap=True, verify=True).equals(graph)


def test_names_of_any_text_are_saved(tmp_path):
    names = ["", "é", "日本", "a\nb\0c", " x ", "1"]
    graph = Graph.from_edges([0], [1], num_nodes=6, names=names)
    graph.save(tmp_path / "g")
    assert Graph.load(tmp_path / "g").names.tolist() == names
    for strange in ([1.5, "a"], [(0, 1), (2, 3)], [1, "a"]):
        with pytest.raises(InputError, match="is not text"):
            Graph.from_edges([0], [1], names=strange).save(tmp_path / "h")
    assert not (tmp_path / "h").exists()


def test_every_flipped_byte_of_a_graph_is_detected_or_harmless(tmp_path):
    graph = Graph.from_edges([0, 1, 2], [1, 2, 2], [1, 2, 3], names=["a", "b", "c"])
    path = tmp_path / "g.anb"
    graph.save(path)
    raw = bytearray(path.read_bytes())
    for place in range(len(raw)):
        raw[place] ^= 0x40
        path.write_bytes(raw)
        try:
            assert Graph.load(path).equals(graph)
        except DataError:
            pass
        raw[place] ^= 0x40


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"indptr": np.array([0, 1, 0, 4])}, "edges of node 1 are out of order"),
        ({"indptr": np.array([0, 1, 3, 5])}, "indptr does not fit"),
        ({"indptr": np.array([1, 1, 3, 4])}, "indptr does not fit"),
        ({"indptr": np.empty(0, np.int64)}, "indptr is not a list"),
        ({"indptr": np.array([0, 1, 3, 4], np.int32)}, "indptr is not a list"),
        ({"indices": np.array([1, 0, 3, 1], np.int32)}, "edges of node 1 are out of order or range"),
        ({"indices": np.array([1, 0, 0, 1], np.int32)}, "edges of node 1 are out of order or range"),
        ({"indices": np.array([-1, 0, 2, 1], np.int32)}, "edges of node 0 are out of order or range"),
        ({"indices": np.array([1, 0, 2, 1], np.int16)}, "indices are not"),
        ({"weights": np.ones(3, np.float32)}, "weights do not fit"),
        ({"weights": np.ones(4)}, "weights do not fit"),
        ({"names": np.array([1, 2])}, "names do not fit"),
        ({"name_ends": np.array([1, 2]), "name_bytes": np.array([65, 66], np.uint8)}, "names do not fit"),
        ({"name_ends": np.array([1, 2, 3]), "name_bytes": np.array([255, 66, 67], np.uint8)}, "invalid start byte"),
        ({"indices": None}, "indices"),
    ],
)
def test_files_that_hold_no_graph(tmp_path, change, words):
    from anabranch.graph.array_file import write_arrays

    arrays = {"indptr": np.array([0, 1, 3, 4]), "indices": np.array([1, 0, 2, 1], np.int32), **change}
    write_arrays(tmp_path / "g", "graph", {k: v for k, v in arrays.items() if v is not None}, {"is_directed": False})
    with pytest.raises(DataError, match=words):
        Graph.load(tmp_path / "g")


@given(graphs())
def test_pickled_it_is_the_same_without_what_was_made_of_it(graph):
    _ = graph.reversed, graph.alias, graph.degree_N
    if graph.names is not None:
        graph.ids_of([graph.names[0]])
    again = pickle.loads(pickle.dumps(graph))
    check_form(again)
    assert again.difference(graph) is None
    assert again._index == {}
    assert not {"reversed", "alias", "degree_N"} & set(vars(again))


def test_arrays_cannot_be_changed_and_the_callers_can():
    source = np.array([0, 1])
    graph = Graph.from_edges(source, [1, 2])
    with pytest.raises(ValueError, match="read-only"):
        graph.indices[0] = 2
    source[0] = 1
    mine = np.array([0, 1, 2])
    Graph(mine, np.array([1, 0], np.int32))
    mine[0] = 0  # a view is read-only, not what it looks at


# Refused


@pytest.mark.parametrize(
    ("arguments", "options", "words"),
    [
        (([0, 1], [1]), {}, "source has 2 ends and target 1"),
        (([[0, 1]], [1]), {}, r"source has the shape \(1, 2\)"),
        (([0], [[1], [2, 3]]), {}, "source and target must be lists"),
        (([0.0], [1]), {}, "source is of type float64"),
        ((["a"], [1]), {}, "source is of type <U1; node ids are integers"),
        (([True], [1]), {}, "source is of type bool"),
        (([None], [1]), {}, "source is of type object"),
        (([0, -1], [1, 1]), {}, "edge 1 has the source -1"),
        (([-1], [-1]), {}, "edge 0 has the source -1; there are no nodes"),
        (([0, 1], [1, 5]), {"num_nodes": 3}, "edge 1 has the target 5; nodes are 0 to 2"),
        (([0], [0]), {"num_nodes": 0}, "edge 0 has the source 0; there are no nodes"),
        (([0], [1]), {"num_nodes": -1}, "num_nodes is -1; it must not be negative"),
        (([0], [1]), {"num_nodes": 2.5}, "num_nodes is 2.5; it must be a whole number"),
        ((np.array([2**63], "u8"), [1]), {"num_nodes": 3}, "edge 0 has the source 9223372036854775808"),
        (([0, 1], [1, 2], [1.0]), {}, r"weight has the shape \(1,\); there are 2 edges"),
        (([0], [1], 1.0), {}, r"weight has the shape \(\)"),
        (([0, 1], [1, 2], [1, math.nan]), {}, "edge 1 has the weight nan; weights must be finite"),
        (([0], [1], [math.inf]), {}, "edge 0 has the weight inf; weights must be finite"),
        (([0], [1], [1e39]), {}, r"edge 0 has the weight 1e\+39; weights must be finite \(as 32-bit"),
        (([0], [1], [-1]), {}, "edge 0 has the weight -1; weights must be not negative"),
        (([0, 0], [1, 2], [1, 0]), {}, "edge 1 has the weight 0; weights must be not 0"),
        (([0], [1], [1e-60]), {}, "edge 0 has the weight 1e-60; weights must be not 0"),
        (([0], [1], ["x"]), {}, "weights are numbers"),
        (([0], [1], [1j]), {}, "weights are numbers"),
        (([0], [1], [None]), {}, "edge 0 has the weight nan; weights must be finite"),
        (([0, 0], [1, 1], [3e38, 3e38]), {}, r"the edge \(0, 1\) add up to more than a 32-bit"),
        (([0, 1], [1, 0]), {"duplicates": "error"}, r"the edge \(0, 1\) is given more than once"),
        (([0], [1]), {"duplicates": "sum"}, "duplicates is 'sum'; it must be one of add, max"),
        (([0], [1]), {"names": ["a"]}, r"2 nodes and names of the shape \(1,\)"),
        (([0], [1]), {"names": ["a", "a"]}, "at least two nodes are called 'a'"),
        (([0], [1]), {"names": [[1], [2]]}, "names must be integers, text or other values that can be hashed"),
        (([0], [1]), {"names": [1, True]}, "at least two nodes"),
    ],
)
def test_arguments_that_make_no_graph(arguments, options, words):
    with pytest.raises(InputError, match=words):
        Graph.from_edges(*arguments, **options)


def test_a_wild_id_is_told_from_a_graph():
    with pytest.raises(CapacityError, match="1,000,000,000,000,001 nodes need"):
        Graph.from_edges([0], [10**15])


@pytest.mark.parametrize(
    ("matrix", "options", "words"),
    [
        (csr_array((2, 3)), {}, r"square, this one has the shape \(2, 3\)"),
        (np.zeros(3), {}, r"square, this one has the shape \(3,\)"),
        (csr_array([[0, 1], [0, 0]]), {"directed": False}, r"not symmetric \(1 entries differ\)"),
        (csr_array([[0, -1], [-1, 0]]), {}, "weight -1; weights must be not negative"),
        (csr_array([[0, np.nan], [1, 0]]), {"directed": False}, "weight nan"),
        (csr_array([[0, 1j], [1, 0]]), {}, "real numbers, not complex128"),
    ],
)
def test_matrices_that_are_no_graph(matrix, options, words):
    with pytest.raises(InputError, match=words):
        Graph.from_scipy(matrix, **options)


def test_nodes_that_are_not_there():
    graph = Graph.from_edges([0], [1])
    for call, words in (
        (lambda: graph.neighbors(2), "node 2 is not one of the 2 nodes"),
        (lambda: graph.neighbors(-1), "node -1"),
        (lambda: graph.subgraph([0, 0]), "node 0 is given twice"),
        (lambda: graph.subgraph([0.5]), "node ids are integers, not float64"),
        (lambda: graph.check_nodes(["a"]), "`ids_of` translates names"),
    ):
        with pytest.raises(InputError, match=words):
            call()


def test_a_random_matrix_of_another_hand():
    # Regression: rows with gaps and an unsorted matrix came back sorted and whole.
    matrix = random_array((50, 50), density=0.1, rng=np.random.default_rng(1), format="csr")
    matrix.indices[: matrix.indptr[1]] = matrix.indices[: matrix.indptr[1]][::-1].copy()
    matrix.has_sorted_indices = False
    graph = Graph.from_scipy(matrix)
    check_form(graph)
    assert np.allclose(graph.to_scipy(np.float64).toarray(), matrix.toarray())


def test_names_that_are_no_utf_8_are_refused_before_anything_is_written(tmp_path):
    graph = Graph.from_edges([0], [1], names=["a", "\ud800"])
    with pytest.raises(InputError, match=r"the name '\\ud800' cannot be written"):
        graph.save(tmp_path / "g.anb")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays: {"name_ends": arrays["name_ends"] > 0},
        lambda arrays: {"name_ends": arrays["name_ends"][::-1].copy()},
        lambda arrays: {"name_ends": arrays["name_ends"] - 1},
        lambda arrays: {"name_bytes": arrays["name_bytes"].astype(np.int64)},
        lambda arrays: {"name_bytes": arrays["name_bytes"].astype("U3")},
        lambda arrays: {"name_bytes": np.repeat(arrays["name_bytes"][:1], len(arrays["name_bytes"]))},
    ],
)
def test_names_of_a_file_that_cannot_be_are_damage(tmp_path, change):
    """They were read as garbage, some of it twice."""
    path = tmp_path / "g.anb"
    Graph.from_edges([0, 1, 2], [1, 2, 0], names=["a", "b", "c"]).save(path)
    found = read_arrays(path, "graph")
    arrays = {name: np.array(array) for name, array in found.arrays.items()}
    write_arrays(path, "graph", {**arrays, **change(arrays)}, found.meta, found.version)
    with pytest.raises(DataError, match="damaged"):
        Graph.load(path)
