"""Calls that collecting makes: each is paid for once, and found again by what was asked of whom.

What a call came to is written in the transaction that settles it. Whatever ends a run, and whichever run comes next, a call that the
ledger charges is in the store, and is not made again; only one that was under way when its process was killed is lost.
"""

import asyncio
import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from anabranch.errors import InputError
from anabranch.gateway.core.decision_log import Collecting
from anabranch.gateway.logged_error import words
from anabranch.gateway.store import COLLECT, LedgerQuery, LedgerRow
from anabranch.routers.money import dollars
from anabranch.web.api_error import ApiError

if TYPE_CHECKING:
    from anabranch.gateway.gateway import Gateway

logger = logging.getLogger(__name__)
Messages = Sequence[Mapping[str, Any]]

# Times that a call is made again when limits put it off, while none of our own is in its way.
PATIENCE = 5

# Seconds that one waits for a limit; what takes longer ends the run.
LONGEST_WAIT_S = 60.0

# Characters of why a model gave no answer, and how many such reasons are told apart: those that come later are not counted.
SHOWN, KINDS = 200, 1000


class OutOfBudgetError(InputError):
    """No budget has room for another call. What was collected stays.

    Args:
        message: of the budget.
        wait_s: seconds after which there may be room again; None if there will be none.
    """

    def __init__(self, message: str, wait_s: float | None = None) -> None:
        super().__init__(message)
        self.wait_s = wait_s


@dataclass(frozen=True, slots=True)
class Said:
    """An answer of one model.

    Attributes:
        text: of it; may be empty.
        cost: dollars.
        tokens: prompt and completion.
        latency_s: seconds to its end; None if not measured.
    """

    text: str
    cost: float
    tokens: tuple[int, int]
    latency_s: float | None

    @classmethod
    def of_row(cls, text: str, row: LedgerRow, helpers_nano: int = 0) -> "Said":
        """An answer to a user; ``helpers_nano`` of its cost were for choosing the model, in rows of before that had rows of its own."""
        latency_s = None if row.latency_us is None else row.latency_us / 1e6
        return cls(
            text, dollars(max(0, row.cost_nano - helpers_nano)), (row.prompt_tokens, row.completion_tokens), latency_s
        )

    @classmethod
    def of_body(cls, body: Mapping[str, Any]) -> "Said | None":
        """What the store kept of a call; None if that is damaged."""
        try:
            prompt, completion = body["tokens"]
            latency_us = body["latency_us"]
            latency_s = None if latency_us is None else latency_us / 1e6
            return cls(str(body["answer"]), dollars(body["cost_nano"]), (int(prompt), int(completion)), latency_s)
        except (KeyError, TypeError, ValueError):
            return None


def call_key(model: str, messages: Messages, fields: Mapping[str, Any]) -> str:
    """What calls share that ask the same of the same model: SHA-256 of the JSON of both and of the settings, in hex."""
    text = json.dumps([model, list(messages), dict(fields)], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class _Pace:
    """So many calls a minute, evenly."""

    def __init__(self, per_minute: float) -> None:
        self._step_s, self._next_s = 60 / per_minute, 0.0

    async def wait(self) -> None:
        now_s = time.monotonic()
        at_s = max(self._next_s, now_s)
        self._next_s = at_s + self._step_s
        await asyncio.sleep(at_s - now_s)


class Calls:
    """Makes calls, and finds what they came to.

    Attributes:
        spent_nano: nano-dollars that the calls made here came to, those without an answer among them.
        unanswered: how often a model gave no answer, by model and why.

    Args:
        gateway: started, with a config of `for_collecting`.
        per_minute: calls.
        tag: that they carry, whose budget pays.
    """

    def __init__(self, gateway: "Gateway", per_minute: float, tag: str = COLLECT) -> None:
        self._gateway, self._pace, self._tag = gateway, _Pace(per_minute), tag
        self._under_way, self.spent_nano = 0, 0
        self.unanswered: Counter[str] = Counter()
        # Set, and replaced, as one of them ends.
        self._ended = asyncio.Event()

    async def find(self, model: str, messages: Messages, fields: Mapping[str, Any]) -> Said | None:
        """What a model said when any run asked it this; None if none did."""
        key = call_key(model, messages, fields)
        body = (await self._gateway.store.collected([key])).get(key)
        return None if body is None else Said.of_body(body)

    async def make(
        self, model: str, messages: Messages, fields: Mapping[str, Any], asked_us: int, task: str | None = None
    ) -> Said | None:
        """What a model says, from now on to be found; None if it does not answer.

        Args:
            model: of the config.
            messages: the conversation.
            fields: of the request, beside these two.
            asked_us: when the user asked whose request this is about.
            task: of it.

        Raises OutOfBudgetError.
        """
        collecting = Collecting(call_key(model, messages, fields), asked_us, self._tag)
        body = {"model": model, "messages": list(messages), **fields}
        headers = {"x-cache": "deny"} | ({"x-task": task} if task else {})
        for attempt in range(PATIENCE):
            try:
                await self._once(body, headers, collecting)
                return await self.find(model, messages, fields)
            except ApiError as error:
                wait_s = _wait_s(error)
                if error.code == "insufficient_quota" and (
                    wait_s is None or wait_s > LONGEST_WAIT_S or attempt == PATIENCE - 1
                ):
                    raise OutOfBudgetError(str(error), wait_s) from None
                if wait_s is None:
                    logger.warning("%s gave no answer: %s", model, error)
                    self._note(model, error)
                    return None
                if attempt == PATIENCE - 1:
                    self._note(model, error)
                await asyncio.sleep(min(wait_s, LONGEST_WAIT_S))
        return None

    def _note(self, model: str, error: ApiError) -> None:
        what = f"{model}: {words(error)[:SHOWN]}"
        if what in self.unanswered or len(self.unanswered) < KINDS:
            self.unanswered[what] += 1

    async def _once(self, body: dict[str, Any], headers: dict[str, str], collecting: Collecting) -> None:
        """One call. While budgets have no room for it beside others of ours, it waits for these to end. Raises ApiError."""
        while True:
            await self._pace.wait()
            self._under_way += 1
            try:
                reply = await self._gateway.handle(
                    "chat", dict(body), headers=headers, shown_as=self._tag, collecting=collecting
                )
                await self._charge(reply.headers["x-request-id"])
                return
            except ApiError as error:
                await self._charge(error.headers.get("x-request-id"))
                if error.code != "insufficient_quota" or _wait_s(error) is None or self._under_way == 1:
                    raise
            finally:
                self._under_way -= 1
                self._ended.set()
                self._ended = asyncio.Event()
            if self._under_way:
                await self._ended.wait()

    async def _charge(self, request_id: str | None) -> None:
        """Add what a call has cost; what brought no answer may have cost something too."""
        if request_id is not None:
            await self._gateway.settled(request_id)
            rows = await self._gateway.store.ledger(LedgerQuery(request_id=request_id))
            self.spent_nano += sum(row.cost_nano for row in rows)


def _wait_s(error: ApiError) -> float | None:
    """Seconds after which the same may be let through; None if it will not be."""
    if error.code not in ("insufficient_quota", "rate_limit_exceeded"):
        return None
    given = error.headers.get("Retry-After")
    return float(given) if given is not None else (1.0 if error.code == "rate_limit_exceeded" else None)
