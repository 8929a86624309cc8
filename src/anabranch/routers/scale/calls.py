"""The calls of one run: each within a time, a budget and a number of them; recorded, and repeatable by a seed of its own.

seed of a call = first 31 bits of SHA-256(seed, problem, stage, index, attempt)
"""

import asyncio
import hashlib
import math
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from anabranch.errors import AnabranchError, BackendError, InputError
from anabranch.routers.contract.ask import Answered, Arm, Ask, Messages, Purpose, Said
from anabranch.routers.contract.choices import wrong_choices
from anabranch.routers.scale.journal import Journal, digest_of
from anabranch.routers.scale.records import CallRecord, Stage, Tokens

# Seconds: less than this is no time for an answer.
LEAST_S = 0.05

PURPOSES: Mapping[Stage, Purpose] = {"outline": "route", "select": "route", "score": "judge", "solve": "draft"}


class LateError(AnabranchError):
    """A call took longer than it may."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What a run may spend. Looked at before each call; what is under way is not broken off, but by `seconds` and `deadline_s`.

    Attributes:
        tokens: of completion, of all calls; of those that failed too where ``ask`` tells what they came to (``spent``; one run at a time).
        usd: dollars of the same.
        seconds: after which the rest is left to System 1.
        calls: of models; at least 1, since without one nothing is answered.
        deadline_s: seconds in which all has to be over: no call goes on beyond.

    Raises InputError for any other value.
    """

    tokens: int | None = None
    usd: float | None = None
    seconds: float | None = None
    calls: int | None = None
    deadline_s: float = math.inf

    def __post_init__(self) -> None:
        for name, least in {"tokens": 0, "usd": 0, "seconds": 0, "calls": 1}.items():
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int | float) and least <= value < math.inf):
                raise InputError(
                    f"{name} of the budget is {value!r}; it must be a number of at least {least}, or None for no limit"
                )
        if not self.deadline_s > 0:
            raise InputError(f"deadline_s of the budget is {self.deadline_s!r}; it must be above 0")


