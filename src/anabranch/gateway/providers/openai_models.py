"""What OpenAI's models take, told by their names, and requests put into such words.

o1, o3, o4-mini, codex, gpt-5 and later   ``max_completion_tokens`` and ``reasoning_effort``; no sampling, no logprobs, but, from 5.1 on,
                                          with effort ``none``. Those with ``-chat`` in their names are none of these.
gpt-3.5, gpt-4, gpt-4o, gpt-4.1           sampling; no ``reasoning_effort``; Azure calls some of them gpt-35 and gpt-41
all others                                what they are sent
"""

import re
from typing import Any

from anabranch.gateway.providers.provider import Failure, Json, UpstreamError

_REASONING = re.compile(r"(?:.*/)?(?:o\d|codex|gpt-(?:[5-9]|[12]\d)(?!\d|(?:\.\d+)?-chat))")
# They take sampling where they do not reason.
_CAN_REST = re.compile(r"(?:.*/)?gpt-(?:5\.\d|[6-9]|[12]\d)")
_CHAT = re.compile(r"(?:.*/)?(?:chatgpt-|gpt-(?:3\.?5|4))")
# Wishes of which an answer is none the worse.
_SAMPLING = ("temperature", "top_p", "presence_penalty", "frequency_penalty")
# What is missed where it is not given.
_REFUSED = ("logprobs", "top_logprobs", "logit_bias")


def reasons(model: str) -> bool:
    """It is a model of OpenAI's that reasons."""
    return _REASONING.match(model) is not None


def fitted(body: Json, model: str, reasoning: bool | None = None) -> Json:
    """A chat's fields as a model takes them; the same object where nothing is to be changed.

    Args:
        body: of the sender.
        model: what the upstream calls it.
        reasoning: it is a reasoning model, whatever its name; None tells by that.

    Raises UpstreamError (``unsupported``) for what it cannot give.
    """
    is_chat, thinks = _CHAT.match(model) is not None, reasons(model)
    if is_chat or thinks:
        body = _own(body)
    if reasoning is None and is_chat:
        return _without(body, ("reasoning_effort", "verbosity"))
    if not (thinks if reasoning is None else reasoning):
        return body
    made = body
    if body.get("max_tokens"):
        made = {name: value for name, value in body.items() if name != "max_tokens"}
        # The larger where it has both.
        made["max_completion_tokens"] = max(body["max_tokens"], body.get("max_completion_tokens") or 0)
    if body.get("reasoning_effort") == "none" and _CAN_REST.match(model):
        return made
    for name in _REFUSED:
        if body.get(name):
            raise UpstreamError(
                Failure(kind="unsupported", message=f"{name} cannot be asked of {model}, which reasons")
            )
    return _without(made, _SAMPLING)


def effort_of(thinking: Any, model: str) -> str | None:
    """``reasoning_effort`` for Anthropic's ``thinking``, of a model that has it; None for none."""
    if not isinstance(thinking, dict) or not reasons(model):
        return None
    if thinking.get("type") == "adaptive":
        return "medium"
    budget = thinking.get("budget_tokens")
    if thinking.get("type") != "enabled" or not isinstance(budget, int):
        return None
    return "low" if budget <= 2048 else "medium" if budget <= 8192 else "high"


# Of messages that another model wrote, or that were written for one; OpenAI refuses what it does not know.
_OTHERS = (
    "thinking_blocks",
    "reasoning_content",
    "reasoning",
    "reasoning_details",
    "images",
    "extra_content",
    "cache_control",
    "is_error",
)


def _own(body: Json) -> Json:
    """The body without what others say in messages; the same where they say nothing."""
    messages = body.get("messages") or ()
    if not any(isinstance(message, dict) and any(name in message for name in _OTHERS) for message in messages):
        return body
    return {
        **body,
        "messages": [_without(message, _OTHERS) if isinstance(message, dict) else message for message in messages],
    }


def _without(body: Json, names: tuple[str, ...]) -> Json:
    if not any(name in body for name in names):
        return body
    return {name: value for name, value in body.items() if name not in names}
