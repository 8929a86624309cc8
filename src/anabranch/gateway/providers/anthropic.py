"""Anthropic's messages API behind OpenAI's: requests, answers, streams and errors, both ways."""

import json
import time
from collections.abc import Iterable
from typing import Any

from anabranch.config import Field, configclass
from anabranch.gateway.providers.keys import read_key
from anabranch.gateway.providers.openai import check_header, check_url, unsupported
from anabranch.gateway.providers.provider import (
    Answer,
    Failure,
    HttpCall,
    Json,
    Provider,
    UpstreamError,
    UpstreamRequest,
    Usage,
    classify,
    garbage,
    hidden,
    parse_object,
)
from anabranch.gateway.providers.usage import searches_of, tier_of
from anabranch.web.body import is_too_deep
from anabranch.web.json_size import MOST_PARTS, MOST_VALUES, JsonRoom, JsonSizeError

FINISH = {
    "end_turn": "stop", "stop_sequence": "stop", "pause_turn": "stop", "max_tokens": "length", "tool_use": "tool_calls",
    "refusal": "content_filter", "model_context_window_exceeded": "length",
}  # fmt: skip
STATUS = {  # of an error inside a stream, which has no status of its own
    "overloaded_error": 529, "api_error": 500, "rate_limit_error": 429, "authentication_error": 401, "permission_error": 403,
    "not_found_error": 404, "request_too_large": 413, "timeout_error": 504, "billing_error": 402, "invalid_request_error": 400,
}  # fmt: skip

# What reading a value of another shape raises.
_MISSHAPEN = (KeyError, TypeError, AttributeError, ValueError)
REFUSED = ("n", "logprobs", "top_logprobs", "logit_bias", "audio")


class Anthropic(Provider, kind="anthropic"):
    """Talks to ``/v1/messages``."""

    @configclass
    class Config(Provider.Config):
        """Where it is.

        Attributes:
            base_url: without the version.
            key_env: environment variable that holds the key.
            key_file: encrypted file that holds it, read if the variable is not set.
            version: of the API.
            max_tokens: for senders who name none; the API wants one.
            headers: to send with each call; no keys here.
            proxy: URL of an HTTP proxy; None connects directly.
        """

        base_url: str = "https://api.anthropic.com"
        key_env: str | None = "ANTHROPIC_API_KEY"
        key_file: str | None = None
        version: str = "2023-06-01"
        max_tokens: int = Field(default=4096, ge=1)
        headers: dict[str, str] = Field(default_factory=dict)
        proxy: str | None = None

        def __post_init__(self) -> None:
            check_url("base_url", self.base_url)
            if self.proxy is not None:
                check_url("proxy", self.proxy)
            for name, value in self.headers.items():
                check_header(name, value)

    endpoints = ("chat",)
    caches_unasked = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._key = read_key(config.key_env, config.key_file)
        key = {} if self._key is None else {"x-api-key": self._key.reveal()}
        self._headers = {
            "content-type": "application/json",
            "anthropic-version": config.version,
            **config.headers,
            **key,
        }
        self._url = config.base_url.rstrip("/") + "/v1/messages"

    def build(self, request: UpstreamRequest) -> HttpCall:
        """The messages in Anthropic's form. Raises UpstreamError (``unsupported``) for what it cannot do."""
        if request.endpoint != "chat":
            raise unsupported(f"{request.endpoint} cannot be asked of anthropic")
        try:
            body = translated(request.body, self.config.model, self.config.max_tokens)
        except _MISSHAPEN as error:
            message = f"messages or tools are not in the form of OpenAI's API ({type(error).__name__}: {error})"
            raise UpstreamError(Failure(kind="request", message=message, status=400)) from None
        headers = {**self._headers, **request.headers} if request.headers else self._headers
        return HttpCall(self._url, headers, request.dumped(body), self.config.proxy)

    def parse(self, request: UpstreamRequest, body: bytes) -> Answer:
        """A message as a chat completion. Raises UpstreamError (``garbage``)."""
        try:
            return self._parsed(parse_object(body), body)
        except _MISSHAPEN:
            raise garbage("an answer that is no message", body) from None

    def _parsed(self, value: Json, body: bytes) -> Answer:
        if value.get("type") == "error":
            raise UpstreamError(self._of_event(value))
        if not isinstance(value.get("content"), list):
            raise garbage("an answer without 'content'", body)
        usage = _usage(value.get("usage"))
        choice = {"index": 0, "message": _message(value["content"]), "finish_reason": _finish(value.get("stop_reason"))}
        return Answer({**_head(value, "chat.completion"), "choices": [choice], "usage": usage.to_openai()}, None, usage)

    def translator(self, request: UpstreamRequest) -> "MessageStream":
        """What reads its events."""
        return MessageStream(self)

    def error(self, status: int, headers: Any, body: bytes) -> Failure:
        """As of others; an overload is a failure of the server."""
        return self.redacted(classify(status, headers, body))

    def redacted(self, failure: Failure) -> Failure:
        """Without this provider's key."""
        return hidden(failure, None if self._key is None else self._key.reveal())

    def _of_event(self, value: Json) -> Failure:
        error = value.get("error")
        kind = error.get("type") if isinstance(error, dict) else None
        return self.error(STATUS.get(str(kind), 500), {}, json.dumps(value).encode())


