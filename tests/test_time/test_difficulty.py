"""A prior for one question: its curve, what many samples of one question weigh, and how sure predictions turn out to be, and of what."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import InputError
from anabranch.test_time import BetaTTSPM
from anabranch.test_time.difficulty import (
    TASK,
    Shape,
    likeliest_shape,
    logit,
    moved,
    odds_left,
    williams_weights,
)


def test_a_question_by_hand():
    """M = 1/4 and f_max = 3/4, so that of the 3/4 that one sample leaves 2/3 can be solved: odds of 2."""
    curve = BetaTTSPM(0.75, 1.0, 2.0, "sequential")
    assert odds_left(curve) == pytest.approx(math.log(2))
    # Odds of 1/3 times 3: mu = 1/2. Odds of 2 times e^1 3^2, of what is left.
    own = moved(curve, math.log(3), Shape(4.0, 1.0, 2.0))
    left = 18 * math.e / (1 + 18 * math.e)
    assert own.kind == "sequential"
    assert own.value(1) == pytest.approx(0.5)
    assert own.f_max == pytest.approx(0.5 + 0.5 * left)
    assert (own.a, own.b) == pytest.approx((2 / own.f_max, 4 - 2 / own.f_max))


@given(st.floats(0.02, 0.99), st.floats(0.05, 50), st.floats(0.05, 50))
def test_of_which_nothing_is_predicted_has_the_curve_of_its_task(f_max, a, b):
    curve = BetaTTSPM(f_max, a, b)
    own = moved(curve, 0.0)
    if abs(odds_left(curve)) < 6.9:
        assert (own.f_max, own.a, own.b) == pytest.approx((f_max, a, b), rel=1e-9)
    assert moved(curve, 0.0, TASK).value(1) == pytest.approx(curve.value(1))


# Tasks of which a model solves one sample in ten, or in a hundred million.
MEANS = st.floats(-8, -0.05).map(lambda power: 10.0**power)
TOTALS = st.floats(-2, 6).map(lambda power: 10.0**power)


@given(st.floats(0.01, 1), MEANS, TOTALS)
def test_however_little_a_model_solves_a_question_of_which_nothing_is_predicted_is_no_easier(ceiling, mean, total):
    """Priors of less than one in a thousand were one in a thousand, and so was all that more samples could solve of what one leaves."""
    curve = BetaTTSPM(ceiling, mean * total, (1 - mean) * total)
    own, samples = moved(curve, 0.0), [1, 4, 64, 10_000]
    assert own.value(1) == pytest.approx(curve.value(1), rel=1e-9)
    # g0 is below its edge of 1 - 1e-3.
    if odds_left(curve) < 6.9:
        assert own.value(samples) == pytest.approx(curve.value(samples), rel=1e-6)
    assert (own.value(samples) <= curve.value(samples) * (1 + 1e-9)).all()


@given(st.floats(1e-4, 1), MEANS, TOTALS, st.floats(-9, 9), st.one_of(st.none(), TOTALS))
def test_a_prediction_moves_the_logit_by_what_it_says_and_nothing_else_does(ceiling, mean, total, shift, own_total):
    curve = BetaTTSPM(ceiling, mean * total, (1 - mean) * total)
    own = moved(curve, shift, Shape(own_total))
    before, after = (math.log(of.value(1)) - math.log(of.unsolved(1)) for of in (curve, own))
    if abs(before + shift) < 27:
        assert after - before == pytest.approx(shift, abs=1e-6)
    # By Bayes' rule: with each failure of that question less is left to hope for.
    assert (np.diff(own.hazard([0, 1, 8, 64])) < 0).all()
    # A harder question is not one that more samples solve more of.
    if shift <= 0 and own_total is None and odds_left(curve) < 6.9:
        assert (own.value([1, 8, 64]) <= curve.value([1, 8, 64]) * (1 + 1e-6)).all()


@given(
    st.floats(0.01, 1),
    st.floats(1e-3, 1e3),
    st.floats(1e-3, 1e3),
    st.floats(-1e3, 1e3),
    st.floats(-8, 8),
    st.floats(0, 4),
)
def test_a_prior_is_never_sure_whatever_is_predicted(f_max, a, b, shift, level, slope):
    own = moved(BetaTTSPM(f_max, a, b), shift, Shape(2.0, level, slope))
    assert 0 < own.value(1) <= own.f_max <= 1
    assert own.unsolved(1) > 0
    assert min(own.a, own.b) > 0
    # Of one that is all but solved a failure teaches least, and it teaches something.
    assert own.hazard(64) < own.hazard(0)


@pytest.mark.parametrize("curve", [BetaTTSPM(1.0, 1.0, 1e-12), BetaTTSPM(1.0, 2e-12, 2.0), BetaTTSPM(1.0, 1e15, 1e15)])
def test_curves_of_nothing_but_ones_or_zeros_have_odds(curve):
    assert np.isfinite(odds_left(curve))
    assert np.isfinite(moved(curve, 3.0).value(64))


def test_many_samples_of_one_question_are_not_as_many_questions():
    # rho = 1 / 4: 1, 4 / (1 + 3 / 4), and never more than 1 / rho.
    assert williams_weights([1, 4, 10**9], 0.25) == pytest.approx([1.0, 4 / 1.75, 4.0], rel=1e-6)
    assert williams_weights([4, 4], [0.25, 1.0]) == pytest.approx([4 / 1.75, 1.0])


def test_samples_of_a_question_go_together_as_its_ceiling_and_concentration_have_it():
    """Without a ceiling 1 / (s + 1); with one, E p^2 = f m (m s + 1) / (s + 1) with f = 1/2 + 1/2 * 1/2 and m = 2/3."""
    assert Shape(3.0, 30.0, 0.0).correlation(np.array([0.2, 0.7]), 0.0, 0.0) == pytest.approx([0.25, 0.25], rel=1e-4)
    square = 0.75 * (2 / 3) * (2 / 3 * 3 + 1) / 4
    assert Shape(3.0, 0.0, 0.0).correlation(0.5, 0.0, 5.0) == pytest.approx((square - 0.25) / 0.25)
    # Of what hardly is solved m is 0, and of what nearly always is m is 1, of which 1 - g = 1/2 times s = 3 is 1.5.
    assert Shape(3.0, 0.0, 0.0).correlation(1e-12, 0.0, 0.0) == pytest.approx(0.25)
    assert Shape(3.0, 0.0, 0.0).correlation(1 - 1e-12, 0.0, 0.0) == pytest.approx(2.5 / 4)
    assert Shape().correlation(np.full(3, 0.5), 0.0, 0.0).tolist() == [1, 1, 1]


def naive(shape, mean_Q, odds_Q, shift_Q, k_Q, n_Q):
    """ln P, sample by sample: the right ones first, which is as likely as any order."""
    total = 0.0
    for mu, odds, x, k, n in zip(mean_Q, odds_Q, shift_Q, k_Q, n_Q, strict=True):
        g = 1 / (1 + math.exp(-(odds + shape.level + shape.slope * x)))
        f = mu + (1 - mu) * g
        a, b, chance = mu / f * shape.total, (1 - mu / f) * shape.total, 1.0
        for at in range(n):
            chance *= (a + at if at < k else b + at - k) / (a + b + at)
        total += math.log(f * chance + (1 - f) * (k == 0))
    return total


def questions(count, total, level, slope, *, until_right, seed=0, samples=16):
    """By the model itself: predictions of three kinds, and outcomes."""
    rng = np.random.default_rng(seed)
    shift_Q = rng.choice([-1.5, 0.0, 1.5], count)
    mean_Q, odds_Q = 1 / (1 + np.exp(-shift_Q)) * 0.7, np.full(count, 0.3)
    left_Q = 1 / (1 + np.exp(-(odds_Q + level + slope * shift_Q)))
    ceiling_Q = mean_Q + (1 - mean_Q) * left_Q
    p_Q = rng.beta(mean_Q / ceiling_Q * total, (1 - mean_Q / ceiling_Q) * total) * (rng.random(count) < ceiling_Q)
    right_QM = rng.random((count, samples)) < p_Q[:, None]
    k_Q, n_Q = right_QM.sum(1), np.full(count, samples)
    if until_right:
        k_Q, n_Q = right_QM.any(1).astype(int), np.where(right_QM.any(1), right_QM.argmax(1) + 1, samples)
    return mean_Q, odds_Q, shift_Q, k_Q, n_Q


@pytest.mark.parametrize("until_right", [False, True])
def test_what_is_found_is_likelier_than_all_around_it(until_right):
    told = questions(150, 4.0, 0.5, 1.0, until_right=until_right)
    found = likeliest_shape(*told)
    best = naive(found, *told)
    for ratio, level, slope in [
        (1.3, 0, 0),
        (0.7, 0, 0),
        (1, 0.3, 0),
        (1, -0.3, 0),
        (1, 0, 0.2),
        (1, 0, -0.2),
        (1.2, 0.3, 0.2),
    ]:
        other = Shape(found.total * ratio, found.level + level, found.slope + slope)
        assert naive(other, *told) < best


@pytest.mark.parametrize("until_right", [False, True])
@pytest.mark.parametrize(("total", "level", "slope"), [(3.0, 0.5, 1.0), (30.0, -0.5, 2.0), (3.0, 0.0, 0.0)])
def test_it_is_found_again_whatever_ended_the_samples(total, level, slope, until_right):
    told = questions(600, total, level, slope, until_right=until_right)
    found = likeliest_shape(*told)
    curve = BetaTTSPM(0.7, 1.0, 1.0)
    for shift in (-1.5, 0.0, 1.5):
        own, true = moved(curve, shift, found), moved(curve, shift, Shape(total, level, slope))
        assert own.value([4, 16]) == pytest.approx(true.value([4, 16]), abs=0.04)


def test_single_samples_tell_nothing_of_it_and_few_are_enough(monkeypatch):
    assert likeliest_shape([0.5, 0.2], 0.0, 0.0, [1, 0], [1, 1]) is None
    monkeypatch.setattr("anabranch.test_time.difficulty.MOST_QUESTIONS", 50)
    told = questions(70, 3.0, 0.5, 1.0, until_right=False)
    first = likeliest_shape(*told, seed=3)
    assert first == likeliest_shape(*told, seed=3) != likeliest_shape(*told, seed=4)
    # Those of one sample take no room of others.
    some = [np.concatenate([array[:50], array]) for array in told]
    some[4][50:], some[3][50:] = 1, 0
    assert likeliest_shape(*some) == likeliest_shape(*[array[:50] for array in told])


@pytest.mark.parametrize(
    ("mean", "odds", "correct", "samples", "message"),
    [
        ([0.0], 0.0, [0], [2], "mean_Q"),
        ([1.0], 0.0, [0], [2], "mean_Q"),
        ([0.5], math.nan, [0], [2], "odds_Q"),
        ([0.5], 0.0, [3], [2], "at most the number of samples"),
        ([0.5], 0.0, [0], [0], "samples_Q"),
    ],
)
def test_what_is_no_outcome_is_refused(mean, odds, correct, samples, message):
    with pytest.raises(InputError, match=message):
        likeliest_shape(mean, odds, 0.0, correct, samples)


def test_logits_are_held_off_what_is_sure():
    assert logit([0.0, 0.5, 1.0]) == pytest.approx([-math.log(999), 0.0, math.log(999)])
