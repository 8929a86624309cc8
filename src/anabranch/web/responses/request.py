"""A request of ``/v1/responses`` as one of chat."""

from collections.abc import Callable
from typing import Any

from anabranch.web.api_error import wrong
from anabranch.web.body import said
from anabranch.web.responses.thoughts import THOUGHTS, thoughts_of
from anabranch.web.responses.tools import arguments_of, choice_of, tools_of

# What chat has other words for.
_HERE = frozenset(
    {
        "input",
        "instructions",
        "max_output_tokens",
        "text",
        "tools",
        "tool_choice",
        "reasoning",
        "include",
        "truncation",
        "prompt",
        # Of streams, what is hidden in the lengths of pieces; and a limit of tools that run at the provider, of which there are none.
        "stream_options",
        "max_tool_calls",
    }
)
# Of ``include``: log-probabilities of what is said.
LOGPROBS = "message.output_text.logprobs"

# What may be asked to be included; all but log-probabilities and thoughts are of tools that run at a provider, of which there are none.
_INCLUDED = (
    LOGPROBS,
    "reasoning.encrypted_content",
    "file_search_call.results",
    "web_search_call.results",
    "web_search_call.action.sources",
    "message.input_image.image_url",
    "computer_call_output.output.image_url",
    "code_interpreter_call.outputs",
)
# What a server would have to keep.
_STATE = ("previous_response_id", "conversation", "background", "prompt")
_ROLES = ("system", "developer", "user", "assistant")
_TEXT = (lambda value: isinstance(value, str), "text")
# Fields of an item, by its type, and what they may be.
_ITEMS: dict[str, tuple[tuple[str, Callable[[Any], bool], str], ...]] = {
    "message": (("role", lambda value: value in _ROLES, f"one of {', '.join(_ROLES)}"),),
    "function_call": (
        ("name", *_TEXT),
        ("arguments", lambda value: value is None or isinstance(value, str), "JSON as text"),
    ),
    "function_call_output": (
        ("call_id", *_TEXT),
        ("output", lambda value: isinstance(value, str | list), "text or a list of parts"),
    ),
    "custom_tool_call": (("name", *_TEXT), ("input", *_TEXT)),
    "custom_tool_call_output": (
        ("call_id", *_TEXT),
        ("output", lambda value: isinstance(value, str | list), "text or a list of parts"),
    ),
}
_OUTPUTS = ("function_call_output", "custom_tool_call_output")


def to_chat(body: dict[str, Any], *, keeps_reasoning: bool = False) -> dict[str, Any]:
    """The request of ``/v1/chat/completions`` that asks the same.

    Args:
        body: the request, as it came.
        keeps_reasoning: what a model thought comes back to it; what another did is not for it to see.

    Raises ApiError for what chat cannot do.
    """
    for name in _STATE:
        if body.get(name):
            raise wrong(name, f"{name} needs a server that keeps conversations; send all of it in input", "unsupported")
    chat = {name: value for name, value in body.items() if name not in _HERE}
    chat["messages"] = _messages(body, keeps_reasoning)
    if body.get("max_output_tokens") is not None:
        chat["max_completion_tokens"] = body["max_output_tokens"]
    # An empty list asks for nothing; what is no list is wrong, also where it is empty.
    if body.get("tools") not in (None, []):
        chat["tools"] = tools_of(body)
    if body.get("tool_choice") is not None:
        chat["tool_choice"] = choice_of(body["tool_choice"])
    wanted = table_of(table_of(body, "text"), "format", "text.format")
    if wanted and wanted.get("type") != "text":
        form = {name: value for name, value in wanted.items() if name != "type"}
        is_schema = wanted.get("type") == "json_schema"
        chat["response_format"] = {"type": wanted.get("type"), **({"json_schema": form} if is_schema else form)}
    for name, part, chat_name in (("reasoning", "effort", "reasoning_effort"), ("text", "verbosity", "verbosity")):
        value = table_of(body, name).get(part)
        if value is None:
            continue
        if not isinstance(value, str) or not value:
            raise wrong(f"{name}.{part}", f"{name}.{part} is {said(value)}; it must be a word such as low")
        chat[chat_name] = value
    table_of(body, "stream_options")
    included = body.get("include")
    _check_included(included)
    if body.get("top_logprobs") or (isinstance(included, list) and LOGPROBS in included):
        chat["logprobs"] = True
    if body.get("stream"):
        chat["stream_options"] = {"include_usage": True}
    return chat


def _check_included(included: Any) -> None:
    """Raises ApiError for what nobody can include: who asks for it would miss it without a word."""
    if included is None:
        return
    if not isinstance(included, list):
        raise wrong("include", f"include is {said(included)}; it must be a list")
    for at, name in enumerate(included):
        if name not in _INCLUDED:
            raise wrong(f"include[{at}]", f"include[{at}] is {said(name)}; it must be one of {', '.join(_INCLUDED)}")


