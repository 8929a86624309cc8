"""`ToolParser`: what a model says, told apart from the tools it calls, while it is being said.

Understood, wherever they stand in the text: ``<tool_call>{...}</tool_call>`` (Hermes, Qwen), ``<function=NAME>{...}</function>`` and
``<|python_tag|>{...}`` (Llama 3), ``[TOOL_CALLS][{...}]`` (Mistral); and an answer that is nothing but a JSON object, or several, or a
list of them, with a name and arguments (or parameters). Nothing of a marker is told as text, however the text is cut into pieces.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

__all__ = ["Called", "Refused", "Said", "ToolParser"]

_CLOSES = {"<tool_call>": "</tool_call>", "<function=": "</function>", "<|python_tag|>": "", "[TOOL_CALLS]": ""}
_PLAIN = ""  # the marker of a call without one
_KEYS = ("name", "arguments", "parameters", "type", "id")  # of a plain call
_BETWEEN = " \t\r\n;,"  # plain calls


@dataclass(frozen=True, slots=True)
class Said:
    """Text for the reader."""

    text: str


@dataclass(frozen=True, slots=True)
class Called:
    """A call of a tool that is offered; ``arguments`` is a JSON object as text."""

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Refused:
    """What looks like a call but is none: of a tool that is not offered, without JSON arguments, or cut off."""

    text: str
    reason: str


Event = Said | Called | Refused


class _ValueEnd:
    """Finds the end of a JSON object or list in a text that grows."""

    def __init__(self) -> None:
        self._at, self._depth, self._in_string, self._is_escaped = 0, 0, False, False
        self._end: int | None = None

    def find(self, text: str) -> int | None:
        """The place after the value, once it is there. ``text`` is all of it so far, from its first bracket."""
        for at in range(self._at, len(text)) if self._end is None else ():
            character = text[at]
            if self._is_escaped:
                self._is_escaped = False
            elif self._in_string:
                self._is_escaped = character == "\\"
                self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth == 0:
                    self._end = at + 1
                    break
        self._at = len(text)
        return self._end


class ToolParser:
    """Feed it text with `push`, then `end`. One for each answer.

    Args:
        names: of the tools that are offered.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)
        self._buffer = ""
        self._marker: str | None = None  # of the call that the buffer is inside of
        self._value = _ValueEnd()
        self._is_plain_possible = True  # nothing has been said yet but plain calls
        self._has_called = False
        self._is_over = False

    def push(self, text: str) -> list[Event]:
        """What the text so far says for certain."""
        self._buffer += text
        events: list[Event] = []
        while (more := self._outside() if self._marker is None else self._inside()) is not None:
            events += more
        return events

    def end(self) -> list[Event]:
        """What was held back, after the last text."""
        self._is_over = True
        events = self.push("")
        rest, self._buffer = self._buffer, ""
        if self._marker is None or (self._marker == _PLAIN and not self._has_called):
            return [*events, Said(rest)] if rest.strip() or (rest and not self._has_called) else events
        return [*events, Refused(self._marker + rest, "the call was cut off, or is no JSON object")]

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
                return self._enter(_PLAIN)
        found = [(at, marker) for marker in _CLOSES if (at := self._buffer.find(marker)) >= 0]
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
        return [Said(text)]

    def _enter(self, marker: str) -> list[Event]:
        self._marker, self._value = marker, _ValueEnd()
        return []

    def _inside(self) -> list[Event] | None:
        marker = self._marker or _PLAIN
        close = _CLOSES.get(marker, "")
        head, body = "", self._buffer
        if marker == "<function=":
            head, found, body = body.partition(">")
            if not found:
                return None
        value = body.lstrip()
        if not value:
            return None
        if value[0] not in "{[":
            return self._leave_without_value(marker, close)
        size = self._value.find(value)
        if size is None:
            return None
        after = value[size:]
        closed = after.lstrip()
        if len(closed) < len(close) and close.startswith(closed) and not self._is_over:
            return None  # the closing tag is on its way
        self._buffer = closed[len(close) :] if close and closed.startswith(close) else after
        self._marker = None
        return self._calls(marker, head, value[:size])

    def _leave_without_value(self, marker: str, close: str) -> list[Event] | None:
        """A marker with something else than JSON after it."""
        at = self._buffer.find(close) if close else -1
        if at < 0:
            return None  # all that follows belongs to it; `end` tells it
        text, self._buffer, self._marker = self._buffer[: at + len(close)], self._buffer[at + len(close) :], None
        self._has_called = True
        return [Refused(marker + text, "what is called is no JSON object")]

    def _calls(self, marker: str, head: str, text: str) -> list[Event]:
        raw = f"{marker}{head}>{text}" if head else marker + text
        values = _values(text)
        named = [_named({"name": head, "arguments": value} if head else value) for value in values]
        if not named or any(call is None for call in named):
            if marker == _PLAIN:
                return self._said(text)
            self._has_called = True
            return [Refused(raw, "what is called is no JSON object with a name and arguments")]
        self._has_called = True
        events: list[Event] = []
        for name, arguments in (call for call in named if call is not None):
            if name in self._names:
                events.append(Called(name, arguments))
            else:
                events.append(Refused(raw, f"there is no tool {name!r}"))
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
    keys = [f'{key}"' for key in _KEYS]
    if any(text.startswith(key) for key in keys):
        return True
    return None if any(key.startswith(text) for key in keys) else False


def _held(text: str) -> int:
    """How many characters at the end may still become a marker, with the blanks before it."""
    longest = max(
        (size for marker in _CLOSES for size in range(len(marker)) if text.endswith(marker[:size])),
        default=0,
    )
    before = text[: len(text) - longest]
    return longest + len(before) - len(before.rstrip())


def _values(text: str) -> list[Any]:
    """The values of ``text``: of a list its items, of an object itself; none if it is no JSON."""
    try:
        parsed = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return []
    return parsed if isinstance(parsed, list) else [parsed]


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _named(value: Any) -> tuple[str, str] | None:
    """Name and arguments of a JSON value that is a call."""
    if not isinstance(value, dict) or not value.keys() <= set(_KEYS) or not isinstance(value.get("name"), str):
        return None
    given = [value[key] for key in ("arguments", "parameters") if key in value]
    if len(given) != 1:
        return None
    arguments = given[0]
    if isinstance(arguments, str):  # some models write them as text, as OpenAI's API does
        arguments = next(iter(_values(arguments)), None)
    return (value["name"], json.dumps(arguments, ensure_ascii=False)) if isinstance(arguments, dict) else None
