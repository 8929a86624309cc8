"""What `check_strategy` asks of a `Program` beside what it asks of every strategy: its runs, with models that were made up."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from anabranch.errors import AnabranchError, BackendError
from anabranch.routers.contract.ask import Answered, Arm, Ask, Messages, Said
from anabranch.routers.contract.program import Done, Event, Program, ProgramRequest, Shown, Step
from anabranch.routers.contract.query import Pool, Query

# Seconds: with models that answer at once a run takes next to none.
LIMIT_S = 10.0


class MadeModels:
    """Models that answer with their names, or fail.

    Args:
        failing: names of those that fail, or break off where they are streamed.
    """

    def __init__(self, failing: frozenset[str] = frozenset()) -> None:
        self._failing = failing

    async def __call__(self, arm: Arm | str, messages: Messages, *, n: int | None = None, **how: Any) -> Answered:
        """The same words in every choice."""
        name = arm if isinstance(arm, str) else arm.model
        # Others have a turn, as they have while a real model answers.
        await asyncio.sleep(0)
        if name in self._failing:
            raise BackendError(f"{name} does not answer")
        return Answered.saying(*[f"{name} says yes"] * (n or 1), model=name, completion_tokens=3)

    left = float("inf")

    async def stream(self, arm: Arm | str, messages: Messages, **how: Any) -> AsyncIterator[Said | Answered]:
        """Word by word."""
        whole = await self(arm, messages, **how)
        words = whole.text.split(" ")
        for at, word in enumerate(words):
            yield Said(word if at == len(words) - 1 else f"{word} ")
        yield whole


def check_program(program: Program, query: Query, pool: Pool, ask: Ask | None = None) -> None:
    """Raises AssertionError for a run that is none.

    Args:
        program: fitted.
        query: to answer.
        pool: models.
        ask: how it asks them; None for models that were made up.
    """
    usual: Any = MadeModels() if ask is None else ask

    async def run(models: Any, **settings: Any) -> list[Event]:
        decision = program.route(query, pool)
        request = ProgramRequest(query=query, pool=pool, decision=decision, settings=settings)
        async with asyncio.timeout(LIMIT_S):
            return [event async for event in program.run(request, models)]

    async def checks() -> None:
        alone = await run(usual, temperature=0)
        _check_events(alone, pool)
        for other in await asyncio.gather(*(run(usual, temperature=0) for _ in range(4))):
            _is(other == alone, "runs beside one another disturb each other: what is of one request belongs in its run")
        for failing in (pool.names[:1], pool.names):
            try:
                _check_events(await run(MadeModels(frozenset(failing))), pool)
            except AnabranchError:
                _is(len(failing) > 1, f"it fails as soon as {failing[0]} does")

    asyncio.run(checks())


def _check_events(events: list[Event], pool: Pool) -> None:
    said, done = "", None
    for event in events:
        _is(done is None, "it goes on after its end")
        if isinstance(event, Said):
            said += event.text
        elif isinstance(event, Shown | Step):
            kind = type(event).__name__.lower()
            _is(_is_json(event.facts), f"the facts of the {kind} {event.name!r} are not ready for JSON")
        else:
            _is(isinstance(event, Done), f"it yields {type(event).__name__}; it may yield Said, Shown, Step and Done")
            done = event
    _is(bool(said) or done is not None, "it ends without an answer")
    if done is not None and done.message is not None:
        content = done.message.get("content") or ""
        _is(str(content).startswith(said), "it ends with another answer than the one that it began to give")
    if done is not None and done.model:
        _is(done.model in pool.names, f"it names {done.model!r}, which is not in the pool")


def _is_json(facts: Mapping[str, Any]) -> bool:
    try:
        json.dumps(dict(facts), allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def _is(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)
