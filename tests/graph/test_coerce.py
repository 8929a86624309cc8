import numpy as np
import pytest
import torch
from scipy.sparse import coo_array, coo_matrix, csr_array, csr_matrix

from anabranch.errors import DataError, InputError
from anabranch.graph import Graph
from anabranch.graph.coerce import as_graph

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
