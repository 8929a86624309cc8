"""The gateway's own log as recorded outcomes: requests that somebody scored, each answered by the one model that was asked.

A decision that was stored holds the text under ``query``, where the gateway is let keep prompts, and may hold ``task`` and ``probability``.
"""

import asyncio
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anabranch.errors import DataError
from anabranch.gateway.data.table import Row, gather
from anabranch.gateway.dataset import Recorded
from anabranch.gateway.money import dollars

if TYPE_CHECKING:
    from anabranch.gateway.store.store import Store

# Named in errors.
SOURCE = Path("the ledger")

# Rows of the ledger read at a time.
PAGE = 10_000


def load_store(url: str) -> Recorded:
    """Outcomes from a gateway's store (a SQLite file or a PostgreSQL URL), which may be in use. Raises DataError if it holds none."""
    if "://" not in url and not Path(url).is_file():
        raise DataError(f"cannot read {url}: no such file")

    async def read() -> Recorded:
        from anabranch.gateway.store.store import open_store

        async with open_store(url, serves=False) as store:
            return from_ledger(await scored_requests(store))

    return asyncio.run(read())


async def scored_requests(store: "Store") -> list[dict[str, Any]]:
    """Rows for `from_ledger`: every request that a model answered and somebody scored, oldest first."""
    from anabranch.gateway.store.records import LedgerQuery

    found: list[dict[str, Any]] = []
    after: int | None = None
    while rows := await store.ledger(LedgerQuery(after_seq=after, limit=PAGE, newest_first=False)):
        after = rows[-1].seq
        for row in rows:
            if not row.model or row.quality is None:
                continue
            decisions = await store.decisions(row.request_id, limit=1)
            body = decisions[0].body if decisions else {}
            found.append({
                **{name: body.get(name) for name in ("query", "task", "probability")}, "model": row.model, "score": row.quality,
                "cost_nano": row.cost_nano, "prompt_tokens": row.prompt_tokens, "completion_tokens": row.completion_tokens,
                "latency_us": row.latency_us,
            })  # fmt: skip
    return found


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
