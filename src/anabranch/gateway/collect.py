"""What the other models would have said: stored questions are asked of every model and judged, until there is a table of all outcomes.

    async with Gateway(for_collecting(config)) as gateway:
        collector = Collector(gateway, models, judge, per_minute=60)
        await collector.run(Path("outcomes.jsonl"), limit=500)

Every call is a request of the gateway like any other: money is reserved for it, it has a row in the ledger, and it carries the tag `TAG`,
whose budget (``tag:collect``) is the collector's own. What was answered before, by the user's request or by an earlier run that was
interrupted, is not asked again. A question is written once all of its models have answered and were judged, as one line of recorded
outcomes; a run goes on after the last whole line.
"""

import asyncio
import contextlib
import json
import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anabranch.errors import DataError, InputError
from anabranch.gateway.config import GatewayConfig, StrategyConfig
from anabranch.gateway.data.guard import question
from anabranch.gateway.judges import Judge
from anabranch.gateway.money import dollars
from anabranch.gateway.store import LedgerQuery, LedgerRow
from anabranch.gateway.strategies.training import share
from anabranch.gateway.told import LONGEST_TEXT
from anabranch.web.api_error import ApiError

if TYPE_CHECKING:
    from anabranch.gateway.gateway import Gateway

logger = logging.getLogger(__name__)
TAG = "collect"

# Rows of the ledger read at a time.
PAGE = 500

# Of every line that is written.
_START = b'{"query":'

# Times that a call is made again when the gateway's own limits put it off.
PATIENCE = 5

# Questions in a row that were paid for and came to nothing, after which there is no use in going on.
IN_VAIN = 10


class OutOfBudgetError(InputError):
    """No budget has room for another call. What was collected stays."""


@dataclass(frozen=True, slots=True)
class Said:
    """An answer of one model.

    Attributes:
        text: of it.
        cost: dollars.
        tokens: prompt and completion.
        latency_s: seconds to its end; None if not measured.
    """

    text: str
    cost: float
    tokens: tuple[int, int]
    latency_s: float | None


@dataclass(frozen=True, slots=True)
class Origin:
    """A stored request.

    Attributes:
        request_id: of it.
        query, task: as strategies see them.
        messages: to ask another model with.
        model, said: what answered it.
    """

    request_id: str
    query: str
    task: str | None
    messages: list[dict[str, Any]]
    model: str
    said: Said | None


@dataclass(slots=True)
class Collected:
    """What a run came to.

    Attributes:
        questions: written in this run.
        there: written before.
        calls: made to answer, without the judge's.
        reused: answers that were there already.
        unjudged: questions that the judge knows nothing of, or said nothing clear about.
        failed: questions that a model did not answer.
        stopped: why the run ended before its end; "" if it did not.
    """

    questions: int = 0
    there: int = 0
    calls: int = 0
    reused: int = 0
    unjudged: int = 0
    failed: int = 0
    stopped: str = ""


def for_collecting(config: GatewayConfig) -> GatewayConfig:
    """A gateway's config for a collector beside it: the operator's, so without keys, and each model answers for itself alone."""
    cache = config.cache.replace(exact=False, semantic=False)
    strategies = {"static": StrategyConfig(use="static")}
    return config.replace(
        require_key=False, fallbacks={}, cache=cache, strategies=strategies, default_strategy=None, embedder=None
    )


@dataclass(slots=True)
class _Pace:
    """So many calls a minute, evenly."""

    per_minute: float
    next_s: float = 0.0

    async def wait(self) -> None:
        now_s = time.monotonic()
        at_s = max(self.next_s, now_s)
        self.next_s = at_s + 60 / self.per_minute
        await asyncio.sleep(at_s - now_s)


