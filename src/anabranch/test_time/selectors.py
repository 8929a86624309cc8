"""Which of several answers is given: the first that is verified, the commonest, the likeliest, the best judged.

Each takes samples and gives the place of one; ties go to the earlier. None of no samples.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from anabranch.errors import InputError

# What an answer comes to: equal for answers that say the same; "" for one that says nothing.
Same = Callable[[str], str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """An answer.

    Attributes:
        text: of it.
        logprob: of its tokens in all; None where nobody told.
        tokens: of it.
        cost: of it; None where nobody told.
        body: what else came with it.
    """

    text: str
    logprob: float | None = None
    tokens: int = 0
    cost: float | None = None
    body: Any = None


@dataclass(frozen=True, slots=True)
class Chosen:
    """What a selector says.

    Attributes:
        place: of the sample.
        sure: what it goes by: share of votes, score, 1 or 0 for verified or not.
    """

    place: int
    sure: float


def first_verified(samples: Sequence[Sample], verified: Sequence[bool]) -> Chosen | None:
    """The first that was verified; without one the first of all, of which nothing is sure."""
    if len(verified) != len(samples):
        raise InputError(f"verified has {len(verified)} entries; there are {len(samples)} samples")
    if not samples:
        return None
    return Chosen(list(verified).index(True), 1.0) if any(verified) else Chosen(0, 0.0)


def majority(samples: Sequence[Sample], same: Same = str.strip) -> Chosen | None:
    """The commonest answer; what says nothing has no vote."""
    return _heaviest([same(one.text) for one in samples], [1.0] * len(samples))


def logprob_weighted(samples: Sequence[Sample], same: Same = str.strip) -> Chosen | None:
    """The answer with the most votes, each worth the mean probability of its tokens. Raises InputError without log-probabilities.

    That is exp(logprob / tokens), so that a long answer is not held to be unlikely for its length.
    """
    untold = next((at for at, one in enumerate(samples) if one.logprob is None or math.isnan(one.logprob)), None)
    if untold is not None:
        raise InputError(f"sample {untold} has no log-probability; ask for them, or take a majority")
    weights = [math.exp(min(0.0, float(one.logprob or 0.0)) / max(1, one.tokens)) for one in samples]
    if not any(weights):
        # So unlikely that no number says how much: each counts for one.
        weights = [1.0] * len(samples)
    return _heaviest([same(one.text) for one in samples], weights)


def best_judged(samples: Sequence[Sample], scores: Sequence[float]) -> Chosen | None:
    """The one with the best score of a judge; NaN, of one that was not judged, is below all."""
    if len(scores) != len(samples):
        raise InputError(f"scores has {len(scores)} entries; there are {len(samples)} samples")
    if not samples:
        return None
    known = [-math.inf if math.isnan(score) else float(score) for score in scores]
    place = known.index(max(known))
    return Chosen(place, known[place])


def _heaviest(answers: Sequence[str], weights: Sequence[float]) -> Chosen | None:
    if not answers:
        return None
    total: dict[str, float] = {}
    for answer, weight in zip(answers, weights, strict=True):
        if answer:
            total[answer] = total.get(answer, 0.0) + weight
    if not total:
        return Chosen(0, 0.0)
    best = max(total, key=lambda answer: total[answer])
    return Chosen(answers.index(best), total[best] / sum(weights))