# Requests


def translated(body: Json, model: str, max_tokens: int) -> Json:
    """A chat request as a messages request. Raises UpstreamError (``unsupported``) for what has no counterpart."""
    for name in REFUSED:
        if body.get(name) and not (name == "n" and body[name] == 1):
            raise unsupported(f"{name} cannot be asked of anthropic")
    if (body.get("response_format") or {}).get("type", "text") != "text":
        raise unsupported("response_format cannot be asked of anthropic")
    system, messages = _messages(body.get("messages") or [])
    made: Json = {
        "model": model,
        "max_tokens": body.get("max_completion_tokens") or body.get("max_tokens") or max_tokens,
        "messages": messages,
    }
    if system:
        made["system"] = system
    for name in ("temperature", "top_p", "top_k", "metadata", "stream", "thinking"):
        if body.get(name) is not None:
            made[name] = body[name]
    # OpenAI's scale goes to 2, Anthropic's to 1.
    if made.get("temperature", 0) > 1:
        made["temperature"] = 1.0
    stop = body.get("stop")
    if stop:
        made["stop_sequences"] = [stop] if isinstance(stop, str) else stop
    return made | _tools(body)


def _tools(body: Json) -> Json:
    tools = [
        {
            "name": tool["function"]["name"],
            "description": tool["function"].get("description") or "",
            "input_schema": tool["function"].get("parameters") or {"type": "object", "properties": {}},
        }
        for tool in body.get("tools") or []
        if tool.get("type", "function") == "function"
    ]
    if not tools:
        return {}
    choice = body.get("tool_choice", "auto")
    if isinstance(choice, dict):
        how: Json = {"type": "tool", "name": choice["function"]["name"]}
    else:
        how = {"type": {"auto": "auto", "required": "any", "none": "none"}.get(choice, "auto")}
    if body.get("parallel_tool_calls") is False and how["type"] != "none":
        how["disable_parallel_tool_use"] = True
    return {"tools": tools, "tool_choice": how}


def _messages(given: Iterable[Json]) -> tuple[str, list[Json]]:
    """The system prompt, and turns that alternate between user and assistant."""
    system: list[str] = []
    turns: list[Json] = []
    room = JsonRoom(MOST_VALUES, MOST_PARTS)
    for message in given:
        role, content = message.get("role"), message.get("content")
        if role in ("system", "developer"):
            system.append(_text(content))
            continue
        if role == "tool":
            role, blocks = (
                "user",
                [{"type": "tool_result", "tool_use_id": message.get("tool_call_id"), "content": _text(content)}],
            )
        elif role == "assistant":
            blocks = [*_blocks(content), *(_tool_use(call, room) for call in message.get("tool_calls") or [])]
        else:
            role, blocks = "user", _blocks(content)
        if not blocks:
            continue
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += blocks
        else:
            turns.append({"role": role, "content": blocks})
    return "\n\n".join(filter(None, system)), turns


def _text(content: Any) -> str:
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content if isinstance(part, dict))
    return content or ""


def _blocks(content: Any) -> list[Json]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    return [_block(part) for part in content or []]


def _block(part: Json) -> Json:
    kind = part.get("type")
    if kind == "text":
        return {"type": "text", "text": part["text"]}
    if kind == "image_url":
        url = part["image_url"]["url"]
        if not url.startswith("data:"):
            return {"type": "image", "source": {"type": "url", "url": url}}
        media, _, data = url.removeprefix("data:").partition(";base64,")
        return {"type": "image", "source": {"type": "base64", "media_type": media, "data": data}}
    raise unsupported(f"a part of a message of type {kind!r} cannot be sent to anthropic")


def _tool_use(call: Json, room: JsonRoom) -> Json:
    """A call; its arguments count in ``room``. Raises UpstreamError."""
    function = call["function"]
    text, why_not = function.get("arguments") or "{}", ""
    try:
        # The parser holds up all other requests for as long as it takes.
        room.take(text.encode("utf-8", "replace"))
        given = json.loads(text)
        why_not = "are nested too deep" if is_too_deep(given) else ""
    except JsonSizeError as error:
        why_not = f"have, with those of the other calls, {error}"
    except RecursionError:
        why_not = "are nested too deep"
    except ValueError:
        why_not = "are no JSON"
    if why_not:
        message = f"the arguments of the tool call {call.get('id')!r} {why_not}"
        raise UpstreamError(Failure(kind="request", message=message, status=400))
    return {"type": "tool_use", "id": call.get("id"), "name": function["name"], "input": given}


