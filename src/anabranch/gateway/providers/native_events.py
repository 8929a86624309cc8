"""Answers in their own form, Anthropic's messages and OpenAI's responses, as the events of their streams, and back.

A whole answer that is kept is streamed as `events_of` makes it, and a stream is kept where `whole_of` can put it together.
"""

import json
from collections.abc import Callable, Iterator

from anabranch.gateway.providers.provider import Json

# What reading a value of another shape raises.
_MISSHAPEN = (KeyError, TypeError, AttributeError, ValueError, IndexError)

# What the last event but one of a message says of the whole.
_SAID_LAST = ("stop_reason", "stop_sequence", "stop_details", "container")


def message_events(message: Json) -> list[Json]:
    """The events of a whole message of Anthropic's."""
    usage = message.get("usage") or {}
    begun = {
        **message,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
        "usage": {**usage, "output_tokens": 0},
    }
    made: list[Json] = [{"type": "message_start", "message": begun}]
    for index, block in enumerate(message["content"]):
        start, deltas = _opened(block)
        made.append({"type": "content_block_start", "index": index, "content_block": start})
        made += [{"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas]
        made.append({"type": "content_block_stop", "index": index})
    last: Json = {"type": "message_delta", "delta": {name: message[name] for name in _SAID_LAST if name in message}}
    if "context_management" in message:
        last["context_management"] = message["context_management"]
    return [*made, {**last, "usage": usage}, {"type": "message_stop"}]


def _opened(block: Json) -> tuple[Json, list[Json]]:
    """What a block begins as, and what comes piece by piece; blocks of other kinds come whole."""
    kind, given = block.get("type"), block.get("input")
    if kind == "text":
        cited = block.get("citations") or []
        start = {**block, "text": "", **({"citations": []} if cited else {})}
        said = [{"type": "text_delta", "text": block["text"]}] if block.get("text") else []
        return start, [*said, *({"type": "citations_delta", "citation": one} for one in cited)]
    if kind == "thinking":
        pieces = (("thinking", "thinking_delta"), ("signature", "signature_delta"))
        deltas = [{"type": name, field: block[field]} for field, name in pieces if block.get(field)]
        return {**block, **{field: "" for field, _ in pieces if field in block}}, deltas
    if isinstance(given, dict) and given:
        return {**block, "input": {}}, [{"type": "input_json_delta", "partial_json": json.dumps(given)}]
    return block, []


def message_of(events: list[Json]) -> Json | None:
    """The message that the events of a stream make; None where it did not end, or has in it what nothing is known of."""
    message: Json | None = None
    arguments: dict[int, str] = {}
    try:
        for value in events:
            kind = value["type"]
            if kind == "message_stop":
                return message
            if kind == "ping":
                continue
            if kind == "message_start" and message is None:
                message = {**value["message"], "content": [*value["message"]["content"]]}
            elif message is None or not _added(message, value, arguments):
                return None
    except _MISSHAPEN:
        return None
    return None


def _added(message: Json, value: Json, arguments: dict[int, str]) -> bool:
    """Whether what an event says could be put into the message."""
    kind, blocks = value["type"], message["content"]
    if kind == "message_delta":
        said = {name: one for name, one in (value.get("usage") or {}).items() if one is not None}
        more = {name: one for name, one in value.items() if name not in ("type", "delta", "usage")}
        message |= {**value["delta"], **more, "usage": {**(message.get("usage") or {}), **said}}
        return True
    index = value["index"]
    if kind == "content_block_start":
        blocks.append(dict(value["content_block"]))
        return bool(index == len(blocks) - 1)
    if kind == "content_block_stop":
        if index in arguments:
            blocks[index]["input"] = json.loads(arguments.pop(index))
        return True
    return kind == "content_block_delta" and grown(blocks[index], value["delta"], index, arguments)


def grown(block: Json, delta: Json, index: int, arguments: dict[int, str]) -> bool:
    """Whether a delta could be put into a block of a message; pieces of arguments into ``arguments``, by the block's index."""
    kind = delta["type"]
    if kind in ("text_delta", "thinking_delta", "signature_delta"):
        name = kind.removesuffix("_delta")
        block[name] = (block.get(name) or "") + delta[name]
    elif kind == "citations_delta":
        block["citations"] = [*(block.get("citations") or ()), delta["citation"]]
    elif kind == "input_json_delta":
        if delta["partial_json"]:
            arguments[index] = arguments.get(index, "") + delta["partial_json"]
    else:
        return False
    return True


def response_events(response: Json) -> list[Json]:
    """The events of a whole response of OpenAI's."""
    begun = {**response, "status": "in_progress", "output": [], "usage": None}
    made: list[Json] = [{"type": kind, "response": begun} for kind in ("response.created", "response.in_progress")]
    for index, item in enumerate(response["output"]):
        made += [{**one, "output_index": index} for one in _item_events(item)]
    status = response.get("status")
    made.append({"type": f"response.{'incomplete' if status == 'incomplete' else 'completed'}", "response": response})
    return [{**one, "sequence_number": number} for number, one in enumerate(made)]


def _item_events(item: Json) -> Iterator[Json]:
    kind = item.get("type")
    at: Json = {"item_id": item.get("id")}
    begun = {**item, "status": "in_progress"} if "status" in item else dict(item)
    begun |= {name: [] for name in ("content", "summary") if isinstance(item.get(name), list)}
    is_call = kind == "function_call"
    yield {"type": "response.output_item.added", "item": {**begun, "arguments": ""} if is_call else begun}
    if is_call:
        text = item.get("arguments") or ""
        yield {"type": "response.function_call_arguments.delta", **at, "delta": text}
        yield {"type": "response.function_call_arguments.done", **at, "name": item.get("name"), "arguments": text}
    for number, part in enumerate(item.get("summary") or ()):
        here = {**at, "summary_index": number}
        yield {"type": "response.reasoning_summary_part.added", **here, "part": {**part, "text": ""}}
        yield {"type": "response.reasoning_summary_text.delta", **here, "delta": part["text"]}
        yield {"type": "response.reasoning_summary_text.done", **here, "text": part["text"]}
        yield {"type": "response.reasoning_summary_part.done", **here, "part": part}
    content = item.get("content")
    for number, part in enumerate(content if isinstance(content, list) else ()):
        yield from _part_events(part, {**at, "content_index": number})
    yield {"type": "response.output_item.done", "item": item}


def _part_events(part: Json, at: Json) -> Iterator[Json]:
    kind = part.get("type")
    field = "refusal" if kind == "refusal" else "text"
    is_said = kind in ("output_text", "refusal", "reasoning_text") and isinstance(part.get(field), str)
    begun = {**part, field: ""} if is_said else dict(part)
    if part.get("annotations"):
        begun["annotations"] = []
    yield {"type": "response.content_part.added", **at, "part": begun}
    if is_said:
        logprobs: Json = {"logprobs": part.get("logprobs") or []} if kind == "output_text" else {}
        yield {"type": f"response.{kind}.delta", **at, "delta": part[field], **logprobs}
        for number, one in enumerate(part.get("annotations") or ()):
            name = "response.output_text.annotation.added"
            yield {"type": name, **at, "annotation_index": number, "annotation": one}
        yield {"type": f"response.{kind}.done", **at, field: part[field], **logprobs}
    yield {"type": "response.content_part.done", **at, "part": part}


def response_of(events: list[Json]) -> Json | None:
    """The response that the last event of a stream holds; None where there is no such."""
    for value in reversed(events):
        response = value.get("response")
        if value.get("type") in ("response.completed", "response.incomplete"):
            return response if isinstance(response, dict) and isinstance(response.get("output"), list) else None
    return None


# By the name that an answer, or an event, in its own form has in one of chat.
NATIVE: dict[str, tuple[Callable[[Json], list[Json]], Callable[[list[Json]], Json | None]]] = {
    "anthropic": (message_events, message_of),
    "responses": (response_events, response_of),
}


def events_of(name: str, whole: Json) -> list[Json] | None:
    """The events of an answer in its own form, two at the least; None where it has another shape."""
    try:
        return NATIVE[name][0](whole)
    except _MISSHAPEN:
        return None


def whole_of(chunks: list[Json]) -> tuple[Json, bool]:
    """What the chunks of a stream hold in a form of its own, by its name, and whether that could be put together."""
    made: Json = {}
    for name, (_, put_together) in NATIVE.items():
        events = [chunk[name] for chunk in chunks if isinstance(chunk.get(name), dict)]
        whole = put_together(events) if events else None
        if events and whole is None:
            return {}, False
        if whole is not None:
            made[name] = whole
    return made, True
