"""IC-Cache: past answers of a large model as in-context examples for a small one, and a router that minds the load.

Yu, Gan et al., "IC-Cache: Efficient Large Language Model Serving via In-context Caching", SOSP 2025, arXiv 2501.12689.

    request -> select examples -> choose an arm -> ask it -> perhaps keep the answer       `generate`
    rating or preference -> examples' records, tau, proxy, critic, beliefs                 `feedback`
    now and then: expire, evict, replay, refit the proxy                                   `tick`

A selector or a router that fails is passed by: the request goes without examples, or to the dearest arm, and a counter says so.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Literal

import numpy as np

from anabranch.config import Config as BaseConfig
from anabranch.config import Field, Part, Seed, configclass
from anabranch.errors import CapacityError, InputError
from anabranch.routers.contract.query import Query
from anabranch.routers.ic_cache import judge as judging
from anabranch.routers.ic_cache.deciding import Deciding
from anabranch.routers.ic_cache.erasing import Erasing
from anabranch.routers.ic_cache.learning import Learning
from anabranch.routers.ic_cache.pool import Admission, ExamplePool
from anabranch.routers.ic_cache.prompt import Messages, Style
from anabranch.routers.ic_cache.proxy import Logistic, Proxy
from anabranch.routers.ic_cache.records import Response, Routed, as_query
from anabranch.routers.ic_cache.router import Router
from anabranch.routers.ic_cache.selector import Selector
from anabranch.routers.ic_cache.threshold import Threshold
from anabranch.routers.ic_cache.upkeep import Manager, Upkeep
from anabranch.routers.retrieve import Clustered, Index


class ICCache(Deciding, Learning, Erasing, Part):
    """See the module. One thread at a time; a gateway calls it on its event loop.

    Args:
        config: of all parts.
        arms: models, at least one.
        embed: texts to vectors (an `Embedder`'s ``embed``, or any callable), which are scaled to length 1; None where every query
            carries a vector.
        dim: D; needed where ``embed`` is None.
        judge: compares two answers, for requests that two arms answered.
        rate: how good an answer to an example's request is, for replays; None for none.
        load: load of the dearest arm now, as a share of its capacity.
        redact: what is done to texts before they are kept.
        metrics: where numbers go.
        count_tokens: of a text.
        clock: seconds.

    Raises InputError for arms that do not fit, DataError if ``embed`` gives no vectors.
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
