"""Entries have the moments they should, keep distances, and belong to their node and column alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.graph.projection import BLOCK, gaussian_rows, key_of, keys_of, sparse_rows


def dense(keys, first, last, s=3.0, seed=0, kind="sparse"):
    keys = np.asarray(keys, np.uint64)
    if kind == "gaussian":
        return gaussian_rows(keys, first, last, seed, np.float64)
    return sparse_rows(keys, first, last, s, seed).to_scipy().toarray()


@pytest.mark.parametrize("s", [1.0, 2.0, 3.5, 32.0, 1000.0])
def test_sparse_moments(s):
    found = dense(np.arange(4000), 0, 96, s, seed=5)
    count = found.size
    assert set(np.unique(found)) <= {-np.sqrt(s), 0.0, np.sqrt(s)}
    assert abs(found.mean()) < 4 * np.sqrt(1 / count)
    assert abs((found**2).mean() - 1) <= 4 * np.sqrt((s - 1) / count)  # E x^4 = s
    assert abs((found != 0).mean() - 1 / s) <= 4 * np.sqrt((1 - 1 / s) / s / count)
    assert abs((found**2).mean(0) - 1).max() <= 5 * np.sqrt((s - 1) / 4000)  # column by column, ends of blocks too


def test_entries_are_not_tied():
    found = dense(np.arange(20000), 0, 64, s=1.0)
    product = found.T @ found / 20000
    assert np.abs(product - np.eye(64)).max() < 5.5 / np.sqrt(20000)
    filled = (dense(np.arange(20000), 0, 64, s=2.0) != 0) - 0.5
    assert np.abs(4 * filled.T @ filled / 20000 - np.eye(64)).max() < 5.5 / np.sqrt(20000)


def test_gaussian_moments():
    found = dense(np.arange(4000), 0, 64, kind="gaussian")
    count = found.size
    assert abs(found.mean()) < 4 / np.sqrt(count)
    assert abs((found**2).mean() - 1) < 4 * np.sqrt(2 / count)
    assert abs((found**4).mean() - 3) < 4 * np.sqrt(96 / count)
    assert np.abs(found.T @ found / 4000 - np.eye(64)).max() < 5.5 * np.sqrt(2 / 4000)


@pytest.mark.parametrize("kind", ["sparse", "gaussian"])
def test_a_row_depends_on_its_key_and_a_column_on_its_number(kind):
    whole = dense([7, 8, 9, 10], 0, 100, kind=kind)
    assert np.array_equal(dense([9, 7], 0, 100, kind=kind), whole[[2, 0]])
    assert np.array_equal(dense([7, 8, 9, 10], 64, 100, kind=kind), whole[:, 64:])
    assert np.array_equal(dense([7, 8, 9, 10], 0, 43, kind=kind), whole[:, :43])
    assert not np.array_equal(dense([7, 8, 9, 10], 0, 100, seed=1, kind=kind), whole)
    assert not np.array_equal(whole[0], whole[1])
    assert not np.array_equal(whole[:, :BLOCK], whole[:, BLOCK : 2 * BLOCK])


@given(st.integers(0, 2**63), st.floats(1, 1e4), st.integers(1, 150))
def test_columns_stay_in_their_range(seed, s, columns):
    rows = sparse_rows(np.arange(20, dtype=np.uint64), 32, 32 + columns, s, seed)
    assert rows.to_scipy().shape == (20, columns)
    assert not rows.place_E.size or rows.place_E.max() < 2 * columns
    for first, last in zip(rows.indptr[:-1], rows.indptr[1:], strict=True):
        assert (np.diff(rows.place_E[first:last] >> 1) > 0).all()  # rising: no place twice


def test_distances_are_kept():
    # Johnson and Lindenstrauss: with 512 columns squared distances are off by sqrt(2 / 512) = 6%, so by 15% at most in 98% of pairs
    generator = np.random.default_rng(0)
    x_MN = generator.normal(size=(60, 1000))
    for kind in ("sparse", "gaussian"):
        y_MD = x_MN @ dense(np.arange(1000), 0, 512, s=32.0, kind=kind) / np.sqrt(512)
        left, right = np.triu_indices(60, 1)
        before, after = (((of[left] - of[right]) ** 2).sum(1) for of in (x_MN, y_MD))
        assert (np.abs(after / before - 1) < 0.15).mean() > 0.95


def test_keys():
    assert key_of(7) == key_of(np.int32(7)) == 7
    assert key_of(-1) == 2**64 - 1
    assert key_of("a") == int.from_bytes(__import__("hashlib").blake2b(b"a", digest_size=8).digest(), "little")
    assert key_of("7") != 7
    assert keys_of(["a", 3]).tolist() == [key_of("a"), 3]
    assert keys_of(np.array([-1, 5])).tolist() == [2**64 - 1, 5]
    assert keys_of(np.array([5], np.uint8)).dtype == np.uint64
    assert len(set(keys_of([f"node {i}" for i in range(5000)]).tolist())) == 5000


def test_no_rows():
    assert dense([], 0, 10).shape == (0, 10)
    assert dense([], 0, 10, kind="gaussian").shape == (0, 10)
