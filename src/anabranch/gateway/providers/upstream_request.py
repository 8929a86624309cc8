"""`UpstreamRequest`: a request as providers are given it, and `Native`, the form that its sender wrote it in."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from anabranch.gateway.providers.failures import Failure, UpstreamError
from anabranch.gateway.providers.http_call import Headers
from anabranch.web.large_json import LARGE, dump_parts, weight_of

Endpoint = Literal[
    "chat",
    "completions",
    "embeddings",
    "images",
    "image_edits",
    "speech",
    "transcriptions",
    "translations",
    "moderations",
    "rerank",
]

# No body is longer, so that all of it is looked at.
MOST_WEIGHT = 1 << 40

# Endpoints that write text, token by token.
WRITES = ("chat", "completions")

Json = dict[str, Any]


@dataclass(frozen=True)
class Native:
    """A request in the form that its sender wrote, where that is not OpenAI's: for a provider that speaks it.

    Attributes:
        body: of ``POST /v1/messages`` or ``/v1/responses``.
        headers: of that form alone, to send along, lower case.
        form: which of them.
    """

    body: Json
    headers: Headers
    form: Literal["messages", "responses"] = "messages"

    @cached_property
    def digest(self) -> str:
        """Of all that is asked beside the messages, the names of model and stream: what a chat made of it may have no words for."""
        asked = {name: value for name, value in self.body.items() if name not in ("messages", "model", "stream")}
        text = json.dumps([asked, sorted(self.headers.items())], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


class UpstreamRequest:
    """One request for the upstreams. It is never changed; what differs from one provider to the next is made from it.

    Args:
        endpoint: which of OpenAI's endpoints.
        body: of the sender, as it came.
        request_id: for logs and recordings.
        prompt_tokens: counted or estimated; None for a quarter of the bytes.
        headers: to send along, lower case.
        num_bytes: of the body as it came, if it is known; a large one is written in steps.
        native: what ``body`` was made of, if it came in a form of which a provider may make more than of a chat; None of other requests,
            and where other messages are sent.
        is_foreign: it came in Anthropic's form: ``body`` has fields that only `anabranch.gateway.providers.anthropic` knows, and that
            others take out (`plain_chat`).

    Attributes:
        bound: completion tokens that it is held to though its sender names no end; they are in ``body`` then. None if there is none.
    """

    __slots__ = (
        "_rest",
        "body",
        "bound",
        "endpoint",
        "headers",
        "is_foreign",
        "native",
        "num_bytes",
        "prompt_tokens",
        "request_id",
        "stream",
    )

    def __init__(
        self,
        endpoint: Endpoint,
        body: Json,
        *,
        request_id: str = "",
        prompt_tokens: int | None = None,
        headers: Headers | None = None,
        num_bytes: int = 0,
        native: Native | None = None,
        is_foreign: bool = False,
    ) -> None:
        self.endpoint, self.body, self.request_id, self.headers = endpoint, body, request_id, headers
        self.num_bytes, self.native, self.is_foreign = (
            num_bytes,
            native,
            is_foreign or (native is not None and native.form == "messages"),
        )
        self.stream = bool(body.get("stream")) and endpoint in WRITES
        self._rest: dict[bool, list[bytes]] = {}
        self.bound: int | None = None
        self.prompt_tokens = self._num_bytes() // 4 if prompt_tokens is None else prompt_tokens

    def _num_bytes(self) -> int:
        """Of its JSON; of a large one about, since whoever makes it may be the event loop, and to write it takes long."""
        return weight_of(self.body, MOST_WEIGHT) if self.num_bytes > LARGE else len(self.encoded("", False))

    @property
    def wants_usage(self) -> bool:
        """The sender wants the usage as the last chunk of the stream."""
        options = self.body.get("stream_options")
        return isinstance(options, dict) and bool(options.get("include_usage"))

    def native_in(self, form: str) -> Native | None:
        """What it was made of, if that is in such a form."""
        return self.native if self.native is not None and self.native.form == form else None

    def encoded(self, model: str, asks_usage: bool) -> bytes:
        """The body as JSON with another name of the model, and, where ``asks_usage``, asking for the usage of a stream."""
        asks_usage = asks_usage and self.stream
        rest = self._rest.get(asks_usage)
        if rest is None:
            fields = {name: value for name, value in self.body.items() if name != "model"}
            if asks_usage:
                options = fields.get("stream_options")
                fields["stream_options"] = {**(options if isinstance(options, dict) else {}), "include_usage": True}
            first, *others = self._parts(fields)
            rest = self._rest[asks_usage] = [first[1:], *others]
        # At once, and of bytes alone: each copy of megabytes would be made with Python's lock held.
        return b"".join([b'{"model":', json.dumps(model).encode(), b"," if rest != [b"}"] else b"", *rest])

    def dumped(self, value: Any) -> bytes:
        """``value``, made of the body, as JSON. Raises UpstreamError for a number that JSON cannot carry."""
        return b"".join(self._parts(value))

    def _parts(self, value: Any) -> list[bytes]:
        try:
            if self.num_bytes > LARGE:
                return dump_parts(value)
            return [json.dumps(value, separators=(",", ":"), allow_nan=False).encode()]
        except ValueError:
            message = "the request holds a number that JSON cannot carry (NaN or infinite)"
            raise UpstreamError(Failure(kind="request", message=message, status=400)) from None

    def whole(self) -> "UpstreamRequest":
        """The same request, not streamed."""
        if not self.stream:
            return self
        body = {name: value for name, value in self.body.items() if name not in ("stream", "stream_options")}
        return self._like(body, self.native, self.prompt_tokens)

    def bounded(self, most_tokens: int | None) -> "UpstreamRequest":
        """The same request with an end: one that names none of its own asks for so many completion tokens at most. None leaves it open."""
        body = self.body
        has_end = body.get("max_completion_tokens") or body.get("max_tokens") or self.endpoint not in WRITES
        if most_tokens is None or has_end:
            return self
        bounded = self._like({**body, "max_tokens": most_tokens}, self.native, self.prompt_tokens)
        bounded.bound = most_tokens
        return bounded

    def with_body(self, **changes: Any) -> "UpstreamRequest":
        """The same request with some fields of the body set."""
        return self._like({**self.body, **changes}, None, None)

    def asking(self, body: Json) -> "UpstreamRequest":
        """The same question in other fields, for one provider."""
        return self._like(body, None, self.prompt_tokens, is_foreign=False)

    def _like(
        self, body: Json, native: Native | None, prompt_tokens: int | None, is_foreign: bool | None = None
    ) -> "UpstreamRequest":
        return UpstreamRequest(
            self.endpoint,
            body,
            request_id=self.request_id,
            prompt_tokens=prompt_tokens,
            headers=self.headers,
            num_bytes=self.num_bytes,
            native=native,
            is_foreign=self.is_foreign if is_foreign is None else is_foreign,
        )
