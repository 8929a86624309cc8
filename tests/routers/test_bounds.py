"""Bounds of a mean: against the exact ones where there are some, against draws, and their coverage where it is only conjectured."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta

from anabranch.routers.referee.bounds import BINS, MOST, Binned, in_parts, tail

VALUES = st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.25, 1.0]), min_size=1, max_size=40).map(np.array)


@pytest.mark.parametrize("level", [0.025, 1e-3, 1e-6])
@pytest.mark.parametrize(("won", "num"), [(1, 1), (5, 5), (3, 10), (1, 200), (980, 1000), (1000, 1000), (5000, 10_000)])
def test_of_two_values_it_is_that_of_clopper_and_pearson(won, num, level):
    found = Binned.of(np.resize([1.0] * won + [0.0] * (num - won), num)).lower(level, 0.0)
    assert found == pytest.approx(beta.ppf(level, won, num - won + 1), rel=1e-6)


def test_of_equal_values_it_is_what_none_may_have_shown():
    # Of 5 that all gained 1: with 1 - 0.025 ** (1/5) = 0.52 of others that lose 1, five like these come once in 40 times.
    five, six = (Binned.of(np.ones(num)).lower(0.025, -1.0) for num in (5, 6))
    assert five == pytest.approx(1 - 2 * (1 - 0.025**0.2))
    assert five < 0 < six  # as the sign test has it
    assert Binned.of(np.ones(5)).p(0.0, -1.0) == pytest.approx(0.5**5)


def test_of_many_it_is_the_normal_one():
    value = np.random.default_rng(0).normal(0.1, 0.2, MOST)
    found = Binned.of(value).lower(0.05, -1.0)
    assert found == pytest.approx(value.mean() - 1.645 * value.std() / np.sqrt(MOST), abs=3e-4)


@given(VALUES, st.floats(-0.9, 0.9))
@settings(max_examples=40, deadline=None)
def test_a_tail_is_as_often_as_drawn(value, point):
    draws = np.random.default_rng(0).standard_exponential((4000, len(value) + 1))
    share = float((draws @ (np.append(value, -1.0) - point) <= 0).mean())
    assert Binned.of(value).p(point, -1.0) == pytest.approx(share, abs=0.04)


@given(VALUES, st.floats(1e-6, 0.4))
@settings(max_examples=60, deadline=None)
def test_a_bound_is_below_the_mean_and_falls_with_doubt(value, level):
    bound = Binned.of(value).lower(level, -1.0)
    assert -1 - 1e-9 <= bound <= value.mean() + 1e-9
    assert Binned.of(value).lower(level / 2, -1.0) <= bound + 1e-7
    assert Binned.of(value).lower(level, -2.0) <= bound + 1e-7
    assert bound <= Binned.of(np.append(value, 1.0)).lower(level, -1.0) + 1e-7
    assert Binned.of(3 * value + 2).lower(level, -1.0) == pytest.approx(3 * bound + 2, abs=1e-6)
    if bound > -1 + 1e-6:
        assert Binned.of(value).p(bound, -1.0) == pytest.approx(level, rel=1e-3)


def test_tails_of_one_sign_are_sure():
    assert tail(np.array([1.0, 2.0]), np.ones(2)) == 0
    assert tail(np.array([-1.0, -2.0]), np.ones(2)) == 1
    assert tail(np.array([0.0]), np.ones(1)) == 1
    assert tail(np.array([1.0, -3.0]), np.ones(2)) == pytest.approx(0.75)


@pytest.mark.parametrize("unit", [1e-308, 1e-300, 1e-160, 1.0, 1e160, 1e307])
def test_the_unit_of_the_values_does_not_matter(unit):
    assert tail(unit * np.array([1.0, -3.0]), np.ones(2)) == pytest.approx(0.75)
    assert tail(unit * np.array([1.0, -3.0, 1e-320, -1e-320]), np.ones(4)) == pytest.approx(0.75)
    assert tail(np.array([unit, -5e-324]), np.ones(2)) == pytest.approx(0, abs=1e-9)
    assert tail(np.array([-unit, 5e-324]), np.ones(2)) == pytest.approx(1)


def test_bins_and_parts_keep_the_mean_and_about_the_variance():
    value = np.random.default_rng(0).lognormal(size=5000)
    binned = Binned.of(value)
    assert len(binned.value_K) <= BINS
    assert binned.mean == pytest.approx(value.mean())
    assert binned.count_K @ (binned.value_K - binned.mean) ** 2 == pytest.approx(value.var() * 5000, rel=0.01)
    pairs = np.random.default_rng(0).random((3 * MOST + 5, 2))
    found = in_parts(pairs)
    assert found.shape == (MOST, 2)
    np.testing.assert_allclose(found.mean(0), pairs.mean(0))
    assert found[:, 0].var() == pytest.approx(1 / 12 / 3, rel=0.05)
    assert in_parts(pairs[:7]).tolist() == pairs[:7].tolist()


def drawn(kind, generator, size):
    """Values from 0 and above, and their true mean."""
    if kind == "rare":
        return (generator.random(size) < 0.98).astype(float), 0.98
    if kind == "three":
        return generator.choice([0.0, 0.9, 1.0], size, p=[0.03, 0.5, 0.47]), 0.92
    if kind == "uniform":
        return generator.random(size), 0.5
    return 1 - generator.beta(0.1, 5.0, size), 1 - 0.1 / 5.1


@pytest.mark.parametrize("kind", ["rare", "three", "uniform", "skewed"])
@pytest.mark.parametrize(
    ("times", "num"),
    [(300, 60), *(pytest.param(3000, num, marks=pytest.mark.slow) for num in (5, 20, 60, 300, 1000))],
)
def test_the_true_mean_is_below_a_bound_no_more_often_than_said(kind, times, num):
    """p at the true mean is at most the level once in 1 / level times."""
    generator, level = np.random.default_rng(1), 0.05
    p = []
    for _ in range(times):
        value, mean = drawn(kind, generator, num)
        p.append(Binned.of(value).p(mean, 0.0))
    assert np.mean(np.array(p) <= level) <= level + 3 * np.sqrt(level * (1 - level) / times)
