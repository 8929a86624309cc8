"""The exact choice against all choices, the greedy one against its bound, and what neither takes."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import InputError
from anabranch.routers.scale.knapsack import exact, greedy

WHOLE = st.lists(st.tuples(st.floats(-2, 5), st.integers(0, 12)), max_size=9)


def best_of(gain, cost, capacity):
    """The most that any choice gains."""
    choices = itertools.product((0, 1), repeat=len(gain))
    fits = (one for one in choices if sum(x * c for x, c in zip(one, cost, strict=True)) <= capacity)
    return max(sum(x * g for x, g in zip(one, gain, strict=True)) for one in fits)


def test_by_hand():
    """Per token the first gains most; two and three together gain more than it with either."""
    gain, cost = [6, 10, 12], [1, 2, 3]
    assert exact(gain, cost, 5, unit=1).tolist() == [False, True, True]  # 22, against 16 and 18
    assert greedy(gain, cost, 5).tolist() == [True, True, False]  # 6 / 1, then 10 / 2, then no room
    assert exact(gain, cost, 6, unit=1).all()


def test_one_dear_step_that_cheap_ones_leave_no_room_for():
    assert greedy([2, 10], [1, 10], 10).tolist() == [False, True]


def test_what_costs_nothing_and_what_gains_nothing():
    for solve in (greedy, lambda *given: exact(*given, unit=1)):
        assert solve([1, 0, -1, 2], [0, 0, 0, -5], 0).tolist() == [True, False, False, True]
        assert solve([], [], 3).tolist() == []
        assert solve([1], [1], -1).tolist() == [False]
        assert solve([1, math.inf], [1, 0], -65).tolist() == [False, False]
        assert solve([1, 1], [1e9, 1e9], math.inf).tolist() == [True, True]
        assert solve([math.inf, 1], [1, 1], 1).tolist() == [True, False]


def test_units_never_take_more_than_there_is():
    """65 tokens are two units of 64, and 191 of capacity are two: one step fits, though two would by a token more than they have."""
    assert exact([1, 1, 1], [65, 65, 65], 191).sum() == 1
    assert exact([1, 1, 1], [64, 64, 64], 128).sum() == 2
    assert exact([1, 1], [65, 65], 130).all()


@given(WHOLE, st.integers(0, 30))
@settings(max_examples=200, deadline=None)
def test_exact_is_the_best_of_all_and_greedy_is_at_least_half_of_it(steps, capacity):
    gain, cost = [one for one, _ in steps], [one for _, one in steps]
    best = best_of(gain, cost, capacity)
    for solve, least in (
        (lambda: exact(gain, cost, capacity, unit=1), best),
        (lambda: greedy(gain, cost, capacity), best / 2),
    ):
        taken_N = solve()
        assert np.array(cost)[taken_N].sum() <= capacity
        assert float(np.array(gain, float)[taken_N].sum()) >= least - 1e-9


@pytest.mark.parametrize(
    ("gain", "cost", "capacity", "unit", "message"),
    [
        ([1], [1, 2], 1, 1, "one of each a step"),
        ([math.nan], [1], 1, 1, "may not be NaN"),
        ([1], [math.inf], 1, 1, "costs must be finite"),
        ([1], [1], math.nan, 1, "the capacity a number"),
        ([1], [1], 1, 0, "unit is 0"),
        ([1] * 2, [1e9] * 2, 1e9, 1, "take a unit above 1"),
    ],
)
def test_what_is_refused(gain, cost, capacity, unit, message):
    with pytest.raises(InputError, match=message):
        exact(gain, cost, capacity, unit=unit)
