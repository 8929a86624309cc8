"""What a strategy decided, or wants sent: whether it can be, before anything is paid."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

from anabranch.gateway.plain_values import number_of
from anabranch.routers.contract.query import Candidate, Decision, Pool

# Of a decision's figures.
MOST_INTEGER = 10**300
_OWN = (int, float, bool, type(None))


class BypassError(Exception):
    """A strategy cannot be asked, or said what cannot be; ``why`` is one word for the counter, ``lasts`` as in `Decided`."""

    def __init__(self, why: str, message: str, lasts: bool = False) -> None:
        super().__init__(message)
        self.why, self.lasts = why, lasts


def plain_decision(given: Any, pool: Pool) -> Decision:
    """What a strategy decided, with figures of Python's own where they are of another library. Raises BypassError, as `check_decision`."""
    decision = _with_own_figures(given) if isinstance(given, Decision) else given
    check_decision(decision, pool)
    return cast(Decision, decision)


def _with_own_figures(decision: Decision) -> Decision:
    """The very same where nothing is to be changed; what is no figure stays."""
    changes: dict[str, Any] = _odd_figures(decision, ("confidence", "probability"))
    candidates = decision.candidates
    if isinstance(candidates, tuple | list) and all(isinstance(one, Candidate) for one in candidates):
        odd = [_odd_figures(one, ("score", "quality", "cost")) for one in candidates]
        if any(odd):
            changes["candidates"] = tuple(
                replace(one, **more) if more else one for one, more in zip(candidates, odd, strict=True)
            )
    return replace(decision, **changes) if changes else decision


def _odd_figures(held: Decision | Candidate, names: Sequence[str]) -> dict[str, Any]:
    found = {name: number_of(value) for name in names if type(value := getattr(held, name)) not in _OWN}
    return {name: value for name, value in found.items() if value is not None}


def check_decision(decision: Any, pool: Pool) -> None:
    """Raises BypassError for what is no decision on this pool."""
    if not isinstance(decision, Decision) or not decision.candidates:
        raise BypassError("empty", "it named no model")
    if not isinstance(decision.candidates, tuple | list) or not all(
        isinstance(one, Candidate) and isinstance(one.model, str) for one in decision.candidates
    ):
        raise BypassError("odd", "its candidates are no Candidates with names of models")
    names = [candidate.model for candidate in decision.candidates]
    unknown = next((name for name in names if name not in pool.names), None)
    if unknown is not None:
        raise BypassError("unknown_model", f"it named {str(unknown)[:80]!r}, which is not in the pool")
    if len(set(names)) < len(names):
        raise BypassError("twice", "it named a model twice")
    if not isinstance(decision.beside, tuple | list) or any(name not in pool.names for name in decision.beside):
        raise BypassError("unknown_model", "it asks beside its candidates what is not in the pool")
    sure, numbers = decision.confidence, [one for at in decision.candidates for one in (at.score, at.quality, at.cost)]
    if (
        not isinstance(decision.strategy, str)
        or not isinstance(decision.reason, str)
        or not all(one is None or _is_number(one) for one in (sure, *numbers))
    ):
        raise BypassError("odd", "its name or its reason is no text, or a figure is no number")
    chance = decision.probability
    if chance is not None and not (isinstance(chance, int | float) and 0 < chance <= 1):
        raise BypassError("odd", "its probability is not above 0 and at most 1")
    try:
        json.dumps(dict(decision.details), default=str)
    except (TypeError, ValueError, RecursionError):
        raise BypassError("odd", "its details are not ready for JSON") from None


def _is_number(value: object) -> bool:
    """One that a float can be: no integer of hundreds of digits."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < MOST_INTEGER)


def plain_messages(given: Any, came: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """What a strategy wants sent, as plain values: what its parts run is run here. Raises BypassError for what no messages can be.

    Text and messages that came are given on and not copied: an image of megabytes may be among them, for each candidate.
    """
    if isinstance(given, str) or not isinstance(given, Sequence) or not given:
        raise BypassError("odd", "what it wants sent is no list of messages")
    known = {id(one) for one in came}
    messages: list[Mapping[str, Any]] = []
    for one in given:
        if not isinstance(one, Mapping):
            raise BypassError("odd", "what it wants sent is no list of messages")
        try:
            messages.append(one if id(one) in known else _plain(dict(one)))
        except (TypeError, ValueError, RecursionError):
            raise BypassError("odd", "what it wants sent is not ready for JSON") from None
        if not isinstance(messages[-1].get("role"), str):
            raise BypassError("odd", "a message that it wants sent has no role")
    return messages


def _plain(value: Any) -> Any:
    """A value as JSON has it. Raises TypeError, ValueError or RecursionError for what JSON has not."""
    kind = type(value)
    if value is None or kind in (str, bool) or (kind is int and abs(value) < MOST_INTEGER):
        return value
    if kind is float and math.isfinite(value):
        return value
    if kind is dict and all(type(key) is str for key in value):
        return {key: _plain(one) for key, one in value.items()}
    if kind in (list, tuple):
        return [_plain(one) for one in value]
    return json.loads(json.dumps(value, allow_nan=False))