class Calls:
    """Those of one run.

    Attributes:
        made: records, in the order the calls ended.
        budget: see there.

    Args:
        ask: who makes them.
        problem: digest of it, which its seeds depend on.
        seed: of the run; None sends none.
        budget: see `Budget`.
        call_s: most seconds of one call.
        journal: of calls that an earlier run made; None for none.
        clock: seconds.
    """

    def __init__(
        self,
        ask: Ask,
        *,
        problem: str,
        seed: int | None,
        budget: Budget,
        call_s: float,
        journal: Journal | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ask, self._problem, self._seed, self._call_s = ask, problem, seed, call_s
        self.budget, self._journal, self._clock = budget, journal, clock
        self._began, self._before = clock(), _spent(ask)
        self._lost_earlier = Tokens() if journal is None else journal.lost
        self.made: list[CallRecord] = []

    # What is left

    @property
    def elapsed_s(self) -> float:
        """Seconds since it began."""
        return self._clock() - self._began

    @property
    def total(self) -> Tokens:
        """Of all calls that came, those of an earlier run among them."""
        return sum((one.tokens for one in self.made if one.status == "ok"), Tokens())

    @property
    def used(self) -> Tokens:
        """What budgets are held against: of all calls, of failed ones as far as ``ask`` tells what it spent."""
        spent = _spent(self._ask)
        if spent is None or self._before is None:
            return self.total + self._lost_earlier
        replayed = sum((one.tokens for one in self.made if one.status == "ok" and one.is_replayed), Tokens())
        came, earlier = self.total, self._lost_earlier + replayed
        return Tokens(
            max(came.prompt, earlier.prompt + spent.prompt - self._before.prompt),
            max(came.completion, earlier.completion + spent.completion - self._before.completion),
            max(came.cost, earlier.cost + spent.cost - self._before.cost),
            len(self.made),
        )

    @property
    def lost(self) -> Tokens:
        """Of calls that failed; nothing where ``ask`` tells no ``spent``. To be read while none is under way."""
        earlier, spent = self._lost_earlier, _spent(self._ask)
        if spent is None or self._before is None:
            return earlier
        came = sum((one.tokens for one in self.made if one.status == "ok" and not one.is_replayed), Tokens())
        failed = sum(one.status != "ok" and not one.is_replayed for one in self.made)
        return Tokens(
            earlier.prompt + spent.prompt - self._before.prompt - came.prompt,
            earlier.completion + spent.completion - self._before.completion - came.completion,
            # A sum of dollars is not exact: what is below a billionth was not lost.
            earlier.cost + _above_rounding(spent.cost - self._before.cost - came.cost),
            earlier.calls + failed,
        )

    @property
    def left(self) -> float:
        """Calls that may still be made."""
        own = math.inf if self.budget.calls is None else self.budget.calls - len(self.made)
        return max(0.0, min(own, getattr(self._ask, "left", math.inf)))

    @property
    def room(self) -> float:
        """Completion tokens that are left of the budget."""
        return math.inf if self.budget.tokens is None else self.budget.tokens - self.used.completion

    @property
    def left_s(self) -> float:
        """Seconds until all has to be over."""
        return self.budget.deadline_s - self.elapsed_s

    def has_time_for(self, calls: float) -> bool:
        """Whether so many calls, each as slow as the slowest so far, would be over in time."""
        slowest_s = max((one.latency_s for one in self.made), default=0.0)
        return calls * slowest_s <= self.left_s

    @property
    def exhausted(self) -> str:
        """Which budget is used up, in one word; "" for none."""
        if self.room <= 0:
            return "tokens"
        if self.budget.usd is not None and self.used.cost >= self.budget.usd:
            return "usd"
        if self.budget.seconds is not None and self.elapsed_s >= self.budget.seconds:
            return "seconds"
        return ""

    # Calls

    async def __call__(
        self,
        stage: Stage,
        index: int,
        attempt: int,
        system: int,
        arm: Arm,
        messages: Messages,
        *,
        purpose: Purpose | None = None,
        share: float = 1.0,
        **how: Any,
    ) -> Answered:
        """The whole answer, from the journal where it is there. It may take a ``share`` of the time that is left.

        Raises an AnabranchError if none comes, or none in time; DataError for a journal of something else.
        """
        how = self._how(stage, index, attempt, how)
        record = _Open(self, stage, index, attempt, system, arm.model)
        digest = "" if self._journal is None else _digest(arm, messages, how)
        replayed = self._replayed(record, digest)
        if replayed is not None:
            return replayed
        seconds = self._seconds(share)
        try:
            try:
                async with asyncio.timeout(seconds):
                    found = await self._ask(arm, messages, purpose=purpose or PURPOSES[stage], **how)
            except TimeoutError:
                raise LateError(f"{arm.model} took longer than it may for one call of scale") from None
            # Before it is kept: each later run would be given it again.
            if what := wrong_choices(found.choices):
                raise BackendError(f"{arm.model} gave an answer whose {what}")
        except AnabranchError as error:
            record.failed(type(error).__name__)
            if self._journal is not None:
                self._journal.note_failed(record.key, digest, type(error).__name__)
            raise
        record.came(found)
        if self._journal is not None:
            self._journal.note(record.key, digest, found)
        return found

    def _replayed(self, record: "_Open", digest: str) -> Answered | None:
        """What the journal has of a call. Raises BackendError for one that failed, and past which the run went on."""
        if self._journal is None:
            return None
        found = self._journal.find(record.key, digest)
        if found is not None:
            record.came(found, is_replayed=True)
            return found
        status = self._journal.find_failed(record.key, digest)
        if status is not None:
            record.failed(status, is_replayed=True)
            raise BackendError(f"the call failed with {status} in the run before")
        return None

    async def stream(
        self,
        stage: Stage,
        index: int,
        attempt: int,
        system: int,
        arm: Arm,
        messages: Messages,
        *,
        share: float = 1.0,
        **how: Any,
    ) -> AsyncGenerator[Said | Answered, None]:
        """Its pieces as they come, and, last, the whole. Raises as a call does."""
        how = self._how(stage, index, attempt, how)
        record = _Open(self, stage, index, attempt, system, arm.model)
        ends = self._clock() + (self._seconds(share) or math.inf)
        pieces: Any = self._ask.stream(arm, messages, purpose="answer", **how)
        try:
            while True:
                try:
                    # The time of a piece, not of whoever reads it: a timeout must not reach over a yield.
                    async with asyncio.timeout(None if math.isinf(ends) else max(0.0, ends - self._clock())):
                        piece = await anext(pieces, None)
                except TimeoutError:
                    raise LateError(f"{arm.model} took longer than it may for one call of scale") from None
                if piece is None:
                    break
                if isinstance(piece, Answered):
                    record.came(piece)
                yield piece
        except AnabranchError as error:
            record.failed(type(error).__name__)
            raise
        finally:
            close = getattr(pieces, "aclose", None)
            if close is not None:
                await close()

    def settle(self) -> None:
        """Write down what was lost. To be called while no call is under way."""
        if self._journal is not None:
            self._journal.note_lost(self.lost)

    def _seconds(self, share: float) -> float | None:
        """Of the next call. Raises LateError where there are none."""
        left_s = min(self._call_s, share * self.left_s)
        if left_s < LEAST_S:
            raise LateError("no time is left for another call of scale")
        return None if math.isinf(left_s) else left_s

    def _how(self, stage: Stage, index: int, attempt: int, how: Mapping[str, Any]) -> dict[str, Any]:
        made = dict(how)
        if self._seed is not None:
            made["seed"] = seed_of(self._seed, self._problem, stage, index, attempt)
        return made


class _Open:
    """A call that is under way, and becomes a record once."""

    def __init__(self, calls: Calls, stage: Stage, index: int, attempt: int, system: int, model: str) -> None:
        self._calls, self._has_ended = calls, False
        self._fields: dict[str, Any] = {
            "stage": stage,
            "index": index,
            "attempt": attempt,
            "system": system,
            "model": model,
        }

    @property
    def key(self) -> str:
        fields = self._fields
        return f"{fields['stage']}/{fields['index']}/{fields['attempt']}/{fields['system']}"

    def came(self, found: Answered, *, is_replayed: bool = False) -> None:
        self._end(
            is_replayed=is_replayed,
            prompt_tokens=found.prompt_tokens,
            completion_tokens=found.completion_tokens,
            cost=found.cost,
            latency_s=found.latency_s,
        )

    def failed(self, status: str, *, is_replayed: bool = False) -> None:
        self._end(status=status, is_replayed=is_replayed)

    def _end(self, **fields: Any) -> None:
        if not self._has_ended:
            self._has_ended = True
            self._calls.made.append(CallRecord(**self._fields, **fields))


def seed_of(seed: int, problem: str, stage: str, index: int, attempt: int) -> int:
    """Of a call: the same for the same place in the same problem, another for any other."""
    data = f"{seed}|{problem}|{stage}|{index}|{attempt}".encode()
    return int.from_bytes(hashlib.sha256(data).digest()[:4], "big") >> 1


def _spent(ask: Any) -> Tokens | None:
    """What all calls of an ``ask`` came to, failed ones too, where it tells (``spent``: an `anabranch.routers.contract.ask.Spent`)."""
    found = getattr(ask, "spent", None)
    return None if found is None else Tokens(found.prompt_tokens, found.completion_tokens, found.cost, 0)


def _above_rounding(dollars: float) -> float:
    return dollars if dollars > 1e-9 else 0.0


def _digest(arm: Arm, messages: Messages | Sequence[Mapping[str, Any]], how: Mapping[str, Any]) -> str:
    return digest_of([arm.model, dict(arm.settings), arm.system, messages, dict(how)])
