"""Fits: parameters that made a curve are found again, intervals hold the truth as often as they say, and odd data have an answer."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import InputError
from anabranch.test_time import TTSPM, BetaTTSPM, fit_many, hit_curve


def drawn(rng, f_max, p_Q, samples):
    """Outcomes [Q, samples] of questions that can be solved with chance f_max."""
    is_open_Q = rng.random(len(p_Q)) < f_max
    return (rng.random((len(p_Q), samples)) < (p_Q * is_open_Q)[:, None]).astype(int)


@given(f_max=st.floats(0.2, 1.0), p=st.floats(0.02, 0.95))
@settings(max_examples=40)
def test_an_exact_curve_gives_its_parameters_back(f_max, p):
    made = TTSPM(f_max=f_max, p=p)
    found = TTSPM().fit(made.value(np.arange(1, 65)))
    assert (found.f_max, found.p) == pytest.approx((f_max, p), rel=1e-5)
    for eps in (0.02, 0.005):
        assert abs(found.saturation(eps) - made.saturation(eps)) <= 1


@pytest.mark.parametrize(("f_max", "a", "b"), [(1.0, 0.5, 1.5), (0.9, 2.0, 6.0), (0.6, 1.0, 1.0)])
def test_an_exact_mixture_gives_its_parameters_back(f_max, a, b):
    found = BetaTTSPM().fit(BetaTTSPM(f_max, a, b).value(np.arange(1, 129)))
    assert (found.f_max, found.a, found.b) == pytest.approx((f_max, a, b), rel=1e-3)


def test_sampled_outcomes_give_back_what_they_were_drawn_with():
    """200 questions of 64 samples, 20 times: p is right to 2 % half of the time (no estimate's deviation is below 1.8 %), N* to 1."""
    errors, stops = [], []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        found = TTSPM(f_max=1.0).fit(drawn(rng, 1.0, np.full(200, 0.2), 64))
        errors.append(found.p / 0.2 - 1)
        stops.append(abs(found.saturation(0.01) - TTSPM(p=0.2).saturation(0.01)))
    assert abs(np.mean(errors)) < 0.005
    assert np.median(np.abs(errors)) < 0.02
    assert np.std(errors) < 0.025
    assert max(stops) <= 1


def test_fit_is_asked_of_a_curve_or_of_its_class():
    curve = [0.3, 0.45, 0.52, 0.56]
    made = TTSPM()
    assert made.fit(curve) is made
    assert TTSPM.fit(curve).p == made.p
    assert BetaTTSPM.fit(curve).a > 0
    assert TTSPM("sequential").fit([[0, 1], [0, 0], [1, 1]]).kind == "sequential"


def test_a_ceiling_that_is_known_is_kept():
    curve = TTSPM(f_max=0.8, p=0.3).value(np.arange(1, 9))
    assert TTSPM(f_max=0.8).fit(curve).p == pytest.approx(0.3, rel=1e-6)
    assert TTSPM().fit(curve, f_max=1.0).f_max == 1.0
    # One point tells p then: 0.24 = 0.8 p.
    assert TTSPM(f_max=0.8).fit([0.24]).p == pytest.approx(0.3, rel=1e-6)
    # A curve that has parameters finds both anew.
    assert TTSPM(f_max=0.5, p=0.1).fit(curve).f_max == pytest.approx(0.8, rel=1e-6)


def test_rounds_are_read_in_their_order():
    # Right first in round 2, never, in round 1 (and lost again, which is no matter here).
    found = TTSPM("sequential", f_max=1.0).fit([[0, 1, 1], [0, 0, 0], [1, 0, 0]])
    wanted = TTSPM("sequential", f_max=1.0).fit([1 / 3, 2 / 3, 2 / 3], num_questions=3)
    assert found.p == pytest.approx(wanted.p, rel=1e-6)
    # As samples, the same outcomes are a third of three, two of three, and none: another curve.
    assert TTSPM(f_max=1.0).fit([[0, 1, 1], [0, 0, 0], [1, 0, 0]]).p != pytest.approx(found.p, rel=1e-3)


def test_only_the_points_that_are_wanted_are_fitted_to():
    samples = drawn(np.random.default_rng(0), 0.9, np.full(50, 0.3), 16)
    curve = hit_curve(samples.sum(1), 16).mean(0)
    assert TTSPM.fit(samples, up_to=4).p == pytest.approx(TTSPM.fit(curve[:4], num_questions=50).p, rel=1e-9)


# Intervals


@pytest.mark.slow
def test_intervals_hold_the_truth_as_often_as_they_say():
    """200 times 60 questions of 16 samples: within 90 to 99 % for 95."""
    held = {"p": 0, "f_max": 0}
    for seed in range(200):
        rng = np.random.default_rng(seed)
        told = TTSPM().fit(drawn(rng, 0.8, np.full(60, 0.3), 16)).interval(resamples=200, seed=seed)
        held["p"] += told["p"][0] <= 0.3 <= told["p"][1]
        held["f_max"] += told["f_max"][0] <= 0.8 <= told["f_max"][1]
    assert all(180 <= count <= 198 for count in held.values()), held


def test_an_interval_names_all_parameters_and_the_stop():
    samples = drawn(np.random.default_rng(0), 0.9, np.random.default_rng(1).beta(1, 2, 60), 12)
    fitted = BetaTTSPM().fit(samples)
    told = fitted.interval(resamples=50, eps=0.01)
    assert set(told) == {"f_max", "mean", "a", "b", "rho", "saturation"}
    for name in ("f_max", "mean"):
        assert told[name][0] <= getattr(fitted, name) <= told[name][1]
    assert told["saturation"][0] <= fitted.saturation(0.01) <= told["saturation"][1]
    assert fitted.interval(resamples=50) == fitted.interval(resamples=50)
    narrow, wide = (TTSPM().fit(samples).interval(level, resamples=100)["p"] for level in (0.5, 0.99))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_shares_have_an_interval_where_it_is_known_of_how_many():
    curve = TTSPM(f_max=0.8, p=0.3).value(np.arange(1, 17))
    few, many = (TTSPM().fit(curve, num_questions=num).interval()["p"] for num in (50, 5000))
    assert few[0] < many[0] < 0.3 < many[1] < few[1]
    with pytest.raises(InputError, match="nobody knows how many questions"):
        TTSPM().fit(curve).interval()
    with pytest.raises(InputError, match="call fit first"):
        TTSPM(p=0.3).interval()


# Limits


def test_nothing_but_zeros_and_nothing_but_ones_have_limits():
    none, all_right = np.zeros((10, 6), int), np.ones((10, 6), int)
    zeros = TTSPM().fit(none)
    assert (zeros.p, zeros.f_max) == (1e-12, 1.0)
    assert zeros.saturation(0.001) == 0
    # (1 - p)^60 = 0.05: the rule of three.
    assert zeros.interval()["p"][1] == pytest.approx(1 - 0.05 ** (1 / 60))
    ones = TTSPM().fit(all_right)
    assert (ones.p, ones.f_max) == (1.0, 1.0)
    assert ones.saturation(0.001) == 1
    assert ones.interval()["p"] == pytest.approx((0.05 ** (1 / 60), 1.0))
    for data, n in ((none, 0), (all_right, 1)):
        assert BetaTTSPM().fit(data).saturation(0.001) == n
        assert BetaTTSPM().fit(data, f_max=0.5).f_max == 0.5
        assert (TTSPM().fit(data).all_same, BetaTTSPM().fit([[0, 1], [1, 0]]).all_same) == (n, None)
    assert BetaTTSPM(0.5, 1.0, 1.0).all_same is None
    with pytest.raises(InputError, match="nobody knows how many questions"):
        TTSPM().fit([0.0, 0.0]).interval()


@given(st.lists(st.floats(0, 1), min_size=2, max_size=12))
@settings(max_examples=60)
def test_any_shares_give_a_curve(shares):
    """Also such as no samples ever gave: falling ones, steps."""
    for model in (TTSPM(), BetaTTSPM()):
        found = model.fit(shares)
        assert 0 < found.f_max <= 1
        assert np.isfinite(found.value(np.arange(20))).all()
        assert found.saturation(0.01) >= 0


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "the curve is empty"),
        ([0.5], "one point, which does not tell p from f_max"),
        ([0.5, 1.2], r"data\[1\] is 1\.2; it must be a share from 0 to 1"),
        ([0.5, np.nan], r"data\[1\] is nan"),
        ([[0, 2]], r"data\[0, 1\] is 2; it must be 0 or 1"),
        (np.zeros((0, 4)), "at least one of each"),
        (np.zeros((2, 2, 2)), r"must be \[questions, samples\]"),
        ("abc", "it must be a number"),
        ([[0, 1], []], r"data\[1\] has shape \[1, 0\]"),
        ([[0, 1], [1, 2, 0]], r"data\[1\]\[0, 1\] is 2; it must be 0 or 1"),
        ([[0, 1], 1], r"data\[1\] has shape \[1\]"),
    ],
)
def test_what_cannot_be_fitted_is_refused(data, message):
    with pytest.raises(InputError, match=message):
        TTSPM().fit(data)


