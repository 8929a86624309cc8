"""Anthropic's messages API behind OpenAI's: answers, streams and errors; requests see `anthropic_request`.

What a model thought is in ``reasoning_content`` as text, and in ``thinking_blocks`` with its signatures: who sends that back with the
message has the model go on from its own thoughts, through calls of tools too. Blocks that chat has no form for (tools that run at
Anthropic and what they found, text with its sources) are in ``extra_content.anthropic.blocks`` as they came.

A sender who asked in Anthropic's own form (`UpstreamRequest.native`) has the request sent as it came, and the answer, or each event of it,
beside what was made of it (``anthropic``), so that nothing is lost on the way.
"""

import json
import time
from typing import Any

from anabranch.config import Field, configclass
from anabranch.gateway.providers.anthropic_request import ANSWER_TOOL, adapted, forces_json, translated
from anabranch.gateway.providers.keys import read_key
from anabranch.gateway.providers.make_on import makes_on
from anabranch.gateway.providers.native_events import grown
from anabranch.gateway.providers.openai import check_drops, check_header, check_url, unsupported
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
from anabranch.web.said_order import SaidOrder

__all__ = ["Anthropic", "MessageStream", "translated"]
FINISH = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "pause_turn": "stop",
    "max_tokens": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
    "model_context_window_exceeded": "length",
}
STATUS = {  # of an error inside a stream, which has no status of its own
    "overloaded_error": 529,
    "api_error": 500,
    "rate_limit_error": 429,
    "authentication_error": 401,
    "permission_error": 403,
    "not_found_error": 404,
    "request_too_large": 413,
    "timeout_error": 504,
    "billing_error": 402,
    "invalid_request_error": 400,
}

# Blocks that are said in full by a message of chat.
_IN_CHAT = ("text", "thinking", "redacted_thinking", "tool_use")

# What reading a value of another shape raises.
_MISSHAPEN = (KeyError, TypeError, AttributeError, ValueError)


class Anthropic(Provider, kind="anthropic"):
    """Talks to ``/v1/messages``."""

    stops_when_closed = True

    @configclass
    class Config(Provider.Config):
        """Where it is.

        Attributes:
            base_url: without the version.
            key_env: environment variable that holds the key.
            key_file: encrypted file that holds it, read if the variable is not set.
            version: of the API.
            max_tokens: for senders who name none; the API wants one.
            drops: fields of a request that the endpoint refuses, and that are left out for it.
            headers: to send with each call; no keys here.
            proxy: URL of an HTTP proxy; None connects directly.
        """

        base_url: str = "https://api.anthropic.com"
        key_env: str | None = "ANTHROPIC_API_KEY"
        key_file: str | None = None
        version: str = "2023-06-01"
        max_tokens: int = Field(default=4096, ge=1)
        drops: tuple[str, ...] = ()
        headers: dict[str, str] = Field(default_factory=dict)
        proxy: str | None = None

        def __post_init__(self) -> None:
            check_url("base_url", self.base_url)
            check_drops(self.drops)
            if self.proxy is not None:
                check_url("proxy", self.proxy)
            for name, value in self.headers.items():
                check_header(name, value)

    endpoints = ("chat",)
    caches_unasked = False
    holds_tool_calls = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.stops_when_closed = self.stops_when_closed and not makes_on(config.base_url)
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
        config, native = self.config, request.native_in("messages")
        headers = {**self._headers, **request.headers} if request.headers else self._headers
        try:
            if native is None:
                body = translated(request.body, config.model, config.max_tokens)
            else:
                body = adapted(native.body, config.model, request.stream)
                headers = {**headers, **native.headers}
            body = {name: value for name, value in body.items() if name not in config.drops}
        except _MISSHAPEN as error:
            message = f"messages or tools are not in the form of OpenAI's API ({type(error).__name__}: {error})"
            raise UpstreamError(Failure(kind="request", message=message, status=400)) from None
        return HttpCall(self._url, headers, request.dumped(body), config.proxy)

    def parse(self, request: UpstreamRequest, body: bytes) -> Answer:
        """A message as a chat completion. Raises UpstreamError (``garbage``)."""
        try:
            return self._parsed(request, parse_object(body), body)
        except _MISSHAPEN:
            raise garbage("an answer that is no message", body) from None

    def _parsed(self, request: UpstreamRequest, value: Json, body: bytes) -> Answer:
        if value.get("type") == "error":
            raise UpstreamError(self._of_event(value))
        if not isinstance(value.get("content"), list):
            raise garbage("an answer without 'content'", body)
        usage = _usage(value.get("usage"))
        is_json = self._forces_json(request)
        message, reason = _message(value["content"], is_json), _finish(value.get("stop_reason"))
        choice = {
            "index": 0,
            "message": message,
            "finish_reason": "stop" if is_json and reason == "tool_calls" else reason,
        }
        native = {} if request.native_in("messages") is None else {"anthropic": value}
        return Answer(
            {**_head(value, "chat.completion"), "choices": [choice], "usage": usage.to_openai(), **native},
            None,
            usage,
        )

    def translator(self, request: UpstreamRequest) -> "MessageStream":
        """What reads its events."""
        return MessageStream(self, self._forces_json(request), request.native_in("messages") is not None)

    def _forces_json(self, request: UpstreamRequest) -> bool:
        return request.native_in("messages") is None and forces_json(request.body, self.config.model)

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


