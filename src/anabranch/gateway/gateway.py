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
import logging
import time
from collections import deque
from collections.abc import Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

from anabranch.errors import AnabranchError, CapacityError, ConfigError, InputError, RateError
from anabranch.gateway.caches import Caches
from anabranch.gateway.config import GatewayConfig, default_config, load_config, names_of
from anabranch.gateway.core.decision_log import Collecting, keeps_texts
from anabranch.gateway.core.finished import Finished, Priced
from anabranch.gateway.core.in_flight import InFlight
from anabranch.gateway.core.relay import Ahead, Chunks
from anabranch.gateway.core.reply import Reply
from anabranch.gateway.core.request import CLIENT_GONE, RequestRun
from anabranch.gateway.core.services import Services
from anabranch.gateway.core.unsettled import Unsettled
from anabranch.gateway.learning.erasures import Erasures
from anabranch.gateway.learning.errands import ErrandRounds
from anabranch.gateway.learning.kept import EVERY_S, Kept
from anabranch.gateway.learning.services import LearningServices
from anabranch.gateway.learning.teaching import Teaching
from anabranch.gateway.metrics import Ended, Metrics
from anabranch.gateway.observe.observers import Observers
from anabranch.gateway.observe.webhooks import Webhooks, hooks_of
from anabranch.gateway.overview import Overview
from anabranch.gateway.providers.provider import Native
from anabranch.gateway.refusals import limited, unavailable
from anabranch.gateway.runtime import Runtime
from anabranch.gateway.store import KeyRecord, RateLimits, Store, open_store
from anabranch.gateway.store.queries import spent_by_key
from anabranch.gateway.sync_gateway import SyncGateway
from anabranch.gateway.ui import Seen, Snapshot
from anabranch.gateway.ui.seen import seen_of, with_price
from anabranch.routers.contract.query import Decision
from anabranch.routers.contract.strategy import Strategy
from anabranch.routers.money import dollars
from anabranch.web.api_error import ApiError

logger = logging.getLogger(__name__)
T = TypeVar("T")

PRUNE_S = 3600.0
DAY_S = 86_400.0
MONTH_S = 30 * DAY_S


