"""Chunks of a stream: what is in one, and those that are made of a whole answer."""

from collections.abc import Iterable
from typing import Any

from anabranch.gateway.providers.native_events import NATIVE, events_of
from anabranch.gateway.providers.provider import Json
from anabranch.web.responses.scores import logprobs_beside_texts
from anabranch.web.responses.thoughts import thought_in
from anabranch.web.said_order import OWN, said, without_order

# Most choices, or calls of tools, of an answer.
PLACES = 1024
TEXTS = ("content", "reasoning_content", "reasoning", "refusal")


def has_content(chunk: Json) -> bool:
    """Whether a chunk carries something of the answer: text, a tool call, or its end."""
    for choice in choices_of(chunk):
        if choice.get("text") or choice.get("finish_reason"):
            return True
        delta = choice.get("delta")
        if isinstance(delta, dict) and any(
            value for name, value in delta.items() if name not in ("role", "function_call")
        ):
            return True
    return False


def ended(chunk: Json) -> set[int]:
    """The choices that end with this chunk."""
    return {place_of(choice, 0) for choice in choices_of(chunk) if choice.get("finish_reason")}


def text_of(chunks: Iterable[Json]) -> str:
    """What the first choice says in them."""
    parts = []
    for chunk in chunks:
        for choice in choices_of(chunk):
            delta = choice.get("delta")
            text = delta.get("content") if isinstance(delta, dict) else choice.get("text")
            if choice.get("index", 0) == 0 and isinstance(text, str):
                parts.append(text)
    return "".join(parts)


def place_of(item: Json, default: int) -> int:
    """The index that a choice or a call says it has, if it is one."""
    at = item.get("index", default)
    return at if type(at) is int and 0 <= at < PLACES else min(default, PLACES - 1)


def as_chunks(body: Json, endpoint: str = "chat", with_usage: bool = False) -> list[Json]:
    """A whole answer as the chunks of a stream: for caches, and for upstreams that do not stream.

    What it holds in a form of its own goes along as the events of that form. Log probabilities, which a whole answer has of all its tokens
    together, stand beside its texts, each once.
    """
    head = {name: value for name, value in body.items() if name not in ("choices", "object", "usage", *NATIVE)}
    head["object"] = "chat.completion.chunk" if endpoint == "chat" else "text_completion"
    chunks = []
    for choice in choices_of(body):
        at = place_of(choice, 0)
        logprobs = choice.get("logprobs")
        if endpoint == "chat":
            given = choice.get("message")
            message = dict(given) if isinstance(given, dict) else {}
            calls = message.get("tool_calls")
            if not isinstance(calls, list):
                # Some write something empty for none.
                message.pop("tool_calls", None)
            else:
                message["tool_calls"] = [
                    {**call, "index": place} for place, call in enumerate(calls) if isinstance(call, dict)
                ]
            first, *others = [message] if any(name in body for name in NATIVE) else _in_order(message)
            deltas = [{"role": "assistant", **first}, *others]
            scores = _beside(deltas, message, logprobs)
            told = [
                {"index": at, "delta": delta, "logprobs": scored, "finish_reason": None}
                for delta, scored in zip(deltas, scores, strict=True)
            ]
            end: Json = {"index": at, "delta": {}, "finish_reason": choice.get("finish_reason") or "stop"}
        else:
            told = [{"index": at, "logprobs": logprobs, "text": string(choice.get("text")), "finish_reason": None}]
            end = {"index": at, "text": "", "finish_reason": choice.get("finish_reason") or "stop"}
        chunks += [{**head, "choices": [one]} for one in (*told, end)]
    for name in NATIVE:
        if len(chunks) == 2 and isinstance(body.get(name), dict):
            chunks = _with_events(chunks, name, events_of(name, body[name]), head)
    if with_usage and isinstance(body.get("usage"), dict):
        chunks.append({**head, "choices": [], "usage": body["usage"]})
    return chunks


def _in_order(message: Json) -> list[Json]:
    """The deltas of a message that says in which order its text and its calls came; one of any other."""
    extra = message.get("extra_content")
    if not isinstance(extra, dict) or OWN not in extra:
        return [message]
    left_out = ("content", "tool_calls", "extra_content")
    first = {name: value for name, value in message.items() if name not in left_out}
    if others := without_order(extra):
        first["extra_content"] = others
    pieces = said(message)
    first["content"] = pieces.pop(0)[1] if pieces and pieces[0][0] == "text" else None
    return [first, *({"content": one} if kind == "text" else {"tool_calls": [one]} for kind, one in pieces)]


def _beside(deltas: list[Json], message: Json, logprobs: Any) -> list[Any]:
    """The log probabilities that stand beside each delta: where none has a text, all beside the first."""
    texts = [at for at, delta in enumerate(deltas) if delta.get("content")]
    made: list[Any] = [None] * len(deltas)
    made[texts[0] if texts else 0] = logprobs
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    if len(texts) > 1 and isinstance(content, list):
        parts = logprobs_beside_texts(said(message), content, thoughts=thought_in(message))
        for at, part in zip(texts, parts, strict=True):
            made[at] = {"content": part}
        # What else there is stands there once.
        made[texts[0]] = {**logprobs, "content": parts[0]}
    return made


def _with_events(chunks: list[Json], name: str, events: list[Json] | None, head: Json) -> list[Json]:
    """The first and the last chunk beside the first and the last event, and the others between them."""
    if events is None:
        return chunks
    between = [{**head, "choices": [], name: event} for event in events[1:-1]]
    return [{**chunks[0], name: events[0]}, *between, {**chunks[1], name: events[-1]}]


def string(value: Any) -> str:
    """A text, or an empty one for what is none."""
    return value if isinstance(value, str) else ""


def choices_of(chunk: Json) -> list[Json]:
    """Those that are objects; none where there is no list of them."""
    choices = chunk.get("choices")
    return [choice for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []
