"""The chunks of a chat stream as the events of a streamed message."""

import uuid
from collections.abc import Iterator
from typing import Any

from anabranch.web.messages.answer import head, stop_reason, usage_of
from anabranch.web.messages.errors import error_event
from anabranch.web.sse import event

Json = dict[str, Any]


class MessageEvents:
    """Make events: `add` each chunk, then `end` or `fail`.

    Chunks of Anthropic's own models hold their events as they came (``anthropic``), which are passed on; all others' are made. A stream may
    go over from the former to the latter, where another model goes on.
    """

    def __init__(self, body: Json) -> None:
        self._body = body
        # Index of the next block, and what the last is as long as it is open: thinking, text or tool_use.
        self._next = 0
        self._open: str | None = None
        self._call: int | None = None
        self._calls: set[int] = set()
        self._base = 0
        self._has_begun = self._has_ended = False
        self._reason: Any = None
        self._usage: Json | None = None

    def add(self, chunk: Json) -> Iterator[bytes]:
        """The events of one chunk. Raises ValueError for one that makes no message."""
        self._usage = chunk.get("usage") or self._usage
        native = chunk.get("anthropic")
        if isinstance(native, dict):
            yield from self._passed(native)
            return
        if self._has_ended:
            return
        yield from self._begun(chunk)
        for choice in (chunk.get("choices") or ())[:1]:
            self._reason = choice.get("finish_reason") or self._reason
            yield from self._delta(choice.get("delta") or {})

    def end(self) -> Iterator[bytes]:
        """After the last chunk."""
        if self._has_ended:
            return
        yield from self._begun({})
        yield from self._closed()
        delta = {"stop_reason": stop_reason(self._reason, bool(self._calls)), "stop_sequence": None}
        yield _event("message_delta", delta=delta, usage=usage_of(self._usage))
        yield _event("message_stop")

    def fail(self, message: str, code: str | None) -> Iterator[bytes]:
        """Instead of the end."""
        yield event(error_event(message, code), "error")

    # As they came

    def _passed(self, native: Json) -> Iterator[bytes]:
        kind, index = native.get("type"), native.get("index")
        if kind == "message_start" and self._has_begun:
            # Another message goes on with this one.
            yield from self._closed()
            self._base = self._next
            return
        self._has_begun = True
        if isinstance(index, int):
            native = {**native, "index": index + self._base}
            self._next = max(self._next, index + self._base + 1)
            self._open = None if kind == "content_block_stop" else "native"
        self._has_ended = self._has_ended or kind == "message_stop"
        yield event(native, str(kind))

    # Made

    def _begun(self, chunk: Json) -> Iterator[bytes]:
        if not self._has_begun:
            self._has_begun = True
            message = head(chunk.get("id"), chunk.get("model") or self._body.get("model"))
            yield _event("message_start", message={**message, "usage": usage_of(self._usage)})

    def _delta(self, delta: Json) -> Iterator[bytes]:
        thought = delta.get("reasoning_content") or delta.get("reasoning")
        blocks = delta.get("thinking_blocks") or ()
        if thought and thought == "".join(block.get("thinking") or "" for block in blocks):
            # Of a whole answer: its blocks say the same once more, each with its own seal.
            yield from self._closed()
        elif thought:
            yield from self._opened("thinking", {"thinking": "", "signature": ""})
            yield self._said({"type": "thinking_delta", "thinking": thought})
        for block in blocks:
            yield from self._thought(block)
        for text in (delta.get("content"), delta.get("refusal")):
            if text:
                yield from self._opened("text", {"text": ""})
                yield self._said({"type": "text_delta", "text": text})
        for call in delta.get("tool_calls") or ():
            yield from self._add_call(call)

    def _thought(self, block: Json) -> Iterator[bytes]:
        """What seals a thought, or is sealed whole."""
        if block.get("type") == "redacted_thinking":
            yield from self._closed()
            yield from self._opened("redacted_thinking", {"data": block.get("data")})
        else:
            if self._open != "thinking":
                yield from self._opened("thinking", {"thinking": "", "signature": ""})
                if block.get("thinking"):
                    yield self._said({"type": "thinking_delta", "thinking": block["thinking"]})
            if block.get("signature"):
                yield self._said({"type": "signature_delta", "signature": block["signature"]})
        yield from self._closed()

    def _add_call(self, call: Json) -> Iterator[bytes]:
        number, function = call.get("index", 0), call.get("function") or {}
        if number not in self._calls:
            self._calls.add(number)
            yield from self._closed()
            id = call.get("id") or f"toolu_{uuid.uuid4().hex}"
            yield from self._opened("tool_use", {"id": id, "name": function.get("name") or "", "input": {}})
            self._call = number
        text = function.get("arguments")
        if text:
            if self._open != "tool_use" or self._call != number:
                raise ValueError("a call goes on after the next has begun")
            yield self._said({"type": "input_json_delta", "partial_json": text})

    def _opened(self, kind: str, fields: Json) -> Iterator[bytes]:
        if self._open == kind and kind != "tool_use":
            return
        yield from self._closed()
        self._open = kind
        yield _event("content_block_start", index=self._next, content_block={"type": kind, **fields})
        self._next += 1

    def _closed(self) -> Iterator[bytes]:
        if self._open is not None:
            self._open = None
            yield _event("content_block_stop", index=self._next - 1)

    def _said(self, delta: Json) -> bytes:
        return _event("content_block_delta", index=self._next - 1, delta=delta)


def _event(kind: str, **fields: Any) -> bytes:
    return event({"type": kind, **fields}, kind)
