"""Answers and streams of Amazon Bedrock's Converse API, in OpenAI's form; requests see `converse`.

| a block | is |
|---|---|
| text, also of an answer that names its sources | ``content`` |
| reasoning | ``reasoning_content``; with its signature one of ``thinking_blocks`` |
| a call of a tool | one of ``tool_calls`` |
| a picture | one of ``images`` |
| anything else (sources, tools that run at Amazon and what they found) | as it came, one of ``extra_content.bedrock.blocks`` |
"""

import json
from typing import Any

from anabranch.gateway.providers.anthropic_request import ANSWER_TOOL
from anabranch.gateway.providers.converse import ERRORS
from anabranch.gateway.providers.provider import Answer, Json, UpstreamError, Usage
from anabranch.gateway.providers.translation import ForeignStream, completion, count, head, message_of, tool_call

# Of a call of a tool that runs at Amazon: nothing for the sender to call.
THEIRS = "server_tool_use"
FINISH = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "tool_use": "tool_calls",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
}
WITHHELD = "content_filter"


def answer(value: Json, model: str, is_json: bool = False) -> Answer:
    """A whole one. Raises what reading a value of another shape raises.

    Args:
        value: as it came.
        model: what it is called there.
        is_json: the answer is the input of `ANSWER_TOOL`.
    """
    blocks = Blocks(is_json)
    made = message_of(
        [piece for at, block in enumerate(value["output"]["message"]["content"]) for piece in blocks.whole(at, block)]
    )
    reason = finish_of(value["stopReason"], blocks.has_answered)
    choice = {"index": 0, "message": made, "finish_reason": reason}
    return completion(head(None, model, "chat.completion"), [choice], usage_of(value["usage"]))


class Blocks:
    """The blocks of one message, each as pieces of one of chat, whole or as they come.

    Attributes:
        has_answered: the answer came as a call of `ANSWER_TOOL`, and is its text.

    Args:
        is_json: it may.
    """

    def __init__(self, is_json: bool) -> None:
        self._is_json = is_json
        self.has_answered = False
        # Of each block that is open, what has come of it, as it would be whole.
        self._open: dict[int, Json] = {}
        # Which call a block is; of those whose arguments have not come; and of which the input is the answer.
        self._places: dict[int, int] = {}
        self._empty: set[int] = set()
        self._answers: set[int] = set()
        # How many thoughts, pictures and others have been told: clients put lists together by the index.
        self._counts = {"thinking_blocks": 0, "images": 0, "blocks": 0}

    def whole(self, at: int, block: Json) -> list[Json]:
        """Of a block that came at once."""
        if "toolUse" in block:
            use = block["toolUse"]
            given = json.dumps({} if (told := use.get("input")) is None else told, separators=(",", ":"))
            begun = self.begun(at, {"toolUse": {name: value for name, value in use.items() if name != "input"}})
            return [*begun, *self.continued(at, {"toolUse": {"input": given}}), *self.ended(at)]
        if "reasoningContent" in block:
            given = block["reasoningContent"]
            parts = given["reasoningText"] if "reasoningText" in given else given
            pieces = [
                piece
                for name in ("text", "signature", "redactedContent")
                if name in parts
                for piece in self.continued(at, {"reasoningContent": {name: parts[name]}})
            ]
            return [*pieces, *self.ended(at)]
        if "citationsContent" in block:
            given = block["citationsContent"]
            deltas = [{"text": one["text"]} for one in given.get("content") or ()]
            deltas += [{"citation": one} for one in given.get("citations") or ()]
            return [*(piece for one in deltas for piece in self.continued(at, one)), *self.ended(at)]
        if "text" in block:
            return [*self.continued(at, {"text": block["text"]}), *self.ended(at)]
        if "image" in block:
            return self._image(block["image"])
        return self._other(block)

    def begun(self, at: int, start: Json) -> list[Json]:
        """Of a block that begins."""
        if "toolUse" not in start:
            self._open[at] = {name: dict(value) for name, value in start.items()}
            return []
        use = start["toolUse"]
        if use.get("type") == THEIRS:
            self._open[at] = {"toolUse": {**use, "input": ""}}
            return []
        if self._is_json and use["name"] == ANSWER_TOOL:
            self._answers.add(at)
            self.has_answered = True
            return []
        self._places[at] = len(self._places)
        self._empty.add(at)
        return [{"tool_calls": [{"index": self._places[at], **tool_call(use["name"], "", use["toolUseId"])}]}]

    def continued(self, at: int, delta: Json) -> list[Json]:
        """Of a block that goes on."""
        if "text" in delta:
            if not isinstance(delta["text"], str):
                raise TypeError("a text that is none")
            block = self._open.setdefault(at, {"citationsContent": {"content": [], "citations": []}})
            block["citationsContent"]["content"].append({"text": delta["text"]})
            # Beside the JSON there is nothing to say.
            return [{"content": delta["text"]}] if delta["text"] and not self._is_json else []
        if "citation" in delta:
            block = self._open.setdefault(at, {"citationsContent": {"content": [], "citations": []}})
            block["citationsContent"]["citations"].append(delta["citation"])
            return []
        if "toolUse" in delta:
            return self._argued(at, delta["toolUse"]["input"])
        if "reasoningContent" in delta:
            return self._thought(at, delta["reasoningContent"])
        if "toolResult" in delta:
            self._open.setdefault(at, {"toolResult": {}})["toolResult"].setdefault("content", []).extend(
                delta["toolResult"]
            )
            return []
        if "image" in delta:
            self._open.setdefault(at, {"image": {}})["image"] |= delta["image"]
            return []
        return self._other(delta)

    def _argued(self, at: int, text: str) -> list[Json]:
        if not isinstance(text, str):
            raise TypeError("arguments that are no text")
        if at in self._answers:
            return [{"content": text}] if text else []
        if at in self._open:
            self._open[at]["toolUse"]["input"] += text
            return []
        if text:
            self._empty.discard(at)
        return [{"tool_calls": [{"index": self._places[at], "function": {"arguments": text}}]}]

    def _thought(self, at: int, delta: Json) -> list[Json]:
        if "redactedContent" in delta:
            kept = self._open.setdefault(at, {"type": "redacted_thinking", "data": ""})
            kept["data"] += delta["redactedContent"]
            return []
        kept = self._open.setdefault(at, {"type": "thinking", "thinking": ""})
        if delta.get("signature"):
            kept["signature"] = kept.get("signature", "") + delta["signature"]
        if not delta.get("text"):
            return []
        kept["thinking"] += delta["text"]
        return [{"reasoning_content": delta["text"]}]

    def settled(self) -> list[Json]:
        """Of those whose end nobody said."""
        return [piece for at in sorted({*self._open, *self._empty}) for piece in self.ended(at)]

    def ended(self, at: int) -> list[Json]:
        """Of a block that is at its end."""
        block = self._open.pop(at, None)
        if at in self._empty:
            # A call without arguments has some all the same: no other form of them can be read.
            self._empty.discard(at)
            return [{"tool_calls": [{"index": self._places[at], "function": {"arguments": "{}"}}]}]
        if block is None:
            return []
        if "type" in block:
            return [{"thinking_blocks": [{"index": self._next("thinking_blocks"), **block}]}]
        if "citationsContent" in block:
            return self._other(block) if block["citationsContent"]["citations"] else []
        if "toolUse" in block:
            use = block["toolUse"]
            return self._other({"toolUse": {**use, "input": _read(use["input"])}})
        return self._image(block["image"]) if "image" in block else self._other(block)

    def _image(self, image: Json) -> list[Json]:
        data = (image.get("source") or {}).get("bytes")
        if not isinstance(data, str):
            return self._other({"image": image})
        url = f"data:image/{image.get('format') or 'png'};base64,{data}"
        return [{"images": [{"index": self._next("images"), "type": "image_url", "image_url": {"url": url}}]}]

    def _other(self, block: Json) -> list[Json]:
        if not block:
            return []
        return [{"extra_content": {"bedrock": {"blocks": [{"index": self._next("blocks"), **block}]}}}]

    def _next(self, name: str) -> int:
        self._counts[name] += 1
        return self._counts[name] - 1


