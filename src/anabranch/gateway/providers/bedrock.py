"""Amazon Bedrock's Converse API behind OpenAI's: requests, answers, streams and errors, both ways; and embeddings of Titan and Cohere.

with a key         ``key_env``, or ``AWS_BEARER_TOKEN_BEDROCK``: a Bedrock API key, sent as it is
else               Signature Version 4, by ``botocore`` (the extra ``bedrock``): named variables, a profile, or what the machine has
"""

import json
import os
import re
from collections import deque
from dataclasses import replace
from typing import Any
from urllib.parse import quote

from anabranch.config import Field, configclass
from anabranch.errors import ConfigError
from anabranch.extras import require
from anabranch.gateway.providers import converse, conversed
from anabranch.gateway.providers.authorized import Authorized
from anabranch.gateway.providers.converse import ERRORS, TOO_LONG
from anabranch.gateway.providers.conversed import ConverseStream
from anabranch.gateway.providers.error_body import TELLING_KEY
from anabranch.gateway.providers.eventstream import EventStream
from anabranch.gateway.providers.keys import UpstreamKey, read_key
from anabranch.gateway.providers.openai import unsupported
from anabranch.gateway.providers.plain_chat import plain
from anabranch.gateway.providers.provider import (
    Answer,
    Failure,
    Headers,
    HttpCall,
    Json,
    Provider,
    Transport,
    UpstreamError,
    UpstreamRequest,
    hidden,
    parse_object,
)
from anabranch.gateway.providers.reframed import Reframed
from anabranch.gateway.providers.translation import asked, check_place, check_wire, count, embeddings, read, texts

KEY = "AWS_BEARER_TOKEN_BEDROCK"


