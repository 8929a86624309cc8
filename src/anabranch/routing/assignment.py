"""Balanced assignment, solved exactly, and the audit that says how far a router is from it.

T tokens go to K of E destinations each, and every destination takes its share L = K T / E:

    max sum_ij s_ij x_ij    s.t.  sum_j x_ij = K,  sum_i x_ij = L,  0 <= x_ij <= 1

A transportation problem, so an integral optimum exists. Prices b relax the shares: the dual

    D(b) = sum_i (sum of the K largest of s_i + b) - L sum_j b_j

is convex and at least the optimum for every b, and loads(b) - L is a subgradient, which is what a loss-free balancer steps along ("A
Theoretical Framework for Auxiliary-Loss-Free Load Balancing", Han and Zhong, arXiv 2512.03915; derivations are ours, see
docs/systems/alf-lb.md). `price_solve` needs no model: items to capacity-limited servers is the same problem.

Method of `price_solve`: quantile balancing (alternating exact minimisation over the thresholds of tokens and the prices of destinations)
halves the excess load each round; shortest augmenting paths over the E destinations then move the last few tokens, which keeps
optimality, so the result is exact but for rounding.
"""
# Shapes: T tokens, E destinations, K choices per token

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from anabranch.errors import AnabranchError, ConfigError, DataError
from anabranch.routing.measure import max_violation

# Rounds of quantile balancing at most; about 8 suffice.
ROUNDS = 40
# Spread of the noise, over that of the scores, that parts ties; prices alone cannot.
SPREAD = 1e-10
# Excess load, as a share of all, below which paths are quicker than another round.
LEFT_OVER = 1e-3


@dataclass(frozen=True)
class Assignment:
    """A balanced assignment with its certificate.

    Attributes:
        index_TK: int64, the destinations of each token.
        price_E: optimal prices, mean 0: choosing the K largest of score + price gives this assignment, but for ties.
        objective: sum of the chosen scores.
        bound: the dual at ``price_E``; no assignment of these capacities scores more.
        load_E: tokens of each destination; equal to the capacities.
        gap: (bound - objective) over |bound|, or over what random choices of as large scores would make if that is more.
    """

    index_TK: np.ndarray
    price_E: np.ndarray
    objective: float
    bound: float
    load_E: np.ndarray
    gap: float


def price_solve(
    score_TE: ArrayLike, top_k: int, tol: float = 1e-4, *, capacity_E: Sequence[int] | None = None
) -> Assignment:
    """The best assignment of each token to ``top_k`` distinct destinations within exact capacities.

    Args:
        score_TE: what each token gains at each destination; finite.
        top_k: K, at most E.
        tol: relative gap that the result is certified to have (in practice it is about 1e-10).
        capacity_E: tokens of each destination, at most T, K T in all. Default: even; where K T / E is not whole, the
            destinations in most demand take one more.

    Raises ConfigError for a bad K, tolerance or capacity, DataError for scores that are not a finite matrix, AnabranchError if the gap is
    not reached (scores of very different magnitude).
    """
    score_TE, top_k = _checked(score_TE, top_k)
    num_tokens, num_destinations = score_TE.shape
    if not tol > 0:
        raise ConfigError(f"tol is {tol}; it must be greater than 0")
    capacity = _capacities(score_TE, top_k, capacity_E)
    noise_TE = np.random.default_rng(0).random(score_TE.shape)
    parted_TE = score_TE + SPREAD * (np.ptp(score_TE) if score_TE.size else 0.0) * noise_TE
    price_E = np.zeros(num_destinations)
    if 0 < top_k < num_destinations and num_tokens > 1:
        price_E = _balance_quantiles(parted_TE, top_k, capacity)
    flow = _Flow(parted_TE + price_E, top_k)
    flow.route_to(capacity)
    price_E = price_E + flow.potential_E()
    price_E -= price_E.mean()
    index_TK = np.nonzero(flow.chosen_TE)[1].reshape(num_tokens, top_k)
    objective = float(score_TE[flow.chosen_TE].sum())
    bound = float(_top_values(score_TE + price_E, top_k).sum() - capacity @ price_E)
    scale = max(abs(bound), top_k * float(np.abs(score_TE).sum()) / num_destinations, 1e-300)
    found = Assignment(index_TK, price_E, objective, bound, flow.load_E, (bound - objective) / scale)
    if not found.gap <= tol:
        raise AnabranchError(
            f"the assignment is certified to a relative gap of {found.gap:.1e} only, not tol = {tol:.1e}"
        )
    return found


