"""Questions as files of JSON lines have them, in text: what is asked, and what is right.

    {"id": "q1", "prompt": "2 + 3 =", "answer": "5"}
    {"id": "q2", "question": "Who wrote it?", "answers": ["Ann", "Ann Smith"]}
    {"id": "q3", "prompt": "Which is red?\\n", "options": ["A", "B"], "answer": "A"}

What is asked may be called ``prompt``, ``input``, ``question``, ``instruction``, ``problem`` or ``query``; the answer ``answer``,
``answers``, ``output``, ``target`` or ``completion``, one text or several that are right. With ``options`` the answer is one of them, by
its text, its letter or its number from 0.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from anabranch.bounds import shown_json
from anabranch.errors import DataError
from anabranch.files import parse_json
from anabranch.text_lines import read_lines

__all__ = ["ASKED", "QuestionRow", "question_rows"]

ASKED = ("prompt", "input", "question", "instruction", "problem", "query")
_ANSWERED = ("answer", "answers", "output", "target", "completion")
# Characters of a line: a row of a book is no question.
_LONGEST = 16 * 2**20


@dataclass(frozen=True)
class QuestionRow:
    """A question.

    Attributes:
        id: its name; "" where it has none.
        prompt: what is asked.
        answers: that are right; of a question with options the right one's text.
        options: to choose from; none where the answer is free.
        correct: number of the right option; None without options.
        row: all that its line says.
        where: file and line, for errors.
    """

    id: str
    prompt: str
    answers: tuple[str, ...]
    options: tuple[str, ...] = ()
    correct: int | None = None
    row: dict[str, Any] = field(default_factory=dict, compare=False)
    where: str = ""


def question_rows(path: str | Path, *, limit: int | None = None, needs_answer: bool = True) -> Iterator[QuestionRow]:
    """The questions of a file, plain or gzipped, in order.

    Args:
        path: the file.
        limit: only so many, from the top.
        needs_answer: a line without an answer is no question.

    Raises DataError: a file that cannot be read, a line that is no question (with its number).
    """
    place = Path(path)
    if place.is_dir():
        raise DataError(f"{place} is a folder; name a file of JSON lines, one question each")
    asked = ((number, line.rstrip("\n")) for number, line in read_lines(place) if line.strip())
    for number, line in islice(asked, limit):
        yield _question(line, f"{place}, line {number}", needs_answer)


def _question(line: str, where: str, needs_answer: bool) -> QuestionRow:
    if len(line) > _LONGEST:
        raise DataError(f"{where}: {len(line):,} characters; a question has at most {_LONGEST:,}")
    try:
        row = parse_json(line)
    except ValueError as error:
        raise DataError(f"{where}: this is no JSON ({error}); the file is to be JSON lines, one object each") from None
    if not isinstance(row, dict):
        raise DataError(f'{where}: {shown_json(row)} is no object; write {{"id": ..., "prompt": ..., "answer": ...}}')
    prompt = next((_texts(row, name, where)[0] for name in ASKED if name in row), "")
    if not prompt:
        raise DataError(f"{where}: nothing is asked; one of {', '.join(ASKED)} must be a text")
    options = _options(row, where)
    name = next((name for name in _ANSWERED if row.get(name) is not None), None)
    if name is None and not needs_answer:
        return QuestionRow(_id(row, where), prompt, (), tuple(options), None, row, where)
    if name is None:
        raise DataError(f"{where}: there is no answer; one of {', '.join(_ANSWERED)} must say it")
    correct = _which(row[name], options, f"{where}: {name}") if options else None
    answers = (options[correct],) if correct is not None else _texts(row, name, where)
    return QuestionRow(_id(row, where), prompt, answers, tuple(options), correct, row, where)


def _id(row: dict[str, Any], where: str) -> str:
    value = row.get("id", "")
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise DataError(f"{where}: id is {shown_json(value)}; it must be a text or a whole number")
    return str(value)


def _texts(row: dict[str, Any], name: str, where: str) -> tuple[str, ...]:
    value = row[name]
    values = value if isinstance(value, list) and value else [value]
    for one in values:
        if isinstance(one, bool | dict | list) or one is None:
            raise DataError(f"{where}: {name} is {shown_json(one)}; it must be a text")
    return tuple(str(one) for one in values)


def _options(row: dict[str, Any], where: str) -> list[str]:
    value = row.get("options", row.get("choices"))
    if value is None:
        return []
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(one, str) and one for one in value):
        raise DataError(f"{where}: options is {shown_json(value)}; it must be a list of at least two texts")
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
    raise DataError(
        f"{what} is {shown_json(value)}; it must be one of the options, its letter, or 0 to {len(options) - 1}"
    )