def _read(text: str) -> Any:
    """Of a call that is only shown: what cannot be read is shown as it came."""
    try:
        return json.loads(text or "{}")
    except (ValueError, RecursionError):
        return text


def usage_of(given: Json) -> Usage:
    """Bedrock counts cached tokens beside the others, OpenAI among them."""
    cached, written = count(given.get("cacheReadInputTokens")), count(given.get("cacheWriteInputTokens"))
    prompt = count(given["inputTokens"]) + written + cached
    details = given.get("cacheDetails")
    for_hour = min(sum(count(one.get("inputTokens")) for one in details or () if one.get("ttl") == "1h"), written)
    return Usage(
        prompt,
        count(given["outputTokens"]),
        cached,
        cache_write=written - for_hour,
        cache_write_1h=for_hour,
        tells_ttl=bool(details),
    )


def finish_of(reason: Any, has_answered: bool = False) -> str:
    """OpenAI's word for why an answer ended; what is not known here was held back, or came to nothing."""
    found = FINISH.get(reason, WITHHELD)
    return "stop" if has_answered and found == "tool_calls" else found


class ConverseStream(ForeignStream):
    """Turns the events of one answer into chunks. The usage comes after the end."""

    def __init__(self, provider: Any, is_json: bool = False) -> None:
        super().__init__(provider)
        self._blocks = Blocks(is_json)

    def _chunks(self, value: Json) -> list[Json]:
        if "exception" in value:
            raise self._exception(value["exception"])
        [(name, given)] = value.items()
        blocks = self._blocks
        if name == "messageStart":
            return [self._chunk({"content": ""})]
        if name == "messageStop":
            chunks = [self._chunk(piece) for piece in blocks.settled()]
            return [*chunks, self._chunk({}, finish_of(given["stopReason"], blocks.has_answered))]
        if name == "metadata":
            self.is_done = True
            return [self._used(usage_of(given["usage"]))]
        if name == "contentBlockStart":
            pieces = blocks.begun(given["contentBlockIndex"], given["start"])
        elif name == "contentBlockDelta":
            pieces = blocks.continued(given["contentBlockIndex"], given["delta"])
        elif name == "contentBlockStop":
            pieces = blocks.ended(given["contentBlockIndex"])
        else:
            pieces = []
        return [self._chunk(piece) for piece in pieces]

    def _exception(self, given: Json) -> UpstreamError:
        name = str(given.get("type"))
        known = ERRORS.get(name[:1].upper() + name[1:])
        return self._failed(
            {"__type": name, "message": given.get("message") or name}, 500 if known is None else known[1]
        )
