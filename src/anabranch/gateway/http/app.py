"""Routes of a gateway, and what is the same for all of them: errors in the form of its API, and nothing unforeseen reaching a client.

The routes for requests and those for operators are two tables, served on one port or on two.
"""

import asyncio
import logging
import time
from typing import Any

from aiohttp import web

from anabranch import __version__
from anabranch.errors import AnabranchError, CapacityError
from anabranch.gateway.config import GatewayConfig
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.http.access import IS_EARLY, KEY_ID, check_operator
from anabranch.gateway.http.admin import AdminRoutes
from anabranch.gateway.http.cors import for_origin, preflight
from anabranch.gateway.http.exchange import Exchange
from anabranch.gateway.http.messages import MessagesRoutes, messages_error
from anabranch.gateway.http.openai import OpenAIRoutes
from anabranch.gateway.http.openapi import describe
from anabranch.gateway.http.page import PageRoutes
from anabranch.gateway.http.paths import plain
from anabranch.gateway.http.peers import Peers
from anabranch.gateway.http.rate_headers import rate_headers
from anabranch.gateway.http.responses import ResponsesRoutes
from anabranch.gateway.logged_error import words
from anabranch.gateway.metrics_text import labelled
from anabranch.gateway.refusals import unavailable
from anabranch.web.answers import Route, error_response, json_response, wrong_method
from anabranch.web.api_error import ApiError
from anabranch.web.body_beside import TAKEN
from anabranch.web.gate import Gate
from anabranch.web.places import Places
from anabranch.web.server import Connection, Server, check_place, is_beyond

logger = logging.getLogger(__name__)

MODEL, RESPONSE = "/v1/models/", "/v1/responses/"

# Where errors have Anthropic's form, on paths that there are not too, and where a client leaves the /v1 out of its base URL.
MESSAGES = ("/v1/messages/", "/messages/")

# What machines ask, whatever they call this one.
PROBES = frozenset({"/health", "/ready"})

# What is answered even on a connection that there was no place for.
ALIVE = "/health"

# What machines ask all the time.
UNLOGGED = PROBES | {"/metrics"}


