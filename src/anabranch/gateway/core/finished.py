"""What is told of a request that is over: at once what it was, and, as soon as that is known, what it cost.

A call that was given up may be read on for what it costs, for a minute: whoever shows or counts requests need not wait for that, and
whoever counts money, or learns from it, waits. A request has one `Finished` and then one `Priced`, mostly at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from anabranch.gateway.decide import Decided
from anabranch.gateway.dispatch import Attempt
from anabranch.gateway.observe.trace_context import Trace
from anabranch.gateway.store import LedgerRow
from anabranch.routers.contract.query import Outcome


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A request that is over.

    Attributes:
        row: of the ledger, without what it cost: of that it holds what is known.
        calls: likewise, of what its strategy asked.
        attempts: at its answer; none of a program, whose calls are that.
        asked_attempts: at what its strategy, or a program, asked.
        time_s: when it began, in seconds since 1970.
        endpoint: as metrics call it.
        key: name of its key.
        http_status: that its sender was told.
        first_s: to the first token of a stream; None without one.
        prompt_tokens: counted or estimated.
        cached_model: whose kept answer it was given; "" for none.
        decided: where it should go; None if it did not come to that.
        outcome: for the strategy that decided, without its cost; None where there is nothing to learn.
        trace: that it belongs to; None for none.
    """

    row: LedgerRow
    calls: tuple[LedgerRow, ...] = ()
    attempts: tuple[Attempt, ...] = ()
    asked_attempts: tuple[Attempt, ...] = ()
    time_s: float
    endpoint: str
    key: str = ""
    http_status: int
    first_s: float | None = None
    prompt_tokens: int = 0
    cached_model: str = ""
    decided: Decided | None = None
    outcome: Outcome | None = None
    trace: Trace | None = None

    @property
    def id(self) -> str:
        """Of the request."""
        return self.row.request_id

    @property
    def latency_s(self) -> float:
        """Of the whole."""
        return (self.row.latency_us or 0) / 1e6

    @property
    def overhead_s(self) -> float:
        """Of that, what the gateway took."""
        return (self.row.overhead_us or 0) / 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Priced:
    """What a request cost.

    Attributes:
        row, calls: as they are written.
        outcome: as that of its `Finished`, with the cost.
    """

    row: LedgerRow
    calls: tuple[LedgerRow, ...] = ()
    outcome: Outcome | None = None

    @property
    def nano(self) -> int:
        """Nano-dollars of all of it."""
        return self.row.cost_nano + sum(call.cost_nano for call in self.calls)


def copied(attempts: Sequence[Attempt]) -> tuple[Attempt, ...]:
    """As they are now: one that is read on changes."""
    return tuple(replace(attempt, call=None) for attempt in attempts)
