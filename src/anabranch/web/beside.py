"""What a message of chat says that another form has no words for: sound, sources, a provider's own parts. It goes along as it is."""

import json
from typing import Any

from anabranch.web.said_order import without_order

Json = dict[str, Any]

# Fields that every form has words for.
_SAID = frozenset(
    {
        "role",
        "content",
        "refusal",
        "reasoning_content",
        "reasoning",
        "reasoning_details",
        "thinking_blocks",
        "tool_calls",
        "images",
    }
)


def beside(message: Json) -> Json:
    """The other fields of a message, or of a piece of one, that say something."""
    found = {name: value for name, value in message.items() if name not in _SAID and value not in (None, "", [], {})}
    own = found.pop("extra_content", None)
    # What is in it already needs no second name around it.
    return joined(found, without_order(own)) if isinstance(own, dict) else found


def joined(told: Json, more: Json) -> Json:
    """Two pieces of one: tables and lists go together, and of anything else the later counts; pieces of text come behind one another."""
    made = dict(told)
    for name, value in more.items():
        old = made.get(name)
        if isinstance(old, dict) and isinstance(value, dict):
            made[name] = joined(old, value)
        elif isinstance(old, list) and isinstance(value, list):
            made[name] = [*old, *value]
        elif name in _GROWS and isinstance(old, str) and isinstance(value, str):
            made[name] = old + value
        elif value is not None:
            made[name] = value
    return made


# Of sound, which is told in pieces.
_GROWS = ("data", "transcript")


def images_of(message: Json) -> list[tuple[str, str]]:
    """Pictures of an answer: type and base64 of those that it holds, "" and the address of others."""
    images = message.get("images")
    found = []
    for one in images if isinstance(images, list) else ():
        inner = one.get("image_url") if isinstance(one, dict) else None
        url = inner.get("url") if isinstance(inner, dict) else inner
        if not isinstance(url, str):
            continue
        head, mark, data = url.partition(";base64,")
        is_here = bool(mark) and head.startswith("data:")
        found.append((head.removeprefix("data:") or "image/png", data) if is_here else ("", url))
    return found


def is_whole(arguments: str) -> bool:
    """Whether the arguments of a call have come to their end: nothing can follow an object."""
    if not arguments.rstrip().endswith("}"):
        return False
    try:
        return isinstance(json.loads(arguments), dict)
    except (ValueError, RecursionError):
        return False
