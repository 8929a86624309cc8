"""The null control of flips: is a path on which a wrong answer becomes right about the question, or is it luck?

Among many paths of one question some give any answer that there is. So each question of a probe that the whole model answers wrongly is
searched twice, towards the truth and towards another wrong answer, with the same budget. Only if the truth is reached more often are flips
labels; that is a one-sided binomial test over the questions where exactly one of the two was reached. The paper has no such control.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from anabranch.depth.dr_llm.questions import Question
from anabranch.depth.dr_llm.settings import SearchConfig, seed_of

__all__ = ["Flip", "FlipReport", "binomial_tail", "decoys_of", "probe_of"]

# Answers of other questions that are looked at for one that the whole model does not give.
_MOST_TRIED = 16


@dataclass(frozen=True)
class Flip:
    """One question of the probe: whether a path led to the truth, and whether one led to the decoy."""

    id: str
    truth: bool
    decoy: bool


@dataclass(frozen=True)
class FlipReport:
    """The control.

    Attributes:
        probe: questions.
        truth: how many reached their answer.
        decoy: how many reached another wrong one.
        only_truth: how many reached their answer alone.
        only_decoy: how many reached the decoy alone.
        p_value: that of so many questions with exactly one of the two, the truth is the one as often, were it a coin.
        significance: what the p-value must be below.
    """

    probe: int
    truth: int
    decoy: int
    only_truth: int
    only_decoy: int
    p_value: float
    significance: float

    @classmethod
    def of(cls, flips: Sequence[Flip], significance: float = 0.05) -> "FlipReport":
        """The report of a probe."""
        only_truth = sum(flip.truth and not flip.decoy for flip in flips)
        only_decoy = sum(flip.decoy and not flip.truth for flip in flips)
        return cls(
            probe=len(flips),
            truth=sum(flip.truth for flip in flips),
            decoy=sum(flip.decoy for flip in flips),
            only_truth=only_truth,
            only_decoy=only_decoy,
            p_value=binomial_tail(only_truth, only_truth + only_decoy),
            significance=significance,
        )

    @property
    def is_real(self) -> bool:
        """Whether flips are more than luck."""
        return self.p_value < self.significance

    def to_dict(self) -> dict[str, Any]:
        """For reports."""
        return {**asdict(self), "is_real": self.is_real}


def binomial_tail(successes: int, trials: int) -> float:
    """P(X >= successes) where X counts heads of ``trials`` fair coins, exactly; 1 for no trial."""
    return sum(math.comb(trials, count) for count in range(successes, trials + 1)) / 2**trials


def probe_of(wrong: Sequence[Question], config: SearchConfig) -> list[Question]:
    """The questions of the control: those of the smallest seeds, so that their order in a file means nothing."""
    return sorted(wrong, key=lambda question: (seed_of(config.seed, "probe", question.id), question.id))[: config.probe]


def decoys_of(question: Question, questions: Sequence[Question], seed: int) -> Iterator[Question]:
    """The question with wrong answers, in a random order: its other options, or where it has none answers of other questions."""
    draw = random.Random(seed_of(seed, "decoy", question.id))
    if question.options:
        others = [number for number in range(len(question.options)) if number != question.correct]
        draw.shuffle(others)
        yield from map(question.with_option, others)
        return
    # By their content, in an order of its own: the order of the file must not matter.
    answers = {
        (other.answer, other.answer_text): other for other in questions if other.answer[:1] != question.answer[:1]
    }
    ordered = [answers[key] for key in sorted(answers)]
    for other in draw.sample(ordered, min(len(ordered), _MOST_TRIED)):
        yield question.with_answer(other)
