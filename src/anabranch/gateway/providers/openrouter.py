"""OpenRouter: OpenAI's form with routing between providers, reasoning, what a request cost in dollars, and errors that come under 200."""

import json
from dataclasses import replace
from typing import Any

from anabranch.config import Field, configclass
from anabranch.gateway.providers.openai import OpenAI
from anabranch.gateway.providers.provider import (
    Answer,
    Failure,
    Headers,
    HttpCall,
    Json,
    UpstreamError,
    UpstreamRequest,
)
from anabranch.gateway.providers.thoughts import unsigned
from anabranch.gateway.providers.vocabulary import hint_of, kind_of, status_said
from anabranch.web.reasoning_details import details_of


class OpenRouter(OpenAI, kind="openrouter"):
    """Talks to OpenRouter."""

    # Only some of the providers behind it do.
    stops_when_closed = False

    @configclass
    class Config(OpenAI.Config):
        """What is asked of it, where the request does not say it itself.

        Attributes:
            routing: the field ``provider`` of its API: ``order``, ``only``, ``ignore``, ``allow_fallbacks``, ``sort``, ``max_price``,
                ``data_collection`` and so on.
            models: to be tried there if ``model`` fails.
            reasoning: the field of that name: ``effort`` or ``max_tokens``, ``exclude``, ``enabled``.
            tells_cost: ask what each request cost (``usage.cost``, in dollars).
        """

        base_url: str = "https://openrouter.ai/api/v1"
        key_env: str | None = "OPENROUTER_API_KEY"
        routing: dict[str, Any] = Field(default_factory=dict)
        models: tuple[str, ...] = ()
        reasoning: dict[str, Any] = Field(default_factory=dict)
        tells_cost: bool = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        own = {"provider": config.routing, "models": list(config.models), "reasoning": config.reasoning}
        self._own = {name: value for name, value in own.items() if value}

    def build(self, request: UpstreamRequest) -> HttpCall:
        """The sender's body, with what the config adds to it."""
        if request.endpoint != "chat":
            request = self._told_more(request, {})
        return super().build(request)

    def _fitted(self, request: UpstreamRequest) -> UpstreamRequest:
        return self._told_more(super()._fitted(request), self._own)

    @property
    def _takes_thoughts(self) -> bool:
        return True

    def _with_thoughts(self, body: Json, is_foreign: bool) -> Json:
        """Of a request in Anthropic's form, or in that of the Responses API: what was thought there is ``reasoning`` here.

        What came of OpenRouter goes back as it came (``reasoning_details``); what others signed does not go there.
        """
        if not is_foreign and not any(
            isinstance(message, dict) and "thinking_blocks" in message for message in body["messages"]
        ):
            return body
        made = [_reasoned(message) for message in body["messages"]]
        messages = [
            one
            for one in made
            if not isinstance(one, dict) or one.get("role") != "assistant" or any(one.get(name) for name in _SAID)
        ]
        own = {name: value for name, value in body.items() if name != "thinking"} if is_foreign else body
        return {**own, "messages": messages}

    def _told_more(self, request: UpstreamRequest, own: Json) -> UpstreamRequest:
        """With ``own`` fields, and the wish for the cost, where the sender does not say it."""
        added = {**own, **({"usage": {"include": True}} if self.config.tells_cost else {})}
        if "reasoning_effort" in request.body:
            # Two words for one thing: the sender's holds.
            added.pop("reasoning", None)
        missing = {name: value for name, value in added.items() if name not in request.body}
        return request.asking({**request.body, **missing}) if missing else request

    def parse(self, request: UpstreamRequest, body: bytes) -> Answer:
        """As of OpenAI; a choice that failed fails the answer. Raises UpstreamError."""
        answer = super().parse(request, body)
        for choice in answer.body.get("choices") or ():
            error = choice.get("error") if isinstance(choice, dict) else None
            if isinstance(error, dict):
                told = {"error": error}
                raise UpstreamError(self.error(status_said(told), {}, json.dumps(told).encode()))
        return answer

    def error(self, status: int, headers: Headers, body: bytes) -> Failure:
        """Also by what the provider behind it said, as far as that says something of the request."""
        failure = super().error(status, headers, body)
        metadata = _metadata(body)
        if status == 403 and isinstance(metadata.get("reasons"), list):
            # Its own moderation, which flagged the input.
            return replace(failure, kind="filter")
        if failure.kind == "request":
            kind, code, message = _words(metadata.get("raw"))
            # A key or an account behind it is not ours, and says nothing of us.
            for meant in (kind_of(status, kind, code), kind_of(status, _text(metadata.get("error_type")), None)):
                if meant in ("context", "filter"):
                    return replace(failure, kind=meant)
            if failure.hint is None and hint_of(status, message) == "context":
                return replace(failure, hint="context")
        return failure


# Of a message of the assistant's: one that held nothing but what another model thought has nothing left.
_SAID = ("content", "tool_calls", "reasoning", "reasoning_details", "refusal", "images", "audio", "function_call")


def _reasoned(message: Any) -> Any:
    if not isinstance(message, dict) or "thinking_blocks" not in message:
        return message
    blocks = message["thinking_blocks"]
    thought, details = unsigned(blocks), details_of(blocks)
    made = {name: value for name, value in message.items() if name != "thinking_blocks"}
    if thought and not made.get("reasoning"):
        made["reasoning"] = thought
    if details and not made.get("reasoning_details"):
        made["reasoning_details"] = details
    return made


def _metadata(body: bytes) -> Json:
    """Of an error; empty where there is none."""
    value: Any = _read(body)
    for name in ("error", "metadata"):
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def _words(raw: Any) -> tuple[str | None, str | None, str]:
    """Type, code and message of the error of the provider behind; what is no object is all message."""
    read = _read(raw) if isinstance(raw, str) else raw
    error = read.get("error", read) if isinstance(read, dict) else raw
    if not isinstance(error, dict):
        return None, None, _text(error) or ""
    return _text(error.get("type")), _text(error.get("code")), _text(error.get("message")) or ""


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _read(text: Any) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
