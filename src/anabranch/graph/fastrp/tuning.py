"""The search for weights and beta that FastRP's authors left to a hyper-parameter tool. Powers do not depend on weights, so one set of
products serves several trials.

As published: vectors of 64 columns, rows normalised, weights (0, ..., 0, 1, w) with w log-uniform in [1, 64], beta uniform in [-1, 0],
macro F1 at 10% training nodes. Ours draws points that fill the ranges evenly (van der Corput's), the second half of them near the best.
``orders`` also tries longer walks, which cost no further products: powers of the longest are those of all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from anabranch.errors import InputError
from anabranch.graph.evaluate import HeldOut, classify_nodes, link_auc

# Weights that are tried with one beta.
PER_POWERS = 4

# Weight of the last order.
LARGEST = 64.0


class Embedder(Protocol):
    """What is read of a `anabranch.graph.fastrp.model.FastRP`, which calls this search and so is not imported here."""

    weights: Any

    def get_params(self) -> dict[str, Any]:
        """Its arguments."""

    def powers(self, graph: Any, order: int | None = None) -> Any:
        """What vectors are made of, for any weights."""

    def combine(self, powers: Any, weights: Any = None) -> np.ndarray:
        """Vectors of them."""


@dataclass(frozen=True)
class Trial:
    """One point of the search and its score."""

    beta: float
    weights: tuple[float, ...]
    score: float


@dataclass(frozen=True)
class Tuning:
    """What the search found.

    Attributes:
        best: a `FastRP` as the one tuned, with the best weights and beta, not fitted.
        trials: all, in order.
        objective: what a score is: ``macro_f1``, ``micro_f1`` or ``auc``.
    """

    best: Any
    trials: tuple[Trial, ...]
    objective: str


def tune(
    model: Embedder,
    graph: Any,
    labels: Any = None,
    *,
    edges: HeldOut | None = None,
    trials: int = 20,
    dim: int = 64,
    order: int | None = None,
    orders: Sequence[int] | None = None,
    objective: Literal["macro_f1", "micro_f1"] = "macro_f1",
    train_fraction: float = 0.1,
    shuffles: Sequence[int] = (0,),
    C: float = 1.0,
) -> Tuning:
    """Search weights (the last against the one before) and beta.

    Args:
        model: what is to be tuned; all else stays.
        graph: what `FastRP.fit` takes; with ``edges`` it is ``edges.graph`` and may be None.
        labels: of nodes, as `classify_nodes` takes them. Labels that final figures are reported on should not be among them.
        edges: instead of labels, what `hold_out_edges` gave: the score is the AUC of cosines.
        trials: how many points.
        dim: columns during the search.
        order: q; default as in ``model``.
        orders: several q instead, tried in turn.
        objective: which F1.
        train_fraction: of nodes. ``shuffles``: seeds of splits, means are taken. ``C``: of the classifier.

    Raises InputError unless exactly one of labels and edges is given, and for values out of range.
    """
    if (labels is None) == (edges is None):
        raise InputError("give either labels or edges (what hold_out_edges returned) to score trials by")
    if trials < 1:
        raise InputError(f"trials is {trials}; it must be at least 1")
    if objective not in ("macro_f1", "micro_f1"):
        raise InputError(f"objective is {objective!r}; it must be 'macro_f1' or 'micro_f1'")
    if order is not None and orders is not None:
        raise InputError("give either order or orders, not both")
    counts = tuple(orders) if orders is not None else (len(model.weights) if order is None else order,)
    if not counts or min(counts) < 1:
        raise InputError(f"order is {order if orders is None else orders}; it must be at least 1")

    def score(embedding_ND: np.ndarray) -> float:
        if edges is not None:
            return link_auc(embedding_ND, edges.positive_E2, edges.negative_E2, operator="cosine")
        found = classify_nodes(embedding_ND, labels, train_fraction=train_fraction, seeds=shuffles, C=C)
        return found.macro if objective == "macro_f1" else found.micro

    source = graph if edges is None else edges.graph
    done: list[Trial] = []
    while len(done) < trials:
        group = len(done) // PER_POWERS
        near = max(done, key=lambda trial: trial.score) if 2 * len(done) >= trials and done else None
        beta = _point(group, 2, -1.0, 0.0, None if near is None else near.beta)
        small = _like(model, dim=dim, beta=beta, weights=_weights(max(counts), 1.0))
        powers = small.powers(source, max(counts))
        for place in range(min(PER_POWERS, trials - len(done))):
            last = None if near is None else float(np.log(near.weights[-1]))
            size = float(np.exp(_point(group * PER_POWERS + place, 3, 0.0, float(np.log(LARGEST)), last)))
            # The better half goes by the best trial's.
            count = counts[len(done) % len(counts)] if near is None else len(near.weights)
            weights = _weights(count, size)
            done.append(Trial(beta, weights, score(small.combine(powers, weights))))
    best = max(done, key=lambda trial: trial.score)
    chosen = _like(model, beta=best.beta, weights=best.weights)
    return Tuning(chosen, tuple(done), "auc" if edges is not None else objective)


def _like(model: Embedder, **changes: Any) -> Any:
    return type(model)(**{**model.get_params(), **changes})


def _weights(count: int, last: float) -> tuple[float, ...]:
    return (*([0.0] * (count - 2)), 1.0, last) if count > 1 else (1.0,)


def _point(number: int, base: int, low: float, high: float, near: float | None) -> float:
    """Van der Corput's ``number``-th point in the range, or in the quarter of it around ``near``."""
    unit, digit = 0.0, 1.0 / base
    number += 1
    while number:
        number, rest = divmod(number, base)
        unit += rest * digit
        digit /= base
    if near is None:
        return low + unit * (high - low)
    return min(max(near + (unit - 0.5) * (high - low) / 4, low), high)
