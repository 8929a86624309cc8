"""What an answer in text is worth: rewards by name, or a function of one's own.

    reward = find_reward("number")
    reward(row, "so it is 42")                  # 1.0 where 42 is right

``exact``, ``letter``, ``boxed`` and ``number`` compare what `anabranch.test_time.answers` takes out of a text, as Dr.LLM's search does;
``match`` and ``f1`` compare words as Router-R1 does; ``examples`` runs the examples (``>>> f(2)``) of a question on the code of the answer,
and ``tests`` those of HumanEval's form (``test``, ``entry_point``), inside the sandbox of `anabranch.test_time.verify`. Any other is
``module:name`` or ``file.py:name``, called with a `anabranch.questions.QuestionRow` and the answer; best from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from string import ascii_uppercase
from typing import Any, Protocol

from anabranch.depth.dr_llm.rewards import OwnReward, checked
from anabranch.errors import ConfigError, DataError
from anabranch.own_code import own_function
from anabranch.questions import QuestionRow
from anabranch.routers.router_r1.reward import exact_match, token_f1
from anabranch.test_time import CodeVerifier
from anabranch.test_time.answers import WAYS

__all__ = ["REWARDS", "AnswerReward", "find_reward"]

REWARDS = (*WAYS, "match", "f1", "examples", "tests")


class AnswerReward(Protocol):
    """See the module.

    Attributes:
        identity: another whenever it changes.
        needs_answer: questions must say what is right.
        waits: it takes long, and may be asked from several threads.
    """

    identity: str
    needs_answer: bool
    waits: bool

    def check(self, row: QuestionRow) -> None:
        """Raise DataError for a question that it cannot judge answers to."""

    def __call__(self, row: QuestionRow, answer: str) -> float:
        """A finite number."""


class _Compared:
    """1 where what is taken out of an answer is what is taken out of one that is right."""

    needs_answer, waits = True, False

    def __init__(self, name: str) -> None:
        self.identity, self._taken = name, WAYS[name]

    def check(self, row: QuestionRow) -> None:
        """See `AnswerReward`."""
        if not self._right(row):
            raise DataError(
                f"{row.where}: nothing can be extracted of its answer {row.answers[0][:80]!r} by {self.identity}"
            )

    def __call__(self, row: QuestionRow, answer: str) -> float:
        """0 or 1."""
        return float(self._taken(answer) in self._right(row))

    def _right(self, row: QuestionRow) -> list[str]:
        """What is taken out of right answers; of options the letter of the right one, where they are no letters themselves."""
        is_of_letters = all(option.strip() == self._taken(option) for option in row.options)
        if self.identity == "letter" and row.correct is not None and not is_of_letters:
            return list(ascii_uppercase[row.correct : row.correct + 1])
        # A right answer of nothing would have nothing said be right.
        return [taken for right in row.answers if (taken := self._taken(right))]


class _Words:
    """How far the words of an answer are those of one that is right."""

    needs_answer, waits = True, False

    def __init__(self, name: str) -> None:
        self.identity = name
        self._judge: Callable[..., float] = exact_match if name == "match" else token_f1

    def check(self, row: QuestionRow) -> None:
        """See `AnswerReward`."""
        if not any(right.strip() for right in row.answers):
            raise DataError(f"{row.where}: its answer is blank, and {self.identity} could compare nothing with it")

    def __call__(self, row: QuestionRow, answer: str) -> float:
        """0 to 1."""
        return self._judge(answer, row.answers)


class _Code:
    """1 where the code of an answer does what the question's examples, or its tests, say."""

    needs_answer, waits = False, True

    def __init__(self, name: str) -> None:
        self.identity, self._verifier = name, CodeVerifier(source="rl train")

    def check(self, row: QuestionRow) -> None:
        """See `AnswerReward`."""
        if self.identity == "examples" and ">>>" not in row.prompt:
            raise DataError(
                f"{row.where}: the question has no examples (>>> f(2)) that its answer could be held against"
            )
        missing = [name for name in ("test", "entry_point") if not isinstance(row.row.get(name), str)]
        if self.identity == "tests" and missing:
            raise DataError(f"{row.where}: there is no {missing[0]} that is a text, which the reward tests needs")

    def __call__(self, row: QuestionRow, answer: str) -> float:
        """0 or 1. Raises SandboxError where it cannot be run."""
        if self.identity == "examples":
            verdict = self._verifier.check_examples(row.prompt, answer)
            return float(verdict is not None and verdict.passed)
        return float(self._verifier.check_humaneval(row.prompt, answer, row.row["test"], row.row["entry_point"]).passed)


class _Own:
    """A function of a user's."""

    needs_answer, waits = False, False

    def __init__(self, name: str) -> None:
        found: Any
        found, version = own_function(name, what="reward", called_with="a question and an answer")
        self._reward: Any = OwnReward(name, found, version=version)
        self.identity = f"{name} {version}"

    def check(self, row: QuestionRow) -> None:
        """See `AnswerReward`: it says so itself."""

    def __call__(self, row: QuestionRow, answer: str) -> float:
        """What it gives. Raises DataError for what it raises, and for what is no finite number."""
        # Errors name the question.
        named = row if row.id else replace(row, id=row.where)
        return checked(self._reward(named, answer), named)


def find_reward(name: str) -> AnswerReward:
    """The reward of a name. Raises ConfigError for one that there is not, SandboxError where code cannot be run safely."""
    if name in WAYS:
        return _Compared(name)
    if name in ("match", "f1"):
        return _Words(name)
    if name in ("examples", "tests"):
        return _Code(name)
    if ":" in name:
        return _Own(name)
    raise ConfigError(
        f"there is no reward {name!r}; use {', '.join(REWARDS)}, or your own as module:name or file.py:name"
    )
