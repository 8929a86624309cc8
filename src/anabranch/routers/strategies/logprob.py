"""Escalate when the draft's own token probabilities are low.

    confidence = mean over tokens of log p(token),  or minus the mean entropy of the next-token distribution,  or a low quantile of log p

A weak model that hesitates is more often wrong. Mean log-probability is the usual signal; Gupta et al. 2024 (arXiv 2404.10136,
"Language Model Cascades: Token-level uncertainty and beyond", section 3) show that a quantile over tokens is less swayed by
length. Entropy is that of the ``top_logprobs`` the provider returns, what is left of the probability counted as one more token.

Recorded data must carry the signal (`Recorded.signals`, by the name of the measure). Live, it is a `Program`, which asks for the
``logprobs`` of its drafts itself; the sender sees as much of them as it asked for. A model that tells none never passes: its draft is not
even made where its provider is known to refuse.
"""
# Shapes: N queries, M models

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from anabranch.config import Field, configclass
from anabranch.errors import DataError
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.program import Answered, Ask, Done, ProgramRequest
from anabranch.routers.contract.query import Query
from anabranch.routers.contract.strategy import Facts
from anabranch.routers.strategies.chained import Chained

# Nats: what OpenAI writes for a token that is as good as impossible, below which nothing is told apart; and how far above 0, where no
# log-probability is, rounding takes one that is 0.
LEAST, ROUNDED = -9999.0, 1e-2


class LogProb(Chained, kind="logprob"):
    """A chain whose answers are given when their tokens were likely."""

    @configclass
    class Config(Chained.Config):
        """What is measured.

        Attributes:
            measure: ``logprob`` (mean), ``entropy`` (mean, negated) or ``quantile`` of the log-probabilities.
            quantile: which.
            alternatives: to each token that are asked for, to measure ``entropy``.
        """

        threshold: float = -0.35  # nats; a token of probability 0.7 on average
        measure: Literal["logprob", "entropy", "quantile"] = "logprob"
        quantile: float = Field(default=0.1, ge=0, le=1)
        alternatives: int = Field(default=5, ge=1, le=20)

    def confidences(self, data: Recorded) -> np.ndarray:
        """The recorded signal."""
        signal_NM = data.signals.get(self.config.measure)
        if signal_NM is None:
            raise DataError(
                f"logprob needs the signal {self.config.measure!r} of recorded answers; the data have {sorted(data.signals) or 'none'}"
            )
        return -signal_NM if self.config.measure == "entropy" else signal_NM

    def confidence(self, query: Query, model: str, answer: str, details: Mapping[str, Any]) -> float:
        """Of the provider's ``logprobs``, or a number given by the measure's name; NaN without either."""
        if "logprobs" in details:
            found = measured(details["logprobs"], self.config.measure, self.config.quantile)
        else:
            told = _number(details.get(self.config.measure))
            found = math.nan if told is None else told
        return -found if self.config.measure == "entropy" else found

    # -- answering

    step_name = "measured"

    def asked_with(self, request: ProgramRequest) -> dict[str, Any]:
        """As many log-probabilities as the sender wants to see, and as are needed to measure."""
        wanted = self.config.alternatives if self.config.measure == "entropy" else 0
        return {"logprobs": max(_alternatives(request.settings) or 0, wanted)}

    async def examine(self, request: ProgramRequest, model: str, found: Answered, ask: Ask) -> tuple[float, Facts]:
        """By what the provider told of its tokens."""
        sure = self.confidence(request.query, model, found.text, {"logprobs": found.logprobs()})
        return sure, {"measure": self.config.measure}

    def given(self, request: ProgramRequest, found: Answered) -> Done:
        """With no more log-probabilities than the sender asked for."""
        return _as_asked(Done.of(found), _alternatives(request.settings))


def _alternatives(settings: Mapping[str, Any]) -> int | None:
    """How many the sender wants told of each token, none where that is no number; None for no log-probabilities at all."""
    wanted = settings.get("top_logprobs")
    return (max(0, wanted) if type(wanted) is int else 0) if settings.get("logprobs") else None


def _as_asked(done: Done, alternatives: int | None) -> Done:
    """An answer with no more log-probabilities than the sender asked for."""
    if alternatives is None or not isinstance(done.logprobs, Mapping):
        return replace(done, logprobs=None)
    tokens = [
        {**one, "top_logprobs": _listed(one.get("top_logprobs"))[:alternatives]} if isinstance(one, Mapping) else one
        for one in _listed(done.logprobs.get("content"))
    ]
    return replace(done, logprobs={**done.logprobs, "content": tokens})


def measured(logprobs: Any, measure: str, quantile: float = 0.1) -> float:
    """One number of OpenAI's ``logprobs`` (``{"content": [...]}`` or its list); NaN where it does not hold what is needed.

    Whatever an upstream wrote there, nothing is raised: what is no log-probability is passed over.
    """
    tokens = _listed(logprobs.get("content") if isinstance(logprobs, Mapping) else logprobs)
    told = [(token, value) for token in tokens if (value := _logprob(token)) is not None]
    if not told:
        return float("nan")
    if measure == "entropy":
        tops = ([_logprob(top) for top in _listed(token.get("top_logprobs"))] for token, _ in told)
        return float(np.mean([_entropy([value for value in top if value is not None]) for top in tops]))
    values = np.array([value for _, value in told])
    return float(values.mean() if measure == "logprob" else np.quantile(values, quantile))


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else []


def _logprob(token: Any) -> float | None:
    """What a token, or an alternative to one, says of itself, in nats; None where that is no log-probability."""
    value = _number(token.get("logprob")) if isinstance(token, Mapping) else None
    return None if value is None or value > ROUNDED else min(0.0, max(LEAST, value))


def _number(value: Any) -> float | None:
    """A float that is not NaN; None of anything else, such as an integer that is too long for one."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return None if math.isnan(found) else found


def _entropy(logprobs: Sequence[float]) -> float:
    """Nats; NaN for no alternatives."""
    if not logprobs:
        return float("nan")
    p = np.exp(np.asarray(logprobs, float))
    rest = max(0.0, 1.0 - float(p.sum()))
    p = np.append(p, rest)
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())