class Bedrock(Provider, kind="bedrock"):
    """Talks to ``/model/ID/converse`` and ``/model/ID/converse-stream``, and of models that embed to ``/model/ID/invoke``."""

    caches_unasked = False

    @configclass
    class Config(Provider.Config):
        """Where it is and as whom it is asked.

        Attributes:
            model: id of a model or inference profile, or its ARN.
            region: None takes that of ``AWS_REGION`` or ``AWS_DEFAULT_REGION``.
            base_url: None for that of the region.
            key_env: environment variable that holds a Bedrock API key; None takes ``AWS_BEARER_TOKEN_BEDROCK`` if that is set.
            key_file: encrypted file that holds it, read if the variable is not set.
            access_key_env, secret_key_env, session_token_env: environment variables that hold credentials to sign with; None takes what
                ``botocore`` finds: its own variables, a profile, a role of the machine.
            profile: of the files of AWS.
            fields: ``additionalModelRequestFields`` of each request: what only this model knows.
            guardrail: ``guardrailConfig`` of each request.
            headers: to send with each call; no keys here.
            proxy: URL of an HTTP proxy; None connects directly.
        """

        region: str | None = None
        base_url: str | None = None
        key_env: str | None = None
        key_file: str | None = None
        access_key_env: str | None = None
        secret_key_env: str | None = None
        session_token_env: str | None = None
        profile: str | None = None
        fields: dict[str, Any] = Field(default_factory=dict)
        guardrail: dict[str, str] = Field(default_factory=dict)
        headers: dict[str, str] = Field(default_factory=dict)
        proxy: str | None = None

        def __post_init__(self) -> None:
            check_wire(self)
            check_place("region", self.region)
            if self.model in (".", "..") or not self.model.isprintable() or not _is_utf8(self.model):
                raise ConfigError(f"model is {self.model!r}; it must be an id or an ARN")
            if (self.access_key_env is None) != (self.secret_key_env is None):
                raise ConfigError("access_key_env and secret_key_env are given together or not at all")

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.endpoints = ("embeddings",) if "embed" in config.model else ("chat",)  # type: ignore[misc]
        self._region = _region(config)
        self._key = _key(config)
        self._signer = _Signer(config, self._region) if self._key is None else None
        bearer = {} if self._key is None else {"authorization": f"Bearer {self._key.reveal()}"}
        self._headers = {"content-type": "application/json", **config.headers, **bearer}
        domain = "amazonaws.com.cn" if self._region.startswith("cn-") else "amazonaws.com"
        base = (config.base_url or f"https://bedrock-runtime.{self._region}.{domain}").rstrip("/")
        # As botocore writes it: what is signed must be what is sent.
        self._at = f"{base}/model/{quote(config.model, safe='')}"

    def build(self, request: UpstreamRequest) -> HttpCall:
        """The messages in Converse's form, not signed yet. Raises UpstreamError."""
        if request.endpoint not in self.endpoints:
            raise unsupported(f"{request.endpoint} cannot be asked of bedrock's {self.config.model}")
        with asked():
            if request.endpoint == "embeddings":
                method, body = "invoke", _embedding(request, self.config.model)
            else:
                method = "converse-stream" if request.stream else "converse"
                # Claude takes all that Anthropic's own form says; others what is said in OpenAI's words.
                is_plain = request.is_foreign and not converse.is_claude(self.config.model)
                given = plain(request.body, self.config.model, keeps_order=True) if is_plain else request.body
                body = converse.translated(given, self.config)
        headers = {**self._headers, **request.headers} if request.headers else self._headers
        return HttpCall(f"{self._at}/{method}", headers, request.dumped(body), self.config.proxy)

    def parse(self, request: UpstreamRequest, body: bytes) -> Answer:
        """An answer in OpenAI's form. Raises UpstreamError (``garbage``)."""
        value = parse_object(body)
        with read("an answer that is none of Converse's", body):
            if request.endpoint == "embeddings":
                return _embedded(request, value, body, self.config.model)
            return conversed.answer(value, self.config.model, self._forces_json(request))

    def translator(self, request: UpstreamRequest) -> ConverseStream:
        """What reads its events."""
        return ConverseStream(self, self._forces_json(request))

    def _forces_json(self, request: UpstreamRequest) -> bool:
        with asked():
            return converse.forces_json(request.body, self.config.model)

    def error(self, status: int, headers: Headers, body: bytes) -> Failure:
        """By the name of the exception, in a header or the body, else by the status."""
        named = headers.get("x-amzn-errortype") or _type(body)
        return self.redacted(told(super().error(status, headers, body), named))

    def redacted(self, failure: Failure) -> Failure:
        """Without this provider's key, and without what calls are signed with: AWS quotes what it would have signed itself."""
        if self._signer is not None:
            failure = replace(failure, message=self._signer.hide(failure.message))
        return hidden(failure, None if self._key is None else self._key.reveal())

    def transport(self, http: Transport) -> Transport:
        """HTTP, whose event streams come as server-sent events; signed, where there is no key."""
        if self._signer is not None:
            require("bedrock", by="the provider bedrock")
            http = Authorized(http, self._signer.headers)
        return Reframed(http, "application/vnd.amazon.eventstream", EventStream)


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _region(config: Any) -> str:
    """Raises ConfigError if none is named anywhere."""
    found = config.region or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if not found:
        raise ConfigError("region is not set; set it, or the environment variable AWS_REGION")
    check_place("region", found)
    return str(found)


def _key(config: Any) -> UpstreamKey | None:
    if config.key_env is not None or config.key_file is not None:
        return read_key(config.key_env, config.key_file)
    signs = config.access_key_env is not None or config.profile is not None
    return read_key(KEY, None) if not signs and os.environ.get(KEY) else None


def _type(body: bytes) -> Any:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return None
    return value.get("__type") if isinstance(value, dict) else None


def told(failure: Failure, named: Any) -> Failure:
    """``failure`` with what the exception that it was ``named`` means."""
    if not isinstance(named, str) or not named:
        return failure
    # ThrottlingException:http://internal.amazon.com/... or com.amazon.coral.service#ThrottlingException
    name = named.partition(":")[0].rpartition("#")[2][:100]
    known = ERRORS.get(name[:1].upper() + name[1:])
    if known is not None:
        kind, status = known
        failure = replace(failure, kind=kind, status=status)
    if failure.kind == "request" and TOO_LONG.fullmatch(failure.message):
        failure = replace(failure, kind="context")
    return replace(failure, type=name)


# Signatures

