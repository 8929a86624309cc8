"""The page's line of a request: what it was, and what it cost as soon as that is known."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from anabranch.gateway.core.finished import Finished, Priced
from anabranch.gateway.store import LedgerRow
from anabranch.gateway.ui.snapshot import Seen
from anabranch.routers.contract.query import Decision


def seen_of(done: Finished) -> Seen:
    """Everything but what was asked and answered; the cost is what is known by now."""
    row, decision = done.row, None if done.decided is None else done.decided.decision
    prompt, completion = _tokens(row, done.calls)
    return Seen(
        request_id=done.id,
        time_s=done.time_s,
        key=done.key,
        asked=row.requested,
        strategy=row.strategy,
        chosen=row.model or done.cached_model,
        reason="" if decision is None else decision.reason,
        confidence=None if decision is None else decision.confidence,
        candidates=() if decision is None else _candidates(decision),
        details={} if decision is None else decision.details,
        attempts=[
            {"deployment": one.deployment, "outcome": one.status, "seconds": one.total_s} for one in done.attempts
        ],
        status=done.http_status,
        cache=row.cache,
        bypassed="" if done.decided is None else done.decided.bypassed,
        prompt_tokens=prompt or done.prompt_tokens,
        completion_tokens=completion,
        nano=row.cost_nano + sum(call.cost_nano for call in done.calls),
        latency_s=done.latency_s,
        overhead_s=done.overhead_s,
        calls=[_call(one) for one in done.calls],
    )


def with_price(seen: Seen, priced: Priced) -> Seen:
    """The line with what the request cost."""
    prompt, completion = _tokens(priced.row, priced.calls)
    prompt = prompt or seen.prompt_tokens
    calls = [_call(one) for one in priced.calls]
    if (priced.nano, prompt, completion, calls) == (seen.nano, seen.prompt_tokens, seen.completion_tokens, seen.calls):
        return seen
    return replace(seen, nano=priced.nano, prompt_tokens=prompt, completion_tokens=completion, calls=calls)


def _tokens(row: LedgerRow, calls: Sequence[LedgerRow]) -> tuple[int, int]:
    """Tokens that were read and written: those of the answer, as its usage says. A program's answer is made of its calls."""
    of = [row] if row.attempts else [row, *calls]
    return sum(one.prompt_tokens for one in of), sum(one.completion_tokens for one in of)


def _call(one: LedgerRow) -> dict[str, Any]:
    return {"purpose": one.purpose, "model": one.requested, "outcome": one.status, "nano": one.cost_nano}


def _candidates(decision: Decision) -> list[dict[str, Any]]:
    return [
        {"model": one.model, "score": one.score, "quality": one.quality, "cost": one.cost}
        for one in decision.candidates
    ]
