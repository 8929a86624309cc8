"""The seam beside `Strategy`: a `Program` answers itself, asking as many models as often as it wants.

    run(request, ask) -> events      Said("a piece of the answer"), Step("what was done", {...}), Shown("what may be seen", {...}), and
                                     Done.of(answered) at the end

What it says is sent on as it comes, so a program streams where it can: `Ask.stream` gives pieces that may be passed on as they are. What
it asked, the ledger holds call by call; what else explains its answer it tells in steps, which are its trace.

A program is a strategy too: `route` orders the models that it may ask, for whoever wants to know where a request would go, and for the
request itself where the program fails before it has said anything. What it learns (`fit`, `observe`) and keeps (`state`) is as there.

    class Best(Program):
        async def run(self, request, ask):
            drafts = await asyncio.gather(*(ask(name, request.messages) for name in request.names))
            yield Step("drafts", {"tokens": [draft.completion_tokens for draft in drafts]})
            yield Done.of(max(drafts, key=lambda draft: len(draft.text)))
"""

import json
import math
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from anabranch.errors import InputError
from anabranch.routers.contract.ask import Answered, Arm, Ask, Messages, Purpose, Said
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.query import Decision, Pool, Query
from anabranch.routers.contract.strategy import Played, Strategy, ordered

__all__ = [
    "Answered",
    "Arm",
    "Ask",
    "Done",
    "Event",
    "Messages",
    "Program",
    "ProgramRequest",
    "Purpose",
    "Said",
    "Shown",
    "Step",
]


# What asks for words, as nothing does.
_PLAIN: Mapping[str, Any] = {"modalities": ["text"], "response_format": {"type": "text"}}


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramRequest:
    """What a program is to answer.

    Attributes:
        query: with the conversation, and whose it is.
        pool: models, those that the request may not use, or whose deployments do not answer, marked as not available.
        decision: what `route` said of it.
        settings: what else the sender asked for, in OpenAI's form (``temperature``, ``max_tokens``, ``tools``, ``response_format``): made
            to be an `Arm`'s.
        is_streamed: the sender reads the answer as it is made.
        left_s: seconds from now until it must have ended; infinity where nobody says.
    """

    query: Query
    pool: Pool
    decision: Decision
    settings: Mapping[str, Any] = field(default_factory=dict)
    is_streamed: bool = False
    left_s: float = math.inf

    @property
    def messages(self) -> Messages:
        """The conversation, or the query's text where there is none."""
        return self.query.messages or self.query.text

    @property
    def names(self) -> tuple[str, ...]:
        """Models that may be asked, best first."""
        open_names = {model.name for model in self.pool.models if model.is_available}
        names = tuple(one.model for one in self.decision.candidates)
        return tuple(name for name in names if name in open_names) or names

    def asks_for(self, *names: str) -> bool:
        """Whether the sender set one of these to something else than what asks for plain words."""
        asked = [(name, self.settings.get(name)) for name in names]
        return any(value and value != _PLAIN.get(name) for name, value in asked)

    def arm(self, model: str, **settings: Any) -> Arm:
        """A model asked as the sender wants it, but for these settings."""
        return Arm(model, {**self.settings, **settings})


@dataclass(frozen=True, slots=True)
class Step:
    """Something that the program did: a line of its trace.

    Attributes:
        name: short.
        facts: ready for JSON, and no text of sender or model: traces are kept where texts are not.
    """

    name: str
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Shown:
    """Something that the sender, who asked for it, is shown while the answer is made: no part of that, and in no trace that is kept.

    A stream has it as a chunk without choices, whose ``trace`` it is; a whole answer has all of them as a list, ``trace``.

    Attributes:
        name: short; its ``event``.
        facts: ready for JSON; texts may be among them.
    """

    name: str
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """The end of an answer.

    Attributes:
        message: the whole in OpenAI's form; it begins with all that was `Said`, and what is missing of it is said then. None where that
            was all.
        model: whose answer it is, as headers and ledger tell it.
        finish_reason: OpenAI's.
        logprobs: likewise.
        is_spare: better than none: what the program would give could not be had now. Whoever asks the same later than a while is not
            given it from a cache, and whoever gets it whole is told so in a header, ``x-route-spare``.
        why: it is, in a few words without texts of sender or model; "" for no more than that.
    """

    message: Mapping[str, Any] | None = None
    model: str = ""
    finish_reason: str = "stop"
    logprobs: Mapping[str, Any] | None = None
    is_spare: bool = False
    why: str = ""

    @classmethod
    def of(cls, answered: Answered, choice: int = 0) -> Self:
        """One of the answers that a model gave, without what a model wrote there that JSON does not have (NaN)."""
        given = answered.choices[choice]
        message, reason, logprobs = (given.get(name) for name in ("message", "finish_reason", "logprobs"))
        message = message if isinstance(message, Mapping) else {}
        if not is_json(message):
            message = {name: value for name, value in message.items() if is_json(value)}
        return cls(
            message=message,
            model=answered.model,
            finish_reason=reason if isinstance(reason, str) and reason else "stop",
            logprobs=logprobs if isinstance(logprobs, Mapping) and is_json(logprobs) else None,
        )


def is_json(value: Any) -> bool:
    """Whether JSON has such a value."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


Event = Said | Shown | Step | Done


class Program(Strategy):
    """Interface: a request in, its answer out, event by event."""

    def run(self, request: ProgramRequest, ask: Ask) -> AsyncIterator[Event]:
        """Answer: an async generator of events. The first `Done` is its end, and so is its own end after something was said.

        It is closed where nobody wants the answer any more. Raises what it cannot go on from.
        """
        raise NotImplementedError

    def route(self, query: Query, pool: Pool) -> Decision:
        """By default all models, in the order of the pool."""
        return Decision(
            candidates=ordered(pool, [-float(at) for at in range(len(pool))]),
            strategy=self.name,
            reason=f"{self.name} answers itself, and may ask any model",
        )

    def play(self, data: Recorded, pool: Pool) -> Played:
        """Raises InputError unless a program says its own: recorded answers of single models do not tell what it would have said."""
        raise InputError(f"{self.name} answers itself; recorded outcomes of single models do not hold its answers")