def dual_value(score_TE: ArrayLike, top_k: int, bias_E: ArrayLike) -> float:
    """D(b), at least the score of any balanced assignment; L = K T / E need not be whole."""
    score_TE, top_k = _checked(score_TE, top_k)
    bias_E = np.asarray(bias_E, np.float64)
    share = top_k * score_TE.shape[0] / score_TE.shape[1]
    return float(_top_values(score_TE + bias_E, top_k).sum() - share * bias_E.sum())


def choose(score_TE: np.ndarray, top_k: int, bias_E: np.ndarray | float = 0.0) -> np.ndarray:
    """bool ``[T, E]``: the K largest of score + bias of each token, ties to the lowest index."""
    order_TE = np.argsort(-(score_TE + bias_E), axis=1, kind="stable")
    chosen_TE = np.zeros(score_TE.shape, bool)
    np.put_along_axis(chosen_TE, order_TE[:, :top_k], True, axis=1)
    return chosen_TE


def preference_violations(score_TE: ArrayLike, top_k: int, before_E: ArrayLike, after_E: ArrayLike) -> int:
    """Tokens that between two biases drop a destination whose bias rose more than that of one they take; 0 by the theory.

    If token i drops a and takes b at fixed scores, then b's bias rose at least as much as a's, whatever rule moved them.
    """
    score_TE, top_k = _checked(score_TE, top_k)
    before_E, after_E = np.asarray(before_E, np.float64), np.asarray(after_E, np.float64)
    old_TE, new_TE = choose(score_TE, top_k, before_E), choose(score_TE, top_k, after_E)
    # Rounding of score + bias.
    slack = 1e-12 * max(1.0, np.abs(score_TE).max(initial=0), np.abs(after_E).max(initial=0))
    return broken_preferences(old_TE, new_TE, after_E - before_E, slack)


def broken_preferences(old_TE: np.ndarray, new_TE: np.ndarray, moved_E: np.ndarray, slack: float = 0.0) -> int:
    """`preference_violations` of choices that are known: bool ``[T, E]`` before and after the bias moved by ``moved_E``."""
    dropped_T = np.where(old_TE & ~new_TE, moved_E, -np.inf).max(1)
    taken_T = np.where(new_TE & ~old_TE, moved_E, np.inf).min(1)
    return int((dropped_T > taken_T + slack).sum())


@dataclass(frozen=True)
class Audit:
    """How a router's choices compare with the optimal balanced assignment of the same scores.

    Attributes:
        optimum: score of the best balanced assignment.
        bound: of any balanced assignment (the dual at the optimal prices); ``optimum`` up to rounding and uneven shares.
        achieved: score of the router's choices (with its bias); above ``optimum`` where it is not balanced.
        dual: D of the router's bias. ``duality_gap``: (dual - optimum) / |optimum|, 0 for an optimal bias.
        max_violation, min_violation: of loads: max_j and min_j of A_j / L - 1; ``mean_violation``: mean of the absolute values.
        load_E, price_E: the router's loads, and optimal prices.
        correlation: of the bias with the prices; nan without a bias, or a constant one.
        preference_violations: see the function; None without the bias of the step before.
    """

    optimum: float
    bound: float
    achieved: float
    dual: float
    duality_gap: float
    max_violation: float
    min_violation: float
    mean_violation: float
    load_E: np.ndarray
    price_E: np.ndarray
    correlation: float
    preference_violations: int | None


