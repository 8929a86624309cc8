"""The door through which whole answers come in: of the form that the gateway reads, or garbage of the deployment that sent them.

What is not read here passes as it came. Usage that cannot be is as if none had been told.
"""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from anabranch.gateway.plain_values import whole_of
from anabranch.gateway.providers.provider import WRITES, Answer, Provider, UpstreamRequest, estimated, garbage
from anabranch.gateway.providers.usage import TOKENS, Usage, is_untold
from anabranch.routers.contract.choices import are_objects, wrong_choices
from anabranch.web.large_json import num_bytes
from anabranch.web.turns import plainly

_COUNTS = tuple(field.name for field in fields(Usage) if field.type is int)


def read_answer(provider: Provider, request: UpstreamRequest, body: bytes) -> Answer:
    """The body of a 2xx answer. Raises UpstreamError: of kind ``garbage`` if it is none, else for what it reports."""
    answer = plainly(lambda: provider.parse(request, body))
    if request.endpoint not in ("embeddings", *WRITES):
        # Its provider has looked, and what it is made of passes as it came.
        return answer
    if request.endpoint == "embeddings":
        what = "" if are_objects(answer.body.get("data")) else "data is no list of objects"
    else:
        what = wrong_choices(answer.body.get("choices"), is_chat=request.endpoint == "chat", is_passed_on=True)
    if what:
        raise garbage(f"an answer whose {what}", body)
    usage = plainly(lambda: in_counts(answer.usage))
    answer.usage = estimated(request, answer.body) if usage is None else usage
    if usage is None:
        return answer
    if not usage.prompt:
        answer.usage = estimated(request, answer.body, usage)
    elif request.endpoint in WRITES and not usage.is_estimated and not request.body.get("echo"):
        # An echo is of the prompt, which is told.
        text_bytes = _text_bytes(answer.body)
        if is_untold(usage.completion, text_bytes):
            answer.usage = replace(usage, completion=text_bytes // 4, is_estimated=True, tells_prompt=True)
    return answer


def _text_bytes(body: Mapping[str, Any]) -> int:
    """Bytes of the texts, thoughts and arguments of all choices; no sound and no pictures, which are counted apart."""
    texts: list[Any] = []
    for choice in body.get("choices") or ():
        message = choice.get("message")
        message = message if isinstance(message, dict) else {}
        content, calls = message.get("content"), message.get("tool_calls")
        parts = content if isinstance(content, list) else [{"text": content}]
        texts += [choice.get("text"), *(message.get(name) for name in ("reasoning_content", "reasoning", "refusal"))]
        texts += [part.get("text") for part in parts if isinstance(part, dict)]
        functions = (
            [call.get("function") for call in calls if isinstance(call, dict)] if isinstance(calls, list) else []
        )
        texts += [one.get("arguments") for one in functions if isinstance(one, dict)]
    return sum(num_bytes(text) for text in texts if isinstance(text, str))


def in_counts(usage: Usage) -> Usage | None:
    """With integers of Python's for counts that equal one; None where one equals none, or none that can be. To be called by `plainly`."""
    odd = {name: whole_of(count) for name in _COUNTS if type(count := getattr(usage, name)) is not int}
    known = {name: count for name, count in odd.items() if count is not None}
    found = replace(usage, **known) if known else usage  # type: ignore[arg-type]
    counts = [getattr(found, name) for name in _COUNTS]
    can_be = all(type(count) is int and 0 <= count <= TOKENS for count in counts) and found.cached <= found.prompt
    return found if can_be else None
