"""The ledger's rows of a request, and what is told of it as it ends. Nothing here changes it."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from anabranch.gateway.core.finished import Finished, copied
from anabranch.gateway.core.model_calls import ModelCall
from anabranch.gateway.core.response_headers import overhead_s
from anabranch.gateway.dispatch import Report
from anabranch.gateway.providers.provider import Usage
from anabranch.gateway.store import LedgerRow
from anabranch.routers.contract.query import Outcome

if TYPE_CHECKING:
    from anabranch.gateway.core.request_state import RequestState


def told_by(report: Report) -> dict[str, Any]:
    """Fields of a row that a report fills: who answered, after how many attempts, for how many tokens, and what they cost."""
    who = {"model": report.model or "", "deployment": report.deployment or "", "attempts": len(report.attempts)}
    return {**who, **_cost_of(report.usage, report.cost)}


def _cost_of(usage: Usage, nano: int) -> dict[str, Any]:
    """Fields of a row that say what was billed."""
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "cached_tokens": usage.cached,
        "is_estimated": usage.is_estimated,
        "cost_nano": nano,
    }


def _first_token_us(state: "RequestState", report: Report) -> int | None:
    program = state.program
    if program is not None and program.first_s is not None and state.dispatched is not None:
        return round((state.dispatched + program.first_s) * 1e6)
    winner = report.winner or (report.attempts[-1] if report.attempts else None)
    if winner is None or winner.first_token_s is None or state.dispatched is None:
        return None
    return round((state.dispatched + winner.start_s + winner.first_token_s) * 1e6)


def _flags(state: "RequestState", report: Report) -> tuple[str, ...]:
    hedged = any(attempt.is_hedge for attempt in report.attempts)
    bypassed = state.decided is not None and bool(state.decided.bypassed)
    flags = (("hedged", hedged), ("stitched", report.is_stitched), ("bypassed", bypassed))
    return tuple(name for name, is_set in flags if is_set)


def finished(
    state: "RequestState",
    row: LedgerRow,
    report: Report,
    outcome: Outcome | None,
    http_status: int,
) -> Finished:
    """What everybody is told who wants to know that a request is over."""
    calls = state.calls.made
    of_calls = copied([attempt for call in calls for attempt in call.report.attempts])
    first_s = None if row.first_token_us is None or not state.body.get("stream") else row.first_token_us / 1e6
    return Finished(
        row=row,
        calls=tuple(call_rows(state)),
        attempts=copied(report.attempts),
        asked_attempts=of_calls,
        time_s=state.time_s,
        endpoint=state.shown_as,
        key="" if state.record is None else state.record.name or state.record.id,
        http_status=http_status,
        first_s=first_s,
        prompt_tokens=row.prompt_tokens or state.count.tokens,
        cached_model="" if state.hit is None else state.hit.model,
        decided=state.decided,
        outcome=outcome,
        trace=state.trace,
    )


def row_of(state: "RequestState", report: Report, latency_s: float, status: str, code: str, cache: str) -> LedgerRow:
    """The ledger's row of a request that is over."""
    price = state.runtime.dispatcher.price_of(report.model, report.deployment)
    decided = state.decided
    candidates = () if decided is None else tuple(one.model for one in decided.decision.candidates)
    return LedgerRow(
        request_id=state.id,
        key_id=state.tenant,
        user=state.user,
        team="" if state.record is None else state.record.team,
        tags=state.tags,
        requested=state.label,
        strategy=state.strategy,
        candidates=candidates,
        **told_by(report),
        price=price,
        latency_us=round(latency_s * 1e6),
        first_token_us=_first_token_us(state, report),
        overhead_us=round(overhead_s(state, report) * 1e6),
        status=status,
        code=code,
        cache=cache,
        flags=_flags(state, report),
    )


def priced(state: "RequestState", row: LedgerRow) -> LedgerRow:
    """The row with what its calls cost as is known now."""
    known = _cost_of(Usage(), 0) if state.report is None else _cost_of(state.report.usage, state.report.cost)
    # Of nearly all it was known before.
    return row if all(getattr(row, name) == value for name, value in known.items()) else replace(row, **known)


def call_rows(state: "RequestState") -> list[LedgerRow]:
    """The ledger's rows of what the strategy asked."""
    return [_call_row(state, call) for call in state.calls.made]


def _call_row(state: "RequestState", call: ModelCall) -> LedgerRow:
    report = call.report
    return LedgerRow(
        request_id=call.id,
        parent_id=state.id,
        purpose=call.purpose,
        requested=call.model,
        strategy=state.strategy,
        candidates=(call.model,),
        **told_by(report),
        price=state.runtime.dispatcher.price_of(call.model, report.deployment),
        reserved_nano=call.held_nano,
        latency_us=round(call.latency_s * 1e6),
        status=call.status,
        code=call.code,
        flags=("hedged",) if any(attempt.is_hedge for attempt in report.attempts) else (),
    )
