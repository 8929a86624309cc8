import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from anabranch.studies.paired import Estimate, estimate, paired_difference, t_probability, t_quantile, verdict_below


def test_paired_difference_by_hand():
    # Differences 0.1, 0.3, 0.2: mean 0.2, deviation 0.1, t_0.975(2) = 4.3027, half width 4.3027 * 0.1 / sqrt(3) = 0.24842.
    difference = paired_difference({0: 1.1, 1: 1.3, 2: 1.2, 9: 5.0}, {0: 1.0, 1: 1.0, 2: 1.0, 7: 5.0})
    assert difference.count == 3
    assert difference.mean == pytest.approx(0.2)
    assert difference.half_width == pytest.approx(0.24842, abs=1e-5)
    assert difference.interval == pytest.approx([-0.04842, 0.44842], abs=1e-5)


def test_one_seed_has_no_interval():
    only = paired_difference({0: 1.0}, {0: 2.0})
    assert (only.mean, only.half_width, only.interval) == (-1.0, math.inf, None)
    assert verdict_below(only) == "not resolved"


def test_nothing_in_common():
    nothing = paired_difference({0: 1.0}, {1: 2.0})
    assert math.isnan(nothing.mean)
    assert nothing.count == 0
    assert nothing.interval is None
    assert verdict_below(nothing) == "not resolved"


@pytest.mark.parametrize(
    ("mean", "half_width", "limit", "expected"),
    [
        (-0.2, 0.1, 0.0, "holds"),
        (0.2, 0.1, 0.0, "does not hold"),
        (-0.2, 0.3, 0.0, "not resolved"),
        (-0.1, 0.1, 0.0, "not resolved"),  # the interval ends at zero
        (0.2, 0.1, 0.5, "holds"),
        (0.7, 0.1, 0.5, "does not hold"),
    ],
)
def test_verdict(mean, half_width, limit, expected):
    assert verdict_below(Estimate(mean, half_width, 3), limit) == expected


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 8, 9, 30])
@pytest.mark.parametrize("probability", [0.5, 0.9, 0.975, 0.995])
def test_quantile_equals_scipy(degrees, probability):
    assert t_quantile(probability, degrees) == pytest.approx(stats.t.ppf(probability, degrees), rel=1e-9, abs=1e-9)


@given(st.floats(0, 50), st.integers(1, 40))
def test_probability_equals_scipy(t, degrees):
    assert t_probability(t, degrees) == pytest.approx(stats.t.cdf(t, degrees), abs=1e-12)


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=8))
def test_interval_equals_scipy(values):
    found = estimate(values)
    half = stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)
    assert found.half_width == pytest.approx(half, rel=1e-6, abs=1e-9)


def test_interval_covers_the_truth_as_often_as_it_says():
    import numpy as np

    generator = np.random.default_rng(0)
    covered = [abs(estimate(row).mean) <= estimate(row).half_width for row in generator.normal(size=(2000, 3)).tolist()]
    assert 0.935 < sum(covered) / 2000 < 0.965  # 95% +- 3 standard errors
