"""Turns of an assistant in the one message that OpenAI's API has for each: one text, and calls behind it that results follow at once.

| what came | becomes |
|---|---|
| the order of text and calls (`anabranch.web.said_order`) | left out: all text stands before all calls |
| several messages of one turn, where calls of the first have no results before the next (items of a response) | one |
| `extra_content` of several | one table, in which lists stand behind one another; of two values, as signatures are, the first stays |
"""

from collections.abc import Iterable
from typing import Any

from anabranch.gateway.providers.provider import Json
from anabranch.web.said_order import ORDER, unordered


def in_one_message(body: Json) -> Json:
    """A chat in which each turn with calls is one message; the same object where nothing is to be changed."""
    given = body.get("messages")
    if not isinstance(given, list):
        return body
    turns: list[list[Any]] = []
    is_changed = False
    for message in given:
        one = unordered(message) if isinstance(message, dict) else message
        if turns and _calls(turns[-1][0]) and _is_said(one):
            turns[-1].append(one)
            is_changed = True
        else:
            turns.append([one])
            is_changed = is_changed or one is not message
    # Each turn once it is known: joined message by message all before would be copied for each.
    return {**body, "messages": [_joined(turn) for turn in turns]} if is_changed else body


def _calls(message: Any) -> bool:
    """Whether a turn that it begins goes on: its calls have no results yet."""
    return _is_said(message) and bool(message.get("tool_calls"))


def _is_said(message: Any) -> bool:
    """Whether it is an assistant's, with content that can stand beside that of others."""
    return (
        isinstance(message, dict)
        and message.get("role") == "assistant"
        and isinstance(message.get("content"), str | list | None)
    )


def _joined(turn: list[Any]) -> Any:
    """All messages of a turn in one; the same object for one alone."""
    if len(turn) == 1:
        return turn[0]
    return {name: _field(name, values) for name, values in _by_name(turn).items()}


def _field(name: str, values: list[Any]) -> Any:
    """What the messages of a turn say under one name."""
    if name == "content":
        return _content(values)
    told = [value for value in values if value is not None]
    if told and all(isinstance(value, list) for value in told):
        return _behind(told)
    if name.startswith("reasoning") and all(isinstance(value, str) for value in told):
        return "".join(told) if told else None
    if name == ORDER and told and all(isinstance(value, dict) for value in told):
        return {whose: _of_one(tables) for whose, tables in _by_name(told).items()}
    return told[-1] if told else None


def _content(values: list[Any]) -> Any:
    """Texts as paragraphs of one, and parts behind one another."""
    told = [value for value in values if value]
    if len(told) < 2:
        return told[0] if told else values[-1]
    if all(isinstance(value, str) for value in told):
        return "\n\n".join(told)
    return _behind(value if isinstance(value, list) else [{"type": "text", "text": value}] for value in told)


def _of_one(values: list[Any]) -> Any:
    """What one provider said beside several messages."""
    told = [value for value in values if value is not None]
    if told and all(isinstance(value, dict) for value in told):
        return {name: _first_or_all(those) for name, those in _by_name(told).items()}
    return _first_or_all(told)


def _first_or_all(values: list[Any]) -> Any:
    told = [value for value in values if value is not None]
    if told and all(isinstance(value, list) for value in told):
        return _behind(told)
    return told[0] if told else None


def _by_name(tables: list[Json]) -> dict[str, list[Any]]:
    """The values of each name, in their order."""
    found: dict[str, list[Any]] = {}
    for table in tables:
        for name, value in table.items():
            found.setdefault(name, []).append(value)
    return found


def _behind(lists: Iterable[list[Any]]) -> list[Any]:
    return [one for held in lists for one in held]
