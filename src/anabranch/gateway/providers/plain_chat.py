"""What came in Anthropic's form (`anabranch.web.messages`) as a chat that any model of OpenAI's API takes.

| what only Anthropic knows | becomes |
|---|---|
| `cache_control`, `top_k`, `context_management` | left out: hints |
| `thinking_blocks` | left out: thoughts of another model; but for a provider that can tell its own |
| `thinking` | `reasoning_effort`, where the model reasons |
| an image or a file in the result of a tool | a user's message behind the results |
| a document in words, a search result | text |
| `is_error` | the word Error before the result |
| text behind a call of a tool | stands before it: a message of chat has one text; but for a provider that has an order |
| blocks of tools that run at Anthropic, files by id, dated tools | refused as unsupported |
"""

from collections.abc import Iterator
from typing import Any

from anabranch.gateway.providers.openai_models import effort_of
from anabranch.gateway.providers.provider import Failure, Json, UpstreamError
from anabranch.web.said_order import ORDER

_LEFT_OUT = frozenset(
    {"cache_control", "thinking", "top_k", "context_management", "container", "inference_geo", "speed", "diagnostics"}
)
_FIELDS = {"text": ("type", "text"), "image_url": ("type", "image_url"), "file": ("type", "file")}
_MESSAGE = ("role", "content", "name", "tool_calls", "tool_call_id")


def plain(body: Json, model: str, *, keeps_thoughts: bool = False, keeps_order: bool = False) -> Json:
    """The same chat in OpenAI's words alone. Raises UpstreamError (``unsupported``) for what has none.

    Args:
        body: of a chat, as `anabranch.web.messages.to_chat` made it.
        model: what the upstream calls it.
        keeps_thoughts: ``thinking_blocks`` of messages stay, for a provider that takes from them what is its own, and ``thinking``.
        keeps_order: messages say in which order their text and calls came (`anabranch.web.said_order`), for one that has an order.
    """
    left_out = _LEFT_OUT - {"thinking"} if keeps_thoughts else _LEFT_OUT
    made = {name: value for name, value in body.items() if name not in left_out}
    fields = (*_MESSAGE, *(("thinking_blocks",) if keeps_thoughts else ()), *((ORDER,) if keeps_order else ()))
    made["messages"] = list(_messages(body["messages"], fields))
    if body.get("tools"):
        made["tools"] = [_tool(tool) for tool in body["tools"]]
    effort = effort_of(body.get("thinking"), model)
    if effort is not None and body.get("reasoning_effort") is None:
        made["reasoning_effort"] = effort
    return made


def _messages(given: list[Json], fields: tuple[str, ...]) -> Iterator[Json]:
    shown: list[Json] = []
    for message in given:
        if message["role"] != "tool" and shown:
            # Results follow their calls at once: what can be seen in them comes behind them all.
            yield {"role": "user", "content": shown}
            shown = []
        made = {name: message[name] for name in fields if name in message}
        content = message.get("content")
        if isinstance(content, list):
            parts = [_part(part) for part in content]
            if message["role"] == "tool":
                shown += [part for part in parts if part["type"] != "text"]
                texts = [part["text"] for part in parts if part["type"] == "text"]
                made["content"] = "\n".join(texts) or "(see the next message)"
            else:
                # The order of a message is that of its parts.
                made["content"] = parts if ORDER in made else _short(parts)
        if message.get("is_error"):
            made["content"] = f"Error: {made['content']}"
        if message.get("tool_calls"):
            made["tool_calls"] = [
                {name: value for name, value in call.items() if name != "cache_control"}
                for call in message["tool_calls"]
            ]
        if message["role"] != "assistant" or any(
            made.get(name) for name in ("content", "tool_calls", "thinking_blocks")
        ):
            yield made
    if shown:
        yield {"role": "user", "content": shown}


def _short(parts: list[Json]) -> Any:
    """Text alone as text, which every model takes."""
    if all(part["type"] == "text" for part in parts):
        return "\n\n".join(part["text"] for part in parts)
    return parts


def _part(part: Json) -> Json:
    kind = part["type"]
    if kind in _FIELDS:
        return {name: part[name] for name in _FIELDS[kind] if name in part}
    source = part.get("source")
    if kind == "document" and isinstance(source, dict):
        if source.get("type") == "text":
            return _text(part.get("title"), part.get("context"), source.get("data"))
        if source.get("type") == "content":
            content = source.get("content")
            return _text(part.get("title"), part.get("context"), *_texts(content))
    if kind == "search_result":
        return _text(part.get("title"), source, *_texts(part.get("content")))
    where = f" by {source.get('type')}" if isinstance(source, dict) else ""
    raise _unsupported(f"a part of type {kind!r}{where} can be sent to models of Anthropic alone")


def _texts(content: Any) -> list[Any]:
    if isinstance(content, str):
        return [content]
    return [one.get("text") for one in content or () if isinstance(one, dict)]


def _text(*lines: Any) -> Json:
    return {"type": "text", "text": "\n".join(line for line in lines if isinstance(line, str) and line)}


def _tool(tool: Json) -> Json:
    if tool.get("type") != "function":
        raise _unsupported(f"a tool of type {tool.get('type')!r} runs at Anthropic alone")
    return {
        "type": "function",
        "function": {name: value for name, value in tool["function"].items() if name != "cache_control"},
    }


def _unsupported(message: str) -> UpstreamError:
    return UpstreamError(Failure(kind="unsupported", message=message))
