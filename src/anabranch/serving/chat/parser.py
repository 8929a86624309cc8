"""`ToolParser`: what a model says, told apart from the tools it calls, while it is being said.

Understood, wherever they stand in the text: ``<tool_call>{...}</tool_call>`` (Hermes, Qwen), ``<function=NAME>{...}</function>`` and
``<|python_tag|>{...}`` (Llama 3), ``[TOOL_CALLS][{...}]`` (Mistral); and an answer that is nothing but a JSON object, or several, or a
list of them, with a name and arguments (or parameters). Nothing of a marker is told as text, however the text is cut into pieces.

Arguments are told as they come, character by character. Two ways to write them do not let that be: before the name, where they are held
until it is known; and as a JSON text within the JSON, whose escapes are told when they are whole.
"""

from collections.abc import Iterable

from anabranch.serving.chat.events import Event, TextDelta, held
from anabranch.serving.chat.reader import CLOSES, KEYS, PLAIN, CallReader

__all__ = ["ToolParser"]

_MARKERS = tuple(filter(None, CLOSES))
_BETWEEN = " \t\r\n;,"  # plain calls


class ToolParser:
    """Feed it text with `push`, then `end`. One for each answer.

    Attributes:
        is_cut: the text ended within the arguments of the last call.

    Args:
        names: of the tools that are offered.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)
        self._buffer = ""
        # Of the call that the buffer is inside of.
        self._reader: CallReader | None = None
        # Nothing has been said yet but plain calls.
        self._is_plain_possible = True
        self._has_called = False
        self._is_over = False
        self.is_cut = False

    def push(self, text: str) -> list[Event]:
        """What the text so far says for certain."""
        self._buffer += text
        events: list[Event] = []
        while (more := self._outside() if self._reader is None else self._inside(self._reader)) is not None:
            events += more
        return events

    def end(self) -> list[Event]:
        """What was held back, after the last text."""
        self._is_over = True
        events = self.push("")
        rest, self._buffer = self._buffer, ""
        return [*events, TextDelta(rest)] if rest.strip() or (rest and not self._has_called) else events

    # Each step consumes a part of the buffer and gives its events; None if it needs more text.

    def _outside(self) -> list[Event] | None:
        if self._is_plain_possible:
            blank = _BETWEEN if self._has_called else None
            start = self._buffer.lstrip(blank)
            is_call = _is_plain_call(start)
            if is_call is None:
                return None
            if is_call:
                self._buffer = start
                return self._enter(PLAIN)
        found = [(at, marker) for marker in _MARKERS if (at := self._buffer.find(marker)) >= 0]
        if found:
            at, marker = min(found)
            before, self._buffer = self._buffer[:at].rstrip(), self._buffer[at + len(marker) :]
            return [*self._said(before), *self._enter(marker)]
        certain = self._buffer[: len(self._buffer) - _held(self._buffer)]
        if not certain:
            return None
        self._buffer = self._buffer[len(certain) :]
        return self._said(certain)

    def _said(self, text: str) -> list[Event]:
        if not text:
            return []
        self._is_plain_possible = False
        return [TextDelta(text)]

    def _enter(self, marker: str) -> list[Event]:
        self._reader = CallReader(marker, self._names)
        return []

    def _inside(self, reader: CallReader) -> list[Event] | None:
        events = reader.push(self._buffer, is_over=self._is_over)
        self._buffer = ""
        self._has_called = self._has_called or any(not isinstance(event, TextDelta) for event in events)
        if not reader.is_done:
            return events or None
        self._buffer, self._reader, self.is_cut = reader.rest, None, reader.is_cut
        self._is_plain_possible = self._is_plain_possible and not reader.is_text
        return events


def _is_plain_call(text: str) -> bool | None:
    """Whether ``text``, without blanks before it, begins as a plain call does; None if that cannot be told yet."""
    if text.startswith("["):
        text = text[1:].lstrip()
    for sign in '{"':
        if not text:
            return None
        if text[0] != sign:
            return False
        text = text[1:].lstrip() if sign == "{" else text[1:]
    keys = [f'{key}"' for key in KEYS]
    if any(text.startswith(key) for key in keys):
        return True
    return None if any(key.startswith(text) for key in keys) else False


def _held(text: str) -> int:
    """How many characters at the end may still become a marker, with the blanks before it."""
    longest = held(text, _MARKERS)
    before = text[: len(text) - longest]
    return longest + len(before) - len(before.rstrip())
