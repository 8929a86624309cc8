"""Models for SCALE that say what a test wrote, stage by stage, and count what a ledger would."""

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any

from anabranch.errors import BackendError
from anabranch.routers.contract.ask import Answered, Arm, Said, Spent

MARKS = {
    "Split it into an ordered list": "outline",
    "Which version is best?": "select",
    "How hard is this step?": "score",
    "Reply with its result at once": "draft",
    "Now do the last step": "last",
    "Do this step alone": "solve",
}
STEPS = ("Find a.", "Find b.", "Add them.")


def stage_of(messages: Any) -> str:
    """Of a prompt of SCALE's; "plain" for a question as it came."""
    text = messages if isinstance(messages, str) else messages[-1]["content"]
    if isinstance(text, list):
        text = text[-1]["text"]
    return next((stage for mark, stage in MARKS.items() if mark in text), "plain")


def text_of(messages: Any) -> str:
    content = messages if isinstance(messages, str) else messages[-1]["content"]
    return content if isinstance(content, str) else content[-1]["text"]


def outline_of(steps: tuple[str, ...] = STEPS) -> str:
    return json.dumps({f"step{number}": step for number, step in enumerate(steps, start=1)})


def step_of(text: str) -> str:
    """The step that a prompt is about, between the last pair of lines; a text without any is all of it."""
    bars = [at for at, line in enumerate(text.splitlines()) if line and not line.strip("=")]
    return "\n".join(text.splitlines()[bars[-2] + 1 : bars[-1]]) if len(bars) > 1 else text


@dataclass
class Models:
    """An `Ask`.

    Attributes:
        says: by stage, a text, an error, or a function of (model, prompt, call) to one of them.
        left: calls that may still be made.
        lose: completion tokens that a failing call is charged.
        asked: (stage, arm, prompt, settings of the call) of each call.
    """

    says: dict[str, Any] = field(default_factory=dict)
    left: float = float("inf")
    lose: int = 0
    wait_s: float = 0.0
    asked: list[tuple[str, Arm, str, dict[str, Any]]] = field(default_factory=list)
    spent: Spent = field(default_factory=Spent)

    async def __call__(self, arm: Any, messages: Any, **how: Any) -> Answered:
        arm = Arm(arm) if isinstance(arm, str) else arm
        stage, text = stage_of(messages), text_of(messages)
        self.asked.append((stage, arm, text, how))
        self.left, number = self.left - 1, len(self.asked)
        await asyncio.sleep(self.wait_s)
        said = self.says.get(stage, self.says.get("solve" if stage in ("last", "plain") else stage, "1"))
        said = said(arm.model, text, number) if callable(said) else said
        if isinstance(said, Exception):
            self._pay(len(text.split()), self.lose, arm.model)
            raise said
        found = said if isinstance(said, Answered) else Answered.saying(said)
        prompt, completion = len(text.split()), max(1, len(found.text.split()))
        cost = self._pay(prompt, completion, arm.model)
        return Answered(
            model=arm.model,
            choices=found.choices,
            prompt_tokens=prompt,
            completion_tokens=completion,
            cost=cost,
            latency_s=0.25,
        )

    def _pay(self, prompt: int, completion: int, model: str) -> float:
        cost = (prompt + 2 * completion) * (1e-6 if model == "small" else 1e-5)
        self.spent = Spent(
            prompt_tokens=self.spent.prompt_tokens + prompt,
            completion_tokens=self.spent.completion_tokens + completion,
            cost=self.spent.cost + cost,
        )
        return cost

    async def stream(self, arm: Any, messages: Any, **how: Any) -> Any:
        found = await self(arm, messages, **how)
        for word in found.text.split(" "):
            yield Said(word if found.text.endswith(word) else f"{word} ")
        yield found

    @property
    def stages(self) -> list[str]:
        return [stage for stage, *_ in self.asked]

    def models(self, *stages: str) -> list[str]:
        return [arm.model for stage, arm, *_ in self.asked if stage in stages]


def down(*_: Any) -> BackendError:
    return BackendError("it is down")


def usual(**more: Any) -> dict[str, Any]:
    """Three steps, each of difficulty 0.3, and answers that say which model gave them to what."""
    said = {
        "outline": outline_of(),
        "select": "version1",
        "score": "0.3",
        "solve": lambda model, text, _: rf"{model} did: {step_of(text)} \boxed{{{model}}}",
    }
    return {**said, **more}
