"""From a table of qualities to the map that is decided by, for the models that are there now; remembered until they change."""
# Shapes: M models, C categories (the general one last)

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from anabranch.errors import InputError
from anabranch.routers.coe.category import CategoryRouter
from anabranch.routers.coe.choice import MapKind, table_for
from anabranch.routers.coe.expert_map import ExpertMap, Limits, frontier_of_budget, frontier_of_trade_off, solve_map
from anabranch.routers.coe.quality import QualityTable

# Maps for knobs and pools that were asked for lately.
KEPT_PLANS = 64

# By how much a fallback stays behind the model before it.
STEP = 1e-6

# Name, billions of parameters, price of a model.
Known = tuple[tuple[str, float | None, float], ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A solved map in the form that deciding needs.

    Attributes:
        map: from categories to experts.
        quality_CM: predicted; -inf for models that must not be asked: not there, never seen in the category, or not hosted for a limit.
        penalty_CM: what puts the models of each category in order.
    """

    map: ExpertMap
    quality_CM: np.ndarray
    penalty_CM: np.ndarray


class Planning:
    """See the module.

    Attributes:
        config: of `CompositionOfExperts`.
        models: that it learned of.
        router: tells categories.
        kind_of_map: how the table was made.
        trade_off: score given up to save a billion active parameters.
    """

    config: Any
    models: tuple[str, ...]
    router: CategoryRouter
    kind_of_map: MapKind
    trade_off: float
    # Observations, not shrunk, without the general category.
    _table: QualityTable | None
    _incumbents: dict[str, str]
    _known: Known
    _plans: OrderedDict[tuple[Any, ...], Plan]

    def plan(self, *, budget_params: float | None = None, trade_off_params: float | None = None) -> Plan:
        """The map for the models there are now, remembered until they change.

        Args:
            budget_params: instead of the config's.
            trade_off_params: likewise.

        Raises InputError as `solve_map` does, and if no model of the pool is known.
        """
        key = (self._known, budget_params, trade_off_params)
        found = self._plans.get(key)
        if found is None:
            found = self._planned(budget_params, trade_off_params)
            self._plans[key] = found
            while len(self._plans) > KEPT_PLANS:
                self._plans.popitem(last=False)
        return found

    def frontier(self, by: Literal["budget", "trade_off"] = "budget") -> list[ExpertMap]:
        """The best map for every budget of hosted parameters, or for every price of active ones, within the config's other limits.

        Raises InputError before ``fit``, and for a model whose size nobody says.
        """
        drawn = self._tables()[1]
        parameters, prices, present = self._facts_of_models()
        if unsized := [name for name in present if name not in parameters]:
            raise InputError(
                f"a frontier needs the size of every model, in billions of parameters; {unsized[0]!r} has none"
            )
        drawn, limits = drawn.only(present), self._limits(self.trade_off)
        if by == "budget":
            return frontier_of_budget(
                drawn, parameters, limits=limits.replace(budget=None), prices=prices, solver=self.config.solver
            )
        return frontier_of_trade_off(
            drawn, parameters, limits=limits.replace(trade_off=0.0), prices=prices, solver=self.config.solver
        )

    def _planned(self, budget_params: float | None, trade_off_params: float | None) -> Plan:
        table, drawn = self._tables()
        parameters, prices, present = self._facts_of_models()
        limits = self._limits(self.trade_off if trade_off_params is None else trade_off_params)
        if budget_params is not None:
            limits = limits.replace(budget=budget_params)
        if self._incumbents:
            drawn = table.steady(self._incumbents, drawn)
        drawn = drawn.only(present)
        found = solve_map(drawn, parameters, limits=limits, prices=prices, solver=self.config.solver)
        at = [self.models.index(name) for name in present]
        quality_CM = np.full((len(drawn.categories), len(self.models)), -np.inf)
        quality_CM[:, at] = np.where(np.isnan(drawn.quality_CE), -np.inf, drawn.quality_CE)
        # The others are not hosted.
        if limits.budget is not None or limits.max_experts is not None:
            quality_CM[:, ~np.isin(self.models, found.chosen)] = -np.inf
        size_M = np.array([limits.trade_off * parameters.get(name, 0.0) for name in self.models])
        first_C = [self.models.index(found[name]) for name in drawn.categories]
        return Plan(map=found, quality_CM=quality_CM, penalty_CM=_penalties(quality_CM, size_M, np.array(first_C)))

    def _tables(self) -> tuple[QualityTable, QualityTable]:
        """Observations and, drawn toward the means, what to choose by; both with the general category."""
        if self._table is None:
            raise InputError("coe has not learned yet: fit it on recorded outcomes first")
        if self.config.general in self.router.categories:
            return self._table, table_for(self._table, self.kind_of_map)
        # It needs an expert even if it is hardly ever asked.
        rate = max(self.config.abstain_rate, 1e-6)
        table = self._table.with_row(self.config.general, rate)
        return table, table_for(self._table, self.kind_of_map).with_row(self.config.general, rate)

    def _facts_of_models(self) -> tuple[dict[str, float], dict[str, float], list[str]]:
        """Sizes, prices and names of the models that are known and there."""
        parameters, prices = dict(self.config.parameters), dict(self.config.prices)
        for name, size, price in self._known:
            if size is not None:
                parameters[name] = size
            if price:
                prices[name] = price / 1e9
        there = {name for name, _, _ in self._known}
        present = [name for name in self.models if not there or name in there]
        if not present:
            raise InputError(
                f"coe knows none of the models {', '.join(sorted(there))}; it learned of {', '.join(self.models)}"
            )
        return parameters, prices, present

    def _limits(self, trade_off: float) -> Limits:
        config = self.config
        return Limits(
            budget=config.budget_params,
            trade_off=trade_off,
            max_experts=config.max_experts,
            active=config.active_params,
        )


def _penalties(quality_CM: np.ndarray, size_M: np.ndarray, first_C: np.ndarray) -> np.ndarray:
    """What to take off each quality so that the map's expert comes first, then the others by what they are worth net of their size."""
    rows = np.arange(len(quality_CM))
    worth_CM = np.where(np.isfinite(quality_CM), quality_CM - size_M, -np.inf)
    top_C1 = worth_CM[rows, first_C][:, None]
    order_CM = np.argsort(np.argsort(-worth_CM, axis=1, kind="stable"), axis=1)
    wanted_CM = np.minimum(worth_CM, top_C1 - STEP * (1 + order_CM))
    wanted_CM[rows, first_C] = top_C1[:, 0]
    return np.where(np.isfinite(quality_CM), np.where(np.isfinite(quality_CM), quality_CM, 0.0) - wanted_CM, 0.0)
