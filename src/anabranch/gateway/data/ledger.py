"""The gateway's own log as recorded outcomes: requests that somebody scored, each answered by the one model that was asked."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from anabranch.errors import DataError
from anabranch.gateway.data.table import Row, gather
from anabranch.gateway.dataset import Recorded
from anabranch.gateway.money import dollars

SOURCE = Path("the ledger")  # named in errors


def from_ledger(rows: Iterable[Mapping[str, Any]]) -> Recorded:
    """Outcomes from rows of the ledger, joined with what was asked and the feedback on it.

    Args:
        rows: each with ``query`` (its text, where prompts are kept), ``model``, ``score``, and what there is of ``task``,
            ``cost_nano``, ``prompt_tokens``, ``completion_tokens``, ``latency_us`` and ``probability``. Rows without a text or a score are
            left out, since nothing can be learned from them.

    Raises DataError if that leaves none.
    """
    found = [_row(row) for row in rows if row.get("query") and _is_number(row.get("score"))]
    if not found:
        raise DataError(
            "the ledger holds no request with both its text and a score; let the gateway keep prompts, and send feedback"
        )
    return gather(found, SOURCE, None)


def _row(row: Mapping[str, Any]) -> Row:
    model = row["model"]
    cost, latency = row.get("cost_nano"), row.get("latency_us")
    values: dict[str, Any] = {
        "score": float(row["score"]), "cost": None if cost is None else dollars(cost),
        "prompt": row.get("prompt_tokens"), "completion": row.get("completion_tokens"),
        "latency": None if latency is None else latency / 1e6,
    }  # fmt: skip
    chance = row.get("probability")
    return Row(
        row["query"], row.get("task"), {part: {model: value} for part, value in values.items() if value is not None},
        signals={} if chance is None else {"probability": {model: float(chance)}},
    )  # fmt: skip


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
