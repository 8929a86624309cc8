"""`CallReader`: the calls behind one marker, told while they are being written.

A call is told when its name is known and its arguments begin, and cannot be taken back then: its arguments are passed on as they come,
to the end of their object, whatever is in between. Until then everything is held, so what turns out to be no call is told as text.
"""

import json
import re
from collections.abc import Container, Generator
from typing import Any

from anabranch.serving.chat.events import ArgumentsDelta, Event, ToolCallRefused, ToolCallStarted
from anabranch.serving.chat.growing import Growing

__all__ = ["CLOSES", "KEYS", "NAME", "PLAIN", "CallReader", "parsed"]

# The marker of a call without one.
PLAIN = ""
CLOSES = {
    "<tool_call>": "</tool_call>",
    "<function=": "</function>",
    "<|python_tag|>": "",
    "[TOOL_CALLS]": "",
    PLAIN: "",
}
KEYS = ("name", "arguments", "parameters", "type", "id")  # of a call
NAME = re.compile(r"[\w.-]{1,64}", re.ASCII)
_BETWEEN = " \t\r\n,;"  # calls
_NO_CALL = "what is called is no JSON object with a name and arguments"


Step = Generator[None, None, bool]


class CallReader:
    """Feed it what comes after the marker with `push` until it `is_done`.

    Attributes:
        is_done: the calls have ended, or there are none.
        is_text: without a marker: what follows, and what was read since the last call, is no call but text.
        is_cut: the text ended within arguments that were being told.
        has_called: a call was told.

    Args:
        marker: one of `CLOSES`.
        names: of the tools that are offered.
    """

    def __init__(self, marker: str, names: Container[str]) -> None:
        self.is_done = self.is_text = self.is_cut = self.has_called = False
        self._marker, self._close, self._names = marker, CLOSES[marker], names
        self._text = Growing(marker)
        # What is no call, and why.
        self._refused, self._reason = "", ""
        self._pieces: list[str] = []  # of arguments
        self._events: list[Event] = []
        self._steps = self._read()

    def push(self, text: str, *, is_over: bool = False) -> list[Event]:
        """What it says for certain. ``is_over``: nothing comes after it."""
        self._text.push(text)
        self._text.is_over = is_over
        self.is_done = next(self._steps, True) is True
        self._tell_pieces()
        events, self._events = self._events, []
        return events

    @property
    def rest(self) -> str:
        """What was not read of the text, when it `is_done`."""
        return self._refused + self._text.taken + self._text.rest if self.is_text else self._text.rest

    # The generators yield where they need more text. A bool says whether more calls may follow: after what is none, none do.

    def _read(self) -> Generator[None, None, None]:
        text, name = self._text, None
        if self._marker == "<function=":
            name = yield from self._function()
        first = yield from text.blanks()
        if first == "{" and name != "":
            yield from self._arguments_alone(name) if name else self._call()
        elif first == "[" and name is None:
            yield from self._list()
        else:
            self._refuse("what is called is no JSON object")
        if self.is_text:
            return
        yield from text.has(self._close)
        self._refused += text.taken
        self._tell_refused()

    def _function(self) -> Generator[None, None, str]:
        """The name in ``<function=name>``; empty if it is none."""
        name = ""
        while (character := (yield from self._text.ahead())) and (NAME.fullmatch(name + character)):
            name += self._text.take(1)
        if character == ">":
            self._text.take(1)
            return name
        return ""

    def _list(self) -> Step:
        text = self._text
        first = "["
        while first in ("[", ","):
            text.take(1)
            if (yield from text.blanks()) != "{":
                return (yield from self._no_call(depth=1))
            if not (yield from self._call()):
                return False
            first = yield from text.blanks()
        if first != "]":
            return (yield from self._no_call(depth=1))
        text.take(1)
        return True

    def _arguments_alone(self, name: str) -> Step:
        if name in self._names:
            return (yield from self._arguments(name))
        yield from self._text.extent()
        return self._refuse(f"there is no tool {name!r}")

    def _call(self) -> Step:
        """A call as an object. Where its arguments come before its name, they are held until that is known."""
        text, name, held, first = self._text, None, "", "{"
        while first in ("{", ","):
            text.take(1)
            key = yield from self._key()
            if key not in KEYS:
                return (yield from self._no_call(depth=1))
            value_begins = yield from text.blanks()
            if key in ("arguments", "parameters"):
                if held or value_begins not in ("{", '"'):
                    return (yield from self._no_call(depth=1))
                if isinstance(name, str) and name in self._names:
                    is_told = yield from self._arguments(name)
                    return (yield from (self._end() if is_told else self._no_call(depth=1)))
                held = yield from text.value()
            else:
                value = parsed((yield from text.value()))
                if key == "name":
                    name = value
                    if not isinstance(name, str):
                        return (yield from self._no_call(depth=1))
            first = yield from text.blanks()
        if first != "}":
            return (yield from self._no_call(depth=1))
        text.take(1)
        return (yield from self._whole(name, held))

    def _key(self) -> Generator[None, None, Any]:
        """A key and the colon after it; None if there is none."""
        if (yield from self._text.blanks()) != '"':
            return None
        key = parsed((yield from self._text.value()))
        if (yield from self._text.blanks()) != ":":
            return None
        self._text.take(1)
        return key

    def _arguments(self, name: str) -> Step:
        """Tell a call and its arguments as they come. False, and nothing told, for a text that is no object."""
        text = self._text
        if (yield from text.ahead()) == "{":
            self._begin(name)
            self.is_cut = not (yield from text.extent(tell=self._argue))
            return True
        text.take(1)
        # Some models write an object as text, as OpenAI's API does.
        has_begun = is_object = False
        while piece := (yield from text.unescaped()):
            piece = piece if has_begun else piece.lstrip()
            if piece and not has_begun:
                has_begun, is_object = True, piece[0] == "{"
                if is_object:
                    self._begin(name)
            if is_object:
                self._argue(piece)
        self.is_cut = is_object and not (yield from text.ahead())
        text.take(1)
        return is_object

    def _end(self) -> Step:
        """The end of a call whose arguments were told: what else it says is dropped, and its bracket may be missing."""
        text = self._text
        text.taken = ""
        first = yield from text.blanks()
        if first == "," and (yield from text.extent(depth=1)):
            text.taken = ""
            return True
        if first == "}":
            text.take(1)
            text.taken = ""
            return True
        if self._close and (yield from text.has(self._close)):
            text.taken = ""
            return False
        return self._refuse("the call goes on after its arguments") if text.taken.strip(_BETWEEN) or first else True

    def _whole(self, name: str | None, held: str) -> Step:
        """A call that was read to its end without being told."""
        value = parsed(held)
        arguments = value if isinstance(value, str) else held
        if name is None or not isinstance(parsed(arguments), dict):
            return (yield from self._no_call(depth=0))
        if name not in self._names:
            return self._refuse(f"there is no tool {name!r}", is_call=True)
        self._begin(name)
        self._argue(arguments)
        return True

    def _no_call(self, *, depth: int) -> Step:
        """What was read is no call; behind a marker the rest of it is read too, so that what is quoted in it is not taken for calls."""
        is_whole = self._marker == PLAIN or not depth or (yield from self._text.extent(depth))
        return self._refuse(_NO_CALL if is_whole else "the call was cut off")

    def _refuse(self, reason: str, *, is_call: bool = False) -> bool:
        self._reason = self._reason or reason
        self._refused, self._text.taken = self._refused + self._text.taken, ""
        self.is_text = self._marker == PLAIN and not is_call
        return is_call

    def _begin(self, name: str) -> None:
        self._tell_refused()
        self._events.append(ToolCallStarted(name))
        self.has_called = True

    def _argue(self, piece: str) -> None:
        self._pieces.append(piece)
        self._text.taken = ""

    def _tell_pieces(self) -> None:
        if self._pieces:
            self._events.append(ArgumentsDelta("".join(self._pieces)))
            self._pieces = []

    def _tell_refused(self) -> None:
        self._tell_pieces()
        # Brackets that nothing stands in.
        is_rest = self.has_called and not self._refused.strip(_BETWEEN + "]}")
        if self._reason and not is_rest:
            self._events.append(ToolCallRefused(self._refused, self._reason))
        self._refused, self._reason = "", ""


def parsed(text: str) -> Any:
    """What ``text`` says as JSON; None if it is none."""
    try:
        return json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        return None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
