"""One request from its key to its ledger row. `Gateway.handle` makes a `Life` of it and runs it; nothing else here is public.

    authenticate, validate, count -> caches -> decide -> reserve -> dispatch -> stream or return -> settle -> observe

Whatever happens after a reservation, it is settled exactly once, and the request has exactly one row in the ledger.
"""

import json
import logging
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from anabranch.errors import InputError, UnknownModelError
from anabranch.gateway.api_error import ApiError, wrong
from anabranch.gateway.cache import Entry, Ticket, context_key, exact_key
from anabranch.gateway.config import Target, find_target
from anabranch.gateway.count import PromptCount, count_prompt, has_images, last_text
from anabranch.gateway.decide import Decided
from anabranch.gateway.dispatch import Plan, Report
from anabranch.gateway.metrics import Ended
from anabranch.gateway.money import dollars
from anabranch.gateway.providers.provider import Answer, UpstreamError, UpstreamRequest
from anabranch.gateway.query import Candidate, Decision, Outcome, Query
from anabranch.gateway.reply import Reply, new_id
from anabranch.gateway.ui import Seen
from anabranch.gateway.validate import check_chat, check_completion, check_embeddings

if TYPE_CHECKING:
    from anabranch.gateway.gateway import Gateway
    from anabranch.gateway.runtime import Runtime

logger = logging.getLogger(__name__)
SECRET_HEADERS = frozenset({"authorization", "x-api-key", "api-key", "cookie", "proxy-authorization"})
CLIENT_GONE = 499


class Life:
    """One request. Attributes are what is known of it so far; see the methods for when."""

    def __init__(
        self,
        gateway: "Gateway",
        runtime: "Runtime",
        endpoint: Any,
        body: dict[str, Any],
        headers: Mapping[str, str],
        shown_as: str,
    ) -> None:
        self.gateway, self.runtime, self.endpoint, self.body = gateway, runtime, endpoint, body
        self.headers, self.shown_as = headers, shown_as
        self.began, self.time_s, self.id = time.perf_counter(), time.time(), new_id()
        self.record: Any = None  # of the key
        self.target = Target(model="")
        self.label = ""
        self.count = PromptCount(0, 0, True)
        self.query: Query | None = None
        self.decided: Decided | None = None
        self.reservation: Any = None
        self.report: Report | None = None
        self.exact_key: bytes | None = None
        self.context: tuple[bytes, str] | None = None
        self.vector: Any = None
        self.ticket: Ticket[Entry] | None = None
        self.is_over = False

    async def run(self, secret: str | None) -> Reply:
        """From the key to the answer, or to the first token of a stream. Raises ApiError."""
        self.record = await self.gateway.authenticate(secret)
        self._read()
        self.gateway.admit(self.record, self.count.tokens)
        try:
            found = await self._look()
            if found is not None:
                return self._from_cache(*found)
            await self._decide()
            await self._reserve()
            return await self._call()
        except BaseException as error:
            raise self._failed(error) from None

    # What is asked

    def _read(self) -> None:
        """Check the body, and find out where it wants to go and how long it is."""
        body, limits = self.body, self.runtime.config.limits
        if self.endpoint == "chat":
            check_chat(body, limits.most_tokens)
        elif self.endpoint == "completions":
            check_completion(body, limits.most_tokens)
        else:
            check_embeddings(body)
        try:
            self.target = find_target(self.runtime.config, body["model"])
        except UnknownModelError as error:
            raise ApiError(404, "model_not_found", str(error), param="model") from None
        except InputError as error:
            raise wrong("model", str(error)) from None
        self.label = _label(self.target)
        self.count = count_prompt(body, self.runtime.counters.get(self.target.model or ""))

    @property
    def strategy(self) -> str:
        """The strategy that chooses; "" if the sender named a model."""
        return self.target.strategy or ""

    @property
    def tenant(self) -> str:
        """Whose request it is; what is cached for one is never given to another."""
        return "" if self.record is None else self.record.id

    def most_tokens(self, model: str) -> int:
        """The most completion tokens this may cost at a model."""
        if self.endpoint == "embeddings":
            return 0
        asked = self.body.get("max_completion_tokens") or self.body.get("max_tokens")
        most = asked or self.runtime.models[model].max_tokens or self.runtime.config.limits.max_tokens
        return most * (self.body.get("n") or 1)

    def worst_nano(self, model: str) -> int:
        """The most nano-dollars that one call of a model may cost."""
        return self.runtime.models[model].price.cost(self.count.at_most, self.most_tokens(model))

    # Caches

    async def _look(self) -> tuple[Entry, str] | None:
        """An answer somebody got before, and which cache had it: ``exact``, ``shared`` (another request was under way) or ``semantic``."""
        caches, wish = self.gateway.caches, self._wish()
        if wish == "deny" or self.endpoint == "completions" and not isinstance(self.body.get("prompt"), str):
            return None
        is_settled = self.endpoint == "embeddings" or self.body.get("temperature") == 0 or wish == "allow"
        if caches.exact is not None and is_settled:
            self.exact_key = key = exact_key(self.endpoint, self.label, self.body)
            entry = caches.exact.get(self.tenant, key)
            if entry is not None:
                return entry, "exact"
            joined = await caches.flights.join((self.tenant, key))
            if not isinstance(joined, Ticket):
                return joined, "shared"
            self.ticket = joined
        if caches.semantic is not None and self.endpoint == "chat":
            self.context = context_key(self.endpoint, self.label, self.body)
            if self.context is not None:
                self.vector = await caches.embed(self.context[1])
                found = caches.semantic.get(self.tenant, self.context[0], self.vector)
                if found is not None:
                    return found[0], "semantic"
        if self.exact_key is not None or self.context is not None:
            self.gateway.metrics.cached("miss")
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
            names = (self.target.model, *runtime.config.fallbacks.get(self.target.model, ()))
            candidates = tuple(Candidate(model=name, score=-float(at)) for at, name in enumerate(names))
            decision = Decision(candidates=candidates, strategy="", reason="the sender named the model")
            self.decided = Decided(decision, "", Query(text=""))
            return
        messages = self.body.get("messages") or ()
        text = last_text(messages) if messages else _flat(self.body.get("prompt", self.body.get("input", "")))
        names = {name.lower(): value for name, value in self.headers.items() if name.lower() not in SECRET_HEADERS}
        query = Query(
            text=text, messages=messages, task=names.get("x-task"), prompt_tokens=self.count.tokens,
            max_tokens=self.body.get("max_completion_tokens") or self.body.get("max_tokens"), has_tools=bool(self.body.get("tools")),
            has_images=has_images(messages), headers=names, tenant=self.tenant, knobs=self.target.knobs, vector_D=self.vector,
        )  # fmt: skip
        self.decided = await runtime.decider.decide(self.target.strategy, query, runtime.dispatcher.pool())