class Collector:
    """Asks and judges.

    Args:
        gateway: started, with a config of `for_collecting`; its store holds the questions.
        models: to be compared.
        judge: of the answers.
        per_minute: calls, the judge's among them.
        max_tokens: of an answer; None for the model's.
        told: called with a sentence after each question.

    Raises InputError for fewer than two models, or one that the config does not have.
    """

    def __init__(
        self,
        gateway: "Gateway",
        models: Sequence[str],
        judge: Judge,
        *,
        per_minute: float = 60.0,
        max_tokens: int | None = None,
        told: Callable[[str], None] = lambda text: None,
    ) -> None:
        known = [model.name for model in gateway.config.models]
        if unknown := [name for name in (*models, *judge.models) if name not in known]:
            raise InputError(f"there is no model {unknown[0]!r} in the config; it has {', '.join(known)}")
        if len(set(models)) < 2:
            raise InputError(f"{len(set(models))} model is nothing to compare; name at least two")
        self.gateway, self.models, self.judge = gateway, tuple(dict.fromkeys(models)), judge
        self._pace, self._max_tokens, self._told = _Pace(per_minute), max_tokens, told
        self.done = Collected()
        # Questions that this collector has asked; what came to nothing is left to the next one.
        self._tried: set[str] = set()

    async def run(
        self, out: Path, *, limit: int | None = None, share_of: float = 1.0, since_s: float = 0.0
    ) -> Collected:
        """Go through the stored questions, oldest first; called again, through those that have come since.

        Args:
            out: JSON lines; made, or gone on with.
            limit: questions to add at most.
            share_of: of the questions that are looked at, always the same ones.
            since_s: unix second from which on.

        Raises DataError if ``out`` is of something else, or the store holds no texts.
        """
        seen = _begun(out, self.models)
        self.done.there = len(seen) - self.done.questions
        seen |= self._tried
        earlier = await self._earlier()
        any_text, in_vain = False, 0
        async for origin in self._origins(since_s):
            any_text = True
            key = question(origin.query)
            if key in seen or share("collect", key) >= share_of:
                continue
            if limit is not None and self.done.questions >= limit:
                break
            seen.add(key)
            self._tried.add(key)
            try:
                line = await self._outcome(origin, earlier)
            except OutOfBudgetError as error:
                self.done.stopped = str(error)
                break
            if line is not None:
                in_vain = 0
                _append(out, line)
                self.done.questions += 1
                self._told(f"{self.done.questions + self.done.there} questions, {self.done.calls} calls")
            elif self.judge.knows(origin.query):
                in_vain += 1
            if in_vain >= IN_VAIN:
                self.done.stopped = (
                    f"{IN_VAIN} questions in a row came to nothing ({self.done.failed} of all were not answered, {self.done.unjudged} not "
                    f"judged); see to the models, or to the judge, {self.judge.name}"
                )
                break
        if not any_text and not seen:
            raise DataError(
                "the store holds no texts of requests: set prompts = true under [log] of the gateway's config; what is asked from then "
                "on can be collected"
            )
        return self.done

    async def _outcome(self, origin: Origin, earlier: dict[tuple[str, str], Said]) -> dict[str, Any] | None:
        """The line of a question; None if it cannot be had."""
        if not self.judge.knows(origin.query):
            self.done.unjudged += 1
            return None
        answers = (self._answer(origin, model, earlier) for model in self.models)
        found = await asyncio.gather(*answers, return_exceptions=True)
        # Only once all are there: what the others said is paid for, and in the store.
        for one in found:
            if isinstance(one, BaseException):
                raise one
        said = {model: one for model, one in zip(self.models, found, strict=True) if isinstance(one, Said)}
        if len(said) < len(self.models):
            self.done.failed += 1
            return None
        scores = await self.judge.scores(origin.query, {model: one.text for model, one in said.items()}, self._judged)
        if scores is None:
            self.done.unjudged += 1
            return None
        return {
            "query": origin.query, "task": origin.task, "scores": scores, "cost": {model: one.cost for model, one in said.items()},
            "tokens": {model: list(one.tokens) for model, one in said.items()},
            "latency": {model: one.latency_s for model, one in said.items()},
            "answers": {model: one.text for model, one in said.items()}, "judge": self.judge.name, "request_id": origin.request_id,
        }  # fmt: skip

    async def _answer(self, origin: Origin, model: str, earlier: dict[tuple[str, str], Said]) -> Said | None:
        said = origin.said if origin.model == model else earlier.get((_conversation(origin.messages), model))
        if said is not None:
            self.done.reused += 1
            return said
        self.done.calls += 1
        fields = {} if self._max_tokens is None else {"max_tokens": self._max_tokens}
        return await self._ask({"model": model, "messages": origin.messages, **fields}, origin.task)

    async def _judged(self, model: str, prompt: str) -> str:
        """How a judge asks."""
        said = await self._ask(
            {"model": model, "messages": [{"role": "user", "content": prompt}], "temperature": 0}, None
        )
        return "" if said is None else said.text

    async def _ask(self, body: dict[str, Any], task: str | None) -> Said | None:
        """One call; None if the model does not answer. Raises OutOfBudgetError."""
        headers = {"x-tags": TAG, "x-cache": "deny"} | ({"x-task": task} if task else {})
        for _ in range(PATIENCE):
            await self._pace.wait()
            try:
                reply = await self.gateway.handle("chat", dict(body), headers=headers, shown_as=TAG)
            except ApiError as error:
                if error.code == "insufficient_quota":
                    raise OutOfBudgetError(str(error)) from None
                if error.code != "rate_limit_exceeded":
                    logger.warning("%s gave no answer: %s", body["model"], error)
                    return None
                await asyncio.sleep(float(error.headers.get("Retry-After", 1)))
                continue
            answer = json.loads(reply.body or b"{}")
            text = answer["choices"][0]["message"].get("content")
            [row] = await self.gateway.store.ledger(LedgerQuery(request_id=reply.headers["x-request-id"]))
            return None if not text else _said(text, row)
        return None

    # What is there

    async def _told_rows(self, query: LedgerQuery) -> AsyncIterator[tuple[LedgerRow, dict[str, Any]]]:
        """Answered requests whose texts are kept, oldest first."""
        store, after = self.gateway.store, 0
        while rows := await store.ledger(_page(query, after)):
            after = rows[-1].seq or 0
            answered = [row for row in rows if row.status == "ok" and row.model]
            _, texts = await store.told_of([row.request_id for row in answered])
            for row in answered:
                if row.request_id in texts:
                    yield row, texts[row.request_id]

    async def _origins(self, since_s: float) -> AsyncIterator[Origin]:
        """Requests of users that another model can be asked with."""
        async for row, texts in self._told_rows(LedgerQuery(since_us=int(since_s * 1e6))):
            messages = texts.get("messages", [{"role": "user", "content": texts["query"]}])
            cut = messages is None or len(texts["query"]) >= LONGEST_TEXT
            if (
                TAG in row.tags
                or cut
                or texts.get("has_tools")
                or texts["endpoint"] != "chat"
                or not texts["query"].strip()
            ):
                continue
            answer = texts.get("answer")
            said = _said(answer, row) if answer and len(answer) < LONGEST_TEXT and row.attempts == 1 else None
            yield Origin(row.request_id, texts["query"], texts.get("task"), messages, row.model, said)

    async def _earlier(self) -> dict[tuple[str, str], Said]:
        """Answers of earlier runs, by conversation and model: they are paid for."""
        found = {}
        async for row, texts in self._told_rows(LedgerQuery(tag=TAG)):
            messages = texts.get("messages", [{"role": "user", "content": texts["query"]}])
            if messages and texts.get("answer"):
                found[_conversation(messages), row.model] = _said(texts["answer"], row)
        return found


