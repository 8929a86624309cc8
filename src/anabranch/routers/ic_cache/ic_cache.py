"""IC-Cache: past answers of a large model as in-context examples for a small one, and a router that minds the load.

Yu, Gan et al., "IC-Cache: Efficient Large Language Model Serving via In-context Caching", SOSP 2025, arXiv 2501.12689.

    request -> select examples -> choose an arm -> ask it -> perhaps keep the answer       `generate`
    rating or preference -> examples' records, tau, proxy, critic, beliefs                 `feedback`
    now and then: expire, evict, replay, refit the proxy                                   `tick`

A selector or a router that fails is passed by: the request goes without examples, or to the dearest arm, and a counter says so.
"""
# Shapes: D dimensions, M arms, I inputs of the critic

import logging
import math
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from anabranch.config import Config as BaseConfig
from anabranch.config import Field, Part, Seed, configclass
from anabranch.errors import CapacityError, InputError
from anabranch.routers.contract.query import Query
from anabranch.routers.contract.strategy import Arrays, Facts
from anabranch.routers.ic_cache import judge as judging
from anabranch.routers.ic_cache.counters import Counters, Metrics
from anabranch.routers.ic_cache.off_policy import DecisionLog
from anabranch.routers.ic_cache.pool import Admission, Embed, ExamplePool
from anabranch.routers.ic_cache.prompt import Messages, Style, build, fit
from anabranch.routers.ic_cache.proxy import Logistic, Proxy, merge
from anabranch.routers.ic_cache.records import Arm, Lesson, Response, Routed, as_query, shortened
from anabranch.routers.ic_cache.redact import Redact, redact_personal
from anabranch.routers.ic_cache.router import Choice, Router
from anabranch.routers.ic_cache.selector import CountTokens, Selection, Selector, estimate_tokens
from anabranch.routers.ic_cache.threshold import Threshold
from anabranch.routers.ic_cache.upkeep import Manager, Upkeep
from anabranch.routers.retrieve import Clustered, Index

logger = logging.getLogger(__name__)


