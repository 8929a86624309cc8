"""Shadow samples: a share of the questions that users ask is asked of the other models too, while the gateway serves.

    live request -> answered, settled, its texts in the store          here nothing of this is known
    in the background: the store's new questions -> every other model -> judged -> the store, as a whole outcome

It is what ``anabranch gateway collect`` does, on the gateway's own store and event loop: the same calls, each with a reservation, a row
in the ledger and a tag whose budget pays, found again by whoever asks the same of the same model. They are made by a gateway aside, which
has deployments, breakers and limits of its own: what fails there shuts nothing here. What is outside, upstreams and their limits, both
share; ``rate`` bounds that.

Of the processes on one store, one does it. What it has asked and judged is in the store: another, or the next one, goes on from there.
"""

import asyncio
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from anabranch.errors import AnabranchError
from anabranch.gateway.collect.calls import OutOfBudgetError
from anabranch.gateway.collect.collector import IN_VAIN, Collector, for_collecting
from anabranch.gateway.collect.origins import PAGE, Answers, Origin, told_page
from anabranch.gateway.config import GatewayConfig
from anabranch.gateway.config.shadow import ShadowConfig
from anabranch.gateway.config.strategies import LearningConfig
from anabranch.gateway.logged_error import words
from anabranch.gateway.store import SHADOW, KeyRecord, Store, schema
from anabranch.gateway.store.learned import OUTCOME, VOUCHED, withdraw_vouched
from anabranch.routers.judges import ModelJudge
from anabranch.routers.money import nano_dollars
from anabranch.routers.strategies.training import share
from anabranch.web.turns import in_thread

if TYPE_CHECKING:
    from anabranch.gateway.gateway import Gateway

logger = logging.getLogger(__name__)

# Between looks at the store for new questions, and at whether the process that does it is still there.
EVERY_S = 2.0
AWAY_S = 15.0

# After what would go on failing: no room in any budget, or many questions in a row that came to nothing.
REST_S = 600.0

# Questions that are older when it begins are left to ``gateway collect``.
LOOK_BACK_US = 86_400 * 10**6

# Rows of the ledger that are looked at again, since they may become visible in another order than that of their numbers.
OVERLAP = 200

# Questions that came to nothing, or were passed over, and are known to be so.
REMEMBERED = 100_000


