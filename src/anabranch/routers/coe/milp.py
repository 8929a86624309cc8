"""Maps by mixed-integer linear programming: SciPy's HiGHS, for any number of experts.

Without a limit on active parameters only the choice of experts is integer, since the best assignment to a given set is whole by itself.
After the best objective is known, a second program finds the smallest set that reaches it, and exchanges settle what is still equal.
"""
# Shapes: C categories, E experts, V variables: z[c,e] row by row, then y[e]

from typing import Any

import numpy as np

from anabranch.errors import BackendError
from anabranch.extras import require
from anabranch.routers.coe.exact import choose_within
from anabranch.routers.coe.limits import TIE, Problem


def solve_milp(problem: Problem) -> np.ndarray | None:
    """The best choice, ``[C]``; None if no choice keeps the limits. Raises BackendError without SciPy, or if HiGHS gives up."""
    kept = problem.kept()
    if not len(kept):
        return None
    program = _Program(problem, kept)
    first = program.solve(-program.worth_V)
    if first is None:
        return None
    best = problem.objective(first)
    smallest = program.solve(program.host_V, at_least=best - TIE)
    if smallest is not None and problem.is_better(smallest, first):
        first = smallest
    return _exchanged(problem, kept, first)


def least_host(problem: Problem) -> float:
    """The smallest budget within which every category has an expert; infinite if there is none."""
    free = np.arange(len(problem.size_E))
    program = _Program(problem, free, budget=np.inf, limited=False)
    found = program.solve(program.host_V)
    return np.inf if found is None else float(problem.size_E[np.unique(found)].sum())


class _Program:
    """The constraints, to be solved for several objectives."""

    def __init__(
        self, problem: Problem, kept: np.ndarray, *, budget: float | None = None, limited: bool = True
    ) -> None:
        require("scipy", by="the solver 'milp'", of="routers")
        from scipy.optimize import LinearConstraint
        from scipy.sparse import coo_array, vstack

        self.problem, self.kept, self.limited = problem, kept, limited
        self.budget = problem.budget if budget is None else budget
        num_c, num_e = len(problem.share_C), len(kept)
        self.shape = num_c, num_e
        value_CE, size_E = problem.value_CE[:, kept], problem.size_E[kept]
        self.open_CE = np.isfinite(value_CE)
        cell = np.arange(num_c * num_e)
        zero_E, zero_CE = np.zeros(num_e), np.zeros(num_c * num_e)
        share_CE = np.repeat(problem.share_C, num_e)
        self.worth_V = np.concatenate((share_CE * np.where(self.open_CE, value_CE, 0.0).ravel(), zero_E))
        self.host_V = np.concatenate((zero_CE, size_E))
        active_V = np.concatenate((share_CE * np.tile(size_E, num_c), zero_E))
        number_V = np.concatenate((zero_CE, np.ones(num_e)))
        width = len(self.worth_V)
        one = coo_array((np.ones(len(cell)), (cell // num_e, cell)), shape=(num_c, width))
        linked = coo_array(
            (
                np.concatenate((np.ones(len(cell)), -np.ones(len(cell)))),
                (np.concatenate((cell, cell)), np.concatenate((cell, len(cell) + cell % num_e))),
            ),
            shape=(len(cell), width),
        )
        limits = [(self.host_V, self.budget)]
        if limited:
            limits += [(number_V, float(problem.most_experts)), (active_V, problem.most_active)]
        limits = [(row_V, most) for row_V, most in limits if np.isfinite(most)]
        self.matrix = vstack([one, linked, *(coo_array(row_V[None]) for row_V, _ in limits)]).tocsr()
        self.low = np.concatenate((np.ones(num_c), np.full(len(cell) + len(limits), -np.inf)))
        self.high = np.concatenate((np.ones(num_c), np.zeros(len(cell)), [most for _, most in limits]))
        self.constraint = LinearConstraint(self.matrix, self.low, self.high)
        whole_cells = limited and problem.limits.active is not None
        self.integer_V = np.concatenate((np.full(len(cell), float(whole_cells)), np.ones(num_e)))

    def solve(self, cost_V: np.ndarray, at_least: float | None = None) -> np.ndarray | None:
        """The choice of least cost, ``[C]``; None if there is none. ``at_least`` bounds the problem's objective."""
        from scipy.optimize import LinearConstraint

        constraints = [self.constraint]
        if at_least is not None:
            constraints.append(LinearConstraint(self.worth_V[None], at_least, np.inf))
        while True:
            members, choice_C = self._solve_once(cost_V, constraints)
            if members is None or choice_C is not None:
                return choice_C
            # HiGHS keeps limits to 1e-6 only. What breaks one by less is excluded: with all larger sets if it is the budget.
            row_V = np.zeros(len(cost_V))
            y_V = row_V[-len(self.kept) :]
            inside_E = np.isin(self.kept, members)
            too_large = self.problem.size_E[members].sum() > self.budget
            y_V[:] = np.where(inside_E, 1.0, 0.0 if too_large else -1.0)
            constraints.append(LinearConstraint(row_V[None], -np.inf, inside_E.sum() - 1.0))

    def _solve_once(self, cost_V: np.ndarray, constraints: list[Any]) -> tuple[np.ndarray | None, np.ndarray | None]:
        """Chosen experts (None if the program has no solution), and their best choice (None if it does not keep the limits)."""
        from scipy.optimize import Bounds, milp

        num_c, num_e = self.shape
        upper_V = np.concatenate((self.open_CE.ravel().astype(np.float64), np.ones(num_e)))
        found = milp(
            cost_V,
            integrality=self.integer_V,
            bounds=Bounds(0, upper_V),
            constraints=constraints,
            options={"mip_rel_gap": 0.0},
        )
        if found.status == 2:
            return None, None
        if found.x is None:
            raise BackendError(f"HiGHS found no map: {found.message}")
        members = self.kept[found.x[num_c * num_e :] > 0.5]
        choice_C = _best(self.problem, members) if self.limited else self.problem.best_within(members)
        if choice_C is not None and self.limited and not self.problem.fits(choice_C):
            choice_C = None
        return members, choice_C


def _exchanged(problem: Problem, kept: np.ndarray, choice_C: np.ndarray) -> np.ndarray:
    """Take one expert for another while that is as good and comes first in the order of ties."""
    improved = True
    while improved:
        improved = False
        used = np.unique(choice_C)
        for old in used:
            for new in (-1, *kept):
                members = np.array([*(at for at in used if at != old), *([new] if new >= 0 else [])], np.int64)
                other_C = _best(problem, members)
                if other_C is not None and problem.fits(other_C) and problem.is_better(other_C, choice_C):
                    choice_C, improved = other_C, True
                    break
            if improved:
                break
    return choice_C


def _best(problem: Problem, members: np.ndarray) -> np.ndarray | None:
    if not len(members):
        return None
    return problem.best_within(members) if problem.limits.active is None else choose_within(problem, members)
