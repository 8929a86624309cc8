"""Exact maps by enumeration of sets of experts, at most 15 of them after dominated ones are left out.

What a set is worth without the limit A is read off a table over all sets, built by doubling. With A, sets are tried by falling upper bound
(Lagrange: the limit's price is paid instead of kept), each by merging categories one at a time and keeping the choices that no other
beats in both value and active parameters.
"""
# Shapes: C categories, E experts, S = 2^E sets

import numpy as np

from anabranch.errors import InputError
from anabranch.routers.coe.limits import TIE, Problem

MOST = 15  # experts


def solve_exact(problem: Problem) -> np.ndarray | None:
    """The best choice, ``[C]``; None if no choice keeps the limits.

    Raises InputError for more than `MOST` experts that do not dominate one another.
    """
    kept = problem.kept()
    if len(kept) > MOST:
        raise InputError(
            f"the exact solver takes {MOST} experts, and {len(kept)} may matter; use solver 'milp' or 'greedy'"
        )
    if not len(kept):
        return None
    worth_S, host_S, count_S = _sets(problem, kept)
    worth_S = np.where((host_S <= problem.budget) & (count_S <= problem.most_experts), worth_S, -np.inf)
    if problem.limits.active is None:
        return _first_of_best(problem, kept, worth_S, host_S, count_S)
    return _within_active(problem, kept, worth_S)


def _sets(problem: Problem, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Objective without A (-inf where a category has no expert), parameters and number of experts of every set."""
    value_CE, size_E = problem.value_CE[:, kept], problem.size_E[kept]
    best_SC = np.full((2 ** len(kept), len(value_CE)), -np.inf)
    host_S, count_S = np.zeros(len(best_SC)), np.zeros(len(best_SC), np.int64)
    for expert in range(len(kept)):
        low, high = slice(0, 2**expert), slice(2**expert, 2 ** (expert + 1))
        best_SC[high] = np.maximum(best_SC[low], value_CE[:, expert])
        host_S[high], count_S[high] = host_S[low] + size_E[expert], count_S[low] + 1
    whole_S = np.isfinite(best_SC).all(axis=1)
    worth_S = np.where(whole_S, np.where(np.isfinite(best_SC), best_SC, 0.0) @ problem.share_C, -np.inf)
    return worth_S, host_S, count_S


def _members(number: int, kept: np.ndarray) -> np.ndarray:
    return kept[(number >> np.arange(len(kept))) & 1 == 1]


def _first_of_best(
    problem: Problem, kept: np.ndarray, worth_S: np.ndarray, host_S: np.ndarray, count_S: np.ndarray
) -> np.ndarray | None:
    if not np.isfinite(worth_S).any():
        return None
    best = np.flatnonzero(worth_S >= worth_S.max() - TIE)
    best = best[host_S[best] <= host_S[best].min() + TIE]
    price_S = ((best[:, None] >> np.arange(len(kept))) & 1) @ problem.price_E[kept]
    best = best[price_S <= price_S.min() + TIE]
    best = best[count_S[best] == count_S[best].min()]
    found: np.ndarray | None = None
    for number in best:
        choice_C = problem.best_within(_members(int(number), kept))
        if choice_C is not None and (found is None or problem.key(choice_C) < problem.key(found)):
            found = choice_C
    return found


def _within_active(problem: Problem, kept: np.ndarray, worth_S: np.ndarray) -> np.ndarray | None:
    """The best set under A: sets by falling upper bound, until the bound of the next lies below what was found."""
    bound_S = np.minimum(worth_S, _bounds(problem, kept, worth_S))
    found: np.ndarray | None = None
    for number in np.argsort(-bound_S, kind="stable"):
        if not np.isfinite(bound_S[number]) or (found is not None and bound_S[number] < problem.objective(found) - TIE):
            break
        floor = -np.inf if found is None else problem.objective(found)
        choice_C = choose_within(problem, _members(int(number), kept), floor)
        if choice_C is not None and problem.is_better(choice_C, found):
            found = choice_C
    return found


def _bounds(problem: Problem, kept: np.ndarray, worth_S: np.ndarray) -> np.ndarray:
    """For every set: the least over some prices mu of sum_c w_c max_e (v - mu P) + mu A, which no choice within A can pass."""
    size_E = problem.size_E[kept]
    spread = float(np.ptp(problem.value_CE[np.isfinite(problem.value_CE)]))
    steps = np.diff(np.unique(size_E))
    bound_S = worth_S.copy()
    if not len(steps) or spread == 0:
        return bound_S
    for mu in np.geomspace(spread / size_E.max() / 16, 4 * spread / steps.min(), 12):
        best_SC = np.full((len(worth_S), len(problem.value_CE)), -np.inf)
        for expert, at in enumerate(kept):
            low, high = slice(0, 2**expert), slice(2**expert, 2 ** (expert + 1))
            best_SC[high] = np.maximum(best_SC[low], problem.value_CE[:, at] - mu * size_E[expert])
        finite_SC = np.where(np.isfinite(best_SC), best_SC, 0.0)
        bound_S = np.minimum(bound_S, finite_SC @ problem.share_C + mu * problem.most_active)
    return bound_S


def choose_within(problem: Problem, members: np.ndarray, floor: float = -np.inf) -> np.ndarray | None:
    """The best choice of these experts that keeps A; None if there is none, or none worth at least ``floor``."""
    options = [_options(problem, category, members) for category in range(len(problem.share_C))]
    if not all(len(own) for own in options):
        return None
    weight_C = problem.share_C
    least_C = np.array([weight_C[c] * problem.size_E[own].min() for c, own in enumerate(options)])
    most_C = np.array([weight_C[c] * problem.value_CE[c, own].max() for c, own in enumerate(options)])
    active, value, trail = np.zeros(1), np.zeros(1), []
    for category, own in enumerate(options):
        added = weight_C[category] * problem.size_E[own], weight_C[category] * problem.value_CE[category, own]
        active_FO, value_FO = active[:, None] + added[0], value[:, None] + added[1]
        flat, worth = active_FO.ravel(), value_FO.ravel()
        fits = flat + least_C[category + 1 :].sum() <= problem.most_active
        fits &= worth + most_C[category + 1 :].sum() >= floor - TIE
        at = np.flatnonzero(fits)
        # By falling value: keep what uses less than all before it.
        at = at[np.lexsort((flat[at], -worth[at]))]
        before = np.concatenate(([np.inf], np.minimum.accumulate(flat[at])[:-1]))
        at = at[flat[at] < before]
        if not len(at):
            return None
        active, value = flat[at], worth[at]
        trail.append((at // len(own), own[at % len(own)]))
    place, choice = 0, []
    # Place 0 has the largest value.
    for came_from, expert in reversed(trail):
        choice.append(expert[place])
        place = came_from[place]
    return np.array(choice[::-1], np.int64)


def _options(problem: Problem, category: int, members: np.ndarray) -> np.ndarray:
    """Experts of a category that are better than all smaller ones."""
    value = problem.value_CE[category, members]
    before = np.concatenate(([-np.inf], np.maximum.accumulate(value)[:-1]))
    return members[value > before]
