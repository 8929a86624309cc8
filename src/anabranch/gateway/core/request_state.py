"""`RequestState`: what is known of one request so far.

The steps of a request write it (`beginning`, `cached_answers`, `choice`, `model_answer`, `program_answer`); its row, its headers and
what is told of it at its end are read from it. It knows no step and no reader.
"""

import time
from functools import cached_property
from typing import TYPE_CHECKING, Any

from anabranch.gateway.ab.assignment import Arm
from anabranch.gateway.asked import Asked
from anabranch.gateway.cache import Entry
from anabranch.gateway.config import Target
from anabranch.gateway.core.bounds import Bounds
from anabranch.gateway.core.decision_log import keeps_texts
from anabranch.gateway.core.incoming import Incoming
from anabranch.gateway.core.model_calls import ModelCalls
from anabranch.gateway.core.program_run import ProgramRun
from anabranch.gateway.core.purse import Purse
from anabranch.gateway.core.services import Services
from anabranch.gateway.decide import Decided
from anabranch.gateway.dispatch import Attempt, Report
from anabranch.gateway.dispatch.senders import own_sender
from anabranch.gateway.made_vectors import MadeVectors
from anabranch.gateway.media_requests import is_media
from anabranch.gateway.metrics import StageClock
from anabranch.gateway.prompt_tokens import PromptCount
from anabranch.gateway.providers.media import content_type
from anabranch.gateway.providers.provider import WRITES, Answer
from anabranch.gateway.store import KeyRecord
from anabranch.web.answers import JSON
from anabranch.web.ids import new_id
from anabranch.web.large_json import HEAVY, LARGE, weight_of

if TYPE_CHECKING:
    from anabranch.gateway.runtime import Runtime

# So much a body weighs that a tokenizer takes a millisecond or two for.
TOKENIZED = 1 << 12


class RequestState:
    """See the module.

    Args:
        services: what the request is lent.
        runtime: of the config that it began on.
        incoming: the request as it came; its attributes are this one's too.
    """

    def __init__(self, services: Services, runtime: "Runtime", incoming: Incoming) -> None:
        self.services, self.runtime, self.endpoint, self.body = services, runtime, incoming.endpoint, incoming.body
        self.headers, self.shown_as = incoming.headers, incoming.shown_as or incoming.endpoint
        self.collecting, self.num_bytes, self.native = incoming.collecting, incoming.num_bytes, incoming.native
        self.held = incoming.held
        self.trace = services.begin_trace(self.headers)
        self.clock = StageClock(services.metrics.staged)
        self.began, self.time_s, self.id = time.perf_counter(), time.time(), new_id()
        # Of the key; None if none is needed.
        self.record: KeyRecord | None = None
        # As the books have it, and as the sender wrote it.
        self.user = self.named_user = ""
        self.tags: tuple[str, ...] = ()
        self.subjects: tuple[str, ...] = ()
        self.target = Target(model="")
        # Of an A/B test; None if it goes to none.
        self.arm: Arm | None = None
        self.label = ""
        self.count, self.asked = PromptCount(0, 0, True), Asked()
        # Of a chat that a strategy sends on.
        self.has_images = False
        # Of its rate, as the key or the config says; whether all processes count it; tokens it was told of, None for those of the prompt.
        self.tpm: int | None = None
        self.is_rate_shared = False
        self.num_rated: int | None = None
        # Both once it is known whose request it is; what models are asked that the strategy needs to decide.
        self.purse: Purse
        self.calls: ModelCalls
        # Of its calls, once it is known how long it is.
        self.bounds: Bounds
        # Of the text, by the embedder of the semantic cache, if that looked; and those that its strategies needed.
        self.vector: Any = None
        self.vectors = MadeVectors()
        # There is a place where the same request would find its answer.
        self.is_cacheable = False
        self.hit: Entry | None = None
        self.decided: Decided | None = None
        # Messages that the strategy sends to a model in place of the sender's.
        self.prepared: dict[str, Any] = {}
        self.candidates: tuple[str, ...] = ()
        # Where a program answers; None where it was passed over.
        self.program: ProgramRun | None = None
        self.report: Report | None = None
        # Seconds after its beginning, when the first model was asked for its answer.
        self.dispatched: float | None = None
        # Of a whole answer, for the strategy and the store.
        self.answer_text: str | None = None
        self.finish_reason: str | None = None
        # It has a place among its sender's requests that nothing else was counted with yet; all is counted.
        self.has_place = self.is_counted = False
        self.is_over = False

    @cached_property
    def is_long_to_read(self) -> bool:
        """Its body would hold up an event loop: it is large, has very many values, or is counted by a tokenizer and no short one."""
        heavy = TOKENIZED if self.runtime.counters else HEAVY
        return self.num_bytes > LARGE or weight_of(self.body, heavy) > heavy

    # Whose it is, and where it goes

    @property
    def strategy(self) -> str:
        """The strategy that chooses; "" if the sender named a model."""
        return self.target.strategy or ""

    def allows(self, model: str) -> bool:
        """Whether its key may use a model."""
        return self.record is None or self.record.allows(model)

    @property
    def tenant(self) -> str:
        """Whose request it is; what is cached for one is never given to another."""
        return "" if self.record is None else self.record.id

    @property
    def sender(self) -> str:
        """See `KeyRecord.sender`.

        What the gateway asks for itself is a sender of its own, though it comes without a key: "" is whoever sends none, and would find
        in a model's prefix cache what was asked here of tenants.
        """
        record = self.record
        if record is None:
            return "" if self.collecting is None else own_sender(self.collecting.tag)
        return record.sender

    def elapsed(self) -> float:
        """Seconds so far."""
        return time.perf_counter() - self.began

    @property
    def deadline_s(self) -> float:
        """Seconds the request may take in all: those of the model it goes to first, where that says."""
        first = self.candidates[0] if self.candidates else self.target.model
        own = None if first is None else self.runtime.models[first].deadline_s
        return own or self.runtime.config.deadline_s

    @property
    def content_type(self) -> str:
        """Of a whole answer."""
        return content_type(self.endpoint, self.body) if is_media(self.endpoint) else JSON

    # What came of it

    @property
    def last_report(self) -> Report:
        """How its answer was come by; an empty one where nobody was asked."""
        return self.report or Report()

    @property
    def attempts(self) -> list[Attempt]:
        """At its answer. Of a program, its calls are that."""
        reports = [self.last_report] if self.program is None else [call.report for call in self.calls.made]
        return [attempt for report in reports for attempt in report.attempts]

    @property
    def cost_nano(self) -> int:
        """Of its answer, as far as known."""
        return sum(attempt.cost for attempt in self.attempts)

    # Who may keep what was said

    @property
    def strategy_keeps(self) -> bool:
        """Whether the strategy that decided may be told the answer: it wants it, and the sender did not forbid it (``store: false``)."""
        decided, name = self.decided, self.target.strategy
        if name is None or decided is None or decided.bypassed or self.endpoint != "chat":
            return False
        return self.body.get("store") is not False and self.runtime.decider.keeps_answers(name)

    @property
    def keeps_texts(self) -> bool:
        """Whether the store may keep what was asked and answered. What is collected it keeps elsewhere, and no question anew."""
        return self.endpoint in WRITES and self.collecting is None and keeps_texts(self.runtime.config, self.body)

    def note(self, answer: Answer) -> None:
        """Hold on to the text of an answer, for the strategy and the store."""
        if self.strategy_keeps or self.keeps_texts or self.collecting is not None:
            self.answer_text, self.finish_reason = answer.text, answer.finish_reason
