"""Calls written as Python, ``[f(a=1), g(b="x")]``, as Llama 4 and Llama 3.2 do; see `anabranch.serving.chat.events.Parser`."""

import ast
import json
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from anabranch.serving.chat.events import ArgumentsDelta, Event, TextDelta, ToolCallRefused, ToolCallStarted
from anabranch.serving.chat.marked import names_of
from anabranch.serving.chat.parser import ToolParser

__all__ = ["PythonicParser", "python_text"]

_OPEN, _CLOSE = "<|python_start|>", "<|python_end|>"
_BEGIN = re.compile(r"\[\s*[A-Za-z_][\w.-]*\s*\(", re.ASCII)
# What may still become it.
_BEGINS = re.compile(r"(\[(\s*|\s*[A-Za-z_][\w.-]*\s*))?", re.ASCII)
# Of a list of calls; what is longer is text.
_MOST = 100_000
_WORDS = {"true": True, "false": False, "null": None}


class PythonicParser:
    """Tells calls that an answer begins with apart from its text; an answer that begins otherwise is read as `ToolParser` does.

    Calls are told when their list has ended: before that nobody knows whether it is one.

    Args:
        tools: those offered.
    """

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        self._names = frozenset(names_of(tools))
        self._text = ""
        self._list = _List()
        self._other: ToolParser | None = None
        # After the calls nothing but text comes.
        self._is_done = self._is_open = False
        self.is_cut = False

    def push(self, text: str) -> list[Event]:
        """What the text so far says for certain."""
        if self._other is not None:
            return self._other.push(text)
        if self._is_done:
            return self._after(text)
        self._text += text
        if not self._is_open and not self._opens():
            return self._events_of_other() if not self._may_open() else []
        end = self._list.end(self._text)
        if end is None:
            return self._events_of_other() if len(self._text) > _MOST else []
        calls, rest = self._text[:end], self._text[end:]
        made = self._calls(calls)
        if made is None:
            return self._events_of_other()
        self._is_done, self._text = True, ""
        return [*made, *self._after(rest)]

    def end(self) -> list[Event]:
        """What was held back, after the last text."""
        if self._other is None and not self._is_done:
            return [*self._events_of_other(), *self.end()] if self._text else []
        if self._other is not None:
            events = self._other.end()
            self.is_cut = self._other.is_cut
            return events
        rest, self._text = self._text, ""
        return [TextDelta(rest)] if rest.strip() else []

    def _start(self) -> str:
        start = self._text.lstrip()
        return start[len(_OPEN) :].lstrip() if start.startswith(_OPEN) else start

    def _opens(self) -> bool:
        """Whether it begins as a list of calls does."""
        self._is_open = _BEGIN.match(self._start()) is not None
        if self._is_open:
            self._text = self._start()
        return self._is_open

    def _may_open(self) -> bool:
        start = self._text.lstrip()
        if start and _OPEN.startswith(start):
            return True
        return len(self._text) <= _MOST and _BEGINS.fullmatch(self._start()) is not None

    def _events_of_other(self) -> list[Event]:
        self._other = ToolParser(self._names)
        text, self._text = self._text, ""
        start = text.lstrip()
        # Of other calls it is no part, and no text either.
        return self._other.push(start[len(_OPEN) :] if start.startswith(_OPEN) else text)

    def _after(self, text: str) -> list[Event]:
        """What follows the calls, without the mark that ends them."""
        self._text += text
        start = self._text.lstrip()
        if start.startswith(_CLOSE):
            self._text = start[len(_CLOSE) :]
        elif _CLOSE.startswith(start):
            return []
        rest, self._text = self._text, ""
        return [TextDelta(rest)] if rest else []

    def _calls(self, text: str) -> list[Event] | None:
        """The calls of a list; None if it is none."""
        try:
            # A name of a tool may have dots and dashes, which are operators in Python; none is computed.
            with warnings.catch_warnings():
                # Of escapes that Python does not know.
                warnings.simplefilter("ignore")
                elements = ast.parse(text, mode="eval").body
            calls = [_call(element, text) for element in getattr(elements, "elts", [None])]
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError, OverflowError):
            return None
        events: list[Event] = []
        for name, arguments in calls:
            if name in self._names:
                events += [ToolCallStarted(name), ArgumentsDelta(arguments)]
            else:
                events.append(ToolCallRefused(text, f"there is no tool {name!r}"))
        # One that is refused is told as the text that it is, and that is the whole list.
        refused: list[Event] = [event for event in events if isinstance(event, ToolCallRefused)]
        return refused[:1] or events


class _List:
    """Finds the end of a list of Python's in a text that grows."""

    def __init__(self) -> None:
        self._at = self._depth = 0
        self._quote = ""
        self._is_escaped = False

    def end(self, text: str) -> int | None:
        """The place after its last bracket; None if that is still to come."""
        while self._at < len(text):
            character = text[self._at]
            self._at += 1
            if self._is_escaped:
                self._is_escaped = False
            elif self._quote:
                self._is_escaped = character == "\\"
                self._quote = "" if character == self._quote else self._quote
            elif character in "'\"":
                self._quote = character
            elif character in "[({":
                self._depth += 1
            elif character in "])}":
                self._depth -= 1
                if self._depth <= 0:
                    return self._at
        return None


def _call(node: ast.AST | None, text: str) -> tuple[str, str]:
    """Name and arguments of a call. Raises ValueError if it is none."""
    if not isinstance(node, ast.Call) or node.args:
        raise ValueError("no call")
    name = ast.get_source_segment(text, node.func) or ""
    made = {}
    for argument in node.keywords:
        if argument.arg is None:
            raise ValueError("no name")
        made[argument.arg] = _value(argument.value)
    return name, json.dumps(made, ensure_ascii=False, allow_nan=False)


def _value(node: ast.expr) -> Any:
    """What an expression says, of those that JSON has. Raises ValueError."""
    if isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, str | int | float)):
        if isinstance(node.value, float) and not math.isfinite(node.value):
            raise ValueError("not finite")
        return node.value
    if isinstance(node, ast.Name) and node.id in _WORDS:
        return _WORDS[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _value(node.operand)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return -value
    if isinstance(node, ast.List | ast.Tuple):
        return [_value(part) for part in node.elts]
    if isinstance(node, ast.Dict):
        pairs = [
            (_value(key) if key is not None else None, _value(value))
            for key, value in zip(node.keys, node.values, strict=True)
        ]
        if all(isinstance(key, str) for key, _ in pairs):
            return dict(pairs)
    raise ValueError("no value of JSON's")


def python_text(name: str, arguments: Mapping[str, Any]) -> str:
    """A call as Python."""
    return f"{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})"
