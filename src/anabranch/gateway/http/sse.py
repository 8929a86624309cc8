"""A whole answer as if it had been streamed, and the whole answer of a stream."""

from collections.abc import Iterator
from typing import Any

from anabranch.web.sse import DONE, event

# What every chunk repeats.
HEAD = ("id", "created", "model", "system_fingerprint")


def chunks_of(answer: dict[str, Any], *, is_chat: bool, with_usage: bool) -> Iterator[bytes]:
    """A whole answer of ``/v1/chat/completions`` or ``/v1/completions`` as the events of a stream, ``[DONE]`` among them."""
    head: dict[str, Any] = {name: answer[name] for name in HEAD if name in answer}
    head["object"] = "chat.completion.chunk" if is_chat else "text_completion"
    for choice in answer.get("choices", ()):
        at, reason = choice.get("index", 0), choice.get("finish_reason")
        if not is_chat:
            yield event({**head, "choices": [{**choice}]})
            continue
        delta = {name: value for name, value in choice.get("message", {}).items() if value is not None}
        if "tool_calls" in delta:
            delta["tool_calls"] = [{"index": number, **call} for number, call in enumerate(delta["tool_calls"])]
        logprobs = {"logprobs": choice["logprobs"]} if choice.get("logprobs") else {}
        yield event({**head, "choices": [{"index": at, "delta": delta, **logprobs, "finish_reason": None}]})
        yield event({**head, "choices": [{"index": at, "delta": {}, "finish_reason": reason}]})
    if with_usage:
        yield event({**head, "choices": [], "usage": answer.get("usage")})
    yield DONE


class Assembler:
    """Makes one whole answer of the chunks of a stream.

    Attributes:
        is_whole: every choice has said why it ended.
    """

    def __init__(self, *, is_chat: bool) -> None:
        self._is_chat = is_chat
        self._head: dict[str, Any] = {}
        self._choices: dict[int, dict[str, Any]] = {}
        self._usage: dict[str, Any] | None = None

    def add(self, chunk: dict[str, Any]) -> None:
        """Take one chunk."""
        for name in HEAD:
            if name in chunk:
                self._head.setdefault(name, chunk[name])
        self._usage = chunk.get("usage") or self._usage
        for part in chunk.get("choices") or ():
            held = self._choices.setdefault(part.get("index", 0), {"text": [], "calls": {}, "rest": {}, "reason": None})
            held["reason"] = part.get("finish_reason") or held["reason"]
            self._extend_logprobs(held, part.get("logprobs"))
            if self._is_chat:
                _merge_delta(held, part.get("delta") or {})
            else:
                held["text"].append(part.get("text") or "")

    @property
    def is_whole(self) -> bool:  # noqa: D102
        return bool(self._choices) and all(held["reason"] for held in self._choices.values())

    def answer(self) -> dict[str, Any]:
        """What the call would have given had it not been streamed."""
        choices = []
        for at, held in sorted(self._choices.items()):
            text = "".join(held["text"])
            choice: dict[str, Any] = {"index": at, "finish_reason": held["reason"], "logprobs": held.get("logprobs")}
            if self._is_chat:
                calls = [held["calls"][number] for number in sorted(held["calls"])]
                message = {"role": "assistant", **held["rest"], "content": text if text or not calls else None}
                choice["message"] = {**message, "tool_calls": calls} if calls else message
            else:
                choice["text"] = text
            choices.append(choice)
        kind = "chat.completion" if self._is_chat else "text_completion"
        return {**self._head, "object": kind, "choices": choices, "usage": self._usage}

    @staticmethod
    def _extend_logprobs(held: dict[str, Any], logprobs: dict[str, Any] | None) -> None:
        if logprobs:
            kept = held.setdefault("logprobs", {})
            for name, values in logprobs.items():
                if isinstance(values, list):
                    kept[name] = [*kept.get(name, []), *values]


def _merge_delta(held: dict[str, Any], delta: dict[str, Any]) -> None:
    for name, value in delta.items():
        if name == "content":
            held["text"].append(value or "")
        elif name == "tool_calls":
            for call in value or ():
                _merge_call(held["calls"], call)
        elif isinstance(value, str) and name != "role":
            # Reasoning, refusal: texts that come in pieces.
            held["rest"][name] = held["rest"].get(name, "") + value
        elif value is not None:
            held["rest"][name] = value


def _merge_call(calls: dict[int, dict[str, Any]], part: dict[str, Any]) -> None:
    call = calls.setdefault(part.get("index", 0), {"type": "function", "function": {"name": "", "arguments": ""}})
    for name in ("id", "type"):
        if part.get(name):
            call[name] = part[name]
    for name in ("name", "arguments"):
        call["function"][name] += (part.get("function") or {}).get(name) or ""
