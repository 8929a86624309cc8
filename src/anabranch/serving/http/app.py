"""Routes of a server, and what is the same for all of them: who may ask, errors in OpenAI's form, metrics and the access log."""

import json
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import unquote

from aiohttp import web

from anabranch import __version__
from anabranch.serving.core.client import Mends
from anabranch.serving.http.adapter_routes import PATH as ADAPTERS
from anabranch.serving.http.adapter_routes import AdapterRoutes, is_operator
from anabranch.serving.http.admin import Admin
from anabranch.serving.http.asked import answered
from anabranch.serving.http.context import RequestContext
from anabranch.serving.http.embeddings import Embeddings
from anabranch.serving.http.frontend import Frontend
from anabranch.serving.http.generate import Generate
from anabranch.serving.http.keys import Keys, is_token
from anabranch.serving.http.openapi import describe
from anabranch.serving.http.stream import SlowReaderError, write
from anabranch.serving.http.tokens import Tokens
from anabranch.serving.ui.page import HEADERS, page
from anabranch.web.answers import wrong_method
from anabranch.web.api_error import ApiError
from anabranch.web.body_room import BodyRoom
from anabranch.web.gate import Gate
from anabranch.web.places import Places
from anabranch.web.server import Connection, Server, check_place, is_beyond

access = logging.getLogger("anabranch.serving.access")
MODELS = "/v1/models/"
Answer = Callable[[RequestContext], Awaitable[web.StreamResponse]]


