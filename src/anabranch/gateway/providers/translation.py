"""What providers share that translate between OpenAI's form and another: what senders sent read safely, and answers made.

asked(...)            what a sender sent is of another shape: the sender's mistake (400)
read(...)             what an upstream sent is of another shape: garbage
`ForeignStream`       base of what turns a foreign stream into chunks
"""

import base64
import json
import re
import struct
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from anabranch.errors import ConfigError
from anabranch.gateway.providers.assembling import assembled
from anabranch.gateway.providers.openai import check_header, check_url, unsupported
from anabranch.gateway.providers.provider import (
    Answer,
    Failure,
    Json,
    UpstreamError,
    UpstreamRequest,
    Usage,
    estimated,
    garbage,
    parse_object,
)
from anabranch.gateway.providers.vocabulary import status_said
from anabranch.web.body import is_too_deep
from anabranch.web.json_size import MOST_PARTS, MOST_VALUES, JsonRoom, JsonSizeError

# What reading a value of another shape raises.
MISSHAPEN = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError, struct.error)

# What no API but OpenAI's has.
_REFUSED = ("logit_bias", "audio", "functions", "function_call", "web_search_options")
_DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)(?:;[\w=.+-]+)*;base64,", re.ASCII)
_REGION = re.compile(r"[a-z0-9-]+")

# Places in a request's messages that have a JSON text to read.
Room = JsonRoom


def room() -> Room:
    """What may be in all the JSON texts of one request together: the parser holds up other requests for as long as it takes."""
    return JsonRoom(MOST_VALUES, MOST_PARTS)


# Configs


def check_place(field: str, name: str | None) -> None:
    """Raises ConfigError for a region or project that could not be part of a host's name."""
    if name is not None and not _REGION.fullmatch(name):
        raise ConfigError(f"{field} is {name!r}; it must be letters, digits and '-', such as us-central1")


def check_wire(config: Any) -> None:
    """The fields that all HTTP providers have. Raises ConfigError."""
    if config.base_url is not None:
        check_url("base_url", config.base_url)
    if config.proxy is not None:
        check_url("proxy", config.proxy)
    for name, value in config.headers.items():
        check_header(name, value)


# Requests


@contextmanager
def asked() -> Iterator[None]:
    """Around the translation of a request. Raises UpstreamError (``request``, 400) where it is of another shape."""
    try:
        yield
    except MISSHAPEN as error:
        message = f"messages or tools are not in the form of OpenAI's API ({type(error).__name__}: {error})"
        raise UpstreamError(Failure(kind="request", message=message, status=400)) from None


def refuse(body: Json, names: Iterable[str], whom: str) -> None:
    """Raises UpstreamError (``unsupported``) for a field that has no counterpart there, if it asks for something.

    Left out in silence is what an answer is none the worse for: ``seed``, penalties, ``store``, ``metadata``, ``user`` and the like.
    """
    for name in (*names, *_REFUSED):
        if body.get(name) and not (name == "n" and body[name] == 1):
            raise unsupported(f"{name} cannot be asked of {whom}")
    if "audio" in (body.get("modalities") or ()):
        raise unsupported(f"modalities: {whom} is asked for text alone")
    if body.get("tools") and body.get("parallel_tool_calls") is False:
        raise unsupported(f"parallel_tool_calls cannot be turned off for {whom}")


def most_tokens(body: Json) -> int | None:
    """The end that a request asks for."""
    return body.get("max_completion_tokens") or body.get("max_tokens")


def stops(body: Json) -> list[str]:
    """Texts at which the answer ends."""
    stop = body.get("stop")
    return ([stop] if isinstance(stop, str) else list(stop)) if stop else []


def text_of(content: Any, whom: str) -> str:
    """A message's content that must be text. Raises UpstreamError (``unsupported``) for a part that is none."""
    if isinstance(content, list):
        for part in content:
            if part.get("type") not in ("text", "refusal"):
                raise unsupported(f"a part of type {part.get('type')!r} cannot be in this message for {whom}")
        return "".join(part[part["type"]] for part in content)
    if content is not None and not isinstance(content, str):
        raise TypeError("content is neither text nor a list of parts")
    return content or ""


def data_url(url: str) -> tuple[str, str] | None:
    """Media type and base64 of a ``data:`` URL; None of any other URL. Raises ValueError for one that is not base64."""
    if not url.startswith("data:"):
        return None
    head = _DATA_URL.match(url)
    if head is None:
        raise ValueError("a data: URL must be of the form data:TYPE/SUBTYPE;base64,...")
    return head[1].lower(), url[head.end() :]


def arguments(call: Json, kept: Room) -> Json:
    """What a tool was called with; it counts in ``kept``. Raises UpstreamError (``request``)."""
    text, why_not = call["function"].get("arguments") or "{}", ""
    try:
        kept.take(text.encode("utf-8", "replace"))
        given = json.loads(text)
        why_not = "are nested too deep" if is_too_deep(given) else "" if isinstance(given, dict) else "are no object"
    except JsonSizeError as error:
        why_not = f"have, with those of the other calls, {error}"
    except RecursionError:
        why_not = "are nested too deep"
    except ValueError:
        why_not = "are no JSON"
    if why_not:
        message = f"the arguments of the tool call {call.get('id')!r} {why_not}"
        raise UpstreamError(Failure(kind="request", message=message, status=400))
    return given


def functions(body: Json, whom: str) -> list[Json]:
    """The functions that may be called. Raises UpstreamError (``unsupported``) for tools that are none."""
    found = []
    for tool in body.get("tools") or []:
        if tool.get("type", "function") != "function":
            raise unsupported(f"a tool of type {tool.get('type')!r} cannot be asked of {whom}")
        found.append(tool["function"])
    return found


