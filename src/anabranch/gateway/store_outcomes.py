"""The gateway's own log as recorded outcomes: requests that somebody scored, each answered by the one model that was asked, and questions
that shadow samples asked of all of them.

Texts are in the store where the gateway is let keep prompts (``log.prompts``), probabilities where it keeps decisions.
"""

import asyncio
import json
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anabranch.errors import DataError
from anabranch.gateway.logged_error import words
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.data.jsonl import row_of
from anabranch.routers.data.splits import question
from anabranch.routers.data.table import Row, gather
from anabranch.routers.money import dollars

if TYPE_CHECKING:
    from anabranch.gateway.store.records import LedgerRow
    from anabranch.gateway.store.store import Store

logger = logging.getLogger(__name__)

# Named in errors.
SOURCE = Path("the ledger")

# Of what shadow samples came to.
LEFT_OUT = (
    "outcomes of conversations that are left out: %d; conversations = true under [shadow] lets routers learn from them, and anabranch "
    "gateway collect writes them to a file, without paying for them again"
)

# Rows of the ledger read at a time.
PAGE = 10_000

# Of them, those whose texts are read at a time.
TOLD = 500


def load_store(url: str, *, by_choice: bool = False) -> Recorded:
    """Outcomes from a gateway's store (a SQLite file or a PostgreSQL URL), which may be in use. Raises DataError if it holds none.

    Args:
        url: of the store.
        by_choice: put what came of a request under the model that was chosen for it, also where that one failed and another answered:
            that is what the choice led to, and what its probability is of. Where it was not even asked, as where no budget had room for
            it, the answer is the other's, and the choice has a probability and no score.
    """
    if "://" not in url and not Path(url).is_file():
        raise DataError(f"cannot read {url}: no such file")

    async def read() -> Recorded:
        from anabranch.gateway.store.opening import open_store

        async with open_store(url, serves=False, makes=False) as store:
            scored = await scored_requests(store, by_choice=by_choice)
            # Of these nothing was chosen.
            return from_ledger(scored, [] if by_choice else await judged_questions(store))

    return asyncio.run(read())


async def scored_requests(store: "Store", *, by_choice: bool = False) -> list[dict[str, Any]]:
    """Rows for `from_ledger`: every request that a model answered and somebody scored, oldest first."""
    from anabranch.gateway.store.records import LedgerQuery

    found: list[dict[str, Any]] = []
    after: int | None = None
    while rows := await store.ledger(LedgerQuery(after_seq=after, limit=PAGE, newest_first=False)):
        after = rows[-1].seq
        scored = [row for row in rows if row.model and row.quality is not None and not _is_programs(row)]
        for at in range(0, len(scored), TOLD):
            part = scored[at : at + TOLD]
            decisions, texts = await store.told_of([row.request_id for row in part])
            found += [
                _scored(row, decisions.get(row.request_id, {}), texts.get(row.request_id, {}), by_choice)
                for row in part
            ]
    return found


async def judged_questions(store: "Store") -> list[Row]:
    """What shadow samples came to, oldest first; of several judges, whose scores differ in what they mean, those of the last one."""
    from anabranch.gateway.store.learned import VOUCHED, read_outcomes

    by_judge: dict[str, list[Row]] = {}
    last = ""
    for body in await store.look(read_outcomes):
        try:
            row, found = row_of(body), json.loads(body)
            judge = str(found.get("judge"))
            row.is_vouched = row.is_conversation and found.get(VOUCHED) is True
        except DataError as error:
            logger.warning("an outcome of shadow samples is left out: %s", words(error))
            continue
        by_judge.setdefault(judge, []).append(row)
        last = judge
    return by_judge.get(last, [])


