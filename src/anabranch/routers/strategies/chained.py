"""Cascades that ask their models themselves: programs, one draft after another, until one is good enough.

    draft of model 1, judged;  if it will do, it is the answer,  else the draft of model 2;  ...;  the last model's answer as it comes

What a kind of cascade does to judge a draft, sampling more, asking for log-probabilities, having it verified, is its `draft`.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass

from anabranch.errors import AnabranchError
from anabranch.routers.contract.program import Answered, Ask, Done, Event, Program, ProgramRequest, Step
from anabranch.routers.strategies.escalate import Escalating


@dataclass(frozen=True, slots=True)
class Draft:
    """A draft, judged.

    Attributes:
        answer: what would be given; None where the model did not answer.
        is_given: it will do.
        step: how it went.
    """

    answer: Done | None
    is_given: bool
    step: Step


class Chained(Escalating, Program):
    """Base of cascades that are programs. A subclass says ``draft``."""

    # It judges its drafts itself.
    reads_answers = False

    async def draft(self, request: ProgramRequest, model: str, threshold: float, ask: Ask) -> Draft:
        """Ask a model, and judge its answer by the threshold. What it fails with is no error, but a draft without an answer."""
        raise NotImplementedError

    async def run(self, request: ProgramRequest, ask: Ask) -> AsyncIterator[Event]:
        """Draft with the models of the chain one after another until a draft will do; the last one's answer is given as it comes.

        Where models fail, the next is asked, and in the end the last draft there was is better than none. Raises what the last model
        failed with where nobody answered.
        """
        # The rest is there for when the chain fails.
        judged, thresholds = request.decision.details["chain"][:-1], request.decision.details["thresholds"]
        spare: Done | None = None
        for name in request.names:
            is_last = name == request.names[-1]
            threshold = thresholds.get(name) if name in judged and not is_last else None
            if threshold is None:
                async for event in given_as_it_comes(request, name, ask, spare, is_last):
                    yield event
                    if isinstance(event, Done):
                        return
                continue
            draft = await self.draft(request, name, threshold, ask)
            yield draft.step
            spare = draft.answer or spare
            if draft.answer is not None and draft.is_given:
                yield draft.answer
                return


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
        yield Step("failed", {"model": name, "error": type(error).__name__})
        if said or (spare is None and is_last):
            raise
    if is_last and spare is not None:
        yield spare
