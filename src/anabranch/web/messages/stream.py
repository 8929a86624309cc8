"""The chunks of a chat stream as the events of a streamed message."""

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from anabranch.web.beside import beside, images_of, is_whole, joined
from anabranch.web.messages.answer import head, image_block, stop_reason, thoughts_of, usage_of
from anabranch.web.messages.errors import error_event
from anabranch.web.reasoning_details import details_in, joined_details, sealed_blocks
from anabranch.web.sse import event

Json = dict[str, Any]


@dataclass(slots=True)
class _Call:
    """A call of a tool, as far as it has come.

    Attributes:
        id, name: of the call.
        text: its arguments.
        state: ``waits`` for those before it, is ``open``, or ``told``.
    """

    id: str
    name: str
    text: str = ""
    state: str = "waits"


class MessageEvents:
    """Make events: `add` each chunk, then `end` or `fail`.

    Chunks of Anthropic's own models hold their events as they came (``anthropic``), which are passed on; all others' are made. A stream may
    go over from the former to the latter, where another model goes on.

    Blocks of a message come one after the other, while a chat may tell several calls at a time. The first of them is told as it comes; what
    comes while it is not at its end waits for it.
    """

    def __init__(self, body: Json) -> None:
        self._body = body
        # Index of the next block, and what the last is as long as it is open: thinking, text or tool_use.
        self._next = 0
        self._open: str | None = None
        self._call: _Call | None = None
        self._calls: dict[int, _Call] = {}
        # What waits for the open call: calls, and pieces of text.
        self._waiting: list[_Call | Json] = []
        self._beside: Json = {}
        # Pieces of what seals the thoughts that were told.
        self._details: list[Any] = []
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
        yield from self._sealed()
        yield from self._settled()
        yield from self._closed()
        delta: Json = {"stop_reason": stop_reason(self._reason, bool(self._calls)), "stop_sequence": None}
        if self._beside:
            delta["extra_content"] = self._beside
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
            yield from self._settled()
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
        self._beside = joined(self._beside, beside(delta))
        thought, said = ({name: delta[name] for name in names if delta.get(name)} for names in (_THOUGHT, _SAID))
        self._details += details_in(delta)
        if thought:
            yield from self._told(thought)
        if said or delta.get("tool_calls"):
            yield from self._sealed()
        if said:
            yield from self._told(said)
        for call in delta.get("tool_calls") or ():
            yield from self._add_call(call)

    def _sealed(self) -> Iterator[bytes]:
        """What seals the thoughts, once all of it has come."""
        if self._details:
            blocks = sealed_blocks(joined_details(self._details))
            self._details = []
            if blocks:
                yield from self._told({"thinking_blocks": blocks})

    def _told(self, said: Json) -> Iterator[bytes]:
        """Tell what is said, or have it wait for the end of a call."""
        if self._open == "tool_use":
            yield from self._freed()
        if self._open == "tool_use":
            self._waiting.append(said)
        else:
            yield from self._tell(said)

    def _tell(self, delta: Json) -> Iterator[bytes]:
        """Thoughts, text and pictures."""
        thought = delta.get("reasoning_content") or delta.get("reasoning")
        blocks = delta.get("thinking_blocks") or ()
        if thought and blocks:
            # A whole answer: its blocks say the same once more, each with its own seal.
            yield from self._closed()
            blocks = thoughts_of(delta)
        elif thought:
            yield from self._opened("thinking", {"thinking": "", "signature": ""})
            yield self._said({"type": "thinking_delta", "thinking": thought})
        for block in blocks:
            yield from self._thought(block)
        for text in (delta.get("content"), delta.get("refusal")):
            if text:
                yield from self._opened("text", {"text": ""})
                yield self._said({"type": "text_delta", "text": text})
        for kind, data in images_of(delta):
            block = image_block(kind, data)
            yield from self._closed()
            yield from self._opened(block.pop("type"), block)
            yield from self._closed()

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

    # Calls

    def _add_call(self, piece: Json) -> Iterator[bytes]:
        number, function = self._place(piece), piece.get("function") or {}
        call = self._calls.get(number)
        if call is None:
            id = piece.get("id") or f"toolu_{uuid.uuid4().hex}"
            call = self._calls[number] = _Call(id, function.get("name") or "")
            if self._open == "tool_use":
                yield from self._freed()
            if self._open == "tool_use":
                self._waiting.append(call)
            else:
                yield from self._begin(call)
        text = function.get("arguments")
        if not text:
            return
        if call.state == "told" and text.strip():
            raise ValueError("a call goes on behind its end")
        call.text += text
        if call.state == "open":
            yield self._said({"type": "input_json_delta", "partial_json": text})

    def _place(self, piece: Json) -> int:
        """Which call a piece is of; of a server that numbers none, each that is named is another."""
        number = piece.get("index")
        if isinstance(number, int):
            return number
        is_new = bool(piece.get("id") or (piece.get("function") or {}).get("name"))
        return len(self._calls) if is_new else len(self._calls) - 1

    def _begin(self, call: _Call) -> Iterator[bytes]:
        """Tell a call, with what has come of it."""
        yield from self._closed()
        yield from self._opened("tool_use", {"id": call.id, "name": call.name, "input": {}})
        self._call, call.state = call, "open"
        if call.text:
            yield self._said({"type": "input_json_delta", "partial_json": call.text})

    def _freed(self) -> Iterator[bytes]:
        """Tell what waits, up to the first call that is not at its end."""
        while self._call is not None and is_whole(self._call.text):
            yield from self._closed()
            while self._waiting and self._call is None:
                yield from self._next_waiting()

    def _settled(self) -> Iterator[bytes]:
        """Tell all that waits: nothing more comes of it."""
        while self._waiting:
            yield from self._next_waiting()

    def _next_waiting(self) -> Iterator[bytes]:
        first = self._waiting.pop(0)
        if isinstance(first, _Call):
            yield from self._begin(first)
        else:
            yield from self._tell(first)

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
            if self._call is not None:
                self._call.state, self._call = "told", None
            yield _event("content_block_stop", index=self._next - 1)

    def _said(self, delta: Json) -> bytes:
        return _event("content_block_delta", index=self._next - 1, delta=delta)


# What blocks other than calls are made of.
_THOUGHT = ("reasoning_content", "reasoning", "thinking_blocks")
_SAID = ("content", "refusal", "images")


def _event(kind: str, **fields: Any) -> bytes:
    return event({"type": kind, **fields}, kind)