def schema_of(body: Json) -> tuple[bool, Json | None]:
    """Whether JSON is asked for, and the schema that it is to follow."""
    form = body.get("response_format") or {}
    kind = form.get("type", "text")
    if kind == "json_schema":
        return True, form["json_schema"].get("schema")
    return kind == "json_object", None


def texts(request: UpstreamRequest, whom: str) -> list[str]:
    """What is to be embedded. Raises UpstreamError (``unsupported``) for token ids."""
    given = request.body.get("input")
    found = [given] if isinstance(given, str) else given
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise unsupported(f"input must be text, or a list of texts, for {whom}")
    return found


# Answers


@contextmanager
def read(what: str, body: bytes) -> Iterator[None]:
    """Around the reading of what an upstream sent. Raises UpstreamError (``garbage``)."""
    try:
        yield
    except MISSHAPEN:
        raise garbage(what, body) from None


def count(value: Any) -> int:
    """A number of tokens. Raises ValueError."""
    if value is None:
        return 0
    if type(value) is not int or value < 0:
        raise ValueError("no number of tokens")
    return value


def usage_body(usage: Usage, reasoning: int = 0) -> Json:
    """OpenAI's ``usage``; ``reasoning`` tokens are among the completion's."""
    made = usage.to_openai()
    if reasoning:
        made.setdefault("completion_tokens_details", {})["reasoning_tokens"] = reasoning
    return made


def head(id: Any, model: Any, kind: str) -> Json:
    """What comes before the choices."""
    return {
        "id": id if isinstance(id, str) and id else f"chatcmpl-{uuid.uuid4().hex}",
        "object": kind,
        "created": int(time.time()),
        "model": model if isinstance(model, str) else "",
    }


def tool_call(name: str, given: Any, id: Any = None) -> Json:
    """A call of a tool; upstreams that give it no id get one, since answers to it need it."""
    if not isinstance(name, str):
        raise TypeError("a tool call without a name")
    text = given if isinstance(given, str) else json.dumps({} if given is None else given, separators=(",", ":"))
    made_id = id if isinstance(id, str) and id else f"call_{uuid.uuid4().hex[:24]}"
    return {"id": made_id, "type": "function", "function": {"name": name, "arguments": text}}


def message_of(pieces: Iterable[Json]) -> Json:
    """The message of a whole answer that the deltas of its stream would make."""
    chunks = [{"choices": [{"index": 0, "delta": piece}]} for piece in pieces]
    made: Json = assembled(chunks)["choices"][0]["message"] if chunks else {"role": "assistant", "content": None}
    if not made.get("tool_calls"):
        made.pop("tool_calls", None)
        made["content"] = made.get("content") or ""
    return made


def completion(top: Json, choices: Sequence[Json], usage: Usage, reasoning: int = 0) -> Answer:
    """A whole answer."""
    return Answer({**top, "choices": list(choices), "usage": usage_body(usage, reasoning)}, None, usage)


def embeddings(request: UpstreamRequest, body: bytes, model: str, vectors: Sequence[Any], prompt: int | None) -> Answer:
    """Vectors in the form of ``/embeddings``, as base64 of float32 where the request asks for that.

    Args:
        prompt: tokens, as the upstream counts them; None where it does not say.
    """
    if not vectors or not all(isinstance(vector, list) and vector for vector in vectors):
        raise ValueError("no vectors")
    as_base64 = request.body.get("encoding_format") == "base64"
    data = []
    for at, vector in enumerate(vectors):
        packed = struct.pack(f"<{len(vector)}f", *vector)
        data.append(
            {
                "object": "embedding",
                "index": at,
                "embedding": base64.b64encode(packed).decode() if as_base64 else vector,
            }
        )
    usage = estimated(request, {}) if prompt is None else Usage(prompt)
    shown = {"prompt_tokens": usage.prompt, "total_tokens": usage.prompt}
    return Answer({"object": "list", "data": data, "model": model, "usage": shown}, None, usage)


# Streams


class ForeignStream:
    """Turns the events of one answer into chunks; the rest says how, by ``_chunks``.

    Attributes:
        is_done: the stream has said that it is over.
        told: the usage as said so far; None where nothing was.
    """

    def __init__(self, provider: Any) -> None:
        self._provider = provider
        self._head = head(None, provider.config.model, "chat.completion.chunk")
        self._has_role = False
        self._calls: dict[int, int] = {}
        self.is_done = False
        self.told: Usage | None = None

    def feed(self, data: bytes) -> list[Json]:
        """The chunks of one event. Raises UpstreamError if it reports an error or cannot be read."""
        value = parse_object(data)
        with read("an event that is none of an answer", data):
            return self._chunks(value)

    def _chunks(self, value: Json) -> list[Json]:
        raise NotImplementedError

    def _failed(self, value: Json, status: int | None = None) -> UpstreamError:
        """An error that was told inside the stream."""
        data = json.dumps(value).encode()
        return UpstreamError(self._provider.error(status_said(value) if status is None else status, {}, data))

    def _chunk(self, delta: Json, finish_reason: str | None = None, index: int = 0) -> Json:
        if not self._has_role:
            self._has_role, delta = True, {"role": "assistant", **delta}
        return {**self._head, "choices": [{"index": index, "delta": delta, "finish_reason": finish_reason}]}

    def _called(self, call: Json, index: int = 0) -> Json:
        """A chunk with a whole call of a tool, or its beginning."""
        at = self._calls.get(index, 0)
        self._calls[index] = at + 1
        return self._chunk({"tool_calls": [{"index": at, **call}]}, None, index)

    def _used(self, usage: Usage, reasoning: int = 0) -> Json:
        """The last chunk, of the usage alone."""
        self.told = usage
        return {**self._head, "choices": [], "usage": usage_body(usage, reasoning)}