def balance_audit(
    score_TE: ArrayLike,
    top_k: int,
    bias_E: ArrayLike | None = None,
    *,
    previous_E: ArrayLike | None = None,
    tol: float = 1e-4,
    name: str = "",
) -> Audit:
    """Audit the routing of one batch: what its bias achieves, beside the optimum of the same scores.

    Args:
        score_TE: scores that selection adds the bias to.
        top_k: K.
        bias_E: the router's bias (default: none).
        previous_E: its bias one step before.
        tol: see `price_solve`.
        name: of the layer, for messages.

    Raises DataError and ConfigError as `price_solve`, and for a bias of another length.
    """
    score_TE, top_k = _checked(score_TE, top_k, name)
    num_tokens, num_destinations = score_TE.shape
    bias = np.zeros(num_destinations) if bias_E is None else np.asarray(bias_E, np.float64)
    if bias.shape != (num_destinations,):
        raise ConfigError(f"the bias has shape {bias.shape}, but there are {num_destinations} destinations")
    best = price_solve(score_TE, top_k, tol)
    chosen_TE = choose(score_TE, top_k, bias)
    load_E = chosen_TE.sum(0)
    violation_E = load_E / (top_k * num_tokens / num_destinations) - 1
    dual = dual_value(score_TE, top_k, bias)
    varied = np.ptp(bias) > 0 and np.ptp(best.price_E) > 0
    return Audit(
        optimum=best.objective,
        bound=dual_value(score_TE, top_k, best.price_E),
        achieved=float(score_TE[chosen_TE].sum()),
        dual=dual,
        duality_gap=(dual - best.objective) / max(abs(best.objective), 1e-300),
        max_violation=float(max_violation(load_E)),
        min_violation=float(violation_E.min()),
        mean_violation=float(np.abs(violation_E).mean()),
        load_E=load_E,
        price_E=best.price_E,
        correlation=float(np.corrcoef(bias, best.price_E)[0, 1]) if varied else float("nan"),
        preference_violations=None if previous_E is None else preference_violations(score_TE, top_k, previous_E, bias),
    )


def _checked(score_TE: ArrayLike, top_k: int, name: str = "") -> tuple[np.ndarray, int]:
    score_TE = np.asarray(score_TE, np.float64)
    where = f" of layer {name}" if name else ""
    if score_TE.ndim != 2 or not score_TE.shape[1]:
        raise DataError(f"scores{where} are [tokens, destinations], not {score_TE.shape}")
    if not np.isfinite(score_TE).all():
        token, destination = np.argwhere(~np.isfinite(score_TE))[0]
        raise DataError(f"score{where} of token {token}, destination {destination} is {score_TE[token, destination]}")
    if not 1 <= top_k <= score_TE.shape[1]:
        raise ConfigError(
            f"top_k is {top_k}, but there are {score_TE.shape[1]} destinations; use 1 to {score_TE.shape[1]}"
        )
    return score_TE, top_k


