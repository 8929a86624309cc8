from types import SimpleNamespace

import networkx
import numpy as np
import pyarrow as pa
import pytest
import torch
from scipy.sparse import bsr_array, coo_array, coo_matrix, csc_array, csr_array, csr_matrix, lil_array

from anabranch.errors import DataError, InputError
from anabranch.graph import Graph, PageRank
from anabranch.graph.coerce import as_graph
from anabranch.graph.formats import from_networkx

SOURCE, TARGET, WEIGHT = [0, 1, 2], [1, 2, 0], [1.0, 2.0, 3.0]


def directed(form):
    return form((WEIGHT, (SOURCE, TARGET)), shape=(4, 4))


def same(left, right):
    return left.is_directed == right.is_directed and np.array_equal(
        left.to_scipy().toarray(), right.to_scipy().toarray()
    )


def test_a_graph_is_itself():
    graph = Graph.from_edges(SOURCE, TARGET)
    assert as_graph(graph) is graph


@pytest.mark.parametrize("form", [csr_array, csr_matrix, coo_array, coo_matrix])
def test_scipy(form):
    assert same(as_graph(directed(form)), Graph.from_edges(SOURCE, TARGET, WEIGHT, True, 4))
    assert same(as_graph(directed(form).T + directed(form)), Graph.from_edges(SOURCE, TARGET, WEIGHT, False, 4))


def test_entries_given_twice_are_added_up():
    matrix = coo_array(([1.0, 1.0, 1.0], ([0, 0, 1], [1, 1, 0])), shape=(2, 2))
    assert as_graph(matrix).to_scipy().toarray().tolist() == [[0, 2], [1, 0]]
    assert matrix.nnz == 3  # ours is a copy


@pytest.mark.filterwarnings("ignore:Sparse")
def test_torch():
    matrix = directed(csr_array)
    tensor = torch.sparse_csr_tensor(*map(torch.tensor, (matrix.indptr, matrix.indices, matrix.data)), (4, 4))
    assert same(as_graph(tensor), as_graph(matrix))
    twice = torch.sparse_coo_tensor([[0, 0], [1, 1]], [1.0, 2.0], (2, 2))
    assert as_graph(twice).to_scipy().toarray().tolist() == [[0, 3], [0, 0]]
    with pytest.raises(InputError, match=r"a sparse tensor \(COO, CSR or CSC\), not strided"):
        as_graph(torch.eye(3))


def test_edges():
    expected = Graph.from_edges(SOURCE, TARGET)
    assert same(as_graph((SOURCE, TARGET)), expected)
    assert same(as_graph(np.column_stack([SOURCE, TARGET])), expected)
    assert same(as_graph((SOURCE, TARGET, WEIGHT)), Graph.from_edges(SOURCE, TARGET, WEIGHT))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.eye(3), r"ndarray of shape \(3, 3\) is no graph"),
        (object(), "a object is no graph"),
        ({"a": 1}, "a dict"),
        (None, "a NoneType"),
        ([[0, 1]], "a list"),
        (csr_array(np.ones((2, 3))), "square"),
        (csr_array([[0, np.nan], [1, 0]]), "nan"),
        (csr_array([[0, -1], [1, 0]]), "-1"),
        (Graph.from_edges([0], [1], [-1.0], allow_negative=True), "allow_negative=True"),
        (([0, 1], [1]), "as many"),
        (np.array([[0.5, 1.0]]), "integers"),
    ],
)
def test_what_is_no_graph(given, message):
    with pytest.raises(InputError, match=message):
        as_graph(given)


def test_negative_weights_where_they_are_meant():
    assert as_graph(csr_array([[0, -1], [-1, 0]]), allow_negative=True).weights.tolist() == [-1, -1]


def test_a_path_is_that_of_a_file(tmp_path):
    with pytest.raises(DataError, match=r"there is no file .*none\.csv"):
        as_graph(tmp_path / "none.csv")
    with pytest.raises(DataError, match="there is no file karate"):
        as_graph("karate")


# Each edge is given three times with these weights, of which no small type holds the sum.
TYPES = ["?", "b", "B", "h", "H", "i", "I", "l", "L", "e", "f", "d", "g"]


def thrice(dtype):
    """Three weights, and their sum."""
    kind = np.dtype(dtype)
    one = 1 if kind.kind == "b" else 2047 if kind.kind == "f" else min(int(np.iinfo(kind).max), 2**24)
    return np.full(3, one, kind), float(3 * one)


