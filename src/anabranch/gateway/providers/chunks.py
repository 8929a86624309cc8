"""Chunks of a stream and whole answers: what is in a chunk, an answer put together from chunks, and chunks made of an answer."""

from collections.abc import Iterable
from typing import Any

from anabranch.gateway.providers.native_events import NATIVE, events_of
from anabranch.gateway.providers.provider import Json
from anabranch.web.beside import joined
from anabranch.web.reasoning_details import details_in, joined_details

# Most choices, or calls of tools, of an answer.
PLACES = 1024
_OF_CALL = ("index", "id", "type", "function")
TEXTS = ("content", "reasoning_content", "reasoning", "refusal")


def has_content(chunk: Json) -> bool:
    """Whether a chunk carries something of the answer: text, a tool call, or its end."""
    for choice in _choices(chunk):
        if choice.get("text") or choice.get("finish_reason"):
            return True
        delta = choice.get("delta")
        if isinstance(delta, dict) and any(
            value for name, value in delta.items() if name not in ("role", "function_call")
        ):
            return True
    return False


def ended(chunk: Json) -> set[int]:
    """The choices that end with this chunk."""
    return {_place(choice, 0) for choice in _choices(chunk) if choice.get("finish_reason")}


def text_of(chunks: Iterable[Json]) -> str:
    """What the first choice says in them."""
    parts = []
    for chunk in chunks:
        for choice in _choices(chunk):
            delta = choice.get("delta")
            text = delta.get("content") if isinstance(delta, dict) else choice.get("text")
            if choice.get("index", 0) == 0 and isinstance(text, str):
                parts.append(text)
    return "".join(parts)


def assembled(chunks: Iterable[Json], endpoint: str = "chat") -> Json:
    """The whole answer that a stream's chunks make, in the form a request without ``stream`` gets."""
    body: Json = {}
    choices: dict[int, Json] = {}
    for chunk in chunks:
        for name, value in chunk.items():
            # The last's event of another form is not the whole's.
            if name not in ("choices", "object", *NATIVE) and (value is not None or name not in body):
                body[name] = value
        for choice in _choices(chunk):
            at = _place(choice, 0)
            _add(choices.setdefault(at, {"index": at, "finish_reason": None}), choice, endpoint)
    body["object"] = "chat.completion" if endpoint == "chat" else "text_completion"
    body["choices"] = [_unnumbered(choices[at]) for at in sorted(choices)]
    return body


def _unnumbered(choice: Json) -> Json:
    """Without the numbers by which clients put lists of a stream together."""
    message = choice.get("message") or {}
    for name in ("thinking_blocks", "images"):
        held = message.get(name)
        if isinstance(held, list):
            message[name] = [
                {field: value for field, value in one.items() if field != "index"} if isinstance(one, dict) else one
                for one in held
            ]
    if details := details_in(message):
        # Whoever gives them back gives them as they are in a whole answer.
        message["reasoning_details"] = joined_details(details)
    return choice


def _add(whole: Json, choice: Json, endpoint: str) -> None:
    if choice.get("finish_reason"):
        whole["finish_reason"] = choice["finish_reason"]
    logprobs = choice.get("logprobs")
    if isinstance(logprobs, dict):
        kept = whole.setdefault("logprobs", {})
        for name, value in logprobs.items():
            before = kept.get(name)
            kept[name] = [*(before if isinstance(before, list) else []), *value] if isinstance(value, list) else value
    if endpoint != "chat":
        whole["text"] = whole.get("text", "") + _string(choice.get("text"))
        return
    message = whole.setdefault("message", {"role": "assistant", "content": None})
    delta = choice.get("delta")
    for name, value in delta.items() if isinstance(delta, dict) else ():
        if name == "tool_calls" and isinstance(value, list):
            _add_calls(message.setdefault("tool_calls", []), value)
        elif name in TEXTS and isinstance(value, str):
            message[name] = _string(message.get(name)) + value
        elif isinstance(value, list) and name != "tool_calls" and isinstance(message.get(name), list):
            # Such as the details of thoughts, which come piece by piece.
            message[name] = [*message[name], *value]
        elif isinstance(value, dict) and isinstance(message.get(name), dict):
            # Sound, or what a provider says beside the rest.
            message[name] = joined(message[name], value)
        elif value is not None and name != "tool_calls":
            message[name] = value


def _add_calls(calls: list[Json], pieces: list[Any]) -> None:
    for piece in pieces:
        if not isinstance(piece, dict):
            continue
        at = _place(piece, len(calls))
        while len(calls) <= at:
            calls.append({"id": None, "type": "function", "function": {"name": "", "arguments": ""}})
        call, function = calls[at], piece.get("function")
        call["id"] = piece.get("id") or call["id"]
        call |= {name: value for name, value in piece.items() if name not in _OF_CALL}
        for name, value in function.items() if isinstance(function, dict) else ():
            if isinstance(value, str):
                call["function"][name] = call["function"].get(name, "") + value


def _place(item: Json, default: int) -> int:
    """The index that a choice or a call says it has, if it is one."""
    at = item.get("index", default)
    return at if type(at) is int and 0 <= at < PLACES else min(default, PLACES - 1)


def as_chunks(body: Json, endpoint: str = "chat", with_usage: bool = False) -> list[Json]:
    """A whole answer as the chunks of a stream: for caches, and for upstreams that do not stream.

    What it holds in a form of its own goes along as the events of that form.
    """
    head = {name: value for name, value in body.items() if name not in ("choices", "object", "usage", *NATIVE)}
    head["object"] = "chat.completion.chunk" if endpoint == "chat" else "text_completion"
    chunks = []
    for choice in _choices(body):
        at = _place(choice, 0)
        shared = {"index": at, "logprobs": choice.get("logprobs")}
        if endpoint == "chat":
            given = choice.get("message")
            message = dict(given) if isinstance(given, dict) else {}
            calls = message.get("tool_calls")
            if not isinstance(calls, list):
                # Some write something empty for none.
                message.pop("tool_calls", None)
            else:
                message["tool_calls"] = [
                    {**call, "index": place} for place, call in enumerate(calls) if isinstance(call, dict)
                ]
            part: Json = {**shared, "delta": {"role": "assistant", **message}, "finish_reason": None}
            end: Json = {"index": at, "delta": {}, "finish_reason": choice.get("finish_reason") or "stop"}
        else:
            part = {**shared, "text": _string(choice.get("text")), "finish_reason": None}
            end = {"index": at, "text": "", "finish_reason": choice.get("finish_reason") or "stop"}
        chunks += [{**head, "choices": [part]}, {**head, "choices": [end]}]
    for name in NATIVE:
        if len(chunks) == 2 and isinstance(body.get(name), dict):
            chunks = _with_events(chunks, name, events_of(name, body[name]), head)
    if with_usage and isinstance(body.get("usage"), dict):
        chunks.append({**head, "choices": [], "usage": body["usage"]})
    return chunks


def _with_events(chunks: list[Json], name: str, events: list[Json] | None, head: Json) -> list[Json]:
    """The first and the last chunk beside the first and the last event, and the others between them."""
    if events is None:
        return chunks
    between = [{**head, "choices": [], name: event} for event in events[1:-1]]
    return [{**chunks[0], name: events[0]}, *between, {**chunks[1], name: events[-1]}]


def _string(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _choices(chunk: Json) -> list[Json]:
    choices = chunk.get("choices")
    return [choice for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []
