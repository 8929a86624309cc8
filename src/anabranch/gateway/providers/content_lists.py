"""Answers whose ``content`` is a list of parts, as Mistral's models that reason have it, as those of OpenAI's form, where it is text.

| a part | becomes |
|---|---|
| ``text``, ``refusal`` | of ``content``, ``refusal`` |
| ``thinking``: parts of text, or text | of ``reasoning_content`` |
| ``image_url`` | one of ``images`` |
| any other (a ``reference``) | as it came, one of ``extra_content.parts`` |

A model of Mistral's is sent the thoughts of its own turns in the same form again: it knows no ``reasoning_content``.
"""

import re
from typing import Any

from anabranch.gateway.providers.provider import Json
from anabranch.gateway.providers.thoughts import unsigned
from anabranch.web.beside import joined

# As Mistral's own API calls them; other servers of its models (a path or a tag in the name) have words of OpenAI's form for thoughts.
_MISTRAL = re.compile(
    r"(?:mistral|magistral|ministral|codestral|devstral|pixtral|voxtral|open-mi[sx]tral)-[\w.-]+", re.I
)


def flattened(body: Json, name: str) -> bool:
    """Put the content of each choice, in place, into OpenAI's form. Returns whether there was anything to do.

    Args:
        body: an answer or a chunk.
        name: ``message`` or ``delta``.
    """
    is_changed = False
    for choice in body.get("choices") or ():
        told = choice.get(name) if isinstance(choice, dict) else None
        content = told.get("content") if isinstance(told, dict) else None
        if isinstance(content, list) and all(isinstance(part, dict) for part in content):
            choice[name] = _flat(told, content)  # type: ignore[arg-type]
            is_changed = True
    return is_changed


def _flat(told: Json, content: list[Json]) -> Json:
    texts: dict[str, list[str]] = {"content": [], "reasoning_content": [], "refusal": []}
    images: list[Json] = []
    others: list[Json] = []
    for part in content:
        kind = part.get("type")
        if kind == "text" and isinstance(part.get("text"), str):
            texts["content"].append(part["text"])
        elif kind == "refusal" and isinstance(part.get("refusal"), str):
            texts["refusal"].append(part["refusal"])
        elif kind == "thinking" and (thought := _thought(part.get("thinking"))) is not None:
            texts["reasoning_content"].append(thought)
        elif kind == "image_url":
            given = part.get("image_url")
            inner = {"url": given} if isinstance(given, str) else given
            images.append({"index": len(images), **part, "image_url": inner})
        else:
            others.append({"index": len(others), **part})
    made = {**told, "content": "".join(texts["content"])}
    for field in ("reasoning_content", "refusal"):
        if texts[field]:
            made[field] = (made.get(field) or "") + "".join(texts[field])
    if images:
        made["images"] = [*(made.get("images") or ()), *images]
    own = made.get("extra_content")
    return (
        {**made, "extra_content": joined(own if isinstance(own, dict) else {}, {"parts": others})} if others else made
    )


def _thought(given: Any) -> str | None:
    """Text of a thought; None where there is more in it."""
    if isinstance(given, str):
        return given
    if not isinstance(given, list):
        return None
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in given]
    return None if None in texts else "".join(map(str, texts))


def is_mistral(model: str) -> bool:
    """Whether a model is one of Mistral's own API, by its name."""
    return _MISTRAL.fullmatch(model) is not None


def for_mistral(body: Json, is_foreign: bool) -> Json:
    """A chat with the thoughts of its assistant's messages as parts of them; the same object where there are none.

    Args:
        body: of the chat.
        is_foreign: it came in Anthropic's form, whose ``thinking`` Mistral does not know.
    """
    if is_foreign:
        body = {name: value for name, value in body.items() if name != "thinking"}
    messages = body.get("messages") or ()
    if not any(isinstance(message, dict) and any(name in message for name in _THOUGHTS) for message in messages):
        return body
    made = [_with_thought(one) if isinstance(one, dict) else one for one in messages]
    # One that held nothing but what another model thought has nothing left.
    return {**body, "messages": [one for one in made if not isinstance(one, dict) or one.keys() != {"role"}]}


_THOUGHTS = ("reasoning_content", "thinking_blocks")


def _with_thought(message: Json) -> Json:
    made = {name: value for name, value in message.items() if name not in _THOUGHTS}
    thought = message.get("reasoning_content") or unsigned(message.get("thinking_blocks"))
    if not isinstance(thought, str) or not thought:
        is_empty = not (made.get("content") or made.get("tool_calls"))
        return {"role": made.get("role")} if is_empty else made
    content = made.get("content") or []
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return {**made, "content": [{"type": "thinking", "thinking": [{"type": "text", "text": thought}]}, *parts]}
