"""`Gateway`: the whole of it as a Python object. The HTTP layer only translates.

gateway = Gateway(load_config("gateway.toml"))
gateway.chat(model="auto/rules", messages=[{"role": "user", "content": "hello"}])["choices"][0]["message"]["content"]

async with Gateway() as gateway:                      # a mock pool
    answer = await gateway.achat({"model": "small", "messages": [...]})
    async for chunk in await gateway.achat({"model": "auto", "messages": [...], "stream": True}): ...
"""

import asyncio
import contextlib
import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from anabranch.bounds import shown
from anabranch.errors import CapacityError, ConfigError, InputError
from anabranch.gateway import listings
from anabranch.gateway.answer_mark import answer_mark
from anabranch.gateway.caches import Caches
from anabranch.gateway.collect.shadow import Shadow
from anabranch.gateway.config import GatewayConfig, StrategyConfig, default_config, load_config
from anabranch.gateway.config.source import told_where
from anabranch.gateway.core.admission import Admission, Left
from anabranch.gateway.core.decision_log import Collecting, keeps_texts
from anabranch.gateway.core.held_body import HeldBody
from anabranch.gateway.core.incoming import Incoming, Key, KnownKey
from anabranch.gateway.core.intake import Intake
from anabranch.gateway.core.relay import Ahead, Chunks
from anabranch.gateway.core.reply import Reply
from anabranch.gateway.core.request import RequestRun
from anabranch.gateway.core.services import Services
from anabranch.gateway.core.unsettled import Unsettled
from anabranch.gateway.in_flight import InFlight
from anabranch.gateway.key_admission import KeyAdmission
from anabranch.gateway.learning.erasures import Erasures
from anabranch.gateway.learning.errands import ErrandRounds
from anabranch.gateway.learning.kept import Kept
from anabranch.gateway.learning.services import LearningServices
from anabranch.gateway.learning.teaching import Teaching
from anabranch.gateway.metrics import Metrics
from anabranch.gateway.metrics_text import labelled, told_by
from anabranch.gateway.observe.observers import Observers
from anabranch.gateway.observe.webhooks import Webhooks, hooks_of
from anabranch.gateway.overview import Overview, Sources
from anabranch.gateway.providers.provider import Native
from anabranch.gateway.refusals import unavailable
from anabranch.gateway.request_log import RequestLog
from anabranch.gateway.runtime import Runtime, loaded
from anabranch.gateway.shared import Shared
from anabranch.gateway.store import KeyRecord, RateLimits, Store, open_store
from anabranch.gateway.sync_gateway import SyncGateway
from anabranch.gateway.tasks import Tasks
from anabranch.gateway.ui import Seen, Snapshot
from anabranch.gateway.upkeep import learn_forever, prune_forever
from anabranch.routers.contract.query import Decision
from anabranch.routers.contract.strategy import Strategy
from anabranch.web.turns import Turns, in_thread, plainly_awaited

if TYPE_CHECKING:
    from anabranch.gateway.learning.joining import Joined
    from anabranch.routers.contract.dataset import Recorded

# Large bodies are read and counted here, one after another: the more threads want Python's lock, the longer the loop waits for it.
_READERS = ThreadPoolExecutor(1, "large-body")