# Whatever stands behind these names is nobody else's, whosever it is.
_SIGNED = re.compile(
    r"(?i)(x-amz-security-token[\"']?\s*[:=]\s*[\"']?|x-amz-signature[\"']?\s*[:=]\s*[\"']?|\bsignature=|\bcredential=|"
    r"session ?token[\"']?\s*[:=]\s*[\"']?)[^\s,;&\"'\\]+"
)
# Line ends of a text within a text, which are of no piece; ids of keys; and pieces that are long enough to be told as one of a key.
_PIECE = re.compile(r"\\[nrt]|\b(?:AKIA|ASIA)[A-Z0-9]{12,}|[A-Za-z0-9+/=_-]{12,}")
_HASH = re.compile(r"[0-9a-f]{64}|(?:AKIA|ASIA)[A-Z0-9]{12,}")


class _Signer:
    """Signs calls; `headers` runs in one thread at a time."""

    def __init__(self, config: Any, region: str) -> None:
        self._config, self._region = config, region
        self._credentials: Any = None
        # What the last calls were signed with: an answer may be to one before the last change of credentials.
        self._used: deque[str] = deque(maxlen=6)

    def hide(self, text: str) -> str:
        """``text`` without signatures, tokens and ids of keys, and without any longer piece of those that were used here."""
        used = tuple(self._used)
        text = _SIGNED.sub(lambda found: found[1] + "[key]", text)

        def piece(found: re.Match[str]) -> str:
            is_told = any(found[0] in one or one in found[0] for one in used)
            return "[key]" if is_told or _HASH.fullmatch(found[0]) else found[0]

        return _PIECE.sub(piece, text)

    def headers(self, call: HttpCall) -> Headers:
        """Signature, date and session of one call. Raises UpstreamError."""
        from botocore.auth import SigV4Auth
        from botocore.awsrequest import AWSRequest
        from botocore.exceptions import BotoCoreError

        try:
            if self._credentials is None:
                self._credentials = self._found()
            if self._credentials is None:
                raise _unsigned("no credentials of AWS are found to sign with")
            frozen = self._credentials.get_frozen_credentials()
            for one in (frozen.access_key, frozen.secret_key, frozen.token):
                if one and len(one) >= TELLING_KEY and one not in self._used:
                    self._used.append(one)
            asked = AWSRequest("POST", call.url, {"content-type": call.headers["content-type"]}, call.body)
            SigV4Auth(frozen, "bedrock", self._region).add_auth(asked)
        except BotoCoreError as error:
            # Its texts name files and profiles, not keys.
            raise _unsigned(f"AWS gives out no credentials to sign with ({type(error).__name__})") from None
        names = ("Authorization", "X-Amz-Date", "X-Amz-Security-Token")
        return {name.lower(): asked.headers[name] for name in names if name in asked.headers}

    def _found(self) -> Any:
        config = self._config
        if config.access_key_env is not None:
            from botocore.credentials import Credentials

            access, secret = _variable(config.access_key_env), _variable(config.secret_key_env)
            token = config.session_token_env
            return Credentials(access, secret, None if token is None else _variable(token))
        from botocore.session import Session

        return Session(profile=config.profile).get_credentials()


def _variable(name: str) -> str:
    value = os.environ.get(name, "").strip()
    if not value:
        raise _unsigned(f"the environment variable {name} is not set")
    return value


def _unsigned(message: str) -> UpstreamError:
    return UpstreamError(Failure(kind="auth", message=message))


# Embeddings


def _embedding(request: UpstreamRequest, model: str) -> Json:
    found, size = texts(request, "bedrock"), request.body.get("dimensions")
    if "cohere" in model:
        body: Json = {"texts": found, "input_type": request.body.get("input_type") or "search_document"}
        return body | ({"output_dimension": size} if size else {})
    if len(found) != 1:
        raise unsupported("bedrock's Titan embeds one text a request; send each alone")
    return {"inputText": found[0]} | ({"dimensions": size} if size else {})


def _embedded(request: UpstreamRequest, value: Json, body: bytes, model: str) -> Answer:
    if "cohere" not in model:
        told_prompt = value.get("inputTextTokenCount")
        prompt = None if told_prompt is None else count(told_prompt)
        return embeddings(request, body, model, [value["embedding"]], prompt)
    vectors = value["embeddings"]
    # By type where a type was asked for, as the newer models answer.
    return embeddings(request, body, model, vectors["float"] if isinstance(vectors, dict) else vectors, None)
