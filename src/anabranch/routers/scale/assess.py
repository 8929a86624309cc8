"""How hard a step is, from 0 to 1: asked of System 1, measured on cheap drafts of it, told by a trained probe, or known.

    prompt         System 1 is asked for a number (paper: 0 to 0.5 a pupil does it quickly, 0.5 to 1 it needs long thought or fails)
    entropy        1 - exp(-H / scale), H the mean entropy of the tokens of a short draft of System 1, in nats
    disagreement   (1 - share of the commonest answer among m drafts), stretched so that m different ones are 1
    probe          1 - p1 of a small classifier on an embedding of the step (`probe`)
    constant       what the config says;   `Oracle`: what a function says

A difficulty that was measured makes chances of success: p1 = 1 - d, p2 = the larger of p1 and ``success2``; a probe has its own.
"""

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from anabranch.config import Config as BaseConfig
from anabranch.config import Field, Part, configclass
from anabranch.errors import InputError
from anabranch.routers.contract.ask import Answered
from anabranch.routers.scale.decompose import has_room
from anabranch.routers.scale.parsing import score
from anabranch.routers.scale.rules import Score
from anabranch.routers.scale.work import Earlier, Work
from anabranch.routers.strategies.consistency import commonest
from anabranch.routers.strategies.logprob import measured

# Attempts of one time that a step is scored: those of the next time have other numbers, and so other seeds.
ROUND = 100


@dataclass(frozen=True, slots=True)
class View:
    """A step as it is scored.

    Attributes:
        index: from 0.
        text: of it.
        earlier: those before, with results where they are solved.
        round: 0 before any was solved, 1 when it is the next.
    """

    index: int
    text: str
    earlier: Sequence[Earlier]
    round: int = 0


class Assessor(Part, family="assessor"):
    """Interface.

    Attributes:
        calls: of models that one score takes at most, beside attempts at reading it.
        is_ready: it can score; one that has to learn first cannot.
    """

    @configclass
    class Config(BaseConfig):
        """What all have.

        Attributes:
            success2: chance that System 2 answers a step rightly, where nothing better is known.
        """

        success2: float = Field(default=0.95, gt=0, le=1)

    calls: int = 0

    def __init__(self, config: Any) -> None:
        self.config = config

    @property
    def is_ready(self) -> bool:
        """See the class."""
        return True

    async def assess(self, work: Work, view: View) -> Score | None:
        """How hard a step is; None where that could not be found out."""
        raise NotImplementedError

    def scored(self, difficulty: float) -> Score:
        """With the chances that a difficulty makes."""
        p1 = 1.0 - difficulty
        return Score(difficulty, p1, max(p1, self.config.success2))


class Constant(Assessor, kind="constant"):
    """The same for every step."""

    @configclass
    class Config(Assessor.Config):
        """It.

        Attributes:
            difficulty: of each step.
        """

        difficulty: float = Field(default=1.0, ge=0, le=1)

    async def assess(self, work: Work, view: View) -> Score:
        """At once."""
        return self.scored(self.config.difficulty)


class Oracle(Assessor):
    """What a function says of a step: its place, and its text, to a difficulty or a `Score`.

    Args:
        tell: the function.
    """

    def __init__(self, tell: Callable[[int, str], "float | Score"]) -> None:
        super().__init__(self.Config())
        self._tell = tell

    async def assess(self, work: Work, view: View) -> Score:
        """Raises InputError for what is no difficulty."""
        found = self._tell(view.index, view.text)
        if isinstance(found, Score):
            return found
        if not 0 <= found <= 1:
            raise InputError(f"the difficulty of step {view.index + 1} is {found!r}; it must be from 0 to 1")
        return self.scored(float(found))


class PromptScore(Assessor, kind="prompt"):
    """System 1 is asked for a number."""

    calls = 1

    async def assess(self, work: Work, view: View) -> Score | None:
        """The first of ``retries`` replies that is one."""
        prompt = work.prompt("score", 1, view.text, view.earlier)
        for attempt in range(work.settings.retries):
            if attempt and not has_room(work):
                break
            answer = await work.cheap(
                "score", view.index, view.round * ROUND + attempt, prompt, max_tokens=work.settings.score_tokens
            )
            found = None if answer is None else score(answer.text)
            if found is not None:
                return self.scored(found)
        return None


class Entropy(Assessor, kind="entropy"):
    """How undecided System 1's tokens are in a short draft of the step."""

    calls = 1

    @configclass
    class Config(Assessor.Config):
        """The draft, and the scale.

        Attributes:
            max_tokens: of the draft.
            alternatives: to each token that are asked for.
            scale: nats at which the difficulty is 1 - 1/e.
        """

        max_tokens: int = Field(default=64, ge=1)
        alternatives: int = Field(default=5, ge=1, le=20)
        scale: float = Field(default=1.0, gt=0)

    async def assess(self, work: Work, view: View) -> Score | None:
        """None where the model tells no log-probabilities."""
        answer = await _draft(work, view, 0, self.config.max_tokens, logprobs=self.config.alternatives)
        nats = math.nan if answer is None else measured(answer.logprobs(), "entropy")
        return None if math.isnan(nats) else self.scored(1.0 - math.exp(-nats / self.config.scale))


class Disagreement(Assessor, kind="disagreement"):
    """How many drafts of System 1 come to something else than most."""

    @configclass
    class Config(Assessor.Config):
        """The drafts.

        Attributes:
            samples: m.
            max_tokens: of each.
        """

        samples: int = Field(default=3, ge=2, le=32)
        max_tokens: int = Field(default=64, ge=1)

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.calls = config.samples

    async def assess(self, work: Work, view: View) -> Score | None:
        """None where no draft came."""
        count, most = self.config.samples, self.config.max_tokens
        drawn = await asyncio.gather(*(_draft(work, view, sample, most) for sample in range(count)))
        if not any(drawn):
            return None
        share, _ = commonest(drawn)
        return self.scored(min(1.0, (1.0 - share) * count / (count - 1)))


async def _draft(work: Work, view: View, sample: int, max_tokens: int, **how: Any) -> Answered | None:
    """A short answer of System 1 to the step."""
    prompt = work.prompt("draft", 1, view.text, view.earlier)
    return await work.cheap("score", view.index, view.round * ROUND + sample, prompt, max_tokens=max_tokens, **how)
