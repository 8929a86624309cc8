"""A request to ``POST /v1/messages`` as one of chat."""

import json
from collections.abc import Iterator
from typing import Any

from anabranch.web.api_error import wrong
from anabranch.web.body import said
from anabranch.web.said_order import SaidOrder

Json = dict[str, Any]

# Tokens to think with.
LEAST_BUDGET = 1024

# What chat calls likewise, or knows nothing of, and only Anthropic's own models are sent.
_AS_THEY_ARE = (
    "model",
    "stream",
    "temperature",
    "top_p",
    "top_k",
    "thinking",
    "cache_control",
    "container",
    "context_management",
    "inference_geo",
    "speed",
)
_TOOL_CHOICE = {"auto": "auto", "any": "required", "none": "none"}


def to_chat(body: Json, *, counts: bool = False) -> Json:
    """The request of ``/v1/chat/completions`` that asks the same.

    Beside OpenAI's fields it has Anthropic's own: ``cache_control`` of parts, messages, tools and calls, ``thinking_blocks`` of messages,
    ``is_error`` of results of tools, ``thinking`` and ``top_k``; among the parts, blocks that chat has no form for; and of a message that
    says something behind a call the order (`anabranch.web.said_order`).

    Args:
        body: the request, as it came.
        counts: its tokens are to be counted, not more: ``max_tokens`` may be missing.

    Raises ApiError for what is no request to this API.
    """
    chat: Json = {name: body[name] for name in _AS_THEY_ARE if body.get(name) is not None}
    most = body.get("max_tokens")
    if most is None and not counts:
        raise wrong("max_tokens", "max_tokens is missing; it must be an integer of at least 1")
    if most is not None:
        chat["max_tokens"] = most
    if not isinstance(body.get("messages"), list) or not body["messages"]:
        raise wrong(
            "messages", f"messages is {said(body.get('messages'))}; it must be a list with at least one message"
        )
    chat["messages"] = [*_system(body.get("system")), *_messages(body["messages"])]
    if body.get("stop_sequences") is not None:
        if not _are_texts(body["stop_sequences"]):
            raise wrong("stop_sequences", "stop_sequences must be a list of texts")
        if body["stop_sequences"]:
            chat["stop"] = body["stop_sequences"]
    user = _table(body, "metadata").get("user_id")
    if isinstance(user, str) and user:
        chat["user"] = user
    _add_tools(chat, body)
    _add_output(chat, body)
    _check_thinking(body)
    if body.get("stream"):
        chat["stream_options"] = {"include_usage": True}
    return chat


def _check_thinking(body: Json) -> None:
    thinking = body.get("thinking")
    if thinking is None:
        return
    if not isinstance(thinking, dict) or not isinstance(thinking.get("type"), str):
        raise wrong("thinking", f"thinking is {said(thinking)}; it must be an object with a type")
    budget, most = thinking.get("budget_tokens"), body.get("max_tokens")
    if thinking["type"] != "enabled":
        return
    if not isinstance(budget, int) or isinstance(budget, bool) or budget < LEAST_BUDGET:
        name = "thinking.budget_tokens"
        raise wrong(name, f"{name} is {said(budget)}; it must be an integer of at least {LEAST_BUDGET:,}")
    if isinstance(most, int) and budget >= most:
        raise wrong("max_tokens", f"max_tokens is {most:,}; it must be greater than thinking.budget_tokens, {budget:,}")


def _add_output(chat: Json, body: Json) -> None:
    """``output_config``, or ``output_format`` as it was called before."""
    config = _table(body, "output_config")
    if config.get("effort") is not None:
        chat["reasoning_effort"] = config["effort"]
    wanted = config.get("format") or body.get("output_format")
    if wanted is None:
        return
    if (
        not isinstance(wanted, dict)
        or wanted.get("type") != "json_schema"
        or not isinstance(wanted.get("schema"), dict)
    ):
        raise wrong("output_config.format", 'output_config.format must be {"type": "json_schema", "schema": {...}}')
    chat["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": wanted["schema"]}}


