"""The seam every way of routing fits: a `Strategy` orders the models of a pool for a query.

    learn     fit(recorded)                    from outcomes of every model, where they exist
    decide    route(query, pool) -> Decision   in well under a millisecond; numpy only
    rewrite   prepare(query, model, messages)  what is sent to a candidate, where it is not what came in
    go on     observe(outcome)                 from the one model that was asked
    judge     play(recorded, pool) -> Played   what it would have earned and spent

A strategy that reads answers is asked ``accept`` after each one, and the gateway goes on to the next candidate while it says no. One that
asks models itself (``is_async``) is awaited: ``aroute``, ``aaccept``, with the `Ask` of the request that it is done for. One that answers
itself, as cascades do, is a `Program`.
Learning may import torch, inside ``fit``; deciding may not, since a gateway holds no torch unless something needs it.
"""
# Shapes: N queries, M models

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self

import numpy as np

from anabranch.config import Config as BaseConfig
from anabranch.config import Part, configclass
from anabranch.errors import InputError
from anabranch.routers.contract.ask import Ask
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.query import Candidate, Decision, Model, Outcome, Pool, Query

Arrays = dict[str, np.ndarray]
Facts = dict[str, Any]

# Texts to unit vectors [N, D].
Embed = Callable[[Sequence[str]], np.ndarray]


