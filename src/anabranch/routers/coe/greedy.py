"""Maps by greed: add the expert that helps most, per parameter or at all, then exchange; quick for hundreds of experts, not always best."""
# Shapes: C categories, E experts

import numpy as np

from anabranch.routers.coe.limits import Problem


def solve_greedy(problem: Problem) -> np.ndarray | None:
    """A good choice, ``[C]``; None if none was found that keeps the limits (there may be one)."""
    kept = problem.kept()
    best: np.ndarray | None = None
    starts = [[int(at)] for at in kept] if len(kept) <= 64 else [[int(at)] for at in kept[:64]]
    for by_size in (True, False):
        for start in (_cover(problem, kept), *starts):
            if start is None:
                continue
            choice_C = _grown(problem, kept, start, by_size)
            if choice_C is not None and problem.is_better(choice_C, best):
                best = choice_C
    return best


def _grown(problem: Problem, kept: np.ndarray, start: list[int], by_size: bool) -> np.ndarray | None:
    """Add experts to ``start`` while one fits and helps."""
    members, found = list(start), _choice(problem, start)
    while True:
        best = (0.0, -1)
        now = None if found is None else problem.objective(found)
        for at in kept:
            trial = None if at in members else _choice(problem, [*members, int(at)])
            if trial is None:
                continue
            gain = problem.objective(trial) - now if now is not None else np.inf
            rate = gain / max(problem.size_E[at], 1e-12) if by_size and now is not None else gain
            if rate > best[0] + 1e-15:
                best = (rate, int(at))
        if best[1] < 0:
            return found
        members.append(best[1])
        found = _choice(problem, members)


def _choice(problem: Problem, members: list[int]) -> np.ndarray | None:
    """The best choice of these experts within the limits; the limit A is kept by taking smaller experts where that costs least."""
    used = np.array(members)
    if problem.size_E[used].sum() > problem.budget or len(used) > problem.most_experts:
        return None
    choice_C = problem.best_within(used)
    while choice_C is not None and problem.active(choice_C) > problem.most_active:
        saved_CE = problem.share_C[:, None] * (problem.size_E[choice_C][:, None] - problem.size_E[used])
        value_C1 = problem.value_CE[np.arange(len(choice_C)), choice_C][:, None]
        value_CE = problem.value_CE[:, used]
        lost_CE = problem.share_C[:, None] * (value_C1 - np.where(np.isfinite(value_CE), value_CE, 0.0))
        helps_CE = (saved_CE > 1e-12) & np.isfinite(value_CE)
        rate_CE = np.where(helps_CE, lost_CE / np.maximum(saved_CE, 1e-12), np.inf)
        category, at = np.unravel_index(np.argmin(rate_CE), rate_CE.shape)
        if not np.isfinite(rate_CE[category, at]):
            return None
        choice_C[category] = used[at]
    return choice_C


def _cover(problem: Problem, kept: np.ndarray) -> list[int] | None:
    """A small set that serves every category: the expert for most of the open categories per parameter, until none is open."""
    open_C, members = np.ones(len(problem.share_C), bool), []
    can_CE = np.isfinite(problem.value_CE)
    while open_C.any():
        rate = [can_CE[open_C, at].sum() / max(problem.size_E[at], 1e-12) if at not in members else 0.0 for at in kept]
        if not rate or max(rate) == 0:
            return None
        members.append(int(kept[int(np.argmax(rate))]))
        open_C &= ~can_CE[:, members[-1]]
    return members
