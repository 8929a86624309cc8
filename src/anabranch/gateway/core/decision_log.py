"""What the store keeps of a request beside its row: why it went where it went, what was asked and answered, what was collected."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from anabranch.gateway.ab.assignment import Arm
from anabranch.gateway.cache.exact import IGNORED
from anabranch.gateway.config import GatewayConfig
from anabranch.gateway.decide import Decided
from anabranch.gateway.dispatch import Attempt
from anabranch.gateway.prompt_tokens import asked_text
from anabranch.gateway.store import COLLECT, CollectedRow, LedgerRow
from anabranch.gateway.store.records import clean
from anabranch.routers.contract.query import Decision

if TYPE_CHECKING:
    from anabranch.gateway.core.request_state import RequestState

# Characters of a question or an answer that are kept; more are cut off.
LONGEST_TEXT = 100_000

# A tier answers the same, so that the cache may look past it, but at another price and pace: that is not what the model comes to.
_NO_SETTINGS = (IGNORED - {"service_tier"}) | {"model", "messages", "prompt", "input", "tools"}


def keeps_texts(config: GatewayConfig, body: Mapping[str, Any]) -> bool:
    """Whether the store keeps what is asked and answered: the config lets it, and the sender does not forbid it (``store: false``)."""
    return config.log.prompts and body.get("store") is not False


def explained(decided: Decided, attempts: Sequence[Attempt], arm: Arm | None = None) -> dict[str, Any]:
    """A decision, ready for JSON but for what the store writes as text, the models that were asked, and its arm of an A/B test.

    One that was chosen and never asked, as where no budget had room for it, tells nothing of what choosing it comes to.
    """
    decision = decided.decision
    of_test = {} if arm is None else {"ab": arm.to_dict()}
    return {
        **of_test,
        "strategy": decision.strategy,
        "reason": decision.reason,
        "confidence": decision.confidence,
        "candidates": _candidates(decision),
        "details": dict(decision.details),
        "bypassed": decided.bypassed,
        "probability": decision.probability,
        "asked": list(dict.fromkeys(attempt.model for attempt in attempts)),
    }


def texts_of(state: "RequestState") -> dict[str, Any]:
    """What was asked and answered, for the store: as much as a router is learned from, and another model asked with.

    ``messages`` is there where they are more than the one text, be it a name beside it; ``None`` where they are too long to be kept.
    ``settings`` are what else was asked for, with which the same model would have said something else, or for another price.
    """
    body = state.body
    query = asked_text(state.endpoint, body)
    found: dict[str, Any] = {
        "endpoint": state.endpoint,
        "query": clean(query, LONGEST_TEXT),
        "task": clean(state.headers.get("x-task") or "") or None,
    }
    messages = body.get("messages", ())
    if messages and list(messages) != [{"role": "user", "content": query}]:
        # Tokens are at most bytes, so this needs no second look at what may be megabytes.
        found["messages"] = messages if state.count.at_most <= LONGEST_TEXT else None
    if body.get("tools"):
        found["has_tools"] = True
    if state.answer_text is not None:
        found["answer"] = clean(state.answer_text, LONGEST_TEXT)
        found["finish_reason"] = state.finish_reason
    settings = {name: _short(value) for name, value in body.items() if name not in _NO_SETTINGS}
    if state.report is not None and state.report.model in state.prepared:
        # What the model was sent in truth.
        settings["messages"] = True
    if settings:
        found["settings"] = settings
    return found


def _short(value: Any) -> Any:
    """A setting as far as it is short; of others, that they were there."""
    return value if isinstance(value, int | float) or (isinstance(value, str) and len(value) <= 64) else True


@dataclass(frozen=True, slots=True)
class Collecting:
    """What a request is collected for.

    Attributes:
        key: by which its answer is found again.
        asked_us: microseconds since 1970, when the user asked whose request it is about; what is collected is kept no longer.
        tag: of `OUR_TAGS`, whose budget pays.
    """

    key: str
    asked_us: int
    tag: str = COLLECT


def collected_of(state: "RequestState", row: LedgerRow) -> CollectedRow | None:
    """What came of a call that was collected; None if no answer did."""
    if state.collecting is None or row.status != "ok" or state.answer_text is None:
        return None
    body = {
        "answer": clean(state.answer_text, LONGEST_TEXT),
        "finish_reason": state.finish_reason,
        "cost_nano": row.cost_nano,
        "tokens": [row.prompt_tokens, row.completion_tokens],
        "latency_us": row.latency_us,
        "request_id": row.request_id,
    }
    return CollectedRow(state.collecting.key, state.collecting.asked_us, body)


def _candidates(decision: Decision) -> list[dict[str, Any]]:
    return [
        {"model": one.model, "score": one.score, "quality": one.quality, "cost": one.cost}
        for one in decision.candidates
    ]
