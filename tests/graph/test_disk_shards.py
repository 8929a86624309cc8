"""Shards: centres by k-means, and which two each vector goes to where each holds so many at most."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.graph.disk import shards
from anabranch.graph.disk.shards import assigned, centres_of
from anabranch.graph.disk.source import Rows


def drawn(count, dim=3, seed=0):
    return np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)


def far(vectors, centres):
    return ((vectors[:, None].astype(np.float64) - centres.astype(np.float64)) ** 2).sum(2)


def test_centres_are_the_means_of_what_is_near():
    corner = np.array([[0, 0], [100, 0], [0, 100]], np.float32)
    sample = np.concatenate([corner[number] + drawn(40, 2, number) for number in range(3)])
    found = centres_of(sample, 3, seed=1)
    order = np.argsort(far(corner, found), 1)[:, 0]
    assert sorted(order.tolist()) == [0, 1, 2]
    means = np.stack([sample[number * 40 : number * 40 + 40].mean(0, dtype=np.float64) for number in range(3)])
    np.testing.assert_allclose(found[order], means, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found, centres_of(sample, 3, seed=1))


def test_a_centre_that_is_nearest_to_nothing_goes_to_a_vector():
    # All vectors are equal: the first centre is nearest to all.
    sample = np.full((20, 4), 3, np.float32)
    np.testing.assert_array_equal(centres_of(sample, 5, seed=0), np.full((5, 4), 3, np.float32))
    # More centres than vectors.
    few = drawn(3)
    found = centres_of(few, 7, seed=0)
    assert found.shape == (7, 3)
    assert np.isfinite(found).all()
    assert far(few, found).min(1).max() < 1e-9


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([1e-12, 1.0, 1e12]))
def test_squares_order_centres_as_distances_do(seed, scale):
    vectors, centres = scale * drawn(8, seed=seed), scale * drawn(5, seed=seed + 1)
    np.testing.assert_array_equal(
        np.argsort(shards._squares(vectors, centres), 1), np.argsort(far(vectors, centres), 1)
    )


@pytest.mark.parametrize("piece", [1, 7, 10_000])
def test_with_room_for_all_a_vector_goes_to_the_two_nearest(piece, monkeypatch):
    monkeypatch.setattr(shards, "STEP", 16)
    vectors, centres = drawn(50), drawn(4, seed=1)
    found = assigned(Rows(vectors, "l2"), centres, 100, piece)
    np.testing.assert_array_equal(found, np.argsort(far(vectors, centres), 1)[:, :2])
    assert found.dtype == np.int16


def one_by_one(order_NC, most):
    """What `_assign` does, row by row: first choices of all by rank, then second ones."""
    room, found = [most] * order_NC.shape[1], np.full((len(order_NC), 2), -1)
    for which in range(2):
        for rank in range(order_NC.shape[1]):
            for row, wish in enumerate(order_NC[:, rank].tolist()):
                if found[row, which] < 0 and wish != found[row, 0] and room[wish]:
                    found[row, which], room[wish] = wish, room[wish] - 1
    return found


@settings(max_examples=80, deadline=None)
@given(count=st.integers(1, 30), centres=st.integers(2, 6), extra=st.integers(0, 20), seed=st.integers(0, 10**6))
def test_what_comes_later_goes_where_there_is_room(count, centres, extra, seed):
    vectors, centre_CD = drawn(count, seed=seed), drawn(centres, seed=seed + 1)
    # As plans have it: room for all, twice.
    most = -(-2 * count // centres) + extra
    found = assigned(Rows(vectors, "l2"), centre_CD, most, count)
    np.testing.assert_array_equal(found, one_by_one(np.argsort(far(vectors, centre_CD), 1, kind="stable"), most))
    assert np.bincount(found[found >= 0], minlength=centres).max() <= most
    assert (found[:, 0] >= 0).all()
    assert (found[:, 0] != found[:, 1]).all()
