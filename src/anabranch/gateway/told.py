"""What is told of a request: headers to the sender, a row to the ledger, a line to the page, a decision to the store.

Read from a `Life`; nothing here changes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from anabranch.gateway.ab.assignment import Arm
from anabranch.gateway.cache.exact import IGNORED
from anabranch.gateway.core.finished import Finished, copied
from anabranch.gateway.core.model_calls import ModelCall
from anabranch.gateway.decide import Decided
from anabranch.gateway.dispatch import Attempt, Report
from anabranch.gateway.prompt_tokens import asked_text
from anabranch.gateway.providers.provider import Usage
from anabranch.gateway.store import CollectedRow, LedgerRow
from anabranch.gateway.store.records import clean
from anabranch.routers.contract.query import Decision, Outcome

if TYPE_CHECKING:
    from anabranch.gateway.life import Life

# Characters of a question or an answer that are kept; more are cut off.
LONGEST_TEXT = 100_000
_NO_SETTINGS = IGNORED | {"model", "messages", "prompt", "input", "tools"}


@dataclass(frozen=True, slots=True)
class Collecting:
    """What a request is collected for.

    Attributes:
        key: by which its answer is found again.
        asked_us: microseconds since 1970, when the user asked whose request it is about; what is collected is kept no longer.
    """

    key: str
    asked_us: int


def headers_of(life: "Life", report: Report) -> dict[str, str]:
    """Where it went, and what the gateway took."""
    decided, live = life.decided, report.answering
    # Of a stream, these go out before its end.
    model, deployment = (
        (live.model, live.deployment) if report.model is None and live else (report.model, report.deployment)
    )
    found = {
        "x-request-id": life.id, "x-route-model": model or "", "x-route-deployment": deployment or "",
        "x-route-attempts": str(len(report.attempts)), "x-overhead-ms": f"{overhead_s(life, report) * 1e3:.3f}",
    }  # fmt: skip
    if life.strategy and decided is not None:
        found["x-route-strategy"] = life.strategy
        found["x-route-reason"] = decided.decision.reason[:200]
        if decided.decision.confidence is not None:
            found["x-route-confidence"] = f"{decided.decision.confidence:.3f}"
        if decided.bypassed:
            found["x-route-bypassed"] = decided.bypassed[:200]
        else:
            found |= life.runtime.decider.headers(life.strategy, decided.decision)
    if life.program is not None:
        found["x-route-calls"] = str(len(life.calls.made))
    if life.exact is not None or life.context is not None:
        found["x-cache"] = "miss"
    if not life.body.get("stream"):
        # What is known by now; a call that is read on for what it costs is in it with its worst case.
        nano = sum(call.report.cost for call in life.calls.made) + (0 if life.program is not None else report.cost)
        found["x-cost-usd"] = f"{nano / 10**9:.9f}"
    if life.arm is not None:
        found["x-route-arm"] = f"{life.arm.test} {life.arm.side}"
    if report.is_stitched:
        found["x-stitched"] = "true"
    return {name: safe(value) for name, value in found.items()}


def overhead_s(life: "Life", report: Report) -> float:
    """Seconds so far that no upstream was being waited for: all but the span from the first attempt's start to the last one's end."""
    if life.program is not None:
        return max(0.0, life.elapsed() - life.calls.busy_s)
    if not report.attempts:
        return life.elapsed()
    first = min(attempt.start_s for attempt in report.attempts)
    last = max(
        attempt.start_s + (attempt.total_s if attempt.total_s is not None else attempt.first_token_s or 0.0)
        for attempt in report.attempts
    )
    return max(0.0, life.elapsed() - (last - first))


def _first_token_us(life: "Life", report: Report) -> int | None:
    program = life.program
    if program is not None and program.first_s is not None and life.dispatched is not None:
        return round((life.dispatched + program.first_s) * 1e6)
    winner = report.winner or (report.attempts[-1] if report.attempts else None)
    if winner is None or winner.first_token_s is None or life.dispatched is None:
        return None
    return round((life.dispatched + winner.start_s + winner.first_token_s) * 1e6)


def _flags(life: "Life", report: Report) -> tuple[str, ...]:
    hedged = any(attempt.is_hedge for attempt in report.attempts)
    bypassed = life.decided is not None and bool(life.decided.bypassed)
    flags = (("hedged", hedged), ("stitched", report.is_stitched), ("bypassed", bypassed))
    return tuple(name for name, is_set in flags if is_set)


def finished(
    life: "Life",
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
        decided=life.decided, outcome=outcome,
    )  # fmt: skip


def row_of(life: "Life", report: Report, latency_s: float, status: str, code: str, cache: str) -> LedgerRow:
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


def priced(life: "Life", row: LedgerRow) -> LedgerRow:
    """The row with what its calls cost as is known now."""
    usage = Usage() if life.report is None else life.report.usage
    return replace(
        row, cost_nano=0 if life.report is None else life.report.cost, prompt_tokens=usage.prompt,
        completion_tokens=usage.completion, cached_tokens=usage.cached, is_estimated=usage.is_estimated,
    )  # fmt: skip


def call_rows(life: "Life") -> list[LedgerRow]:
    """The ledger's rows of what the strategy asked."""
    return [_call_row(life, call) for call in life.calls.made]


