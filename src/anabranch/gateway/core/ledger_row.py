"""The ledger's rows of a request, and what is told of it as it ends. Nothing here changes it."""

from dataclasses import replace
from typing import TYPE_CHECKING

from anabranch.gateway.core.finished import Finished, copied
from anabranch.gateway.core.model_calls import ModelCall
from anabranch.gateway.core.response_headers import overhead_s
from anabranch.gateway.dispatch import Report
from anabranch.gateway.providers.provider import Usage
from anabranch.gateway.store import LedgerRow
from anabranch.routers.contract.query import Outcome

if TYPE_CHECKING:
    from anabranch.gateway.core.request import RequestRun


def _first_token_us(life: "RequestRun", report: Report) -> int | None:
    program = life.program
    if program is not None and program.first_s is not None and life.dispatched is not None:
        return round((life.dispatched + program.first_s) * 1e6)
    winner = report.winner or (report.attempts[-1] if report.attempts else None)
    if winner is None or winner.first_token_s is None or life.dispatched is None:
        return None
    return round((life.dispatched + winner.start_s + winner.first_token_s) * 1e6)


def _flags(life: "RequestRun", report: Report) -> tuple[str, ...]:
    hedged = any(attempt.is_hedge for attempt in report.attempts)
    bypassed = life.decided is not None and bool(life.decided.bypassed)
    flags = (("hedged", hedged), ("stitched", report.is_stitched), ("bypassed", bypassed))
    return tuple(name for name, is_set in flags if is_set)


def finished(
    life: "RequestRun",
    row: LedgerRow,
    report: Report,
    outcome: Outcome | None,
    http_status: int,
) -> Finished:
    """What everybody is told who wants to know that a request is over."""
    calls = life.calls.made
    of_calls = copied([attempt for call in calls for attempt in call.report.attempts])
    first_s = None if row.first_token_us is None or not life.body.get("stream") else row.first_token_us / 1e6
    return Finished(
        row=row, calls=tuple(call_rows(life)), attempts=copied(report.attempts),
        asked_attempts=of_calls, time_s=life.time_s, endpoint=life.shown_as,
        key="" if life.record is None else life.record.name or life.record.id, http_status=http_status, first_s=first_s,
        prompt_tokens=row.prompt_tokens or life.count.tokens, cached_model="" if life.hit is None else life.hit.model,
        decided=life.decided, outcome=outcome, trace=life.trace,
    )  # fmt: skip


def row_of(life: "RequestRun", report: Report, latency_s: float, status: str, code: str, cache: str) -> LedgerRow:
    """The ledger's row of a request that is over."""
    usage, price = report.usage, life.runtime.dispatcher.price_of(report.model, report.deployment)
    decided = life.decided
    candidates = () if decided is None else tuple(one.model for one in decided.decision.candidates)
    return LedgerRow(
        request_id=life.id, key_id=life.tenant, user=life.user, team="" if life.record is None else life.record.team,
        tags=life.tags, requested=life.label, strategy=life.strategy, candidates=candidates,
        model=report.model or "", deployment=report.deployment or "", attempts=len(report.attempts), prompt_tokens=usage.prompt,
        completion_tokens=usage.completion, cached_tokens=usage.cached, is_estimated=usage.is_estimated, price=price, cost_nano=report.cost,
        latency_us=round(latency_s * 1e6), first_token_us=_first_token_us(life, report),
        overhead_us=round(overhead_s(life, report) * 1e6), status=status, code=code, cache=cache, flags=_flags(life, report),
    )  # fmt: skip


def priced(life: "RequestRun", row: LedgerRow) -> LedgerRow:
    """The row with what its calls cost as is known now."""
    usage = Usage() if life.report is None else life.report.usage
    return replace(
        row, cost_nano=0 if life.report is None else life.report.cost, prompt_tokens=usage.prompt,
        completion_tokens=usage.completion, cached_tokens=usage.cached, is_estimated=usage.is_estimated,
    )  # fmt: skip


def call_rows(life: "RequestRun") -> list[LedgerRow]:
    """The ledger's rows of what the strategy asked."""
    return [_call_row(life, call) for call in life.calls.made]


def _call_row(life: "RequestRun", call: ModelCall) -> LedgerRow:
    report, usage = call.report, call.report.usage
    return LedgerRow(
        request_id=call.id, parent_id=life.id, purpose=call.purpose, requested=call.model, strategy=life.strategy,
        candidates=(call.model,), model=report.model or "", deployment=report.deployment or "", attempts=len(report.attempts),
        prompt_tokens=usage.prompt, completion_tokens=usage.completion, cached_tokens=usage.cached,
        is_estimated=usage.is_estimated, price=life.runtime.dispatcher.price_of(call.model, report.deployment), cost_nano=report.cost,
        reserved_nano=call.held_nano, latency_us=round(call.latency_s * 1e6), status=call.status, code=call.code,
        flags=("hedged",) if any(attempt.is_hedge for attempt in report.attempts) else (),
    )  # fmt: skip
