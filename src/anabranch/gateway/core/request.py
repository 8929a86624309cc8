"""One request from its key to its ledger row. `Gateway.handle` makes a `RequestRun` of it and runs it; nothing else here is public.

    authenticate, validate, count -> caches -> decide -> reserve -> dispatch -> stream or return -> settle -> observe

Whatever happens after a reservation, it is settled exactly once, and the request has exactly one row in the ledger.
Where a call that was given up is read on for what it costs, that is when this is known; nobody else waits for it.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from anabranch.errors import BudgetError, InputError, RateError, UnknownModelError
from anabranch.gateway.ab.assignment import Arm, arm_of, counted_user
from anabranch.gateway.asked import Asked, asked_of
from anabranch.gateway.cache import (
    LONGEST_NAME,
    Entry,
    ExactCache,
    Named,
    NameKey,
    OtherRequestError,
    Ticket,
    context_key,
    exact_key,
)
from anabranch.gateway.config import GatewayConfig, Target, find_target
from anabranch.gateway.core import settlement
from anabranch.gateway.core.bounds import Bounds
from anabranch.gateway.core.decision_log import Collecting, collected_of, explained, texts_of
from anabranch.gateway.core.failures import refusal_of
from anabranch.gateway.core.finished import Priced
from anabranch.gateway.core.ledger_row import call_rows, finished, priced, row_of
from anabranch.gateway.core.model_calls import ModelCalls
from anabranch.gateway.core.payable import payable
from anabranch.gateway.core.program_run import ProgramRun
from anabranch.gateway.core.purse import Hold, Purse
from anabranch.gateway.core.relay import Relay, Replayed, Sharing
from anabranch.gateway.core.reply import Reply
from anabranch.gateway.core.response_headers import headers_of
from anabranch.gateway.core.services import Services
from anabranch.gateway.decide import Decided
from anabranch.gateway.dispatch import Attempt, Plan, Report
from anabranch.gateway.media_requests import asked_of_media, check_media, count_media, is_media
from anabranch.gateway.metrics import StageClock
from anabranch.gateway.prompt_tokens import (
    PromptCount,
    asked_text,
    count_prompt,
    has_images,
)
from anabranch.gateway.providers.media import content_type
from anabranch.gateway.providers.provider import WRITES, Answer, Failure, Native, UpstreamError, UpstreamRequest
from anabranch.gateway.refusals import limited
from anabranch.gateway.store import COLLECT, OUR_TAGS, KeyRecord, LedgerRow, Reservation, subjects_of
from anabranch.gateway.validate import check_chat, check_completion, check_depth, check_embeddings
from anabranch.routers.contract.program import ProgramRequest
from anabranch.routers.contract.query import Candidate, Decision, Outcome, Pool, Query
from anabranch.routers.money import dollars, nano_dollars
from anabranch.web.answers import JSON
from anabranch.web.api_error import ApiError, wrong
from anabranch.web.ids import new_id
from anabranch.web.large_json import LARGE, shortened

if TYPE_CHECKING:
    from anabranch.gateway.runtime import Runtime

T = TypeVar("T")
logger = logging.getLogger(__name__)
SECRET_HEADERS = frozenset({"authorization", "x-api-key", "api-key", "cookie", "proxy-authorization"})
CLIENT_GONE = 499

# Of the body, what is no setting of a program's calls.
NOT_SETTINGS = frozenset({"model", "messages", "n", "best_of", "stream", "stream_options", "store", "metadata"})


class RequestRun:
    """One request. Attributes are what is known of it so far; see the methods for when."""

    def __init__(
        self,
        services: Services,
        runtime: "Runtime",
        endpoint: Any,
        body: dict[str, Any],
        headers: Mapping[str, str],
        shown_as: str,
        collecting: Collecting | None = None,
        num_bytes: int = 0,
        native: Native | None = None,
    ) -> None:
        self.services, self.runtime, self.endpoint, self.body = services, runtime, endpoint, body
        self.headers, self.shown_as, self.caches, self.collecting = headers, shown_as, services.caches, collecting
        # What it was made of, if it came in Anthropic's form.
        self.num_bytes, self.native = num_bytes, native
        self.trace = services.begin_trace(headers)
        self.clock = StageClock(services.metrics.staged)
        self.began, self.time_s, self.id = time.perf_counter(), time.time(), new_id()
        # Of the key; None if none is needed.
        self.record: KeyRecord | None = None
        self.user = ""
        self.tags: tuple[str, ...] = ()
        self.subjects: tuple[str, ...] = ()
        self.target = Target(model="")
        # Of an A/B test; None if it goes to none.
        self.arm: Arm | None = None
        self.label = ""
        self.count, self.asked = PromptCount(0, 0, True), Asked()
        self.query: Query | None = None
        # Of a whole answer, for the strategy and the store.
        self.answer_text: str | None = None
        self.finish_reason: str | None = None
        self.decided: Decided | None = None
        self.candidates: tuple[str, ...] = ()
        # Of its calls, once it is known how long it is.
        self.bounds: Bounds
        # Messages that the strategy sends to a model in place of the sender's.
        self.prepared: dict[str, Any] = {}
        # Both once it is known whose request it is; what models are asked that the strategy needs to decide.
        self.purse: Purse
        self.calls: ModelCalls
        # Where a program answers; None where it was passed over.
        self.program: ProgramRun | None = None
        # Of the call for the answer, its further attempts among it.
        self.hold = Hold()
        self.report: Report | None = None
        # Where the same request would find its answer.
        self.exact: tuple[ExactCache, bytes] | tuple[Named, NameKey] | None = None
        self.context: tuple[bytes, str] | None = None
        self.vector: Any = None
        self.ticket: Ticket[Entry] | None = None
        self.tpm: int | None = None
        self.hit: Entry | None = None
        self.dispatched: float | None = None
        self.is_over = self.is_counted = False

    async def run(self, secret: str | None) -> Reply:
        """From the key to the answer, or to the first token of a stream. Raises ApiError."""
        clock = self.clock
        try:
            clock.begin("key")
            self.record = await self.services.authenticate(secret)
            clock.begin("read")
            await self._apart(self._read)
            self._admit()
            self._assign()
            self._take_purse()
            try:
                reply = await self._answered()
            except BaseException as error:
                raise self._failed(error) from None
        finally:
            clock.end()
        if reply.stream is not None and not self.is_over:
            clock.begin("stream")
        return reply

    async def _answered(self) -> Reply:
        clock = self.clock
        clock.begin("cache")
        found = await self._look()
        if found is not None:
            return self._from_cache(*found)
        clock.begin("decide")
        await self._decide()
        clock.begin("call")
        reply = await self._run_program()
        if reply is not None:
            return reply
        # There was none.
        clock.stage = "reserve"
        await self._reserve()
        clock.begin("call")
        return await self._call()

    async def route(self, record: KeyRecord | None) -> Decision:
        """Only the decision; there is a row only if the strategy asked a model for it. Raises ApiError."""
        self.record, self.subjects = record, subjects_of(record)
        self._read()
        self._assign()
        self._take_purse()
        try:
            await self._decide()
        finally:
            if self.purse.is_empty:
                self.calls.close(lambda: None)
            else:
                self.end("ok", 200)
        assert self.decided is not None
        return self.decided.decision

    async def _apart(self, work: Callable[[], T]) -> T:
        """``work()``, in another thread where the body is so large that it would hold up all other requests."""
        return await asyncio.to_thread(work) if self.num_bytes > LARGE else work()

    def _short(self) -> dict[str, Any]:
        """The body, to be compared with others."""
        return shortened(self.body) if self.num_bytes > LARGE else self.body

    # What is asked

    def _read(self) -> None:
        """Check the body, and find out where it wants to go and how long it is."""
        body, limits = self.body, self.runtime.config.limits
        check_depth(body)
        if self.endpoint == "chat":
            check_chat(body, limits.most_tokens)
        elif self.endpoint == "completions":
            check_completion(body, limits.most_tokens)
        elif is_media(self.endpoint):
            check_media(self.endpoint, body)
        else:
            check_embeddings(body)
        try:
            self.target = find_target(self.runtime.config, body["model"])
        except UnknownModelError as error:
            raise ApiError(404, "model_not_found", str(error), param="model") from None
        except InputError as error:
            raise wrong("model", str(error)) from None
        self.label = _label(self.target)
        if is_media(self.endpoint):
            if self.target.model is None:
                raise wrong(
                    "model", f"{self.endpoint} need a model by its name; strategies choose among models of text"
                )
            self.count, self.asked = count_media(self.endpoint, body), asked_of_media(self.endpoint, body)
            return
        self.count = count_prompt(body, self.runtime.counters.get(self.target.model or ""))
        self.asked = asked_of(body if self.native is None else self.native.body)

    def _admit(self) -> None:
        """Whose it is, and whether they have asked too much of late."""
        record, limits = self.record, self.runtime.config.limits
        given = self.headers.get("x-tags", "")
        added = tuple(tag.strip() for tag in given.split(",") if tag.strip()) if given else ()
        named = self.body.get("user") or ""
        if self.collecting is not None:
            added = (COLLECT, *added)
        elif ours := OUR_TAGS.intersection(added):
            raise wrong("x-tags", f"the tag {min(ours)} is that of the gateway's own questions; take another")
        try:
            self.subjects = subjects_of(record, user=named, tags=added)
        except InputError as error:
            raise wrong("x-tags", str(error)) from None
        self.user = (record.user if record is not None else "") or named[:256]
        self.tags = (*(record.tags if record is not None else ()), *added)
        rpm, tpm, most = limits.rpm, limits.tpm, limits.max_in_flight
        if record is not None:
            rpm, tpm, most = record.rpm or rpm, record.tpm or tpm, record.max_in_flight or most
        try:
            self.services.senders.enter(self.tenant, most)
            self.is_counted = True
            if rpm is not None or tpm is not None:
                self.services.rates.admit(self.tenant, self.count.tokens, rpm=rpm, tpm=tpm)
        except RateError as error:
            raise limited(error) from None
        self.tpm = tpm

    def _take_purse(self) -> None:
        self.bounds = Bounds(self.endpoint, self.body, self.runtime, self.count, self.asked)
        # Nothing of this holds on to the request itself: it is gone as soon as it is over.
        services, limit = self.services, self.runtime.config.limits.request_usd
        id, subjects, named = self.id, self.subjects, {"requested": self.label, "strategy": self.strategy}
        self.purse = Purse(
            lambda nano: services.store.reserve(id, subjects, nano, **named),
            services.store.grow,
            None if limit is None else nano_dollars(limit),
            lambda: services.store.has_budget(subjects),
        )
        may_ask = None if self.record is None else self.record.allows
        self.calls = ModelCalls(
            self.runtime,
            self.purse,
            id,
            self.began,
            may_ask=may_ask,
            keep=services.keep_task,
            sender=self.sender,
            trace=self.trace,
        )

    def _assign(self) -> None:
        """The arm of an A/B test that it belongs to, if it goes to one: from here on it goes to the strategy of that arm."""
        test = self.target.test
        if test is None:
            return
        settings = self.runtime.config.ab[test]
        user = counted_user(settings, self.record, self.body.get("user") or "")
        self.arm = arm_of(test, settings, key=self.tenant, user=user)
        self.target = replace(self.target, strategy=self.arm.strategy)

    @property
    def deadline_s(self) -> float:
        """Seconds the request may take in all: those of the model it goes to first, where that says."""
        first = self.candidates[0] if self.candidates else self.target.model
        own = None if first is None else self.runtime.models[first].deadline_s
        return own or self.runtime.config.deadline_s

    @property
    def _form(self) -> str:
        """Of the answer that is kept: one in Anthropic's form has more in it than others may see."""
        return "" if self.native is None else f"#{self.native.form}:{self.native.digest}"

    @property
    def asked_for(self) -> str:
        """What answers are kept under: what the sender named, and the arm that it came to."""
        return (self.label if self.arm is None else f"{self.label}#{self.arm.side}") + self._form

    @property
    def strategy(self) -> str:
        """The strategy that chooses; "" if the sender named a model."""
        return self.target.strategy or ""

    @property
    def tenant(self) -> str:
        """Whose request it is; what is cached for one is never given to another."""
        return "" if self.record is None else self.record.id

    @property
    def sender(self) -> str:
        """Whose requests may fail together for a reason of their own: a team, or whoever has the key."""
        record = self.record
        return "" if record is None else record.team or record.user or record.id

    # Caches

    async def _look(self) -> tuple[Entry, str] | None:
        """An answer somebody got before, and which cache had it: ``exact``, ``shared`` (another request was under way) or ``semantic``."""
        found = await self._found()
        if found is not None and self.record is not None and not self.record.allows(found[0].model):
            # It may not use that model any more.
            found = None
        if found is None and (self.exact is not None or self.context is not None):
            self.services.metrics.cached("miss")
        return found

    async def _found(self) -> tuple[Entry, str] | None:
        caches, wish = self.caches, self._wish()
        name = self.headers.get("idempotency-key")
        if name:
            return await self._asked_by_name(caches.named, name)
        if is_media(self.endpoint):
            return None
        if wish == "deny" or (self.endpoint == "completions" and not isinstance(self.body.get("prompt"), str)):
            return None
        is_settled = self.endpoint == "embeddings" or self.body.get("temperature") == 0 or wish == "allow"
        if caches.exact is not None and is_settled:
            key = await self._apart(lambda: exact_key(self.endpoint, self.asked_for, self._short()))
            found = await self._asked_before(caches.exact, key)
            if found is not None:
                return found
        if caches.semantic is not None and self.endpoint == "chat":
            self.context = await self._apart(lambda: context_key(self.endpoint, self.asked_for, self.body))
            if self.context is not None:
                self.vector = await caches.embed(self.context[1])
                near = caches.semantic.get(self.tenant, self.context[0], self.vector)
                if near is not None:
                    return near[0], "semantic"
        return None

    async def _asked_by_name(self, named: Named, name: str) -> tuple[Entry, str] | None:
        """The answer to a request of this name; None, and the duty to fetch it, if there is none. Raises ApiError."""
        if len(name) > LONGEST_NAME:
            raise wrong(
                "Idempotency-Key", f"Idempotency-Key may have {LONGEST_NAME} characters; this has {len(name):,}"
            )
        mark = await self._apart(lambda: exact_key(self.endpoint, self.label + self._form, self._short()))
        self.exact = named, (name, mark)
        try:
            found = named.get(self.tenant, name, mark)
            if found is not None:
                return found, "exact"
            async with asyncio.timeout(self.deadline_s - self.elapsed()):
                joined = await named.claim(self.tenant, name, mark)
        except OtherRequestError as error:
            raise ApiError(422, "idempotency_key_reused", str(error), param="Idempotency-Key") from None
        except TimeoutError:
            message = f"the request named {name!r} is under way, and its answer did not come in time; send it again"
            raise ApiError(409, "idempotency_key_in_use", message, headers={"Retry-After": "1"}) from None
        if isinstance(joined, Ticket):
            self.ticket = joined
            return None
        return joined, "shared"

    async def _asked_before(self, cache: ExactCache, key: bytes) -> tuple[Entry, str] | None:
        """The answer to the same request, given before or under way; None, and the duty to fetch it, if there is none."""
        self.exact = cache, key
        entry = cache.get(self.tenant, key)
        if entry is not None:
            return entry, "exact"
        try:
            async with asyncio.timeout(self.deadline_s - self.elapsed()):
                joined = await self.caches.flights.join((self.tenant, key))
        except TimeoutError:
            message = "an identical request is under way, and its answer did not come in time"
            raise UpstreamError(Failure(kind="deadline", message=message)) from None
        if not isinstance(joined, Ticket):
            return joined, "shared"
        self.ticket = joined
        return None

    def _wish(self) -> str:
        """What the sender says about caches: ``x-cache: allow`` or ``deny``, or a ``cache-control`` that means the latter."""
        control = self.headers.get("cache-control", "")
        if "no-cache" in control or "no-store" in control:
            return "deny"
        return self.headers.get("x-cache", "").lower()

    # Where it goes

    async def _decide(self) -> None:
        """Candidates, best first: what the strategy says, or the model that was named and its fallbacks."""
        runtime = self.runtime
        if self.target.strategy is None:
            assert self.target.model is not None
            names = runtime.config.chain(self.target.model)
            candidates = tuple(Candidate(model=name, score=1 / (1 + at)) for at, name in enumerate(names))
            # With which chance the sender named it, nobody knows.
            decision = Decision(candidates=candidates, strategy="", reason="the sender named the model")
            self.decided = Decided(decision, "", Query(text=""))
            return
        is_chat, has_limit = self.endpoint == "chat", self.endpoint in WRITES
        messages = self.body["messages"] if is_chat else ()
        most = self.body.get("max_completion_tokens") or self.body.get("max_tokens") if has_limit else None
        headers = {name.lower(): value for name, value in self.headers.items() if name.lower() not in SECRET_HEADERS}
        query = Query(
            text=asked_text(self.endpoint, self.body), messages=messages, task=headers.get("x-task"), prompt_tokens=self.count.tokens,
            max_tokens=most, has_tools=bool(self.body.get("tools")),
            has_images=has_images(messages), headers=headers, tenant=self.tenant, user=self.user,
            knobs=self.target.knobs, vector_D=self.vector, request_id=self.id,
        )  # fmt: skip
        try:
            self.decided = decided = await runtime.decider.decide(self.target.strategy, query, self._pool(), self.calls)
        finally:
            # What a strategy leaves behind would hold money that the answer needs.
            await self.calls.stop()
        if not decided.bypassed:
            self.prepared = await runtime.decider.prepared(self.target.strategy, decided.query, decided.decision)
            self.bounds.prepared = self.prepared

    def _pool(self) -> Pool:
        """The models as they are, those that this request may not use marked as not available: what is never given was never drawn."""
        pool, record = self.runtime.dispatcher.pool(), self.record
        open_P = [record is None or record.allows(model.name) for model in pool.models]
        fits_P = [allowed and self._fits(model.name) for allowed, model in zip(open_P, pool.models, strict=True)]
        usable_P = fits_P if any(fits_P) else open_P
        if all(usable_P):
            return pool
        models = (
            model if usable else replace(model, is_available=False)
            for model, usable in zip(pool.models, usable_P, strict=True)
        )
        return Pool(tuple(models), pool.now_s)

    async def _reserve(self) -> None:
        """Set aside the most that the first candidate may cost; a strategy's candidates that no budget has room for are passed over."""
        assert self.decided is not None
        allowed = self._allowed(self.decided.decision.candidates)
        candidates = await payable(self.runtime, self.asked, allowed, self.purse.is_limited)
        refused: BudgetError | None = None
        for at, candidate in enumerate(candidates):
            try:
                self.hold = await self.purse.hold(self.bounds.worst_nano(candidate.model, self.report))
            except BudgetError as error:
                refused = refused or error
                if self.target.model is not None:
                    break
                continue
            self.candidates = tuple(one.model for one in candidates[at:])
            return
        assert refused is not None
        raise refused

    def _allowed(self, candidates: tuple[Candidate, ...]) -> tuple[Candidate, ...]:
        """Those that the key may use and that have room for the prompt. Raises ApiError if the key may use none."""
        if self.record is not None and self.record.models:
            named = self.target.model
            # Who names a model means it: another one, in its place, would be no fallback but a surprise.
            is_closed = named is not None and not self.record.allows(named)
            candidates = tuple(one for one in candidates if self.record.allows(one.model))
            if is_closed or not candidates:
                raise ApiError(
                    403, "model_not_allowed", f"this key may use {', '.join(self.record.models)}", param="model"
                )
        fitting = tuple(one for one in candidates if self._fits(one.model))
        return fitting or candidates

    def _fits(self, model: str) -> bool:
        context = self.runtime.models[model].context
        return context is None or self.count.tokens <= context

    async def _allow(self, model: str, spent_nano: int) -> bool:
        """Whether a further attempt may be paid for, asked before each one but the first; not while the store cannot write."""
        return await self.purse.can_raise(
            self.hold, spent_nano + self._open_nano() + self.bounds.worst_nano(model, self.report)
        )

    def _open_nano(self) -> int:
        """The most that attempts under way may cost: a hedge is paid beside the first."""
        attempts = () if self.report is None else self.report.attempts
        return sum(
            self.bounds.worst_nano(attempt.model, self.report) for attempt in attempts if attempt.status == "open"
        )

    # A program

    async def _run_program(self) -> Reply | None:
        """The answer of the program that was asked for; None if it was none, or failed before it said anything. Raises ApiError."""
        name, decided = self.target.strategy, self.decided
        program = None if name is None else self.runtime.decider.program(name)
        if program is None or name is None or decided is None:
            return None
        if self.endpoint != "chat" or (self.body.get("n") or 1) != 1:
            raise wrong("model", f"{self.label} is a program: it answers /v1/chat/completions, with one choice (n = 1)")
        if decided.bypassed:
            return None
        # As for a model that is named; each of its calls is looked at too, since it may ask others.
        await payable(self.runtime, self.asked, self._allowed(decided.decision.candidates), self.purse.is_limited)
        config, options = self.runtime.config, self.body.get("stream_options")
        # It has the time of the slowest model that it may ask.
        own = (self.runtime.models[one.model].deadline_s for one in decided.decision.candidates)
        most_s = max((seconds for seconds in own if seconds is not None), default=config.deadline_s)
        self.calls.deadline_s = self.calls.limit_s = max(most_s, config.deadline_s)
        self.calls.purpose, self.dispatched = "draft", self.elapsed()
        request = ProgramRequest(
            query=decided.query, pool=self._pool(), decision=decided.decision, is_streamed=bool(self.body.get("stream")),
            settings={field: value for field, value in self.body.items() if field not in NOT_SETTINGS},
        )  # fmt: skip
        running = ProgramRun(
            program, request, self.calls, id=self.id, left_s=self.calls.deadline_s - self.elapsed(),
            beat_s=self.runtime.dispatcher.rules.heartbeat_s,
            wants_usage=isinstance(options, dict) and bool(options.get("include_usage")),
        )  # fmt: skip
        try:
            await running.open()
            answer = None if request.is_streamed else await running.whole()
        except Exception as error:
            await running.aclose()
            await self.calls.stop()
            self.decided = replace(decided, bypassed=self.runtime.decider.bypass(name, error))
            return None
        except BaseException:
            await running.aclose()
            raise
        self.program, self.report = running, running.report
        if answer is None:
            return Reply(
                stream=Relay(running, self.streamed, self._sharing()), headers=headers_of(self, running.report)
            )
        await self.calls.stop()
        self._keep(answer)
        self._note(answer)
        self.end("ok", 200)
        return Reply(body=answer.data, headers=headers_of(self, running.report))

    # The call

    async def _call(self) -> Reply:
        assert self.decided is not None
        runtime, strategy = self.runtime, self.target.strategy
        judge = None if strategy is None else runtime.decider.acceptance(strategy, self.decided.query, self.calls)
        self.dispatched, self.calls.purpose = self.elapsed(), "judge"
        request = UpstreamRequest(
            self.endpoint,
            self.body,
            request_id=self.id,
            prompt_tokens=self.count.tokens,
            num_bytes=self.num_bytes,
            native=self.native,
        )
        keeps = request.stream and (
            self.ticket is not None or self.context is not None or self._keeps_texts or self._strategy_keeps
        )
        self.report = Report()
        plan = Plan(
            candidates=self.candidates, only_after=self._reserved_for(), report=self.report,
            deadline=runtime.dispatcher.now() + self.deadline_s - self.elapsed(),
            accept=None if judge is None else partial(self._accept, judge), allow=self._allow,
            most=lambda model: self.bounds.most(model, self.report), keep=keeps,
            sender=self.sender, trace=self.trace,
            requests={model: request.with_body(messages=list(messages)) for model, messages in self.prepared.items()},
            bounds={model: most for model in self.candidates if (most := self.bounds.bound(model)) is not None},
            late=self._come_late if self.is_named else None, mid_stream="restart" if self._may_restart else None,
        )  # fmt: skip
        if request.stream:
            stream = await runtime.dispatcher.stream(plan, request)
            return Reply(stream=Relay(stream, self.streamed, self._sharing()), headers=headers_of(self, stream.report))
        answer = await runtime.dispatcher.complete(plan, request)
        self._keep(answer)
        self._note(answer)
        self.end("ok", 200)
        return Reply(body=answer.data, headers=headers_of(self, answer.report), content_type=self._content_type)

    @property
    def _content_type(self) -> str:
        """Of a whole answer."""
        return content_type(self.endpoint, self.body) if is_media(self.endpoint) else JSON

    def _reserved_for(self) -> Mapping[str, frozenset[Any]]:
        """Candidates that are for prompts of a kind, unless this one is known to be of it."""
        named = self.target.model
        return {} if named is None else self.runtime.config.only_after(named, is_too_long=not self._fits(named))

    @property
    def is_named(self) -> bool:
        """It has the duty to fetch the answer for all requests of its name."""
        return self.ticket is not None and self.exact is not None and isinstance(self.exact[0], Named)

    @property
    def _may_restart(self) -> bool:
        """Whether a stream that breaks off may begin anew: the config lets it, and who reads it knows what that looks like."""
        is_theirs = self.shown_as == self.endpoint and self.headers.get("x-mid-stream", "").lower() == "restart"
        return is_theirs and self.runtime.config.mid_stream == "restart"

    def _sharing(self) -> Sharing | None:
        """Who else wants what a stream says: those who wait for the same, or who come back for it by its name."""
        ticket = self.ticket
        if ticket is None:
            return None
        return Sharing(
            to_the_end=self.is_named,
            is_awaited=lambda: ticket.num_waiting > 0,
            release=ticket.release if not self.is_named else lambda: None,
            keep=self.services.keep_task,
            ahead=self.services.ahead,
        )

    def _come_late(self, attempt: Attempt, answer: Answer) -> None:
        """The answer to a request with a name has come after it was given up."""
        if self.ticket is not None and self.ticket.is_open:
            self._share(answer, attempt.model, attempt.cost)

    async def _accept(self, judge: Callable[[str, Any], Awaitable[bool]], model: str, answer: Answer) -> bool:
        """Whether the strategy takes an answer. What the attempts so far did not need may be spent on asking about it."""
        assert self.report is not None
        self.purse.lower_to(self.hold, self.report.cost + self._open_nano())
        try:
            return await judge(model, answer)
        finally:
            await self.calls.stop()

    def elapsed(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self.began

    # The end

    def end(self, status: str, http_status: int, code: str = "", cache: str = "") -> None:
        """Settle, write the ledger's row, count, and let the strategy learn; once, whatever comes after."""
        if self.is_over:
            return
        self.is_over = True
        if self.ticket is not None:
            if self._is_read_on:
                # Who sends it again waits for that, and does not pay twice.
                self._last_report.when_known(self.ticket.abandon)
            else:
                self.ticket.abandon()
        latency_s = self.elapsed()
        self.services.unsettled.add(self.id)
        # What its strategy has left behind ends first: it costs something too.
        self.calls.close(lambda: self._settle(status, http_status, code, cache, latency_s))

    def _settle(self, status: str, http_status: int, code: str, cache: str, latency_s: float) -> None:
        report = self._last_report
        if self.program is not None and self.decided is not None:
            decision = self.decided.decision
            traced = replace(decision, details={**decision.details, "trace": self.program.trace})
            self.decided = replace(self.decided, decision=traced)
        row, outcome = row_of(self, report, latency_s, status, code, cache), self._outcome(report, status, latency_s)
        self.services.unsettled.add(self.id, row)
        self._correct_rate(report)
        self._log_decision(row, report)
        self.services.on_finished(finished(self, row, report, outcome, http_status))
        self._write(row, outcome)

    def _write(self, row: LedgerRow, outcome: Outcome | None) -> None:
        """Write the rows, once it is known what all calls cost. Until then what was set aside stays so."""
        services = self.services

        def write(held: Reservation | None) -> None:
            known, calls = priced(self, row), call_rows(self)
            clock = StageClock(services.metrics.staged)
            clock.begin("settle")
            done = settlement.write(services.store, held, known, collected_of(self, known), calls)
            done.add_done_callback(lambda _: clock.end())
            services.unsettled.discard(self.id)
            told = None if outcome is None else replace(outcome, cost=dollars(self._cost_nano))
            services.on_priced(Priced(row=known, calls=tuple(calls), outcome=told))

        settlement.settle(self.purse, [self._last_report, *(call.report for call in self.calls.made)], write)

    @property
    def _attempts(self) -> list[Attempt]:
        """At its answer. Of a program, its calls are that."""
        reports = [self._last_report] if self.program is None else [call.report for call in self.calls.made]
        return [attempt for report in reports for attempt in report.attempts]

    @property
    def _cost_nano(self) -> int:
        """Of its answer, as far as known."""
        return sum(attempt.cost for attempt in self._attempts)

    def _correct_rate(self, report: Report) -> None:
        """What may have been billed was not used for all that is known."""
        attempts = self._attempts
        if self.tpm is not None and attempts:
            used = sum(
                self.count.tokens + one.seen if one.is_guess else one.usage.prompt + one.usage.completion for one in attempts
            )  # fmt: skip
            self.services.rates.correct(self.tenant, used - self.count.tokens, tpm=self.tpm)

    def _log_decision(self, row: LedgerRow, report: Report) -> None:
        if self.decided is None:
            return
        store = self.services.store
        if self.runtime.config.log.decisions:
            store.append_decision(self.id, self.strategy, row.model, explained(self.decided, self._attempts, self.arm))
        if self._keeps_texts and report.model is not None:
            store.append_texts(self.id, texts_of(self))

    def _outcome(self, report: Report, status: str, latency_s: float) -> Outcome | None:
        """What the strategy that decided learns of it, but for the cost; None if there is nothing."""
        decided, attempts = self.decided, self._attempts
        if decided is None or not self.strategy or (report.model is None and not attempts):
            return None
        return Outcome(
            query=decided.query, model=report.model or attempts[-1].model, latency_s=latency_s, succeeded=status == "ok",
            decision=decided.decision,
            answer=self.answer_text or None if self._strategy_keeps and self.finish_reason == "stop" else None,
        )  # fmt: skip

    def streamed(self, stream: Any, is_cut: bool = False) -> None:
        """A stream has ended, or its reader has gone."""
        if self.is_over:
            return
        self.clock.end()
        report, failure = stream.report, stream.failure
        self.report = report
        if failure is not None:
            error = UpstreamError(failure, report)
            self._share_failure(UpstreamError(failure))
            self.end("error", error.status, code=error.to_dict()["error"]["code"])
        elif is_cut:
            self.end("cancelled", CLIENT_GONE)
        else:
            if self.ticket is not None or self.context is not None or self._strategy_keeps or self._keeps_texts:
                try:
                    answer: Answer = stream.answer()
                    self._keep(answer)
                    self._note(answer)
                except UpstreamError:
                    # It went out as it came, but nobody else shall have it.
                    logger.warning(
                        "request %s: the stream of %s is not kept, since it makes no answer", self.id, report.deployment
                    )
            self.end("ok", 200)

    @property
    def _strategy_keeps(self) -> bool:
        """Whether the strategy that decided may be told the answer: it wants it, and the sender did not forbid it (``store: false``)."""
        decided, name = self.decided, self.target.strategy
        if name is None or decided is None or decided.bypassed or self.endpoint != "chat":
            return False
        return self.body.get("store") is not False and self.runtime.decider.keeps_answers(name)

    @property
    def _keeps_texts(self) -> bool:
        """Whether the store may keep what was asked and answered. What is collected it keeps elsewhere, and no question anew."""
        return self.endpoint in WRITES and self.collecting is None and keeps_texts(self.runtime.config, self.body)

    def _note(self, answer: Answer) -> None:
        """Hold on to the text of an answer, for the strategy and the store."""
        if self._strategy_keeps or self._keeps_texts or self.collecting is not None:
            self.answer_text, self.finish_reason = answer.text, answer.finish_reason

    def _keep(self, answer: Answer) -> None:
        """Give the answer to those who wait for the same, and keep it for those who come later; only whole ones."""
        if self.exact is None and self.context is None:
            return
        is_kept_anyway = self.endpoint == "embeddings" or (self.is_named and not self.body.get("stream"))
        if not is_kept_anyway and not answer.is_whole:
            return
        self._share(answer, self._last_report.model or "", self._cost_nano)

    def _share(self, answer: Answer, model: str, nano: int) -> None:
        usage = answer.usage
        entry = Entry(
            body=answer.data,
            model=model,
            prompt_tokens=usage.prompt,
            completion_tokens=usage.completion,
            nano=nano,
        )
        self.caches.put(self.tenant, self.exact, self.context, self.vector, entry)
        if self.ticket is not None:
            self.ticket.land(entry)

    def _from_cache(self, entry: Entry, cache: str) -> Reply:
        """A kept answer, streamed if the sender wants that. It costs nothing."""
        self.services.metrics.cached(cache)
        self.hit = entry
        headers = {
            "x-request-id": self.id, "x-route-model": entry.model, "x-cache": cache, "x-overhead-ms": f"{self.elapsed() * 1e3:.3f}",
            "x-cost-usd": f"{0:.9f}",
        }  # fmt: skip
        reply = Reply(body=entry.body, headers=headers, content_type=self._content_type)
        if self.body.get("stream") and self.endpoint != "embeddings":
            options = self.body.get("stream_options")
            with_usage = isinstance(options, dict) and bool(options.get("include_usage"))
            reply = Reply(stream=Replayed.of(entry.body, self.endpoint, with_usage), headers=headers)
        # Nothing that can go wrong comes after this.
        self.end("ok", 200, cache=cache)
        return reply

    def _failed(self, error: BaseException) -> BaseException:
        """What the sender is told, once all is settled and counted."""
        if isinstance(error, UpstreamError):
            self.report = error.report or self.report
        refusal = refusal_of(error)
        if refusal is None:
            if isinstance(error, Exception):
                self._share_failure(error)
                self.end("error", 500, code="internal_error")
            else:
                # Cancelled: the client has gone.
                self.end("cancelled", CLIENT_GONE)
            return error
        if isinstance(error, UpstreamError):
            if self.report is not None:
                refusal.headers |= headers_of(self, self.report)
            # Without the report: they have asked nobody.
            self._share_failure(UpstreamError(error.failure))
        status = "error" if isinstance(error, UpstreamError) else "refused"
        self.end(status, refusal.status, code=refusal.code or "")
        refusal.headers.setdefault("x-request-id", self.id)
        return refusal

    def _share_failure(self, error: Exception) -> None:
        """Those who wait for the same answer fail too, unless it may still come, or this one only came too early to get it in time."""
        is_own = isinstance(error, UpstreamError) and error.failure.kind == "deadline"
        if self.ticket is not None and not self._is_read_on and not is_own:
            self.ticket.fail(error)

    @property
    def _last_report(self) -> Report:
        return self.report or Report()

    @property
    def _is_read_on(self) -> bool:
        """Its answer may come yet, for who asks by its name again."""
        return self.is_named and self._last_report.is_late


def keeps_texts(config: GatewayConfig, body: Mapping[str, Any]) -> bool:
    """Whether the store keeps what is asked and answered: the config lets it, and the sender does not forbid it (``store: false``)."""
    return config.log.prompts and body.get("store") is not False


def _label(target: Target) -> str:
    """What caches and the ledger call a target: knobs sorted."""
    if target.model is not None:
        return target.model
    knobs = "&".join(f"{name}={value}" for name, value in sorted(target.knobs.items()))
    return f"auto/{target.test or target.strategy}" + (f"?{knobs}" if knobs else "")