def test_further_refusals():
    with pytest.raises(InputError, match="up_to is 9; it must be at most 2"):
        TTSPM().fit([0.1, 0.2], up_to=9)
    with pytest.raises(InputError, match="num_questions is for shares"):
        TTSPM().fit([[0, 1]], num_questions=3)
    with pytest.raises(InputError, match="model is 'x'"):
        fit_many([[0.1, 0.2]], "x")
    with pytest.raises(InputError, match="curves of one point"):
        fit_many([[0.1]])
    with pytest.raises(InputError, match="level is 2"):
        TTSPM().fit([[0, 1]]).interval(2.0)


def test_a_fit_that_is_refused_leaves_the_curve_as_it_was():
    curve = TTSPM(p=0.3)
    with pytest.raises(InputError):
        curve.fit([0.5, 2.0])
    assert curve.p == 0.3


# Many


def test_many_at_once_are_each_as_alone():
    rng = np.random.default_rng(0)
    curve_CN = np.stack(
        [
            BetaTTSPM(f, a, 2.0).value(np.arange(1, 13))
            for f, a in zip(rng.uniform(0.3, 1, 9), rng.uniform(0.3, 4, 9), strict=True)
        ]
    )
    single, mixed = fit_many(curve_CN), fit_many(curve_CN, "mixed")
    assert set(single) == {"f_max", "p"}
    for at, curve_N in enumerate(curve_CN):
        assert single["p"][at] == pytest.approx(TTSPM().fit(curve_N).p, rel=1e-6)
        assert mixed["a"][at] == pytest.approx(BetaTTSPM().fit(curve_N).a, rel=1e-4)