def _call_row(life: "Life", call: ModelCall) -> LedgerRow:
    report, usage = call.report, call.report.usage
    return LedgerRow(
        request_id=call.id, parent_id=life.id, purpose=call.purpose, requested=call.model, strategy=life.strategy,
        candidates=(call.model,), model=report.model or "", deployment=report.deployment or "", attempts=len(report.attempts),
        prompt_tokens=usage.prompt, completion_tokens=usage.completion, cached_tokens=usage.cached,
        is_estimated=usage.is_estimated, price=life.runtime.dispatcher.price_of(call.model, report.deployment), cost_nano=report.cost,
        reserved_nano=call.held_nano, latency_us=round(call.latency_s * 1e6), status=call.status, code=call.code,
        flags=("hedged",) if any(attempt.is_hedge for attempt in report.attempts) else (),
    )  # fmt: skip


def explained(decided: Decided, attempts: Sequence[Attempt], arm: Arm | None = None) -> dict[str, Any]:
    """A decision, ready for JSON but for what the store writes as text, the models that were asked, and its arm of an A/B test.

    One that was chosen and never asked, as where no budget had room for it, tells nothing of what choosing it comes to.
    """
    decision = decided.decision
    of_test = {} if arm is None else {"ab": arm.to_dict()}
    return {
        **of_test,
        "strategy": decision.strategy, "reason": decision.reason, "confidence": decision.confidence, "candidates": _candidates(decision),
        "details": dict(decision.details), "bypassed": decided.bypassed, "probability": decision.probability,
        "asked": list(dict.fromkeys(attempt.model for attempt in attempts)),
    }  # fmt: skip


def texts_of(life: "Life") -> dict[str, Any]:
    """What was asked and answered, for the store: as much as a router is learned from, and another model asked with.

    ``messages`` is there where they are more than the one text; ``None`` where they are too long to be kept. ``settings`` are what else
    was asked for, with which the same model would have said something else.
    """
    body = life.body
    query = asked_text(life.endpoint, body)
    found: dict[str, Any] = {
        "endpoint": life.endpoint,
        "query": clean(query, LONGEST_TEXT),
        "task": clean(life.headers.get("x-task") or "") or None,
    }
    messages = body.get("messages", ())
    if messages and [(one.get("role"), one.get("content")) for one in messages] != [("user", query)]:
        # Tokens are at most bytes, so this needs no second look at what may be megabytes.
        found["messages"] = messages if life.count.at_most <= LONGEST_TEXT else None
    if body.get("tools"):
        found["has_tools"] = True
    if life.answer_text is not None:
        found["answer"] = clean(life.answer_text, LONGEST_TEXT)
        found["finish_reason"] = life.finish_reason
    settings = {name: _short(value) for name, value in body.items() if name not in _NO_SETTINGS}
    if life.report is not None and life.report.model in life.prepared:
        # What the model was sent in truth.
        settings["messages"] = True
    if settings:
        found["settings"] = settings
    return found


def _short(value: Any) -> Any:
    """A setting as far as it is short; of others, that they were there."""
    return value if isinstance(value, int | float) or (isinstance(value, str) and len(value) <= 64) else True


def collected_of(life: "Life", row: LedgerRow) -> CollectedRow | None:
    """What came of a call that was collected; None if no answer did."""
    if life.collecting is None or row.status != "ok" or life.answer_text is None:
        return None
    body = {
        "answer": clean(life.answer_text, LONGEST_TEXT), "finish_reason": life.finish_reason, "cost_nano": row.cost_nano,
        "tokens": [row.prompt_tokens, row.completion_tokens], "latency_us": row.latency_us, "request_id": row.request_id,
    }  # fmt: skip
    return CollectedRow(life.collecting.key, life.collecting.asked_us, body)


def _candidates(decision: Decision) -> list[dict[str, Any]]:
    return [
        {"model": one.model, "score": one.score, "quality": one.quality, "cost": one.cost} for one in decision.candidates
    ]  # fmt: skip


def safe(value: str) -> str:
    """As a header may hold it: printable ASCII in one line."""
    return value if value.isascii() and value.isprintable() else "".join(
        sign if sign.isascii() and sign.isprintable() else "?" for sign in value
    )  # fmt: skip
