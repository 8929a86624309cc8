"""`RequestLog`: everybody who wants to know of requests is told here: metrics, observers, the page, and the strategies that learn."""

from collections import deque

from anabranch.gateway.core.finished import Finished, Priced
from anabranch.gateway.core.request_state import RequestState
from anabranch.gateway.learning.teaching import Teaching
from anabranch.gateway.metrics import Ended, Metrics
from anabranch.gateway.observe.observers import Observers
from anabranch.gateway.overview import Overview
from anabranch.gateway.ui import Seen
from anabranch.gateway.ui.seen import seen_of, with_price


class RequestLog:
    """That of one gateway, on its event loop. A request is `finished` once, and `priced` once
    after that, or `refused`.

    Args:
        recent: where the page finds the last requests.
        metrics: count them.
        observers: access log, spans, and numbers by sender.
        overview: figures of the page.
        teaching: tells strategies what came of their decisions.
    """

    def __init__(
        self, recent: deque[Seen], metrics: Metrics, observers: Observers, overview: Overview, teaching: Teaching
    ) -> None:
        self._recent, self._metrics, self._observers = recent, metrics, observers
        self._overview, self._teaching = overview, teaching

    def finished(self, done: Finished) -> None:
        """A request is over: count it, show it, and remember it for whoever scores it."""
        row, metrics = done.row, self._metrics
        metrics.ended(
            Ended(
                endpoint=done.endpoint,
                model=row.model,
                strategy=row.strategy,
                status=done.http_status,
                cache=row.cache,
                latency_s=done.latency_s,
                ttft_s=done.first_s,
                overhead_s=done.overhead_s,
            )
        )
        for call in done.calls:
            metrics.called(call)
        for attempt in (*done.attempts, *done.asked_attempts):
            metrics.attempted(attempt.deployment, attempt.status)
        self._recent.append(seen_of(done))
        self._observers.finished(done)
        if done.outcome is not None:
            self._teaching.ended(row.strategy, row, done.outcome)

    def priced(self, priced: Priced) -> None:
        """It is known what a request cost: that is what is counted, shown, and learned from."""
        row, recent = priced.row, self._recent
        for one in (row, *priced.calls):
            self._metrics.priced(one)
        self._observers.priced(priced)
        for at in range(len(recent) - 1, -1, -1):
            if recent[at].request_id == row.request_id:
                recent[at] = seen = with_price(recent[at], priced)
                self._overview.ended(seen)
                break
        if priced.outcome is not None:
            self._teaching.priced(row.strategy, row, priced.outcome)

    def refused(self, state: RequestState, status: int, code: str) -> None:
        """A request is over that has no row in the ledger."""
        self._observers.refused(
            state.shown_as,
            status,
            code=code,
            id=state.id,
            key_id=state.tenant,
            trace=state.trace,
            time_s=state.time_s,
            latency_s=state.elapsed(),
        )
