"""The seam every upstream fits: a `Provider` says what to send and how to read what comes back; a `Transport` carries it.

    build       request -> HttpCall              what to send
    parse       body -> Answer                   a whole answer, in OpenAI's form
    translator  None, or what turns a foreign stream into OpenAI's chunks
    error       status, headers, body -> Failure what went wrong, in one vocabulary

All four are pure. Providers that need no socket (mock, replay) or that look on (record) put a transport of their own in the place of HTTP.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol

from anabranch.config import Config as BaseConfig
from anabranch.config import Part, configclass
from anabranch.errors import AnabranchError
from anabranch.gateway.providers.usage import Usage as Usage
from anabranch.gateway.providers.vocabulary import Hint, hint_of, kind_of, status_said
from anabranch.redaction import hide_keys, hide_passwords
from anabranch.web.body import MOST_DEPTH, is_too_deep
from anabranch.web.large_json import LARGE, dump_large

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

# Endpoints that write text, token by token.
WRITES = ("chat", "completions")
Json = dict[str, Any]
Headers = Mapping[str, str]

# Most bytes of an answer that are read.
BODY_BYTES = 32 << 20

# Letters of a key from which on it is taken out of messages.
TELLING_KEY = 8

# Why an answer ended that can be given to others.
WHOLE = ("stop", "length", "tool_calls")

# Letters of an upstream's error that are passed on: of its message, and of each of its words (type, code, parameter).
MESSAGE_LETTERS, WORD_LETTERS = 500, 200

# As many are looked at for keys before that: of a key that is cut, the rest looks like none.
SAID_LETTERS = 64 << 10

# Longer waits than this are not believed.
RETRY_AFTER_S = 300.0

FailureKind = Literal[
    # No connection, so that nothing was sent.
    "connect",
    # 408, or the answer took longer than it may.
    "timeout",
    # A stream brought no first token in time.
    "first_token",
    "conflict",  # 409
    "rate_limit",  # 429
    "server",  # 5xx
    # An answer that cannot be read: HTML, broken JSON or SSE, wrong length, a redirect.
    "garbage",
    # An answer that is nested too deep, or too long, to be read: whoever asks can bring that about, so it says nothing of the deployment.
    "excess",
    # The connection broke, or the stream ended, before the answer did.
    "cut",
    # The prompt is too long for this model.
    "context",
    # The provider's content filter refused.
    "filter",
    # The account behind the key is out of money.
    "credit",
    # Our key is not accepted.
    "auth",
    # 403, and nothing says whether it is for our key or for what was asked.
    "forbidden",
    # 404 that says the model is not there: it is named by our config.
    "missing",
    # Any other 404: the address may be wrong, or what the request names is not there.
    "not_found",
    # This provider cannot do what is asked.
    "unsupported",
    # Any other 4xx: the request itself is at fault.
    "request",
    # Nothing to ask: breakers open, limits reached.
    "unavailable",
    # The plan did not allow the price.
    "refused",
    # The time of the whole request is up.
    "deadline",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What went wrong with an attempt.

    Attributes:
        kind: one word for it.
        message: a sentence for people; holds no key.
        status: HTTP status of the upstream; None if there was none.
        retry_after_s: how long the upstream asks to be left alone; None if it does not say.
        type: the upstream's own word, of OpenAI's ``error.type``.
        code: of ``error.code``.
        param: of ``error.param``.
        hint: what its words sound like. It decides only where the request goes next, never what is held against the deployment: a sender
            may have written them.
    """

    kind: FailureKind
    message: str
    status: int | None = None
    retry_after_s: float | None = None
    type: str | None = None
    code: str | None = None
    param: str | None = None
    hint: Hint | None = None

    @property
    def cause(self) -> FailureKind:
        """What decides where the request goes next."""
        return self.kind if self.hint is None or self.kind != "request" else self.hint


class UpstreamError(AnabranchError):
    """An attempt failed, or, from a `Dispatcher`, all that may be tried failed. The gateway answers with ``status`` and ``to_dict()``.

    Attributes:
        failure: what went wrong last.
        report: all attempts made; None from a provider.
    """

    def __init__(self, failure: Failure, report: Any = None) -> None:
        super().__init__(failure.message)
        self.failure, self.report = failure, report

    @property
    def status(self) -> int:
        """The HTTP status for whoever asked."""
        failure = self.failure
        if failure.kind in ("request", "context", "filter", "unsupported", "forbidden", "missing", "not_found"):
            return failure.status if failure.status is not None and 400 <= failure.status < 500 else 400
        return _STATUS.get(failure.kind, 502)

    def to_dict(self) -> Json:
        """OpenAI's form of an error."""
        failure, ours = self.failure, self.status >= 500
        kind = "server_error" if ours else failure.type or "invalid_request_error"
        code = failure.code or _CODE.get(failure.cause, f"upstream_{failure.cause}")
        return {"error": {"message": failure.message, "type": kind, "code": code, "param": failure.param}}