def _messages(body: dict[str, Any], keeps_reasoning: bool) -> list[dict[str, Any]]:
    wanted, messages = body.get("input"), []
    if body.get("instructions") is not None:
        if not isinstance(body["instructions"], str):
            raise wrong("instructions", f"instructions is {said(body['instructions'])}; it must be text")
        messages.append({"role": "system", "content": body["instructions"]})
    if isinstance(wanted, str):
        return [*messages, {"role": "user", "content": wanted}]
    if not isinstance(wanted, list) or not wanted:
        raise wrong("input", "input must be text or a list of items with at least one in it")
    for at, item in enumerate(wanted):
        if not isinstance(item, dict):
            raise wrong(f"input[{at}]", f"input[{at}] must be an object")
        if item.get("type") == "reasoning":
            _add_thoughts(messages, thoughts_of(item, keeps_reasoning), wanted[at + 1 :])
        else:
            _add_item(messages, item, f"input[{at}]")
    return messages


def _add_thoughts(messages: list[dict[str, Any]], made: dict[str, Any], behind: list[Any]) -> None:
    """What was thought is of the message or the call that follows; where none does, of what was said before."""
    if not made:
        return
    after = behind[0] if behind and isinstance(behind[0], dict) else {}
    is_followed = after.get("type", "message") != "message" or after.get("role") == "assistant"
    is_followed = is_followed and after.get("type") not in _OUTPUTS
    before = messages[-1] if messages else {}
    if (behind and is_followed) or before.get("role") != "assistant":
        messages.append({"role": "assistant", "content": "", **made})
        return
    for name, value in made.items():
        before[name] = before[name] + value if before.get(name) else value


def _add_item(messages: list[dict[str, Any]], item: dict[str, Any], name: str) -> None:
    kind = item.get("type", "message")
    for field, is_right, wanted in _ITEMS.get(kind, ()) if isinstance(kind, str) else ():
        if not is_right(item.get(field)):
            raise wrong(f"{name}.{field}", f"{name}.{field} is {said(item.get(field))}; it must be {wanted}")
    if kind == "message":
        made: dict[str, Any] = {"role": item.get("role"), "content": _content(item.get("content"), name)}
        before = messages[-1] if messages else {}
        is_thought = any(before.get(name) for name in THOUGHTS) and not before["content"]
        if made["role"] == "assistant" and is_thought and not before.get("tool_calls"):
            messages.pop()
            made |= {name: before[name] for name in (*THOUGHTS, "images") if name in before}
        messages.append(made)
    elif kind in ("function_call", "custom_tool_call"):
        is_custom = kind == "custom_tool_call"
        arguments = arguments_of(item["input"]) if is_custom else item.get("arguments") or ""
        call = {"name": item.get("name"), "arguments": arguments}
        made = {"id": item.get("call_id"), "type": "function", "function": call}
        # What was said before the call, and calls beside it.
        if messages and messages[-1]["role"] == "assistant":
            messages[-1].setdefault("tool_calls", []).append(made)
        else:
            messages.append({"role": "assistant", "content": None, "tool_calls": [made]})
    elif kind == "image_generation_call" and isinstance(item.get("result"), str):
        _add_image(messages, item)
    elif kind in _OUTPUTS:
        content = _content(item.get("output"), name)
        messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": content})
    else:
        what = f"{name} is of type {str(kind)[:40]!r}, which no chat model can be sent"
        raise wrong(f"{name}.type", what, "unsupported")


def _add_image(messages: list[dict[str, Any]], item: dict[str, Any]) -> None:
    """A picture that the model made before."""
    url = picture_url(item)
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    messages[-1].setdefault("images", []).append({"type": "image_url", "image_url": {"url": url}})


def picture_url(item: dict[str, Any]) -> str:
    """Of the ``result`` of an ``image_generation_call``."""
    form, result = item.get("output_format"), item["result"]
    return result if "://" in result[:10] else f"data:image/{form if isinstance(form, str) else 'png'};base64,{result}"


def _content(content: Any, name: str) -> Any:
    if not isinstance(content, list):
        return content
    parts = []
    for at, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("input_text", "output_text", "text"):
            parts.append({"type": "text", "text": part.get("text")})
        elif kind == "refusal":
            parts.append({"type": "refusal", "refusal": part.get("refusal")})
        elif kind == "input_image" and part.get("image_url"):
            detail = {"detail": part["detail"]} if part.get("detail") else {}
            parts.append({"type": "image_url", "image_url": {"url": part["image_url"], **detail}})
        elif kind == "input_file" and (part.get("file_data") or part.get("file_id")):
            file = {field: part[field] for field in ("file_data", "file_id", "filename") if part.get(field)}
            parts.append({"type": "file", "file": file})
        elif kind == "input_audio" and isinstance(part.get("input_audio"), dict):
            parts.append({"type": "input_audio", "input_audio": part["input_audio"]})
        else:
            where = f"{name}.content[{at}]"
            raise wrong(
                where,
                f"{where} is of type {str(kind)[:40]!r}; text, images by URL, files with their data and sound can be sent",
                "unsupported",
            )
    if len(parts) == 1 and parts[0]["type"] == "text":
        return parts[0]["text"]
    return parts


def table_of(body: dict[str, Any], name: str, shown: str | None = None) -> dict[str, Any]:
    """A field that is a table, empty where it is not given. Raises ApiError for anything else, under the name that is ``shown``."""
    value = body.get(name)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise wrong(shown or name, f"{shown or name} must be an object")
    return value