class Shadow:
    """See the module. Of one gateway, on its event loop.

    Args:
        gateway: that serves, started before `follow`.
        beside: makes another one on the same store.
    """

    def __init__(self, gateway: "Gateway", beside: Callable[[GatewayConfig], "Gateway"]) -> None:
        self._gateway, self._beside = gateway, beside
        self._task: asyncio.Task[None] | None = None
        self._changed = asyncio.Event()

    def follow(self) -> None:
        """Do as the gateway's config says, from now on. A question that is being asked is done with first."""
        self._changed.set()
        if self._task is None and self._gateway.config.shadow is not None:
            self._task = asyncio.ensure_future(self._forever())

    async def stop(self) -> None:
        """End now. Calls under way are given up, and charged as such."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
            self._task = None

    async def _forever(self) -> None:
        while True:
            self._changed.clear()
            config = self._gateway.config
            if config.shadow is None:
                await self._changed.wait()
                continue
            try:
                async with self._gateway.store.alone_beside(SHADOW) as is_alone:
                    if is_alone:
                        await self._under(config, config.shadow)
            except AnabranchError as error:
                logger.warning("shadow samples wait: %s", words(error))
            except Exception as error:
                logger.error("shadow samples wait: %s", type(error).__name__, exc_info=error)
            await self.rest(AWAY_S)

    async def rest(self, seconds: float) -> None:
        """Wait, unless the config changes."""
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        except TimeoutError:
            pass

    async def _under(self, config: GatewayConfig, wanted: ShadowConfig) -> None:
        """Sample until the config changes. Raises AnabranchError for what the store cannot do now."""
        store = self._gateway.store
        await store.set_budget(f"tag:{SHADOW}", nano_dollars(wanted.budget_usd), "day")
        if not wanted.conversations:
            await _withdraw(store)
        # Not started: it neither learns, nor cares for the store, nor tells anybody; it only makes calls. Models in this process are those
        # that serve.
        aside = await in_thread(self._beside, for_shadow(config))
        try:
            await aside.load()
            models = wanted.models or tuple(model.name for model in config.models)
            judge = ModelJudge(wanted.judge, models[0])
            collector = Collector(aside, models, judge, per_minute=wanted.rate, tag=SHADOW)
            await _Watch(self, store, collector, wanted, await store.secret(SHADOW)).forever()
        finally:
            await aside.stop()

    @property
    def is_current(self) -> bool:
        """The config is what it was when this sampling began."""
        return not self._changed.is_set()

    def count(self, result: str, cost_usd: float) -> None:
        """For ``/metrics``: what came of a question, and the dollars that it took."""
        metrics = self._gateway.metrics
        metrics.shadowed.labels(result).inc()
        metrics.shadow_nano.inc(max(0, nano_dollars(cost_usd)))


class _Watch:
    """The questions of one config, as they come.

    Args:
        shadow: whose they are.
        store: of both gateways.
        collector: that asks.
        wanted: which of the questions, and whether those of conversations are learned from.
        secret: of the store, without which who asks could choose words that are drawn.
    """

    def __init__(self, shadow: Shadow, store: Store, collector: Collector, wanted: ShadowConfig, secret: str) -> None:
        self._shadow, self._store, self._collector, self._share_of = shadow, store, collector, wanted.share
        self._secret, self._vouches = secret, wanted.conversations
        self._since_us = store.now_us() - LOOK_BACK_US
        self._after, self._in_vain = 0, 0
        # Requests that were looked at, questions that need no further look, and those that were passed over for a key, since what one key
        # may not, another may; each oldest first.
        self._seen: dict[str, None] = {}
        self._tried: dict[str, None] = {}
        self._passed: dict[tuple[str, str], None] = {}

    async def forever(self) -> None:
        """Until the config changes."""
        while self._shadow.is_current:
            page = await told_page(self._store, self._since_us, max(0, self._after - OVERLAP), self._seen)
            if page is not None:
                _bound(self._seen, 2 * PAGE)
                await self._through(page.origins)
            # Rows that were there are gone where there is none any more; then numbers may begin anew.
            is_news = page is not None and page.last_seq > self._after
            self._after = 0 if page is None else page.last_seq
            if not is_news:
                await self._shadow.rest(EVERY_S)

    async def _through(self, origins: list[Origin]) -> None:
        fresh = {(one.identity, one.key_id): one for one in origins if self._is_sampled(one)}
        if not fresh:
            return
        keys = {key.id: key for key in await self._store.keys()}
        there = await self._store.collected([self._key(identity) for identity, _ in fresh])
        for (identity, key_id), origin in fresh.items():
            if (kept := there.get(self._key(identity))) is not None:
                await self._vouch(identity, origin, kept)
                self._note(identity)
            while self._shadow.is_current and not self._is_done(identity, key_id):
                await self._ask(identity, origin, keys.get(key_id))

    def _is_sampled(self, origin: Origin) -> bool:
        identity = origin.identity
        return not self._is_done(identity, origin.key_id) and share(SHADOW, self._secret, identity) < self._share_of

    def _is_done(self, identity: str, key_id: str) -> bool:
        return identity in self._tried or (identity, key_id) in self._passed

    async def _ask(self, identity: str, origin: Origin, key: KeyRecord | None) -> None:
        """Take one question as far as it goes now: what is not noted as tried is to be asked again."""
        collector = self._collector
        if not collector.may_collect(origin, key):
            self._passed[identity, origin.key_id] = None
            _bound(self._passed, REMEMBERED)
            self._shadow.count("not_allowed", 0.0)
            return
        before_usd, failed, answers = collector.done.cost_usd, collector.done.failed, Answers()
        answers.note(origin)
        try:
            line = await collector.outcome(origin, answers)
        except OutOfBudgetError as error:
            collector.note_calls()
            self._shadow.count("over_budget", collector.done.cost_usd - before_usd)
            logger.info("shadow samples rest: %s", error)
            if error.wait_s is None:
                # There will be no room for this one; perhaps for another.
                self._note(identity)
            await self._shadow.rest(min(REST_S, error.wait_s or REST_S))
            return
        collector.note_calls()
        if line is not None:
            await self._keep(identity, origin, line)
        result = "judged" if line is not None else "failed" if collector.done.failed > failed else "unjudged"
        await self._mind(line is None)
        self._note(identity)
        self._shadow.count(result, collector.done.cost_usd - before_usd)

    async def _mind(self, is_vain: bool) -> None:
        """Rest where one question after another comes to nothing: a model, or the judge, is at fault, and each costs something."""
        self._in_vain = self._in_vain + 1 if is_vain else 0
        if self._in_vain >= IN_VAIN:
            logger.warning("shadow samples rest: %d questions in a row came to nothing", self._in_vain)
            self._in_vain = 0
            await self._shadow.rest(REST_S)

    async def _keep(self, identity: str, origin: Origin, line: dict[str, Any]) -> None:
        """Have the store keep an outcome, as long as the question that it is about."""
        line = line | self._mark(origin)
        row = (self._key(identity), origin.asked_us, json.dumps(line, separators=(",", ":")))
        await self._store.change(lambda connection: connection.insert("collected", schema.COLLECTED, [row]))
        self._collector.done.questions += 1

    def _mark(self, origin: Origin) -> dict[str, bool]:
        """Of an outcome of a conversation that is to be learned from."""
        return {VOUCHED: True} if self._vouches and not origin.is_plain else {}

    async def _vouch(self, identity: str, origin: Origin, kept: Mapping[str, Any]) -> None:
        """Mark an outcome that was kept before the config let conversations be learned from."""
        if self._mark(origin) and not kept.get(VOUCHED):
            body = json.dumps({**kept, VOUCHED: True}, separators=(",", ":"))
            sql, key = "UPDATE collected SET body = :body WHERE key = :key", self._key(identity)
            await self._store.change(lambda connection: connection.run(sql, body=body, key=key))

    def _key(self, identity: str) -> str:
        """Of an outcome: other models, or another judge, make another one."""
        made = json.dumps([sorted(self._collector.models), self._collector.judge.name, identity])
        return f"{OUTCOME}{hashlib.sha256(made.encode('utf-8', 'surrogatepass')).hexdigest()}"

    def _note(self, identity: str) -> None:
        self._tried[identity] = None
        _bound(self._tried, REMEMBERED)


async def _withdraw(store: Store) -> None:
    """Let nobody learn from outcomes of conversations that an earlier config vouched for: they are kept, and left out."""
    after: str | None = ""
    while after is not None:
        after = await store.change(partial(withdraw_vouched, after=after))


def _bound(known: dict[Any, None], most: int) -> None:
    """Let go of the oldest."""
    while len(known) > most:
        del known[next(iter(known))]


def for_shadow(config: GatewayConfig) -> GatewayConfig:
    """`for_collecting`, for a gateway within another one."""
    return for_collecting(config).replace(webhooks={}, otel=None, learning=LearningConfig())
