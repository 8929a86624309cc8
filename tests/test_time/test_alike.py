"""Outcomes that are all the same: bounds that hold for whatever made them, however samples of one question go together."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.test_time import TTSPM, BetaTTSPM
from anabranch.test_time.alike import Alike


def test_the_rule_of_three_is_of_questions():
    """100 questions of eight samples each: 3 / 100 of all questions may be solved, and not 3 / 800 of all samples be right."""
    told = BetaTTSPM().fit(np.zeros((100, 8), int)).interval(eps=0.01)
    edge = 1 - 0.05 ** (1 / 100)
    assert told["mean"] == (1e-12, pytest.approx(edge))
    assert edge == pytest.approx(0.0295, abs=1e-4)
    assert (told["f_max"], told["a"], told["b"], told["rho"]) == ((1e-12, 1.0), (0, math.inf), (0, math.inf), (0, 1))
    # gain(n) <= 0.0295 / (n + 1) within eight.
    assert told["saturation"] == (0.0, 2.0)
    # Beyond what was looked at, gain(n) <= 1 / (n + 1) alone is known.
    assert TTSPM().fit(np.zeros((100, 8), int)).interval(eps=0.002)["saturation"] == (0.0, 499.0)
    assert TTSPM(f_max=0.5).fit(np.zeros((100, 8), int)).interval(eps=0.002)["saturation"] == (0.0, 249.0)


def test_a_known_ceiling_leaves_room_for_a_larger_chance():
    """f (1 - (1 - p)^8) = 0.0295 of f = 0.05, and f mean = 0.0295; and none that is known to be lower."""
    edge, none = 1 - 0.05 ** (1 / 100), np.zeros((100, 8), int)
    assert TTSPM(f_max=0.05).fit(none).interval()["p"][1] == pytest.approx(1 - (1 - edge / 0.05) ** (1 / 8))
    assert BetaTTSPM(0.05).fit(none).interval()["mean"][1] == pytest.approx(edge / 0.05)
    assert BetaTTSPM(0.01).fit(none).interval()["mean"][1] == 1.0


def test_of_nothing_but_right_answers():
    told = BetaTTSPM().fit(np.ones((20, 4), int)).interval(eps=0.05)
    least = 0.05 ** (1 / 20)
    assert (told["f_max"], told["mean"]) == ((pytest.approx(least), 1.0), (pytest.approx(least), 1.0))
    # gain(n) <= (1 - 0.861) / n.
    assert told["saturation"] == (1.0, 3.0)


def test_bands_are_bounds_too():
    low_N, high_N = BetaTTSPM().fit(np.zeros((100, 8), int)).band([0, 1, 8, 16, 1000])
    edge = 1 - 0.05 ** (1 / 100)
    assert low_N.tolist() == [0] * 5
    assert high_N == pytest.approx([0, edge, edge, 2 * edge, 1.0])
    low_N, high_N = TTSPM().fit(np.ones((100, 8), int)).band([0, 1, 8])
    assert low_N == pytest.approx([0, 1 - edge, 1 - edge])
    assert high_N.tolist() == [0, 1, 1]


@given(
    st.floats(0.01, 1),
    st.floats(0.05, 20),
    st.floats(0.05, 20),
    st.integers(1, 400),
    st.integers(1, 40),
    st.floats(1e-3, 0.5),
)
def test_every_curve_that_may_have_made_them_is_within(f_max, a, b, num_questions, num_points, eps):
    """All curves that leave what was seen a chance of 5 % at least."""
    curve = BetaTTSPM(f_max, a, b)
    n_N = np.arange(0, 3 * num_points)
    for outcome, chance in ((0, curve.unsolved(num_points) ** num_questions), (1, curve.value(1) ** num_questions)):
        if chance < 0.05:
            continue
        bounds = Alike(outcome, num_questions, num_points, num_questions * num_points, None, 0.05)
        low, high = bounds.stop(eps)
        assert low <= curve.saturation(eps) <= high
        low_N, high_N = bounds.band(n_N)
        assert (low_N - 1e-9 <= curve.value(n_N)).all()
        assert (curve.value(n_N) <= high_N + 1e-9).all()
        told = bounds.parameters(("mean", "a", "b", "rho"))
        for name, value in (("f_max", f_max), ("rho", curve.rho)):
            assert told[name][0] - 1e-9 <= value <= told[name][1] + 1e-9


@given(st.integers(1, 9), st.integers(0, 99), st.sampled_from([None, 0.5, 1.0]))
def test_so_few_questions_bound_nothing_and_every_curve_lies_between(count, seed, ceiling):
    right_QM = np.random.default_rng(seed).random((count, 4)) < 0.5
    for made in (TTSPM(f_max=ceiling).fit(right_QM), BetaTTSPM(f_max=ceiling).fit(right_QM)):
        assert made.too_few
        if made.all_same is not None:
            continue
        told = made.interval(eps=0.01)
        assert told["f_max"] == ((ceiling, ceiling) if ceiling else (pytest.approx(0, abs=1e-9), 1.0))
        for name in made.names:
            assert told[name][0] <= getattr(made, name) <= told[name][1]
        assert told["saturation"] == (0.0, 100 * (ceiling or 1.0) - 1)
        assert told["saturation"][0] <= made.saturation(0.01) <= told["saturation"][1]
        low_N, high_N = made.band([0, 1, 8])
        assert (low_N.tolist(), high_N.tolist()) == ([0, 0, 0], [0, ceiling or 1.0, ceiling or 1.0])


def test_ten_questions_are_enough_and_curves_that_were_given_are_of_no_questions():
    assert not TTSPM().fit(np.eye(10, dtype=int)).too_few
    assert not BetaTTSPM(1.0, 1.0, 1.0).too_few
    assert TTSPM().fit([0.2, 0.4], num_questions=9).too_few
    assert not TTSPM().fit([0.2, 0.4]).too_few