# Answers


def _head(message: Json, kind: str) -> Json:
    return {
        "id": message.get("id") or "",
        "object": kind,
        "created": int(time.time()),
        "model": message.get("model") or "",
    }


def _message(content: list[Json]) -> Json:
    text = "".join(block.get("text", "") for block in content if block.get("type") == "text")
    thoughts = "".join(block.get("thinking", "") for block in content if block.get("type") == "thinking")
    calls = [
        {
            "id": block["id"],
            "type": "function",
            "function": {"name": block["name"], "arguments": json.dumps(block.get("input") or {})},
        }
        for block in content
        if block.get("type") == "tool_use"
    ]
    message: Json = {"role": "assistant", "content": text if text or not calls else None}
    if thoughts:
        message["reasoning_content"] = thoughts
    if calls:
        message["tool_calls"] = calls
    return message


def _finish(reason: Any) -> str:
    return FINISH.get(reason, "stop")


def _usage(given: Any) -> Usage:
    """Anthropic counts cached tokens beside the others, OpenAI among them."""
    if not isinstance(given, dict):
        return Usage(is_estimated=True)
    cached, written = given.get("cache_read_input_tokens") or 0, given.get("cache_creation_input_tokens") or 0
    by_ttl = given.get("cache_creation")
    for_hour = (by_ttl.get("ephemeral_1h_input_tokens") or 0) if isinstance(by_ttl, dict) else 0
    prompt = (given.get("input_tokens") or 0) + written + cached
    return Usage(
        prompt,
        given.get("output_tokens") or 0,
        cached,
        cache_write=max(0, written - for_hour),
        cache_write_1h=min(for_hour, written),
        searches=searches_of(given),
        tier=tier_of(given),
        tells_ttl=isinstance(by_ttl, dict),
    )


class MessageStream:
    """Turns the events of one message into chunks.

    Attributes:
        is_done: ``message_stop`` has come.
    """

    def __init__(self, provider: Anthropic) -> None:
        self._provider, self._head = provider, _head({}, "chat.completion.chunk")
        self._given: Json = {}
        # Index of a block -> index of its tool call.
        self._calls: dict[int, int] = {}
        self.is_done = False

    @property
    def told(self) -> Usage | None:
        """The usage as it was said so far; None where nothing was that makes sense."""
        try:
            return Usage.of({"usage": _usage(self._given).to_openai()}) if self._given else None
        except _MISSHAPEN:
            return None

    def feed(self, data: bytes) -> list[Json]:
        """The chunks of one event. Raises UpstreamError if it reports an error or cannot be read."""
        value = parse_object(data)
        kind = value.get("type")
        if kind == "error":
            raise UpstreamError(self._provider._of_event(value))
        try:
            return getattr(self, f"_{kind}")(value) if kind in EVENTS else []
        except _MISSHAPEN:
            raise garbage("an event that is none of a message", data) from None

    def _chunk(self, delta: Json, finish_reason: str | None = None) -> list[Json]:
        return [{**self._head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}]

    def _message_start(self, value: Json) -> list[Json]:
        message = value.get("message") or {}
        self._head, self._given = _head(message, "chat.completion.chunk"), dict(message.get("usage") or {})
        return self._chunk({"role": "assistant", "content": ""})

    def _content_block_start(self, value: Json) -> list[Json]:
        block = value.get("content_block") or {}
        if block.get("type") == "tool_use":
            at = self._calls[value["index"]] = len(self._calls)
            function = {"name": block["name"], "arguments": ""}
            return self._chunk(
                {"tool_calls": [{"index": at, "id": block["id"], "type": "function", "function": function}]}
            )
        return self._chunk({"content": block["text"]}) if block.get("text") else []

    def _content_block_delta(self, value: Json) -> list[Json]:
        delta = value.get("delta") or {}
        if delta.get("type") == "text_delta":
            return self._chunk({"content": delta["text"]})
        if delta.get("type") == "thinking_delta":
            return self._chunk({"reasoning_content": delta["thinking"]})
        if delta.get("type") == "input_json_delta" and delta.get("partial_json"):
            at = self._calls.get(value["index"], 0)
            return self._chunk({"tool_calls": [{"index": at, "function": {"arguments": delta["partial_json"]}}]})
        return []

    def _message_delta(self, value: Json) -> list[Json]:
        self._given |= value.get("usage") or {}
        usage = {**self._head, "choices": [], "usage": _usage(self._given).to_openai()}
        return [*self._chunk({}, _finish((value.get("delta") or {}).get("stop_reason"))), usage]

    def _message_stop(self, value: Json) -> list[Json]:
        self.is_done = True
        return []


EVENTS = ("message_start", "content_block_start", "content_block_delta", "message_delta", "message_stop")
