"""Google's Gemini API (``generateContent``) behind OpenAI's: requests, answers, streams and errors, both ways.

`anabranch.gateway.providers.vertex` is the same form under the addresses and tokens of Google Cloud.
"""

import json
import re
from dataclasses import replace
from typing import Any, Literal
from urllib.parse import quote

from anabranch.config import Field, configclass
from anabranch.errors import ConfigError
from anabranch.gateway.providers.error_body import RETRY_AFTER_S
from anabranch.gateway.providers.generate_content import translated
from anabranch.gateway.providers.generated_content import GeminiStream, check_blocked, choice_of, usage_of
from anabranch.gateway.providers.keys import read_key
from anabranch.gateway.providers.openai import unsupported
from anabranch.gateway.providers.plain_chat import plain
from anabranch.gateway.providers.provider import (
    Answer,
    Failure,
    Headers,
    HttpCall,
    Json,
    Provider,
    UpstreamError,
    UpstreamRequest,
    estimated,
    hidden,
    parse_object,
)
from anabranch.gateway.providers.translation import (
    asked,
    check_wire,
    completion,
    embeddings,
    head,
    read,
    texts,
)

MODEL = re.compile(r"(?!.*\.\.)[\w.:@-]+(/[\w.:@-]+)*", re.ASCII)

# Whole sentences, in which nothing is a sender's: there is no word for this in the error itself.
_TOO_LONG = re.compile(
    r"The input token count(?: \(?\d+\)?)? exceeds the maximum number of tokens allowed \(?\d+\)?\.?"
    # Vertex
    r"|Unable to submit request because the input token count is \d+ but model only supports up to \d+\."
    r"(?: Reduce the input token count and try again\..{0,300})?"
)
_REASONS = {"API_KEY_INVALID": "auth", "API_KEY_EXPIRED": "auth", "BILLING_DISABLED": "credit"}


