"""The messages of a chat, checked and flattened to text; tools and the choice among them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from anabranch.serving.chat import call_grammar
from anabranch.serving.http.fields import unsupported
from anabranch.web.api_error import wrong
from anabranch.web.body import said

ROLES = ("system", "developer", "user", "assistant", "tool")
_NAME = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.")


@dataclass(frozen=True, slots=True)
class Tools:
    """What may be called.

    Attributes:
        offered: the tools as they came, for the template.
        choice: ``auto``, ``required``, or ``named``.
        name: of the one that has to be called, with ``named``.
        is_parallel: several calls in one answer.
    """

    offered: tuple[dict[str, Any], ...]
    choice: str = "auto"
    name: str = ""
    is_parallel: bool = True

    def grammar(self) -> dict[str, Any] | None:
        """What the output has to be where a call is demanded; None where it may be anything. Raises InputError."""
        wanted = {"type": "function", "function": {"name": self.name}} if self.choice == "named" else self.choice
        return call_grammar(self.offered, wanted, is_parallel=self.is_parallel)


def read_messages(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """The messages with their parts joined to text. Raises ApiError (400) that names the message."""
    return [_message(message, f"messages[{at}]") for at, message in enumerate(messages)]


def _message(message: Any, name: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise wrong(name, f"{name} is {said(message)}; it must be an object with role and content")
    role = message.get("role")
    if role not in ROLES:
        raise wrong(f"{name}.role", f"{name}.role is {said(role)}; it must be one of {', '.join(ROLES)}")
    made: dict[str, Any] = {"role": "system" if role == "developer" else role}
    calls = message.get("tool_calls")
    if calls:
        if role != "assistant":
            raise wrong(f"{name}.tool_calls", f"{name}.tool_calls belongs to an assistant message, not to {role}")
        made["tool_calls"] = [_call(call, f"{name}.tool_calls[{at}]") for at, call in enumerate(_list(calls, name))]
    content = message.get("content")
    if content is None and not calls:
        raise wrong(f"{name}.content", f"{name}.content is missing; a message of role {role} needs one")
    made["content"] = "" if content is None else _content(content, f"{name}.content")
    if role == "tool":
        if not isinstance(message.get("tool_call_id"), str):
            raise wrong(f"{name}.tool_call_id", f"{name}.tool_call_id is missing; say which call it answers")
        made["tool_call_id"] = message["tool_call_id"]
    if message.get("name") is not None:
        if not isinstance(message["name"], str):
            raise wrong(f"{name}.name", f"{name}.name is {said(message['name'])}; it must be text")
        made["name"] = message["name"]
    return made


def _list(calls: Any, name: str) -> list[Any]:
    if not isinstance(calls, list):
        raise wrong(f"{name}.tool_calls", f"{name}.tool_calls is {said(calls)}; it must be a list")
    return calls


def _content(content: Any, name: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise wrong(name, f"{name} is {said(content)}; it must be text or a list of parts")
    texts = []
    for at, part in enumerate(content):
        where = f"{name}[{at}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str):
            raise wrong(where, f"{where} is {said(part)}; it must be an object with a type")
        if kind not in ("text", "refusal"):
            raise unsupported(f"{where}.type", f"{where} is of type {kind[:40]!r}; this model reads text only")
        if not isinstance(part.get(kind), str):
            raise wrong(f"{where}.{kind}", f"{where}.{kind} is {said(part.get(kind))}; it must be text")
        texts.append(part[kind])
    return "".join(texts)


def _call(call: Any, name: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise wrong(name, f"{name} must be an object with id, type and function, which has a name")
    arguments = function.get("arguments", "{}")
    if not isinstance(arguments, str):
        raise wrong(f"{name}.function.arguments", f"{name}.function.arguments must be JSON as text")
    try:
        parsed = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        raise wrong(f"{name}.function.arguments", f"{name}.function.arguments is no JSON") from None
    made = {"name": function["name"], "arguments": parsed}
    return {"id": str(call.get("id", "")), "type": "function", "function": made}


def read_tools(body: dict[str, Any]) -> Tools | None:
    """The tools of a request; None if it has none or wants none. Raises ApiError (400)."""
    tools, choice = body.get("tools") or [], body.get("tool_choice")
    if not tools:
        if choice not in (None, "none", "auto"):
            raise wrong("tool_choice", f"tool_choice is {said(choice)}, but there are no tools")
        return None
    offered = tuple(_tool(tool, f"tools[{at}]") for at, tool in enumerate(tools))
    names = [tool["function"]["name"] for tool in offered]
    if len(set(names)) < len(names):
        raise wrong("tools", "tools has two functions of one name")
    is_parallel = body.get("parallel_tool_calls") is not False
    if choice == "none":
        return None
    if choice in (None, "auto", "required"):
        return Tools(offered, choice or "auto", "", is_parallel)
    if isinstance(choice, str):
        raise wrong("tool_choice", f'tool_choice is {said(choice)}; it must be "none", "auto", "required" or an object')
    name = choice["function"].get("name") if isinstance(choice.get("function"), dict) else None
    if choice.get("type") != "function" or not isinstance(name, str):
        raise wrong("tool_choice", 'tool_choice as an object is {"type": "function", "function": {"name": ...}}')
    if name not in names:
        raise wrong("tool_choice.function.name", f"tool_choice names {name[:60]!r}, which is none of tools")
    return Tools(offered, "named", name, is_parallel)


def _tool(tool: Any, name: str) -> dict[str, Any]:
    kind = tool.get("type") if isinstance(tool, dict) else None
    if kind != "function":
        raise unsupported(f"{name}.type", f"{name} is of type {said(kind)}; only functions can be offered")
    function = tool.get("function")
    label = function.get("name") if isinstance(function, dict) else None
    if not isinstance(label, str) or not 0 < len(label) <= 64 or set(label) - _NAME:
        raise wrong(f"{name}.function.name", f"{name}.function.name must be 1 to 64 letters, digits, _, - or .")
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, dict):
        raise wrong(f"{name}.function.parameters", f"{name}.function.parameters must be a JSON schema")
    return tool
