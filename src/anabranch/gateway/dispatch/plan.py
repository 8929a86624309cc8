"""`Plan`: which models may be asked, until when. `Report`: what was asked, and what came of it."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from anabranch.gateway.dispatch.deployments import MidStream
from anabranch.gateway.dispatch.own_time import OwnTime
from anabranch.gateway.observe.trace_context import Trace
from anabranch.gateway.providers.provider import Answer, FailureKind, HttpCall, UpstreamRequest, Usage

Accept = Callable[[str, Answer], bool | Awaitable[bool]]
Allow = Callable[[str, int], Awaitable[bool]]
Most = Callable[[str], Usage]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What may be done for a request.

    Attributes:
        candidates: models, best first; the tail is the fallback chain.
        only_after: of candidates that are asked only once a failure of one of these kinds has been met, the kinds.
        deadline: when all must be over, on the dispatcher's clock (`Dispatcher.now`).
        accept: asked with the model and its whole answer; while it says no, the next candidate is asked, and the last answer is given.
        allow: asked, with the model and the nano-dollars spent so far, whether its price may be spent: before every attempt but one that
            is the first and goes to the first candidate.
        most: asked with the model, the most tokens that one call of it may be billed for. What is lost is charged that much, unless the
            provider says less. None where nobody keeps accounts: then what is lost is charged what came of it.
        mid_stream: in place of the rules'; None for theirs.
        hedge: in place of the rules'.
        max_attempts: most attempts in all; None for what candidates and retries come to.
        keep: keep the stream's chunks, so that `Stream.answer` can put the whole answer together.
        requests: what to send to a model in place of the request, by its name.
        bounds: most completion tokens of one answer of a model, by its name; sent to it where the request names no end of its own.
        report: filled as attempts are made, for whoever has to know of them however the request ends; None for a new one.
        late: called with an attempt that was given up, and read on, and the answer that it brought after all.
        sender: whose request it is, to tell what one sender meets from what all do; "" if nobody knows.
        trace: that upstreams are told of, each attempt as a span of its own; None for none.
    """

    candidates: tuple[str, ...]
    deadline: float
    only_after: Mapping[str, frozenset[FailureKind]] = field(default_factory=dict)
    accept: Accept | None = None
    allow: Allow | None = None
    most: Most | None = None
    mid_stream: MidStream | None = None
    hedge: bool | None = None
    max_attempts: int | None = None
    keep: bool = False
    requests: Mapping[str, UpstreamRequest] = field(default_factory=dict)
    bounds: Mapping[str, int] = field(default_factory=dict)
    report: "Report | None" = None
    late: "Callable[[Attempt, Answer], None] | None" = None
    sender: str = ""
    trace: Trace | None = None

    def most_attempts(self, retries: int) -> int:
        """Attempts that may be made."""
        whole = len(self.candidates) * (1 + retries)
        return whole if self.max_attempts is None else min(whole, self.max_attempts)


@dataclass(slots=True, kw_only=True)
class Attempt:
    """One call of an upstream.

    Attributes:
        model: of the plan.
        deployment: that was asked.
        start_s: seconds after the request began.
        status: ``open`` while under way, then ``ok``, ``rejected`` (its answer was not accepted), ``cancelled``, or the kind of failure.
        cause: of a failure, what it was taken for where the request went on from it; "" before that.
        http_status: of the upstream.
        message: of the failure.
        first_token_s: seconds from the attempt's start.
        total_s: likewise; None while under way.
        is_hedge: a second attempt beside another.
        usage: tokens it is charged for.
        cost: nano-dollars.
        ticket: of the breaker.
        call: what was sent, while it is under way or read on.
        is_whole: it is made to its end, whether or not somebody waits for it; a stream is not.
        most: the most tokens it may be billed for; None if nobody said.
        told: what the upstream has said of its usage before it was lost; None for nothing.
        seen: completion tokens that came, as far as is known.
        has_begun: its stream had a chunk before it was lost.
        is_guess: nobody told, and ``usage`` is the most that may be billed, as far as is known.
        is_late: it was lost, and its answer is read on; ``usage`` and ``cost`` become what it says.
        span_id: of the trace, that the upstream was told; "" where there is none.
        has_come: its answer is here, though it has not been read: it is none of those under way at its deployment.
        place: its name among those that processes count together; "" where it is not counted there.
        time_s: when it began, in seconds since 1970; 0 where there is no trace.
        time: of its upstream, which this process may hold up.
    """

    model: str
    deployment: str
    start_s: float
    status: str = "open"
    cause: str = ""
    http_status: int | None = None
    message: str = ""
    first_token_s: float | None = None
    total_s: float | None = None
    is_hedge: bool = False
    usage: Usage = field(default_factory=Usage)
    cost: int = 0
    ticket: int = 0
    call: HttpCall | None = field(default=None, repr=False)
    is_whole: bool = False
    most: Usage | None = None
    told: Usage | None = None
    seen: int = 0
    has_begun: bool = False
    is_guess: bool = False
    is_late: bool = False
    span_id: str = ""
    has_come: bool = False
    place: str = ""
    time_s: float = 0.0
    time: OwnTime = field(default_factory=OwnTime, repr=False, compare=False)

    def own_s(self, seconds: float) -> float:
        """Of so many since it began, up to now, those that its upstream took: this process held it up in the others."""
        return max(0.0, seconds - self.time.held_s)

    @property
    def held_bytes(self) -> int:
        """Of what was asked while it is under way: the bytes that were sent, what they were written from, and what that was read from."""
        return 0 if self.call is None else 3 * len(self.call.body)


@dataclass(slots=True, kw_only=True)
class Report:
    """How an answer was come by.

    Attributes:
        attempts: in the order they began.
        skipped: (model, why) of candidates that were passed over without an attempt.
        model: that answered; None if none did.
        deployment: likewise.
        is_stitched: another model went on where the first broke off.
        is_stopgap: what answered stands in for what would have: that failed, was not to be had, or was too dear, which may pass.
        passes_s: seconds after which what would have answered may be asked again, as far as known; 0 if not.
    """

    attempts: list[Attempt] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    model: str | None = None
    deployment: str | None = None
    is_stitched: bool = False
    is_stopgap: bool = False
    passes_s: float = 0.0
    _waiting: list[Callable[[], None]] = field(default_factory=list, init=False, repr=False)

    @property
    def cost(self) -> int:
        """Nano-dollars of all attempts, the lost ones among them."""
        return sum(attempt.cost for attempt in self.attempts)

    @property
    def usage(self) -> Usage:
        """Tokens of all attempts."""
        return sum((attempt.usage for attempt in self.attempts), Usage())

    @property
    def winner(self) -> Attempt | None:
        """The last attempt that succeeded."""
        return next((item for item in reversed(self.attempts) if item.status == "ok"), None)

    @property
    def answering(self) -> Attempt | None:
        """The attempt whose answer is under way, once its first token is there."""
        return next(
            (item for item in reversed(self.attempts) if item.status == "open" and item.first_token_s is not None), None
        )

    @property
    def is_late(self) -> bool:
        """An attempt is read on for what it costs."""
        return any(attempt.is_late for attempt in self.attempts)

    def when_known(self, then: Callable[[], None]) -> None:
        """Call ``then`` once it is known what all attempts cost that are read on now."""
        self._waiting.append(then)

    def now_known(self) -> None:
        """An attempt that was read on is so no more."""
        waiting, self._waiting = ([], self._waiting) if self.is_late else (self._waiting, [])
        for then in waiting:
            then()