# Tools


def _add_tools(chat: Json, body: Json) -> None:
    tools = body.get("tools")
    if tools is not None:
        if not isinstance(tools, list):
            raise wrong("tools", "tools must be a list")
        if tools:
            chat["tools"] = [_tool(tool, at) for at, tool in enumerate(tools)]
    choice = body.get("tool_choice")
    if choice is None:
        return
    kind = choice.get("type") if isinstance(choice, dict) else None
    if kind == "tool" and isinstance(choice.get("name"), str):
        chat["tool_choice"] = {"type": "function", "function": {"name": choice["name"]}}
    elif isinstance(kind, str) and kind in _TOOL_CHOICE:
        chat["tool_choice"] = _TOOL_CHOICE[kind]
    else:
        raise wrong(
            "tool_choice", f"tool_choice is {said(choice)}; its type must be auto, any, tool (with a name) or none"
        )
    if choice.get("disable_parallel_tool_use") and chat.get("tools"):
        chat["parallel_tool_calls"] = False


def _tool(tool: Any, at: int) -> Json:
    name = f"tools[{at}]"
    if not isinstance(tool, dict) or not isinstance(tool.get("name", ""), str):
        raise wrong(name, f"{name} is {said(tool)}; it must be an object with a name")
    if tool.get("type") not in (None, "custom"):
        # It runs at Anthropic, or is known to its models.
        return tool
    if not isinstance(tool.get("input_schema"), dict) or not tool.get("name"):
        raise wrong(f"{name}.input_schema", f"{name} needs a name and an input_schema")
    function: Json = {"name": tool["name"], "parameters": tool["input_schema"]}
    for field in ("description", "strict"):
        if tool.get(field) is not None:
            function[field] = tool[field]
    return _marked({"type": "function", "function": function}, tool)


def _marked(made: Json, source: Json) -> Json:
    mark = source.get("cache_control")
    return made if mark is None else {**made, "cache_control": mark}


# Messages


def _system(given: Any) -> list[Json]:
    if given is None or given in ("", []):
        return []
    if isinstance(given, str):
        return [{"role": "system", "content": given}]
    return [
        {"role": "system", "content": _short([_part(block, f"system[{at}]") for at, block in _listed(given, "system")])}
    ]


def _messages(given: list[Any]) -> Iterator[Json]:
    for at, message in enumerate(given):
        name = f"messages[{at}]"
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("user", "assistant", "system"):
            raise wrong(f"{name}.role", f"{name}.role is {said(role)}; it must be user or assistant")
        content = message.get("content")
        if isinstance(content, str):
            yield {"role": role, "content": content}
        elif role == "assistant":
            yield _assistant(content, name)
        else:
            yield from _user(role, content, name)


def _user(role: str, content: Any, name: str) -> Iterator[Json]:
    """Results of tools are messages of their own, in front of what else is said."""
    parts: list[Json] = []
    for at, block in _listed(content, f"{name}.content"):
        where = f"{name}.content[{at}]"
        if block.get("type") == "tool_result":
            yield _tool_result(block, where)
        else:
            parts.append(_part(block, where))
    if parts:
        yield {"role": role, "content": _short(parts)}


def _tool_result(block: Json, name: str) -> Json:
    if not isinstance(block.get("tool_use_id"), str):
        raise wrong(f"{name}.tool_use_id", f"{name}.tool_use_id must be that of a tool_use")
    content = block.get("content")
    if content is None or isinstance(content, str):
        shown: Any = content or ""
    else:
        shown = _short([_part(part, f"{name}.content[{at}]") for at, part in _listed(content, f"{name}.content")])
    made: Json = {"role": "tool", "tool_call_id": block["tool_use_id"], "content": shown}
    if block.get("is_error"):
        made["is_error"] = True
    return _marked(made, block)