class ICCache(Part):
    """See the module. One thread at a time; a gateway calls it on its event loop.

    Args:
        config: of all parts.
        arms: models, at least one.
        embed: texts to unit vectors (an `Embedder`'s ``embed``, or any callable); None where every query carries a vector.
        dim: D; needed where ``embed`` is None.
        judge: compares two answers, for requests that two arms answered.
        rate: how good an answer to an example's request is, for replays; None for none.
        load: load of the dearest arm now, as a share of its capacity.
        redact: what is done to texts before they are kept.
        metrics: where numbers go.
        count_tokens: of a text.
        clock: seconds.

    Raises InputError for arms that do not fit.
    """

    @configclass
    class Config(BaseConfig):
        """Of all parts.

        Attributes:
            pool: who may enter.
            index: how candidates are found.
            proxy: how their use is predicted.
            selector: how many are shown.
            threshold: how tau is found.
            router: the bandit.
            manager: upkeep.
            style: how examples are put before a request.
            on_new_dim: what happens when vectors come in another length: "refuse", or "reindex" by embedding the pool anew.
            example_weight: what a full budget of example tokens takes off the efficiency gain by which tau is chosen.
            refit_after: new lessons after which a tick fits the proxy anew.
            lessons: that the proxy learns from at most.
            pending: decisions that wait for feedback at most.
            seed: of all that is drawn.
        """

        pool: ExamplePool.Config = Field(default_factory=ExamplePool.Config)
        index: Index.Config = Field(default_factory=lambda: Clustered.Config(probes=16))
        proxy: Proxy.Config = Field(default_factory=Logistic.Config)
        selector: Selector.Config = Field(default_factory=Selector.Config)
        threshold: Threshold.Config = Field(default_factory=Threshold.Config)
        router: Router.Config = Field(default_factory=Router.Config)
        manager: Manager.Config = Field(default_factory=Manager.Config)
        style: Style = "turns"
        on_new_dim: Literal["refuse", "reindex"] = "refuse"
        example_weight: float = Field(default=0.1, ge=0)
        refit_after: int = Field(default=200, ge=1)
        lessons: int = Field(default=10_000, ge=1)
        pending: int = Field(default=10_000, ge=1)
        seed: Seed = 0

    def __init__(
        self,
        config: Any,
        *,
        arms: Sequence[Arm],
        embed: Embed | None = None,
        dim: int | None = None,
        judge: judging.Judge | None = None,
        rate: Callable[[str, str], float] | None = None,
        load: Callable[[], float] = lambda: 0.0,
        redact: Redact = redact_personal,
        metrics: Metrics | None = None,
        count_tokens: CountTokens = estimate_tokens,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if embed is None and dim is None:
            raise InputError(
                "IC-Cache needs embed, which makes vectors, or dim, the length of those that queries carry"
            )
        self.config, self.embed, self.judge, self.load, self.clock = config, embed, judge, load, clock
        self.metrics: Metrics = Counters() if metrics is None else metrics
        dim = int(np.asarray(embed(["x"])).shape[1]) if embed is not None else int(dim or 0)
        self.router = Router(
            config.router, [arm.name for arm in arms], [arm.cost for arm in arms], dim, seed=config.seed
        )
        self.arms = {arm.name: arm for arm in arms}
        self.dearest = max(arms, key=lambda arm: arm.cost).name
        self.pool = ExamplePool(config.pool, config.index.build(dim), redact=redact)
        self.pool.on_removed.append(self._drop_examples)
        self.selector = Selector(config.selector, self.pool, config.proxy.build(), count_tokens=count_tokens)
        self.threshold = Threshold(config.threshold)
        rate_example = None if rate is None else lambda example, answer: rate(example.request, answer)
        self.manager = Manager(config.manager, self.pool, regenerate=self._regenerate, rate=rate_example)
        self.log = DecisionLog()
        self._lessons: deque[Lesson] = deque(maxlen=config.lessons)
        self._new_lessons = 0
        self._pending: OrderedDict[str, Routed] = OrderedDict()
        self._random = np.random.default_rng([config.seed, 3])

    # Deciding

    def shows_examples(self, arm: str) -> bool:
        """Whether an arm is given examples."""
        said = self.arms[arm].shows_examples
        return said if said is not None else (arm != self.dearest or len(self.arms) == 1)

    def vector(self, query: Query) -> np.ndarray:
        """The query's own vector, or one made of its text.

        Raises InputError for one of another length than the pool's, unless the config says to embed the pool anew.
        """
        if query.vector_D is None and self.embed is None:
            raise InputError("the query carries no vector, and IC-Cache has no embedder")
        made = query.vector_D if query.vector_D is not None or self.embed is None else self.embed([query.text])[0]
        vector_D = np.asarray(made, np.float32)
        if vector_D.shape != (self.router.dim,):
            self._new_dim(vector_D)
        return vector_D

    def _new_dim(self, vector_D: np.ndarray) -> None:
        """Vectors are longer or shorter than they were: another embedder."""
        message = f"the request's vector has shape {list(vector_D.shape)}, the pool's have {self.router.dim} numbers"
        if self.config.on_new_dim == "refuse" or self.embed is None or vector_D.ndim != 1:
            raise InputError(f'{message}; keep one embedder, or set on_new_dim="reindex" and give embed')
        logger.warning("%s; embedding %d examples anew, and the router begins again", message, len(self.pool))
        dim, arms = len(vector_D), list(self.arms.values())
        self.pool.reindex(self.config.index.build(dim), self.embed)
        router = Router(self.config.router, [a.name for a in arms], [a.cost for a in arms], dim, seed=self.config.seed)
        router.load, router.scarcity = self.router.load, self.router.scarcity
        self.router = router
        self._pending.clear()
        self.metrics.count("ic_cache_reindexed_total")

    def select(self, request: Query | str, target_model: str, *, vector_D: np.ndarray | None = None) -> Selection:
        """Examples for a request, with scores and reasons; none if anything fails."""
        query = as_query(request)
        try:
            vector_D = self.vector(query) if vector_D is None else vector_D
            tau, is_trial = self.threshold.draw(self._random)
            return self.selector.select(query, vector_D, target_model, tau=tau, now_s=self.clock(), is_trial=is_trial)
        except Exception:
            return self._bypassed("selector", Selection())

    def route(
        self, request: Query | str, *, available: Sequence[str] | None = None, load: float | None = None
    ) -> Routed:
        """Examples and an arm for a request.

        Args:
            request: text, or a query.
            available: arms that take requests; None for all.
            load: of the dearest arm now; None asks the ``load`` that was given.
        """
        query, vector_D, x_I, choice = as_query(request), None, None, None
        selection = Selection()
        try:
            vector_D = self.vector(query)
        except Exception:
            self._bypassed("embedder", None)
        if vector_D is not None:
            selection = self.select(query, self.assisted, vector_D=vector_D)
        try:
            self.router.observe_load(self.load() if load is None else load, self.clock())
            if vector_D is not None:
                tokens = query.prompt_tokens or self.selector.count_tokens(query.text)
                x_I = self.router.context(vector_D, selection, tokens)
                choice = self.router.choose(x_I, available)
        except Exception:
            self._bypassed("router", None)
        order = self._order(choice, available)
        routed = Routed(
            id=uuid.uuid4().hex,
            query=query,
            vector_D=vector_D,
            selection=selection,
            choice=choice,
            arm=order[0],
            order=order,
            x_I=x_I,
        )
        self._remember(routed)
        return routed

    @property
    def assisted(self) -> str:
        """The arm that examples are selected for: the cheapest of those that are given some."""
        shown = [arm for arm in self.arms.values() if self.shows_examples(arm.name)] or list(self.arms.values())
        return min(shown, key=lambda arm: arm.cost).name

    def _order(self, choice: Choice | None, available: Sequence[str] | None) -> tuple[str, ...]:
        """The chosen arm, then the others by score; by falling cost where the router said nothing."""
        names = list(self.arms)
        if choice is None:
            names.sort(key=lambda name: -self.arms[name].cost)
        else:
            score = dict(zip(choice.arms, choice.score_M.tolist(), strict=True))
            names.sort(key=lambda name: (name != choice.arm, -score[name]))
        is_open = [name for name in names if available is None or name in available]
        return tuple(is_open or names)

    def _remember(self, routed: Routed) -> None:
        self._pending[routed.id] = routed
        while len(self._pending) > self.config.pending:
            self._pending.popitem(last=False)
        choice = routed.choice
        if choice is not None:
            self.log.append(
                {
                    "id": routed.id,
                    "time_s": self.clock(),
                    "tenant": routed.query.tenant,
                    "user": routed.query.user,
                    "arm": choice.arm,
                    "arms": list(choice.arms),
                    "probability": choice.probability_M.tolist(),
                    "mu": choice.mu_M.tolist(),
                    "push": choice.push,
                    "second": choice.second,
                    "tau": routed.selection.tau,
                    "examples": list(routed.selection.ids),
                }
            )
        self.metrics.count("ic_cache_requests_total", arm=routed.arm)
        self.metrics.count("ic_cache_examples_selected_total", len(routed.selection.chosen))
        self.metrics.count("ic_cache_selection_seconds_total", routed.selection.took_s)
        self.metrics.gauge("ic_cache_load_push", self.router.push)

    def _bypassed(self, stage: str, instead: Any) -> Any:
        logger.warning("IC-Cache passes its %s by", stage, exc_info=True)
        self.metrics.count("ic_cache_bypass_total", stage=stage)
        return instead

    def prepare(self, routed: Routed, arm: str, messages: Messages) -> Messages:
        """What to send to an arm: the messages with as many of the examples as its window holds, if it is given any."""
        if arm not in self.arms or not self.shows_examples(arm) or not routed.selection.chosen:
            return messages
        kept = fit(
            messages,
            routed.selection.chosen,
            context=self.arms[arm].context,
            max_tokens=routed.query.max_tokens,
            prompt_tokens=routed.query.prompt_tokens,
            style=self.config.style,
            count_tokens=self.selector.count_tokens,
        )
        if len(kept) < len(routed.selection.chosen):
            self.metrics.count("ic_cache_examples_dropped_total", len(routed.selection.chosen) - len(kept))
            self._replace(routed.id, selection=shortened(routed.selection, kept))
        return build(messages, kept, style=self.config.style)

    def _replace(self, id: str, **changes: Any) -> None:
        if id in self._pending:
            self._pending[id] = replace(self._pending[id], **changes)

    # The client's side

    def generate(self, requests: Iterable[Query | str], *, store: bool = True) -> list[Response]:
        """Answer requests, one after the other.

        Raises CapacityError if no arm answers one (an HTTP server says 503).
        """
        return [self._generate(as_query(request), store) for request in requests]

    def _generate(self, query: Query, store: bool) -> Response:
        routed = self.route(query)
        messages = query.messages or [{"role": "user", "content": query.text}]
        errors = []
        for arm in routed.order:
            try:
                text = self._ask(arm, routed, messages)
            except Exception as error:
                errors.append(f"{arm}: {error}")
                self.metrics.count("ic_cache_arm_errors_total", arm=arm)
                continue
            self.answered(routed.id, arm)
            second = routed.choice.second if routed.choice is not None and arm == routed.choice.arm else None
            if second is not None and self.judge is not None:
                self._compare(routed, arm, text, second, messages)
            return Response(text=text, arm=arm, routed=routed, admission=self.admit(routed, text, arm, store=store))
        raise CapacityError(f"no arm answered ({'; '.join(errors)}); try again later")

    def _ask(self, arm: str, routed: Routed, messages: Messages) -> str:
        ask = self.arms[arm].ask
        if ask is None:
            raise InputError(f"arm {arm!r} has no ask; it can only be routed to")
        return ask(self.prepare(routed, arm, messages))

    def _compare(self, routed: Routed, first: str, text: str, second: str, messages: Messages) -> None:
        """Let the second arm answer too, and learn which answer is better. Whatever fails here costs only the lesson."""
        try:
            other = self._ask(second, routed, messages)
            score = judging.compare(self.judge, routed.query.text, text, other) if self.judge else math.nan
        except Exception:
            self._bypassed("judge", None)
            return
        self.prefer(routed.id, first, second, judging.outcome(score))

    def update_cache(
        self, requests: Sequence[Query | str], responses: Sequence[str], *, model: str | None = None, store: bool = True
    ) -> list[Admission]:
        """Offer answers that a client has. ``model``: that gave them; None for the dearest arm. Raises InputError for unequal lengths."""
        if len(requests) != len(responses):
            raise InputError(f"{len(requests)} requests with {len(responses)} responses")
        return [
            self.offer(as_query(request), response, model or self.dearest, store=store)
            for request, response in zip(requests, responses, strict=True)
        ]

    def admit(
        self, routed: Routed, response: str, arm: str, *, store: bool = True, quality: float | None = None
    ) -> Admission:
        """Offer an answer to a decision's request."""
        return self.offer(
            routed.query, response, arm, vector_D=routed.vector_D, store=store, quality=quality, source=routed.id
        )

    def offer(
        self,
        query: Query,
        response: str,
        model: str,
        *,
        vector_D: np.ndarray | None = None,
        store: bool = True,
        quality: float | None = None,
        source: str = "",
    ) -> Admission:
        """Offer an answer to any request. What fails is told as a refusal."""
        if vector_D is None and query.vector_D is not None:
            vector_D = query.vector_D
        try:
            admission = self.pool.admit(
                query,
                response,
                model,
                now_s=self.clock(),
                vector_D=vector_D,
                embed=self.embed,
                quality=quality,
                store=store,
                source=source,
                make_room=lambda missing: self.manager.make_room(missing, self.clock()),
            )
        except Exception:
            admission = self._bypassed("admission", Admission(None, "failed"))
        self.metrics.count("ic_cache_admissions_total", reason=admission.reason)
        self._tell_pool()
        return admission

    def _tell_pool(self) -> None:
        """How much is kept, at once: between two upkeeps much may come and go."""
        self.metrics.gauge("ic_cache_pool_examples", len(self.pool))
        self.metrics.gauge("ic_cache_pool_bytes", self.pool.size_bytes)

    # Learning

    def answered(self, id: str, arm: str) -> None:
        """Tell that an arm answered; an unknown id is passed over."""
        routed = self._pending.get(id)
        if routed is not None:
            for item in routed.selection.chosen if self.shows_examples(arm) else ():
                item.example.uses += 1
                self.pool.touch(item.example)
            self._replace(id, answered=(*routed.answered, arm))

    def feedback(
        self,
        id: str,
        *,
        thumb: bool | None = None,
        score: float | None = None,
        preferred: tuple[str, str] | None = None,
        tie: bool = False,
        arm: str | None = None,
    ) -> bool:
        """Learn from what somebody thinks of an answer.

        Args:
            id: of the decision.
            thumb: up or down.
            score: 0 to 1.
            preferred: the arm whose answer is better, then the other.
            tie: neither is.
            arm: that gave the rated answer; None for the one that was told of, or else chosen.

        Returns: whether it counted. What is no number, out of range, or of an unknown decision is ignored and counted.
        """
        if preferred is not None:
            return self.prefer(id, *preferred, 0.5 if tie else 1.0)
        quality = float(thumb) if thumb is not None else math.nan if score is None else float(score)
        routed = self._pending.get(id)
        if not 0 <= quality <= 1 or routed is None:
            return self._ignored("unknown id" if routed is None else "no score from 0 to 1")
        arm = arm or (routed.answered[0] if routed.answered else routed.arm)
        if arm not in self.arms:
            return self._ignored("unknown arm")
        self._learn(routed, arm, quality)
        self.metrics.count("ic_cache_feedback_total", kind="thumb" if thumb is not None else "score")
        return True

    def _learn(self, routed: Routed, arm: str, quality: float) -> None:
        cost = float(self.router.cost_M[self.router.arms.index(arm)])
        if routed.x_I is not None:
            self.router.rate(routed.x_I, arm, quality, owner=(routed.query.tenant, routed.query.user))
        if routed.choice is not None and arm == routed.choice.arm:
            self.log.reward(routed.id, quality)
        selection = routed.selection
        if not self.shows_examples(arm):
            return
        examples = [item.example for item in selection.chosen]
        self.manager.shown(examples, quality, cost, is_cheap=arm != self.dearest, now_s=self.clock())
        if selection.pairs is not None and len(selection.pairs):
            query = routed.query
            self._lessons.append(Lesson(selection.pairs, quality, selection.ids, query.tenant, query.user))
            self._new_lessons += 1
        if selection.is_trial:
            share = selection.tokens / max(self.config.selector.max_example_tokens, 1)
            self.threshold.record(selection.tau, quality - cost - self.config.example_weight * share)

    def prefer(self, id: str, winner: str, loser: str, outcome: float = 1.0) -> bool:
        """Learn that one arm's answer was preferred to another's (1), or the other way round (0), or neither (1/2)."""
        routed = self._pending.get(id)
        if routed is None or routed.x_I is None:
            return self._ignored("unknown id")
        if winner not in self.arms or loser not in self.arms or winner == loser:
            return self._ignored("unknown arm")
        if not 0 <= outcome <= 1:
            return self._ignored("no score from 0 to 1")
        self.router.prefer(routed.x_I, winner, loser, outcome, owner=(routed.query.tenant, routed.query.user))
        self.metrics.count("ic_cache_feedback_total", kind="preference")
        return True

    def _ignored(self, reason: str) -> bool:
        self.metrics.count("ic_cache_feedback_ignored_total", reason=reason)
        return False

    def refit(self) -> bool:
        """Fit the proxy on what is remembered; whether there was anything."""
        if not self._lessons:
            return False
        found = merge([lesson.pairs for lesson in self._lessons])
        helped_N = np.repeat([lesson.quality for lesson in self._lessons], [len(item.pairs) for item in self._lessons])
        proxy = self.config.proxy.build()
        proxy.fit(found, helped_N, seed=self.config.seed)
        # At once: a request sees the old one or the new one.
        self.selector.proxy = proxy
        self._new_lessons = 0
        self.metrics.count("ic_cache_refits_total")
        return True

    # Upkeep

    def tick(self) -> Upkeep:
        """Expire, evict near the limit, replay off-peak, refit the proxy. To be called now and then, outside requests."""
        done = self.manager.tick(self.clock(), self.router.load.value)
        if self._new_lessons >= self.config.refit_after:
            self.refit()
        for reason, count in (("expired", done.expired), ("evicted", done.evicted)):
            self.metrics.count("ic_cache_removed_total", count, reason=reason)
        self.metrics.count("ic_cache_replays_total", done.replayed)
        self._tell_pool()
        self.metrics.gauge("ic_cache_tau", self.threshold.best)
        self.metrics.gauge("ic_cache_autoscale", self.router.autoscale)
        return done

    def _regenerate(self, example: Any) -> list[str]:
        """Three answers of the dearest arm, if it is trusted."""
        ask = self.arms[self.dearest].ask
        if ask is None or self.config.pool.trust.get(self.dearest, 0) < self.config.pool.min_trust:
            return []
        return [ask([{"role": "user", "content": example.request}]) for _ in range(3)]

    def forget(self, *, tenant: str = "", user: str | None = None, ids: Iterable[int] | None = None) -> int:
        """The right to erasure: a tenant's examples (all, or a user's, or these ids) leave the pool, its index, prompts that hold them,
        decisions that wait for feedback, what proxy and critic learn from, and the log. Returns how many examples went.
        """
        gone = self.pool.forget(tenant=tenant, user=user, ids=ids)

        def is_theirs(whose_tenant: str, whose_user: str) -> bool:
            return ids is None and whose_tenant == tenant and user in (None, whose_user)

        for id in [id for id, routed in self._pending.items() if is_theirs(routed.query.tenant, routed.query.user)]:
            del self._pending[id]
        self.log.forget(lambda row: is_theirs(row["tenant"], row["user"]))
        kept = [
            lesson
            for lesson in self._lessons
            if not is_theirs(lesson.tenant, lesson.user) and gone.isdisjoint(lesson.ids)
        ]
        self._lessons = deque(kept, maxlen=self._lessons.maxlen)
        if ids is None:
            self.router.critic.buffer.forget(tenant, user)
        self.metrics.count("ic_cache_removed_total", len(gone), reason="erased")
        return len(gone)

    def forget_decision(self, id: str) -> int:
        """Erase one decision: the example that its answer became, and all that is remembered of it. Returns how many examples went."""
        routed = self._pending.pop(id, None)
        found = [example for example in self.pool if example.source == id]
        count = sum(self.forget(tenant=example.tenant, ids=[example.id]) for example in found)
        self.log.forget(lambda row: bool(row["id"] == id))
        if routed is not None and routed.x_I is not None:
            self.router.critic.buffer.forget_context(routed.x_I)
        return count

    def forget_all(self) -> int:
        """Erase what is remembered of everybody. Returns how many examples went."""
        owners = {example.tenant for example in self.pool} | {routed.query.tenant for routed in self._pending.values()}
        owners |= {lesson.tenant for lesson in self._lessons} | {row["tenant"] for row in self.log.rows}
        owners |= {tenant for tenant, _ in self.router.critic.buffer.owner_N}
        return sum(self.forget(tenant=tenant) for tenant in sorted(owners))

    def _drop_examples(self, ids: set[int]) -> None:
        """Examples left the pool, or changed: prompts that are yet to be built do without them."""
        for id, routed in list(self._pending.items()):
            if ids.intersection(routed.selection.ids):
                kept = tuple(item for item in routed.selection.chosen if item.example.id not in ids)
                self._replace(id, selection=shortened(routed.selection, kept))

    def pending(self, id: str) -> Routed | None:
        """A decision that waits for feedback."""
        return self._pending.get(id)

    # On disk

    def _parts(self) -> list[tuple[str, Any]]:
        return [
            ("pool", self.pool),
            ("proxy", self.selector.proxy),
            ("threshold", self.threshold),
            ("router", self.router),
        ]

    def state(self, *, with_pool: bool = True) -> tuple[Arrays, Facts]:
        """Pool, proxy, threshold and router; decisions that wait for feedback are not kept."""
        arrays: Arrays = {}
        facts: Facts = {}
        for name, part in self._parts():
            if name == "pool" and not with_pool:
                continue
            own, facts[name] = part.state()
            arrays |= {f"{name}.{key}": value for key, value in own.items()}
        return arrays, facts | {"random": self._random.bit_generator.state}

    def load_state(self, arrays: Arrays, facts: Facts) -> None:
        """Take back what `state` gave; the pool stays where none was given."""
        self._random.bit_generator.state = facts["random"]
        for name, part in self._parts():
            if name not in facts:
                continue
            own = {key.removeprefix(f"{name}."): value for key, value in arrays.items() if key.startswith(f"{name}.")}
            part.load_state(own, facts[name])