def _capacities(score_TE: np.ndarray, top_k: int, capacity_E: Sequence[int] | None) -> np.ndarray:
    num_tokens, num_destinations = score_TE.shape
    total = num_tokens * top_k
    if capacity_E is None:
        capacity = np.full(num_destinations, total // num_destinations)
        demand_E = choose(score_TE, top_k).sum(0)
        capacity[np.argsort(-demand_E, kind="stable")[: total % num_destinations]] += 1
        return capacity
    capacity = np.asarray(capacity_E)
    if capacity.shape != (num_destinations,) or not np.issubdtype(capacity.dtype, np.integer):
        raise ConfigError(f"capacity_E needs a whole number for each of {num_destinations} destinations")
    if capacity.sum() != total or capacity.min() < 0 or capacity.max() > num_tokens:
        raise ConfigError(
            f"capacities are {capacity.min()} to {capacity.max()} and {capacity.sum()} in all; they must be 0 to {num_tokens} "
            f"(tokens) and {total} in all"
        )
    return capacity


def _top_values(value_TE: np.ndarray, top_k: int) -> np.ndarray:
    size = value_TE.shape[1]
    return value_TE if top_k == size else np.partition(value_TE, size - top_k, axis=1)[:, size - top_k :]


def _balance_quantiles(score_TE: np.ndarray, top_k: int, capacity: np.ndarray) -> np.ndarray:
    """Prices whose loads are near the capacities: thresholds and prices in turn, each to its exact minimum of the dual."""
    num_tokens, num_destinations = score_TE.shape
    score_ET = np.ascontiguousarray(score_TE.T)
    between_K = num_destinations - top_k
    price_E, best_E, least = np.zeros(num_destinations), np.zeros(num_destinations), np.inf
    for _ in range(ROUNDS):
        value_TE = np.partition(score_TE + price_E, (between_K - 1, between_K), axis=1)
        threshold_T = value_TE[:, between_K - 1 : between_K + 1].mean(1)
        load_E = (score_ET + price_E[:, None] > threshold_T).sum(1)
        excess = np.maximum(load_E - capacity, 0).sum()
        # Of a finite batch, prices can balance only so much.
        if excess >= 0.9 * least:
            break
        least, best_E = excess, price_E
        if excess <= LEFT_OVER * num_tokens * top_k:
            break
        margin_ET = score_ET - threshold_T
        price_E = -np.array([_between(row_T, count) for row_T, count in zip(margin_ET, capacity, strict=True)])
        price_E -= price_E.mean()
    return best_E


def _between(margin_T: np.ndarray, count: int) -> float:
    """The middle between the ``count``-th and the next largest."""
    at = int(np.clip(len(margin_T) - count, 1, len(margin_T) - 1))
    return float(np.partition(margin_T, (at - 1, at))[at - 1 : at + 1].mean())


class _Flow:
    """An assignment that is optimal for its own loads, and the cheapest single move from each destination to each other.

    ``cost_EE[j, m]`` is the least loss of moving a token from j to m, ``token_EE[j, m]`` which one. A path of moves from an
    overloaded to an underloaded destination that is shortest keeps the assignment optimal for the loads it then has.
    """

    def __init__(self, value_TE: np.ndarray, top_k: int) -> None:
        self.value_TE = value_TE
        self.slack = 1e-13 * max(1.0, float(np.abs(value_TE).max(initial=0)))
        self.chosen_TE = choose(value_TE, top_k)
        self.load_E = self.chosen_TE.sum(0)
        num_destinations = value_TE.shape[1]
        self.cost_EE = np.full((num_destinations, num_destinations), np.inf)
        self.token_EE = np.full((num_destinations, num_destinations), -1)
        for source in range(num_destinations):
            self._find_moves(source)

    def route_to(self, capacity: np.ndarray) -> None:
        """Move tokens until the loads are the capacities."""
        while (self.load_E > capacity).any():
            distance_E, before_E = self._distances(np.where(self.load_E > capacity, 0.0, np.inf))
            at = int(np.argmin(np.where(self.load_E < capacity, distance_E, np.inf)))
            path = [at]
            while before_E[at] >= 0:
                at = int(before_E[at])
                path.append(at)
            moves = [(self.token_EE[source, to], source, to) for to, source in itertools.pairwise(path)]
            for token, source, to in moves:
                self._move(int(token), source, to)

    def potential_E(self) -> np.ndarray:
        """What to add to prices so that this assignment chooses the largest values."""
        return self._distances(np.zeros(len(self.load_E)))[0]

    def _distances(self, start_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shortest paths from where ``start_E`` is finite (Bellman-Ford: a move may gain), and what stands before each end."""
        distance_E, before_E = start_E, np.full(len(start_E), -1)
        for _ in range(len(start_E)):
            through_EE = distance_E[:, None] + self.cost_EE
            nearest_E = through_EE.min(0)
            # Rounding must not close a circle.
            closer_E = nearest_E < distance_E - self.slack
            if not closer_E.any():
                break
            before_E = np.where(closer_E, through_EE.argmin(0), before_E)
            distance_E = np.where(closer_E, nearest_E, distance_E)
        return distance_E, before_E

    def _move(self, token: int, source: int, to: int) -> None:
        value_E, chosen_E = self.value_TE[token], self.chosen_TE[token]
        chosen_E[source], chosen_E[to] = False, True
        self.load_E[source] -= 1
        self.load_E[to] += 1
        for holder in np.flatnonzero(chosen_E).tolist():
            # From where it came to it can move on to every destination that it has not.
            if holder == to:
                self._offer(token, to, ~chosen_E, value_E)
            else:
                self._offer(token, holder, np.arange(len(chosen_E)) == source, value_E)
                if self.token_EE[holder, to] == token:
                    self._find_moves(holder, to)
        self._find_moves(source)

    def _offer(self, token: int, source: int, open_E: np.ndarray, value_E: np.ndarray) -> None:
        loss_E = value_E[source] - value_E
        better_E = open_E & (loss_E < self.cost_EE[source])
        self.cost_EE[source, better_E] = loss_E[better_E]
        self.token_EE[source, better_E] = token

    def _find_moves(self, source: int, to: int | None = None) -> None:
        token_X = np.flatnonzero(self.chosen_TE[:, source])
        columns = slice(None) if to is None else slice(to, to + 1)
        if not len(token_X):
            self.cost_EE[source, columns] = np.inf
            return
        loss_XE = self.value_TE[token_X, source, None] - self.value_TE[token_X, columns]
        loss_XE[self.chosen_TE[token_X, columns]] = np.inf
        best_E = loss_XE.argmin(0)
        self.cost_EE[source, columns] = loss_XE[best_E, np.arange(loss_XE.shape[1])]
        self.token_EE[source, columns] = token_X[best_E]
