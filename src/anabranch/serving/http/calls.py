"""From the text of a chat to what is said of it: content, or calls of tools."""

from typing import Any

from anabranch.serving.chat import Called, Said, parser_for
from anabranch.serving.http.messages import Tools
from anabranch.web.ids import new_id

Delta = dict[str, Any]


class Speech:
    """Turns the text of one choice into deltas of a message.

    A call is told when it is whole. What looks like a call but is none, of a tool that nobody offered, is content.

    Attributes:
        has_called: a call was told.

    Args:
        tools: what may be called; None where the text is what it is.
    """

    def __init__(self, tools: Tools | None) -> None:
        self.has_called = False
        self._is_parallel = tools is None or tools.is_parallel
        self._parser = None if tools is None else parser_for(tools.offered)
        self._count = 0

    def push(self, text: str) -> list[Delta]:
        """What the new text says."""
        if self._parser is None:
            return [{"content": text}] if text else []
        return self._deltas(self._parser.push(text)) if text else []

    def end(self) -> list[Delta]:
        """What was held back, after the last text."""
        return [] if self._parser is None else self._deltas(self._parser.end())

    def _deltas(self, events: list[Any]) -> list[Delta]:
        deltas: list[Delta] = []
        for event in events:
            if not isinstance(event, Called):
                text = event.text.rstrip() if self.has_called and isinstance(event, Said) else event.text
                deltas += [{"content": text}] if text else []
            elif self._is_parallel or not self.has_called:
                self.has_called = True
                function = {"name": event.name, "arguments": event.arguments}
                call = {"index": self._count, "id": new_id("call"), "type": "function", "function": function}
                deltas.append({"tool_calls": [call]})
                self._count += 1
        return deltas


def merged(deltas: list[Delta]) -> dict[str, Any]:
    """The message that these deltas make."""
    content = "".join(delta.get("content", "") for delta in deltas)
    calls = [
        {name: value for name, value in call.items() if name != "index"}
        for delta in deltas
        for call in delta.get("tool_calls", ())
    ]
    message: dict[str, Any] = {"role": "assistant", "content": content if content or not calls else None}
    return {**message, "tool_calls": calls} if calls else message
