"""What a sender is told of a request in headers: where it went, and what the gateway took. Nothing here changes it."""

from typing import TYPE_CHECKING

from anabranch.gateway.dispatch import Report

if TYPE_CHECKING:
    from anabranch.gateway.core.request_state import RequestState


def headers_of(state: "RequestState", report: Report) -> dict[str, str]:
    """Where it went, and what the gateway took."""
    decided, live = state.decided, report.answering
    # Of a stream, these go out before its end.
    model, deployment = (
        (live.model, live.deployment) if report.model is None and live else (report.model, report.deployment)
    )
    found = {
        "x-request-id": state.id,
        "x-route-model": model or "",
        "x-route-deployment": deployment or "",
        "x-route-attempts": str(len(report.attempts)),
        "x-overhead-ms": f"{overhead_s(state, report) * 1e3:.3f}",
    }
    if state.strategy and decided is not None:
        found["x-route-strategy"] = state.strategy
        found["x-route-reason"] = decided.decision.reason[:200]
        if decided.decision.confidence is not None:
            found["x-route-confidence"] = f"{decided.decision.confidence:.3f}"
        if decided.bypassed:
            found["x-route-bypassed"] = decided.bypassed[:200]
        else:
            found |= decided.headers
    if state.program is not None:
        found["x-route-calls"] = str(len(state.calls.made))
        if state.program.spare:
            found["x-route-spare"] = told_spare(state.program.spare)
    if state.is_cacheable:
        found["x-cache"] = "miss"
    if not state.body.get("stream"):
        # What is known by now; a call that is read on for what it costs is in it with its worst case.
        nano = sum(call.report.cost for call in state.calls.made) + (0 if state.program is not None else report.cost)
        found["x-cost-usd"] = f"{nano / 10**9:.9f}"
    if state.arm is not None:
        found["x-route-arm"] = f"{state.arm.test} {state.arm.side}"
    if report.is_stitched:
        found["x-stitched"] = "true"
    return {name: safe(value) for name, value in found.items()}


def overhead_s(state: "RequestState", report: Report) -> float:
    """Seconds so far that no upstream was being waited for: all but the span from the first attempt's start to the last one's end."""
    if state.program is not None:
        return max(0.0, state.elapsed() - state.calls.busy_s)
    if not report.attempts:
        return state.elapsed()
    first = min(attempt.start_s for attempt in report.attempts)
    last = max(
        attempt.start_s + (attempt.total_s if attempt.total_s is not None else attempt.first_token_s or 0.0)
        for attempt in report.attempts
    )
    return max(0.0, state.elapsed() - (last - first))


def told_spare(why: str) -> str:
    """Why an answer stands in for another one, as the header ``x-route-spare`` says it."""
    return safe(why[:200])


def safe(value: str) -> str:
    """As a header may hold it: printable ASCII in one line."""
    if value.isascii() and value.isprintable():
        return value
    return "".join(sign if sign.isascii() and sign.isprintable() else "?" for sign in value)
