"""Any endpoint that speaks OpenAI's API: bodies go through as they are, but for the model's name, the key and the wish for usage."""

import hashlib
from typing import Any

from anabranch.config import Field, configclass
from anabranch.errors import ConfigError
from anabranch.gateway.providers import media, openai_responses
from anabranch.gateway.providers.content_lists import flattened, for_mistral, is_mistral
from anabranch.gateway.providers.keys import read_key
from anabranch.gateway.providers.make_on import makes_on
from anabranch.gateway.providers.one_message import in_one_message
from anabranch.gateway.providers.openai_models import fitted
from anabranch.gateway.providers.plain_chat import plain
from anabranch.gateway.providers.provider import (
    Answer,
    Endpoint,
    Failure,
    HttpCall,
    Json,
    Native,
    Provider,
    Translator,
    UpstreamError,
    UpstreamRequest,
    hidden,
)
from anabranch.redaction import hide_passwords, hide_settings
from anabranch.sockets import http_parts

PATHS: dict[Endpoint, str] = {
    "chat": "/chat/completions",
    "completions": "/completions",
    "embeddings": "/embeddings",
    **media.PATHS,
}


class OpenAI(Provider, kind="openai"):
    """Talks to an OpenAI-compatible endpoint."""

    stops_when_closed = True

    @configclass
    class Config(Provider.Config):
        """Where it is and what it is called there.

        Attributes:
            base_url: up to and with the version, e.g. ``http://10.0.0.5:8000/v1``.
            key_env: environment variable that holds the key; None if the endpoint wants none.
            key_file: encrypted file that holds it, read if the variable is not set.
            headers: to send with each call; no keys here.
            sends_usage: the endpoint takes ``stream_options``; turn it off for old servers that refuse it.
            proxy: URL of an HTTP proxy; None connects directly, whatever the environment says.
            idempotency_header: in which a call is named, such as ``Idempotency-Key``: the same when it is tried again, so that an endpoint
                that knows it answers and bills once. None sends none; neither OpenAI nor Anthropic documents one for these endpoints.
            reasons: it is a model that reasons: it is sent ``max_completion_tokens`` and no sampling. None tells by its name (o3, gpt-5).
            responses: the endpoint has ``/responses``, and requests that come in that form are sent there as they came.
            drops: fields of a chat that the endpoint refuses, and that are left out for it.
        """

        base_url: str = "https://api.openai.com/v1"
        key_env: str | None = "OPENAI_API_KEY"
        key_file: str | None = None
        headers: dict[str, str] = Field(default_factory=dict)
        sends_usage: bool = True
        proxy: str | None = None
        idempotency_header: str | None = None
        reasons: bool | None = None
        responses: bool = False
        drops: tuple[str, ...] = ()

        def __post_init__(self) -> None:
            check_url("base_url", self.base_url)
            if self.proxy is not None:
                check_url("proxy", self.proxy)
            for name, value in self.headers.items():
                check_header(name, value)
            check_drops(self.drops)
            if self.idempotency_header is not None:
                check_header(self.idempotency_header, "")

    endpoints = ("chat", "completions", "embeddings", *media.PATHS)
    predicts = True
    # It refuses a message between calls and their results.
    joins_turns = True

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._key = read_key(config.key_env, config.key_file)
        self.predicts = self.predicts and "prediction" not in config.drops
        base = config.base_url.rstrip("/")
        self.stops_when_closed = self.stops_when_closed and not makes_on(base)
        self._urls = {endpoint: base + path for endpoint, path in PATHS.items()}
        self._headers = {"content-type": "application/json", **config.headers, **self._authorization()}

    def _authorization(self) -> dict[str, str]:
        return {} if self._key is None else {"authorization": f"Bearer {self._key.reveal()}"}

    def build(self, request: UpstreamRequest) -> HttpCall:
        """The sender's body under the upstream's name of the model."""
        if request.endpoint not in self.endpoints:
            raise unsupported(f"{request.endpoint} cannot be asked of {self.kind}")
        native = self._native(request)
        if request.endpoint == "chat" and native is None:
            request = self._fitted(request)
        headers = {**self._headers, **request.headers} if request.headers else self._headers
        if native is not None:
            body = request.dumped(openai_responses.body_of(native, request, self.config.model))
            url = self._urls["chat"].removesuffix(PATHS["chat"]) + openai_responses.PATH
            return HttpCall(url, headers, body, self.config.proxy)
        if request.endpoint in media.PATHS:
            body, kind = media.encoded(request, self.config.model)
            headers = {**headers, "content-type": kind}
        else:
            body = request.encoded(self.config.model, self.config.sends_usage)
        if self.config.idempotency_header is not None and request.request_id:
            # With the body, since a stream that is continued asks something else under the same id.
            named = hashlib.sha256(request.request_id.encode() + b"\0" + body).hexdigest()[:32]
            headers = {**headers, self.config.idempotency_header: named}
        return HttpCall(self._urls[request.endpoint], headers, body, self.config.proxy)

    def _fitted(self, request: UpstreamRequest) -> UpstreamRequest:
        """A chat as this model takes it: its parameters mapped, and what another API alone knows put into OpenAI's words."""
        config, body = self.config, request.body
        if request.is_foreign:
            body = plain(body, config.model, keeps_thoughts=self._takes_thoughts)
        if self.joins_turns:
            body = in_one_message(body)
        if self._takes_thoughts:
            body = self._with_thoughts(body, request.is_foreign)
        body = fitted(body, config.model, config.reasons)
        if config.drops:
            body = {name: value for name, value in body.items() if name not in config.drops}
        return request if body is request.body else request.asking(body)

    @property
    def _takes_thoughts(self) -> bool:
        """It is given what it thought before, in words of its own."""
        return is_mistral(self.config.model)

    def _with_thoughts(self, body: Json, is_foreign: bool) -> Json:
        """A chat with those; the same object where there are none."""
        return for_mistral(body, is_foreign)

    def _native(self, request: UpstreamRequest) -> Native | None:
        """A request that came in the form of the Responses API, where the endpoint has that."""
        return request.native_in("responses") if self.config.responses else None

    def translator(self, request: UpstreamRequest) -> Translator | None:
        """What reads the events of a response; None for chunks, which are passed on as they come."""
        return None if self._native(request) is None else openai_responses.ResponseEvents(self)

    def parse(self, request: UpstreamRequest, body: bytes) -> Answer:
        """The body of a 2xx answer. Raises UpstreamError (``garbage``)."""
        if request.endpoint in media.PATHS:
            return media.read(request, body, self)
        if self._native(request) is not None:
            return openai_responses.parse(self, request, body)
        answer = super().parse(request, body)
        if request.endpoint == "chat" and flattened(answer.body, "message"):
            # It says no longer what came.
            answer.raw = None
        return answer

    def redacted(self, failure: Failure) -> Failure:
        """Without this provider's key."""
        return hidden(failure, None if self._key is None else self._key.reveal())