class App:
    """Answers requests of one listener.

    Attributes:
        is_stopping: set by who stops the server, for ``/ready``.

    Args:
        gateway: what it talks to.
        public: serve what OpenAI's clients call.
        admin: serve what operators call.
        host: that it listens at. Where that is this machine alone and no key is needed, nothing but the name tells its programs from the
            web pages that it shows.
        places: for connections; None for as many as come.
        on_reload: reads the config again, for ``POST /admin/reload``; None if there is no file to read.
        peers: the other workers; None if this process is the only one.
    """

    def __init__(
        self,
        gateway: Gateway,
        *,
        public: bool = True,
        admin: bool = True,
        host: str = "127.0.0.1",
        places: Places[Connection] | None = None,
        on_reload: Any = None,
        peers: Peers | None = None,
    ) -> None:
        self.gateway, self.is_stopping = gateway, False
        exchange = Exchange(gateway)
        self._openai = OpenAIRoutes(gateway, exchange)
        self._admin = AdminRoutes(gateway, on_reload, peers) if admin else None
        self._public, self._peers, self._host, self._places = public, peers, host, places
        self._gate: tuple[GatewayConfig, Gate] | None = None
        table: dict[str, dict[str, Route]] = {
            "/health": {"GET": self._health},
            "/ready": {"GET": self._ready},
        }
        if public:
            for routes in (self._openai, ResponsesRoutes(gateway, exchange), MessagesRoutes(gateway, exchange)):
                table |= routes.table()
            table["/openapi.json"] = {"GET": self._openapi}
        self._clients = frozenset(table)
        if admin:
            table |= {**PageRoutes(gateway).table(), "/metrics": {"GET": self._metrics}}
        self._table = table
        self._description: dict[str, Any] | None = None

    def server(self) -> Server:
        """For `asyncio.loop.create_server`."""
        return Server(self, self.refuse, self.gateway.config.limits.header_timeout_s, self._places)

    async def __call__(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request."""
        observers = self.gateway.observers
        if not observers.has_access_log or self._known(request.path) in UNLOGGED:
            return await self._for_pages(request)
        began, time_s = time.perf_counter(), time.time()
        response = await self._for_pages(request)
        # The others are requests of models, which say more of themselves.
        id = response.headers.get("x-request-id", "")
        if not id or response.get(IS_EARLY):
            what = f"{request.method[:16]} {request.path}"
            observers.refused(
                what,
                response.status,
                id=id,
                key_id=request.get(KEY_ID, ""),
                time_s=time_s,
                latency_s=time.perf_counter() - began,
            )
        return response

    async def _for_pages(self, request: web.BaseRequest) -> web.StreamResponse:
        origins = self.gateway.config.cors_origins
        if not origins or "origin" not in request.headers or not self._is_public(request.path):
            return await self._answer(request)
        response: web.StreamResponse | None = preflight(origins, request)
        if response is None:
            response = await self._answer(request)
            if not response.prepared:
                response.headers.update(for_origin(origins, request, response.headers))
        return response

    def _is_public(self, path: str) -> bool:
        """It is for clients, and not for operators."""
        found = self._known(path)
        return self._public and (found in self._clients or found.startswith(MODEL))

    def _check_sender(self, request: web.BaseRequest) -> None:
        """Raises ApiError (403) for a page that would use what needs no key. Operators' routes look for themselves (`access`)."""
        config = self.gateway.config
        if config.require_key or self._known(request.path) in PROBES or not self._is_public(request.path):
            return
        if self._gate is None or self._gate[0] is not config:
            self._gate = config, Gate(self._host, config.hosts, config.cors_origins)
        try:
            self._gate[1].check(request.headers)
        except ApiError as error:
            self.gateway.metrics.refuse(error.code)
            if not request.content.is_eof():
                error.headers["connection"] = "close"
            raise

    def _check_place(self, request: web.BaseRequest) -> None:
        """Raises ApiError (503) on a connection that there was no place for, for all but the question whether this process lives."""
        if self._known(request.path) == ALIVE:
            return
        try:
            check_place(request)
        except ApiError as error:
            self.gateway.metrics.refuse(error.code)
            raise

    async def _answer(self, request: web.BaseRequest) -> web.StreamResponse:
        response = await self._of_route(request)
        if not response.prepared:
            response.headers.update(rate_headers(self.gateway, request))
        if request.get(TAKEN) or is_beyond(request):
            response.force_close()
        return response

    async def _of_route(self, request: web.BaseRequest) -> web.StreamResponse:
        path = self._known(request.path)
        # Of what is refused before its route is asked too.
        refused = messages_error if f"{path}/".startswith(MESSAGES) else error_response
        try:
            self._check_place(request)
            self._check_sender(request)
            methods = self._table.get(path)
            if methods is not None:
                # A look at the headers alone: of its answer nothing else is sent.
                route = methods.get("GET" if request.method == "HEAD" else request.method)
                if route is None:
                    raise wrong_method(request, methods)
                return await route(request)
            return await self._longer(request)
        except ApiError as error:
            response = refused(error)
            # No request of a model has begun: that would have given it an id.
            response[IS_EARLY] = "x-request-id" not in error.headers
            if error.headers.get("connection") == "close":
                response.force_close()
            return response
        except CapacityError as error:
            return _early(refused(unavailable(error)))
        except AnabranchError as error:
            # An argument that the store or the config refuses.
            return _early(refused(ApiError(400, "invalid_value", words(error))))
        except (asyncio.CancelledError, ConnectionError):
            raise
        except Exception as error:
            # A bug of ours: the log says what, the client only that.
            logger.error("a bug: %s %.80s: %s", request.method, request.path, type(error).__name__, exc_info=error)
            return refused(ApiError(500, "internal_error", "the gateway failed; its log says how"))

    def _known(self, path: str) -> str:
        """A path as the table has it: `plain`, without a slash at the end, with the ``/v1`` that a client may leave out of its base URL."""
        found = plain(path.rstrip("/") or path)
        return found if found in self._table or not self._public or f"/v1{found}" not in self._table else f"/v1{found}"

    def refuse(self, status: int, message: str) -> web.Response:
        """What is no HTTP, or too much of it."""
        self.gateway.metrics.refuse("invalid_http")
        if status >= 500:
            return error_response(ApiError(500, "internal_error", "the gateway failed; its log says how"))
        return error_response(
            ApiError(status, "invalid_http", "the request is no HTTP that can be read, or its headers are too large")
        )

    async def _longer(self, request: web.BaseRequest) -> web.StreamResponse:
        """Paths with a name in them."""
        path = plain(request.path)
        if self._public and path.startswith(MODEL):
            if request.method not in ("GET", "HEAD"):
                raise wrong_method(request, {"GET": None})
            return await self._openai.model(request, path[len(MODEL) :])
        if self._public and path.startswith(RESPONSE):
            message = (
                "no response is kept here, so that none can be asked for again; send all of a conversation in input"
            )
            raise ApiError(404, "not_found", message)
        if self._admin is not None and path.startswith("/admin/"):
            return await self._admin.answer(request)
        self.gateway.metrics.refuse("not_found")
        raise ApiError(404, "not_found", f"there is no {request.path!r:.80}; GET /openapi.json lists what there is")

    async def _health(self, request: web.BaseRequest) -> web.StreamResponse:
        return json_response({"status": "ok"})

    async def _ready(self, request: web.BaseRequest) -> web.StreamResponse:
        if self.is_stopping:
            raise ApiError(503, "stopping", "the server is stopping", headers={"Retry-After": "5"})
        if not self.gateway.is_loaded:
            raise ApiError(503, "loading", "a model is being loaded", headers={"Retry-After": "2"})
        if names := self.gateway.runtime.given_up:
            message = f"the engine of {', '.join(names)} has died too often and was given up; reload the config, or start anew"
            raise ApiError(503, "failed", message)
        return json_response({"status": "ready", "models": len(self.gateway.config.models)})

    async def _metrics(self, request: web.BaseRequest) -> web.StreamResponse:
        await check_operator(self.gateway, request, local=True)
        body = self.gateway.metrics_text()
        if self._peers is not None:
            body = labelled({self._peers.seat.index: body, **await self._peers.ask("metrics")})
        return web.Response(body=body, headers={"content-type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _openapi(self, request: web.BaseRequest) -> web.StreamResponse:
        if self._description is None:
            self._description = describe(__version__, self.gateway.config.limits.most_tokens)
        return json_response(self._description)


def _early(response: web.Response) -> web.Response:
    """The answer to what is no request of a model, or none yet."""
    response[IS_EARLY] = True
    return response
