"""What the stages of one run share: the problem, the two systems, the prompts, the calls, and what was noted on the way."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Self

from anabranch.errors import AnabranchError, DataError, InputError
from anabranch.routers.contract.ask import Answered, Arm
from anabranch.routers.scale.calls import Calls
from anabranch.routers.scale.journal import digest_of
from anabranch.routers.scale.parsing import boxed
from anabranch.routers.scale.prompts import Prompts, bar_for
from anabranch.routers.scale.records import Stage

# Bytes of a token, roughly: only for telling that a window may overflow.
BYTES_PER_TOKEN = 4
# Of the time that is left, what an outline, a choice or a score may take: the rest is for answers.
OVERHEAD_SHARE = 0.5
# Characters that stay of a result that has no box, where the window is too small for all of it.
KEPT = 400


@dataclass(frozen=True, slots=True)
class Problem:
    """What is to be solved.

    Attributes:
        text: of the question.
        before: messages that come before it, in OpenAI's form: system prompts, earlier turns.
        parts: of the question's message beside its text (pictures).
    """

    text: str
    before: tuple[Mapping[str, Any], ...] = ()
    parts: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text.strip():
            raise InputError("the problem is empty; scale needs a question in words")

    @classmethod
    def of(cls, messages: "str | Sequence[Mapping[str, Any]]") -> Self:
        """Of a conversation, whose last message is a user's. Raises InputError for another, and for one without words."""
        if isinstance(messages, str):
            return cls(messages)
        if not messages or messages[-1].get("role") != "user":
            raise InputError("the last message is not a user's; scale answers questions")
        content = messages[-1].get("content")
        if isinstance(content, str):
            return cls(content, tuple(messages[:-1]))
        listed = [one for one in content if isinstance(one, Mapping)] if isinstance(content, list) else []
        text = "\n".join(
            one["text"] for one in listed if one.get("type") == "text" and isinstance(one.get("text"), str)
        )
        return cls(text, tuple(messages[:-1]), tuple(one for one in listed if one.get("type") != "text"))

    @property
    def digest(self) -> str:
        """Of all of it."""
        return digest_of([self.text, list(self.before), list(self.parts)])

    @property
    def as_it_came(self) -> list[dict[str, Any]]:
        """The conversation."""
        return self.asked(self.text)

    def asked(self, prompt: str) -> list[dict[str, Any]]:
        """The conversation with another text in the place of the question."""
        content: Any = prompt if not self.parts else [*self.parts, {"type": "text", "text": prompt}]
        return [*(dict(one) for one in self.before), {"role": "user", "content": content}]