# Answers


def _head(message: Json, kind: str) -> Json:
    return {
        "id": message.get("id") or "",
        "object": kind,
        "created": int(time.time()),
        "model": message.get("model") or "",
    }


def _message(content: list[Json], is_json: bool = False) -> Json:
    """A message of OpenAI's form; ``is_json`` where the answer is the input of `ANSWER_TOOL`."""
    text, order = "".join(block.get("text", "") for block in content if block.get("type") == "text"), SaidOrder()
    thoughts = [block for block in content if block.get("type") in ("thinking", "redacted_thinking")]
    calls: list[Json] = []
    for block in content:
        if block.get("type") == "text" and not is_json:
            order.add_text(block.get("text", ""))
        if block.get("type") != "tool_use":
            continue
        arguments = json.dumps(block.get("input") or {})
        if is_json and block["name"] == ANSWER_TOOL:
            # What is said beside it is no JSON.
            text = arguments
            order.add_text(text)
        else:
            function = {"name": block["name"], "arguments": arguments}
            order.add_call(len(calls))
            calls.append({"id": block["id"], "type": "function", "function": function})
    message: Json = {"role": "assistant", "content": text if text or not calls else None}
    if others := [{"index": at, **block} for at, block in enumerate(filter(_is_other, content))]:
        message["extra_content"] = {"anthropic": {"blocks": others}}
    if thought := "".join(block.get("thinking", "") for block in thoughts):
        message["reasoning_content"] = thought
    if any(block.get("signature") or block.get("data") for block in thoughts):
        message["thinking_blocks"] = thoughts
    if calls:
        message["tool_calls"] = calls
    order.put_into(message)
    return message


def _is_other(block: Json) -> bool:
    """It says more than a chat has words for."""
    return block.get("type") not in _IN_CHAT or bool(block.get("citations"))


def _finish(reason: Any) -> str:
    return FINISH.get(reason, "stop")


def _usage(given: Any) -> Usage:
    """Anthropic counts cached tokens beside the others, OpenAI among them."""
    if not isinstance(given, dict):
        return Usage(is_estimated=True)
    given = merged(given, _of_iterations(given.get("iterations")))
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


def merged(told: Json, more: Json) -> Json:
    """A ``usage`` and what was said later: of each count the larger, since nothing that was billed is taken back; nothing for null."""
    found = dict(told)
    for name, value in more.items():
        old = found.get(name)
        if isinstance(old, dict) and isinstance(value, dict):
            found[name] = merged(old, value)
        elif type(old) is int and type(value) is int:
            found[name] = max(old, value)
        elif value is not None:
            found[name] = value
    return found


def _of_iterations(given: Any) -> Json:
    """The sum of what each step says: compaction, which is billed, is among the steps alone."""
    steps = [one for one in given if isinstance(one, dict)] if isinstance(given, list) else []
    tables = [one["cache_creation"] for one in steps if isinstance(one.get("cache_creation"), dict)]
    found: Json = _sums(steps, _COUNTS)
    if tables:
        found["cache_creation"] = _sums(tables, _TTLS)
    return found


def _sums(tables: list[Json], names: tuple[str, ...]) -> Json:
    counts = {name: [one[name] for one in tables if type(one.get(name)) is int and one[name] >= 0] for name in names}
    return {name: sum(found) for name, found in counts.items() if found}


_COUNTS = ("input_tokens", "output_tokens", "cache_read_input_tokens", "cache_creation_input_tokens")
_TTLS = ("ephemeral_5m_input_tokens", "ephemeral_1h_input_tokens")


