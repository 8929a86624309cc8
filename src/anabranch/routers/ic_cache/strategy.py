"""`ic_cache` as a strategy of the gateway: it routes, puts examples before what cheaper models are sent, and keeps good answers.

route      examples are selected, the bandit picks an arm by expected quality and the dearest model's load
prepare    the messages for a model that is given examples
observe    an answer may enter the pool; a quality teaches proxy, threshold and bandit
errands    answers are made anew off-peak, and second ones are asked for and compared
"""
# Shapes: N queries, M models

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from anabranch.config import Field, configclass
from anabranch.errors import InputError
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.query import Candidate, Decision, Model, Outcome, Pool, Query
from anabranch.routers.contract.strategy import (
    Arrays,
    Embed,
    Errands,
    Example,
    Facts,
    Played,
    Strategy,
    is_meant,
    played,
)
from anabranch.routers.ic_cache.counters import Counters, Metrics
from anabranch.routers.ic_cache.errands import Answered, compare, replay
from anabranch.routers.ic_cache.ic_cache import ICCache
from anabranch.routers.ic_cache.pool import ExamplePool
from anabranch.routers.ic_cache.records import Arm, Routed, shortened
from anabranch.routers.ic_cache.router import Choice
from anabranch.routers.money import dollars
from anabranch.routers.score_scale import BRING, ScoreScale

# Prompt and answer by which models' prices are compared.
TYPICAL_TOKENS = (500, 250)

# Answers that wait to be compared with a second one; older ones are not.
COMPARED = 32