@dataclass(frozen=True, slots=True, kw_only=True)
class System:
    """One of the two modes.

    Attributes:
        arm: model, and what switches its thinking on or off.
        max_tokens: of a step's answer; None for the model's own limit.
        window: tokens that a prompt and its answer may have; None if unknown.
        usd_per_token: of completion, for budgets in dollars; None if unknown.
        expected_tokens: of a step's answer, before any was seen.
    """

    arm: Arm
    max_tokens: int | None = None
    window: int | None = None
    usd_per_token: float | None = None
    expected_tokens: float = 256.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Of a run. The defaults are the paper's and its code's.

    Attributes:
        rescore: ``online`` scores a step once those before are solved, with their results (paper, eq. 3); ``upfront`` all at once, before
            any is solved, with their texts alone (code).
        force_last: ``system2`` answers the last of several steps in System 2 whatever its score; ``score`` does as it says.
        last_step: what is made of the last step of an outline: ``join`` has it end with the question, ``append`` puts the question after
            it, ``replace`` in its place (code; what the step held is lost).
        max_steps: of an outline.
        retries: attempts at a reply that has to be read, before what is documented is taken in its place.
        temperature, top_p, top_k: of all calls; None sends none.
        score_tokens, outline_tokens: of such replies; None for the model's own limit.
        call_s: most seconds of one call.
        seed: of the run; None sends none.
        samples2: answers that System 2 gives to a step at most, of which the commonest is taken (`several`); 1 is the paper's. At a
            temperature of 0, where all are the same, it is one.
        batch2: of those at a time.
        least_gain2: chance of solving the step from which one more is worth drawing.
    """

    rescore: Literal["online", "upfront"] = "online"
    force_last: Literal["system2", "score"] = "system2"
    last_step: Literal["join", "append", "replace"] = "join"
    max_steps: int = 16
    retries: int = 3
    temperature: float | None = 0.6
    top_p: float | None = 0.95
    top_k: int | None = None
    score_tokens: int = 64
    outline_tokens: int | None = None
    call_s: float = 300.0
    seed: int | None = 0
    samples2: int = 1
    batch2: int = 3
    least_gain2: float = 0.01

    def __post_init__(self) -> None:
        for name, allowed in (
            ("rescore", ("online", "upfront")),
            ("force_last", ("system2", "score")),
            ("last_step", ("join", "append", "replace")),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(f"{name} is {getattr(self, name)!r}; it must be one of {', '.join(allowed)}")
        for name in ("max_steps", "retries", "score_tokens", "samples2", "batch2"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise InputError(f"{name} is {value!r}; it must be a whole number of at least 1")
        if not 0 < self.least_gain2 < 1:
            raise InputError(f"least_gain2 is {self.least_gain2!r}; it must be above 0 and below 1")
        if not 0 < self.call_s < math.inf:
            raise InputError(f"call_s is {self.call_s!r}; it must be above 0, in seconds")

    @property
    def sampling(self) -> dict[str, Any]:
        """As settings of a call."""
        given = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(slots=True)
class Earlier:
    """A step before: C_i holds each once, in order.

    Attributes:
        text: of the step.
        answer: its result; None where it is not solved.
    """

    text: str
    answer: str | None = None


@dataclass(slots=True)
class Work:
    """One run.

    Attributes:
        problem, systems, settings, prompts, calls: see there; systems by number.
        notes: what went otherwise than meant.
        is_degraded: less was done than was wanted.
    """

    problem: Problem
    systems: Mapping[int, System]
    settings: Settings
    prompts: Prompts
    calls: Calls
    notes: list[str] = field(default_factory=list)
    is_degraded: bool = False

    def note(self, what: str, *, degrades: bool = False) -> None:
        """Told in the trace."""
        self.notes.append(what)
        self.is_degraded = self.is_degraded or degrades

    async def cheap(self, stage: Stage, index: int, attempt: int, prompt: str, **how: Any) -> Answered | None:
        """System 1's reply to a prompt; None, and a note, where none comes."""
        arm = self.arm(1)
        try:
            return await self.calls(
                stage, index, attempt, 1, arm, self.problem.asked(prompt), share=OVERHEAD_SHARE, **how
            )
        except DataError:
            # The journal is of something else: no answer would help.
            raise
        except AnabranchError as error:
            self.note(f"{stage} {index + 1}: {type(error).__name__}")
            return None

    def arm(self, system: int, sender: Mapping[str, Any] | None = None) -> Arm:
        """A system as it is asked: with the run's sampling, what the sender wants, and what makes it this system."""
        arm = self.systems[system].arm
        return replace(arm, settings={**self.settings.sampling, **(sender or {}), **arm.settings})

    def prompt(self, name: str, system: int, step: str, earlier: Sequence[Earlier]) -> str:
        """One of the prompts about a step."""
        model = self.systems[system].arm.model
        texts = [self.problem.text, step, *(one.text for one in earlier), *(one.answer or "" for one in earlier)]
        bar = bar_for(texts)
        done = []
        for number, one in enumerate(earlier, start=1):
            if one.answer is None:
                done.append(self.prompts.fill("planned", model, number=number, step=one.text))
            else:
                done.append(self.prompts.fill("done", model, number=number, step=one.text, answer=one.answer, bar=bar))
        text = "".join(f"\n{one}\n" for one in done)
        return self.prompts.fill(name, model, bar=bar, problem=self.problem.text, earlier=text, step=step)

    def fit(self, system: int, step: str, earlier: Sequence[Earlier]) -> None:
        """Shorten the results of the oldest steps until a prompt fits the system's window, as far as that goes.

        Raises InputError where the problem alone does not: it is never cut.
        """
        found = self.systems[system]
        if found.window is None:
            return
        answer = min(found.max_tokens or found.window, found.window // 4)
        room = (found.window - answer) * BYTES_PER_TOKEN
        if len(self.problem.text.encode()) > found.window * BYTES_PER_TOKEN:
            tokens = len(self.problem.text.encode()) // BYTES_PER_TOKEN
            raise InputError(
                f"the problem has about {tokens:,} tokens; the window of {found.arm.model} holds {found.window:,} with the answer"
            )
        for number, one in enumerate(earlier, start=1):
            if len(self.prompt("solve", system, step, earlier).encode()) <= room:
                return
            short = None if one.answer is None else shortened(one.answer)
            if short is not None and one.answer is not None and len(short) < len(one.answer):
                one.answer = short
                self.note(f"step {number}: its result was shortened to fit the window")


def shortened(answer: str) -> str:
    """What a result comes to: what its box holds, else its end."""
    box = boxed(answer)
    if box is not None:
        return rf"\boxed{{{box}}}"
    return answer if len(answer) <= KEPT else f"[...] {answer[-KEPT:]}"