class Gateway(SyncGateway):
    """One gateway. Its async methods belong to one event loop; its plain ones may be called from anywhere else.

    Args:
        config: a config, the path of a file, or None for a mock pool.
        store: in place of the one the config names; whoever gives it closes it.
        strategies: ready-made ones by name, in place of the config's or beside them; ``auto/NAME`` asks them.

    Raises ConfigError, and what else the parts of the config raise when they are made.
    """

    def __init__(
        self,
        config: GatewayConfig | str | Path | None = None,
        store: Store | None = None,
        *,
        strategies: Mapping[str, Strategy] | None = None,
    ) -> None:
        if config is None:
            config = default_config()
        path = Path(config) if isinstance(config, str | Path) else None
        if isinstance(config, str | Path):
            config = load_config(config)
        with told_where(path):
            self._make(config, strategies, store)
        super().__init__()

    def _make(self, config: GatewayConfig, strategies: Mapping[str, Strategy] | None, store: Store | None) -> None:
        self.metrics, self.rates, self.senders = Metrics(), RateLimits(), InFlight(self._places)
        self.shared = None if config.shared is None else Shared(config.shared, self.metrics)
        self.admission = Admission(self.rates, self.senders, None if self.shared is None else self.shared.counts)
        self.ahead, self.unsettled, self._tasks, self.turns = Ahead(), Unsettled(), Tasks(), Turns(_READERS)
        self._strategies = strategies
        self.runtime = self._made(config, None)
        self.caches = self._made_caches()
        self.admin_key = None if config.admin.key is None else config.admin.key.reveal()
        self.recent: deque[Seen] = deque(maxlen=200)
        self.began_s = time.time()
        self._given, self._store = store is not None, store
        self._reloading = asyncio.Lock()
        self._learn()
        self.observers = Observers(self.metrics, config)
        self.webhooks = Webhooks(config.webhooks, lambda: self.store)
        self._overview = Overview(self._sources())
        self._keys = KeyAdmission(lambda: self.store, lambda: self.config, self.admission, self.metrics.refuse)
        self._log = RequestLog(self.recent, self.metrics, self.observers, self._overview, self.teaching)
        self._intake = Intake(
            runtime=lambda: self.runtime,
            services=self._services,
            metrics=self.metrics,
            admission=self.admission,
            spawn=self._tasks.spawn,
            keep=self.keep,
            on_refused=self._log.refused,
        )

    def _places(self) -> tuple[int, float]:
        return self.config.limits.in_flight, self.config.limits.key_share

    def _sources(self) -> Sources:
        """What the page's figures are read from."""
        return Sources(
            metrics=self.metrics,
            recent=self.recent,
            began_s=self.began_s,
            store=lambda: self.store,
            config=lambda: self.config,
            in_flight=lambda: self.in_flight,
            states=self.note_states,
        )

    def _learn(self) -> None:
        """Make what learns."""
        self._learning = learning = LearningServices(
            open_store=lambda: self.store,
            runtime_now=lambda: self.runtime,
            unsettled=self.unsettled,
            metrics=self.metrics,
        )
        self.teaching, self.kept = Teaching(learning), Kept(lambda: self.store)
        self.erasures = Erasures(learning, self.kept, self.teaching.waiting)
        self.errands = ErrandRounds(learning, self.teaching.key)
        self.shadow = Shadow(self, lambda config: Gateway(config, self.store))

    def _made(self, config: GatewayConfig, previous: Runtime | None) -> Runtime:
        ready = self._strategies or {}
        for name, one in ready.items():
            if not isinstance(one, Strategy):
                what = (
                    f"the class {one.__name__}: make one, {one.__name__}(...)" if isinstance(one, type) else shown(one)
                )
                raise InputError(f"strategies has {name!r}, which is no strategy but {what}")
        own = {name: StrategyConfig(use=one.name) for name, one in ready.items() if name not in config.strategies}
        if own:
            config = config.replace(strategies={**config.strategies, **own})
        made = Runtime(config, self._bypassed, ready, previous, self.metrics.of)
        if self.shared is not None:
            made.dispatcher.on_change = self.shared.breakers.changed
            made.dispatcher.rooms = self.shared.rooms
            made.mark = answer_mark(config, ready)
        return made

    def _made_caches(self, previous: Caches | None = None) -> Caches:
        runtime, shared = self.runtime, self.shared
        return Caches(
            runtime.config.cache,
            runtime.embedder,
            previous,
            shared=None if shared is None else shared.answers,
            meanings=None if shared is None else shared.meanings,
            mark=runtime.mark,
        )

    @property
    def in_flight(self) -> int:
        """Requests under way."""
        return self._intake.in_flight

    @property
    def config(self) -> GatewayConfig:
        """In use now."""
        return self.runtime.config

    @property
    def store(self) -> Store:
        """Open from `start` to `stop`."""
        if self._store is None:
            raise InputError("the gateway has not been started: await start(), or use it as a context")
        return self._store

    @property
    def is_started(self) -> bool:  # noqa: D102
        return self._store is not None

    # From start to stop

    async def start(self, *, loads: bool = True) -> Self:
        """Open the store, and load the models that run in this process.

        Args:
            loads: False leaves the models to `load`; requests of others are answered meanwhile.

        Raises DataError if the store cannot be opened, ConfigError if a model cannot be loaded.
        """
        await self._open()
        if loads:
            try:
                await self.load()
            except BaseException:
                await self.stop()
                raise
        return self

    async def load(self) -> None:
        """See `start`."""
        async with self._reloading:
            await self.runtime.load()

    @property
    def is_loaded(self) -> bool:
        """The models that run in this process are there."""
        return self.runtime.is_loaded

    async def _open(self) -> None:
        if self._store is None:
            self._store = await in_thread(open_store, self.config.store)
        self.observers.start(self.config)
        if self.shared is not None:
            await self.shared.start()
            self._tasks.spawn(self.shared.watch(lambda: self.runtime.dispatcher, lambda of: self.caches.forget(of)))
        await self.teaching.start()
        await self.erasures.start()
        await self.kept.load(self.runtime.decider.lanes.values())
        self._tasks.spawn(prune_forever(self._store, lambda: self.config, self.erasures))
        self._tasks.spawn(self.webhooks.watch())
        await self.errands.start()
        self._tasks.spawn(learn_forever(self._learning, self.teaching, self.erasures, self.kept))
        self._tasks.spawn(self.errands.forever())
        self.shadow.follow()

    async def stop(self) -> None:
        """Close everything. Whoever serves sees to it that no request is under way.

        Calls that are read on for what they cost are given up, and charged the most that they may be billed.
        """
        await self.shadow.stop()
        await self._tasks.stop()
        if self._store is not None:
            await self.kept.save(self.runtime.decider.lanes.values(), is_last=True)
        await self.runtime.close()
        await self.teaching.close()
        if self._store is not None and not self._given:
            await self._store.close()
            self._store = None
        if self.shared is not None:
            await self.shared.close()
        await in_thread(self.observers.close)

    async def settled(self, request_id: str | None = None) -> None:
        """Wait until a request that has ended, or all such, have their rows in the ledger.

        At most ``lost.read_on_s`` after its end it has, at once where no call of it was given up.
        """
        await self.unsettled.wait(request_id)

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def reload(self, config: GatewayConfig) -> None:
        """Take a new config without dropping a request. If it cannot be used, nothing has changed.

        Models that run in this process are loaded before anything changes: the old ones answer until then, and are in memory until their
        last requests have ended. Raises ConfigError, and what its parts raise.
        """
        # Loading takes its time, in which another config may come, and what is known of deployments changes.
        async with self._reloading:
            with self._counted_reload():
                self._check_lasting(config)
                # Whatever a part of the config raises refuses the config, and ends nothing else.
                await plainly_awaited(lambda: self._taken(config))

    async def _taken(self, config: GatewayConfig) -> None:
        async with loaded(config):
            await self._reload(config)

    def _check_lasting(self, config: GatewayConfig) -> None:
        """Raises ConfigError for a change of what lasts as long as the gateway."""
        for name in ("store", "admin", "shared"):
            if getattr(config, name) != getattr(self.config, name):
                raise ConfigError(f"{name} cannot change while the gateway runs; start it anew")

    async def _reload(self, config: GatewayConfig) -> None:
        old = self.runtime
        await self.kept.save(old.decider.lanes.values(), at_once=True)
        new = await in_thread(self._made, config, old)
        try:
            await new.load()
            await self.kept.load(new.decider.news(old.decider))
            hooks = hooks_of(config.webhooks)
            self.observers.start(config)
        except BaseException:
            await new.dispatcher.release()
            raise
        self.webhooks.hooks = hooks
        new.decider.succeed(old.decider)
        self.runtime = new
        self.caches = self._made_caches(self.caches)
        await self.errands.start()
        self.shadow.follow()
        self._tasks.spawn(old.retire())

    @contextlib.contextmanager
    def _counted_reload(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            self.metrics.reloads.labels("refused").inc()
            raise
        self.metrics.reloads.labels("taken").inc()

    async def add_model(
        self, name: str, *, strategies: Sequence[str] = (), outcomes: "Recorded | None" = None
    ) -> "Joined":
        """Let a model of the config join the fitted routers that are served; `reload` makes them known. See `join_served`."""
        from anabranch.gateway.learning.joining import join_served

        return await join_served(self._learning, self.kept, name, strategies=strategies, outcomes=outcomes)

    def keep(self, task: asyncio.Task[Any]) -> None:
        """Have a task that somebody else waits for end before the gateway does."""
        self._tasks.keep(task)

    # Requests

    async def handle(
        self,
        endpoint: str,
        body: dict[str, Any],
        *,
        key: Key = None,
        headers: Mapping[str, str] | None = None,
        shown_as: str | None = None,
        collecting: Collecting | None = None,
        num_bytes: int = 0,
        native: Native | None = None,
        held: HeldBody | None = None,
    ) -> Reply:
        """Answer one request. Raises ApiError.

        Args:
            endpoint, body, headers, shown_as, collecting, num_bytes, native, held: see `Incoming`.
            key: of this gateway, or what is known of it already.
        """
        incoming = Incoming(
            endpoint=endpoint,
            body=body,
            headers=headers or {},
            shown_as=shown_as or "",
            collecting=collecting,
            num_bytes=num_bytes,
            native=native,
            held=held,
        )
        return await self._intake.take(incoming, key)

    async def authenticate(self, secret: str | None) -> KeyRecord | None:
        """The key a request came with; None where none is needed and none that is known was sent. Raises ApiError (401, 503)."""
        return await self._keys.authenticate(secret)

    def rates_left(self, record: KeyRecord | None) -> dict[str, Left]:
        """What is left of a key's requests and tokens a minute; of those of them that it has a limit of."""
        return self._keys.left(record)

    async def achat(
        self,
        body: dict[str, Any] | None = None,
        *,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        **fields: Any,
    ) -> Any:
        """``/v1/chat/completions``: the answer, or, with ``stream``, an async iterator of its chunks. Raises ApiError."""
        reply = await self.handle("chat", {**(body or {}), **fields}, key=key, headers=headers)
        if reply.stream is not None:
            return Chunks(reply.stream)
        assert reply.body is not None
        return json.loads(reply.body)

    async def aroute(self, body: dict[str, Any] | None = None, *, key: str | None = None, **fields: Any) -> Decision:
        """Where a request would go. Nothing is asked, reserved or kept, but by a strategy that asks models. Raises ApiError."""
        return await self.explain({**(body or {}), **fields}, await self.authenticate(key))

    async def explain(self, body: dict[str, Any], record: KeyRecord | None = None) -> Decision:
        """`aroute` for operators, who need no key."""
        with self.runtime.used() as runtime:
            incoming = Incoming(endpoint="chat", body=body, shown_as="route")
            return await RequestRun(self._services(), runtime, incoming).route(record)

    # What else there is to ask

    def models(self, record: KeyRecord | None = None) -> list[dict[str, Any]]:
        """Models, aliases and strategies, as ``/v1/models`` lists them; of models, those alone that the key may use."""
        return listings.listed_models(self.config, record, self.began_s)

    def model_facts(self, name: str, record: KeyRecord | None = None) -> dict[str, Any]:
        """One of `models`. Raises ApiError (404)."""
        return listings.listed_model(self.config, name, record, self.began_s)

    async def key_facts(self, record: KeyRecord) -> dict[str, Any]:
        """What a key may know of itself: its limits, its own budgets, and what it has spent. It counts as a request of the key."""
        await self._keys.admit(record)
        return await listings.key_facts(self.store, self.config, record, self.now_s())

    async def feedback(self, body: dict[str, Any], *, key: Key = None) -> dict[str, Any]:
        """Take a score, a thumb or a preference for an answer, one from each key that may give one: the store keeps it.

        It counts as a request of its key.

        Whether the strategy that chose learns from it is in the answer (``learned``) and up to `FeedbackConfig`. Raises ApiError.
        """
        record = key.record if isinstance(key, KnownKey) else await self.authenticate(key)
        await self._keys.admit(record)
        try:
            row, said, learned = await self.teaching.score(body, record)
        except CapacityError as error:
            raise unavailable(error) from None
        told: dict[str, Any] = {"object": "feedback", "request_id": row.request_id}
        if said.score is not None:
            self._overview.judged(row, said.score)
            told["score"] = said.score
        else:
            told["preferred"] = list(said.preferred or ())
        return {**told, "model": row.model, "learned": learned}

    def counted(
        self, record: KeyRecord | None, held: HeldBody | None = None
    ) -> contextlib.AbstractAsyncContextManager[None]:
        """What is answered here alone is a request of its key all the same, as long as the block lasts. Raises ApiError (429)."""
        return self._keys.counted(record, held)

    async def hold(self, record: KeyRecord | None, num_bytes: int | None) -> HeldBody:
        """Room for a body of this key that is to be read; see `KeyAdmission.hold`. Raises ApiError (429)."""
        return await self._keys.hold(record, num_bytes)

    def keeps_texts(self, body: Mapping[str, Any]) -> bool:
        """See `core.decision_log.keeps_texts`."""
        return keeps_texts(self.config, body)

    def _services(self) -> Services:
        """What a request is lent."""
        return Services(
            store=self.store,
            authenticate=self.authenticate,
            admission=self.admission,
            turns=self.turns,
            caches=self.caches,
            metrics=self.metrics,
            unsettled=self.unsettled,
            keep_task=self.keep,
            ahead=self.ahead,
            begin_trace=self.observers.begin_trace,
            on_finished=self._log.finished,
            on_priced=self._log.priced,
        )

    async def snapshot(self) -> Snapshot:
        """For the page."""
        return await self._overview.snapshot()

    def now_s(self) -> float:
        """Seconds since 1970."""
        return time.time()

    def metrics_text(self) -> bytes:
        """For Prometheus: of the gateway, and of each engine in this process, under the name of the first deployment that has it."""
        self.note_states()
        engines: dict[Callable[[], bytes], str] = {}
        for live in self.runtime.dispatcher.lives():
            if live.provider.series is not None:
                engines.setdefault(live.provider.series, live.name)
        return self.metrics.text() + labelled(told_by(engines), "deployment")

    def note_states(self) -> list[dict[str, Any]]:
        """How deployments are doing, noted in the metrics."""
        states = self.runtime.dispatcher.states()
        self.metrics.in_flight.set(self.in_flight)
        self.metrics.tasks.set(len(asyncio.all_tasks()))
        self.metrics.breakers({state["deployment"]: state["breaker"] == "open" for state in states})
        self.metrics.speeds({state["deployment"]: state["output_speed_exceeded"] for state in states})
        return states

    def _bypassed(self, strategy: str, why: str) -> None:
        self.metrics.bypassed.labels(strategy, why).inc()
