"""What the checks of a strategy are made of: what must hold of a decision or of recorded play, and how states are compared."""

import json
from collections.abc import Callable
from typing import Any

import numpy as np

from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.query import Decision, Pool
from anabranch.routers.contract.strategy import Played, Strategy

# Of scores: a product of one row is summed in another order than of many.
TOLERANCE = 1e-4


def check_decision(decision: Decision, pool: Pool) -> None:
    """Raises AssertionError for a decision that is not sound in this pool."""
    names = names_of(decision)
    ensure(len(names) > 0, "a decision has no candidate")
    ensure(len(set(names)) == len(names), f"a decision names a model twice: {names}")
    ensure(set(names) <= set(pool.names), f"a decision names {sorted(set(names) - set(pool.names))}, not in the pool")
    scores = [candidate.score for candidate in decision.candidates]
    ensure(
        bool(np.isfinite(scores).all()) and scores == sorted(scores, reverse=True),
        f"scores are not finite and falling: {scores}",
    )
    ensure(bool(decision.strategy) and bool(decision.reason), "a decision names no strategy, or gives no reason")
    ensure(decision.confidence is None or 0 <= decision.confidence <= 1, f"confidence is {decision.confidence}")
    chance = decision.probability
    ensure(chance is None or 0 < chance <= 1, f"probability is {chance}; it must be above 0 and at most 1, or None")
    ensure(
        json.loads(json.dumps(dict(decision.details), allow_nan=False)) is not None, "details are not ready for JSON"
    )


def check_played(played: Played, data: Recorded) -> None:
    """Raises AssertionError for play that does not fit what was recorded."""
    rows = np.arange(len(data))
    ensure(
        played.model_N.shape == (len(data),) and played.calls_NM.shape == data.score_NM.shape,
        "what was played has other shapes than the data",
    )
    ensure(
        np.array_equal(played.quality_N, data.score_NM[rows, played.model_N], equal_nan=True),
        "qualities are not those of the chosen models",
    )
    ensure(bool(played.calls_NM[rows, played.model_N].all()), "the model whose answer was given was not asked")
    if data.cost_NM is not None:
        asked_N = np.where(played.calls_NM, data.cost_NM, 0).sum(1)
        ensure(bool((played.cost_N >= asked_N * (1 - 1e-9)).all()), "a call is not counted in the cost")


def chosen_of(decision: Decision) -> Any:
    """What must agree between twins; details may tell of caches."""
    return decision.candidates, decision.confidence


def names_of(decision: Decision) -> list[str]:
    """Models of a decision, best first."""
    return [candidate.model for candidate in decision.candidates]


def through_json(strategy: Strategy) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """State as a file keeps it."""
    arrays, facts = strategy.state()
    return copied(arrays), json.loads(json.dumps(facts, allow_nan=False))


def through_json_part(strategy: Strategy) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Its part as a store keeps it."""
    arrays, facts = strategy.part()
    return copied(arrays), json.loads(json.dumps(facts, allow_nan=False))


def copied(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Arrays that nobody else changes."""
    return {name: np.array(array) for name, array in arrays.items()}


def same_arrays(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> bool:
    """Whether two states are equal to the bit."""
    return first.keys() == second.keys() and all(
        np.asarray(first[name]).dtype == np.asarray(second[name]).dtype
        and np.array_equal(first[name], second[name], equal_nan=first[name].dtype.kind == "f")
        for name in first
    )


def refuses(call: Callable[[], Any], error: type[Exception], what: str) -> None:
    """Raises AssertionError, with ``what`` should have been refused, unless the call raises such an error."""
    try:
        call()
    except error:
        return
    except Exception as other:
        raise AssertionError(f"{what} raises {type(other).__name__}, not {error.__name__}: {other}") from other
    raise AssertionError(f"{what} is not refused")


def ensure(condition: bool, message: str) -> None:
    """Raises AssertionError with the message unless it holds."""
    if not condition:
        raise AssertionError(message)