def _page(query: LedgerQuery, after: int) -> LedgerQuery:
    return LedgerQuery(since_us=query.since_us, tag=query.tag, after_seq=after, newest_first=False, limit=PAGE)


def _conversation(messages: Sequence[Any]) -> str:
    return json.dumps(messages, sort_keys=True)


def _said(text: str, row: LedgerRow) -> Said:
    latency_s = None if row.latency_us is None else row.latency_us / 1e6
    return Said(text, dollars(row.cost_nano), (row.prompt_tokens, row.completion_tokens), latency_s)


def _begun(out: Path, models: Sequence[str]) -> set[str]:
    """Questions that are in the file; a line that an interruption cut off is taken away. Raises DataError if it is of other models."""
    if not out.exists():
        return set()
    raw = out.read_bytes()
    whole = raw[: raw.rfind(b"\n") + 1]
    found = set()
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            row = json.loads(line)
            named, text = set(row["scores"]), row["query"]
        except (ValueError, TypeError, KeyError):
            raise DataError(f"{out}, line {number} is no collected outcome; choose a new file") from None
        if named != set(models):
            raise DataError(
                f"{out} compares {', '.join(sorted(named))}, not {', '.join(sorted(models))}; choose a new file"
            )
        found.add(question(text))
    if len(whole) < len(raw):
        if not raw[len(whole) :].startswith(_START[: len(raw) - len(whole)]):
            raise DataError(f"{out} ends in something that is no collected outcome; choose a new file")
        os.truncate(out, len(whole))
    return found


def _append(out: Path, line: dict[str, Any]) -> None:
    """One write, then to the disk: what is there is whole. The texts are the users', so nobody else may read them."""
    handle = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with contextlib.closing(os.fdopen(handle, "wb", buffering=0)) as file:
        file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
        os.fsync(handle)
