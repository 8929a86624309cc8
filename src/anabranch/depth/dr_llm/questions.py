"""Questions that a path of blocks answers well or not: a prompt in tokens, and what should follow it.

    {"id": "q1", "prompt": "2 + 3 =", "answer": " 5"}
    {"id": "q2", "prompt": "Which is red?\\n", "options": ["A", "B"], "answer": "A"}

What is asked may be called ``prompt``, ``input``, ``question`` or ``instruction``; the answer ``answer``, ``output``, ``target`` or
``completion``. With ``options`` the answer is one of them, by its text, its letter or its number from 0. A question without an ``id`` is
named by its content, so that the order of a file means nothing.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from anabranch.bounds import shown
from anabranch.data import Tokenizer
from anabranch.data.reading import read_bytes
from anabranch.errors import DataError
from anabranch.files import parse_json

__all__ = ["Question", "contexts", "is_questions", "read_questions"]

_ASKED = ("prompt", "input", "question", "instruction")
_ANSWERED = ("answer", "output", "target", "completion")
# Bytes of a line: a row of a book is no question.
_LONGEST = 16 * 2**20


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
    if not place.is_file() or not place.name.removesuffix(".gz").endswith((".jsonl", ".ndjson")):
        return False
    first = next((line for line in read_bytes(place).split(b"\n") if line.strip()), b"")
    try:
        row = parse_json(first)
    except ValueError:
        return False
    return isinstance(row, dict) and any(name in row for name in _ASKED)


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
    if place.is_dir():
        raise DataError(f"{place} is a folder; name a file of JSON lines, one question each")
    try:
        text = read_bytes(place).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{place} is no UTF-8 text ({error.reason} at byte {error.start})") from None
    found: list[Question] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if limit is not None and len(found) >= limit:
            break
        if line.strip():
            found.append(_question(line, f"{place}, line {number}", tokenizer))
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


def _question(line: str, where: str, tokenizer: Tokenizer) -> Question:
    if len(line) > _LONGEST:
        raise DataError(f"{where}: {len(line):,} characters; a question has at most {_LONGEST:,}")
    try:
        row = parse_json(line)
    except ValueError as error:
        raise DataError(f"{where}: this is no JSON ({error}); the file is to be JSON lines, one object each") from None
    if not isinstance(row, dict):
        raise DataError(f'{where}: {shown(row)} is no object; write {{"id": ..., "prompt": ..., "answer": ...}}')
    prompt = next((_text(row, name, where) for name in _ASKED if name in row), "")
    if not prompt:
        raise DataError(f"{where}: nothing is asked; one of {', '.join(_ASKED)} must be a text")
    options = _options(row, where)
    name = next((name for name in _ANSWERED if row.get(name) is not None), None)
    if name is None:
        raise DataError(f"{where}: there is no answer; one of {', '.join(_ANSWERED)} must say it")
    correct = _which(row[name], options, f"{where}: {name}") if options else None
    answer = options[correct] if correct is not None else _text(row, name, where)
    # What stands in an answer is data, no special token.
    said = [tuple(tokenizer.encode(option, parse_special=False)) for option in options]
    if any(not tokens for tokens in said):
        raise DataError(f"{where}: option {said.index(())} has no tokens")
    tokens = said[correct] if correct is not None else tuple(tokenizer.encode(answer, parse_special=False))
    if not tokens:
        raise DataError(f"{where}: the answer has no tokens; write what should follow the prompt")
    made = Question("", tuple(tokenizer.encode_prompt(prompt)), tokens, tuple(said), correct, answer, tuple(options))
    return replace(made, id=_id(row, where) or made.digest())


def _id(row: dict[str, Any], where: str) -> str:
    value = row.get("id", "")
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"{where}: id is {shown(value)}; it must be a text or a whole number")
    return str(value)


def _text(row: dict[str, Any], name: str, where: str) -> str:
    value = row[name]
    if isinstance(value, list) and value:
        value = value[0]
    if isinstance(value, bool | dict | list) or value is None:
        raise DataError(f"{where}: {name} is {shown(value)}; it must be a text")
    return str(value)


def _options(row: dict[str, Any], where: str) -> list[str]:
    value = row.get("options", row.get("choices"))
    if value is None:
        return []
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(one, str) and one for one in value):
        raise DataError(f"{where}: options is {shown(value)}; it must be a list of at least two texts")
    return value


def _which(value: Any, options: Sequence[str], what: str) -> int:
    """The number of the option that an answer names: by its text, its letter, or its number."""
    if isinstance(value, str) and value in options:
        return options.index(value)
    letters = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(options)]
    if isinstance(value, str) and len(value.strip()) == 1 and value.strip().upper() in letters:
        return letters.index(value.strip().upper())
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(options):
        return value
    raise DataError(f"{what} is {shown(value)}; it must be one of the options, its letter, or 0 to {len(options) - 1}")