_STATUS = {"rate_limit": 429, "refused": 429, "unavailable": 503, "deadline": 504, "timeout": 504, "first_token": 504}
_CODE = {
    "rate_limit": "rate_limit_exceeded", "refused": "insufficient_quota", "context": "context_length_exceeded",
    "filter": "content_filter", "request": "invalid_request", "unsupported": "unsupported", "deadline": "deadline_exceeded",
    "missing": "model_not_found", "not_found": "invalid_request",
}  # fmt: skip


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
    """

    __slots__ = (
        "_rest",
        "body",
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
        self._rest: dict[bool, bytes] = {}
        self.prompt_tokens = len(self.encoded("", False)) // 4 if prompt_tokens is None else prompt_tokens

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
            rest = self._rest[asks_usage] = self.dumped(fields)
        return b'{"model":' + json.dumps(model).encode() + (b"," + rest[1:] if len(rest) > 2 else b"}")

    def dumped(self, value: Any) -> bytes:
        """``value``, made of the body, as JSON. Raises UpstreamError for a number that JSON cannot carry."""
        try:
            if self.num_bytes > LARGE:
                return dump_large(value)
            return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
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
        return self._like({**body, "max_tokens": most_tokens}, self.native, self.prompt_tokens)

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


@dataclass(slots=True, repr=False)
class HttpCall:
    """What goes over the wire. Its repr shows neither the values of headers (keys) nor the body (prompts).

    Attributes:
        url: absolute; made of the config alone.
        headers: to send.
        body: JSON.
        proxy: URL of a proxy; None for none.
        is_sent: it may have gone out, and be billed: set when a transport is given it. One that knows better sets it to False until
            the body goes out.
    """

    url: str
    headers: Headers
    body: bytes
    proxy: str | None = None
    is_sent: bool = False

    def __repr__(self) -> str:
        return f"HttpCall({self.url!r}, headers of {sorted(self.headers)}, {len(self.body)} bytes)"


class Answer:
    """A whole answer, in OpenAI's form.

    Attributes:
        body: the object.
        raw: the bytes it was read from; None if it was translated.
        usage: tokens.
        report: how it was come by; set by the `Dispatcher`.
        is_cut: part of what the upstream said is not in it.
    """

    def __init__(self, body: Json, raw: bytes | None, usage: Usage) -> None:
        self.body, self.raw, self.usage = body, raw, usage
        self.is_cut = False
        self.report: Any = None

    @cached_property
    def data(self) -> bytes:
        """The body as JSON, as it came where it could stay so."""
        return json.dumps(self.body, separators=(",", ":")).encode() if self.raw is None else self.raw

    @property
    def text(self) -> str:
        """What the first choice says; empty if it says nothing (tool calls) or this is no text."""
        choice = _first(self.body.get("choices"))
        message = choice.get("message")
        text = message.get("content") if isinstance(message, dict) else choice.get("text")
        return text if isinstance(text, str) else ""

    @property
    def finish_reason(self) -> str | None:
        """Why the first choice ended."""
        return _first(self.body.get("choices")).get("finish_reason")

    @property
    def is_whole(self) -> bool:
        """Every choice came to its end, none was held back, and nothing is left out."""
        if self.is_cut:
            return False
        choices = self.body.get("choices")
        found = [_first([one]).get("finish_reason") for one in choices] if isinstance(choices, list) else []
        return bool(found) and all(reason in WHOLE for reason in found)


def _first(items: Any) -> Json:
    return items[0] if isinstance(items, list) and items and isinstance(items[0], dict) else {}


class Reply(Protocol):
    """An answer under way. Header names are lower case, or the mapping does not mind."""

    status: int

    @property
    def headers(self) -> Headers:
        """Of the answer."""

    def read_ready(self) -> bytes:
        """What has come, without waiting; empty if nothing has, or the end is reached."""

    async def read_some(self) -> bytes:
        """What comes next, empty at the end. May be cancelled and called again without losing a byte. Raises UpstreamError."""

    def close(self) -> None:
        """Drop the connection if the end has not been reached."""


class Transport(Protocol):
    """What carries calls."""

    async def open(self, call: HttpCall) -> Reply:
        """Send, and wait for status and headers. Raises UpstreamError."""


class Translator(Protocol):
    """Turns one foreign stream into OpenAI's chunks.

    Of an upstream that speaks of usage before the end, it has ``told`` too: the `Usage` as said so far, or None.
    """

    def feed(self, data: bytes) -> Iterable[Json]:
        """The chunks of one event's data. Raises UpstreamError if it reports an error or cannot be read."""

    @property
    def is_done(self) -> bool:
        """The stream has said that it is over."""


