"""Confidence sequences and the test of two means: by hand, beside a naive gambler, and in repeated worlds looked at all the time."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway.ab import sequential
from anabranch.gateway.ab.sequential import bets, confidence_sequence, evidence_steps, log_steps, two_means

ALPHA = 0.05


def test_the_first_bets_by_hand():
    found = bets(np.array([1.0, 0.0]), np.ones(2, bool), ALPHA)
    first = math.sqrt(2 * math.log(40) / (0.25 * 1 * math.log(2)))
    # After a 1 the mean is 0.75 (with half a value of 1/2 before) and the variance (1/4 + 1/16) / 2.
    second = math.sqrt(2 * math.log(40) / (0.15625 * 2 * math.log(3)))
    assert found == pytest.approx([first, second])
    # Against 1/2 no more than half of what could ruin is staked: 1 of at most 2.
    assert log_steps(np.array([1.0]), found[:1], np.array([0.5]), above=True) == pytest.approx(math.log(1.5))
    assert log_steps(np.array([1.0]), found[:1], np.array([0.5]), above=False) == pytest.approx(math.log(0.5))
    # Against 0.05 the cut, 10, is not reached.
    assert log_steps(np.array([1.0]), found[:1], np.array([0.05]), above=True) == pytest.approx(
        math.log(1 + first * 0.95)
    )


def naive(value, is_b, alpha, points):
    """Two gamblers for every point between, value after value, in plain Python."""
    grid = [place / (points - 1) for place in range(points)]
    capital = {better: [1.0] * (points - 1) for better in "ab"}
    seen = {"a": [], "b": []}
    peak, crossed = 0.0, []
    for number, (x, mine) in enumerate(zip(value, ("b" if flag else "a" for flag in is_b), strict=True), 1):
        before, total, square, count = seen[mine], 0.5, 0.25, 1
        for old in before:
            total, count = total + old, count + 1
            square += (old - total / count) ** 2
        t = len(before) + 1
        bet = math.sqrt(2 * math.log(2 / alpha) / (square / count * t * math.log(1 + t)))
        before.append(x)
        for better in "ab":
            for place in range(points - 1):
                if mine == better:
                    m = grid[place + 1]
                    capital[better][place] *= 1 + min(bet, 0.5 / m) * (x - m)
                else:
                    m = grid[place]
                    capital[better][place] *= 1 - min(bet, 0.5 / (1 - m)) * (x - m)
            peak = max(peak, min(capital[better]))
            if min(capital[better]) >= 2 / alpha and better not in [side for _, side in crossed]:
                crossed.append((number, better))
    at, better = min(crossed, default=(len(value), None))
    return better, at, min(1.0, 2 / peak) if peak else 1.0


@given(st.data())
def test_it_is_as_the_naive_gambler_has_it(data):
    num = data.draw(st.integers(1, 30))
    value = data.draw(st.lists(st.sampled_from([0.0, 0.2, 0.5, 1.0]), min_size=num, max_size=num))
    is_b = data.draw(st.lists(st.booleans(), min_size=num, max_size=num))
    if data.draw(st.booleans()):  # so that some are resolved
        value = [float(flag) for flag in is_b]
    better, at, p = naive(value, is_b, ALPHA, 9)
    found = two_means(np.array(value), np.array(is_b), ALPHA, 9)
    assert (found.better, found.at) == (better, at)
    assert found.p == pytest.approx(p)


def test_a_clear_difference_is_found_and_told_by_its_side():
    is_b = np.arange(60) % 2 == 1
    found = two_means(is_b.astype(float), is_b, ALPHA)
    assert (found.better, found.p < ALPHA) == ("b", True)
    other = two_means(1 - is_b.astype(float), is_b, ALPHA)
    assert (other.better, other.at) == ("a", found.at)
    assert found.at < 20  # a dozen keys of each
    # Once told it stays told, whatever comes.
    more = np.concatenate([is_b.astype(float), 1 - is_b.astype(float)])
    assert two_means(more, np.concatenate([is_b, is_b]), ALPHA).better == "b"


def test_parts_change_nothing(monkeypatch):
    draw = np.random.default_rng(0)
    value, is_b = draw.random(300), draw.random(300) < 0.5
    value = np.where(is_b, value**0.3, value)
    whole = two_means(value, is_b, ALPHA), confidence_sequence(value, ALPHA)
    monkeypatch.setattr(sequential, "_AT_ONCE", 401 * 7)
    again = two_means(value, is_b, ALPHA), confidence_sequence(value, ALPHA)
    assert (again[0].better, again[0].at, again[1]) == (whole[0].better, whole[0].at, whole[1])
    assert again[0].p == pytest.approx(whole[0].p)
    assert whole[0].better == "b"


def worlds(times, num, share, mean_a, mean_b, seed):
    draw = np.random.default_rng(seed)
    is_b = draw.random((times, num)) < share
    return (draw.random((times, num)) < np.where(is_b, mean_b, mean_a)).astype(float), is_b


def told(value, is_b, points):
    """Whether each world was ever told to differ, looked at after every value, and which side it was."""
    bet = np.where(is_b, bets(value, is_b, ALPHA), bets(value, ~is_b, ALPHA))
    found = []
    for is_first in (is_b, ~is_b):
        path = np.cumsum(evidence_steps(value, is_first, bet, points), 1)
        found.append(path.min(-1).max(-1) >= math.log(2 / ALPHA))
    return found


@pytest.mark.parametrize(("share", "mean"), [(0.5, 0.5), (0.2, 0.9), (0.5, 0.03)])
def test_without_a_difference_looking_all_the_time_alarms_seldom(share, mean):
    b, a = told(*worlds(600, 400, share, mean, mean, seed=1), points=33)
    assert (a | b).mean() <= ALPHA  # a test at each look would alarm in a third of them


def test_a_difference_is_found():
    b, a = told(*worlds(200, 400, 0.5, 0.5, 0.75, seed=2), points=65)
    assert b.mean() > 0.6
    assert a.mean() <= ALPHA / 2


def test_the_mean_stays_within_at_all_times():
    draw = np.random.default_rng(3)
    outside = 0
    for mean in (0.1, 0.5, 0.8):
        value = (draw.random((400, 300)) < mean).astype(float)
        bet = bets(value, np.ones(value.shape, bool), ALPHA)
        for above in (True, False):
            path = np.cumsum(log_steps(value, bet, np.array([mean]), above=above)[..., 0], 1)
            outside += (path.max(1) >= math.log(2 / ALPHA)).sum()
    assert outside / 1200 <= ALPHA


def test_sequences_narrow_and_begin_with_everything():
    draw = np.random.default_rng(4)
    value = (draw.random(2000) < 0.7).astype(float)
    low, high = confidence_sequence(value, ALPHA)
    assert low < 0.7 < high
    assert high - low < 0.1
    before = confidence_sequence(value[:100], ALPHA)
    assert before[0] <= low <= high <= before[1]
    assert confidence_sequence(value[:1], ALPHA) == (0.0, 1.0)
    # Values that hardly differ tell more than their number.
    steady = confidence_sequence(np.full(200, 0.6), ALPHA)
    assert steady[0] < 0.6 < steady[1]
    assert steady[1] - steady[0] < 0.1


def test_ends_are_those_of_the_capital():
    value = np.random.default_rng(5).random(50)
    low, high = confidence_sequence(value, ALPHA, points=101)
    grid = np.linspace(0, 1, 101)
    bet = bets(value, np.ones(50, bool), ALPHA)
    inside = [
        m
        for at, m in enumerate(grid)
        if all(
            np.cumsum(log_steps(value, bet, grid[at : at + 1], above=above)).max() < math.log(2 / ALPHA)
            for above in (True, False)
        )
    ]
    assert low == pytest.approx(inside[0] - 0.01)
    assert high == pytest.approx(inside[-1] + 0.01)
