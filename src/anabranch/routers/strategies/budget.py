"""Choosing under an average budget: the trade-off at which a strategy spends what may be spent.

    max E[quality] s.t. E[cost] <= B       has the Lagrangian       argmax_M quality_M - lambda cost_M       (survey, arXiv
    2502.00409, section 3)

Mean cost falls as lambda grows, so lambda is found by bisection. It falls in steps: where a step passes over the budget, no single
lambda meets it, and `Mixture` sends a share of the queries by the larger trade-off and the rest by the smaller, which meets it
exactly in expectation.
"""
# Shapes: N queries, M models

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from anabranch.errors import DataError, InputError
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.query import Pool
from anabranch.routers.contract.strategy import Strategy

# Of the budget, within which a mean cost is taken to meet it.
TOLERANCE = 1e-3
MOST_STEPS = 200

# Trade-offs whose mean cost is remembered of a fitted router, and rows that it is reckoned on.
SPENDING, ROWS = 25, 400


@dataclass(frozen=True)
class Mixture:
    """Two trade-offs on either side of a budget.

    Attributes:
        low: the smaller one, dearer or equal in cost.
        high: the larger one, within the budget.
        share: of queries that go by ``high``; 1 where it alone meets the budget.
        cost: mean dollars a query of the two together.
    """

    low: float
    high: float
    share: float
    cost: float


def trade_off_for(mean_cost: Callable[[float], float], budget: float, *, unit: float) -> Mixture:
    """Bisect for the least trade-off whose mean cost is within the budget.

    Args:
        mean_cost: dollars a query at a trade-off; must not rise with it.
        budget: dollars a query.
        unit: a trade-off to start from, such as the range of scores over the range of costs.

    Raises InputError if the budget or the unit is not a positive number, or not even the cheapest choices are within the budget.
    """
    if not (np.isfinite(budget) and budget > 0 and np.isfinite(unit) and unit > 0):
        raise InputError(f"budget is {budget} and unit {unit}; both must be above 0")
    at_low = mean_cost(0.0)
    if at_low <= budget:
        return Mixture(0.0, 0.0, 1.0, at_low)
    low, high = 0.0, unit
    while (at_high := mean_cost(high)) > budget:
        if high > unit * 1e12:
            raise InputError(
                f"a budget of {budget:.3g} dollars a query is below the {at_high:.3g} that the cheapest choices cost; raise it"
            )
        low, at_low, high = high, at_high, high * 4
    for _ in range(MOST_STEPS):
        if at_high >= budget * (1 - TOLERANCE) or high - low <= 1e-12 * high:
            break
        middle = 0.5 * (low + high)
        at_middle = mean_cost(middle)
        if at_middle > budget:
            low, at_low = middle, at_middle
        else:
            high, at_high = middle, at_middle
    if at_high >= budget * (1 - TOLERANCE) or at_low <= at_high:
        return Mixture(high, high, 1.0, at_high)
    share = (at_low - budget) / (at_low - at_high)
    return Mixture(low, high, share, budget)


def trade_off_of(quality_NM: np.ndarray, cost_NM: np.ndarray, budget: float) -> Mixture:
    """The same from predicted qualities and costs; -inf stands for a model that must not be asked.

    Raises InputError as `trade_off_for`, and for costs that are not known.
    """
    cost_NM = np.broadcast_to(cost_NM, quality_NM.shape)
    if not np.isfinite(cost_NM[np.isfinite(quality_NM)]).all():
        raise InputError("a budget needs the cost of every model that may be asked")
    usable_NM = np.where(np.isfinite(quality_NM), cost_NM, np.inf)
    rows = np.arange(len(quality_NM))

    def mean_cost(trade_off: float) -> float:
        value_NM = np.where(
            np.isfinite(quality_NM), quality_NM - trade_off * np.where(np.isfinite(cost_NM), cost_NM, 0), -np.inf
        )
        best_N1 = value_NM.max(axis=1, keepdims=True)
        # Of equals the cheapest, so that cost never rises.
        choice_N = np.where(value_NM >= best_N1, usable_NM, np.inf).argmin(axis=1)
        return float(cost_NM[rows, choice_N].mean())

    return trade_off_for(mean_cost, budget, unit=_unit(quality_NM, cost_NM))


def within_budget(strategy: Strategy, data: Recorded, pool: Pool, budget: float) -> Strategy:
    """The strategy at the trade-off that spends the budget on recorded data.

    Where no trade-off meets it, the dearest one below it. Raises InputError if the strategy has no trade-off or the budget is
    below what the cheapest choices cost, DataError without costs.
    """
    if strategy.knob != "trade_off":
        raise InputError(
            f"{strategy.name} has no trade-off between quality and cost to set; its knob is {strategy.knob}"
        )
    if data.cost_NM is None or not np.isfinite(data.cost_NM).any():
        raise DataError("a budget needs recorded costs; give prices with the data")

    def mean_cost(trade_off: float) -> float:
        return float(np.nanmean(strategy.with_knob(trade_off).play(data, pool).cost_N))

    found = trade_off_for(mean_cost, budget, unit=_unit(data.score_NM, data.cost_NM))
    return strategy.with_knob(found.high)


def spending(strategy: Strategy, data: Recorded, pool: Pool) -> list[tuple[float, float]]:
    """Trade-offs, by rising size, and the mean dollars a query that each comes to on recorded data; empty where there is nothing to tell.

    At most `SPENDING` of them, on at most `ROWS` rows: what is served picks one of them to keep a budget (`kept_within`).
    """
    if strategy.knob != "trade_off" or data.cost_NM is None or not np.isfinite(data.cost_NM).any():
        return []
    data = data.take(np.linspace(0, len(data) - 1, min(ROWS, len(data))).astype(int))
    values = sorted(set(strategy.knobs(data)))
    places = np.unique(np.linspace(0, len(values) - 1, min(SPENDING, len(values))).astype(int))
    found = [(values[at], float(np.nanmean(strategy.with_knob(values[at]).play(data, pool).cost_N))) for at in places]
    return [(trade_off, cost) for trade_off, cost in found if np.isfinite(cost)]


def kept_within(spent: Sequence[tuple[float, float]], budget: float) -> float:
    """The least trade-off of `spending` within a budget. Raises InputError where there is none."""
    within = [trade_off for trade_off, cost in spent if cost <= budget]
    if not within:
        least = (
            f"the {min(cost for _, cost in spent):.3g} that the cheapest choices cost"
            if spent
            else "what is known of its costs"
        )
        raise InputError(f"a budget of {budget:.3g} dollars a query is below {least}")
    return min(within)


def _unit(quality_NM: np.ndarray, cost_NM: np.ndarray) -> float:
    """Range of qualities over range of costs."""
    quality, cost = quality_NM[np.isfinite(quality_NM)], cost_NM[np.isfinite(cost_NM)]
    gap, spread = float(np.ptp(quality)), float(np.ptp(cost))
    return (gap if gap > 0 else 1.0) / (spread if spread > 0 else 1.0)
