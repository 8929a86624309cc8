"""The messages of a chat, checked and in the form that templates expect: content as text, arguments of calls as objects."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from anabranch.bounds import shown
from anabranch.serving.chat.cut_json import read_cut_object
from anabranch.serving.chat.errors import FieldError
from anabranch.web.json_size import JsonRoom, JsonSizeError

__all__ = ["read_messages"]

_ROLES = ("system", "developer", "user", "assistant", "tool")
_TEXTS = ("text", "refusal")
# In the arguments of all calls of a request together: they are parsed while all other requests wait.
MOST_VALUES, MOST_PARTS = 1 << 16, 1 << 15
# What an assistant thought, as clients send it back: DeepSeek's and vLLM's names for it.
_REASONING = ("reasoning_content", "reasoning")


def read_messages(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """The messages with their parts joined to text.

    Args:
        messages: {"role", "content": text or a list of text parts, "tool_calls", "tool_call_id", "name", "reasoning_content",
            "refusal"}; an assistant's without content says what it refused, called or thought.

    Raises FieldError, which names the message.
    """
    if not messages:
        raise FieldError("messages", "is empty; give at least one")
    room = JsonRoom(MOST_VALUES, MOST_PARTS)
    return [_message(message, f"messages[{at}]", room) for at, message in enumerate(messages)]


def _message(message: Any, where: str, room: JsonRoom) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise FieldError(where, f"is {shown(message)}; it must be an object with role and content")
    role = message.get("role")
    if role not in _ROLES:
        raise FieldError(f"{where}.role", f"is {shown(role)}; it must be one of {', '.join(_ROLES)}")
    made: dict[str, Any] = {"role": "system" if role == "developer" else role}
    calls = message.get("tool_calls")
    if calls:
        name = f"{where}.tool_calls"
        if role != "assistant":
            raise FieldError(name, f"belongs to an assistant message, not to {role}")
        if not isinstance(calls, list):
            raise FieldError(name, f"is {shown(calls)}; it must be a list")
        made["tool_calls"] = [_call(call, f"{name}[{at}]", room) for at, call in enumerate(calls)]
    content = message.get("content")
    if content is None and role == "assistant":
        content = message.get("refusal")
    is_silent = role == "assistant" and any(message.get(name) is not None for name in _REASONING)
    if content is None and not calls and not is_silent:
        raise FieldError(f"{where}.content", f"is missing; a message of role {role} needs one")
    made["content"] = "" if content is None else _content(content, f"{where}.content")
    for name in ("name", "tool_call_id"):
        if message.get(name) is not None:
            made[name] = _text(message[name], f"{where}.{name}")
    if role == "tool" and "tool_call_id" not in made:
        raise FieldError(f"{where}.tool_call_id", "is missing; say which call it answers")
    thought = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    if thought is not None and role == "assistant":
        # gpt-oss' template calls it thinking.
        made["reasoning_content"] = made["thinking"] = _text(thought, f"{where}.reasoning_content")
    return made


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise FieldError(where, f"is {shown(value)}; it must be text")
    return value


def _content(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise FieldError(where, f"is {shown(content)}; it must be text or a list of parts")
    texts = []
    for at, part in enumerate(content):
        place = f"{where}[{at}]"
        kind = part.get("type") if isinstance(part, Mapping) else None
        if not isinstance(kind, str):
            raise FieldError(place, f"is {shown(part)}; it must be an object with a type")
        if kind not in _TEXTS:
            raise FieldError(f"{place}.type", f"is {kind[:40]!r}; this model reads text only", is_unsupported=True)
        texts.append(_text(part.get(kind), f"{place}.{kind}"))
    return "".join(texts)


def _call(call: Any, where: str, room: JsonRoom) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise FieldError(where, "must be an object with id, type and a function that has a name")
    name, arguments = f"{where}.function.arguments", function.get("arguments")
    if isinstance(arguments, str):
        arguments = _arguments(arguments, name, room)
    elif arguments is not None and not isinstance(arguments, Mapping):
        raise FieldError(name, "must be JSON as text")
    made = {"name": function["name"], "arguments": {} if arguments is None else arguments}
    return {"id": str(call.get("id", "")), "type": "function", "function": made}


def _arguments(text: str, name: str, room: JsonRoom) -> Any:
    """What arguments say; of those that end in the middle, as where an answer reached its limit of tokens, what is there."""
    try:
        room.take(text.encode("utf-8", "replace"))
    except JsonSizeError as error:
        raise FieldError(name, f"is too much: the arguments of all calls together have {error}") from None
    try:
        return json.loads(text or "{}")
    except RecursionError:
        raise FieldError(name, "is nested too deep") from None
    except ValueError:
        made = read_cut_object(text)
    if made is None:
        raise FieldError(name, "is no JSON")
    return made
