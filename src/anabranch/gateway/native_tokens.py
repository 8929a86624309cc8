"""Prompt tokens of a request that is sent as it came (``/v1/responses``, ``/v1/messages``): of its chat, and of what that leaves out.

Tools that may not be called now are left out of a chat, and so is what another model thought; where the request is sent as it came, both
are sent, and paid for. What is left out counts with all its JSON: names, ``true`` and ``null``, brackets.
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
    SETTINGS_BYTES,
    Counter,
    PromptCount,
    count_prompt,
    media_within,
    text_of,
)
from anabranch.gateway.sound_packets import Pieces, one_request
from anabranch.web.large_json import num_bytes
from anabranch.web.responses.request import picture_url
from anabranch.web.responses.tools import arguments_of, told_of

Json = Mapping[str, Any]

# What an item, a message or a part says that it is, of which the marks around it tell a model: no more than these is believed.
_LABELS = {
    "type": frozenset(
        "message function_call function_call_output custom_tool_call custom_tool_call_output image_generation_call reasoning input_text "
        "output_text summary_text reasoning_text refusal text input_image input_file input_audio image document base64 url file function "
        "custom tool_use tool_result thinking redacted_thinking ephemeral json_schema json_object".split()
    ),
    "role": frozenset(("user", "assistant", "system", "developer")),
    "status": frozenset(("in_progress", "completed", "incomplete")),
    "phase": frozenset(("commentary", "final_answer")),
}

# Names that forms have for what is read in an item or a part; what is said under any other counts with its name.
_NAMES = frozenset(
    "content output summary text refusal arguments input name call_id result image_url detail file_data file_id filename input_audio data "
    "format source media_type url title context thinking signature tool_use_id description citations annotations logprobs id".split()
)

# Fields of a chat, of its messages and of their parts in which there are parts of them.
_INNER = _NAMES | {"images", "tool_calls", "function", "file", "thinking_blocks"}

# Of what the answer is to look like, short words that are no part of a form; and of items, names that providers give them.
_WORDS, _SHORT = frozenset({"verbosity", "effort"}), 16
_ID_BYTES = 64

# Bytes around the name of a field with nothing in it.
_EMPTY = 6

# How deep parts lie within parts: the source of a picture that a tool gave, within a message.
_DEEPEST = 6

# Fields of a request that are a prompt of items, messages or parts; and that say what the answer is to look like.
_LISTS = frozenset({"input", "messages", "system"})
_FORMS = frozenset({"text", "output_config", "output_format"})

# Where it ends, which no model reads.
_ENDS = "stop_sequences"

# Of an item, what a chat is made of: images and files in there are counted with it.
_KNOWN = frozenset({"content", "output", "arguments", "input", "result"})


def count_native(chat: Json, native: Json, counter: Counter | None = None) -> PromptCount:
    """Of a request that may be sent as a chat or as it came: never less than either.

    Args:
        chat: what was made of it.
        native: as it came.
        counter: the tokenizer of its model; None for a quarter of the bytes.

    Raises ApiError as `count_prompt`.
    """
    with one_request("input" if "input" in native else "messages") as walked:
        return _counted(chat, native, counter, walked)


def _counted(chat: Json, native: Json, counter: Counter | None, walked: Pieces) -> PromptCount:
    count = count_prompt(chat, counter, walked)
    rest = _Rest(chat)
    more = list(rest.of(native))
    items = [item for item in _listed(native, "input") if isinstance(item, dict)]
    thoughts = sum(item.get("type") == "reasoning" for item in items)
    found = [media for item in items for media in media_within(_unknown(item), walked)]
    around = MESSAGE_TOKENS * thoughts
    size = sum(num_bytes(text) for text in more)
    tokens = -(-size // BYTES_PER_TOKEN) if counter is None else sum(counter(text) for text in more)
    at_most = (size if counter is None else tokens) + rest.label_bytes // BYTES_PER_TOKEN
    return replace(
        count,
        tokens=count.tokens + around + tokens + sum(one.tokens for one in found),
        at_most=count.at_most + around + at_most + sum(one.at_most for one in found),
        audio=count.audio + sum(one.at_most for one in found if one.kind == "audio"),
        images=count.images + sum(one.at_most for one in found if one.kind == "image"),
    )


class _Rest:
    """What a chat leaves out of the request that it was made of.

    Args:
        chat: see `count_native`.

    Attributes:
        label_bytes: of names of items, which providers give them and no model reads, and of fields with nothing in them.
    """

    def __init__(self, chat: Json) -> None:
        self._chat, self.label_bytes = chat, 0
        # Each text that stands in it as one, as often as it does; and how many of them were met with.
        self._texts, self._num_met = Multiset(_texts_of(chat)), 0

    def of(self, native: Json) -> Iterable[str]:
        """Its texts, and the JSON of all else, as chats are counted."""
        settings: dict[str, Any] = {}
        for name, value in native.items():
            left: Any = None
            if name in NO_PROMPT or name == _ENDS:
                continue
            if name == "tools" and isinstance(value, list):
                left = self._tools(value)
            elif name in _LISTS and isinstance(value, list):
                left = [rest for one in value if (rest := self._part(one)) is not None]
            elif name in _FORMS and isinstance(value, dict):
                left = self._form(value)
            elif isinstance(value, str) and self._has(value):
                continue
            elif name not in self._chat or not _is_same(value, self._chat[name]):
                settings[name] = value
            if left:
                yield text_of(left)
        said = text_of(settings)
        if num_bytes(said) > SETTINGS_BYTES:
            yield said

    def _has(self, text: str) -> bool:
        """Whether the chat has the text; each that it has stands for one."""
        if self._texts[text] <= 0:
            return False
        self._texts[text] -= 1
        self._num_met += 1
        return True

    def _part(self, part: Any, depth: int = 0) -> Any:
        """What is left of an item, a message or a part, and of the parts in it: all of it, where the chat has nothing of it.

        None where all is known.
        """
        if isinstance(part, str):
            return None if self._has(part) else part
        if not isinstance(part, dict):
            return [part]
        num_met, label_bytes, left = self._num_met, 0, {}
        for name, value in _as_in_chat(part).items():
            if _says_what_it_is(name, value) or (name == "cache_control" and _is_mark(value)):
                continue
            rest = value
            if isinstance(value, str):
                rest = "" if self._has(value) else value
                if name == "id" and depth == 0 and len(value) <= _ID_BYTES:
                    label_bytes, rest = len(rest), ""
            elif name in _NAMES and depth < _DEEPEST and isinstance(value, dict | list):
                parts = value if isinstance(value, list) else [value]
                rest = [one for inner in parts if (one := self._part(inner, depth + 1)) is not None]
            if name not in _NAMES or rest:
                left[name] = rest
            elif not value:
                label_bytes += len(name) + _EMPTY
        if self._num_met == num_met:
            return part
        self.label_bytes += label_bytes
        return left or None

    def _tools(self, tools: list[Any]) -> list[Any]:
        """The chat has them in the same order, but for those that may not be called."""
        kept = _listed(self._chat, "tools")
        at, left = 0, list[Any]()
        for tool in tools:
            made = kept[at] if at < len(kept) and isinstance(kept[at], dict) else {}
            function = made.get("function", made)
            is_it = bool(made) and isinstance(tool, dict) and isinstance(function, dict)
            if not is_it or function.get("name") != tool.get("name"):
                left.append(tool)
                continue
            at += 1
            if rest := _rest_of_tool(tool, made, function):
                left.append(rest)
        return left

    def _form(self, asked: Json) -> Json:
        """Of what the answer is to look like."""
        response = self._chat.get("response_format")
        made = response.get("json_schema", response) if isinstance(response, dict) else None
        known = made if isinstance(made, dict) else {}
        form = asked.get("format")
        inner = _unlike(form, known) if isinstance(form, dict) else form
        left = {name: value for name, value in _unlike(asked, known).items() if name != "format"}
        return {**left, "format": inner} if inner else left


def _unlike(table: Json, known: Json) -> dict[str, Any]:
    """Of a table, what is not said in another."""
    return {
        name: value
        for name, value in table.items()
        if not _says_what_it_is(name, value)
        and not (name in _WORDS and isinstance(value, str) and len(value) <= _SHORT)
        and not (name in known and _is_same(value, known[name]))
    }


def _rest_of_tool(tool: Json, made: Json, function: Json) -> Json:
    """What a chat does not say of a tool that it has."""
    known = {**function, "input_schema": function.get("parameters"), "cache_control": made.get("cache_control")}
    form, left = tool.get("format"), _unlike(tool, known)
    if tool.get("type") == "custom" and function.get("description", "") == told_of(dict(tool)):
        # A custom tool tells a chat of itself in one text, its grammar too.
        left.pop("description", None)
        if isinstance(form, dict) and form.get("type") == "grammar":
            form = {name: value for name, value in form.items() if name not in ("type", "syntax", "definition")}
            left = {name: value for name, value in left.items() if name != "format"} | (
                {"format": form} if form else {}
            )
    return left


def _says_what_it_is(name: str, value: Any) -> bool:
    return name in _LABELS and isinstance(value, str) and value in _LABELS[name]


def _is_mark(value: Any) -> bool:
    """A mark where the prompt is to be kept, as providers know it: the model is not told of it."""
    return value in ({"type": "ephemeral"}, {"type": "ephemeral", "ttl": "5m"}, {"type": "ephemeral", "ttl": "1h"})


def _is_same(one: Any, other: Any) -> bool:
    # Of two lists of megabytes, most are the same object.
    return one is other or bool(one == other and type(one) is type(other))


def _texts_of(chat: Json) -> Iterable[str]:
    """Texts of a chat that stand in it as they are, each of which `count_prompt` counts: of its messages, the parts of these, its calls."""
    for name, value in chat.items():
        if isinstance(value, str) and name not in NO_PROMPT:
            yield value
    left: list[Any] = [message for message in _listed(chat, "messages") if isinstance(message, dict)]
    while left:
        for name, value in left.pop().items():
            if isinstance(value, str):
                if name not in ("type", "role"):
                    yield value
            elif name in _INNER:
                inner = value if isinstance(value, list) else [value]
                left += (one for one in inner if isinstance(one, dict))


def _as_in_chat(part: Json) -> Json:
    """In the words that a chat has for it: files in one text, calls with their arguments in one."""
    kind, source = part.get("type"), part.get("source")
    if kind == "custom_tool_call" and isinstance(part.get("input"), str):
        return {**part, "input": arguments_of(part["input"])}
    if kind == "image_generation_call" and isinstance(part.get("result"), str):
        return {**part, "result": picture_url(dict(part))}
    if kind in ("image", "document") and isinstance(source, dict) and source.get("type") == "base64":
        left = {name: value for name, value in source.items() if name not in ("type", "media_type", "data")}
        url = f"data:{source.get('media_type')};base64,{source.get('data')}"
        return {**part, "source": {"url": url, **left}}
    if kind == "tool_use" and isinstance(part.get("input"), dict):
        return {**part, "input": json.dumps(part["input"], ensure_ascii=False)}
    return part


def _unknown(item: Json) -> Json:
    """Of an item, what no chat is made of."""
    if item.get("type") == "reasoning":
        return item
    return {name: value for name, value in item.items() if name not in _KNOWN}


def _listed(native: Json, name: str) -> list[Any]:
    value = native.get(name)
    return value if isinstance(value, list) else []
