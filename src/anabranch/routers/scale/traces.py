"""Runs over questions with known answers, and what a model may learn from the right ones (the paper's second half).

    run each question -> drop traces whose answer is not the known one -> keep up to 800 -> fine-tune a model that does not think on them

A row is ``{"task": "scale", "input": QUESTION, "output": SOLUTION}``, as ``anabranch adapt`` reads it; a solution is the steps in order,
each with its result, so that its end holds the box.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from anabranch.bounds import shown_json
from anabranch.errors import AnabranchError, DataError
from anabranch.files import parse_json
from anabranch.questions import QuestionRow, question_rows
from anabranch.routers.contract.ask import Ask
from anabranch.routers.scale.journal import digest_of
from anabranch.routers.scale.parsing import boxed
from anabranch.routers.scale.reasoner import SelectiveReasoner
from anabranch.routers.scale.records import Trace
from anabranch.routers.strategies.consistency import final_answer
from anabranch.text_lines import read_lines

__all__ = [
    "MOST_ROWS",
    "Question",
    "Solved",
    "attempts",
    "is_right",
    "learnable",
    "read_questions",
    "read_traces",
    "solution",
    "solve_all",
]

# The paper's number of traces.
MOST_ROWS = 800

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Question:
    """A problem whose answer is known.

    Attributes:
        text: of it.
        answers: any of which is right.
    """

    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Solved:
    """What a run on a question came to.

    Attributes:
        question: that was asked.
        attempt: from 0, of all runs on its text.
        trace: of the run; None where it failed.
        error: what it failed with; "" for none.
    """

    question: Question
    attempt: int
    trace: Trace | None = None
    error: str = ""

    @property
    def is_right(self) -> bool:
        """Its answer is a known one."""
        return self.trace is not None and is_right(self.trace, self.question.answers)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON; `of` reads it back."""
        return {
            "question": self.question.text,
            "answers": list(self.question.answers),
            "attempt": self.attempt,
            "right": self.is_right,
            "error": self.error,
            "trace": None if self.trace is None else self.trace.to_dict(),
        }

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> Self:
        """Raises DataError for what is none."""
        try:
            question = Question(str(table["question"]), tuple(map(str, table["answers"])))
            trace = None if table["trace"] is None else Trace.from_dict(table["trace"])
            return cls(question=question, attempt=int(table["attempt"]), trace=trace, error=str(table["error"]))
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"a run of SCALE is damaged: {error}") from None


def read_questions(path: str | Path) -> list[Question]:
    """From JSON lines, see `anabranch.questions`. Raises DataError that names file and line."""
    found = [_question(row) for row in question_rows(path)]
    if not found:
        raise DataError(f'{path} holds no questions; a line is {{"question": "...", "answer": "..."}}')
    return found


def _question(row: QuestionRow) -> Question:
    """Options stand behind what is asked, and the right one may be said by its letter, or its words where they come to no other's.

    Options that are letters themselves stand there without others.
    """
    if not row.prompt.strip() or not any(one.strip() for one in row.answers):
        raise DataError(f"{row.where}: question and answer must be texts that are not empty")
    if row.correct is None or len(row.options) > len(_LETTERS):
        return Question(row.prompt, row.answers)
    letters, meant = _LETTERS[: len(row.options)], [_meaning(option) for option in row.options]
    if meant.count(meant[row.correct]) > 1 and any(_meaning(letter) in meant for letter in letters):
        raise DataError(f"{row.where}: answers to options {shown_json(list(row.options))} cannot be told apart")
    if any(_meaning(letter) in meant for letter in letters):
        return Question("\n".join([row.prompt, "", *row.options]), row.answers)
    lettered = [f"{letter}. {option}" for letter, option in zip(letters, row.options, strict=True)]
    words = row.answers if meant.count(meant[row.correct]) == 1 else ()
    return Question("\n".join([row.prompt, "", *lettered]), (*words, letters[row.correct]))