class Gateway(SyncGateway):
    """One gateway. Its async methods belong to one event loop; its plain ones may be called from anywhere else.

    Args:
        config: a config, the path of a file, or None for a mock pool.
        store: in place of the one the config names; whoever gives it closes it.
        strategies: ready-made ones in place of the config's, by name.

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
        elif isinstance(config, str | Path):
            config = load_config(Path(config))
        self.metrics, self.rates, self.senders = Metrics(), RateLimits(), InFlight()
        self.ahead = Ahead()
        self._strategies = strategies
        self.runtime = self._made(config, None)
        self.caches = Caches(config.cache, self.runtime.embedder)
        self.admin_key = None if config.admin.key is None else config.admin.key.reveal()
        self.recent: deque[Seen] = deque(maxlen=200)
        self.began_s, self.in_flight = time.time(), 0
        self.unsettled = Unsettled()
        self._given, self._store = store is not None, store
        learning = LearningServices(
            open_store=lambda: self.store,
            runtime_now=lambda: self.runtime,
            unsettled=self.unsettled,
            metrics=self.metrics,
        )
        self.teaching, self.kept = Teaching(learning), Kept(lambda: self.store)
        self.erasures = Erasures(learning, self.kept, self.teaching.waiting)
        self.errands = ErrandRounds(learning, self.teaching.key)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._overview = Overview(self)
        self.observers = Observers(self.metrics, config)
        self.webhooks = Webhooks(config.webhooks, lambda: self.store)
        super().__init__()

    def _made(self, config: GatewayConfig, previous: Runtime | None) -> Runtime:
        return Runtime(config, self._bypassed, self._strategies, previous, self.metrics.of)

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

    async def start(self) -> Self:
        """Open the store. Raises DataError if it cannot be."""
        if self._store is None:
            self._store = await asyncio.to_thread(open_store, self.config.store)
        self.observers.start(self.config)
        await self.teaching.start()
        await self.erasures.start()
        await self.kept.load(self.runtime.decider.lanes.values())
        self._spawn(self._prune())
        self._spawn(self.webhooks.watch())
        await self.errands.start()
        self._spawn(self._learn_on())
        self._spawn(self.errands.forever())
        return self

    async def stop(self) -> None:
        """Close everything. Whoever serves sees to it that no request is under way.

        Calls that are read on for what they cost are given up, and charged the most that they may be billed.
        """
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._store is not None:
            await self.kept.save(self.runtime.decider.lanes.values(), is_last=True)
        await self.runtime.close()
        await self.teaching.close()
        if self._store is not None and not self._given:
            await self._store.close()
            self._store = None
        await asyncio.to_thread(self.observers.close)

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

        Raises ConfigError, and what its parts raise.
        """
        try:
            for name in ("store", "admin"):
                if getattr(config, name) != getattr(self.config, name):
                    raise ConfigError(f"{name} cannot change while the gateway runs; start it anew")
            old = self.runtime
            await self.kept.save(old.decider.lanes.values(), at_once=True)
            new = await asyncio.to_thread(self._made, config, old)
            await self.kept.load(new.decider.news(old.decider))
            hooks = hooks_of(config.webhooks)
            self.observers.start(config)
        except Exception:
            self.metrics.reloads.labels("refused").inc()
            raise
        self.webhooks.hooks = hooks
        new.decider.succeed(old.decider)
        self.runtime, self.caches = new, Caches(config.cache, new.embedder, self.caches)
        await self.errands.start()
        self.metrics.reloads.labels("taken").inc()
        self._spawn(old.retire())

    async def _prune(self) -> None:
        """Delete what is older than the config wants it kept."""
        while True:
            days = self.config.log.keep_days
            if days is not None:
                try:
                    # First where they are at work, or they would be written again.
                    await self.erasures.expire(time.time() - days * DAY_S)
                    count = await self.store.prune(time.time() - days * DAY_S)
                    logger.info("deleted %d rows older than %d days", count, days)
                except CapacityError as error:
                    logger.warning("rows older than %d days are deleted later: %s", days, error)
            await asyncio.sleep(PRUNE_S)

    async def _learn_on(self) -> None:
        """Keep what strategies learn, and learn from what other processes on the store were told, or told to forget."""
        while True:
            await asyncio.sleep(EVERY_S)
            try:
                await self.teaching.read_keys()
                await self.teaching.catch_up()
                await self.erasures.catch_up()
            except AnabranchError as error:
                logger.warning("scores that other processes were sent cannot be read: %s", error)
            await self.kept.save(self.runtime.decider.lanes.values())

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def keep(self, task: asyncio.Task[Any]) -> None:
        """Have a task that somebody else waits for end before the gateway does."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("a task of the gateway failed: %s", type(error).__name__, exc_info=error)

    # Requests

    async def handle(
        self,
        endpoint: str,
        body: dict[str, Any],
        *,
        key: str | None = None,
        headers: Mapping[str, str] | None = None,
        shown_as: str | None = None,
        collecting: Collecting | None = None,
        num_bytes: int = 0,
        native: Native | None = None,
    ) -> Reply:
        """Answer one request. Raises ApiError.

        Args:
            endpoint: ``chat``, ``completions`` or ``embeddings``.
            body: as OpenAI's endpoint takes it.
            key: of this gateway.
            headers: of the request; names in lower case, or a mapping that does not mind.
            shown_as: what metrics call the endpoint, if not by its name.
            collecting: what it is collected for; None for a request of a user.
            num_bytes: of the body as it came, if that is known; a large one is read, counted and sent in other threads.
            native: what ``body`` was made of, if that came in Anthropic's form.
        """
        if self.in_flight >= self.config.limits.in_flight:
            self.metrics.refuse("too_many")
            message = f"{self.in_flight:,} requests are under way, which is the limit; try again"
            raise ApiError(429, "rate_limit_exceeded", message, type="requests", headers={"Retry-After": "1"})
        runtime = self.runtime
        run = RequestRun(
            self._services(),
            runtime,
            endpoint,
            body,
            headers or {},
            shown_as or endpoint,
            collecting,
            num_bytes,
            native,
        )
        self.in_flight += 1
        runtime.users += 1
        if not run.state.headers.get("idempotency-key"):
            return await self._run(run, key)
        # One with a name goes on without its client, who comes back for the answer.
        task = asyncio.ensure_future(self._run(run, key))
        self.keep(task)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(self._unread)
            raise

    def _unread(self, done: "asyncio.Task[Reply]") -> None:
        """The client has gone before there was a reply."""
        if done.cancelled() or done.exception() is not None:
            return
        stream = done.result().stream
        if stream is not None:
            self._spawn(stream.aclose())  # type: ignore[attr-defined]

    async def _run(self, run: RequestRun, key: str | None) -> Reply:
        try:
            reply = await run.run(key)
        except BaseException as error:
            self._leave(run)
            if not run.state.is_over:
                self._refused(run, error)
            if isinstance(error, ApiError):
                error.headers.setdefault("x-request-id", run.state.id)
                # Codes of upstreams are theirs to choose.
                if run.state.report is None:
                    self.metrics.refuse(error.code if error.status < 500 else "failed")
            raise
        if reply.stream is None:
            self._leave(run)
        else:
            reply.stream.on_close = lambda: self._leave(run)  # type: ignore[attr-defined]
        return reply

    def _refused(self, run: RequestRun, error: BaseException) -> None:
        """It has no row in the ledger: nobody knows whose it is, or what it asks."""
        if isinstance(error, ApiError):
            status, code = error.status, error.code or ""
        else:
            status, code = 500 if isinstance(error, Exception) else CLIENT_GONE, ""
        self.observers.refused(
            run.state.shown_as,
            status,
            code=code,
            id=run.state.id,
            key_id=run.state.tenant,
            trace=run.state.trace,
            time_s=run.state.time_s,
            latency_s=run.state.elapsed(),
        )

    def _leave(self, run: RequestRun) -> None:
        self.in_flight -= 1
        run.state.runtime.release()
        if run.state.is_counted:
            self.senders.leave(run.state.tenant)

    async def authenticate(self, secret: str | None) -> KeyRecord | None:
        """The key a request came with; None where none is needed and none that is known was sent. Raises ApiError (401, 503)."""
        try:
            record = await self.store.key_of(secret) if secret else None
            # A key that is wrong, or has ended, opens no more than none does, and is hardly meant.
            is_wrong = record is None and bool(secret) and await self.store.has_keys()
        except CapacityError as error:
            raise unavailable(error) from None
        if is_wrong or (record is None and self.config.require_key):
            what = "is not known, or not valid any more" if secret else "is missing"
            message = f"the key {what}; send Authorization: Bearer KEY (anabranch gateway keys create makes one)"
            raise ApiError(401, "invalid_api_key", message, headers={"WWW-Authenticate": "Bearer"})
        return record

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
            return await RequestRun(self._services(), runtime, "chat", body, {}, "route").route(record)

    # What else there is to ask

    def models(self, record: KeyRecord | None = None) -> list[dict[str, Any]]:
        """Models, aliases and strategies, as ``/v1/models`` lists them; of models, those alone that the key may use."""
        return [self._fact(name) for name in self._names(record)]

    def model_facts(self, name: str, record: KeyRecord | None = None) -> dict[str, Any]:
        """One of `models`. Raises ApiError (404)."""
        known = self._names(record)
        if name not in known:
            from anabranch.gateway.config.suggestions import hint

            message = f"there is no model {name[:80]!r}; {hint(name[:200], known)}"
            raise ApiError(404, "model_not_found", message, param="model")
        return self._fact(name)

    def _names(self, record: KeyRecord | None) -> list[str]:
        closed = {
            name
            for model in self.config.models
            if record is not None and not record.allows(model.name)
            for name in (model.name, *model.aliases)
        }
        return [name for name in names_of(self.config) if name not in closed]

    async def key_facts(self, record: KeyRecord) -> dict[str, Any]:
        """What a key may know of itself: its limits, its own budgets, and what it has spent. It counts as a request of the key."""
        self._admit_feedback(record)
        since_us = int((self.now_s() - MONTH_S) * 1e6)
        budgets = [one for one in await self.store.budgets() if one.subject == f"key:{record.id}"]
        count, nano = await self.store.look(lambda connection: spent_by_key(connection, record.id, since_us))
        limits = self.config.limits
        return {
            "object": "key", "id": record.id, "name": record.name, "user": record.user, "team": record.team, "tags": list(record.tags),
            "models": list(record.models), "rpm": record.rpm or limits.rpm, "tpm": record.tpm or limits.tpm,
            "max_in_flight": record.max_in_flight or limits.max_in_flight,
            "expires_s": None if record.expires_us is None else record.expires_us / 1e6,
            "last_30_days": {"requests": count, "spent_usd": dollars(nano)},
            "budgets": [
                {
                    "period": one.period, "limit_usd": dollars(one.limit_nano), "spent_usd": dollars(one.spent_nano),
                    "reserved_usd": dollars(one.reserved_nano), "remaining_usd": dollars(one.remaining_nano),
                    "resets_s": None if one.resets_us is None else one.resets_us / 1e6,
                }
                for one in budgets
            ],
        }  # fmt: skip

    def _fact(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": int(self.began_s), "owned_by": "anabranch"}

    async def feedback(self, body: dict[str, Any], *, key: str | None = None) -> dict[str, Any]:
        """Take a score for an answer, one from each key that may give one: the store keeps it. It counts as a request of its key.

        Whether the strategy that chose learns from it is in the answer (``learned``) and up to `FeedbackConfig`. Raises ApiError.
        """
        record = await self.authenticate(key)
        self._admit_feedback(record)
        try:
            row, score, learned = await self.teaching.score(body, record)
        except CapacityError as error:
            raise unavailable(error) from None
        self._overview.judged(row, score)
        return {
            "object": "feedback", "request_id": row.request_id, "score": score, "model": row.model, "learned": learned
        }  # fmt: skip

    def _admit_feedback(self, record: KeyRecord | None) -> None:
        tenant, rpm = ("", None) if record is None else (record.id, record.rpm)
        try:
            self.rates.admit(tenant, 0, rpm=rpm or self.config.limits.rpm, tpm=None)
        except RateError as error:
            raise limited(error) from None

    @contextlib.contextmanager
    def counted(self, record: KeyRecord | None) -> Iterator[None]:
        """What is answered here alone is a request of its key all the same, as long as the block lasts. Raises ApiError (429)."""
        tenant, most = ("", None) if record is None else (record.id, record.max_in_flight)
        try:
            self.senders.enter(tenant, most or self.config.limits.max_in_flight)
        except RateError as error:
            raise limited(error) from None
        try:
            self._admit_feedback(record)
            yield
        finally:
            self.senders.leave(tenant)

    def keeps_texts(self, body: Mapping[str, Any]) -> bool:
        """See `core.decision_log.keeps_texts`."""
        return keeps_texts(self.config, body)

    def _services(self) -> Services:
        """What a request is lent."""
        return Services(
            store=self.store,
            authenticate=self.authenticate,
            rates=self.rates,
            senders=self.senders,
            caches=self.caches,
            metrics=self.metrics,
            unsettled=self.unsettled,
            keep_task=self.keep,
            ahead=self.ahead,
            begin_trace=self.observers.begin_trace,
            on_finished=self._finished,
            on_priced=self._priced,
        )

    def _finished(self, done: Finished) -> None:
        """A request is over: count it, show it, and remember it for whoever scores it."""
        row, metrics = done.row, self.metrics
        metrics.ended(
            Ended(
                endpoint=done.endpoint, model=row.model, strategy=row.strategy, status=done.http_status, cache=row.cache,
                latency_s=done.latency_s, ttft_s=done.first_s, overhead_s=done.overhead_s,
            )
        )  # fmt: skip
        for call in done.calls:
            metrics.called(call)
        for attempt in (*done.attempts, *done.asked_attempts):
            metrics.attempted(attempt.deployment, attempt.status)
        self.recent.append(seen_of(done))
        self.observers.finished(done)
        if done.outcome is not None:
            self.teaching.ended(row.strategy, row, done.outcome)

    def _priced(self, priced: Priced) -> None:
        """It is known what a request cost: that is what is counted, shown, and learned from."""
        row = priced.row
        for one in (row, *priced.calls):
            self.metrics.priced(one)
        self.observers.priced(priced)
        for at in range(len(self.recent) - 1, -1, -1):
            if self.recent[at].request_id == row.request_id:
                self.recent[at] = seen = with_price(self.recent[at], priced)
                self._overview.ended(seen)
                break
        if priced.outcome is not None:
            self.teaching.priced(row.strategy, row, priced.outcome)

    async def snapshot(self) -> Snapshot:
        """For the page."""
        return await self._overview.snapshot()

    def now_s(self) -> float:
        """Seconds since 1970."""
        return time.time()

    def metrics_text(self) -> bytes:
        """For Prometheus."""
        self.note_states()
        return self.metrics.text()

    def note_states(self) -> list[dict[str, Any]]:
        """How deployments are doing, noted in the metrics."""
        states = self.runtime.dispatcher.states()
        self.metrics.in_flight.set(self.in_flight)
        self.metrics.tasks.set(len(asyncio.all_tasks()))
        self.metrics.breakers({state["deployment"]: state["breaker"] == "open" for state in states})
        return states

    def _bypassed(self, strategy: str, why: str) -> None:
        self.metrics.bypassed.labels(strategy, why).inc()
