"""The two curves: known values, exactness where numbers are tiny or huge, and what holds of all of them."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import InputError
from anabranch.test_time import TTSPM, BetaTTSPM

shares = st.floats(1e-6, 1.0)
ceilings = st.floats(0.01, 1.0)
thresholds = st.floats(1e-9, 0.5)
shapes = st.floats(0.05, 200.0)


# Known values


@pytest.mark.parametrize(
    ("f_max", "p", "eps", "n", "value"),
    [(0.8, 0.3, 0.01, 9, 0.767717), (1, 0.05, 0.01, 32, 0.806289), (0.6, 0.02, 0.005, 44, 0.353340)],
)
def test_known_values(f_max, p, eps, n, value):
    curve = TTSPM(kind="parallel", f_max=f_max, p=p)
    assert curve.saturation(eps) == n
    assert curve.value(n) == pytest.approx(value, abs=5e-7)
    assert curve.gain(n) <= eps < curve.gain(n - 1)


def test_known_gains_and_edges():
    curve = TTSPM("parallel", 0.8, 0.3)
    # 0.8 * 0.3 * 0.7^9, and of 8.
    assert curve.gain(9) == pytest.approx(0.009685, abs=5e-7)
    assert curve.gain(8) == pytest.approx(0.013836, abs=5e-7)
    assert TTSPM("sequential", 0.9, 0.9).saturation(0.001) == 3
    assert TTSPM("parallel", 0.5, 0.01).saturation(0.005) == 0
    assert isinstance(curve.saturation(0.01), int)
    assert isinstance(curve.value(3), float)


@pytest.mark.parametrize(
    ("a", "b", "values", "n"),
    [(0.5, 1.5, {1: 0.25, 8: 0.629059, 64: 0.860311}, 13), (2, 6, {8: 0.8, 64: 0.991549}, 14)],
)
def test_known_values_of_the_mixture(a, b, values, n):
    curve = BetaTTSPM(1, a, b)
    for at, value in values.items():
        assert curve.value(at) == pytest.approx(value, abs=5e-7)
    assert curve.saturation(0.01) == n
    assert curve.mean == pytest.approx(0.25)
    # Who takes all questions for alike stops earlier.
    assert TTSPM(p=0.25).saturation(0.01) == 12


def test_budget_is_the_saturation_at_price_over_worth():
    curve = TTSPM(f_max=0.8, p=0.3)
    assert curve.budget(v=2.0, c=0.02) == curve.saturation(0.01) == 9
    assert curve.budget(v=1e-3, c=1e300) == 0
    assert curve.budget(np.array([1.0, 100.0]), 0.01).tolist() == [curve.saturation(0.01), curve.saturation(1e-4)]


# Exactness


@pytest.mark.parametrize("p", [1e-12, 1e-9, 0.1])
@pytest.mark.parametrize("n", [1, 1000, 10**9])
def test_tiny_shares_of_many_samples_are_exact(p, n):
    # ln(1 - p) by its series, in exact fractions; 1 - exp(x) by math.expm1, which is exact to the last digit.
    exact = Fraction(p)
    log = -sum(exact**power / power for power in range(1, 400 if p > 0.01 else 6))
    wanted = -math.expm1(n * float(log)) if n * float(log) > -700 else 1.0
    assert TTSPM(p=p).value(n) == pytest.approx(wanted, rel=1e-12)
    if n * float(log) > -700:
        assert TTSPM(p=p).gain(n) == pytest.approx(p * math.exp(n * float(log)), rel=1e-12)


@pytest.mark.parametrize("n", [0, 1, 7, 31, 32, 33, 100, 1000])
@pytest.mark.parametrize(("a", "b"), [(1, 1), (2, 6), (3, 1), (1, 40), (50, 2), (20, 1000)])
def test_the_mixture_equals_exact_fractions(a, b, n):
    left = Fraction(1)
    for at in range(n):
        left *= Fraction(b + at, a + b + at)
    curve = BetaTTSPM(1, a, b)
    assert curve.value(n) == pytest.approx(float(1 - left), rel=1e-12)
    assert curve.gain(n) == pytest.approx(float(left * Fraction(a, a + b + n)), rel=1e-12)


@pytest.mark.parametrize(("a", "b"), [(1, 1), (2, 5), (3, 40)])
def test_the_mixture_is_exact_at_a_thousand_million(a, b):
    """For whole a, B(a, b + n) / B(a, b) is a product of a factors, whatever n."""
    n = 10**9
    left = Fraction(1)
    for at in range(a):
        left *= Fraction(b + at, b + n + at)
    curve = BetaTTSPM(1, a, b)
    assert curve.gain(n) == pytest.approx(float(left * Fraction(a, a + b + n)), rel=1e-12)
    assert curve.unsolved(n) == pytest.approx(float(left), rel=1e-12)


def test_the_mixture_becomes_one_p_as_its_shapes_grow():
    n = np.arange(60)
    for p in (0.02, 0.3, 0.9):
        wide = BetaTTSPM(0.8, p * 1e12, (1 - p) * 1e12)
        np.testing.assert_allclose(wide.value(n), TTSPM(f_max=0.8, p=p).value(n), rtol=1e-9)
        assert wide.saturation(0.003) == TTSPM(f_max=0.8, p=p).saturation(0.003)


def test_the_tail_is_a_power_law():
    curve = BetaTTSPM(1, 0.5, 1.5)
    slope = math.log(curve.unsolved(10**8) / curve.unsolved(10**6)) / math.log(100)
    assert slope == pytest.approx(-0.5, abs=1e-4)


# What holds of all


@given(f_max=ceilings, p=shares, eps=thresholds)
def test_properties_of_one_p(f_max, p, eps):
    holds(TTSPM(f_max=f_max, p=p), eps)


@given(f_max=ceilings, a=shapes, b=shapes, eps=st.floats(1e-4, 0.5))
def test_properties_of_the_mixture(f_max, a, b, eps):
    curve = BetaTTSPM(f_max, a, b)
    holds(curve, eps)
    # By Jensen: questions that differ are solved later than alike ones.
    n = np.arange(1, 40)
    assert (curve.value(n) <= TTSPM(f_max=f_max, p=curve.mean).value(n) + 1e-12).all()


def holds(curve, eps):
    n = np.arange(64)
    value, gain = curve.value(n), curve.gain(n)
    assert value[0] == 0
    assert (np.diff(value) >= 0).all()
    assert (np.diff(gain) <= 0).all()
    assert (value <= curve.f_max).all()
    np.testing.assert_allclose(np.diff(curve.value(np.arange(65))), gain, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(curve.unsolved(n), 1 - value, rtol=1e-9, atol=1e-15)
    stop = curve.saturation(eps)
    assert curve.gain(stop) <= eps
    assert stop == 0 or curve.gain(stop - 1) > eps
    assert curve.saturation(eps * 2) <= stop
    assert (stop == 0) == (curve.gain(0) <= eps)


@pytest.mark.parametrize("p", [0.01, 0.1, 0.3, 0.37, 0.7, 0.95])
def test_a_threshold_that_is_a_gain_is_reached_there(p):
    """Rounding moves the closed form across a whole number, one way or the other."""
    curve = TTSPM(f_max=0.8, p=p)
    n = np.arange(200)[curve.gain(np.arange(200)) > 1e-200]
    assert (curve.saturation(curve.gain(n)) == n).all()
    many = 10**9 + np.arange(2000)
    few = TTSPM(p=1e-8 * p)
    assert (few.saturation(few.gain(many)) == many).all()


@given(f_max=ceilings, eps=st.floats(1e-6, 0.9))
def test_a_certain_sample_is_enough(f_max, eps):
    assert TTSPM(f_max=f_max, p=1).saturation(eps) == (1 if eps < f_max else 0)
    assert TTSPM(f_max=f_max, p=1).value(5) == f_max


def test_the_saturation_point_rises_and_then_falls_with_p():
    f_max, eps = 0.8, 0.001
    p = np.geomspace(1e-4, 1, 4001)
    stop = TTSPM(f_max=f_max, p=p).saturation(eps)
    best = p[stop == stop.max()]
    # To first order in p the maximum is where f_max p = e eps.
    peak = math.e * eps / f_max
    assert best.min() * 0.95 < peak < best.max() * 1.05
    low, high = p < 0.8 * best.min(), p > 1.2 * best.max()
    assert (np.diff(stop[low]) >= 0).all()
    assert (np.diff(stop[high]) <= 0).all()


def test_arrays_go_through_at_once():
    p = np.array([0.1, 0.3, 0.9])
    many = TTSPM(f_max=0.8, p=p)
    n = np.array([[1], [5]])
    assert many.value(n).shape == (2, 3)
    assert many.value(n)[1, 1] == TTSPM(f_max=0.8, p=0.3).value(5)
    assert many.saturation(0.01).tolist() == [TTSPM(f_max=0.8, p=one).saturation(0.01) for one in p]
    mixed = BetaTTSPM(0.8, np.array([0.5, 2.0]), np.array([1.5, 6.0]))
    eps = np.array([[0.02], [0.001]])
    assert mixed.saturation(eps).shape == (2, 2)
    assert mixed.saturation(eps)[1, 0] == BetaTTSPM(0.8, 0.5, 1.5).saturation(0.001)


@given(f_max=ceilings, a=shapes, b=shapes, failures=st.integers(0, 50))
def test_what_failures_leave_is_bayes_rule(f_max, a, b, failures):
    curve = BetaTTSPM(f_max, a, b)
    later = curve.after(failures)
    assert later.gain(0) == pytest.approx(curve.gain(failures) / curve.unsolved(failures), rel=1e-9)
    assert later.gain(0) == pytest.approx(curve.hazard(failures), rel=1e-9)
    assert later.gain(7) == pytest.approx(curve.gain(failures + 7) / curve.unsolved(failures), rel=1e-9)


def test_gains_in_one_look_are_those_one_by_one():
    for curve in (TTSPM(f_max=0.8, p=0.3), BetaTTSPM(0.8, 0.5, 1.5)):
        assert curve.gains(3, 40) == pytest.approx(curve.gain(3 + np.arange(40)), rel=1e-12)
        assert curve.gains(3, 40, failed=True) == pytest.approx(
            curve.gain(3 + np.arange(40)) / curve.unsolved(3), rel=1e-12
        )
        assert curve.gains(3, 0).shape == (0,)


# What is refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TTSPM(p=0.0), r"p is 0; it must be above 0 and at most 1"),
        (lambda: TTSPM(p=1.5), r"p is 1\.5"),
        (lambda: TTSPM(p=math.nan), r"p is nan"),
        (lambda: TTSPM(f_max=0, p=0.5), r"f_max is 0"),
        (lambda: TTSPM(f_max=1.0001, p=0.5), r"f_max is 1\.0001"),
        (lambda: TTSPM(p=[0.1, -0.2]), r"p\[1\] is -0\.2"),
        (lambda: TTSPM(kind="both", p=0.5), r"kind is 'both'; it must be one of parallel, sequential"),
        (lambda: TTSPM(p="x"), r"p is 'x'; it must be a number"),
        (lambda: BetaTTSPM(1, 0, 1), r"a is 0; it must be a finite number above 0"),
        (lambda: BetaTTSPM(1, 1, math.inf), r"b is inf"),
        (lambda: BetaTTSPM(1, 1), r"b is missing: give a and b, or none"),
        (lambda: TTSPM(p=0.5).saturation(0), r"eps is 0; it must be a finite number above 0"),
        (lambda: TTSPM(p=0.5).saturation(-1), r"eps is -1"),
        (lambda: TTSPM(p=0.5).saturation(math.nan), r"eps is nan"),
        (lambda: TTSPM(p=1e-15).saturation(1e-300), r"more than 2\^53 samples gain more"),
        (lambda: BetaTTSPM(1, 0.01, 1).saturation(1e-30), r"more than 2\^53 samples gain more"),
        (lambda: TTSPM(p=0.5).value(-1), r"n is -1; it must be a whole number from 0"),
        (lambda: TTSPM(p=0.5).value(1.5), r"n is 1\.5"),
        (lambda: TTSPM(p=0.5).value([1, math.nan]), r"n\[1\] is nan"),
        (lambda: TTSPM(p=0.5).budget(v=0, c=1), r"v is 0"),
        (lambda: TTSPM(p=0.5).budget(v=1, c=0), r"c is 0"),
        (lambda: TTSPM().value(1), r"TTSPM has no parameters yet: give p, or fit"),
        (lambda: BetaTTSPM().saturation(0.1), r"BetaTTSPM has no parameters yet: give a and b, or fit"),
    ],
)
def test_what_is_no_curve_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_it_says_what_it_is():
    assert repr(TTSPM(p=0.5)) == "TTSPM(kind='parallel', f_max=1.0, p=0.5)"
    assert repr(BetaTTSPM(0.9, 1, 2)) == "BetaTTSPM(kind='parallel', f_max=0.9, a=1.0, b=2.0)"
    assert repr(TTSPM("sequential")) == "TTSPM(kind='sequential', not fitted)"
