"""Prompt tokens of a request that is sent as it came (``/v1/responses``, ``/v1/messages``): of its chat, and of what that leaves out.

Tools that may not be called now are left out of a chat, and so is what another model thought; where the request is sent as it came, both
are sent, and paid for.
"""

import json
from collections import Counter as Multiset
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from anabranch.gateway.prompt_tokens import (
    BYTES_PER_TOKEN,
    MESSAGE_TOKENS,
    NO_PROMPT,
    Counter,
    PromptCount,
    count_prompt,
    media_within,
)
from anabranch.web.large_json import num_bytes
from anabranch.web.responses.request import picture_url
from anabranch.web.responses.tools import arguments_of, told_of

Json = Mapping[str, Any]

# Fields of an item or a part that say what it is, where they are short; no model reads them.
_LABELS = frozenset({"type", "role", "status", "id", "phase"})
_SHORT = 64

# Fields of a request that are a prompt; of all others only what is long.
_PROMPT = frozenset({"input", "instructions", "tools", "text", "messages", "system", "output_config", "output_format"})

# Likewise where it ends, which no model reads.
_ENDS = "stop_sequences"

# Of an item, what a chat is made of: images and files in there are counted with it.
_KNOWN = frozenset({"content", "output", "arguments", "input", "result"})


def count_native(chat: Json, native: Json, counter: Counter | None = None) -> PromptCount:
    """Of a request that may be sent as a chat or as it came: never less than either.

    Args:
        chat: what was made of it.
        native: as it came.
        counter: the tokenizer of its model; None for a quarter of the bytes.
    """
    count = count_prompt(chat, counter)
    known = Multiset(_leaves([value for name, value in chat.items() if _is_prompt(name, value)]))
    more: list[str] = []
    for leaf in _native_leaves(native):
        if known[leaf] > 0:
            known[leaf] -= 1
        else:
            more.append(leaf)
    items = [item for item in _listed(native, "input") if isinstance(item, dict)]
    thoughts = sum(item.get("type") == "reasoning" for item in items)
    found = [media for item in items for media in media_within(_unknown(item))]
    around = MESSAGE_TOKENS * thoughts
    size = sum(num_bytes(text) for text in more)
    tokens = -(-size // BYTES_PER_TOKEN) if counter is None else sum(counter(text) for text in more)
    return replace(
        count,
        tokens=count.tokens + around + tokens + sum(one.tokens for one in found),
        at_most=count.at_most + around + (size if counter is None else tokens) + sum(one.at_most for one in found),
        audio=count.audio + sum(one.at_most for one in found if one.kind == "audio"),
        images=count.images + sum(one.at_most for one in found if one.kind == "image"),
    )


def _is_prompt(name: str, value: Any) -> bool:
    return name not in NO_PROMPT and name != _ENDS and isinstance(value, str | list | dict)


def _native_leaves(native: Json) -> Iterable[str]:
    """All texts and numbers of a request that a model may read, in the words that a chat has for them."""
    for name, value in native.items():
        if not _is_prompt(name, value):
            continue
        if name == "input" and isinstance(value, list):
            yield from _leaves([_as_in_chat(item) for item in value])
        elif name in ("messages", "system") and isinstance(value, list):
            yield from _leaves([_blocks_as_in_chat(one) for one in value])
        elif name == "tools" and isinstance(value, list):
            yield from _leaves([_tool_as_in_chat(tool) for tool in value])
        else:
            yield from (leaf for leaf in _leaves(value) if name in _PROMPT or len(leaf) > _SHORT)


def _as_in_chat(item: Any) -> Any:
    kind = item.get("type") if isinstance(item, dict) else None
    if kind == "custom_tool_call" and isinstance(item.get("input"), str):
        return {**item, "input": arguments_of(item["input"])}
    if kind == "image_generation_call" and isinstance(item.get("result"), str):
        return {**item, "result": picture_url(item)}
    return item


def _blocks_as_in_chat(block: Any) -> Any:
    """A message or a block of Anthropic's, and the blocks within: files in one text, calls with their arguments in one."""
    if not isinstance(block, dict):
        return block
    kind, source, content = block.get("type"), block.get("source"), block.get("content")
    if kind in ("image", "document") and isinstance(source, dict) and source.get("type") == "base64":
        left = {name: value for name, value in source.items() if name not in ("type", "media_type", "data")}
        url = f"data:{source.get('media_type')};base64,{source.get('data')}"
        return {**block, "source": [url, left]}
    if kind == "tool_use" and isinstance(block.get("input"), dict):
        return {**block, "input": json.dumps(block["input"], ensure_ascii=False)}
    if (kind is None or kind == "tool_result") and isinstance(content, list):
        return {**block, "content": [_blocks_as_in_chat(one) for one in content]}
    return block


def _tool_as_in_chat(tool: Any) -> Any:
    """A custom tool tells a chat of itself in one text: its grammar is known from there."""
    form = tool.get("format") if isinstance(tool, dict) and tool.get("type") == "custom" else None
    if not isinstance(form, dict) or form.get("type") != "grammar":
        return tool
    left = {name: value for name, value in form.items() if name not in ("syntax", "definition")}
    return {**tool, "description": told_of(tool), "format": left}


def _unknown(item: Json) -> Json:
    """Of an item, what no chat is made of."""
    if item.get("type") == "reasoning":
        return item
    return {name: value for name, value in item.items() if name not in _KNOWN}


def _listed(native: Json, name: str) -> list[Any]:
    value = native.get(name)
    return value if isinstance(value, list) else []


def _leaves(value: Any) -> Iterable[str]:
    """Texts and numbers within, and long names; what only says what something is left out."""
    left = [value]
    while left:
        one = left.pop()
        if isinstance(one, str):
            if one:
                yield one
        elif isinstance(one, list):
            left += one
        elif isinstance(one, dict):
            for name, inner in one.items():
                if len(name) > _SHORT:
                    yield name
                if not (name in _LABELS and isinstance(inner, str) and len(inner) <= _SHORT):
                    left.append(inner)
        elif isinstance(one, int | float) and not isinstance(one, bool):
            yield str(one)
