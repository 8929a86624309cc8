"""Turns of an assistant in the one message that OpenAI's API has for each: one text, and calls behind it that results follow at once.

| what came | becomes |
|---|---|
| the order of text and calls (`anabranch.web.said_order`) | left out: all text stands before all calls |
| several messages of one turn, where calls of the first have no results before the next (items of a response) | one |
"""

from typing import Any

from anabranch.gateway.providers.provider import Json
from anabranch.web.said_order import unordered


def in_one_message(body: Json) -> Json:
    """A chat in which each turn with calls is one message; the same object where nothing is to be changed."""
    given = body.get("messages")
    if not isinstance(given, list):
        return body
    made: list[Any] = []
    is_changed = False
    for message in given:
        one = unordered(message) if isinstance(message, dict) else message
        if made and _goes_on(made[-1], one):
            made[-1] = _joined(made[-1], one)
            is_changed = True
        else:
            made.append(one)
            is_changed = is_changed or one is not message
    return {**body, "messages": made} if is_changed else body


def _goes_on(before: Any, message: Any) -> bool:
    """Whether a message is of the turn of the one before, whose calls have no results yet."""
    are_said = all(isinstance(one, dict) and one.get("role") == "assistant" for one in (before, message))
    return (
        are_said
        and bool(before.get("tool_calls"))
        and all(isinstance(one.get("content"), str | list | None) for one in (before, message))
    )


def _joined(before: Json, message: Json) -> Json:
    made = {**before, **message}
    for name in before.keys() & message.keys():
        one, other = before[name], message[name]
        if name == "content":
            made[name] = _content(one, other)
        elif isinstance(one, list) and isinstance(other, list):
            made[name] = [*one, *other]
        elif name.startswith("reasoning") and isinstance(one, str) and isinstance(other, str):
            made[name] = one + other
        elif other is None:
            made[name] = one
    return made


def _content(one: Any, other: Any) -> Any:
    """Two texts as paragraphs of one, and parts behind one another."""
    if not one or not other:
        return one or other
    if isinstance(one, str) and isinstance(other, str):
        return f"{one}\n\n{other}"
    return [
        part for held in (one, other) for part in (held if isinstance(held, list) else [{"type": "text", "text": held}])
    ]
