"""Parsers of calls that stand behind marks: DeepSeek's, Qwen3-Coder's, Mistral's newer ones. See `anabranch.serving.chat.events.Parser`."""

import json
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from anabranch.serving.chat.events import ArgumentsDelta, Event, TextDelta, ToolCallRefused, ToolCallStarted, held
from anabranch.serving.chat.growing import Growing
from anabranch.serving.chat.values import json_value

__all__ = ["DeepSeekParser", "MarkedParser", "MistralParser", "XmlParser", "names_of"]

Steps = Generator[None, None, None]
_CALLS, _CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL, _CALL_END, _SEPARATOR = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
_TOOL, _TOOL_END, _FUNCTION, _FUNCTION_END = "<tool_call>", "</tool_call>", "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"
_MISTRAL, _ARGUMENTS, _ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"


def names_of(tools: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of tools."""
    return [tool["function"]["name"] for tool in tools]


class MarkedParser:
    """Text up to a mark, what is called behind it, and so on. Subclasses say what marks there are and read what is behind them.

    Args:
        tools: those offered.
    """

    marks: tuple[str, ...] = ()

    def __init__(self, tools: Sequence[Mapping[str, Any]]) -> None:
        self._tools = {tool["function"]["name"]: tool["function"] for tool in tools}
        self._text = Growing()
        self._events: list[Event] = []
        self.is_cut = self._has_called = False
        self._steps = self._read()

    def push(self, text: str) -> list[Event]:
        """What the text so far says for certain."""
        self._text.push(text)
        next(self._steps, None)
        events, self._events = self._events, []
        return events

    def end(self) -> list[Event]:
        """What was held back, after the last text."""
        self._text.is_over = True
        return self.push("")

    def _behind(self, mark: str) -> Steps:
        """Read the calls behind a mark, which was read."""
        raise NotImplementedError

    def _read(self) -> Steps:
        text = self._text
        while True:
            mark = yield from self._outside()
            text.taken = mark
            if not mark:
                return
            yield from self._behind(mark)
            # What was read and is no call.
            if text.taken.strip():
                self._events.append(ToolCallRefused(text.taken, "what is called is no tool with arguments"))
            text.taken = ""

    def _outside(self) -> Generator[None, None, str]:
        """Tell what comes before the next mark, without the blanks in front of it; the mark, and nothing at the end."""
        text = self._text
        while True:
            rest = text.rest
            found = [(at, mark) for mark in self.marks if (at := rest.find(mark)) >= 0]
            at, mark = min(found) if found else (len(rest) - held(rest, self.marks), "")
            before = rest[:at].rstrip() if mark or not text.is_over else rest
            if before.strip() or (before and not self._has_called):
                self._events.append(TextDelta(before))
            text.take(len(before))
            if mark:
                text.take(at - len(before) + len(mark))
                return mark
            if text.is_over:
                return ""
            yield

    def _until(self, mark: str, *others: str) -> Generator[None, None, str | None]:
        """Read up to ``mark``, and the mark; what is before it. None where it never comes, or another comes first, which is left."""
        text, start = self._text, len(self._text.taken)
        marks = (mark, *others)
        while True:
            rest = text.rest
            found = [(at, each) for each in marks if (at := rest.find(each)) >= 0]
            if found:
                at, first = min(found)
                text.take(at)
                said = text.taken[start:]
                if first != mark:
                    return None
                text.take(len(mark))
                return said
            text.take(len(rest) - (0 if text.is_over else held(rest, marks)))
            if text.is_over:
                return None
            yield

    def _begin(self, name: str) -> None:
        self._text.taken = ""
        self._has_called = True
        self._events.append(ToolCallStarted(name))

    def _tell(self, piece: str) -> None:
        """More arguments."""
        self._text.taken = ""
        if piece:
            self._events.append(ArgumentsDelta(piece))

    def _object(self, name: str) -> Generator[None, None, bool]:
        """Tell a call whose arguments, a JSON object, come next; False, with nothing read, where they do not, or there is no such tool."""
        if name not in self._tools or (yield from self._text.blanks()) != "{":
            return False
        self._begin(name)
        self.is_cut = not (yield from self._text.extent(tell=self._tell))
        return True


class DeepSeekParser(MarkedParser):
    """DeepSeek's calls, as V3 and R1 write them (``function``, the name, JSON in a code block) and as V3.1 does (the name, JSON)."""

    marks = (_CALLS, _CALL)

    def _behind(self, mark: str) -> Steps:
        text = self._text
        if mark == _CALLS:
            yield from text.blanks()
            if not (yield from text.has(_CALL)):
                return
        while True:
            name = yield from self._until(_SEPARATOR, _CALL_END, _CALLS_END)
            if name is not None and name.strip() == "function":
                name = yield from self._until("\n", _CALL_END, _CALLS_END)
                if name is not None:
                    yield from text.has("```json")
            if name is not None and (yield from self._object(name.strip())):
                if not self.is_cut:
                    yield from text.has("```")
                yield from text.has(_CALL_END)
                text.taken = ""
            else:
                yield from self._until(_CALL_END, _CALLS_END)
                self._refuse(name)
            if not (yield from text.has(_CALL)):
                break
        yield from text.has(_CALLS_END)
        text.taken = ""

    def _refuse(self, name: str | None) -> None:
        taken, self._text.taken = self._text.taken, ""
        if taken.strip():
            is_other = name is not None and name.strip() not in self._tools
            reason = f"there is no tool {(name or '').strip()!r}" if is_other else "its arguments are no JSON object"
            self._events.append(ToolCallRefused(taken, reason))


class MistralParser(MarkedParser):
    """Mistral's calls since its tokenizers' version 11: ``[TOOL_CALLS]NAME[ARGS]{...}``; a list of JSON objects before."""

    marks = (_MISTRAL,)

    def _behind(self, mark: str) -> Steps:
        name = yield from self._until(_ARGUMENTS, _MISTRAL)
        if name is not None and not (yield from self._object(name.partition(_ID)[0].strip())):
            yield from self._text.value()


class XmlParser(MarkedParser):
    """Qwen3-Coder's calls: ``<tool_call><function=NAME><parameter=KEY>value</parameter></function></tool_call>``.

    Values are JSON where the tool's schema says that they are no text, and told as they are where they are none.
    """

    marks = (_TOOL, _FUNCTION)

    def _behind(self, mark: str) -> Steps:
        text = self._text
        if mark == _TOOL:
            yield from text.blanks()
            if not (yield from text.has(_FUNCTION)):
                yield from self._until(_TOOL_END)
                return
        name = yield from self._until(">", _FUNCTION_END, _TOOL_END)
        name = None if name is None else name.strip()
        if name is None or name not in self._tools:
            yield from self._until(_FUNCTION_END, _TOOL_END)
            yield from text.has(_TOOL_END)
            taken, text.taken = text.taken, ""
            self._events.append(ToolCallRefused(taken, f"there is no tool {name!r}"))
            return
        self._begin(name)
        yield from self._parameters(name)
        yield from text.has(_TOOL_END)
        text.taken = ""

    def _parameters(self, name: str) -> Steps:
        text, separator = self._text, "{"
        while (yield from text.has(_PARAMETER)):
            key = yield from self._until(">", _FUNCTION_END)
            value = None if key is None else (yield from self._until(_PARAMETER_END, _FUNCTION_END))
            if key is None or value is None:
                break
            value = json_value(value, key.strip(), self._tools[name].get("parameters"))
            self._tell(f"{separator}{json.dumps(key.strip(), ensure_ascii=False)}: {value}")
            separator = ", "
        is_whole = yield from text.has(_FUNCTION_END)
        self.is_cut = not is_whole
        if is_whole:
            self._tell("{}" if separator == "{" else "}")