class Provider(Part, family="provider"):
    """Interface: see the module."""

    @configclass
    class Config(BaseConfig):
        """What all have.

        Attributes:
            model: what the upstream calls the model.
        """

        model: str = ""

    endpoints: ClassVar[tuple[Endpoint, ...]] = ("chat", "completions", "embeddings")

    # Somebody may send an invoice for it: without a price, what it costs is not known.
    is_billed: ClassVar[bool] = True

    # It puts prompts into its cache without being asked to, and may bill that.
    caches_unasked: ClassVar[bool] = True

    def __init__(self, config: Any) -> None:
        self.config = config

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config.model!r})"

    def build(self, request: UpstreamRequest) -> HttpCall:
        """What to send. Raises UpstreamError (``unsupported``) if the provider cannot do this."""
        raise NotImplementedError

    def parse(self, request: UpstreamRequest, body: bytes) -> Answer:
        """The body of a 2xx answer. Raises UpstreamError (``garbage``)."""
        value = parse_object(body)
        # Some servers say 200 and mean it not.
        if isinstance(value.get("error"), dict):
            raise UpstreamError(self.error(status_said(value), {}, body))
        wanted = "data" if request.endpoint == "embeddings" else "choices"
        if not isinstance(value.get(wanted), list):
            raise garbage(f"an answer without {wanted!r}", body)
        usage = Usage.of(value)
        return Answer(value, body, usage if usage is not None and usage.prompt else estimated(request, value, usage))

    def translator(self, request: UpstreamRequest) -> Translator | None:
        """None if the stream is in OpenAI's form already and is passed on as it comes."""
        return None

    def error(self, status: int, headers: Headers, body: bytes) -> Failure:
        """What an answer that is not 2xx means."""
        return self.redacted(classify(status, headers, body))

    def redacted(self, failure: Failure) -> Failure:
        """The same with no key in what it says."""
        return hidden(failure, None)

    def transport(self, http: Transport) -> Transport:
        """What carries its calls: HTTP, unless it says otherwise."""
        return http


def hidden(failure: Failure, secret: str | None) -> Failure:
    """``failure`` with ``secret`` and whatever looks like a key taken out of all that it says, and then cut to what is passed on."""
    words = (failure.type, failure.code, failure.param)
    kind, code, param = (None if word is None else _without(word, secret)[:WORD_LETTERS] for word in words)
    message = _without(failure.message, secret)[:MESSAGE_LETTERS]
    return replace(failure, message=message, type=kind, code=code, param=param)


def _without(text: str, secret: str | None) -> str:
    # No real key is shorter, and a word such as "a" is in every sentence.
    if secret is not None and len(secret) >= TELLING_KEY:
        text = text.replace(secret, "[key]")
    return hide_keys(hide_passwords(text, "[key]"), "[key]")


def parse_object(body: bytes, what: str = "an answer") -> Json:
    """A JSON object, nested at most `MOST_DEPTH` deep; ``what`` it is, for people. Raises UpstreamError (``garbage``, ``excess``)."""
    deep = f"{what} of more than {MOST_DEPTH} lists and objects within one another"
    try:
        value = json.loads(body)
    except RecursionError:
        raise excess(deep) from None
    except ValueError as error:
        if type(error) is ValueError:
            # Of JSON that is well formed: an integer of more digits than Python reads.
            raise excess(f"{what} with a number of too many digits") from None
        raise garbage(f"{what} that is no JSON", body) from None
    if not isinstance(value, dict):
        raise garbage(f"{what} that is no JSON object", body)
    # What has few brackets cannot be deep, and need not be walked through.
    if body.count(b"{") + body.count(b"[") > MOST_DEPTH and is_too_deep(value):
        raise excess(deep)
    return value


def excess(what: str) -> UpstreamError:
    """The failure of an answer that is too much to be read."""
    return UpstreamError(Failure(kind="excess", message=f"the upstream sent {what}"))


