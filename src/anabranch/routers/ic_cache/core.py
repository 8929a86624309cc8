"""What IC-Cache is made of, and what all that it does needs: vectors, decisions that wait for feedback, its state."""
# Shapes: D dimensions, M arms

import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from anabranch.errors import InputError
from anabranch.routers.contract.query import Query
from anabranch.routers.contract.strategy import Arrays, Facts
from anabranch.routers.embed.checked import checked_rows
from anabranch.routers.ic_cache import judge as judging
from anabranch.routers.ic_cache.counters import Counters, Metrics
from anabranch.routers.ic_cache.off_policy import DecisionLog
from anabranch.routers.ic_cache.pool import Embed, ExamplePool
from anabranch.routers.ic_cache.records import Arm, Lesson, Routed, shortened
from anabranch.routers.ic_cache.redact import Redact, redact_personal
from anabranch.routers.ic_cache.router import Router
from anabranch.routers.ic_cache.selector import CountTokens, Selector, estimate_tokens
from anabranch.routers.ic_cache.threshold import Threshold
from anabranch.routers.ic_cache.upkeep import Manager

logger = logging.getLogger(__name__)


class Core:
    """See the module; for arguments and what is raised, `ICCache`."""

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
        dim = checked_rows(embed(["x"]), 1).shape[1] if embed is not None else int(dim or 0)
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

    # What everything needs

    def shows_examples(self, arm: str) -> bool:
        """Whether an arm is given examples."""
        said = self.arms[arm].shows_examples
        return said if said is not None else (arm != self.dearest or len(self.arms) == 1)

    def vector(self, query: Query) -> np.ndarray:
        """The query's own vector, or one made of its text; scaled to length 1, whoever gave it, since the router learns from it.

        Raises InputError for one of another dimension than the pool's, unless the config says to embed the pool anew, and DataError for
        what is no vector of finite numbers.
        """
        if query.vector_D is not None:
            vector_D = checked_rows([query.vector_D], 1, source="the query carries")[0]
        elif self.embed is not None:
            vector_D = checked_rows(self.embed([query.text]), 1)[0]
        else:
            raise InputError("the query carries no vector, and IC-Cache has no embedder")
        if len(vector_D) != self.router.dim:
            self._new_dim(vector_D)
        return vector_D

    def _new_dim(self, vector_D: np.ndarray) -> None:
        """Vectors are longer or shorter than they were: another embedder."""
        message = f"the request's vector has shape {list(vector_D.shape)}, the pool's have {self.router.dim} numbers"
        if self.config.on_new_dim == "refuse" or self.embed is None:
            raise InputError(f'{message}; keep one embedder, or set on_new_dim="reindex" and give embed')
        logger.warning("%s; embedding %d examples anew, and the router begins again", message, len(self.pool))
        dim, arms = len(vector_D), list(self.arms.values())
        self.pool.reindex(self.config.index.build(dim), self.embed)
        router = Router(self.config.router, [a.name for a in arms], [a.cost for a in arms], dim, seed=self.config.seed)
        router.load, router.scarcity = self.router.load, self.router.scarcity
        self.router = router
        self._pending.clear()
        self.metrics.count("ic_cache_reindexed_total")

    @property
    def assisted(self) -> str:
        """The arm that examples are selected for: the cheapest of those that are given some."""
        shown = [arm for arm in self.arms.values() if self.shows_examples(arm.name)] or list(self.arms.values())
        return min(shown, key=lambda arm: arm.cost).name

    def _bypassed(self, stage: str, instead: Any) -> Any:
        logger.warning("IC-Cache passes its %s by", stage, exc_info=True)
        self.metrics.count("ic_cache_bypass_total", stage=stage)
        return instead

    def _tell_pool(self) -> None:
        """How much is kept, at once: between two upkeeps much may come and go."""
        self.metrics.gauge("ic_cache_pool_examples", len(self.pool))
        self.metrics.gauge("ic_cache_pool_bytes", self.pool.size_bytes)

    def _regenerate(self, example: Any) -> list[str]:
        """Three answers of the dearest arm, if it is trusted."""
        ask = self.arms[self.dearest].ask
        if ask is None or self.config.pool.trust.get(self.dearest, 0) < self.config.pool.min_trust:
            return []
        return [ask([{"role": "user", "content": example.request}]) for _ in range(3)]

    # Decisions that wait for feedback

    def pending(self, id: str) -> Routed | None:
        """A decision that waits for feedback."""
        return self._pending.get(id)

    def _replace(self, id: str, **changes: Any) -> None:
        if id in self._pending:
            self._pending[id] = replace(self._pending[id], **changes)

    def _drop_examples(self, ids: set[int]) -> None:
        """Examples left the pool, or changed: prompts that are yet to be built do without them."""
        for id, routed in list(self._pending.items()):
            if ids.intersection(routed.selection.ids):
                kept = tuple(item for item in routed.selection.chosen if item.example.id not in ids)
                self._replace(id, selection=shortened(routed.selection, kept))

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