def is_right(trace: Trace, answers: Sequence[str]) -> bool:
    """Whether a run was done to its end and its box comes to one of these: the same number, letter or words."""
    if not trace.is_whole or trace.answer is None or not trace.answer.strip():
        return False
    return _meaning(trace.answer) in {_meaning(one) for one in answers}


def _meaning(answer: str) -> str:
    box = boxed(answer)
    return final_answer(answer if box is None else box)


def solution(trace: Trace) -> str:
    """A run as one text to learn from: its steps, each with its result."""
    done = [one for one in trace.steps if one.answer]
    if len(done) == 1:
        return done[0].answer
    return "\n\n".join(f"Step {number}: {one.text}\n{one.answer}" for number, one in enumerate(done, start=1))


def learnable(runs: Iterable[Solved], *, most: int = MOST_ROWS) -> list[dict[str, str]]:
    """Rows of right runs, one of each question (the first), up to so many."""
    rows: dict[str, dict[str, str]] = {}
    for one in runs:
        if one.is_right and one.question.text not in rows and len(rows) < most:
            assert one.trace is not None
            rows[one.question.text] = {"task": "scale", "input": one.question.text, "output": solution(one.trace)}
    return list(rows.values())


def read_traces(path: str | Path) -> list[Solved]:
    """Runs that were written, a line each. Raises DataError that names file and line."""
    found = []
    for number, line in read_lines(Path(path)):
        if not line.strip():
            continue
        try:
            found.append(Solved.of(parse_json(line)))
        except (ValueError, DataError) as error:
            raise DataError(f"{path}, line {number}: {error}") from None
    return found


def attempts(questions: Iterable[Question], samples: int) -> list[tuple[Question, int]]:
    """Each question with its attempts behind one another. One that stands there again has further ones.

    Two runs of one text and attempt would have the same seed and journal.
    """
    begun: Counter[str] = Counter()
    runs = []
    for question in questions:
        first = begun[question.text]
        begun[question.text] += samples
        runs += [(question, attempt) for attempt in range(first, first + samples)]
    return runs


def journal_of(journals: Path, text: str, attempt: int) -> Path:
    """Where the calls of a run on a question's text are kept."""
    return journals / f"{digest_of([text, attempt])[:24]}.jsonl"


async def solve_all(
    reasoner: SelectiveReasoner,
    questions: Sequence[Question],
    ask: Callable[[], Ask],
    *,
    samples: int = 1,
    at_once: int = 4,
    journals: Path | None = None,
    tell: Callable[[Solved], None] = lambda one: None,
) -> list[Solved]:
    """Run each question, some at a time; in the order of the questions, attempts behind one another.

    Args:
        reasoner: that solves them; attempts have seeds of their own where it has one.
        questions: to be solved, see `attempts`.
        ask: makes who makes the calls of one run, so that its tokens are told apart from those of others.
        samples: runs of each question.
        at_once: runs at a time.
        journals: folder of calls that ended: what a run before was told is not asked again.
        tell: called as each run ends.

    A run that fails is told as such and ends no other. Raises DataError for journals of other questions, systems or prompts.
    """
    room = asyncio.Semaphore(at_once)

    async def run(question: Question, attempt: int) -> Solved:
        seed = reasoner.settings.seed
        settings = replace(reasoner.settings, seed=None if seed is None else seed + attempt)
        own = reasoner.with_settings(settings)
        place = None if journals is None else journal_of(journals, question.text, attempt)
        async with room:
            try:
                found = Solved(
                    question=question, attempt=attempt, trace=await own.solve(question.text, ask(), journal=place)
                )
            except DataError:
                raise
            except AnabranchError as error:
                found = Solved(question=question, attempt=attempt, error=f"{type(error).__name__}: {error}")
        tell(found)
        return found

    runs = [run(question, attempt) for question, attempt in attempts(questions, samples)]
    # Not a group of tasks, which would put the one error that ends all into a group of errors.
    return list(await asyncio.gather(*runs))
