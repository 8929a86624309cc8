"""What a request may be: wrong types and values are refused with the field's name; fields that we do not know pass."""

from collections.abc import Callable
from typing import Any

from anabranch.web.api_error import ApiError, wrong
from anabranch.web.body import MOST_DEPTH, is_int, is_too_deep, said

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
Check = Callable[[Any], bool]


def check_depth(body: dict[str, Any]) -> None:
    """Raises ApiError if lists and objects lie within one another without end: whatever handles the body would fail of it."""
    if is_too_deep(body):
        raise ApiError(400, "invalid_json", f"the body is nested too deep; {MOST_DEPTH} levels are allowed")


def check_chat(body: dict[str, Any], most_tokens: int) -> None:
    """Raises ApiError if the body is no request to ``/v1/chat/completions``.

    Args:
        body: parsed.
        most_tokens: largest ``max_tokens`` there may be.
    """
    _check_common(body, most_tokens)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise wrong("messages", f"messages is {said(messages)}; it must be a list with at least one message")
    for at, message in enumerate(messages):
        _check_message(message, f"messages[{at}]")
    _check_tools(body)
    _check_thinking(body, most_tokens)


def check_completion(body: dict[str, Any], most_tokens: int) -> None:
    """Raises ApiError if the body is no request to ``/v1/completions``."""
    _check_common(body, most_tokens)
    _check_texts(body, "prompt")


def check_embeddings(body: dict[str, Any]) -> None:
    """Raises ApiError if the body is no request to ``/v1/embeddings``."""
    check_model(body)
    _check_texts(body, "input")
    _check(body, "encoding_format", lambda value: value in ("float", "base64"), '"float" or "base64"')
    _check(body, "user", *_COMMON["user"])
    _check(body, "dimensions", lambda value: is_int(value) and value >= 1, "an integer of at least 1")


def check_model(body: dict[str, Any]) -> str:
    """The name of the model. Raises ApiError if there is none."""
    model = body.get("model")
    if not isinstance(model, str) or not model.strip():
        raise wrong("model", f"model is {said(model)}; it must be the name of one (GET /v1/models lists them)")
    if len(model) > 512 or not model.isprintable():
        raise wrong("model", "model must be at most 512 printable characters")
    return model


def _check_common(body: dict[str, Any], most_tokens: int) -> None:
    check_model(body)
    for name, (is_right, allowed) in _COMMON.items():
        if name in body:
            _check(body, name, is_right, allowed)
    for name in ("max_tokens", "max_completion_tokens"):
        value = body.get(name)
        if value is not None and (not is_int(value) or not 1 <= value <= most_tokens):
            raise wrong(name, f"{name} is {said(value)}; it must be an integer from 1 to {most_tokens:,}")


def _check_message(message: Any, name: str) -> None:
    if not isinstance(message, dict):
        raise wrong(name, f"{name} is {said(message)}; it must be an object with role and content")
    if message.get("role") not in ROLES:
        raise wrong(f"{name}.role", f"{name}.role is {said(message.get('role'))}; it must be one of {', '.join(ROLES)}")
    content = message.get("content")
    if isinstance(content, list):
        for at, part in enumerate(content):
            if not isinstance(part, dict) or not isinstance(part.get("type"), str):
                raise wrong(f"{name}.content[{at}]", f"{name}.content[{at}] must be an object with a type")
    elif content is not None and not isinstance(content, str):
        raise wrong(f"{name}.content", f"{name}.content is {said(content)}; it must be text or a list of parts")
    calls = message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise wrong(f"{name}.tool_calls", f"{name}.tool_calls must be a list of objects")
    if content is None and not calls and message.get("function_call") is None and message["role"] != "assistant":
        raise wrong(f"{name}.content", f"{name}.content is missing; a {message['role']} message needs one")


def _check_tools(body: dict[str, Any]) -> None:
    tools = body.get("tools")
    if tools is None:
        return
    if not isinstance(tools, list) or not all(
        isinstance(tool, dict) and isinstance(tool.get("type"), str) for tool in tools
    ):
        raise wrong("tools", "tools must be a list of objects with a type")


def _check_thinking(body: dict[str, Any], most_tokens: int) -> None:
    """Thoughts are paid for as answers are."""
    thinking = body.get("thinking")
    budget = thinking.get("budget_tokens") if isinstance(thinking, dict) else None
    if budget is not None and (not is_int(budget) or not 1 <= budget <= most_tokens):
        name = "thinking.budget_tokens"
        raise wrong(name, f"{name} is {said(budget)}; it must be an integer from 1 to {most_tokens:,}")


def _check_texts(body: dict[str, Any], name: str) -> None:
    value = body.get(name)
    if isinstance(value, str):
        return
    if isinstance(value, list) and value:
        if all(isinstance(part, str) for part in value) or _are_ids(value):
            return
        if all(isinstance(part, list) and part and _are_ids(part) for part in value):
            return
    raise wrong(name, f"{name} is {said(value)}; it must be text, a list of texts, or lists of token ids")


def _are_ids(value: list[Any]) -> bool:
    return all(is_int(part) and part >= 0 for part in value)


def _check(body: dict[str, Any], name: str, is_right: Check, allowed: str) -> None:
    value = body.get(name)
    if value is not None and not is_right(value):
        raise wrong(name, f"{name} is {said(value)}; it must be {allowed}")


def _between(low: float, high: float) -> tuple[Check, str]:
    def is_right(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high

    return is_right, f"a number from {low:g} to {high:g}"


def _is_stop(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(part, str) for part in value))


_BOOL: tuple[Check, str] = (lambda value: isinstance(value, bool), "true or false")
_OBJECT: tuple[Check, str] = (lambda value: isinstance(value, dict), "an object")
_COMMON: dict[str, tuple[Check, str]] = {
    "temperature": _between(0, 2),
    "top_p": _between(0, 1),
    "presence_penalty": _between(-2, 2),
    "frequency_penalty": _between(-2, 2),
    "stream": _BOOL,
    "stream_options": _OBJECT,
    "n": (lambda value: is_int(value) and 1 <= value <= 128, "an integer from 1 to 128"),
    "best_of": (lambda value: is_int(value) and 1 <= value <= 128, "an integer from 1 to 128"),
    "seed": (is_int, "an integer"),
    "stop": (_is_stop, "text or a list of texts"),
    "user": (lambda value: isinstance(value, str), "text"),
    "response_format": _OBJECT,
    "logit_bias": _OBJECT,
}
