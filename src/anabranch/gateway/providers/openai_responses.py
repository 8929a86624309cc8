"""OpenAI's Responses API as an upstream: for a request that came in its form, sent as it came, and its answer beside what chat makes of it.

Models of OpenAI that reason give more there than in chats: thoughts that are sealed and come back, summaries of them, and tools
while they reason.
"""

import json
import time
from typing import Any

from anabranch.gateway.providers.provider import (
    Answer,
    Json,
    Native,
    UpstreamError,
    UpstreamRequest,
    Usage,
    estimated,
    garbage,
    parse_object,
)
from anabranch.gateway.providers.vocabulary import status_said
from anabranch.web.said_order import SaidOrder

PATH = "/responses"
_MISSHAPEN = (KeyError, TypeError, AttributeError, ValueError)
_TEXTS = {
    "response.output_text.delta": "content",
    "response.refusal.delta": "refusal",
    "response.reasoning_summary_text.delta": "reasoning_content",
    "response.reasoning_text.delta": "reasoning_content",
}


def body_of(native: Native, request: UpstreamRequest, model: str) -> Json:
    """What is sent: the sender's body under the upstream's name of the model, with the end that was set for it."""
    made = {name: value for name, value in native.body.items() if name not in ("model", "stream")} | {"model": model}
    most = request.body.get("max_completion_tokens") or request.body.get("max_tokens")
    if most:
        made["max_output_tokens"] = most
    if request.stream:
        made["stream"] = True
    return made


def parse(provider: Any, request: UpstreamRequest, body: bytes) -> Answer:
    """A response as a chat completion, with itself beside it (``responses``). Raises UpstreamError."""
    value = parse_object(body)
    _check_error(provider, value)
    if not isinstance(value.get("output"), list):
        raise garbage("an answer without 'output'", body)
    try:
        choice = {"index": 0, "message": _message(value["output"]), "finish_reason": _finish(value)}
        made = {**_head(value, "chat.completion"), "choices": [choice], "responses": value}
        usage = Usage.of({"usage": _usage(value.get("usage"))})
    except _MISSHAPEN:
        raise garbage("an answer that is no response", body) from None
    usage = usage or estimated(request, made)
    return Answer({**made, "usage": _usage(value.get("usage")) or usage.to_openai()}, None, usage)


def _check_error(provider: Any, value: Json) -> None:
    error = value.get("error")
    if value.get("status") == "failed" or isinstance(error, dict):
        told = {"error": error if isinstance(error, dict) else {"message": "the response failed"}}
        raise UpstreamError(provider.error(status_said(told), {}, json.dumps(told).encode()))


def _head(value: Json, kind: str) -> Json:
    created = value.get("created_at")
    return {
        "id": value.get("id") or "",
        "object": kind,
        "created": int(created) if isinstance(created, int | float) else int(time.time()),
        "model": value.get("model") or "",
    }


def _message(output: list[Json]) -> Json:
    texts: dict[str, str] = {"content": "", "refusal": "", "reasoning_content": ""}
    calls: list[Json] = []
    order = SaidOrder()
    for item in output:
        if item["type"] == "message":
            for part in item["content"]:
                order.add_text(part.get("text") or "")
                texts["content"] += part.get("text") or ""
                texts["refusal"] += part.get("refusal") or ""
        elif item["type"] == "reasoning":
            for part in [*(item.get("summary") or ()), *(item.get("content") or ())]:
                texts["reasoning_content"] += part.get("text") or ""
        elif item["type"] == "function_call":
            function = {"name": item["name"], "arguments": item.get("arguments") or "{}"}
            order.add_call(len(calls))
            calls.append({"id": item["call_id"], "type": "function", "function": function})
    message: Json = {"role": "assistant", "content": texts.pop("content") or (None if calls else "")}
    message |= {name: text for name, text in texts.items() if text}
    if calls:
        message["tool_calls"] = calls
        order.put_into(message)
    return message


def _finish(value: Json) -> str:
    reason = (value.get("incomplete_details") or {}).get("reason")
    if reason is not None:
        return "content_filter" if reason == "content_filter" else "length"
    has_calls = any(item.get("type") == "function_call" for item in value.get("output") or ())
    return "tool_calls" if has_calls else "stop"


def _usage(told: Any) -> Json | None:
    """In the words of chats."""
    if not isinstance(told, dict):
        return None
    prompt, completion = told.get("input_tokens"), told.get("output_tokens")
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": told.get("total_tokens"),
        "prompt_tokens_details": told.get("input_tokens_details") or {},
        "completion_tokens_details": told.get("output_tokens_details") or {},
    }


class ResponseEvents:
    """Turns the events of one response into chunks, each event beside the first chunk of it.

    Attributes:
        is_done: the response has ended.
    """

    def __init__(self, provider: Any) -> None:
        self._provider, self._head = provider, _head({}, "chat.completion.chunk")
        # Place of an item -> index of its tool call.
        self._calls: dict[Any, int] = {}
        self.is_done = False

    def feed(self, data: bytes) -> list[Json]:
        """The chunks of one event. Raises UpstreamError if it reports an error or cannot be read."""
        value = parse_object(data)
        kind = str(value.get("type"))
        if kind == "error":
            _check_error(self._provider, {"error": value.get("error") or value})
        try:
            made = self._chunks(kind, value)
        except _MISSHAPEN:
            raise garbage("an event that is none of a response", data) from None
        made = made or [{**self._head, "choices": []}]
        made[0]["responses"] = value
        return made

    def _chunks(self, kind: str, value: Json) -> list[Json]:
        if kind == "response.created":
            self._head = _head(value["response"], "chat.completion.chunk")
            return self._chunk({"role": "assistant", "content": ""})
        if kind in _TEXTS:
            return self._chunk({_TEXTS[kind]: value["delta"]})
        if kind == "response.output_item.added" and value["item"]["type"] == "function_call":
            item, at = value["item"], len(self._calls)
            self._calls[value["output_index"]] = at
            function = {"name": item["name"], "arguments": item.get("arguments") or ""}
            return self._chunk(
                {"tool_calls": [{"index": at, "id": item["call_id"], "type": "function", "function": function}]}
            )
        if kind == "response.function_call_arguments.delta":
            call = {"index": self._calls[value["output_index"]], "function": {"arguments": value["delta"]}}
            return self._chunk({"tool_calls": [call]})
        if kind in ("response.completed", "response.incomplete", "response.failed"):
            return self._ended(value["response"])
        return []

    def _ended(self, response: Json) -> list[Json]:
        _check_error(self._provider, response)
        self.is_done = True
        usage = _usage(response.get("usage"))
        told = [] if usage is None else [{**self._head, "choices": [], "usage": usage}]
        return [*self._chunk({}, _finish(response)), *told]

    def _chunk(self, delta: Json, finish_reason: str | None = None) -> list[Json]:
        return [{**self._head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}]
