"""What passes through `ICCache`: arms, decisions, answers, lessons."""
# Shapes: D dimensions, I inputs of the critic

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from anabranch.routers.contract.query import Query
from anabranch.routers.ic_cache.features import Pairs
from anabranch.routers.ic_cache.pool import Admission
from anabranch.routers.ic_cache.prompt import Messages
from anabranch.routers.ic_cache.router import Choice
from anabranch.routers.ic_cache.selector import Selection


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A model that may answer.

    Attributes:
        name: of the model.
        cost: of a usual answer, in any unit.
        ask: messages to answer; None where somebody else asks it (the gateway). It may raise: the next arm is asked.
        shows_examples: whether it is given examples; None gives them to all arms but the dearest.
        context: tokens of its window; None for no end.
    """

    name: str
    cost: float
    ask: Callable[[Messages], str] | None = None
    shows_examples: bool | None = None
    context: int | None = None


@dataclass(frozen=True, kw_only=True)
class Routed:
    """A decision, and all that is learned from later.

    Attributes:
        id: by which feedback names it.
        query: as it came.
        vector_D: of the request; None where it could not be had.
        selection: examples.
        choice: None where the router failed.
        arm: that is to answer.
        order: all arms, the chosen one first: the fallback chain.
        x_I: what the critic saw; None where it saw nothing.
        answered: arms that answered, as far as known.
    """

    id: str
    query: Query
    vector_D: np.ndarray | None
    selection: Selection
    choice: Choice | None
    arm: str
    order: tuple[str, ...]
    x_I: np.ndarray | None
    answered: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Response:
    """An answer.

    Attributes:
        text: it.
        arm: that gave it.
        routed: the decision.
        admission: whether it entered the pool; None if it was not tried.
    """

    text: str
    arm: str
    routed: Routed
    admission: Admission | None = None

    def headers(self) -> dict[str, str]:
        """What an HTTP server may say of it."""
        choice, scores = self.routed.choice, ""
        if choice is not None:
            scores = ",".join(f"{arm}={score:.3f}" for arm, score in zip(choice.arms, choice.score_M, strict=True))
        examples = ",".join(map(str, self.routed.selection.ids))
        return {"x-ic-id": self.routed.id, "x-ic-arm": self.arm, "x-ic-examples": examples, "x-ic-scores": scores}


@dataclass(frozen=True, slots=True)
class Lesson:
    """What the proxy learns from: the examples that were shown, and how good the answer was.

    Attributes:
        pairs: features and texts.
        quality: 0 to 1.
        ids: of the examples.
        tenant: whose request it was.
        user: see `Query`.
    """

    pairs: Pairs
    quality: float
    ids: tuple[int, ...]
    tenant: str
    user: str


def as_query(request: Query | str) -> Query:
    """A text as a query."""
    return Query(text=request) if isinstance(request, str) else request


def shortened(selection: Selection, kept: Sequence[Any]) -> Selection:
    """A selection with some of its examples left out."""
    ids = {item.example.id for item in kept}
    at = [place for place, item in enumerate(selection.chosen) if item.example.id in ids]
    found = selection.pairs
    pairs = None if found is None else Pairs(found.feature_KF[at], [found.texts[place] for place in at])
    return replace(selection, chosen=tuple(selection.chosen[place] for place in at), pairs=pairs)
