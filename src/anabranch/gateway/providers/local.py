"""Our own engine within the gateway's process: a model is loaded when the gateway starts, and asked without a socket.

    provider = { kind = "local", model = "runs/demo", engine = { memory = "4GiB", quantize = "int8" } }

Deployments that name the same model with the same options share one engine, also across a reload. What the gateway knows of who asks goes
with each call, so that keys take turns in the engine, and one does not find in its prefix cache what another has asked.

This module imports nothing of `anabranch.serving` until a model is named: a gateway without one needs no torch.
"""

import asyncio
import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anabranch.config import Field, configclass, from_dict, to_dict
from anabranch.errors import ConfigError
from anabranch.extras import require
from anabranch.gateway.providers.local_engines import Lent, local_engines
from anabranch.gateway.providers.openai import PATHS, unsupported
from anabranch.gateway.providers.plain_chat import plain
from anabranch.gateway.providers.provider import (
    Failure,
    FailureKind,
    Headers,
    HttpCall,
    Provider,
    Reply,
    Transport,
    UpstreamError,
    UpstreamRequest,
    Usage,
)
from anabranch.web.api_error import ApiError
from anabranch.web.turns import in_thread

if TYPE_CHECKING:
    from anabranch.serving.http.inside import Inside, InsideReply, Kind
    from anabranch.serving.http.inside_config import InsideConfig

logger = logging.getLogger(__name__)

# What the engine says of a request that it does not answer, by `code`, where its status does not say it.
_KINDS: dict[str, FailureKind] = {
    # It has as much to do as it may.
    "overloaded": "busy",
    "busy": "busy",
    "loading": "busy",
    # This request alone came to nothing, while others go on: whoever asks may bring that about.
    "request_failed": "excess",
    "not_supported": "unsupported",
}
# Of a call: how long an answer may be whose sender names no end.
_DEFAULT = "x-default-tokens"
# A prompt that is not counted in so many seconds is taken for the longest there is.
COUNT_S = 5.0
LOADING = Failure(kind="busy", message="the model is being loaded", status=503, code="loading", retry_after_s=2.0)


