"""From the text of a chat to what is said of it: content, or calls of tools."""

import json
from typing import Any

from anabranch.serving.http.messages import Tools
from anabranch.web.ids import new_id

Delta = dict[str, Any]


class Speech:
    """Turns the text of one choice into deltas of a message.

    Attributes:
        has_called: a call is complete.
    """

    def __init__(self) -> None:
        self.has_called = False

    def push(self, text: str) -> list[Delta]:
        """What the new text says."""
        return [{"content": text}] if text else []

    def end(self) -> list[Delta]:
        """What was held back, after the last text."""
        return []


class NamedCall(Speech):
    """The whole text is the arguments of one tool."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name, self._text = name, ""

    def push(self, text: str) -> list[Delta]:
        """See `Speech`."""
        deltas = [] if self._text or not text else [call_delta(0, self._name, "")]
        self._text += text
        return [*deltas, {"tool_calls": [{"index": 0, "function": {"arguments": text}}]}] if text else []

    def end(self) -> list[Delta]:
        """See `Speech`."""
        self.has_called = is_json(self._text)
        return []


class AnyCall(Speech):
    """The whole text is an object with the name of a tool and its arguments; it is told when it is whole."""

    def __init__(self) -> None:
        super().__init__()
        self._text = ""

    def push(self, text: str) -> list[Delta]:
        """See `Speech`."""
        self._text += text
        return []

    def end(self) -> list[Delta]:
        """See `Speech`: a text that was cut off is told as it is."""
        try:
            call = json.loads(self._text)
            name, arguments = call["name"], call["arguments"]
        except (ValueError, TypeError, KeyError):
            return [{"content": self._text}] if self._text else []
        self.has_called = True
        return [call_delta(0, name, json.dumps(arguments, ensure_ascii=False))]


def is_json(text: str) -> bool:
    """Whether it is JSON to its end."""
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def call_delta(index: int, name: str, arguments: str) -> Delta:
    """A call as the first delta of it says it."""
    function = {"name": name, "arguments": arguments}
    return {"tool_calls": [{"index": index, "id": new_id("call"), "type": "function", "function": function}]}


def merged(deltas: list[Delta]) -> dict[str, Any]:
    """The message that these deltas make."""
    content: list[str] = []
    calls: dict[int, dict[str, Any]] = {}
    for delta in deltas:
        if delta.get("content"):
            content.append(delta["content"])
        for part in delta.get("tool_calls", ()):
            if "id" in part:
                calls[part["index"]] = {
                    "id": part["id"], "type": "function", "function": dict(part["function"])
                }  # fmt: skip
            else:
                calls[part["index"]]["function"]["arguments"] += part["function"]["arguments"]
    message: dict[str, Any] = {"role": "assistant", "content": "".join(content) if content or not calls else None}
    if calls:
        message["tool_calls"] = [calls[index] for index in sorted(calls)]
    return message


def speech_for(tools: Tools | None, model_tools: Any = None) -> Speech:
    """How the text of a request with these tools is understood."""
    if tools is None:
        return Speech()
    if tools.choice == "named":
        return NamedCall(tools.name)
    if tools.choice == "required":
        return AnyCall()
    return Speech()