def unsupported(message: str) -> UpstreamError:
    """The failure of a provider that cannot do what is asked."""
    return UpstreamError(Failure(kind="unsupported", message=message))


def check_url(field: str, url: str) -> None:
    """Raises ConfigError for what is no plain http(s) URL."""
    parts = http_parts(url)
    if parts is None or parts.query or parts.fragment:
        known = hide_settings(hide_passwords(url, is_url=True))
        raise ConfigError(f"{field} is {known!r}; it must be a URL such as https://api.openai.com/v1")
    if "@" in parts.netloc:
        raise ConfigError(f"{field} holds a user or password; keys come from the environment (key_env)")


def check_drops(names: tuple[str, ...]) -> None:
    """Raises ConfigError for fields without which nothing is asked, or all that is reserved would not bound the bill."""
    kept = sorted({"model", "messages", "stream", "max_tokens", "max_completion_tokens"}.intersection(names))
    if kept:
        raise ConfigError(f"drops has {kept[0]!r}, which the gateway needs to send")


def check_header(name: str, value: str) -> None:
    """Raises ConfigError for a header that could smuggle another, or that carries a key."""
    if not name.replace("-", "").replace("_", "").isalnum() or not (value.isascii() and value.isprintable()):
        raise ConfigError(f"headers has {name!r}: names are letters, digits and '-', values printable ASCII")
    if name.lower() in ("authorization", "x-api-key", "api-key", "host", "content-length", "transfer-encoding"):
        raise ConfigError(
            f"headers has {name!r}, which is set by the gateway; keys come from the environment (key_env)"
        )
