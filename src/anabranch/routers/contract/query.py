"""What a strategy sees: one query, the pool of models it may go to, and, afterwards, what came of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from anabranch.errors import InputError
from anabranch.routers.money import Price


@dataclass(frozen=True, slots=True, kw_only=True)
class Query:
    """One request as strategies see it.

    Attributes:
        text: what is asked: the text of the last user message.
        messages: the whole conversation, in OpenAI's form; empty for a row of recorded data.
        task: a name for the kind of work, where the sender or the data gives one.
        prompt_tokens: tokens of the whole prompt, counted or estimated; None if unknown.
        max_tokens: most completion tokens the sender allows.
        has_tools: tools are offered.
        has_images: a message carries an image.
        headers: request headers, lower case.
        tenant: whose request it is; what is learned or stored for one tenant stays with it.
        user: the tenant's own name for who asks (the body's ``user``), by which what was stored can be erased; empty if not told.
        vector_D: float32 unit vector of ``text``, put there for strategies that need one.
        knobs: what the sender set in the name of the model (``auto/knn?lambda=2``).
        answers: of recorded data: the answer of each model, for strategies that read answers.
        request_id: of the request, by which a strategy that draws draws anew for each; of recorded data the number of the copy, from the
            second row of a text on. "" draws by the text alone.
    """

    text: str
    messages: Sequence[Mapping[str, Any]] = ()
    task: str | None = None
    prompt_tokens: int | None = None
    max_tokens: int | None = None
    has_tools: bool = False
    has_images: bool = False
    headers: Mapping[str, str] = field(default_factory=dict)
    tenant: str = ""
    user: str = ""
    vector_D: np.ndarray | None = None
    knobs: Mapping[str, str] = field(default_factory=dict)
    answers: Mapping[str, str] = field(default_factory=dict)
    request_id: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """A destination as strategies know it, with how it is doing now.

    Attributes:
        name: as in the config, and in recorded data.
        price: of its tokens.
        parameters: billions of parameters, active ones of a mixture; None if unknown.
        description: a few words on what it is good at.
        context: most prompt and completion tokens; None if unknown.
        is_available: a deployment of it takes requests (its breaker is not open).
        in_flight: requests under way.
        load: share of what it can do at once that is in use; may pass 1.
        latency_s: smoothed seconds to a whole answer; None before the first.
        is_priced: what it costs is known; otherwise ``price`` says nothing.
        is_allowed: the sender may use it; otherwise it is not available either.
    """

    name: str
    price: Price = field(default_factory=Price)
    parameters: float | None = None
    description: str = ""
    context: int | None = None
    is_available: bool = True
    in_flight: int = 0
    load: float = 0.0
    latency_s: float | None = None
    is_priced: bool = True
    is_allowed: bool = True


@dataclass(frozen=True, slots=True)
class Pool:
    """The models a query may go to, in the order of the config, and the time, in a gateway in seconds since 1970.

    Raises InputError if there is none, or a name is there twice.
    """

    models: tuple[Model, ...]
    now_s: float = 0.0

    def __post_init__(self) -> None:
        names = self.names
        if not names:
            raise InputError("a pool needs at least one model")
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(f"the pool has {twice!r} twice; names of models must differ")

    @property
    def names(self) -> tuple[str, ...]:
        """Names, in order."""
        return tuple(model.name for model in self.models)

    def __len__(self) -> int:
        return len(self.models)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A model in the order a strategy would try them.

    Attributes:
        model: its name.
        score: what the order was made by; larger is earlier.
        quality: predicted quality in the units of the scores learned from; None if not predicted.
        cost: predicted dollars; None if not predicted.
    """

    model: str
    score: float
    quality: float | None = None
    cost: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What a strategy says of a query: candidates, best first. The tail is the fallback chain.

    Attributes:
        candidates: at least one; each model once.
        strategy: its name.
        reason: one sentence for people.
        confidence: between 0 and 1; None if the strategy has none.
        details: what else explains it, ready for JSON (neighbours, category, rule).
        probability: with which the strategy makes `model` its first choice, for this query, pool and what it knows; 1 if nothing is left
            to chance; None if it cannot be said. What off-policy estimates weigh by.
        beside: models that a program asks and that are no candidates: a request has as long as the slowest of all of them may take.
    """

    candidates: tuple[Candidate, ...]
    strategy: str
    reason: str
    confidence: float | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    probability: float | None = None
    beside: tuple[str, ...] = ()

    @property
    def model(self) -> str:
        """The first choice."""
        return self.candidates[0].model


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a decision, told to `Strategy.observe`.

    Attributes:
        query: as it was decided on.
        model: that answered.
        quality: a score, where somebody gave one; None until then.
        cost: dollars.
        latency_s: seconds to the whole answer.
        succeeded: an answer came.
        decision: the decision that led here.
        answer: its text, for strategies that keep examples; None where nobody kept it, and always where the sender forbade that
            (``store: false``).
    """

    query: Query
    model: str
    quality: float | None = None
    cost: float | None = None
    latency_s: float | None = None
    succeeded: bool = True
    decision: Decision | None = None
    answer: str | None = None