class App:
    """Answers the requests of one listener.

    Attributes:
    Args:
        frontend: whose engine answers.
        connections: that there may be; None for as many as the config says.
    """

    def __init__(self, frontend: Frontend, connections: int | None = None) -> None:
        self.frontend, self.config, self.metrics = frontend, frontend.config, frontend.metrics
        self._keys = Keys(self.config.api_keys)
        self._gate = Gate(self.config.host, self.config.hosts, self.config.cors_origins, "http.")
        self._generate, self._tokens, self._admin = Generate(frontend), Tokens(frontend), Admin(frontend)
        self._embeddings, self._adapters = Embeddings(frontend), AdapterRoutes(frontend)
        limits, admission = self.config.limits, self.config.admission
        self.places: Places[Connection] = Places(connections or limits.connections, limits.address_share)
        refused = self.metrics.rejections.labels("bodies").inc
        self.room = BodyRoom(limits.bodies_bytes, admission.key_share, admission.status, refused)
        self._created = int(time.time())
        self._asked: set[RequestContext] = set()
        self._open: dict[str, dict[str, Answer]] = {
            "/health/live": {"GET": self._live},
            "/health/ready": {"GET": self._ready},
            # As other servers of models call it.
            "/health": {"GET": self._ready},
            "/metrics": {"GET": self._metrics},
            "/version": {"GET": self._version},
            "/openapi.json": {"GET": self._openapi},
            **({"/": {"GET": self._page}} if self.config.page else {}),
        }
        self._keyed: dict[str, tuple[str, dict[str, Answer]]] = {
            "/v1/models": ("models", {"GET": self._models}),
            "/v1/chat/completions": ("chat", {"POST": lambda context: self._generate.answer(context, "chat")}),
            "/v1/responses": ("responses", {"POST": lambda context: self._generate.answer(context, "responses")}),
            "/v1/completions": ("completions", {"POST": lambda context: self._generate.answer(context, "completions")}),
            "/v1/embeddings": ("embeddings", {"POST": self._embeddings.answer}),
            "/tokenize": ("tokenize", {"POST": self._tokens.tokenize}),
            "/detokenize": ("detokenize", {"POST": self._tokens.detokenize}),
        }

    @property
    def under_way(self) -> int:
        """Requests that are being answered."""
        return len(self._asked)

    @property
    def is_giving(self) -> bool:
        """Whether an answer is being written."""
        return any(context.is_giving for context in self._asked)

    def server(self) -> Server:
        """For `asyncio.loop.create_server`."""
        limits = self.config.limits
        return Server(self, self.refuse, limits.header_timeout_s, self.places, limits.stall_s)

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request."""
        frontend = self.frontend
        context = RequestContext(request, self.config, frontend.apart, frontend.writing, frontend.answers, self.room)
        self._asked.add(context)
        try:
            what = f"{context.request.method} {context.request.path:.80}"
            response = await answered(context, self._answer(context), what)
            context.code = response.status
            if frontend.state == "draining" or is_beyond(request):
                response.force_close()
            if isinstance(response, web.Response) and not response.prepared:
                await write(response, request, self.config.limits.stall_s)
            return response
        except SlowReaderError:
            if request.transport is not None:
                request.transport.abort()
            raise
        finally:
            context.close()
            self._asked.discard(context)
            self.metrics.requests.labels(context.endpoint, str(context.code)).inc()
            self._log(context)

    async def _answer(self, context: RequestContext) -> web.StreamResponse:
        self._gate.check(context.request.headers)
        self._check_place(context.request)
        return context.preflight() or await self._route(context)

    def _check_place(self, request: web.BaseRequest) -> None:
        """Raises ApiError (503) on a connection that there was no place for, for all but the question whether the server lives."""
        if request.path == "/health/live":
            return
        try:
            check_place(request)
        except ApiError:
            self.metrics.rejections.labels("connections").inc()
            raise

    async def _route(self, context: RequestContext) -> web.StreamResponse:
        request = context.request
        path = request.path
        if path in self._open:
            return await _method(context, self._open[path])
        if path.startswith("/v1/admin/"):
            context.endpoint = "admin"
            return await self._admin.answer(context, path[len("/v1/admin/") :])
        if path == ADAPTERS or path.startswith(f"{ADAPTERS}/"):
            context.endpoint = "adapters"
            self._check_operator(context)
            return await self._adapters.answer(context)
        if path in self._keyed:
            context.endpoint, methods = self._keyed[path]
            self._authenticate(context)
            return await _method(context, methods)
        if path.startswith(MODELS):
            context.endpoint = "models"
            self._authenticate(context)
            return await _method(context, {"GET": self._model})
        raise ApiError(404, "not_found", f"there is no {path!r:.80}; GET /openapi.json lists what there is")

    def _check_operator(self, context: RequestContext) -> None:
        """Raises ApiError unless whoever asks may see adapters, or load and unload them where that is asked for."""
        token, bearer = self.config.admin_token, context.bearer
        if context.request.method != "GET":
            is_operator(self.config, bearer)
        elif token is None or not is_token(bearer, token):
            self._authenticate(context)

    def _authenticate(self, context: RequestContext) -> None:
        try:
            context.key = self._keys.name_of(context.bearer)
        except ApiError as error:
            # Nobody without a key may make us read on.
            if not context.request.content.is_eof():
                error.headers["connection"] = "close"
            raise

    def refuse(self, status: int, message: str) -> web.Response:
        """What is no HTTP, or too much of it."""
        self.metrics.requests.labels("other", str(status) if status < 500 else "500").inc()
        if status >= 500:
            error = ApiError(500, "internal_error", "the server failed; its log says how")
        else:
            what = "the request is no HTTP that can be read, or its headers are too large"
            error = ApiError(status, "invalid_http", what)
        return web.json_response(error.to_dict(), status=error.status)

    # Routes

    async def _live(self, context: RequestContext) -> web.StreamResponse:
        if self.frontend.state == "failed":
            raise ApiError(503, "failed", self.frontend.error)
        return context.json({"status": "ok"})

    async def _ready(self, context: RequestContext) -> web.StreamResponse:
        engine = self.frontend.engine
        if isinstance(engine, Mends) and not engine.is_whole:
            what = "a part of the engine has failed and is being replaced; requests wait for it"
            raise ApiError(503, "recovering", what, headers={"Retry-After": "2"})
        return context.json({"status": "ready"})

    async def _version(self, context: RequestContext) -> web.StreamResponse:
        return context.json({"version": __version__})

    async def _metrics(self, context: RequestContext) -> web.StreamResponse:
        self.frontend.picture()
        headers = {**context.headers, "content-type": "text/plain; version=0.0.4; charset=utf-8"}
        return web.Response(body=self.metrics.text(), headers=headers)

    async def _openapi(self, context: RequestContext) -> web.StreamResponse:
        return context.json(describe(__version__, self.config.limits.most_n))

    async def _page(self, context: RequestContext) -> web.StreamResponse:
        return web.Response(
            body=page(), content_type="text/html", charset="utf-8", headers={**HEADERS, **context.headers}
        )

    async def _models(self, context: RequestContext) -> web.StreamResponse:
        names = self.frontend.names if self.frontend.info is not None else ()
        adapters = self.frontend.adapters.all if names else ()
        made = [self._facts(name) for name in (*names, *adapters)]
        return context.json({"object": "list", "data": made})

    async def _model(self, context: RequestContext) -> web.StreamResponse:
        name = unquote(context.request.rel_url.raw_path[len(MODELS) :])
        if self.frontend.info is None or (name not in self.frontend.names and name not in self.frontend.adapters):
            shown = name[:80] if name.isprintable() else "?"
            raise ApiError(404, "model_not_found", f"there is no model {shown!r}; GET /v1/models lists what there is")
        return context.json(self._facts(name))

    def _facts(self, name: str) -> dict[str, Any]:
        info = self.frontend.info
        assert info is not None
        parent = {} if name in self.frontend.names else {"parent": self.frontend.name}
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "anabranch",
            **parent,
            "max_model_len": info.max_positions,
            "routed_layers": {str(at): count for at, count in info.routed_layers.items()},
            **({"tasks": list(info.tasks)} if info.tasks and not parent else {}),
        }

    def _log(self, context: RequestContext) -> None:
        """One line of JSON: what was asked for and how long it took; never what was said, unless the config asks for it."""
        if not self.config.access_log or not access.isEnabledFor(logging.INFO):
            return
        line = {
            "time": round(time.time(), 3),
            "request_id": context.id,
            "method": context.request.method[:20],
            "path": context.request.path[:200],
            "status": context.code,
            "key": context.key,
            "ms": round((time.monotonic() - context.began) * 1000, 1),
            **context.facts,
        }
        access.info("%s", json.dumps(line, ensure_ascii=True))


async def _method(context: RequestContext, methods: dict[str, Answer]) -> web.StreamResponse:
    answer = methods.get(context.request.method)
    if answer is None:
        raise wrong_method(context.request, methods)
    return await answer(context)
