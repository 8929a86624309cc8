"""Knobs: what the sender of a query may set of a strategy, in the name of the model (``auto/knn?lambda=2``).

    lambda      score given up to save a dollar on this query; in place of ``trade_off``. 0 is quality alone
    threshold   of a cascade: confidence from which an answer is given. Of a strategy that predicts who wins (RouteLLM): chance of the
                dearest model winning against the cheapest from which it is asked

A strategy declares those that it reads (`Strategy.sender_knobs`); any other is refused, since who sets one wants something.
"""

from collections.abc import Mapping, Sequence

from anabranch.errors import InputError

LAMBDA, THRESHOLD = "lambda", "threshold"

MEANS = {LAMBDA: " (score given up to save a dollar)", THRESHOLD: ""}


def check_knobs(knobs: Mapping[str, str], known: Sequence[str], name: str) -> None:
    """Raises InputError for a knob that a strategy does not know, and for two that contradict one another."""
    unknown = next((knob for knob in knobs if knob not in known), None)
    if unknown is not None:
        there = f"it has {', '.join(known)}" if known else "it has none"
        raise InputError(f"{name} has no knob {unknown[:80]!r}; {there}")


def knob_of(knobs: Mapping[str, str], name: str, most: float = float("inf")) -> float | None:
    """The number that the sender set; None if it was not. Raises InputError for what is no number from 0 to ``most``."""
    text = knobs.get(name)
    if text is None:
        return None
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not (0 <= value <= most and value < float("inf")):
        bounds = "of at least 0" if most == float("inf") else f"from 0 to {most:g}"
        raise InputError(f"{name} is {text[:80]!r}; it must be a number {bounds}{MEANS.get(name, '')}")
    return value


def trade_off_of(knobs: Mapping[str, str], default: float) -> float:
    """The sender's ``lambda``, else the strategy's own trade-off. Raises InputError."""
    value = knob_of(knobs, LAMBDA)
    return default if value is None else value
