"""Cascades that ask their models themselves: programs, one draft after another, until one is good enough.

    draft of model 1, judged;  if it will do, it is the answer,  else the draft of model 2;  ...;  the last model's answer as it comes

What tells cascades apart is how a draft is judged: by a learned scorer, by its log-probabilities, by letting its model verify it
(`examine`), or by drawing more of them (`draft`).
"""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from anabranch.errors import AnabranchError
from anabranch.routers.contract.program import Answered, Ask, Done, Event, Program, ProgramRequest, Step
from anabranch.routers.contract.strategy import Facts
from anabranch.routers.strategies.escalate import Escalating


@dataclass(frozen=True, slots=True)
class Draft:
    """A draft, judged.

    Attributes:
        model: whose.
        answer: what would be given; None where the model did not answer.
        is_given: it will do.
        step: how it went.
        confidence: that it will do, as its kind of cascade measures it; NaN where it cannot be told.
    """

    model: str
    answer: Done | None
    is_given: bool
    step: Step
    confidence: float = float("nan")


class Chained(Escalating, Program):
    """Base of cascades. A subclass says ``examine``, or ``draft`` where one answer is not enough."""

    async def run(self, request: ProgramRequest, ask: Ask) -> AsyncIterator[Event]:
        """Draft with the models of the chain one after another until a draft will do; the last one's answer is given as it comes.

        Where models fail, the next is asked, and in the end the last draft there was is better than none. Raises what the last model
        failed with where nobody answered.
        """
        spare: Done | None = None
        drafts: list[Draft] = []
        for name in request.names:
            is_last = name == request.names[-1]
            if is_last or not await self.is_judged(request, name, drafts):
                async for event in given_as_it_comes(request, name, ask, spare, is_last):
                    if not isinstance(event, Done):
                        yield event
                        continue
                    # Who comes after the chain stands in for its last.
                    is_spare = event.is_spare or name not in request.decision.details["chain"]
                    yield replace(event, is_spare=is_spare)
                    return
                continue
            draft = await self.draft(request, name, drafts, ask)
            drafts.append(draft)
            yield draft.step
            spare = draft.answer or spare
            if draft.answer is not None and draft.is_given:
                yield draft.answer
                return

    async def is_judged(self, request: ProgramRequest, model: str, earlier: Sequence[Draft]) -> bool:
        """Whether an answer of this model has to be looked at before it may be given.

        Args:
            request: what for.
            model: that is to be asked.
            earlier: drafts of the models before it.
        """
        # What comes after the chain is there for when the chain fails.
        return model in request.decision.details["chain"][:-1] and threshold_in(request, model) is not None

    async def draft(self, request: ProgramRequest, model: str, earlier: Sequence[Draft], ask: Ask) -> Draft:
        """Ask a model once, as the sender wants it asked, and judge its answer. What it fails with is a draft without an answer."""
        try:
            found = await ask(request.arm(model), request.messages, purpose="draft", **self.asked_with(request))
        except AnabranchError as error:
            return Draft(model, None, False, failed(model, error))
        sure, facts = await self.examine(request, model, found, ask)
        is_given = await self.will_do(request, model, sure, earlier)
        told = {"model": model, **facts, "confidence": round(sure, 4) if np.isfinite(sure) else None}
        step = Step(self.step_name, {**told, **self.bar(request, model), "is_given": is_given})
        return Draft(model, self.given(request, found), is_given, step, sure)

    # What a kind says of its drafts

    # Of the line in the trace that a judged draft makes.
    step_name = "judged"

    def asked_with(self, request: ProgramRequest) -> dict[str, Any]:
        """What a draft is asked for beside what the sender wants."""
        return {}

    async def examine(self, request: ProgramRequest, model: str, found: Answered, ask: Ask) -> tuple[float, Facts]:
        """How sure it is of a draft, NaN where that cannot be told; and what else to tell of it."""
        raise NotImplementedError

    async def will_do(self, request: ProgramRequest, model: str, sure: float, earlier: Sequence[Draft]) -> bool:
        """Whether a draft is given, of which it is so sure. By default, if that reaches the model's threshold."""
        threshold = threshold_in(request, model)
        return threshold is not None and sure >= threshold

    def bar(self, request: ProgramRequest, model: str) -> Facts:
        """What a draft was measured against."""
        return {"threshold": threshold_in(request, model)}

    def given(self, request: ProgramRequest, found: Answered) -> Done:
        """A draft as it is given."""
        return Done.of(found)


def threshold_in(request: ProgramRequest, model: str) -> float | None:
    """Confidence from which an answer of this model is given, as it was decided; None if it always is."""
    threshold: float | None = request.decision.details["thresholds"].get(model)
    return threshold


def failed(model: str, error: AnabranchError) -> Step:
    """A model that gave no answer."""
    return Step("failed", {"model": model, "error": type(error).__name__})


async def given_as_it_comes(
    request: ProgramRequest, name: str, ask: Ask, spare: Done | None, is_last: bool
) -> AsyncIterator[Event]:
    """The answer of a model, piece by piece; where it fails before it said anything, a step, and at the last model what there is else.

    Raises what it failed with where something was said, or nothing else is there.
    """
    said = False
    try:
        async for piece in ask.stream(request.arm(name), request.messages, purpose="answer"):
            said = True
            yield Done.of(piece) if isinstance(piece, Answered) else piece
        return
    except AnabranchError as error:
        yield failed(name, error)
        if said or (spare is None and is_last):
            raise
    if is_last and spare is not None:
        yield replace(spare, is_spare=True)