def garbage(what: str, body: bytes = b"") -> UpstreamError:
    """The failure of an answer that cannot be read."""
    kind = "HTML" if body[:200].lstrip().lower().startswith((b"<!doctype", b"<html")) else f"{len(body)} bytes"
    return UpstreamError(Failure(kind="garbage", message=f"the upstream sent {what} ({kind})" if body else what))


def estimated(request: UpstreamRequest, body: Json, told: Usage | None = None) -> Usage:
    """Usage where the provider does not say: a token for every four bytes of text.

    ``told`` is what it said without a prompt, which it does not know then: not less than that.
    """
    return Usage(request.prompt_tokens, max(answer_bytes(body)[0] // 4, told.completion if told else 0), 0, True)


# Strings of a message that no model wrote.
_NOT_SAID = frozenset({"role", "id", "type", "index", "data"})


def answer_bytes(body: Json) -> tuple[int, int]:
    """Bytes (UTF-8) of all that the choices of an answer say: text, thoughts and calls; and how many choices there are."""
    choices = body.get("choices")
    choices = [choice for choice in choices if isinstance(choice, dict)] if isinstance(choices, list) else []
    left: list[Any] = [choice.get(name) for choice in choices for name in ("message", "text")]
    size = 0
    while left:
        value = left.pop()
        if isinstance(value, str):
            size += len(value) if value.isascii() else len(value.encode("utf-8", "surrogatepass"))
        elif isinstance(value, dict):
            left += [inner for name, inner in value.items() if name not in _NOT_SAID]
        elif isinstance(value, list):
            left += value
    return size, len(choices)


def classify(status: int, headers: Headers, body: bytes) -> Failure:
    """What an answer that is not 2xx means (see `vocabulary`), in OpenAI's and Anthropic's forms.

    Its texts are as they came: `hidden` takes keys out of them, and cuts them.
    """
    message, kind, code, param = _said(body)
    what = kind_of(status, kind, code)
    if what == "garbage":
        message = f"the upstream redirects ({status}), which is not followed to another host"
    text = message or f"the upstream answered with status {status}"
    return Failure(
        kind=what, message=text[:SAID_LETTERS], status=status, retry_after_s=retry_after(headers), type=kind, code=code, param=param,
        hint=hint_of(status, message) if what == "request" else None,
    )  # fmt: skip


def _said(body: bytes) -> tuple[str, str | None, str | None, str | None]:
    """Message, type, code and parameter of an error's body, as far as they can be found."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        text = body[:SAID_LETTERS].decode("utf-8", "replace").strip()
        return ("" if text.startswith("<") else text), None, None, None
    error = value.get("error", value) if isinstance(value, dict) else value
    if isinstance(error, str):
        return error, None, None, None
    if not isinstance(error, dict):
        return "", None, None, None
    message = error.get("message") or error.get("detail") or ""
    found = [error.get(name) for name in ("type", "code", "param")]
    kind, code, param = (str(value)[:SAID_LETTERS] if isinstance(value, str | int) else None for value in found)
    return _as_text(message), kind, code, param


def _as_text(message: Any) -> str:
    """What an error says; some servers say it as a list of what is wrong with each field."""
    try:
        return message if isinstance(message, str) else json.dumps(message)
    except RecursionError:
        return ""


def retry_after(headers: Headers, now: datetime | None = None) -> float | None:
    """Seconds of ``Retry-After`` (a number or a date) or ``retry-after-ms``; None if absent or senseless, at most `RETRY_AFTER_S`."""
    given, scale = headers.get("retry-after-ms"), 1e-3
    if given is None:
        given, scale = headers.get("retry-after"), 1.0
    if given is None:
        return None
    try:
        seconds = float(given) * scale
    except ValueError:
        try:
            when = parsedate_to_datetime(given)
            seconds = (when.replace(tzinfo=when.tzinfo or UTC) - (now or datetime.now(UTC))).total_seconds()
        except (ValueError, OverflowError):
            # A year or an hour that no calendar has, or a zone that puts the time outside it.
            return None
    return min(max(seconds, 0.0), RETRY_AFTER_S) if seconds == seconds else None


async def read_all(reply: Reply, most: int = BODY_BYTES) -> bytes:
    """The rest of an answer. Raises UpstreamError (``excess``) beyond ``most`` bytes."""
    parts, size = [], 0
    while part := await reply.read_some():
        size += len(part)
        if size > most:
            reply.close()
            raise excess(f"an answer of more than {most:,} bytes")
        parts.append(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)
