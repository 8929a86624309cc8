"""Gemini on Google Cloud's Vertex AI: the form of `anabranch.gateway.providers.gemini` with projects, regions, and tokens that expire.

with a project         tokens by ``google-auth`` (the extra ``vertex``): a credentials file, or what the machine has
with ``key_env``       a key of Vertex AI in express mode, or of an account bound to a key; no project is named then
"""

import json
import logging
import os
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from anabranch.config import configclass
from anabranch.errors import ConfigError
from anabranch.extras import require
from anabranch.gateway.providers.authorized import Authorized
from anabranch.gateway.providers.gemini import Gemini
from anabranch.gateway.providers.provider import (
    Answer,
    Failure,
    Headers,
    HttpCall,
    Json,
    Transport,
    UpstreamError,
    UpstreamRequest,
)
from anabranch.gateway.providers.translation import check_place, count, embeddings, texts

logger = logging.getLogger(__name__)
SCOPE = "https://www.googleapis.com/auth/cloud-platform"


class Vertex(Gemini, kind="vertex"):
    """Talks to Vertex AI."""

    @configclass
    class Config(Gemini.Config):
        """Where it is and as whom it is asked.

        Attributes:
            model: a model of Google's, such as ``gemini-2.5-flash``, or ``endpoints/ID`` for a tuned one.
            project: id of the project; None takes that of ``GOOGLE_CLOUD_PROJECT``, or of the credentials file.
            location: region, or ``global``.
            base_url: None for that of the region.
            credentials_file: JSON of a service account, a user or a federated identity; None for the machine's own (Application Default
                Credentials).
            credentials_env: environment variable that holds that JSON, or the path of its file.
            key_env: environment variable that holds a key of express mode; None signs in with credentials.
        """

        base_url: str | None = None
        key_env: str | None = None
        version: Literal["v1", "v1beta", "v1beta1"] = "v1"
        project: str | None = None
        location: str = "us-central1"
        credentials_file: str | None = None
        credentials_env: str | None = None

        def __post_init__(self) -> None:
            super().__post_init__()
            check_place("location", self.location)
            check_place("project", self.project)

    def __init__(self, config: Any) -> None:
        self._has_key = config.key_env is not None or config.key_file is not None
        super().__init__(config)
        self._tokens = _Tokens(config)

    def _place(self) -> str:
        config, where = self.config, self.config.location
        host = (
            "aiplatform.googleapis.com" if where == "global" or self._has_key else f"{where}-aiplatform.googleapis.com"
        )
        base = f"{(config.base_url or 'https://' + host).rstrip('/')}/{config.version}"
        model = quote(config.model)
        if self._has_key and config.project is None:
            return f"{base}/publishers/google/models/{model}"
        at = f"{base}/projects/{_project(config)}/locations/{where}"
        return f"{at}/{model}" if model.startswith("endpoints/") else f"{at}/publishers/google/models/{model}"

    def _embedding(self, request: UpstreamRequest) -> tuple[str, Json]:
        body: Json = {"instances": [{"content": text} for text in texts(request, "vertex")]}
        if request.body.get("dimensions"):
            body["parameters"] = {"outputDimensionality": request.body["dimensions"]}
        return "predict", body

    def _embedded(self, request: UpstreamRequest, value: Json, body: bytes) -> Answer:
        found = [one["embeddings"] for one in value["predictions"]]
        told = [int((one.get("statistics") or {}).get("token_count", -1)) for one in found]
        prompt = None if min(told, default=-1) < 0 else count(sum(told))
        return embeddings(request, body, self.config.model, [one["values"] for one in found], prompt)

    def transport(self, http: Transport) -> Transport:
        """HTTP, with a token on each call that has no key."""
        if self._has_key:
            return http
        require("vertex", by="the provider vertex")
        return Authorized(http, self._tokens.headers, self._tokens.forget)


def _project(config: Any) -> str:
    """Raises ConfigError if none is named anywhere."""
    found = config.project or os.environ.get("GOOGLE_CLOUD_PROJECT")
    if not found and (config.credentials_file or config.credentials_env):
        found = _credentials(config).get("project_id")
    if not found:
        raise ConfigError("project is not set; set it, or the environment variable GOOGLE_CLOUD_PROJECT")
    check_place("project", found)
    return str(found)


def _credentials(config: Any) -> Json:
    """The JSON that the config points to. Raises ConfigError, which shows nothing of it."""
    text, where = "", f"credentials_file {config.credentials_file!r}"
    path = config.credentials_file
    if path is None:
        where = f"the environment variable {config.credentials_env}"
        text = os.environ.get(config.credentials_env, "").strip()
        if not text:
            raise ConfigError(f"{where} is not set; it is to hold Google's credentials, or the path of their file")
        path = None if text.startswith("{") else text
    try:
        value = json.loads(text if path is None else Path(path).read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{where} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ConfigError(f"{where} is no JSON of Google's credentials") from None
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        raise ConfigError(f"{where} is no JSON of Google's credentials (it has no type)")
    return value


class _Tokens:
    """Of one identity; `headers` runs in one thread at a time."""

    def __init__(self, config: Any) -> None:
        self._config = config
        self._credentials: Any = None

    def headers(self, call: HttpCall) -> Headers:
        """With a token that is good for some minutes more. Raises UpstreamError."""
        from google.auth.exceptions import GoogleAuthError, TransportError

        try:
            if self._credentials is None:
                self._credentials = self._loaded()
            if not self._credentials.valid:
                from google.auth.transport.requests import Request

                self._credentials.refresh(Request())
            return {"authorization": f"Bearer {self._credentials.token}"}
        except TransportError as error:
            raise _refused("connect", "no connection to where Google gives out tokens", error) from None
        except (GoogleAuthError, ValueError, ConfigError) as error:
            raise _refused("auth", "Google gives out no token for these credentials", error) from None

    def forget(self) -> None:
        """The token was revoked: the next call gets another."""
        if self._credentials is not None:
            self._credentials.token = None

    def _loaded(self) -> Any:
        config = self._config
        if config.credentials_file is None and config.credentials_env is None:
            import google.auth

            return google.auth.default(scopes=[SCOPE])[0]
        given = _credentials(config)
        if given["type"] == "service_account":
            from google.oauth2 import service_account

            return service_account.Credentials.from_service_account_info(given, scopes=[SCOPE])
        if given["type"] == "authorized_user":
            from google.oauth2.credentials import Credentials

            return Credentials.from_authorized_user_info(given, scopes=[SCOPE])
        from google.auth import load_credentials_from_dict

        return load_credentials_from_dict(given, scopes=[SCOPE])[0]


def _refused(kind: Any, message: str, error: Exception) -> UpstreamError:
    """The log says why; whoever asked need not know."""
    logger.warning("%s (%s: %s)", message, type(error).__name__, str(error)[:200])
    return UpstreamError(Failure(kind=kind, message=message))
