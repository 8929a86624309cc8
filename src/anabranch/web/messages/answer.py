"""A chat answer as a message of Anthropic's API."""

import json
import uuid
from typing import Any

from anabranch.web.beside import beside, images_of
from anabranch.web.reasoning_details import details_in, sealed_blocks
from anabranch.web.said_order import said

Json = dict[str, Any]
STOPS = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
    "function_call": "tool_use",
    "content_filter": "refusal",
}


def to_message(body: Json, answer: Json) -> Json:
    """The message.

    Args:
        body: the request to ``/v1/messages``.
        answer: of chat; one of Anthropic's own models has the message in it as it came (``anthropic``).
    """
    native = answer.get("anthropic")
    if isinstance(native, dict):
        return native
    choice: Json = next(iter(answer.get("choices") or ()), {})
    message = choice.get("message") or {}
    content = thoughts_of(message)
    pieces = said(message)
    # What is told behind calls is text alone.
    first_call = next((at for at, (kind, _) in enumerate(pieces) if kind == "call"), len(pieces))
    content += [_block(kind, piece) for kind, piece in pieces[:first_call]]
    content += [{"type": "text", "text": text} for text in (message.get("refusal"),) if text]
    content += [image_block(kind, data) for kind, data in images_of(message)]
    content += [_block(kind, piece) for kind, piece in pieces[first_call:]]
    more = beside(message)
    return {
        **head(answer.get("id"), answer.get("model") or body.get("model")),
        "content": content,
        "stop_reason": stop_reason(choice.get("finish_reason"), bool(message.get("tool_calls"))),
        "usage": usage_of(answer.get("usage")),
        **({"extra_content": more} if more else {}),
    }


def image_block(kind: str, data: str) -> Json:
    """A picture of an answer, in the form that one of a request has: Anthropic's models make none."""
    source = {"type": "base64", "media_type": kind, "data": data} if kind else {"type": "url", "url": data}
    return {"type": "image", "source": source}


def head(id: Any, model: Any) -> Json:
    """What every message begins with."""
    return {
        "id": id if isinstance(id, str) and id.startswith("msg") else f"msg_{uuid.uuid4().hex}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
    }


def stop_reason(reason: Any, has_calls: bool) -> str:
    """Why it ended; some servers say ``stop`` where a tool is called."""
    return "tool_use" if has_calls and reason == "stop" else STOPS.get(reason, "end_turn")


def usage_of(usage: Any) -> Json:
    """Anthropic counts cached tokens beside the others, OpenAI among them."""
    usage = usage if isinstance(usage, dict) else {}
    details = usage.get("prompt_tokens_details")
    details = details if isinstance(details, dict) else {}
    cached, written = details.get("cached_tokens") or 0, details.get("cache_write_tokens") or 0
    prompt = usage.get("prompt_tokens") or 0
    return {
        "input_tokens": max(0, prompt - cached - written),
        "cache_creation_input_tokens": written,
        "cache_read_input_tokens": cached,
        "output_tokens": usage.get("completion_tokens") or 0,
    }


def thoughts_of(message: Json) -> list[Json]:
    """The blocks of what was thought; what has no seal is in one without."""
    blocks = message.get("thinking_blocks")
    sealed = [_thought(block) for block in blocks] if isinstance(blocks, list) else []
    thought = message.get("reasoning_content") or message.get("reasoning")
    if not sealed:
        sealed = sealed_blocks(details_in(message), thought if isinstance(thought, str) else None)
    if not isinstance(thought, str):
        return sealed
    # Its blocks say the same once more, as far as they are sealed.
    told = "".join(block.get("thinking") or "" for block in sealed)
    rest = thought.removeprefix(told)
    return [*sealed, {"type": "thinking", "thinking": rest, "signature": ""}] if rest else sealed


def _thought(block: Json) -> Json:
    """Without the number that only streams need; Anthropic's clients want a signature in each, if an empty one."""
    made = {name: value for name, value in block.items() if name != "index"}
    return {"signature": "", **made} if made.get("type") == "thinking" else made


def _block(kind: str, piece: Any) -> Json:
    return {"type": "text", "text": piece} if kind == "text" else _call(piece)


def _call(call: Json) -> Json:
    function = call.get("function") or {}
    return {
        "type": "tool_use",
        "id": call.get("id") or f"toolu_{uuid.uuid4().hex}",
        "name": function.get("name") or "",
        "input": _input(function.get("arguments") or "{}"),
    }


def _input(arguments: str) -> Json:
    """Arguments as an object; what a model wrote that is none is passed on as it is, for whoever called it to see."""
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, dict) else {"arguments": arguments}
