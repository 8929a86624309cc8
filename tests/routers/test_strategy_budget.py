"""Choosing under an average budget."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import ConfigError, DataError, InputError
from anabranch.routers import strategies
from anabranch.routers.made_outcomes import made_outcomes, made_pool
from anabranch.routers.strategies.budget import kept_within, spending, trade_off_for, trade_off_of, within_budget


def chosen(quality, cost, trade_off):
    value = quality - trade_off * cost
    best = value.max(1, keepdims=True)
    return np.where(value >= best, cost, np.inf).argmin(1)


@given(st.integers(0, 2**32 - 1), st.floats(0.05, 0.95))
def test_bisection_hits_the_average_within_a_percent(seed, place):
    rng = np.random.default_rng(seed)
    quality, cost = rng.random((2000, 4)), np.tile([1.0, 2.0, 4.0, 8.0], (2000, 1)) * rng.uniform(0.8, 1.2, (2000, 4))
    free, least = cost[np.arange(2000), chosen(quality, cost, 0.0)].mean(), cost.min(1).mean()
    budget = least + place * (free - least)
    found = trade_off_of(quality, cost, budget)
    spent = cost[np.arange(2000), chosen(quality, cost, found.high)].mean()
    assert spent <= budget
    assert found.share * spent + (1 - found.share) * cost[
        np.arange(2000), chosen(quality, cost, found.low)
    ].mean() == pytest.approx(budget, rel=0.01)
    assert spent == pytest.approx(budget, rel=0.01)


def test_a_step_over_the_budget_is_met_by_a_mixture():
    """All queries alike: cost 1 or 3, nothing between. A budget of 2.5 is three quarters dear, one quarter cheap."""
    quality, cost = np.tile([0.2, 0.8], (10, 1)), np.tile([1.0, 3.0], (10, 1))
    found = trade_off_of(quality, cost, 2.5)
    assert found.share == pytest.approx(0.25)
    assert found.cost == 2.5
    assert found.low == pytest.approx(0.3, rel=1e-6)  # (0.8 - 0.2) / (3 - 1)
    assert found.high == pytest.approx(0.3, rel=1e-6)
    assert chosen(quality, cost, found.low).tolist() == [1] * 10
    assert chosen(quality, cost, found.high).tolist() == [0] * 10


def test_a_budget_that_is_no_limit_and_one_that_cannot_be_met():
    quality, cost = np.array([[0.2, 0.8]]), np.array([[1.0, 3.0]])
    assert trade_off_of(quality, cost, 5.0).high == 0
    with pytest.raises(InputError, match=r"below the 1 that the cheapest choices cost; raise it"):
        trade_off_of(quality, cost, 0.5)
    for budget in (0.0, -1.0, float("nan")):
        with pytest.raises(InputError, match="must be above 0"):
            trade_off_of(quality, cost, budget)
    with pytest.raises(InputError, match="cost of every model"):
        trade_off_of(quality, np.array([[1.0, np.nan]]), 2.0)


def test_models_that_must_not_be_asked_are_not_counted():
    found = trade_off_of(np.array([[0.5, -np.inf], [0.4, -np.inf]]), np.array([[2.0, 1.0]]), 2.0)
    assert found.cost == 2.0


def test_any_falling_cost_will_do():
    found = trade_off_for(lambda trade_off: 10 / (1 + trade_off), 4.0, unit=1e-3)
    assert found.high == pytest.approx(1.5, rel=0.01)


@pytest.mark.parametrize("name", ["ridge", "knn", "task", "cascade", "oracle"])
def test_a_strategy_within_a_budget(name):
    data = made_outcomes(200)
    fitted = strategies.make(name, **({"max_length": 2, "num_cuts": 10} if name == "cascade" else {})).fit(data)
    dear = fitted.with_knob(0.0).play(data, made_pool()).cost_N.mean()
    cheap = fitted.with_knob(1e9).play(data, made_pool()).cost_N.mean()
    budget = cheap + 0.4 * (dear - cheap)
    spent = within_budget(fitted, data, made_pool(), budget).play(data, made_pool()).cost_N.mean()
    assert spent <= budget * 1.0001
    if name in ("ridge", "knn", "oracle"):  # costs or qualities differ from query to query, so that steps are small
        assert spent > budget * 0.9


def test_what_has_no_trade_off_has_no_budget():
    data = made_outcomes()
    with pytest.raises(InputError, match="no trade-off"):
        within_budget(strategies.make("cheapest"), data, made_pool(), 1.0)
    unpriced = dataclasses.replace(data, cost_NM=None)
    with pytest.raises(DataError, match="costs"):
        within_budget(strategies.make("oracle"), unpriced, made_pool(), 1.0)


@pytest.mark.parametrize("name", ["ridge", "knn"])
def test_a_budget_of_the_config_is_kept_by_fit(name):
    data = made_outcomes(300)
    free, cost_M = strategies.make(name).fit(data), np.nanmean(data.cost_NM, axis=0)
    budget = 0.5 * (cost_M.min() + free.play(data, made_pool()).cost_N.mean())
    kept = strategies.make(name, budget=budget).fit(data)
    assert kept.config.trade_off == within_budget(free, data, made_pool(), budget).config.trade_off > 0
    assert kept.play(data, made_pool()).cost_N.mean() <= budget * 1.000001
    # A sender's own lambda, or another setting, is what it says.
    assert kept.with_knob(0.0).config.budget is None
    assert kept.with_knob(0.0).play(data, made_pool()).cost_N.mean() == free.play(data, made_pool()).cost_N.mean()
    with pytest.raises(InputError, match="below the"):
        strategies.make(name, budget=cost_M.min() / 10).fit(data)
    with pytest.raises(DataError, match="recorded costs"):
        strategies.make(name, budget=budget).fit(dataclasses.replace(data, cost_NM=None))
    with pytest.raises(ConfigError, match="budget"):
        strategies.make(name, budget=0.0)


@pytest.mark.parametrize("name", ["ridge", "linucb", "cascade"])
def test_what_is_spent_at_which_trade_off_is_known(name):
    data = made_outcomes(300)
    fitted = strategies.make(name, **({"num_cuts": 5} if name == "cascade" else {})).fit(data)
    spent = spending(fitted, data, made_pool())
    assert 1 < len(spent) <= 25
    assert [value for value, _ in spent] == sorted(value for value, _ in spent)
    middle = 0.5 * (spent[0][1] + spent[-1][1])
    value = kept_within(spent, middle)
    assert dict(spent)[value] <= middle
    assert all(cost > middle for other, cost in spent if other < value)
    with pytest.raises(InputError, match="below the"):
        kept_within(spent, min(cost for _, cost in spent) / 2)
    assert spending(strategies.make("cheapest"), data, made_pool()) == []
    assert spending(fitted, dataclasses.replace(data, cost_NM=None), made_pool()) == []