def _scored(row: "LedgerRow", decision: dict[str, Any], texts: dict[str, Any], by_choice: bool) -> dict[str, Any]:
    told = {**decision, **texts}
    chosen = _chosen(decision) if row.strategy else None
    chosen = row.model if chosen is None else chosen
    asked = decision.get("asked")
    was_asked = chosen in asked if isinstance(asked, list) else chosen == row.model or row.attempts > 1
    # What others cost that a strategy asked is no cost of the model it chose. In rows of before they had rows of their own it is in there.
    helpers = texts.get("asked_nano")
    cost_nano = row.cost_nano - helpers if isinstance(helpers, int) else row.cost_nano
    return {
        "query": _text(told.get("query")),
        "task": _text(told.get("task")),
        "answer": _text(told.get("answer")),
        "score": row.quality,
        "model": chosen if by_choice and was_asked else row.model,
        "chosen": chosen if by_choice else row.model,
        "probability": _chance(told.get("probability")) if by_choice or chosen == row.model else None,
        "cost_nano": max(0, cost_nano),
        "prompt_tokens": row.prompt_tokens,
        "completion_tokens": row.completion_tokens,
        "latency_us": row.latency_us,
        "is_conversation": "messages" in texts,
    }


def _is_programs(row: "LedgerRow") -> bool:
    """What a program said after several calls is no answer of one model: it has no attempt of its own."""
    return row.calls > 0 and row.attempts == 0


def _chosen(decision: dict[str, Any]) -> str | None:
    """The first candidate; None for a decision that is damaged."""
    match decision.get("candidates"):
        case [{"model": str(model)}, *_]:
            return model
    return None


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _chance(value: Any) -> float | None:
    return float(value) if _is_number(value) and 0 < value <= 1 else None


def from_ledger(rows: Iterable[Mapping[str, Any]], judged: Sequence[Row] = ()) -> Recorded:
    """Outcomes from rows of the ledger, joined with what was asked and the feedback on it.

    Args:
        rows: each with ``query`` (its text, where prompts are kept), ``model``, ``score``, and what there is of ``task``, ``answer``,
            ``cost_nano``, ``prompt_tokens``, ``completion_tokens``, ``latency_us`` and ``probability``, which is that of ``chosen`` where
            this is another than ``model``; ``is_conversation`` where the text is only the last one of what was asked. Rows without a text
            or a score are left out, since nothing can be learned from them.
        judged: whole outcomes of questions, in the place of what else is there of these. Those of conversations are left out unless the
            operator vouches for them (`Row.is_vouched`): who asks chooses what stands before the last text, and with it what every model
            says. None may speak for that text alone, nor take the place of what others scored, so where there is anything of the text
            alone they are left out in any case.

    Raises DataError if that leaves none.
    """
    scored = [row for row in rows if _is_number(row.get("score"))]
    found = [_row(row) for row in scored if (row.get("query") or "").strip()]
    alone = [row for row in judged if not row.is_conversation]
    if num_closed := sum(row.is_conversation and not row.is_vouched for row in judged):
        logger.warning(LEFT_OUT, num_closed)
    whole = {question(row.query) for row in alone}
    # What was said at the end of a conversation is not what was judged.
    found = [row for row in found if row.is_conversation or question(row.query) not in whole] + alone
    told = {question(row.query) for row in found if not row.is_conversation}
    found += [row for row in judged if row.is_vouched and question(row.query) not in told]
    if not found:
        missing = (
            "nobody has scored an answer yet: send scores to POST /v1/feedback"
            if not scored
            else f"{len(scored):,} answers were scored, but their texts are not kept: set prompts = true under [log] of the gateway's "
            "config; what is asked from then on can be learned from"
        )
        left_out = f". {LEFT_OUT[0].upper()}{LEFT_OUT[1:] % len(judged)}" if judged else ""
        raise DataError(f"the ledger holds no request with both its text and a score; {missing}{left_out}")
    return gather(found, SOURCE, None)


def _row(row: Mapping[str, Any]) -> Row:
    model = row["model"]
    cost, latency = row.get("cost_nano"), row.get("latency_us")
    values: dict[str, Any] = {
        "score": float(row["score"]),
        "cost": None if cost is None else dollars(cost),
        "prompt": row.get("prompt_tokens"),
        "completion": row.get("completion_tokens"),
        "latency": None if latency is None else latency / 1e6,
    }
    chance, chosen = row.get("probability"), row.get("chosen", model)
    known: dict[str, dict[str, float | None]] = {
        part: {model: value} for part, value in values.items() if value is not None
    }
    known["score"].setdefault(chosen, None)
    return Row(
        row["query"],
        row.get("task"),
        known,
        answers={model: row["answer"]} if row.get("answer") else {},
        signals={} if chance is None else {"probability": {chosen: float(chance)}},
        is_conversation=bool(row.get("is_conversation")),
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
