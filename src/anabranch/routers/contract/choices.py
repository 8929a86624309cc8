"""The form of choices in OpenAI's answers, for all who read them: gateways, clients of endpoints, and what was kept of their answers.

    wrong_choices([{"message": None}])        # "message is no object"

Fields that are not named here are not read, and may hold anything.
"""

from collections.abc import Mapping
from typing import Any

__all__ = ["are_objects", "wrong_choices"]


def wrong_choices(choices: Any, *, is_chat: bool = True, is_passed_on: bool = False) -> str:
    """What is wrong with the choices of a chat, or of a completion of text; empty if nothing is. There must be one at least.

    Args:
        choices: as they came.
        is_chat: of a chat; else of a completion of text.
        is_passed_on: they go out to clients, who read what we do not: objects are dicts, index and logprobs as OpenAI has them.
    """
    kind: Any = dict if is_passed_on else Mapping
    if not choices or not are_objects(choices, kind):
        return "choices are no objects"
    for choice in choices:
        if is_passed_on and (what := _wrong_to_clients(choice)):
            return what
        if not _is(choice.get("finish_reason"), str):
            return "finish_reason is no text"
        what = _wrong_message(choice.get("message"), kind) if is_chat else _wrong_text(choice.get("text"))
        if what:
            return what
    return ""


def _wrong_to_clients(choice: Mapping[str, Any]) -> str:
    if type(choice.get("index", 0)) is not int:
        return "index is no number"
    return "" if _is(choice.get("logprobs"), dict) else "logprobs are no object"


def _wrong_text(text: Any) -> str:
    return "" if isinstance(text, str) else "text is none"


def _wrong_message(message: Any, kind: Any) -> str:
    if not isinstance(message, kind):
        return "message is no object"
    content = message.get("content")
    if not (_is(content, str) or are_objects(content, kind)):
        return "content is no text"
    for name in ("reasoning_content", "reasoning", "refusal"):
        if not _is(message.get(name), str):
            return f"{name} is no text"
    # Some write something empty for none.
    calls = message.get("tool_calls") or []
    if not are_objects(calls, kind):
        return "tool_calls are no objects"
    return next((what for call in calls if (what := _wrong_call(call, kind))), "")


def _wrong_call(call: Mapping[str, Any], kind: Any) -> str:
    if call.get("type") not in (None, "function"):
        # Calls of another kind, which pass as they are.
        return ""
    function = call.get("function")
    if not isinstance(function, kind) or not isinstance(function.get("name"), str):
        return "tool_calls name no function"
    return "" if _is(function.get("arguments"), str) else "arguments of tool_calls are no text"


def are_objects(value: Any, kind: Any = dict) -> bool:
    """Whether it is a list of JSON objects, perhaps an empty one. What ``kind`` they are: dicts, or whatever is a Mapping."""
    return isinstance(value, list | tuple) and all(isinstance(item, kind) for item in value)


def _is(value: Any, kind: Any) -> bool:
    return value is None or isinstance(value, kind)
