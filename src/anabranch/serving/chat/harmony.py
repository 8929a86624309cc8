"""gpt-oss' way of saying things, its harmony format: messages with a channel each, some to tools.

``<|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...<|return|>``: reasoning is on the channel
``analysis``, calls are messages ``to=functions.NAME``, and all else is for the reader. Source: the format's description that OpenAI
published with the gpt-oss models.
"""

import json
import re
from collections.abc import Iterable
from typing import Literal, NamedTuple

from anabranch.serving.chat.events import ArgumentsDelta, Event, TextDelta, ToolCallRefused, ToolCallStarted, held

__all__ = ["HarmonyParser", "Header", "Messages"]

_MESSAGE = "<|message|>"
_ENDS = ("<|end|>", "<|call|>", "<|return|>")
# What begins a message where the one before was not ended.
_BEGINS = ("<|start|>", "<|channel|>")
_HEADER = ("<|start|>", "<|channel|>", "<|constrain|>", _MESSAGE)
_CHANNEL = re.compile(r"<\|channel\|>\s*([a-z]+)")
_TO = re.compile(r"\bto=([^\s<]+)")
# Characters of a header, of which no more is read.
_MOST = 500


class Header:
    """What a message is.

    Attributes:
        channel: ``analysis``, ``commentary``, ``final``, ...; empty where none is said.
        to: the tool that it is to, without ``functions.``; empty for the reader.
    """

    def __init__(self, text: str) -> None:
        channel, to = _CHANNEL.search(text), _TO.search(text)
        self.channel = channel.group(1) if channel else ""
        self.to = to.group(1).removeprefix("functions.") if to else ""

    @property
    def is_reasoning(self) -> bool:
        """Whether it is thought, not said."""
        return self.channel == "analysis" and not self.to


class Piece(NamedTuple):
    """Some text of a message: of what begins it, of its body, or of what ends it."""

    kind: Literal["begin", "body", "end"]
    text: str
    header: Header


class Messages:
    """Text of a turn as its messages, in pieces that joined are the text itself.

    Attributes:
        in_body: a message has begun, and has not ended.
        header: of the message that began last.

    Args:
        begun: the part of the prompt that belongs to the turn: what follows its last ``<|start|>``.
    """

    def __init__(self, begun: str = "") -> None:
        self._text, self._before, self.in_body = "", "", False
        self.header = Header(begun)
        if begun:
            self.push(begun)
            # Of a header, if that is still to end.
            self._before, self._text = self._text, ""

    @property
    def held(self) -> int:
        """Characters that nothing was said of yet."""
        return len(self._text)

    def push(self, text: str, *, is_over: bool = False) -> list[Piece]:
        """What the new text says for certain."""
        self._text += text
        pieces: list[Piece] = []
        while (piece := self._body(is_over) if self.in_body else self._head(is_over)) is not None:
            pieces.append(piece)
        return pieces

    def _head(self, is_over: bool) -> Piece | None:
        start = self._text.lstrip()
        marks = (*_HEADER, "to=") if self._before else _HEADER
        if start and not any(start.startswith(mark) or mark.startswith(start) for mark in marks):
            # No header, so it is said to the reader.
            return self._begin(0)
        at = self._text.find(_MESSAGE, 0, _MOST)
        if at >= 0 or len(self._text) >= _MOST:
            return self._begin(at + len(_MESSAGE) if at >= 0 else _MOST)
        if is_over and self._text:
            # A header that is cut off says nothing.
            rest, self._text = self._text, ""
            return Piece("end", rest, self.header)
        return None

    def _begin(self, length: int) -> Piece:
        text, self._text = self._text[:length], self._text[length:]
        self.header, self._before, self.in_body = Header(self._before + text), "", True
        return Piece("begin", text, self.header)

    def _body(self, is_over: bool) -> Piece | None:
        found = [(at, mark) for mark in (*_ENDS, *_BEGINS) if (at := self._text.find(mark)) >= 0]
        at, mark = (
            min(found) if found else (len(self._text) - (0 if is_over else held(self._text, (*_ENDS, *_BEGINS))), "")
        )
        if at:
            piece, self._text = self._text[:at], self._text[at:]
            return Piece("body", piece, self.header)
        if not mark:
            return None
        self.in_body = False
        if mark in _BEGINS:
            return Piece("end", "", self.header)
        self._text = self._text[len(mark) :]
        return Piece("end", mark, self.header)


class HarmonyParser:
    """Tells the calls of a turn apart from its text, see `ToolParser`. Reasoning that is left in it is dropped.

    Args:
        names: of the tools that are offered.
        begun: see `Messages`.
    """

    def __init__(self, names: Iterable[str], begun: str = "") -> None:
        self._names = frozenset(names)
        self._messages = Messages(begun)
        self._header = self._messages.header
        # Of a call.
        is_call = self._messages.in_body and self._header.to
        self._arguments: list[str] | None = [] if is_call else None
        self.is_cut = False

    def push(self, text: str, *, is_over: bool = False) -> list[Event]:
        """What the text so far says for certain."""
        events: list[Event] = []
        for kind, piece, header in self._messages.push(text, is_over=is_over):
            self._header = header
            if kind == "begin":
                self._arguments = [] if header.to else None
                if header.to in self._names:
                    events.append(ToolCallStarted(header.to))
            elif kind == "end":
                events += self._ended()
            else:
                events += self._said(piece)
        return events

    def end(self) -> list[Event]:
        """What was held back, after the last text."""
        events = self.push("", is_over=True)
        if self._arguments is not None and self._header.to in self._names:
            self.is_cut = not _is_json("".join(self._arguments))
        return [*events, *self._ended()]

    def _said(self, piece: str) -> list[Event]:
        if self._arguments is not None:
            self._arguments.append(piece)
            return [ArgumentsDelta(piece)] if self._header.to in self._names else []
        return [] if self._header.is_reasoning else [TextDelta(piece)]

    def _ended(self) -> list[Event]:
        arguments, self._arguments = self._arguments, None
        if arguments is None or self._header.to in self._names:
            return []
        return [ToolCallRefused("".join(arguments), f"there is no tool {self._header.to!r}")] if arguments else []


def _is_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
