"""What a model thought, in a response: signed thoughts go out sealed, and come back to the model that signed them."""

import base64
import json
from typing import Any

from anabranch.web.json_text import to_json

# Marks thoughts that were sealed here, for whoever gets them back.
_SEAL = "anabranch-1."

# Fields of a message of chat that hold them.
THOUGHTS = ("reasoning_content", "thinking_blocks")


def thought_in(message: dict[str, Any]) -> str:
    """What was thought, in a message or a piece of one."""
    thought = message.get("reasoning_content") or message.get("reasoning")
    return thought if isinstance(thought, str) else ""


def sealed(item: dict[str, Any], thoughts: Any, body: dict[str, Any]) -> dict[str, Any]:
    """A reasoning item with the signed thoughts behind it, if they are asked for (``include``): the model goes on from them."""
    included = body.get("include")
    if not thoughts and (unsigned := _thought(item)):
        # Of a model that signs none, and wants them back all the same.
        thoughts = [{"type": "thinking", "thinking": unsigned}]
    if not thoughts or not isinstance(included, list) or "reasoning.encrypted_content" not in included:
        return item
    text = to_json(thoughts, (",", ":"))
    return {**item, "encrypted_content": _SEAL + base64.urlsafe_b64encode(text).decode()}


def thoughts_of(item: dict[str, Any], keeps_reasoning: bool) -> dict[str, Any]:
    """What a reasoning item says of a message: its text, where the model may see it, and the thoughts that were sealed here."""
    made: dict[str, Any] = {}
    if keeps_reasoning and (thought := _thought(item)):
        made["reasoning_content"] = thought
    text = None if made else item.get("encrypted_content")
    if isinstance(text, str) and text.startswith(_SEAL):
        try:
            blocks = json.loads(base64.urlsafe_b64decode(text.removeprefix(_SEAL)))
        except (ValueError, RecursionError):
            blocks = None
        if isinstance(blocks, list) and blocks and all(isinstance(block, dict) for block in blocks):
            made["thinking_blocks"] = blocks
    return made


def _thought(item: dict[str, Any]) -> str:
    parts = item.get("content")
    texts = [part.get("text") for part in parts if isinstance(part, dict)] if isinstance(parts, list) else []
    return "".join(text for text in texts if isinstance(text, str))
