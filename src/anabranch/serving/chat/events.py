"""What is said in an answer, as parsers tell it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

__all__ = ["ArgumentsDelta", "Event", "Parser", "TextDelta", "ToolCallRefused", "ToolCallStarted", "held"]


@dataclass(frozen=True, slots=True)
class TextDelta:
    """Text for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStarted:
    """A call of a tool that is offered begins."""

    name: str


@dataclass(frozen=True, slots=True)
class ArgumentsDelta:
    """More of the arguments of the call that was told last; joined they are the text that the model gave, a JSON object if it is right."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallRefused:
    """What looks like a call but is none: of a tool that is not offered, without JSON arguments, or cut off before them."""

    text: str
    reason: str


Event = TextDelta | ToolCallStarted | ArgumentsDelta | ToolCallRefused


class Parser(Protocol):
    """Tells calls apart from text. Whatever the text is, it never raises, and tells the same in pieces as in one.

    Attributes:
        is_cut: the text ended within the arguments of the last call.
    """

    is_cut: bool

    def push(self, text: str) -> list[Event]:
        """What the text so far says for certain."""

    def end(self) -> list[Event]:
        """What was held back, after the last text."""


def held(text: str, marks: Iterable[str]) -> int:
    """How many characters at the end may still become a mark."""
    return max((size for mark in marks for size in range(len(mark)) if text.endswith(mark[:size])), default=0)
