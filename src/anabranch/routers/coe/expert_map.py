"""Choosing experts for categories under a budget of parameters, and what each budget would buy.

found = solve_map(table, {"small": 8, "large": 70}, limits=Limits(budget=80))
found["maths"], found.chosen, found.quality, found.active, found.host
frontier_of_budget(table, parameters)       every map that is best for some budget
frontier_of_trade_off(table, parameters)    every map that is best for some lambda
"""
# Shapes: C categories, E experts

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, NoReturn

import numpy as np

from anabranch.errors import InputError
from anabranch.routers.coe.exact import MOST, solve_exact
from anabranch.routers.coe.greedy import solve_greedy
from anabranch.routers.coe.limits import TIE, ExpertMap, Limits, Problem
from anabranch.routers.coe.milp import least_host, solve_milp
from anabranch.routers.coe.quality import QualityTable

Solver = Literal["auto", "exact", "milp", "greedy"]

# Of a budget: sizes of hosts that differ by less are one.
STEP = 2e-6
SOLVERS = {"exact": solve_exact, "milp": solve_milp, "greedy": solve_greedy}


def solve_map(
    table: QualityTable,
    parameters: Mapping[str, float],
    *,
    limits: Limits | None = None,
    prices: Mapping[str, float] | None = None,
    solver: Solver = "auto",
) -> ExpertMap:
    """The best map from categories to experts; see `limits` for the problem and how ties are settled.

    Args:
        table: qualities; NaN means never.
        parameters: of each expert, in billions; may be empty if no limit is about them.
        limits: none if left out.
        prices: of each expert, for ties; free if left out.
        solver: "exact" (to 15 experts), "milp", "greedy" (not always best); "auto" takes exact where it can, else milp.

    Raises:
        InputError: a budget below what every category needs (the message has the smallest that works), limits that cannot be kept
            together, a size that is missing or negative, a category whose qualities are all NaN, an unknown solver.
        BackendError: milp is needed and scipy is not there.
    """
    problem = Problem.of(table, parameters, prices, limits or Limits())
    found = _solved(problem, solver)
    return _explain(problem, solver) if found is None else found


def _solved(problem: Problem, solver: Solver) -> ExpertMap | None:
    """None if no map keeps the limits."""
    if solver not in ("auto", *SOLVERS):
        raise InputError(f"solver is {solver!r}; it must be one of auto, {', '.join(SOLVERS)}")
    if solver == "auto":
        solver = "exact" if len(problem.kept()) <= MOST else "milp"
    choice_C = SOLVERS[solver](problem)
    return None if choice_C is None else problem.map(choice_C)


def _explain(problem: Problem, solver: str) -> NoReturn:
    """Say why no map keeps the limits. Raises InputError."""
    limits, least = problem.limits, least_host(problem)
    if least > problem.budget:
        raise InputError(
            f"a budget of {limits.budget:g} billion parameters hosts no expert for every category; the smallest that does is {least:g}"
        )
    reach_CE = np.where(np.isfinite(problem.value_CE), problem.size_E, np.inf)
    floor = float(problem.share_C @ reach_CE.min(1))
    if floor > problem.most_active:
        raise InputError(
            f"at least {floor:g} billion parameters work on a request on average, and active allows {limits.active:g}; raise it"
        )
    hint = "; another solver may find one" if solver == "greedy" else ""
    raise InputError(
        f"no map keeps budget {limits.budget}, max_experts {limits.max_experts} and active {limits.active} together; "
        f"loosen one of them{hint}"
    )


def frontier_of_budget(
    table: QualityTable,
    parameters: Mapping[str, float],
    *,
    limits: Limits | None = None,
    budgets: Sequence[float] | None = None,
    prices: Mapping[str, float] | None = None,
    solver: Solver = "auto",
    most: int = 1000,
) -> list[ExpertMap]:
    """The best map of each budget, by rising budget; budgets that host nothing are left out.

    Args:
        table: see `solve_map`, as the arguments not named here.
        budgets: to solve for; if left out, every budget at which the best map changes.
        most: of those; the largest are kept.
        parameters, limits, prices, solver: as of `solve_map`.
    """
    limits = limits or Limits()

    def at(budget: float) -> ExpertMap | None:
        return _solved(Problem.of(table, parameters, prices, limits.replace(budget=float(budget))), solver)

    if budgets is not None:
        return [found for found in map(at, sorted(budgets)) if found is not None]
    maps: list[ExpertMap] = []
    budget = sum(parameters[name] for name in table.experts) if limits.budget is None else limits.budget
    while len(maps) < most and (found := at(budget)) is not None:
        # The best map at this budget is the best at its own size too, as ties went to the smallest.
        maps.append(replace(found, limits=found.limits.replace(budget=found.host)))
        budget = found.host - STEP * max(1.0, found.host)
        if budget < 0:
            break
    return maps[::-1]


def frontier_of_trade_off(
    table: QualityTable,
    parameters: Mapping[str, float],
    *,
    limits: Limits | None = None,
    values: Sequence[float] | None = None,
    prices: Mapping[str, float] | None = None,
    solver: Solver = "auto",
    most: int = 200,
) -> list[ExpertMap]:
    """The best map of each lambda, by rising lambda.

    Args:
        table: see `solve_map`, as the arguments not named here.
        values: lambdas to solve for; if left out, those that lead to all maps on the convex hull of quality over active parameters.
        most: maps at most when ``values`` is left out.
        parameters, limits, prices, solver: as of `solve_map`.
    """
    limits = limits or Limits()

    def at(value: float) -> ExpertMap:
        return solve_map(table, parameters, limits=limits.replace(trade_off=float(value)), prices=prices, solver=solver)

    if values is not None:
        return [at(value) for value in sorted(values)]
    found = {0.0: at(0.0)}
    last = _last_turn(table, parameters)
    if last > 0:
        found[2 * last] = at(2 * last)
        _between(at, found, 0.0, 2 * last, most)
    maps = [found[value] for value in sorted(found)]
    return [one for place, one in enumerate(maps) if place == 0 or dict(one.choice) != dict(maps[place - 1].choice)]


def _between(
    at: Callable[[float], ExpertMap], found: dict[float, ExpertMap], low: float, high: float, most: int
) -> None:
    """Solve where the lines of two neighbouring maps cross; a map that is better there lies between them."""
    open_ends = [(low, high)]
    while open_ends and len(found) < most:
        low, high = open_ends.pop()
        left, right = found[low], found[high]
        if left.active - right.active <= TIE:
            continue
        turn = (left.quality - right.quality) / (left.active - right.active)
        if not low + 1e-12 < turn < high - 1e-12:
            continue
        middle = at(turn)
        if middle.objective > left.quality - turn * left.active + TIE:
            found[turn] = middle
            open_ends += [(low, turn), (turn, high)]


def _last_turn(table: QualityTable, parameters: Mapping[str, float]) -> float:
    """A lambda above which every category prefers the smaller of any two experts."""
    size_E = np.array([parameters[name] for name in table.experts])
    saved_EE = size_E[:, None] - size_E
    lost_CEE = table.quality_CE[:, :, None] - table.quality_CE[:, None, :]
    with np.errstate(invalid="ignore", divide="ignore"):
        rate_CEE = np.where((saved_EE > TIE) & np.isfinite(lost_CEE), lost_CEE / saved_EE, 0.0)
    return float(max(rate_CEE.max(), 0.0))
