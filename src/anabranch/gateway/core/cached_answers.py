"""`CachedAnswers`: what one request has to do with answers that are kept, or are under way for somebody else.

It looks for its answer first. Where there is none it may be the one to fetch it for all who wait for the same, and then it owes them an
end: the answer, what it failed with, or that somebody else is to try.
"""

import asyncio
from functools import partial

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
from anabranch.gateway.core.beginning import apart
from anabranch.gateway.core.relay import Replayed, Sharing
from anabranch.gateway.core.reply import Reply
from anabranch.gateway.core.request_state import RequestState
from anabranch.gateway.core.response_headers import told_spare
from anabranch.gateway.dispatch import Attempt
from anabranch.gateway.media_requests import is_media
from anabranch.gateway.providers.provider import Answer, Failure, UpstreamError
from anabranch.web.api_error import ApiError, wrong
from anabranch.web.large_json import LARGE, is_long_to_read, shortened

# Seconds that an answer is kept at most which stands in for another one.
STOPGAP_S = 60.0


class CachedAnswers:
    """See the module.

    Attributes:
        is_named: it has the duty to fetch the answer for all requests of its name.

    Args:
        state: of the request. It is told where an answer would be kept (``is_cacheable``) and the vector of its text.
    """

    def __init__(self, state: RequestState) -> None:
        self._state, self._caches = state, state.services.caches
        # Where the same request would find its answer.
        self._exact: tuple[ExactCache, bytes] | tuple[Named, NameKey] | None = None
        self._context: tuple[bytes, str] | None = None
        self._ticket: Ticket[Entry] | None = None

    @property
    def is_named(self) -> bool:  # noqa: D102
        return self._ticket is not None and self._exact is not None and isinstance(self._exact[0], Named)

    @property
    def wants_streams(self) -> bool:
        """Whether somebody else may want what a stream says, as a whole."""
        return self._ticket is not None or self._context is not None

    # An answer that is there

    async def look(self) -> tuple[Entry, str] | None:
        """An answer somebody got before, and which cache had it: ``exact``, ``shared`` (another request was under way) or ``semantic``.

        None, and perhaps the duty to fetch it, if there is none. Raises ApiError, and what whoever fetched it failed with.
        """
        found = await self._found()
        self._state.is_cacheable = self._exact is not None or self._context is not None
        record = self._state.record
        if found is not None and record is not None and not record.allows(found[0].model):
            # It may not use that model any more.
            found = None
        if found is None and self._state.is_cacheable:
            self._state.services.metrics.cached("miss")
        return found

    async def _found(self) -> tuple[Entry, str] | None:
        state, caches, wish = self._state, self._caches, self._wish()
        name = state.headers.get("idempotency-key")
        if name:
            return await self._asked_by_name(caches.named, name)
        if is_media(state.endpoint):
            return None
        if wish == "deny" or (state.endpoint == "completions" and not isinstance(state.body.get("prompt"), str)):
            return None
        is_settled = state.endpoint == "embeddings" or state.body.get("temperature") == 0 or wish == "allow"
        if caches.exact is not None and is_settled:
            key = await apart(state, lambda: exact_key(state.endpoint, self._asked_for, self._short()))
            found = await self._asked_before(caches.exact, key)
            if found is not None:
                return found
        if caches.semantic is not None and state.endpoint == "chat":
            return await self._asked_alike()
        return None

    async def _asked_by_name(self, named: Named, name: str) -> tuple[Entry, str] | None:
        """The answer to a request of this name; None, and the duty to fetch it, if there is none. Raises ApiError."""
        state = self._state
        if len(name) > LONGEST_NAME:
            raise wrong(
                "Idempotency-Key", f"Idempotency-Key may have {LONGEST_NAME} characters; this has {len(name):,}"
            )
        mark = await apart(state, lambda: exact_key(state.endpoint, state.label + self._form, self._short()))
        self._exact = named, (name, mark)
        try:
            found = named.get(state.tenant, name, mark)
            if found is not None:
                return found, "exact"
            async with asyncio.timeout(state.deadline_s - state.elapsed()):
                joined = await named.claim(state.tenant, name, mark)
        except OtherRequestError as error:
            raise ApiError(422, "idempotency_key_reused", str(error), param="Idempotency-Key") from None
        except TimeoutError:
            message = f"the request named {name!r} is under way, and its answer did not come in time; send it again"
            raise ApiError(409, "idempotency_key_in_use", message, headers={"Retry-After": "1"}) from None
        if isinstance(joined, Ticket):
            self._ticket = joined
            return None
        return joined, "shared"

    async def _asked_before(self, cache: ExactCache, key: bytes) -> tuple[Entry, str] | None:
        """The answer to the same request, given before or under way; None, and the duty to fetch it, if there is none."""
        state = self._state
        self._exact = cache, key
        entry = cache.get(state.tenant, key)
        if entry is not None:
            return entry, "exact"
        try:
            async with asyncio.timeout(state.deadline_s - state.elapsed()):
                joined = await self._caches.flights.join((state.tenant, key))
        except TimeoutError:
            message = "an identical request is under way, and its answer did not come in time"
            raise UpstreamError(Failure(kind="deadline", message=message)) from None
        if not isinstance(joined, Ticket):
            return joined, "shared"
        self._ticket = joined
        entry = await self._caches.elsewhere(state.tenant, key)
        if entry is None:
            return None
        joined.land(entry)
        return entry, "exact"

    async def _asked_alike(self) -> tuple[Entry, str] | None:
        """The answer to a request that means the same."""
        state, caches = self._state, self._caches
        self._context = await apart(state, lambda: context_key(state.endpoint, self._asked_for, state.body))
        if self._context is None or caches.semantic is None:
            return None
        state.vector = await caches.embed(self._context[1], state.vectors)
        if state.vector is None:
            return None
        entry = await caches.alike(state.tenant, self._context[0], state.vector)
        return None if entry is None else (entry, "semantic")

    def _wish(self) -> str:
        """What the sender says about caches: ``x-cache: allow`` or ``deny``, or a ``cache-control`` that means the latter."""
        control = self._state.headers.get("cache-control", "")
        if "no-cache" in control or "no-store" in control:
            return "deny"
        return self._state.headers.get("x-cache", "").lower()

    def _short(self) -> dict[str, object]:
        """The body, to be compared with others."""
        body = self._state.body
        return shortened(body) if self._state.num_bytes > LARGE else body

    @property
    def _form(self) -> str:
        """Of the answer that is kept: one in Anthropic's form has more in it than others may see."""
        native = self._state.native
        return "" if native is None else f"#{native.form}:{native.digest}"

    @property
    def _asked_for(self) -> str:
        """What answers are kept under: what the sender named, and the arm that it came to."""
        label, arm = self._state.label, self._state.arm
        return (label if arm is None else f"{label}#{arm.side}") + self._form

    async def reply(self, entry: Entry, cache: str) -> Reply:
        """A kept answer, streamed if the sender wants that."""
        state = self._state
        headers = {
            "x-request-id": state.id,
            "x-route-model": entry.model,
            "x-cache": cache,
            "x-overhead-ms": f"{state.elapsed() * 1e3:.3f}",
            "x-cost-usd": f"{0:.9f}",
            **({"x-route-spare": entry.spare} if entry.spare else {}),
        }
        if not state.body.get("stream") or state.endpoint == "embeddings":
            return Reply(body=entry.body, headers=headers, content_type=state.content_type, kept=entry)
        options = state.body.get("stream_options")
        with_usage = isinstance(options, dict) and bool(options.get("include_usage"))
        asked, retold = (entry.body, state.endpoint, with_usage), self._caches.retold
        told = retold.known(*asked)
        if told is None:
            # Many may come at once: once it is one's turn another may have made them.
            make, is_long = partial(retold.told, *asked, Replayed.chunks_of), is_long_to_read([entry.body])
            told = await state.services.turns.run(state.tenant, make) if is_long else make()
        return Reply(stream=Replayed(told), headers=headers)

    # An answer that was fetched

    def keep(self, answer: Answer) -> None:
        """Give the answer to those who wait for the same, and keep it for those who come later; only whole ones.

        What stands in for another answer, for a reason that may pass, is kept for them until it may have passed, and as long as any for who
        comes back for it by its name.
        """
        if self._exact is None and self._context is None:
            return
        state = self._state
        is_kept_anyway = state.endpoint == "embeddings" or (self.is_named and not state.body.get("stream"))
        if not is_kept_anyway and not answer.is_whole:
            return
        report, decided = state.last_report, state.decided
        is_bypassed = decided is not None and bool(decided.bypassed) and not decided.lasts
        ttl_s = None
        if (report.is_stopgap or is_bypassed) and not self.is_named:
            # As long as the model that failed is left alone.
            ttl_s = min(STOPGAP_S, max(state.runtime.config.breaker.open_s, report.passes_s))
        self._share(answer, report.model or "", state.cost_nano, ttl_s=ttl_s)

    def come_late(self, attempt: Attempt, answer: Answer) -> None:
        """The answer to a request with a name has come after it was given up."""
        if self._ticket is not None and self._ticket.is_open:
            self._share(answer, attempt.model, attempt.cost)

    def _share(self, answer: Answer, model: str, nano: int, *, ttl_s: float | None = None) -> None:
        usage, program = answer.usage, self._state.program
        entry = Entry(
            body=answer.data,
            model=model,
            prompt_tokens=usage.prompt,
            completion_tokens=usage.completion,
            nano=nano,
            spare="" if program is None else told_spare(program.spare),
        )
        self._caches.put(self._state.tenant, self._exact, self._context, self._state.vector, entry, ttl_s)
        if self._ticket is not None:
            self._ticket.land(entry)

    def sharing(self) -> Sharing | None:
        """Who else wants what a stream says: those who wait for the same, or who come back for it by its name."""
        ticket, services = self._ticket, self._state.services
        if ticket is None:
            return None
        return Sharing(
            to_the_end=self.is_named,
            is_awaited=lambda: ticket.num_waiting > 0,
            release=ticket.release if not self.is_named else lambda: None,
            keep=services.keep_task,
            ahead=services.ahead,
        )

    # No answer

    def fail(self, error: Exception) -> None:
        """Those who wait for the same answer fail too, unless it may still come, or this one only came too early to get it in time."""
        is_own = isinstance(error, UpstreamError) and error.failure.kind == "deadline"
        if self._ticket is not None and not self._is_read_on and not is_own:
            self._ticket.fail(error)

    def end(self) -> None:
        """The request is over: whoever still waits for its answer tries for himself, at once or when it is known that none comes."""
        if self._ticket is None:
            return
        if self._is_read_on:
            # Who sends it again waits for that, and does not pay twice.
            self._state.last_report.when_known(self._ticket.abandon)
        else:
            self._ticket.abandon()

    @property
    def _is_read_on(self) -> bool:
        """Its answer may come yet, for who asks by its name again."""
        return self.is_named and self._state.last_report.is_late
