"""Questions that a path of blocks answers well or not: a prompt in tokens, and what should follow it.

    {"id": "q1", "prompt": "2 + 3 =", "answer": " 5"}
    {"id": "q2", "prompt": "Which is red?\\n", "options": ["A", "B"], "answer": "A"}

Fields are those of `anabranch.questions`; of several answers the first is the one that should follow. A question without an ``id`` is
named by its content, so that the order of a file means nothing.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from anabranch.bounds import shown
from anabranch.data import Tokenizer
from anabranch.data.reading import read_bytes
from anabranch.errors import DataError
from anabranch.files import parse_json
from anabranch.questions import ASKED, QuestionRow, question_rows

__all__ = ["Question", "contexts", "is_questions", "read_questions"]


@dataclass(frozen=True)
class Question:
    """A prompt and what should follow.

    Attributes:
        id: its name, another for each question of a set.
        prompt: tokens; the routers see these.
        answer: tokens that should follow; of a question with options those of the right one.
        options: tokens of each choice; none where the answer is free.
        correct: number of the right option; None without options.
        answer_text: the answer as it was written, for rewards that compare text; empty where there is none.
    """

    id: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    options: tuple[tuple[int, ...], ...] = ()
    correct: int | None = None
    answer_text: str = ""
    option_texts: tuple[str, ...] = ()

    def with_option(self, number: int) -> Self:
        """The same question where another option is called right."""
        text = self.option_texts[number] if self.option_texts else ""
        return replace(self, answer=self.options[number], correct=number, answer_text=text)

    def with_answer(self, other: "Question") -> Self:
        """The same question where the answer of another one is called right."""
        return replace(self, answer=other.answer, answer_text=other.answer_text)

    def digest(self) -> str:
        """Twelve letters that follow from what is asked and answered."""
        told = json.dumps([self.prompt, self.answer, self.options, self.correct])
        return hashlib.sha256(told.encode()).hexdigest()[:12]

    def content(self) -> str:
        """Like `digest`, of the texts of answers too: all that a reward may look at but the id."""
        told = json.dumps(
            [self.prompt, self.answer, self.options, self.correct, self.answer_text, list(self.option_texts)]
        )
        return hashlib.sha256(told.encode()).hexdigest()[:12]


def is_questions(path: str | Path) -> bool:
    """Whether a file looks like questions: JSON lines whose first row asks something. Other files are text."""
    place = Path(path)
    if not place.is_file() or not place.name.lower().removesuffix(".gz").endswith((".jsonl", ".ndjson")):
        return False
    first = next((line for line in read_bytes(place).split(b"\n") if line.strip()), b"")
    try:
        row = parse_json(first)
    except ValueError:
        return False
    return isinstance(row, dict) and any(name in row for name in ASKED)


def read_questions(
    path: str | Path, tokenizer: Tokenizer, *, limit: int | None = None, vocabulary: int | None = None
) -> list[Question]:
    """The questions of a file of JSON lines (also ``.gz``).

    Args:
        path: the file.
        tokenizer: of the model.
        limit: only so many, from the top.
        vocabulary: of the model; a token beyond it is an error.

    Raises DataError: a file that cannot be read or asks nothing, a line that is no question (with its number), an id that comes twice.
    """
    place = Path(path)
    found = [_question(row, tokenizer) for row in question_rows(place, limit=limit)]
    if not found:
        raise DataError(f'{place} asks nothing; each line is to be {{"id": ..., "prompt": ..., "answer": ...}}')
    check_questions(found, str(place), vocabulary)
    return found


def check_questions(questions: Iterable[Question], where: str, vocabulary: int | None = None) -> None:
    """Raise DataError for an id that comes twice, a prompt without tokens, and a token that the model does not have."""
    seen: set[str] = set()
    for question in questions:
        if question.id in seen:
            raise DataError(f"{where}: the id {shown(question.id)} comes twice; each question needs one of its own")
        seen.add(question.id)
        if not question.prompt:
            raise DataError(f"{where}: question {shown(question.id)} has no tokens in its prompt")
        tokens = (*question.prompt, *question.answer, *(token for option in question.options for token in option))
        if vocabulary is not None and (beyond := [token for token in tokens if not 0 <= token < vocabulary]):
            raise DataError(
                f"{where}: question {shown(question.id)} has token {beyond[0]}; the model has 0 to {vocabulary - 1}"
            )


def contexts(token_BL: Any, *, after: int = 1, name: str = "text") -> list[Question]:
    """Windows of tokens as questions: the last tokens are the answer, those before them the prompt.

    Args:
        token_BL: int64 ``[B, L]``, L above ``after``.
        after: tokens of the answer.
        name: of the text, for ids.

    Windows that say the same are one question. Raises DataError where a window is too short.
    """
    found: dict[str, Question] = {}
    for row in token_BL.tolist():
        if len(row) <= after:
            raise DataError(
                f"a window of {name} has {len(row)} tokens; a prompt and {after} behind it are at least {after + 1}"
            )
        made = Question("", tuple(row[:-after]), tuple(row[-after:]))
        found.setdefault(made.digest(), replace(made, id=f"{name}-{made.digest()}"))
    return list(found.values())


def _question(asked: QuestionRow, tokenizer: Tokenizer) -> Question:
    # What stands in an answer is data, no special token.
    said = [tuple(tokenizer.encode(option, parse_special=False)) for option in asked.options]
    if any(not tokens for tokens in said):
        raise DataError(f"{asked.where}: option {said.index(())} has no tokens")
    answer, correct = asked.answers[0], asked.correct
    tokens = said[correct] if correct is not None else tuple(tokenizer.encode(answer, parse_special=False))
    if not tokens:
        raise DataError(f"{asked.where}: the answer has no tokens; write what should follow the prompt")
    prompt = tuple(tokenizer.encode_prompt(asked.prompt))
    made = Question("", prompt, tokens, tuple(said), correct, answer, asked.options)
    return replace(made, id=asked.id or made.digest())
