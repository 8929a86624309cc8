"""How strategies and programs ask models: through an `Ask` that whoever runs them lends for one request, and that pays for its calls.

    answered = await ask("small", "Is 7 prime? Yes or no.", max_tokens=2, temperature=0)
    answered = await ask(Arm("large", settings={"reasoning_effort": "high"}), query.messages, n=4, seed=1)
    answered.text, answered.texts, answered.completion_tokens, answered.cost

In a gateway each call is charged to the request it was lent for, goes only to models that the request's key may use, and has a row of
its own in the ledger. An `Ask` is good until its request is over; one that is kept for the next request raises an InputError there.
"""

from collections.abc import AsyncIterator, Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, Self

# What a model is asked for, as ledger and metrics call it.
Purpose = Literal["route", "draft", "judge", "answer", "other"]
Messages = str | Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Arm:
    """A model, and how it is asked: two arms of one model may think or not, or be told different things.

    Attributes:
        model: its name in the pool.
        settings: further fields of OpenAI's chat request (``reasoning_effort``, ``temperature``, ``tools``); what a call says itself wins.
        system: system prompt in the place of the conversation's own; None leaves that.
        samples: answers to draw in one call where it does not say how many.
    """

    model: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    system: str | None = None
    samples: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """What came of a call.

    Attributes:
        model: that was asked.
        choices: in OpenAI's form, at least one: ``message``, ``finish_reason``, perhaps ``logprobs``.
        prompt_tokens, completion_tokens, cached_tokens: of all attempts at it.
        cost: dollars, likewise, as far as known when it came.
        latency_s: seconds that it took.
        is_counted: the tokens are what the model's endpoint told; where it told none, or what cannot be, they are 0.
    """

    model: str
    choices: tuple[Mapping[str, Any], ...]
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    cost: float = 0.0
    latency_s: float = 0.0
    is_counted: bool = True

    @classmethod
    def saying(cls, *texts: str, model: str = "", **fields: Any) -> Self:
        """One that says these texts, for whoever plays a model."""
        choices = ({"message": {"role": "assistant", "content": text}, "finish_reason": "stop"} for text in texts)
        return cls(model=model, choices=tuple(choices), **fields)

    @property
    def text(self) -> str:
        """What the first choice says; empty where that is no text (tool calls)."""
        return self.texts[0]

    @property
    def texts(self) -> tuple[str, ...]:
        """What each choice says; empty for those that are no text."""
        messages = (choice.get("message") for choice in self.choices)
        said = (message.get("content") if isinstance(message, Mapping) else None for message in messages)
        return tuple(text if isinstance(text, str) else "" for text in said)

    def logprobs(self, choice: int = 0) -> list[Mapping[str, Any]]:
        """Tokens of a choice with ``logprob`` and ``top_logprobs``; empty where they were not asked for, or not given."""
        told = self.choices[choice].get("logprobs") or {}
        tokens = told.get("content") if isinstance(told, Mapping) else None
        return list(tokens) if isinstance(tokens, list) else []


@dataclass(frozen=True, slots=True)
class Said:
    """A further piece of an answer.

    Attributes:
        text: that comes after what was said before.
    """

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What all calls made through an `Ask` came to so far, those among them that failed: what a ledger has of them.

    An `Ask` that knows it says so as ``spent``; it is to be read while no call is under way.

    Attributes:
        prompt_tokens, completion_tokens: of all attempts at all calls.
        cost: dollars.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0


class Ask(Protocol):
    """See the module.

    One that knows what a call may cost at most says so as ``async most(arm, messages, ...)``, in dollars; one that can keep the rest of a
    request within an amount does so after ``bound(usd, name)``, whose name is that of the setting.

    Args of both methods:
        arm: a model's name, or one with settings.
        messages: a conversation in OpenAI's form, or the text of one user's message. Messages that were sent stay as they are: another
            question is another list, of new messages where they say something else.
        n: answers to draw; None for the arm's.
        max_tokens: of each answer; None for the arm's setting, or the model's own limit.
        temperature, seed: None for the arm's setting.
        logprobs: how many alternatives to tell with each token; 0 tells the chosen ones alone, None nothing.
        stop: texts at which an answer ends.
        purpose: None for ``route`` while a strategy decides, ``judge`` while it judges an answer, ``draft`` in a program.

    Both raise an AnabranchError if no answer comes, or the call may not be made; it says whether that was for want of room
    (``is_for_room``).
    """

    @property
    def left(self) -> float:
        """Calls that may still be made for the request; infinity where nobody counts them."""

    def __call__(
        self,
        arm: Arm | str,
        messages: Messages,
        *,
        n: int | None = None,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        logprobs: int | None = None,
        stop: Sequence[str] = (),
        purpose: Purpose | None = None,
    ) -> Awaitable[Answered]:
        """The whole answer."""

    def stream(
        self,
        arm: Arm | str,
        messages: Messages,
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
        purpose: Purpose | None = None,
    ) -> AsyncIterator[Said | Answered]:
        """Its pieces as they come, and, last, the whole. Whoever does not read to its end closes it."""
