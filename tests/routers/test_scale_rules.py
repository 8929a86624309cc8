"""Which steps are hard: thresholds and fractions by hand, the budgeted rule against all choices, and what all rules share."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import ConfigError
from anabranch.routers.scale.rules import Budgeted, Left, Score, Threshold, TopFraction

CHANCES = st.floats(0, 1)


def scores(*difficulties):
    return [Score(d, 1 - d, max(1 - d, 0.95)) for d in difficulties]


def left(*difficulties, costs=None, forced=False, **more):
    found = scores(*difficulties)
    return Left(
        scores=found,
        costs=costs or [100.0] * len(found),
        is_forced=forced,
        num_steps=more.pop("num_steps", len(found)),
        **more,
    )


def test_thresholds_by_hand():
    rule = Threshold.Config(tau=0.5).build()
    assert rule.choose(left(0.2, 0.5, 0.51, 1.0)) == [False, False, True, True]  # strictly above
    assert rule.choose(left(0.2, 0.5, 0.0, forced=True)) == [False, False, True]
    assert Threshold.Config(tau=1.0).build().choose(left(0.0, 1.0)) == [False, False]
    assert Threshold.Config(tau=-0.1).build().choose(left(0.0, 1.0)) == [True, True]


@given(st.lists(CHANCES, min_size=1, max_size=8), CHANCES, CHANCES)
def test_a_higher_threshold_never_has_more_hard_steps(difficulties, one, other):
    low, high = sorted((one, other))
    of_low, of_high = (sum(Threshold.Config(tau=tau).build().choose(left(*difficulties))) for tau in (low, high))
    assert of_low >= of_high


def test_fractions_by_hand():
    rule = TopFraction.Config(fraction=0.5).build()
    assert rule.choose(left(0.1, 0.9, 0.3, 0.8)) == [False, True, False, True]
    assert rule.choose(left(0.5, 0.5, 0.5)) == [True, True, False]  # 1.5 is 2, and of equals the earlier
    # The forced one is one of the two; one was done already; so none is left.
    assert rule.choose(left(0.9, 0.9, 0.0, forced=True, num_steps=4, num_hard=1)) == [False, False, True]
    assert TopFraction.Config(fraction=0.0).build().choose(left(1.0, 1.0, forced=True)) == [False, True]
    assert TopFraction.Config(fraction=1.0).build().choose(left(0.0, 0.0)) == [True, True]


def test_a_budget_by_hand():
    """log(.95/.1) = 2.25, log(.95/.5) = .64, log(.95/.9) = .05: for 200 tokens the two first of 100 each."""
    rule = Budgeted.Config(budget=200).build()
    assert rule.choose(left(0.9, 0.5, 0.1)) == [True, True, False]
    assert rule.choose(left(0.9, 0.5, 0.1, spent=150.0)) == [False, False, False]
    # The forced one is paid first.
    assert rule.choose(left(0.9, 0.5, 0.1, forced=True)) == [True, False, True]
    assert rule.choose(left(0.9, forced=False, spent=500.0)) == [False]
    # What is as good in System 1 gains nothing, whatever it costs.
    assert Budgeted.Config(budget=1e9).build().choose(left(0.0)) == [False]


def test_a_budget_in_dollars_is_counted_finely_enough():
    for solver in ("greedy", "exact"):
        rule = Budgeted.Config(budget=2e-4, unit="usd", solver=solver).build()
        assert rule.choose(left(0.9, 0.5, 0.1, costs=[1e-4] * 3)) == [True, True, False]


@given(
    st.lists(st.tuples(CHANCES, CHANCES, st.integers(0, 8)), min_size=1, max_size=7),
    st.integers(0, 24),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_the_exact_budget_is_the_likeliest_chain_of_all(steps, budget, forced):
    """Of all choices that fit, the one whose product of chances is largest; greedy fits too."""
    found = [Score(1 - p1, p1, p2) for p1, p2, _ in steps]
    costs = [64.0 * cost for *_, cost in steps]
    given_left = Left(scores=found, costs=costs, is_forced=forced, num_steps=len(found))
    open_count = len(found) - forced

    def chance(hard):
        return math.prod(
            max(one.p2 if two else one.p1, 1e-6) for one, two in zip(found[:open_count], hard, strict=False)
        )

    room = 64.0 * budget - (costs[-1] if forced else 0.0)
    fits = [
        hard
        for hard in itertools.product((False, True), repeat=open_count)
        if sum(cost for cost, two in zip(costs, hard, strict=False) if two) <= max(room, 0.0)
        and (room >= 0 or not any(hard))
    ]
    best = max(chance(hard) for hard in fits)
    for solver in ("exact", "greedy"):
        chosen = Budgeted.Config(budget=64.0 * budget, solver=solver).build().choose(given_left)
        assert tuple(chosen[:open_count]) in fits
        assert chosen[open_count:] == [True] * forced
        if solver == "exact":
            assert chance(chosen) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("budget", [27.0, 200.0, 3e9])
def test_an_exact_budget_is_as_good_as_a_greedy_one_however_small_or_large(budget):
    """Steps of nearly a third of it each, of which three fit."""
    given_left = left(0.9, 0.5, 0.3, 0.2, costs=[0.33 * budget] * 4)
    for solver in ("greedy", "exact"):
        assert Budgeted.Config(budget=budget, solver=solver).build().choose(given_left) == [True, True, True, False]


def test_what_no_rule_takes():
    for config, fields in (
        (Threshold.Config, {"tau": 2.0}),
        (TopFraction.Config, {"fraction": -0.1}),
        (Budgeted.Config, {"budget": -1.0}),
    ):
        with pytest.raises(ConfigError):
            config(**fields)
