"""What the output of a response is made of."""

import uuid
from typing import Any

from anabranch.web.responses.tools import text_of


def part_of(kind: str, text: str) -> dict[str, Any]:
    """A part of a message or of reasoning; ``kind`` is text, refusal or reasoning."""
    if kind == "refusal":
        return {"type": "refusal", "refusal": text}
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def message_item(
    id: str, text: str, refusal: str, status: str = "completed", logprobs: list[Any] | None = None
) -> dict[str, Any]:
    """What a model said, with the log-probabilities of its text."""
    # Of a refusal alone none is of any text.
    said = [(kind, value) for kind, value in (("text", text), ("refusal", refusal)) if value] or [("text", "")]
    content = [part_of(kind, value) for kind, value in said]
    if logprobs and said[0][0] == "text":
        content[0]["logprobs"] = logprobs
    return {"id": id, "type": "message", "role": "assistant", "status": status, "content": content}


def reasoning_item(id: str, text: str, status: str = "completed") -> dict[str, Any]:
    """What it thought."""
    return {"id": id, "type": "reasoning", "summary": [], "content": [part_of("reasoning", text)], "status": status}


def image_item(kind: str, data: str) -> dict[str, Any]:
    """A picture; one that is elsewhere by its address."""
    form = {"output_format": kind.partition("/")[2]} if kind else {}
    return {"id": new_id("ig"), "type": "image_generation_call", "status": "completed", "result": data, **form}


def call_item(
    id: str, call_id: Any, name: Any, arguments: str, status: str = "completed", *, is_custom: bool = False
) -> dict[str, Any]:
    """A call of a function, whose ``arguments`` are JSON; of a custom tool, what stands in them."""
    if is_custom:
        made = {"id": id, "type": "custom_tool_call", "call_id": call_id or id, "name": name or "", "status": status}
        return {**made, "input": text_of(arguments) if arguments else ""}
    return {
        "id": id,
        "type": "function_call",
        "call_id": call_id or id,
        "name": name or "",
        "arguments": arguments,
        "status": status,
    }


def new_id(kind: str) -> str:
    """An id as OpenAI has them, such as ``msg_`` and 32 digits."""
    return f"{kind}_{uuid.uuid4().hex}"