class Gemini(Provider, kind="gemini"):
    """Talks to ``/v1beta/models/NAME:generateContent``."""

    @configclass
    class Config(Provider.Config):
        """Where it is and how it is asked.

        Attributes:
            base_url: without the version.
            key_env: environment variable that holds the key.
            key_file: encrypted file that holds it, read if the variable is not set.
            version: of the API.
            thoughts: ask for summaries of what the model thinks, given as ``reasoning_content``.
            thinking_budget: tokens that it may think for, where the request names no ``reasoning_effort``; 0 for none, -1 as it likes, None
                as the model comes.
            safety: category (``HARM_CATEGORY_...``) to threshold (``BLOCK_...``, ``OFF``).
            headers: to send with each call; no keys here.
            proxy: URL of an HTTP proxy; None connects directly.
        """

        base_url: str | None = "https://generativelanguage.googleapis.com"
        key_env: str | None = "GEMINI_API_KEY"
        key_file: str | None = None
        version: Literal["v1", "v1beta", "v1beta1"] = "v1beta"
        thoughts: bool = False
        thinking_budget: int | None = Field(default=None, ge=-1)
        safety: dict[str, str] = Field(default_factory=dict)
        headers: dict[str, str] = Field(default_factory=dict)
        proxy: str | None = None

        def __post_init__(self) -> None:
            check_wire(self)
            if self.model and not MODEL.fullmatch(self.model):
                raise ConfigError(f"model is {self.model!r}; it must be a name such as gemini-2.5-flash")

    endpoints = ("chat", "embeddings")

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._key = read_key(config.key_env, config.key_file)
        key = {} if self._key is None else {"x-goog-api-key": self._key.reveal()}
        self._headers = {"content-type": "application/json", **config.headers, **key}
        self._at = self._place()

    def _place(self) -> str:
        """The address of the model."""
        return f"{self.config.base_url.rstrip('/')}/{self.config.version}/models/{quote(self.config.model)}"

    def build(self, request: UpstreamRequest) -> HttpCall:
        """The messages in Gemini's form. Raises UpstreamError."""
        if request.endpoint not in self.endpoints:
            raise unsupported(f"{request.endpoint} cannot be asked of {self.kind}")
        with asked():
            if request.endpoint == "embeddings":
                method, body = self._embedding(request)
            else:
                method = "streamGenerateContent?alt=sse" if request.stream else "generateContent"
                given = (
                    plain(request.body, self.config.model, keeps_thoughts=True, keeps_order=True)
                    if request.is_foreign
                    else request.body
                )
                body = translated(given, self.config)
        headers = {**self._headers, **request.headers} if request.headers else self._headers
        return HttpCall(f"{self._at}:{method}", headers, request.dumped(body), self.config.proxy)

    def _embedding(self, request: UpstreamRequest) -> tuple[str, Json]:
        one: Json = {"model": f"models/{self.config.model}"}
        if request.body.get("dimensions"):
            one["outputDimensionality"] = request.body["dimensions"]
        found = [{**one, "content": {"parts": [{"text": text}]}} for text in texts(request, "gemini")]
        return "batchEmbedContents", {"requests": found}

    def parse(self, request: UpstreamRequest, body: bytes) -> Answer:
        """An answer in OpenAI's form. Raises UpstreamError."""
        value = parse_object(body)
        if isinstance(value.get("error"), dict):
            raise self._told(value)
        with read("an answer that is none of Gemini's", body):
            if request.endpoint == "embeddings":
                return self._embedded(request, value, body)
            check_blocked(value)
            told = value.get("usageMetadata")
            choices = [choice_of(at, candidate) for at, candidate in enumerate(value["candidates"])]
            usage, reasoning = usage_of(told) if told else (estimated(request, {"choices": choices}), 0)
            top = head(value.get("responseId"), value.get("modelVersion"), "chat.completion")
            return completion(top, choices, usage, reasoning)

    def _embedded(self, request: UpstreamRequest, value: Json, body: bytes) -> Answer:
        vectors = [one["values"] for one in value["embeddings"]]
        return embeddings(request, body, self.config.model, vectors, None)

    def translator(self, request: UpstreamRequest) -> "GeminiStream":
        """What reads its events."""
        asked_for = request.body.get("n")
        return GeminiStream(self, asked_for if type(asked_for) is int else 1)

    def error(self, status: int, headers: Headers, body: bytes) -> Failure:
        """By its status, and by what Google's details say."""
        failure = super().error(status, headers, _one_error(body))
        if status == 404:
            # Of all that is asked, the address alone says what can be found, and there it is the model.
            failure = replace(failure, kind="missing")
        for detail in _details(body):
            kind = _REASONS.get(str(detail.get("reason")))
            if kind is not None and status in (400, 401, 403):
                failure = replace(failure, kind=kind)  # type: ignore[arg-type]
            if failure.retry_after_s is None and (wait_s := _seconds(detail.get("retryDelay"))) is not None:
                failure = replace(failure, retry_after_s=wait_s)
        if status == 400 and failure.kind == "request" and _TOO_LONG.fullmatch(failure.message):
            failure = replace(failure, kind="context")
        return failure

    def redacted(self, failure: Failure) -> Failure:
        """Without this provider's key."""
        return hidden(failure, None if self._key is None else self._key.reveal())

    def _told(self, value: Json) -> UpstreamError:
        """An error under 200, or in a stream; its code is a status."""
        code = value["error"].get("code")
        status = code if type(code) is int and 400 <= code < 600 else 500
        return UpstreamError(self.error(status, {}, json.dumps(value).encode()))


# Errors


def _one_error(body: bytes) -> bytes:
    """Of a list of errors, which some of its addresses answer with, the first."""
    value = _read(body)
    return json.dumps(value[0]).encode() if isinstance(value, list) and value and isinstance(value[0], dict) else body


def _details(body: bytes) -> list[Json]:
    value = _read(_one_error(body))
    error = value.get("error") if isinstance(value, dict) else None
    details = error.get("details") if isinstance(error, dict) else None
    return [one for one in details if isinstance(one, dict)] if isinstance(details, list) else []


def _seconds(delay: Any) -> float | None:
    """Of a duration such as ``34.07s``."""
    match = re.fullmatch(r"(\d{1,9}(?:\.\d+)?)s", delay) if isinstance(delay, str) else None
    return min(float(match[1]), RETRY_AFTER_S) if match else None


def _read(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return None
