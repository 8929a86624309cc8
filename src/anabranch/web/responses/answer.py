"""A whole answer of chat as a response."""

import time
from typing import Any

from anabranch.web.beside import beside, images_of, is_whole
from anabranch.web.reasoning_details import details_in, sealed_blocks
from anabranch.web.responses.items import (
    call_item,
    image_item,
    message_item,
    new_id,
    reasoning_item,
)
from anabranch.web.responses.request import table_of
from anabranch.web.responses.scores import logprobs_of, logprobs_of_nothing, logprobs_of_texts
from anabranch.web.responses.thoughts import sealed, thought_in
from anabranch.web.responses.tools import custom_names
from anabranch.web.said_order import said

# Fields of a request that a response shows, and what they are where it says nothing.
_SHOWN: dict[str, Any] = {
    "background": False,
    "max_tool_calls": None,
    "prompt_cache_key": None,
    "safety_identifier": None,
    "service_tier": None,
    "top_logprobs": 0,
    "instructions": None,
    "max_output_tokens": None,
    "metadata": {},
    "parallel_tool_calls": True,
    "temperature": 1.0,
    "tool_choice": "auto",
    "tools": [],
    "top_p": 1.0,
    "truncation": "disabled",
    "user": None,
    "store": False,
}

# Of the usage of our own servers, which say it under these names everywhere: the layers that ran, and each turn of routers to the text.
_OURS = ("depth", "rewiring")
# Likewise of a choice: how its routers are turned, for a conversation to go on with.
_OURS_OF_CHOICE = ("rewire_state",)


def to_response(body: dict[str, Any], answer: dict[str, Any]) -> dict[str, Any]:
    """The response that says what an answer of chat says.

    Args:
        body: the request, as it came.
        answer: of chat.
    """
    choice = (answer.get("choices") or [{}])[0]
    message = choice.get("message") or {}
    output: list[dict[str, Any]] = []
    blocks = message.get("thinking_blocks") or sealed_blocks(details_in(message))
    if thought_in(message) or blocks:
        output.append(sealed(reasoning_item(new_id("rs"), thought_in(message)), blocks, body))
    pieces = said({**message, "content": _as_text(message.get("content"))})
    scores = iter(
        logprobs_of_texts(
            pieces,
            logprobs_of(choice),
            thoughts=thought_in(message),
            is_refused=bool(message.get("refusal")),
        )
    )
    text, refusal = pieces.pop(0)[1] if pieces and pieces[0][0] == "text" else "", message.get("refusal") or ""
    # An answer that says nothing at all is a message without text, as its stream has it.
    if text or refusal or not (output or message.get("tool_calls") or images_of(message)):
        logprobs = next(scores) if text else logprobs_of_nothing(logprobs_of(choice), answer.get("usage"))
        output.append(message_item(new_id("msg"), text, refusal, logprobs=logprobs))
    custom = custom_names(body)
    for kind, call in pieces:
        if kind == "text":
            output.append(message_item(new_id("msg"), call, "", logprobs=next(scores)))
            continue
        function = call.get("function") or {}
        name, arguments = function.get("name"), function.get("arguments") or ""
        is_custom = name in custom
        id = new_id("ctc" if is_custom else "fc")
        output.append(call_item(id, call.get("id"), name, arguments, is_custom=is_custom))
        if why_cut(choice.get("finish_reason")) and not is_whole(arguments):
            output[-1]["status"] = "incomplete"
    is_text_last = bool(pieces) and pieces[-1][0] == "text"
    if output and why_cut(choice.get("finish_reason")) and (is_text_last or not message.get("tool_calls")):
        output[-1]["status"] = "incomplete"
    output += [image_item(kind, data) for kind, data in images_of(message)]
    made = {**response_of(body, answer.get("model"), answer.get("created")), **own_of(choice)}
    return finished(made, output, choice.get("finish_reason"), answer.get("usage"), beside(message))


def _as_text(content: Any) -> str:
    """Of a message: some servers give its text in parts."""
    if not isinstance(content, list):
        return content or ""
    texts = [part.get("text") for part in content if isinstance(part, dict)]
    return "".join(text for text in texts if isinstance(text, str))


def response_of(body: dict[str, Any], model: str | None, created: int | None) -> dict[str, Any]:
    """A response that has just begun.

    Args:
        body: the request, as it came.
        model: that answers; None for the one it names.
        created: seconds since 1970; None for now.
    """
    shown = {name: default if body.get(name) is None else body[name] for name, default in _SHOWN.items()}
    reasoning = {"effort": table_of(body, "reasoning").get("effort"), "summary": None}
    return {
        "id": new_id("resp"),
        "object": "response",
        "created_at": created or int(time.time()),
        "status": "in_progress",
        "error": None,
        "incomplete_details": None,
        "model": model or body.get("model"),
        "output": [],
        "previous_response_id": None,
        "reasoning": reasoning,
        "text": body.get("text") or {"format": {"type": "text"}},
        "usage": None,
        **shown,
    }


def own_of(choice: dict[str, Any]) -> dict[str, Any]:
    """What our own servers tell of a choice that has ended, beside what it says."""
    return {name: choice[name] for name in _OURS_OF_CHOICE if choice.get(name) is not None}


def why_cut(reason: str | None) -> str | None:
    """Why an answer is not whole, by the reason that chat tells; None for one that is."""
    return {"length": "max_output_tokens", "content_filter": "content_filter"}.get(reason or "")


def finished(
    made: dict[str, Any],
    output: list[dict[str, Any]],
    reason: str | None,
    usage: dict[str, Any] | None,
    more: dict[str, Any],
) -> dict[str, Any]:
    """A response that has come to its end.

    Args:
        made: as it began (`response_of`).
        output: its items.
        reason: why it ended, in the words of chat.
        usage: in those of chat.
        more: what chat said beside the message.
    """
    why = why_cut(reason)
    status = {"status": "incomplete", "incomplete_details": {"reason": why}} if why else {"status": "completed"}
    told = {"extra_content": more} if more else {}
    return {**made, **status, "output": output, "usage": _usage(usage), **told}


def _usage(usage: dict[str, Any] | None) -> dict[str, Any] | None:
    """Tokens, and what our own servers tell beside them, in the words of responses."""
    if not usage:
        return None
    prompt, completion = usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    reasoning = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": cached},
        "output_tokens": completion,
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": prompt + completion,
        **{name: usage[name] for name in _OURS if usage.get(name) is not None},
    }