class Metrics(Protocol):
    """Where a strategy puts its numbers."""

    def count(self, name: str, value: float = 1.0, **labels: str) -> None:
        """Add to a counter."""

    def gauge(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""


@dataclass(frozen=True)
class Example:
    """One of the things that a strategy keeps one by one, as others can take it over.

    Attributes:
        key: names it everywhere.
        body: ready for JSON, with whose it is (``tenant``, ``user``) and the decision it came from (``source``), by which it can be erased;
            None for one that is gone.
        vector_D: of it, float32; None without one.
    """

    key: str
    body: Facts | None
    vector_D: np.ndarray | None = None


class Errands(Protocol):
    """What a gateway does for a strategy beside requests, on a budget of its own.

    Attributes:
        judge: model that says what answers are worth; "" if there is none, and then none may be asked.
    """

    judge: str

    async def alone(self, work: Callable[[], Any]) -> Any:
        """``work()`` while nothing else touches the strategy."""

    def may_ask(self, tenant: str, models: Sequence[str]) -> bool:
        """Whether what is a tenant's may be shown to these models."""

    async def ask(self, model: str, messages: Sequence[Mapping[str, Any]], *, temperature: float) -> str:
        """The text of an answer. Raises an AnabranchError if none comes, or no money is left for it."""


@dataclass(frozen=True, kw_only=True)
class Played:
    """What a strategy's choices came to on recorded outcomes.

    Attributes:
        model_N: int64, column of the model whose answer was given.
        quality_N: score of that answer.
        cost_N: dollars of all calls made for it; NaN where unknown.
        calls_NM: bool, models asked.
    """

    model_N: np.ndarray
    quality_N: np.ndarray
    cost_N: np.ndarray
    calls_NM: np.ndarray


class Strategy(Part, family="strategy"):
    """Interface: query and pool in, ordered candidates out.

    Attributes:
        needs_vector: ``route`` wants ``query.vector_D``.
        learns_vectors: ``fit`` learns from vectors of the texts where there are some, and may want them in ``route`` since.
        reads_answers: ``accept`` is asked after each answer.
        keeps_examples: `changed_examples` and `take_examples` do something, and what they tell of is not in `kept_state`.
        keeps_answers: `observe` wants the text of the answer, which a gateway otherwise does not hold on to.
        needs_fit: it cannot route before ``fit``.
        is_async: it asks models to decide: await ``aroute`` and ``aaccept``.
        adds_up: what several processes observed can be put together, so that each knows what one would that was told all: `part`, `hear`,
            `joined`, `disown`.
        is_fast: ``route``, ``accept`` and ``observe`` take well under a millisecond whatever comes, so that a gateway may call them on its
            event loop; others get a thread.
        sender_knobs: names of what the sender of a query may set (see `knobs`); `route` reads them, and a gateway refuses all others.
        knob: the number that moves it along cost against quality, by its name in the config; None if it has none.
    """

    @configclass
    class Config(BaseConfig):
        """Nothing in common."""

    needs_vector: ClassVar[bool] = False
    learns_vectors: ClassVar[bool] = False
    reads_answers: ClassVar[bool] = False
    keeps_answers: ClassVar[bool] = False
    keeps_examples: ClassVar[bool] = False
    needs_fit: ClassVar[bool] = False
    is_async: ClassVar[bool] = False
    adds_up: ClassVar[bool] = False
    is_fast: ClassVar[bool] = False
    knob: ClassVar[str | None] = None
    sender_knobs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def name(self) -> str:
        """What it is called in tables and headers."""
        return self.kind or type(self).__name__

    @property
    def learns(self) -> bool:
        """`observe` does something."""
        return type(self).observe is not Strategy.observe

    @property
    def learned_dim(self) -> int | None:
        """Dimensions of the vectors that it learned from, and takes no others; None where it learned from none, or does not say."""
        return None

    def connect(self, *, embed: Embed | None = None) -> None:
        """Take what the gateway lends: its embedder. Called once before the first decision, and after a reload."""

    def report_to(self, metrics: Metrics) -> None:
        """Take where its numbers go. Called like `connect`."""

    def fit(self, data: Recorded, *, seed: int = 0) -> Self:
        """Learn from recorded outcomes. Same data, same seed, same result."""
        return self

    def told(self) -> Sequence[str]:
        """What of its learning is worth a line to whoever fitted it."""
        return ()

    def route(self, query: Query, pool: Pool) -> Decision:
        """Order the models of the pool; each available one once, the unavailable ones left out or last.

        Raises InputError if it was not fitted, or the query lacks what it needs.
        """
        raise NotImplementedError

    async def aroute(self, query: Query, pool: Pool, ask: Ask) -> Decision:
        """`route`, for strategies that ask a model to decide."""
        return self.route(query, pool)

    def prepare(
        self, query: Query, model: str, messages: Sequence[Mapping[str, Any]], *, decision: Decision | None = None
    ) -> Sequence[Mapping[str, Any]]:
        """The messages to send to this candidate; by default those that came.

        It is asked once before each candidate is tried. It must not change ``messages``; where it returns the very same object, the
        body may pass through unchanged.

        Args:
            query: as it was routed.
            model: the candidate about to be asked.
            messages: of the request, in OpenAI's form.
            decision: what `route` said of this query; None where the caller did not keep it.
        """
        return messages

    def accept(self, query: Query, model: str, answer: str, details: Mapping[str, Any]) -> bool:
        """Whether this answer is good enough to give.

        Args:
            query: as it was decided on.
            model: that answered.
            answer: its text.
            details: what the provider said of it, as far as it did: ``logprobs`` (OpenAI's list of tokens with ``logprob`` and
                ``top_logprobs``), ``samples`` (texts of further answers), or a number by the name of a signal of `Recorded`.
        """
        return True

    async def aaccept(self, query: Query, model: str, answer: str, details: Mapping[str, Any], ask: Ask) -> bool:
        """`accept`, for strategies that ask a model for its opinion."""
        return self.accept(query, model, answer, details)

    def observe(self, outcome: Outcome) -> None:
        """Learn from one outcome. Outcomes without a quality may teach cost and latency."""

    def prefer(self, outcome: Outcome, better: str, worse: str) -> None:
        """Learn that somebody preferred one model's answer to another's; most strategies learn nothing of that.

        Args:
            outcome: of the request that one of the two answered, as `observe` was told it.
            better, worse: models.
        """

    def join(self, model: Model, shots: Recorded | None = None) -> None:
        """Let a model join that was not there when it learned; it chooses among that one too from now on.

        Args:
            model: with its price, and what it is good at.
            shots: outcomes of it alone, each with a score, and with vectors where the strategy wants them; None for none.

        Raises InputError where it takes none, knows the model, or needs outcomes of it; then nothing has changed.
        """
        raise InputError(f"{self.name} takes no further model; fit it anew on outcomes of all")

    def headers(self, decision: Decision) -> Mapping[str, str]:
        """What of a decision of its own is told to the sender, in headers of the answer.

        Names begin with ``x-``; those that servers, browsers or clients act upon (``x-accel-``, ``x-envoy-``, ...) are left out.
        """
        return {}

    def upkeep(self, pool: Pool) -> None:
        """What is to be done now and then, requests or not. It may not take long."""

    async def errands(self, run: Errands) -> None:
        """What it wants asked beside requests, now and then. Raises an AnabranchError as soon as that cannot be had."""

    def forget(self, *, tenant: str | None, user: str | None = None, decision: str | None = None) -> int:
        """Erase what it keeps of texts; how many there were.

        Args:
            tenant: whose; None for everybody's.
            user: of that tenant; None for all.
            decision: of one request, as its details name it (``id``); None for all.
        """
        return 0

    def expire(self, before_s: float) -> int:
        """Erase what it keeps of texts from before unix second ``before_s``; how many there were."""
        return 0

    def knobs(self, data: Recorded) -> Sequence[float]:
        """Values of the knob that trace cost against quality on such data, from dear to cheap."""
        return ()

    def with_knob(self, value: float) -> "Strategy":
        """The same strategy, with what it learned, at another value of its knob."""
        raise NotImplementedError

    def play(self, data: Recorded, pool: Pool) -> Played:
        """Route every row and look up what the first choice earned. Strategies that ask several models say their own."""
        columns = playable(data, pool)
        recorded = Pool(tuple(model for model in pool.models if model.name in data.models), pool.now_s)
        names = {data.models[column]: column for column in columns}
        choice = [names[self.route(query, recorded).model] for query in data.queries()]
        return played(data, np.asarray(choice, np.int64))

    def explain(self, query: Query, pool: Pool) -> Facts:
        """Why it would decide so, ready for JSON."""
        decision = self.route(query, pool)
        candidates = [
            {"model": item.model, "score": item.score, "quality": item.quality, "cost": item.cost}
            for item in decision.candidates
        ]
        return {
            "strategy": decision.strategy,
            "reason": decision.reason,
            "confidence": decision.confidence,
            "candidates": candidates,
            "details": dict(decision.details),
            "probability": decision.probability,
        }

    def state(self) -> tuple[Arrays, Facts]:
        """What it learned: named arrays, and facts ready for JSON. `load_state` reads them back to the bit."""
        return {}, {}

    def load_state(self, arrays: Arrays, facts: Facts) -> None:
        """Take back what `state` gave."""

    def vector_dim(self, arrays: Arrays, facts: Facts) -> int | None:
        """Dimensions of the vectors that such a `part` or `kept_state` was learned from; None for none."""
        return None

    # As a gateway keeps it, of what does not add up

    def kept_state(self) -> tuple[Arrays, Facts]:
        """`state` without what it keeps one by one."""
        return self.state()

    def load_kept(self, arrays: Arrays, facts: Facts) -> None:
        """Take back what `kept_state` gave; what it keeps one by one stays."""
        self.load_state(arrays, facts)

    def changed_examples(self, most: int) -> Sequence[Example]:
        """Some of those that came, changed or went since it was asked last."""
        return ()

    def take_examples(self, examples: Sequence[Example]) -> None:
        """Take over what others keep, or let go of what they let go."""

    # Where it adds up

    def part(self) -> tuple[Arrays, Facts]:
        """What it observed itself since it was made, fitted or read; neither what it started from nor what it heard."""
        raise NotImplementedError

    def hear(self, arrays: Arrays, facts: Facts) -> None:
        """Take the parts of all others, `joined`, in the place of what it heard before; empty ones: there are others that it will hear of.

        Raises InputError for what does not fit, and nothing has changed.
        """
        raise NotImplementedError

    def joined(self, parts: Sequence[tuple[Arrays, Facts]]) -> tuple[Arrays, Facts]:
        """Several parts as one. Raises InputError for what is none. It may be called in any thread; a static method will do."""
        raise NotImplementedError

    def published(self) -> None:
        """The last `part` is where others find it."""

    def disown(self, arrays: Arrays, facts: Facts) -> None:
        """What an earlier `part` told of is somebody else's from now on: it is let go of here, and will be heard.

        Raises InputError for what is no part of its own, and nothing has changed.
        """
        raise NotImplementedError


def is_meant(
    body: Mapping[str, Any], *, tenant: str | None, user: str | None = None, decision: str | None = None
) -> bool:
    """Whether the body of an `Example` is among what `Strategy.forget` is told of."""
    if decision is not None:
        return body.get("source") == decision
    return tenant is None or (body.get("tenant") == tenant and user in (None, body.get("user")))


def played(data: Recorded, model_N: np.ndarray) -> Played:
    """The outcome of asking one model a query."""
    rows = np.arange(len(data))
    calls_NM = np.zeros(data.score_NM.shape, bool)
    calls_NM[rows, model_N] = True
    cost_N = np.full(len(data), np.nan) if data.cost_NM is None else data.cost_NM[rows, model_N]
    return Played(model_N=model_N, quality_N=data.score_NM[rows, model_N], cost_N=cost_N, calls_NM=calls_NM)


def playable(data: Recorded, pool: Pool | None, known: Sequence[str] | None = None) -> np.ndarray:
    """Columns of the data that a strategy may choose: those of the pool and, where it must know a model, of the known ones.

    In the order of the pool, so that ties fall as they do in `ordered`. Raises InputError if there is none.
    """
    names = data.models if pool is None else [name for name in pool.names if name in data.models]
    columns = [data.models.index(name) for name in names if known is None or name in known]
    if not columns:
        there = "" if pool is None else f" and are in the pool ({', '.join(pool.names)})"
        learned = "" if known is None else f"; the strategy learned of {', '.join(known) or 'none'}"
        raise InputError(f"none of the recorded models {', '.join(data.models)} can be chosen{there}{learned}")
    return np.asarray(columns, np.int64)


def ordered(pool: Pool, score_M: Sequence[float] | np.ndarray, **of_model: np.ndarray | None) -> tuple[Candidate, ...]:
    """Candidates by falling score, ties in the order of the pool; a model with score -inf or NaN, or not available, is left out.

    If that leaves none, availability is ignored: trying a model that may be down beats giving up. In plain Python, since pools are small
    and this is in the way of every request.

    Args:
        pool: the models.
        score_M: what to order by.
        of_model: ``quality`` and ``cost`` of each model, where predicted.
    """
    models = pool.models
    scores = [float(score) for score in score_M]
    usable = [at for at, score in enumerate(scores) if math.isfinite(score)]
    chosen = [at for at in usable if models[at].is_available] or usable
    chosen.sort(key=lambda at: -scores[at])
    values = [(name, value) for name, value in of_model.items() if value is not None]
    return tuple(
        Candidate(
            model=models[at].name,
            score=scores[at],
            **{name: float(value[at]) if math.isfinite(value[at]) else None for name, value in values},
        )
        for at in chosen
    )