FORMS = {
    "coo": lambda weight: coo_array((weight, ([0] * 3, [1] * 3)), shape=(2, 2)),
    "csr": lambda weight: csr_array((weight, [1] * 3, [0, 3, 3]), shape=(2, 2)),
    "csc": lambda weight: csc_array((weight, [0] * 3, [0, 0, 3]), shape=(2, 2)),
    "bsr": lambda weight: bsr_array((weight.reshape(3, 1, 1), [1] * 3, [0, 3, 3]), shape=(2, 2)),
    "matrix": lambda weight: coo_matrix((weight, ([0] * 3, [1] * 3)), shape=(2, 2)),
    "tuple": lambda weight: ([0] * 3, [1] * 3, weight),
    "list": lambda weight: ([0] * 3, [1] * 3, weight.tolist()),
    "pyg": lambda weight: SimpleNamespace(edge_index=np.array([[0] * 3, [1] * 3]), edge_weight=weight, num_nodes=2),
    "arrow": lambda weight: pa.table({"source": [0] * 3, "target": [1] * 3, "weight": weight}),
    "networkx": lambda weight: networkx.MultiDiGraph([(0, 1, {"weight": one}) for one in weight]),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", TYPES)
def test_weights_of_every_type_are_added_as_wide_numbers(form, dtype):
    weight, total = thrice(dtype)
    if (form, dtype) in {("arrow", "g"), ("arrow", "?"), ("networkx", "?")} or (
        dtype == "e" and form in {"coo", "csr", "csc", "bsr", "matrix"}
    ):
        pytest.skip("that library has no such numbers")
    assert as_graph(FORMS[form](weight)).weights.max() == total


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize(
    "dtype", ["bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64"]
)
def test_weights_of_every_type_of_torch_are_added_as_wide_numbers(dtype):
    one = 1 if dtype == "bool" else 100
    weight = torch.full((3,), one, dtype=getattr(torch, dtype))
    matrix = torch.sparse_coo_tensor([[0] * 3, [1] * 3], weight, (2, 2))
    assert as_graph(matrix).weights.max() == 3 * one
    matrix = torch.sparse_csr_tensor([0, 3, 3], [1] * 3, weight, (2, 2), check_invariants=False)
    assert as_graph(matrix).weights.max() == 3 * one


def test_entries_that_are_no_numbers_are_refused():
    with pytest.raises(InputError, match="real numbers, not complex"):
        as_graph(coo_array(([1j], ([0], [1])), shape=(2, 2)))
    with pytest.raises(InputError, match="square"):
        as_graph(coo_array(np.ones((2, 3))))
    # Of entries given twice the sum counts.
    matrix = coo_array(([3, -1], ([0, 0], [1, 1])), shape=(2, 2))
    assert as_graph(matrix).weights.tolist() == [2]
    assert as_graph(lil_array([[0, 3], [0, 0]])).weights.tolist() == [3]


@pytest.mark.parametrize("kind", [networkx.MultiDiGraph, networkx.MultiGraph])
def test_parallel_edges_count_as_many_as_they_are(kind):
    parallel = kind([(0, 1), (0, 1), (0, 2), (1, 0), (2, 0), (2, 2), (2, 2)])
    expected = networkx.pagerank(parallel, tol=1e-13, max_iter=1000)
    found = PageRank(tol=1e-12).scores(parallel)
    assert np.allclose(found, [expected[node] for node in range(3)], atol=1e-9)
    assert as_graph(kind([(0, 1), (1, 2)])).weights is None
    assert from_networkx(parallel, weight=None).weights is None


def test_parallel_edges_of_igraph_count_too():
    igraph = pytest.importorskip("igraph")
    assert as_graph(igraph.Graph([(0, 1), (1, 0), (1, 2)])).edges()[2].tolist() == [2, 1]
    assert as_graph(igraph.Graph([(0, 1), (1, 0), (1, 2)], directed=True)).weights is None


def test_a_weight_beyond_all_numbers_is_refused():
    with pytest.raises(InputError, match=r"edge \(0, 1\) has a weight of 33,220 bits"):
        as_graph(networkx.Graph([(0, 1, {"weight": 10**10_000})]))


def test_a_graph_without_edges_keeps_its_weights():
    empty = Graph.from_edges([], [], [], num_nodes=2)
    assert as_graph(empty) is empty