def test_the_mixture_holds_where_one_p_does_not():
    """Fitted on up to 8 samples of mixed questions, read at 64."""
    made = BetaTTSPM(1.0, 0.4, 1.2)
    curve = made.value(np.arange(1, 9))
    errors = [abs(model().fit(curve).value(64) - made.value(64)) for model in (TTSPM, BetaTTSPM)]
    assert errors[1] < errors[0] / 2


@pytest.mark.parametrize("shares", [[0.5, 0.99], [0.05, 0.6], [0.9, 0.91, 0.999]])
def test_a_point_counts_as_much_as_it_is_certain(shares):
    """The squares of each point stand against its variance, f (1 - f), half a question of each outcome added: by trying every p."""
    y_N, n = np.array(shares), np.arange(1, len(shares) + 1)
    p_G = np.linspace(1e-4, 1 - 1e-4, 200_000)
    square_GN = (1 - (1 - p_G[:, None]) ** n - y_N) ** 2
    near_N = (100 * y_N + 0.5) / 101
    best = p_G[(square_GN / (near_N * (1 - near_N))).sum(1).argmin()]
    found = fit_many(y_N[None], num_questions=100, f_max=1.0)["p"][0]
    assert found == pytest.approx(best, abs=2e-5)
    # Weights that are all alike say something else.
    assert abs(p_G[square_GN.sum(1).argmin()] - best) > 1e-3


def test_questions_with_different_numbers_of_samples_say_of_as_many_as_the_least_have():
    rows = [[0, 1, 0, 1], [1, 0], [0, 0, 0], [1, 1, 1, 1, 0]]
    # Hit@2: 1 - C(2,2)/C(4,2) = 5/6, 1, 0, 1 - 0 = 1.
    fitted = BetaTTSPM().fit(rows)
    assert fitted.observed == pytest.approx([(1 / 2 + 1 / 2 + 0 + 4 / 5) / 4, (5 / 6 + 1 + 0 + 1) / 4])
    rounds = TTSPM(kind="sequential").fit(rows, up_to=2)
    assert rounds.observed == pytest.approx([2 / 4, 3 / 4])
    assert BetaTTSPM(1.0, 1.0, 1.0).observed is None
    # Of as many each, a list of rows is an array.
    assert TTSPM().fit([[0, 1], [0, 0]]).observed == pytest.approx([0.25, 0.5])
    with pytest.raises(InputError, match="up_to is 3; it must be at most 2"):
        BetaTTSPM().fit(rows, up_to=3)
    with pytest.raises(InputError, match="num_questions is for shares"):
        BetaTTSPM().fit(rows, num_questions=4)


def test_a_band_holds_the_curve_and_is_that_of_its_parameters():
    rng = np.random.default_rng(3)
    fitted = TTSPM(f_max=1.0).fit(drawn(rng, 1.0, np.full(200, 0.3), 8))
    low_N, high_N = fitted.band([1, 2, 8, 30])
    value_N = fitted.value([1, 2, 8, 30])
    assert (low_N <= value_N).all()
    assert (value_N <= high_N).all()
    # With one sample and no ceiling it is p.
    assert (low_N[0], high_N[0]) == pytest.approx(fitted.interval()["p"])
    assert fitted.band(2)[0].shape == (1,)
    with pytest.raises(InputError, match="call fit first"):
        TTSPM(p=0.2).band([1])