class MessageStream:
    """Turns the events of one message into chunks.

    Attributes:
        is_done: ``message_stop`` has come.

    Args:
        provider: whose stream it is.
        is_json: the answer is the input of `ANSWER_TOOL`.
        keeps_events: each event goes along with the chunk that is made of it.
    """

    def __init__(self, provider: Anthropic, is_json: bool = False, keeps_events: bool = False) -> None:
        self._provider, self._head = provider, _head({}, "chat.completion.chunk")
        self._is_json, self._keeps_events = is_json, keeps_events
        self._given: Json = {}
        # Index of a block -> index of its tool call; of those whose arguments have not come, what they were said to be at first.
        self._calls: dict[int, int] = {}
        self._empty: dict[int, Json] = {}
        # Index of a block -> what was thought in it so far.
        self._thoughts: dict[int, Json] = {}
        self._answers: set[int] = set()
        # Index of a block that is no thought and no call -> what has come of it; and how many were told whole.
        self._blocks: dict[int, Json] = {}
        self._arguments: dict[int, str] = {}
        self._others = self._num_thoughts = 0
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
            made: list[Json] = getattr(self, f"_{kind}")(value) if kind in EVENTS else []
        except _MISSHAPEN:
            raise garbage("an event that is none of a message", data) from None
        if self._keeps_events:
            made = made or [{**self._head, "choices": []}]
            made[0]["anthropic"] = value
        return made

    def _chunk(self, delta: Json, finish_reason: str | None = None) -> list[Json]:
        return [{**self._head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}]

    def _call(self, at: int, arguments: str, **more: Any) -> list[Json]:
        function = {**more.pop("function", {}), "arguments": arguments}
        return self._chunk({"tool_calls": [{"index": at, **more, "function": function}]})

    def _message_start(self, value: Json) -> list[Json]:
        message = value.get("message") or {}
        self._head, self._given = _head(message, "chat.completion.chunk"), dict(message.get("usage") or {})
        return self._chunk({"role": "assistant", "content": ""})

    def _content_block_start(self, value: Json) -> list[Json]:
        block = value.get("content_block") or {}
        kind = block.get("type")
        if kind == "tool_use":
            number = value["index"]
            if self._is_json and block["name"] == ANSWER_TOOL:
                self._answers.add(number)
                return []
            at = self._calls[number] = len(self._calls)
            self._empty[number] = block.get("input") or {}
            return self._call(at, "", id=block["id"], type="function", function={"name": block["name"]})
        if kind == "thinking":
            self._thoughts[value["index"]] = {"type": "thinking", "thinking": "", "signature": "", **block}
        elif kind == "redacted_thinking":
            return self._thought(block)
        else:
            self._blocks[value.get("index", 0)] = dict(block)
        return self._said(block["text"]) if block.get("text") else []

    def _said(self, text: str) -> list[Json]:
        # Beside the JSON there is nothing to say.
        return [] if self._is_json else self._chunk({"content": text})

    def _content_block_delta(self, value: Json) -> list[Json]:
        delta = value.get("delta") or {}
        kind = delta.get("type")
        number = value.get("index", 0)
        if number in self._blocks:
            grown(self._blocks[number], delta, number, self._arguments)
        if kind == "text_delta":
            return self._said(delta["text"])
        if kind == "thinking_delta":
            if value["index"] in self._thoughts:
                self._thoughts[value["index"]]["thinking"] += delta["thinking"]
            return self._chunk({"reasoning_content": delta["thinking"]})
        if kind == "signature_delta" and value["index"] in self._thoughts:
            self._thoughts[value["index"]]["signature"] += delta["signature"]
        if kind == "input_json_delta" and delta.get("partial_json"):
            if value["index"] in self._answers:
                return self._chunk({"content": delta["partial_json"]})
            if value["index"] not in self._calls:
                # Of a tool that runs at Anthropic: nothing for the sender to call.
                return []
            self._empty.pop(value["index"], None)
            return self._call(self._calls[value["index"]], delta["partial_json"])
        return []

    def _content_block_stop(self, value: Json) -> list[Json]:
        number = value["index"]
        thought, given = self._thoughts.pop(number, None), self._empty.pop(number, None)
        if given is not None:
            # A call without arguments has some all the same: no other form of them can be read.
            return self._call(self._calls[number], json.dumps(given))
        if thought is not None:
            return self._thought(thought) if thought["signature"] else []
        return self._other(number)

    def _thought(self, block: Json) -> list[Json]:
        # Clients put lists together by the index.
        at, self._num_thoughts = self._num_thoughts, self._num_thoughts + 1
        return self._chunk({"thinking_blocks": [{"index": at, **block}]})

    def _other(self, number: int) -> list[Json]:
        block, given = self._blocks.pop(number, None), self._arguments.pop(number, None)
        if block is None or not _is_other(block):
            return []
        if given is not None:
            block["input"] = _read(given)
        at, self._others = self._others, self._others + 1
        return self._chunk({"extra_content": {"anthropic": {"blocks": [{"index": at, **block}]}}})

    def _message_delta(self, value: Json) -> list[Json]:
        self._given = merged(self._given, value.get("usage") or {})
        reason = _finish((value.get("delta") or {}).get("stop_reason"))
        if self._answers and reason == "tool_calls":
            reason = "stop"
        usage = {**self._head, "choices": [], "usage": _usage(self._given).to_openai()}
        return [*self._chunk({}, reason), usage]

    def _message_stop(self, value: Json) -> list[Json]:
        self.is_done = True
        return []


def _read(text: str) -> Any:
    """Arguments of a call that is only shown: what cannot be read is shown as it came."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


EVENTS = (
    "message_start",
    "content_block_start",
    "content_block_delta",
    "content_block_stop",
    "message_delta",
    "message_stop",
)