class ICCacheRouting(Strategy, kind="ic_cache"):
    """See the module. Where ``domains`` is empty it keeps nothing and is a bandit that minds the load.

    Args:
        config: see there.
        metrics: where its numbers go.
    """

    @configclass
    class Config(Strategy.Config):
        """Who gets examples, whose answers become some.

        Attributes:
            domains: tasks whose answers are kept (opt-in); "*" is all, "" those of queries that name none. None takes those of the
                pool, and where it has none either, "": whoever asks for it by name wants something kept.
            trusted: models whose answers may enter the pool; empty trusts the dearest alone.
            assisted: models that are given examples; empty assists all but the dearest.
            cache: all else (see `ICCache`).
            tick_s: seconds between upkeeps.
            epochs: of `fit` over recorded outcomes.
            least_score: of recorded answers that `fit` takes into the pool.
        """

        domains: tuple[str, ...] | None = None
        trusted: tuple[str, ...] = ()
        assisted: tuple[str, ...] = ()
        cache: ICCache.Config = Field(default_factory=ICCache.Config)
        tick_s: float = Field(default=60.0, gt=0)
        epochs: int = Field(default=3, ge=0)
        least_score: float = 0.5

    needs_vector = True
    keeps_examples = True

    def __init__(self, config: Any, *, metrics: Metrics | None = None) -> None:
        super().__init__(config)
        self.metrics: Metrics = Counters() if metrics is None else metrics
        self.cache: ICCache | None = None
        self._now_s = 0.0
        self._embed: Embed | None = None
        self._ticked_s = 0.0
        self._answered: deque[Answered] = deque(maxlen=COMPARED)
        # Of others, until there are models to answer.
        self._to_take: list[Example] = []

    @property
    def keeps_answers(self) -> bool:  # type: ignore[override]
        """Where a domain has opted in."""
        return bool(self._domains)

    @property
    def _domains(self) -> tuple[str, ...]:
        domains: tuple[str, ...] | None = self.config.domains
        return domains if domains is not None else self.config.cache.pool.domains or ("",)

    def connect(self, *, embed: Embed | None = None) -> None:
        """Take the embedder that makes ``query.vector_D``: requests that redaction changed are kept only with one."""
        self._embed = embed
        if self.cache is not None:
            self.cache.embed = embed

    def report_to(self, metrics: Metrics) -> None:
        """Count there from now on."""
        self.metrics = metrics
        if self.cache is not None:
            self.cache.metrics = metrics

    # Made when the first models are seen

    def _cache_for(self, arms: Sequence[Arm], dim: int) -> ICCache:
        if self.cache is None:
            self.cache = self._make(arms, dim)
            self.cache.pool.take(self._to_take)
            self._to_take = []
        return self.cache

    def _make(self, arms: Sequence[Arm], dim: int) -> ICCache:
        dearest = max(arms, key=lambda arm: arm.cost).name
        trusted = self.config.trusted or (dearest,)
        settings = self.config.cache
        trust = {**settings.pool.trust, **dict.fromkeys(trusted, max(1, settings.pool.min_trust))}
        pool: ExamplePool.Config = settings.pool.replace(domains=self._domains, trust=trust)
        return ICCache(
            settings.replace(pool=pool),
            arms=arms,
            dim=dim,
            embed=self._embed,
            metrics=self.metrics,
            clock=lambda: self._now_s,
        )

    def _arm(self, name: str, cost: float, context: int | None = None) -> Arm:
        shows = (name in self.config.assisted) if self.config.assisted else None
        return Arm(name=name, cost=cost, context=context, shows_examples=shows)

    def _of_pool(self, pool: Pool) -> list[Arm]:
        return [
            self._arm(model.name, dollars(model.price.cost(*TYPICAL_TOKENS)), model.context) for model in pool.models
        ]

    # Deciding

    def route(self, query: Query, pool: Pool) -> Decision:
        """As the module says. Models that were not there when it was made come last.

        Raises InputError if the query has no vector, or it knows none of the models.
        """
        if query.vector_D is None:
            raise InputError(f"{self.name} needs the vector of a query; give the gateway an embedder")
        cache = self._cache_for(self._of_pool(pool), len(query.vector_D))
        if len(query.vector_D) != cache.router.dim and cache.config.on_new_dim == "refuse":
            raise InputError(
                f"the query's vector has {len(query.vector_D)} numbers, those {self.name} knows {cache.router.dim}"
            )
        self._now_s = max(self._now_s, pool.now_s)
        known = {model.name: model for model in pool.models if model.name in cache.arms}
        if not known:
            there, learned = ", ".join(pool.names), ", ".join(cache.arms)
            raise InputError(f"{self.name} knows none of the models {there}; it learned of {learned}")
        is_open = [name for name, model in known.items() if model.is_available] or list(known)
        dearest = known.get(cache.dearest) or max(known.values(), key=lambda model: model.load)
        routed = cache.route(query, available=is_open, load=dearest.load)
        return self._decision(cache, routed, pool, known)

    def _decision(self, cache: ICCache, routed: Routed, pool: Pool, known: Mapping[str, Model]) -> Decision:
        choice = routed.choice
        quality: dict[str, float] = {}
        if choice is not None:
            quality = dict(zip(choice.arms, choice.mu_M.tolist(), strict=True))
        tokens = (routed.query.prompt_tokens or TYPICAL_TOKENS[0], TYPICAL_TOKENS[1])
        cost = {model.name: dollars(model.price.cost(*tokens)) for model in pool.models}
        late = [model.name for model in pool.models if model.name not in cache.arms and model.is_available]
        names = (*(name for name in routed.order if name in known), *late)
        candidates = tuple(
            Candidate(model=name, score=score, quality=quality.get(name), cost=cost[name])
            for name, score in zip(names, _falling(choice, names), strict=True)
        )
        examples = [
            {"id": item.example.id, "similarity": item.similarity, "utility": item.utility, "reason": item.reason}
            for item in routed.selection.chosen
        ]
        first = candidates[0].model
        shown = len(examples) if first in cache.arms and cache.shows_examples(first) else 0
        push = 0.0 if choice is None else choice.push
        reason = f"{first} with {shown} examples" + (f", load takes {push:.2f} off the dearest model" if push else "")
        if choice is None:
            reason = "the router failed; the dearest model answers"
        details = {
            "id": routed.id,
            "examples": examples,
            "rejected": dict(routed.selection.rejected),
            "tau": routed.selection.tau,
            "push": push,
            "second": None if choice is None else choice.second,
            "autoscale": cache.router.autoscale,
        }
        confidence = None if choice is None else float(choice.probability_M.max())
        chance = (
            None if choice is None or choice.arm != first else float(choice.probability_M[choice.arms.index(first)])
        )
        return Decision(
            candidates=candidates,
            strategy=self.name,
            reason=reason,
            confidence=confidence,
            details=details,
            probability=chance,
        )

    def headers(self, decision: Decision) -> Mapping[str, str]:
        """The decision, its examples and the scores of all arms."""
        shown = (
            self.cache is not None and decision.model in self.cache.arms and self.cache.shows_examples(decision.model)
        )
        examples = decision.details.get("examples", ()) if shown else ()
        return {
            "x-ic-id": str(decision.details.get("id", "")),
            "x-ic-arm": decision.model,
            "x-ic-examples": ",".join(str(item["id"]) for item in examples),
            "x-ic-scores": ",".join(f"{one.model}={one.score:.3f}" for one in decision.candidates),
        }

    def prepare(
        self, query: Query, model: str, messages: Sequence[Mapping[str, Any]], *, decision: Decision | None = None
    ) -> Sequence[Mapping[str, Any]]:
        """The messages with the examples of the decision, for a model that is given some; selected anew where there is no decision."""
        if self.cache is None or model not in self.cache.arms or not self.cache.shows_examples(model):
            return messages
        routed = None if decision is None else self.cache.pending(decision.details.get("id", ""))
        if routed is None:
            if decision is not None or query.vector_D is None:
                # What was decided is forgotten (or erased): nothing is shown.
                return messages
            routed = self.cache.route(query)
        return self.cache.prepare(routed, model, messages)

    # Learning

    def observe(self, outcome: Outcome) -> None:
        """Keep the answer if it may be kept; learn from its quality, if there is one. What it no longer knows of is passed over."""
        cache, decision = self.cache, outcome.decision
        routed = None if cache is None or decision is None else cache.pending(decision.details.get("id", ""))
        if cache is None or routed is None or not outcome.succeeded or outcome.model not in cache.arms:
            return
        if outcome.model not in routed.answered:
            cache.answered(routed.id, outcome.model)
        if outcome.quality is not None:
            cache.feedback(routed.id, score=outcome.quality, arm=outcome.model)
        if outcome.answer is not None:
            self._note(routed, outcome)
            cache.admit(routed, outcome.answer, outcome.model, quality=outcome.quality)
        if self._now_s - self._ticked_s >= self.config.tick_s:
            self.tick()

    def prefer(self, outcome: Outcome, better: str, worse: str) -> None:
        """Learn which of two arms did better with a request that it still knows of."""
        cache, decision = self.cache, outcome.decision
        if cache is not None and decision is not None:
            cache.feedback(decision.details.get("id", ""), preferred=(better, worse))

    def _note(self, routed: Routed, outcome: Outcome) -> None:
        """Have an answer compared, if that is wanted. What may teach nothing comes without its time."""
        choice = routed.choice
        if (
            choice is not None
            and choice.second is not None
            and outcome.model == choice.arm
            and outcome.latency_s is not None
        ):
            self._answered.append(Answered(routed.id, outcome.model, outcome.answer or ""))

    def upkeep(self, pool: Pool) -> None:
        """`tick`, where it is time, and the load while nobody asks."""
        self._now_s = max(self._now_s, pool.now_s)
        cache = self.cache
        if cache is None:
            return
        for model in pool.models:
            if model.name == cache.dearest:
                cache.router.observe_load(model.load, self._now_s)
        if self._now_s - self._ticked_s >= self.config.tick_s:
            self.tick()

    async def errands(self, run: Errands) -> None:
        """One round of replays, and comparisons of the answers that wait for one."""
        if self.cache is None or not run.judge:
            self._answered.clear()
            return
        while (first := self._next()) is not None:
            await compare(self.cache, run, first)
        await replay(self.cache, run)

    def _next(self) -> Answered | None:
        try:
            return self._answered.popleft()
        except IndexError:
            return None

    def tick(self) -> None:
        """Upkeep. `observe` and `upkeep` call it once in a while; whoever likes may."""
        if self.cache is not None:
            self.cache.tick()
            self._ticked_s = self._now_s

    def forget(self, *, tenant: str | None, user: str | None = None, decision: str | None = None) -> int:
        """Erase examples, vectors, and what waits or is remembered; how many examples went. What was fitted on them stays fitted."""
        cache = self.cache
        if cache is None:
            before = len(self._to_take)
            self._to_take = [
                one
                for one in self._to_take
                if one.body is None or not is_meant(one.body, tenant=tenant, user=user, decision=decision)
            ]
            return before - len(self._to_take)
        self._answered.clear()
        if decision is not None:
            return cache.forget_decision(decision)
        return cache.forget_all() if tenant is None else cache.forget(tenant=tenant, user=user)

    def expire(self, before_s: float) -> int:
        """Take examples out of the pool that came before."""
        if self.cache is not None:
            pool = self.cache.pool
            return pool.remove([example.id for example in pool if example.created_s < before_s])
        before = len(self._to_take)
        self._to_take = [
            one for one in self._to_take if one.body is None or one.body.get("created_s", before_s) >= before_s
        ]
        return before - len(self._to_take)

    def fit(self, data: Recorded, *, seed: int = 0) -> Self:
        """Teach the bandit from recorded outcomes, and fill the pool with good answers of trusted models, where answers are recorded.

        Raises InputError if the data has no vectors, DataError for a score that is not from 0 to 1.
        """
        if data.vector_ND is None:
            raise InputError(f"{self.name} learns from vectors; embed the data first")
        share_NM = ScoreScale().shares_of(data, advice=BRING)
        mean_M = np.ones(len(data.models)) if data.cost_NM is None else np.nan_to_num(_mean_cost(data.cost_NM))
        arms = [self._arm(name, float(cost)) for name, cost in zip(data.models, mean_M, strict=True)]
        cache = self.cache = self._make(arms, data.vector_ND.shape[1])
        queries = list(data.queries())
        for query, answers, share_M in zip(queries, data.answers or ({},) * len(data), share_NM, strict=True):
            for model, share in zip(data.models, share_M, strict=True):
                if model in answers and share >= self.config.least_score:
                    cache.offer(query, answers[model], model, vector_D=query.vector_D, quality=float(share))
        random = np.random.default_rng(seed)
        x_NI = [self._context(cache, query) for query in queries]
        for _ in range(self.config.epochs):
            for row in random.permutation(len(data)):
                for at in np.flatnonzero(np.isfinite(share_NM[row])):
                    cache.router.critic.rate(x_NI[row], int(at), float(share_NM[row, at]))
                cache.router.critic.train(1)
        return self

    def _context(self, cache: ICCache, query: Query) -> np.ndarray:
        """What the bandit would see of a recorded query, its own answer left out."""
        # The data has vectors.
        assert query.vector_D is not None
        found = cache.selector.select(
            query, query.vector_D, cache.assisted, tau=cache.threshold.best, now_s=self._now_s
        )
        kept = [item for item in found.chosen if item.example.request != query.text]
        tokens = query.prompt_tokens or cache.selector.count_tokens(query.text)
        return cache.router.context(query.vector_D, shortened(found, kept), tokens)

    def play(self, data: Recorded, pool: Pool) -> Played:
        """The arm of the largest expected utility for each row, nothing drawn and nothing learned. Recorded scores know no examples."""
        if data.vector_ND is None:
            raise InputError(f"{self.name} needs the vectors of queries; embed the data first")
        cache = self._cache_for(self._of_pool(pool), data.vector_ND.shape[1])
        columns = [at for at, name in enumerate(data.models) if name in cache.arms]
        if not columns:
            raise InputError(f"{self.name} knows none of the models {', '.join(data.models)}")
        own = [cache.router.arms.index(data.models[at]) for at in columns]
        mu_NM = np.array([cache.router.critic.utilities(self._context(cache, query))[own] for query in data.queries()])
        return played(data, np.asarray(columns)[mu_NM.argmax(1)])

    def state(self) -> tuple[Arrays, Facts]:
        """What the cache holds and learned; empty before it has seen a model."""
        return self._state(with_pool=True)

    def _state(self, with_pool: bool) -> tuple[Arrays, Facts]:
        cache = self.cache
        if cache is None:
            return {}, {}
        arrays, facts = cache.state(with_pool=with_pool)
        arms = [[arm.name, arm.cost, arm.context] for arm in cache.arms.values()]
        return arrays, {"cache": facts, "arms": arms, "dim": cache.router.dim, "now_s": self._now_s}

    def load_state(self, arrays: Arrays, facts: Facts) -> None:
        """Take back what `state` gave."""
        self.cache = None
        if facts:
            self._now_s = facts["now_s"]
            self.cache = self._make([self._arm(*row) for row in facts["arms"]], facts["dim"])
            self.cache.load_state(arrays, facts["cache"])

    @property
    def learned_dim(self) -> int | None:
        """See `Strategy`."""
        return None if self.cache is None else self.cache.router.dim

    def vector_dim(self, arrays: Arrays, facts: Facts) -> int | None:
        """None before it has seen a model."""
        return int(facts["dim"]) if facts else None

    def kept_state(self) -> tuple[Arrays, Facts]:
        """What was learned; examples are kept one by one."""
        return self._state(with_pool=False)

    def load_kept(self, arrays: Arrays, facts: Facts) -> None:
        """Take back what `kept_state` gave. Raises InputError if it is of other models or another dimension."""
        if not facts:
            self.cache = None
            return
        self._now_s = max(self._now_s, facts["now_s"])
        self._cache_for([self._arm(*row) for row in facts["arms"]], facts["dim"]).load_state(arrays, facts["cache"])

    def changed_examples(self, most: int) -> Sequence[Example]:
        """Of the pool."""
        return () if self.cache is None else self.cache.pool.changed(most)

    def take_examples(self, examples: Sequence[Example]) -> None:
        """Into the pool, or out of it."""
        if self.cache is None:
            self._to_take.extend(examples)
        else:
            self.cache.pool.take(examples)


def _falling(choice: Choice | None, names: Sequence[str]) -> list[float]:
    """Scores in this order: S; the first has the largest, drawn or not; what has none, one less than the one before."""
    known = {} if choice is None else dict(zip(choice.arms, choice.score_M.tolist(), strict=True))
    finite = {name: score for name, score in known.items() if np.isfinite(score)}
    found: list[float] = []
    for name in names:
        before = found[-1] if found else max(finite.values(), default=0.0)
        found.append(before if not found else finite.get(name, before - 1.0))
    return found


def _mean_cost(cost_NM: np.ndarray) -> np.ndarray:
    known_NM = np.isfinite(cost_NM)
    return np.where(known_NM, cost_NM, 0).sum(0) / np.maximum(known_NM.sum(0), 1)
