"""Whoever takes a matrix of scipy adds entries of one place in 64 bits, whatever type they come in."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import coo_array, coo_matrix, csc_array, csr_array

from anabranch.errors import InputError
from anabranch.graph import FastRP, Graph
from anabranch.graph.coerce import as_graph
from anabranch.graph.evaluate import _label_matrix
from anabranch.graph.sparse import is_sparse, wide_rows

SMALL = (np.bool_, np.uint8, np.int8, np.uint16, np.int32, np.uint64, np.float32)
RING = Graph.from_edges(np.arange(6), (np.arange(6) + 1) % 6)
ENTRIES = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 2), st.integers(0, 120)), max_size=30)


def compressed(make, entries, shape):
    """Rows or columns with places given twice, which scipy leaves as they are."""
    data, (row, column) = entries
    outer, inner = (row, column) if make is csr_array else (column, row)
    order = np.argsort(outer, kind="stable")
    indptr = np.append(0, np.cumsum(np.bincount(outer, minlength=shape[0 if make is csr_array else 1])))
    return make((data[order], inner[order], indptr), shape=shape)


@given(ENTRIES, st.sampled_from(SMALL), st.sampled_from(["array", "matrix", "csr", "csc"]))
@settings(max_examples=60, deadline=None)
def test_entries_of_one_place_are_added_wide(drawn, dtype, form):
    row, column, value = (np.array([entry[place] for entry in drawn], np.int64) for place in range(3))
    data, shape = value.astype(dtype), (6, 3)
    entries = data, (row, column)
    if form in ("array", "matrix"):
        matrix = {"array": coo_array, "matrix": coo_matrix}[form](entries, shape=shape)
    else:
        matrix = compressed({"csr": csr_array, "csc": csc_array}[form], entries, shape)
    before, exact = matrix.data.copy(), np.zeros(shape)
    np.add.at(exact, (row, column), data.astype(np.float64))
    found = wide_rows(matrix, "it")
    assert (found.format, found.dtype, found.has_canonical_format) == ("csr", np.float64, True)
    np.testing.assert_array_equal(found.toarray(), exact)
    # A copy.
    found.data[:] = -1
    np.testing.assert_array_equal(matrix.data, before)
    assert is_sparse(matrix)
    assert not is_sparse(exact)
    np.testing.assert_array_equal(wide_rows(exact.tolist(), "it").toarray(), exact)


@pytest.mark.parametrize(
    ("matrix", "said"),
    [
        (coo_array(np.eye(2) * 1j), "entries of it are real numbers, not complex128"),
        (np.ones(3), r"it has the shape \(3,\)"),
        ([[1], [1, 2]], "it is no matrix of numbers"),
        (coo_array(np.ones(3)), r"it has the shape \(3,\)"),
        (np.array([["a"]]), "real numbers, not <U1"),
    ],
)
def test_what_is_no_matrix_of_numbers(matrix, said):
    with pytest.raises(InputError, match=said):
        wide_rows(matrix, "it")


def by_graph(matrix):
    square = coo_array((matrix.data, (matrix.row, matrix.col)), shape=(6, 6))
    return as_graph(square).weights


def by_rows(matrix):
    rows = coo_array((matrix.data, (matrix.col, matrix.row)), shape=(3, 6))
    return FastRP(16, keep_powers=True, weights=(1, 1)).fit(RING).transform(rows)


def by_features(matrix):
    return FastRP(16, features=matrix, feature_ratio=0.5).fit_transform(RING)


def by_labels(matrix):
    return _label_matrix(matrix, 6)


@pytest.mark.parametrize("door", [by_graph, by_rows, by_features, by_labels])
@pytest.mark.parametrize("dtype", [np.uint8, np.int8])
def test_every_door_takes_bytes_as_it_takes_doubles(door, dtype):
    """200 + 100 were 44 in bytes, and 128 + 128 nothing."""
    value = np.array([100, 100, 64, 64, 64, 64, 1, 2, 3, 4], dtype)
    place = [0, 0, 1, 1, 1, 1, 2, 3, 4, 5], [0, 0, 1, 1, 1, 1, 2, 0, 1, 2]
    found, exact = (door(coo_array((value.astype(kind), place), shape=(6, 3))) for kind in (dtype, np.float64))
    np.testing.assert_allclose(found, exact, rtol=1e-6)