class Local(Provider, kind="local"):
    """Runs a model by our engine."""

    stops_when_closed = True
    is_billed = False
    makes_on = False
    is_inside = True
    endpoints = ("chat", "completions", "embeddings")

    @configclass
    class Config(Provider.Config):
        """Which model, and how the engine runs it. Tables and fields are those of ``anabranch serve``.

        Attributes:
            model: path of a training run, a saved model, a Hugging Face folder or a ``.gguf`` file.
            engine: fields of `anabranch.serving.config.ServingConfig`, such as ``memory``, ``quantize``, ``threads`` or ``kv_memory``;
                ``name`` is what answers call the model, else the last part of the path. Unlike there, ``process`` is false: the engine is a
                thread of the gateway. True gives it a process of its own, beside the gateway's.
            admission: fields of `anabranch.serving.core.admission.AdmissionConfig`: how many requests it takes, and lets wait.
            reasoning_format, tool_format: how the model says what it thinks and calls; ``auto`` by its chat template.
            restarts: how often an engine that has died is started again before it is given up.
        """

        engine: dict[str, Any] = Field(default_factory=dict)
        admission: dict[str, Any] = Field(default_factory=dict)
        reasoning_format: str = "auto"
        tool_format: str = "auto"
        restarts: int = Field(default=3, ge=0)

        def __post_init__(self) -> None:
            if not self.model:
                raise ConfigError("model is ''; give the folder or file of a model")
            if "model" in self.engine:
                raise ConfigError("engine has 'model'; the model's path is the provider's own field model")

        def check(self, *, reads_model: bool = False) -> None:
            """See `Provider.Config.check`."""
            config = self.inside()
            if not Path(self.model).exists():
                raise ConfigError(
                    f"model is {self.model!r}, and there is no such file or folder (nothing is downloaded)"
                )
            if reads_model:
                config.check()

        @property
        def called(self) -> str:
            """What the engine and its answers call the model."""
            return self.engine.get("name") or Path(self.model).name or "model"

        def inside(self) -> "InsideConfig":
            """What the engine is made from. Raises MissingExtraError without the extra ``serve``, and ConfigError for wrong options."""
            require("serve", by='a provider of kind = "local"')
            from anabranch.serving.http.inside_config import InsideConfig

            fields = {name: value for name, value in to_dict(self).items() if name in to_dict(InsideConfig())}
            engine = {"process": False, **self.engine, "model": self.model, "name": self.called}
            return from_dict(InsideConfig, {**fields, "engine": engine})

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self._name: str = config.called
        self._lent: Lent | None = None
        self._of = ""

    def build(self, request: UpstreamRequest) -> HttpCall:
        """The sender's body under the engine's name of the model, to nowhere."""
        if request.endpoint not in self.endpoints:
            raise unsupported(f"{request.endpoint} cannot be asked of {self.kind}")
        body, bound = request.body, request.bound
        if request.is_foreign and request.endpoint == "chat":
            body = plain(body, self._name)
        if bound is not None:
            # The engine knows what room the prompt leaves, and refuses more than that where it is asked for.
            body = {name: value for name, value in body.items() if name != "max_tokens"}
        if body is not request.body:
            request = request.asking(body)
        headers = {} if bound is None else {_DEFAULT: str(bound)}
        return HttpCall(PATHS[request.endpoint], headers, request.encoded(self._name, True))

    def error(self, status: int, headers: Headers, body: bytes) -> Failure:
        """What an answer that is not 2xx means: the engine's own words say more than the status."""
        failure = super().error(status, headers, body)
        kind = _KINDS.get(failure.code or "")
        if kind is None:
            return failure
        # As clients know it of any upstream.
        code = "rate_limit_exceeded" if kind == "busy" and status == 429 else failure.code
        return replace(failure, kind=kind, code=code)

    def transport(self, http: Transport) -> Transport:
        """A call of the engine."""
        return _Call(self)

    async def start(self) -> None:
        """Load the model, or join those who have it. Raises AnabranchError."""
        config, began = self.config.inside(), time.monotonic()
        # Which brings torch: that takes seconds, for which the loop has better use.
        make = await in_thread(_engine_class)
        made_from = to_dict(config)
        made_from["engine"]["model"] = os.path.realpath(self.config.model)
        self._of = json.dumps(made_from, sort_keys=True)
        self._lent = await local_engines().lend(self._of, lambda: make(config))
        logger.info("%s is ready after %.1f s", self.config.model, time.monotonic() - began)
        inside = self._lent.inside
        info, reader = inside.frontend.info, inside.frontend.reader
        assert info is not None, "it has started"
        assert reader is not None, "it has started"
        self.context, self.series = info.max_positions, inside.metrics_text
        self.counter = lambda text: len(reader.tokenizer.encode(text))
        self.prompt_tokens = self._prompt_tokens

    async def _prompt_tokens(self, call: HttpCall) -> int | None:
        """See `Provider.prompt_tokens`: by the engine's own reader, in its threads. Where that is too busy to say, the most it reads."""
        assert self._lent is not None, "it has started"
        try:
            async with asyncio.timeout(COUNT_S):
                return await self._lent.inside.count(_ENDPOINTS[call.url], call.body, key=call.sender)
        except TimeoutError:
            return self.context
        except ApiError as error:
            return self.context if error.status == 429 or error.status >= 500 else None

    @property
    def has_failed(self) -> bool:
        """See `Provider`: the engine has died more often than it may."""
        return self._lent is not None and self._lent.inside.has_failed

    async def close(self) -> None:
        """Give the engine back."""
        lent, self._lent = self._lent, None
        if lent is not None:
            await local_engines().give_back(self._of, lent)

    async def ask(self, call: HttpCall) -> Reply:
        """The engine's answer. Raises UpstreamError (``busy``) before it is loaded."""
        if self._lent is None:
            raise UpstreamError(LOADING)
        default, kind = call.headers.get(_DEFAULT), _ENDPOINTS[call.url]
        told: Callable[[int, int, int], None] | None = None
        if kind != "embeddings":
            made = call.made = asyncio.get_running_loop().create_future()

            def told(prompt: int, completion: int, cached: int) -> None:
                if not made.done():
                    made.set_result(Usage(prompt, completion, cached))

        reply = await self._lent.inside.ask(
            kind,
            call.body,
            key=call.sender,
            default_tokens=None if default is None else int(default),
            on_end=told,
        )
        return _Reply(self, reply)


def _engine_class() -> "type[Inside]":
    from anabranch.serving.http.inside import Inside

    return Inside


_ENDPOINTS: "dict[str, Kind]" = {PATHS[name]: name for name in ("chat", "completions", "embeddings")}


class _Reply:
    """The engine's answer."""

    def __init__(self, provider: Local, reply: "InsideReply") -> None:
        self._provider, self._reply = provider, reply
        self.status, self.headers = reply.status, reply.headers

    def read_ready(self) -> bytes:
        """See `anabranch.gateway.providers.http_call.Reply`."""
        return self._reply.read_ready()

    async def read_some(self) -> bytes:
        """See there."""
        try:
            return await self._reply.read_some()
        except ApiError as error:
            headers = {name.lower(): value for name, value in error.headers.items()}
            body = json.dumps(error.to_dict()).encode()
            raise UpstreamError(self._provider.error(error.status, headers, body)) from None

    def close(self) -> None:
        """See there."""
        self._reply.close()


class _Call:
    """Carries calls to the engine."""

    def __init__(self, provider: Local) -> None:
        self._provider = provider

    async def open(self, call: HttpCall) -> Reply:
        """Ask, and wait for the status."""
        return await self._provider.ask(call)
