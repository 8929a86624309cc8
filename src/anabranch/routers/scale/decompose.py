"""From a problem to steps: asked of System 1 in k candidates of which it chooses the best (paper, eq. 1 and 2), given, or none at all."""

import asyncio
from dataclasses import dataclass
from typing import Any

from anabranch.config import Config as BaseConfig
from anabranch.config import Field, Part, configclass
from anabranch.routers.scale.parsing import choice, outline
from anabranch.routers.scale.prompts import bar_for
from anabranch.routers.scale.work import Work


@dataclass(frozen=True, slots=True)
class Outline:
    """What was made of a problem.

    Attributes:
        steps: in order, at least one.
        chosen: which candidate it was, from 0; None where the problem is one step.
        num_candidates: that could be read.
    """

    steps: tuple[str, ...]
    chosen: int | None = None
    num_candidates: int = 0


class Decomposer(Part, family="decomposer"):
    """Interface."""

    @configclass
    class Config(BaseConfig):
        """Nothing in common."""

    def __init__(self, config: Any) -> None:
        self.config = config

    async def decompose(self, work: Work) -> Outline:
        """Steps of the problem; what goes wrong is noted, and the problem is one step then."""
        raise NotImplementedError


def alone(work: Work, num_candidates: int = 0) -> Outline:
    """The problem as one step."""
    return Outline((work.prompts.fill("question", work.systems[1].arm.model),), None, num_candidates)


class Identity(Decomposer, kind="identity"):
    """One step: what is left is to choose a system for the whole problem."""

    async def decompose(self, work: Work) -> Outline:
        """At once."""
        return alone(work)


class Given(Decomposer, kind="given"):
    """Steps that somebody wrote."""

    @configclass
    class Config(Decomposer.Config):
        """Them.

        Attributes:
            steps: in order.
        """

        steps: tuple[str, ...] = Field(min_length=1)

    async def decompose(self, work: Work) -> Outline:
        """As they are; more than ``max_steps`` too, since whoever wrote them meant them."""
        return Outline(tuple(self.config.steps), 0, 1)


class Prompted(Decomposer, kind="prompt"):
    """k outlines of System 1, and its own choice among them."""

    @configclass
    class Config(Decomposer.Config):
        """How many.

        Attributes:
            k: candidates, asked for all at once.
        """

        k: int = Field(default=8, ge=1, le=64)  # the paper's

    async def decompose(self, work: Work) -> Outline:
        """Candidates that can be read, and the chosen one of them.

        Where none can be read, one more is asked for at a time, until there were ``retries``; then the problem is one step. Where no choice
        can be read in ``retries`` attempts, the first candidate is taken.
        """
        # One call for the choice and one for an answer have to be left.
        k = int(min(self.config.k, work.calls.left - 2))
        if k < 1 or work.calls.exhausted:
            work.note("outline: no room for it; the problem is one step", degrades=True)
            return alone(work)
        if k < self.config.k:
            work.note(f"outline: room for {k} candidates of {self.config.k}", degrades=True)
        found = list(await asyncio.gather(*(self._candidate(work, index, 0) for index in range(k))))
        for attempt in range(1, work.settings.retries):
            if any(found) or not has_room(work):
                break
            found.append(await self._candidate(work, 0, attempt))
        usable = [steps for steps in found if steps]
        if not usable:
            work.note("outline: none could be read; the problem is one step", degrades=True)
            return alone(work)
        best = await self._chosen(work, usable)
        return Outline(self._ended(work, usable[best]), best, len(usable))

    async def _candidate(self, work: Work, index: int, attempt: int) -> tuple[str, ...] | None:
        most = max(1, work.settings.max_steps - (work.settings.last_step == "append"))
        problem, model = work.problem.text, work.systems[1].arm.model
        prompt = work.prompts.fill("outline", model, bar=bar_for([problem]), problem=problem, most=most)
        answer = await work.cheap("outline", index, attempt, prompt, max_tokens=work.settings.outline_tokens)
        steps = None if answer is None else outline(answer.text, most=most)
        if answer is not None and steps is None:
            work.note(f"outline {index + 1}: not readable")
        return steps

    async def _chosen(self, work: Work, usable: list[tuple[str, ...]]) -> int:
        if len(set(usable)) == 1:
            return 0
        problem, model = work.problem.text, work.systems[1].arm.model
        bar = bar_for([problem, *(step for steps in usable for step in steps)])
        versions = "\n\n".join(
            work.prompts.fill("version_of", model, bar=bar, number=number, steps=_numbered(steps))
            for number, steps in enumerate(usable, start=1)
        )
        prompt = work.prompts.fill("select", model, bar=bar, problem=problem, count=len(usable), versions=versions)
        for attempt in range(work.settings.retries):
            if not has_room(work):
                break
            answer = await work.cheap("select", 0, attempt, prompt, max_tokens=work.settings.score_tokens)
            best = None if answer is None else choice(answer.text, len(usable))
            if best is not None:
                return best
        work.note("select: no choice could be read; the first outline is taken")
        return 0

    def _ended(self, work: Work, steps: tuple[str, ...]) -> tuple[str, ...]:
        """The outline with the question at its end."""
        model, how = work.systems[1].arm.model, work.settings.last_step
        question = work.prompts.fill("question", model)
        if how == "append":
            return (*steps, question)
        last = question if how == "replace" else work.prompts.fill("joined", model, step=steps[-1])
        return (*steps[:-1], last)


def has_room(work: Work) -> bool:
    """Whether one more call may be made before there is an answer: it, a step and the last one have to fit."""
    return work.calls.left > 1 and not work.calls.exhausted and work.calls.has_time_for(3)


def _numbered(steps: tuple[str, ...]) -> str:
    return "\n".join(f"{number}. {step}" for number, step in enumerate(steps, start=1))
