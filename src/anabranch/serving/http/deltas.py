"""`MessageDeltas`: the text of a chat as deltas of a message: content, or calls of tools."""

from collections.abc import Sequence
from typing import Any

from anabranch.serving.chat import Tools
from anabranch.serving.chat.events import ArgumentsDelta, Event, Parser, TextDelta, ToolCallStarted
from anabranch.web.ids import new_id
from anabranch.web.said_order import SaidOrder, said

Delta = dict[str, Any]


class MessageDeltas:
    """Turns the text of one choice into deltas of a message, as OpenAI's: a call begins with empty arguments, which follow in pieces.

    What looks like a call but is none, of a tool that nobody offered, is content.

    Attributes:
        has_called: a call was told, and the last one to its end.

    Args:
        tools: what may be called; None for nothing.
        parser: tells calls apart; None where the text is what it is.
    """

    def __init__(self, tools: Tools | None, parser: Parser | None) -> None:
        self._most = None if tools is None or tools.is_parallel else 1
        self._parser = parser
        # Of calls, those that are one too many included.
        self._count = 0
        # After a call, at the end of the text so far: of no account where nothing or another call follows.
        self._blanks: list[str] = []

    @property
    def has_called(self) -> bool:
        """See the class."""
        is_last_told = self._most is None or self._count <= self._most
        return self._count > 0 and not (self._parser is not None and self._parser.is_cut and is_last_told)

    def push(self, text: str) -> list[Delta]:
        """What the new text says."""
        if self._parser is None:
            return [{"content": text}] if text else []
        return self._deltas(self._parser.push(text)) if text else []

    def end(self) -> list[Delta]:
        """What was held back, after the last text."""
        return [] if self._parser is None else self._deltas(self._parser.end())

    def _deltas(self, events: Sequence[Event]) -> list[Delta]:
        deltas = []
        for event in events:
            if isinstance(event, ToolCallStarted | ArgumentsDelta):
                self._blanks = []
                deltas += self._call(event)
                continue
            may_end = self._count > 0 and isinstance(event, TextDelta)
            said = event.text.rstrip() if may_end else event.text
            behind = event.text[len(said) :]
            if may_end and not said:
                self._blanks.append(behind)
                continue
            if text := "".join((*self._blanks, said)):
                deltas.append({"content": text})
            self._blanks = [behind]
        return deltas

    def _call(self, event: ToolCallStarted | ArgumentsDelta) -> list[Delta]:
        self._count += isinstance(event, ToolCallStarted)
        if self._most is not None and self._count > self._most:
            return []
        index = self._count - 1
        if isinstance(event, ArgumentsDelta):
            return [{"tool_calls": [{"index": index, "function": {"arguments": event.text}}]}]
        function = {"name": event.name, "arguments": ""}
        return [{"tool_calls": [{"index": index, "id": new_id("call"), "type": "function", "function": function}]}]


def message_of(deltas: Sequence[Delta]) -> dict[str, Any]:
    """The message that these deltas make. Where it says something behind a call, it says its order too (`anabranch.web.said_order`)."""
    order = SaidOrder()
    texts: list[str] = []
    thoughts: list[str] = []
    pieces: list[list[Delta]] = []  # by call
    for delta in deltas:
        thoughts.append(delta.get("reasoning_content", ""))
        texts.append(delta.get("content", ""))
        order.add_text(texts[-1])
        for call in delta.get("tool_calls", ()):
            if call["index"] == len(pieces):
                order.add_call(len(pieces))
                pieces.append([])
            pieces[call["index"]].append(call)
    content, reasoning = "".join(texts), "".join(thoughts)
    calls = [_joined(parts) for parts in pieces]
    message: dict[str, Any] = {"role": "assistant", "content": content if content or not calls else None}
    if reasoning:
        message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
        order.put_into(message)
    return message


def joined(deltas: Sequence[Delta]) -> list[Delta]:
    """As few deltas as say what several say, in their order: one for each text and for calls that follow one another."""
    message = message_of(deltas)
    made: list[Delta] = []
    num_calls = 0
    if reasoning := message.get("reasoning_content"):
        made.append({"reasoning_content": reasoning})
    for kind, piece in said(message):
        if kind == "text":
            made.append({"content": piece})
        else:
            numbered = {"index": num_calls, **piece}
            num_calls += 1
            if made and "tool_calls" in made[-1]:
                made[-1]["tool_calls"].append(numbered)
            else:
                made.append({"tool_calls": [numbered]})
    return made


def _joined(parts: Sequence[Delta]) -> dict[str, Any]:
    """A call of its first delta and those with more of its arguments."""
    first = parts[0]
    arguments = "".join(part["function"]["arguments"] for part in parts)
    function = {"name": first["function"]["name"], "arguments": arguments}
    return {"id": first["id"], "type": first["type"], "function": function}
