"""All makers of products give what dense algebra gives, and threads and chunks change no bit."""

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import random_array

from anabranch.errors import BackendError
from anabranch.graph.products import NumbaProducts, Operator, ScipyProducts, TorchProducts, ranges
from anabranch.graph.projection import sparse_rows
from anabranch.graph.vectors import add_rows, column_moments, scale_rows, shift_columns
from anabranch.graph.workers import Workers


def operator(seed=0, nodes=70, weighted=True, dtype=np.float32, ids=np.int32):
    generator = np.random.default_rng(seed)
    matrix = random_array((nodes, nodes), density=0.1, rng=generator, format="csr")
    left_N = generator.random(nodes).astype(dtype)
    left_N[0] = 0
    value_M = matrix.data.astype(dtype) if weighted else np.empty(0, dtype)
    return Operator(matrix.indptr.astype(np.int64), matrix.indices.astype(ids), value_M, left_N)


def makers(of, pool):
    return {"numba": NumbaProducts(of, pool), "scipy": ScipyProducts(of), "torch": TorchProducts(of, "cpu")}


def written(products, chunk, nodes, columns, dtype=np.float32):
    out_ND = np.full((nodes, columns), np.nan, dtype)
    products.add_to(chunk, out_ND, 0, 1.0, True)
    return out_ND


@pytest.mark.parametrize("maker", ["numba", "scipy", "torch"])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("ids", [np.int32, np.int64])
@pytest.mark.parametrize("columns", [1, 32, 45])
def test_products_are_those_of_dense_matrices(maker, weighted, dtype, ids, columns):
    of = operator(weighted=weighted, dtype=dtype, ids=ids)
    start_NC = np.random.default_rng(1).normal(size=(70, columns)).astype(dtype)
    matrix = of.left_N[:, None].astype(float) * of.to_scipy().toarray()
    tolerance = 1e-5 if dtype == np.float32 else 1e-13
    with Workers(2) as pool:
        products = makers(of, pool)[maker]
        chunk = products.multiply(products.load(start_NC.copy()))
        assert written(products, chunk, 70, columns, dtype) == pytest.approx(matrix @ start_NC, abs=tolerance)
        chunk = products.multiply(products.multiply(chunk))
        assert written(products, chunk, 70, columns, dtype) == pytest.approx(
            np.linalg.matrix_power(matrix, 3) @ start_NC, abs=tolerance
        )


@pytest.mark.parametrize("maker", ["numba", "scipy", "torch"])
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("s", [1.0, 4.0, 50.0])
def test_the_first_product_of_sparse_rows(maker, weighted, s):
    of = operator(weighted=weighted)
    rows = sparse_rows(np.arange(70, dtype=np.uint64), 0, 45, s, 3)
    scale_N = np.random.default_rng(1).random(70).astype(np.float32)
    expected = of.left_N[:, None] * (of.to_scipy().toarray() @ (scale_N[:, None] * rows.to_scipy().toarray()))
    with Workers(2) as pool:
        products = makers(of, pool)[maker]
        found = written(products, products.first(rows, scale_N), 70, 45)
    assert found == pytest.approx(expected, abs=1e-5)


def test_adding_to_some_columns():
    of = operator()
    start_NC = np.random.default_rng(1).normal(size=(70, 40)).astype(np.float32)
    with Workers(1) as pool:
        for name, products in makers(of, pool).items():
            out_ND = np.ones((70, 90), np.float32)
            products.add_to(products.load(start_NC), out_ND, 32, 2.0, False)
            products.add_to(products.load(start_NC), out_ND, 32, 0.5, False)
            assert out_ND[:, 32:72] == pytest.approx(1 + 2.5 * start_NC, abs=1e-5), name
            assert (out_ND[:, :32] == 1).all(), name
            assert (out_ND[:, 72:] == 1).all(), name


@given(st.integers(0, 2**16), st.integers(1, 4), st.booleans())
def test_threads_change_no_bit(seed, count, weighted):
    of = operator(seed, weighted=weighted)
    start_NC = np.random.default_rng(seed).normal(size=(70, 64)).astype(np.float32)
    found = []
    for number in (1, count):
        with Workers(number) as pool:
            products = NumbaProducts(of, pool)
            found.append(written(products, products.multiply(products.load(start_NC)), 70, 64))
    assert np.array_equal(*found)


def test_an_error_in_a_thread_is_raised():
    with Workers(2) as pool, pytest.raises(ZeroDivisionError):
        pool.each(lambda number: 1 / number, [(1,), (0,), (2,)])


def test_ranges_cover_all():
    assert ranges(5, 2) == [(0, 2), (2, 5)]
    assert ranges(2, 5) == [(0, 1), (1, 2)]
    assert ranges(0, 3) == []


def test_torch_that_is_not_there(monkeypatch):
    with pytest.raises(BackendError, match="device 'cuda:99' is not available"):
        TorchProducts(operator(), "cuda:99")
    with pytest.raises(BackendError, match="device 'gpu'"):
        TorchProducts(operator(), "gpu")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(BackendError, match=r"pip install 'anabranch\[lm\]'"):
        TorchProducts(operator(), "cpu")


# Rows and columns


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_and_columns_by_numpy(count, dtype):
    generator = np.random.default_rng(0)
    x_ND, y_ND = generator.normal(2, 1, (2, 9000, 37)).astype(dtype)
    x_ND[5] = 0
    norm_N1 = np.maximum(np.linalg.norm(x_ND.astype(float), axis=1, keepdims=True), 1e-30)
    with Workers(count) as pool:
        out_ND = x_ND.copy()
        scale_rows(out_ND, 3.0, True, pool)
        np.testing.assert_allclose(out_ND, 3 * x_ND / norm_N1, atol=1e-5, rtol=1e-5)
        scale_rows(out_ND, 2.0, False, pool)
        np.testing.assert_allclose(out_ND, 6 * x_ND / norm_N1, atol=1e-5, rtol=1e-5)
        out_ND = y_ND.copy()
        add_rows(out_ND, x_ND, -2.0, True, pool)
        np.testing.assert_allclose(out_ND, y_ND - 2 * x_ND / norm_N1, atol=1e-5, rtol=1e-5)
        x_ND[:, 3] = 7.3
        mean_D, factor_D = column_moments(x_ND, pool)
        assert mean_D == pytest.approx(x_ND.mean(0, dtype=float))
        assert np.delete(factor_D, 3) == pytest.approx(1 / np.delete(x_ND.std(0, dtype=float), 3))
        assert factor_D[3] == 0
        shift_columns(x_ND, mean_D, factor_D, pool)
        np.testing.assert_allclose(np.delete(x_ND, 3, 1).std(0), np.ones(36), atol=1e-4, rtol=1e-5)
        assert abs(x_ND.mean(0)).max() < 1e-5
        assert (x_ND[:, 3] == 0).all()


def test_tiny_and_huge_rows_have_their_length():
    with Workers(1) as pool:
        x_ND = np.array([[3e-30, 4e-30], [3e30, 4e30]], np.float32)
        scale_rows(x_ND, 1.0, True, pool)
        assert x_ND == pytest.approx(np.array([[0.6, 0.8], [0.6, 0.8]]), abs=1e-6)


def test_no_rows_at_all():
    with Workers(2) as pool:
        x_ND = np.empty((0, 3), np.float32)
        mean_D, factor_D = column_moments(x_ND, pool)
        shift_columns(x_ND, mean_D, factor_D, pool)
        assert factor_D.tolist() == [0, 0, 0]
