"""One request from its key to its ledger row. `Gateway.handle` makes a `RequestRun` of it and runs it; nothing else here is public.

    authenticate, validate, count -> caches -> decide -> reserve -> dispatch -> stream or return -> settle -> observe

The steps are in files of their own: `beginning`, `cached_answers`, `choice`, `program_answer` and `model_answer`, and `ending`. What they
find out is in the `RequestState`. Whatever happens after a reservation, it is settled exactly once, and the request has exactly one row
in the ledger. Where a call that was given up is read on for what it costs, that is when this is known; nobody else waits for it.
"""

import contextlib
import logging
from typing import TYPE_CHECKING, Any

from anabranch.gateway.core import beginning, choice, ending
from anabranch.gateway.core.cached_answers import CachedAnswers
from anabranch.gateway.core.failures import refusal_of
from anabranch.gateway.core.incoming import Incoming, Key, KnownKey
from anabranch.gateway.core.model_answer import ModelAnswer
from anabranch.gateway.core.program_answer import ask_program
from anabranch.gateway.core.relay import Relay
from anabranch.gateway.core.reply import Reply
from anabranch.gateway.core.request_state import RequestState
from anabranch.gateway.core.response_headers import headers_of
from anabranch.gateway.core.services import Services
from anabranch.gateway.providers.provider import Answer, UpstreamError
from anabranch.gateway.store import KeyRecord, subjects_of
from anabranch.routers.contract.query import Decision
from anabranch.web.large_json import HEAVY

if TYPE_CHECKING:
    from anabranch.gateway.runtime import Runtime

logger = logging.getLogger(__name__)
CLIENT_GONE = 499


class RequestRun:
    """One request.

    Attributes:
        state: what is known of it so far.

    Args: see `RequestState`.
    """

    def __init__(self, services: Services, runtime: "Runtime", incoming: Incoming) -> None:
        self.state = RequestState(services, runtime, incoming)
        self._cached = CachedAnswers(self.state)

    async def run(self, key: Key) -> Reply:
        """From the key to the answer, or to the first token of a stream. Raises ApiError."""
        state, clock = self.state, self.state.clock
        try:
            clock.begin("key")
            state.record = key.record if isinstance(key, KnownKey) else await state.services.authenticate(key)
            beginning.take_place(state)
            clock.begin("read")
            await beginning.read_in_turns(state)
            await beginning.name(state)
            await beginning.admit(state)
            beginning.assign(state)
            beginning.take_purse(state)
            try:
                reply = await self._answered()
            except BaseException as error:
                raise self._failed(error) from None
        finally:
            clock.end()
        if reply.stream is not None and not state.is_over:
            clock.begin("stream")
        return reply

    async def _answered(self) -> Reply:
        state, clock = self.state, self.state.clock
        clock.begin("cache")
        found = await self._cached.look()
        if found is not None:
            return await self._from_cache(*found)
        clock.begin("decide")
        await choice.decide(state)
        said = await ask_program(state)
        if said is None:
            clock.begin("reserve")
            asked = ModelAnswer(state, self._cached)
            await asked.reserve()
            clock.begin("call")
            said = await asked.ask()
        if isinstance(said, Answer):
            return self._whole(said)
        return Reply(
            stream=Relay(said, self.streamed, self._cached.sharing(), self.prepared, state.services.keep_task),
            headers=headers_of(state, said.report),
        )

    async def route(self, record: KeyRecord | None) -> Decision:
        """Only the decision; there is a row only if the strategy asked a model for it. Raises ApiError."""
        state = self.state
        state.record, state.subjects = record, subjects_of(record)
        beginning.read(state)
        beginning.assign(state)
        beginning.take_purse(state)
        try:
            await choice.decide(state)
        finally:
            if state.purse.is_empty:
                state.calls.close(lambda: None)
            else:
                self.end("ok", 200)
        assert state.decided is not None
        return state.decided.decision

    # The end

    def end(self, status: str, http_status: int, code: str = "", cache: str = "") -> None:
        """Settle, write the ledger's row, count, and let the strategy learn; once, whatever comes after."""
        state = self.state
        if state.is_over:
            return
        state.is_over = True
        self._cached.end()
        latency_s = state.elapsed()
        state.services.unsettled.add(state.id)
        # What its strategy has left behind ends first: it costs something too.
        state.calls.close(lambda: ending.conclude(state, status, http_status, code, cache, latency_s))

    def _whole(self, answer: Answer) -> Reply:
        """A whole answer that has come."""
        state = self.state
        self._cached.keep(answer)
        state.note(answer)
        self.end("ok", 200)
        headers = headers_of(state, answer.report)
        return Reply(body=answer.data, headers=headers, content_type=state.content_type)

    async def _from_cache(self, entry: Any, cache: str) -> Reply:
        """A kept answer. It costs nothing."""
        self.state.services.metrics.cached(cache)
        self.state.hit = entry
        reply = await self._cached.reply(entry, cache)
        # Nothing that can go wrong comes after this.
        self.end("ok", 200, cache=cache)
        return reply

    @property
    def _keeps_streams(self) -> bool:
        return self._cached.wants_streams or self.state.strategy_keeps or self.state.keeps_texts

    async def prepared(self, stream: Any) -> None:
        """Put the answer of a long stream together, and write it down, beside the event loop: `streamed` finds it there."""
        if stream.failure is not None or stream.num_kept <= HEAVY or not self._keeps_streams:
            return
        # What makes no answer is told of where it is asked for.
        with contextlib.suppress(UpstreamError):
            await self.state.services.turns.run(self.state.tenant, lambda: stream.answer().data)

    def streamed(self, stream: Any, is_cut: bool = False) -> None:
        """A stream has ended, or its reader has gone."""
        try:
            self._streamed(stream, is_cut)
        finally:
            stream.forget()

    def _streamed(self, stream: Any, is_cut: bool) -> None:
        state = self.state
        if state.is_over:
            return
        state.clock.end()
        report, failure = stream.report, stream.failure
        state.report = report
        if failure is not None:
            error = UpstreamError(failure, report)
            self._cached.fail(UpstreamError(failure))
            self.end("error", error.status, code=error.to_dict()["error"]["code"])
        elif is_cut:
            self.end("cancelled", CLIENT_GONE)
        else:
            if self._keeps_streams:
                try:
                    answer: Answer = stream.answer()
                    self._cached.keep(answer)
                    state.note(answer)
                except UpstreamError as error:
                    # It went out as it came, but nobody else shall have it.
                    logger.warning("request %s: the stream of %s is not kept: %s", state.id, report.deployment, error)
            self.end("ok", 200)

    def _failed(self, error: BaseException) -> BaseException:
        """What the sender is told, once all is settled and counted."""
        state = self.state
        if isinstance(error, UpstreamError):
            state.report = error.report or state.report
        refusal = refusal_of(error)
        if refusal is None:
            if isinstance(error, Exception):
                self._cached.fail(error)
                self.end("error", 500, code="internal_error")
            else:
                # Cancelled: the client has gone.
                self.end("cancelled", CLIENT_GONE)
            return error
        if isinstance(error, UpstreamError):
            if state.report is not None:
                refusal.headers |= headers_of(state, state.report)
            # Without the report: they have asked nobody.
            self._cached.fail(UpstreamError(error.failure))
        status = "error" if isinstance(error, UpstreamError) else "refused"
        self.end(status, refusal.status, code=refusal.code or "")
        refusal.headers.setdefault("x-request-id", state.id)
        return refusal