def _assistant(content: Any, name: str) -> Json:
    parts: list[Json] = []
    calls: list[Json] = []
    thoughts: list[Json] = []
    order = SaidOrder()
    for at, block in _listed(content, f"{name}.content"):
        kind, where = block.get("type"), f"{name}.content[{at}]"
        if kind in ("thinking", "redacted_thinking"):
            thoughts.append(block)
        elif kind == "tool_use":
            order.add_call(len(calls))
            calls.append(_call(block, where))
        else:
            order.add_part()
            parts.append(_part(block, where))
    made: Json = {"role": "assistant", "content": _short(parts) if parts else None}
    if thoughts:
        made["thinking_blocks"] = thoughts
    if calls:
        made["tool_calls"] = calls
        order.put_into(made)
    return made


def _call(block: Json, name: str) -> Json:
    given = block.get("input")
    if not isinstance(block.get("name"), str) or not isinstance(block.get("id"), str) or not isinstance(given, dict):
        raise wrong(name, f"{name} is a tool_use; it needs an id, a name and an input that is an object")
    function = {"name": block["name"], "arguments": json.dumps(given, ensure_ascii=False)}
    return _marked({"id": block["id"], "type": "function", "function": function}, block)


def _short(parts: list[Json]) -> Any:
    """One text of which nothing more is said, as a text; else the parts."""
    if len(parts) == 1 and set(parts[0]) == {"type", "text"}:
        return parts[0]["text"]
    return parts


def _part(block: Json, name: str) -> Json:
    """A block as a part of a chat message, or as it is where chat has no form for it."""
    kind, source = block.get("type"), block.get("source")
    if not isinstance(kind, str):
        raise wrong(f"{name}.type", f"{name} must be an object with a type")
    if kind == "text":
        if not isinstance(block.get("text"), str):
            raise wrong(f"{name}.text", f"{name}.text is {said(block.get('text'))}; it must be text")
        return {
            field: block[field]
            for field in ("type", "text", "cache_control", "citations")
            if block.get(field) is not None
        }
    if kind in ("image", "document") and isinstance(source, dict):
        url = _url(source, name)
        if kind == "image" and url is not None:
            return _marked({"type": "image_url", "image_url": {"url": url}}, block)
        if url is not None and source.get("type") == "base64":
            return _file(block, url)
    return block


def _url(source: Json, name: str) -> str | None:
    """Of what a source holds; None of one by another way."""
    if source.get("type") == "url":
        if not isinstance(source.get("url"), str):
            raise wrong(f"{name}.source.url", f"{name}.source.url must be text")
        return str(source["url"])
    if source.get("type") != "base64":
        return None
    media, data = source.get("media_type"), source.get("data")
    if not isinstance(media, str) or not isinstance(data, str):
        raise wrong(f"{name}.source", f"{name}.source needs a media_type and data in base64")
    return f"data:{media};base64,{data}"


def _file(block: Json, url: str) -> Json:
    file: Json = {"file_data": url}
    if isinstance(block.get("title"), str):
        file["filename"] = block["title"]
    more = {field: block[field] for field in ("title", "context", "citations") if block.get(field) is not None}
    return _marked({"type": "file", "file": file, **more}, block)


# Shapes


def _listed(value: Any, name: str) -> Iterator[tuple[int, Json]]:
    if not isinstance(value, list):
        raise wrong(name, f"{name} is {said(value)}; it must be text or a list of blocks")
    for at, item in enumerate(value):
        if not isinstance(item, dict):
            raise wrong(f"{name}[{at}]", f"{name}[{at}] is {said(item)}; it must be an object with a type")
        yield at, item


def _table(body: Json, name: str) -> Json:
    value = body.get(name) or {}
    if not isinstance(value, dict):
        raise wrong(name, f"{name} is {said(value)}; it must be an object")
    return value


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)
