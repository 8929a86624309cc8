"""The ASGI application: routes, and what is the same for all of them (limits, errors, metrics)."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from anabranch.errors import AnabranchError, CapacityError, DataError
from anabranch.graph.serve.answer_room import AnswerRoom
from anabranch.graph.serve.answers import answer_ppr, answer_search
from anabranch.graph.serve.gate import FullError, Gate, LateError, Steps
from anabranch.graph.serve.limits import Limits
from anabranch.graph.serve.metrics import Metrics
from anabranch.graph.serve.openapi import STARTS, describe
from anabranch.graph.serve.requests import RequestError, parse, read_ppr, read_search
from anabranch.graph.serve.senders import check_sender
from anabranch.graph.serve.sources import Loaded, Sources
from anabranch.graph.serve.swap import Holder
from anabranch.graph.serve.text import CONNECTION, JSON, SHORT, Sent, Text
from anabranch.graph.serve.writes import (
    WRITERS,
    answer_delete,
    answer_upsert,
    live_of,
    read_delete,
    read_upsert,
)
from anabranch.web.api_error import ApiError
from anabranch.web.body_room import BodyRoom, Kept
from anabranch.web.json_text import to_json

if TYPE_CHECKING:
    from anabranch.graph.live import LiveIndex

logger = logging.getLogger(__name__)
T = TypeVar("T")
RETRY_S = "1"

# What is answered on a connection for which there was no place, too.
OPEN = ("/healthz",)

# Of the room for bodies that others leave, so much is for one address.
BODY_SHARE = 0.5


class Serving:
    """What the routes of one application share.

    Attributes:
        holder: the files in use.
        is_stopping: set by who stops the server, for ``/readyz``.
    """

    def __init__(self, sources: Sources, limits: Limits, token: str | None) -> None:
        self.limits, self.token = limits, token
        self.metrics, self.gate = Metrics(self._live), Gate(limits)
        # Changes wait for the disk, so they have threads of their own.
        self.write_gate = Gate(replace(limits, concurrency=WRITERS))
        self.bodies = BodyRoom(limits.room_for_bodies, BODY_SHARE, 429)
        self.answers = AnswerRoom(limits.answers_bytes, lambda: self.metrics.cut_off("room"))
        self.metrics.answer_bytes.set_function(lambda: self.answers.num_bytes)
        self.holder = Holder(sources, self._reloaded)
        self.is_stopping = False

    def _live(self) -> "LiveIndex | None":
        current = self.holder.current
        return None if current is None or current.vectors is None else current.vectors.live

    def _reloaded(self, worked: bool) -> None:
        self.metrics.reloaded(self.holder.current if worked else None)

    def loaded(self) -> Loaded:
        """What is served now. Raises RequestError before the first files are loaded."""
        current = self.holder.current
        if current is None:
            why = f": {self.holder.failure}" if self.holder.failure is not None else ""
            raise RequestError(503, "not_ready", f"nothing is loaded yet{why}", headers={"Retry-After": RETRY_S})
        return current

    async def answer(
        self,
        request: Request,
        name: str,
        read: Callable[[dict[str, Any], Limits], T],
        compute: Callable[[Loaded, T, Limits, Text], Steps[None]],
        *,
        is_write: bool = False,
    ) -> Response:
        """One request from its body to its answer."""
        deadline = time.monotonic() + self.limits.timeout_s
        # What it begins with, it ends with.
        loaded, gate = self.loaded(), self.write_gate if is_write else self.gate
        # Say so before the body is read.
        if is_write:
            live_of(loaded)
        source = source_of(request)
        if (why := gate.why_full(source)) is not None:
            raise full(why)
        kept = self._room(request)
        try:
            bodies, loop = [await self._body(request, deadline, kept)], asyncio.get_running_loop()
        except BaseException:
            kept.close()
            raise
        held = self.answers.enter(source, is_sure=is_write)

        def work() -> Steps[Text]:
            wanted = read(parse(bodies.pop()), self.limits)
            # What is kept of it now is small.
            loop.call_soon_threadsafe(kept.close)
            text = Text(held)
            yield from compute(loaded, wanted, self.limits, text)
            if not is_write:
                self.metrics.queries(name, text.num_rows)
            return text

        try:
            self.metrics.in_flight.inc()
            with self._refusals(is_write):
                return Sent(await gate.run(work, deadline, kept.close, source), held)
        except BaseException:
            held.close()
            raise
        finally:
            self.metrics.in_flight.dec()

    @contextlib.contextmanager
    def _refusals(self, is_write: bool) -> Iterator[None]:
        """Around what is computed: why it was not is a RequestError."""
        try:
            yield
        except FullError as error:
            raise full(str(error)) from None
        except LateError:
            after = "it may be made all the same, and can be sent again" if is_write else "ask for less at once"
            raise RequestError(
                503,
                "timeout",
                f"the answer took longer than {self.limits.timeout_s:g} s; {after}",
                headers={"Retry-After": RETRY_S},
            ) from None
        except (CapacityError, MemoryError) as error:
            raise RequestError(503, "no_memory", f"no room for this: {error}") from None
        except DataError as error:
            if not is_write:
                raise RequestError(400, "invalid_request", str(error)) from None
            logger.error("a change was not taken: %s", error)
            raise RequestError(503, "not_written", str(error), headers={"Retry-After": RETRY_S}) from None
        except AnabranchError as error:
            raise RequestError(400, "invalid_request", str(error)) from None

    def _room(self, request: Request) -> Kept:
        """Room for a body that comes. Raises RequestError where there is none for what it says it has."""
        source = source_of(request)
        length = request.headers.get("content-length", "")
        said = int(length) if length.isdigit() and len(length) < 20 else None
        try:
            # What is too long is told so.
            return self.bodies.enter(source, said if said is None or said <= self.limits.body_bytes else None)
        except ApiError as error:
            raise _no_room(error) from None

    async def _body(self, request: Request, deadline: float, kept: Kept) -> bytes:
        """All of it, which ``kept`` counts as it comes. Raises RequestError."""
        kind = request.headers.get("content-type", JSON).partition(";")[0].strip().lower()
        if kind != JSON and not kind.endswith("+json"):
            raise RequestError(415, "not_json", f"the content type is {kind!r:.80}; send {JSON}")
        most, close = self.limits.body_bytes, {"Connection": "close"}
        too_large = RequestError(413, "too_large", f"the body is larger than {most:,} bytes", headers=close)
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > most:
            raise too_large
        parts, size = [], 0
        try:
            async with asyncio.timeout(max(deadline - time.monotonic(), 0)) as left:
                async for part in request.stream():
                    size += len(part)
                    if size > most:
                        raise too_large
                    kept.more(len(part), left)
                    parts.append(part)
        except ApiError as error:
            raise _no_room(error) from None
        except TimeoutError:
            raise RequestError(
                408,
                "slow_body",
                f"the body did not come within {self.limits.timeout_s:g} s, or was slow while others waited for room",
                headers=close,
            ) from None
        kept.is_whole()
        return b"".join(parts)


def _no_room(error: ApiError) -> RequestError:
    return RequestError(error.status, "overloaded", str(error), headers={"Retry-After": RETRY_S, "Connection": "close"})


def create_app(
    sources: Sources,
    limits: Limits | None = None,
    *,
    token: str | None = None,
    host: str = "127.0.0.1",
    watch_s: float | None = None,
    on_ready: Callable[[Loaded], None] = lambda loaded: None,
    on_failure: Callable[[AnabranchError], None] = lambda error: None,
) -> Starlette:
    """The application. It loads its files after it has started; ``/readyz`` says 503 until then.

    Args:
        sources: what to serve.
        limits: of requests; None for the defaults.
        token: lets ``POST /admin/reload`` in, as ``Authorization: Bearer TOKEN``; None keeps everybody out.
        host: where the server listens. Without a token of `Writes`, changes are taken by this name and those of this machine only.
        watch_s: look for changed files this often, in seconds; None never.
        on_ready: called when the first files are loaded.
        on_failure: called if they cannot be.

    Raises BackendError (on import) if starlette or prometheus-client is not installed.
    """
    limits = limits or Limits()
    description = describe(limits)

    async def search(request: Request) -> Response:
        return await serving(request).answer(request, "search", read_search, answer_search)

    async def ppr(request: Request) -> Response:
        return await serving(request).answer(request, "ppr", read_ppr, answer_ppr)

    def check_writer(request: Request) -> None:
        # Where nothing is taken, that is the answer.
        if sources.writes is not None:
            check_sender(request, sources.writes.token, host)

    async def upsert(request: Request) -> Response:
        check_writer(request)
        return await serving(request).answer(request, "upsert", read_upsert, answer_upsert, is_write=True)

    async def delete(request: Request) -> Response:
        check_writer(request)
        return await serving(request).answer(request, "delete", read_delete, answer_delete, is_write=True)

    async def info(request: Request) -> Response:
        shown = {name: getattr(limits, name) for name in Limits.__dataclass_fields__}
        return _json({**serving(request).loaded().to_dict(), "limits": shown})

    async def health(request: Request) -> Response:
        return _json({"status": "ok"})

    async def ready(request: Request) -> Response:
        if serving(request).is_stopping:
            raise RequestError(503, "stopping", "the server is stopping")
        return _json({"status": "ready", "generation": serving(request).loaded().generation})

    async def metrics(request: Request) -> Response:
        return Response(serving(request).metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def openapi(request: Request) -> Response:
        return _json(description)

    async def reload(request: Request) -> Response:
        if token is None:
            raise RequestError(403, "no_token", "reloading by request is off; start the server with a token")
        check_sender(request, token, host)
        try:
            return _json((await serving(request).holder.reload()).to_dict())
        except AnabranchError as error:
            raise RequestError(409, "reload_failed", f"the old files are still served: {error}") from None

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        app.state.serving = made = Serving(sources, limits, token)
        bounds = getattr(app.state, "bounds", None)
        if bounds is not None:
            made.metrics.connections.set_function(lambda: len(bounds.places))
            bounds.readers.on_cut = made.metrics.cut_off
        tasks = [asyncio.create_task(_first(made.holder, on_ready, on_failure))]
        if watch_s is not None:
            tasks.append(asyncio.create_task(made.holder.watch(watch_s)))
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        made.holder.close()
        made.gate.close()
        made.write_gate.close()

    routes = [
        *(
            Route(f"{start}/{name}", endpoint, methods=["POST"])
            for name, endpoint in (("search", search), ("ppr", ppr), ("upsert", upsert), ("delete", delete))
            for start in STARTS
        ),
        Route("/v1/info", info),
        Route("/healthz", health),
        Route("/readyz", ready),
        Route("/metrics", metrics),
        Route("/openapi.json", openapi),
        Route("/admin/reload", reload, methods=["POST"]),
    ]
    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        exception_handlers={RequestError: _refuse, HTTPException: _no_route},  # type: ignore[dict-item]
    )
    app.add_middleware(_Counted, state=app.state, paths={route.path for route in routes})
    return app


def serving(request: Request) -> Serving:
    """What the routes of the request's application share."""
    return request.app.state.serving


async def _first(
    holder: Holder, on_ready: Callable[[Loaded], None], on_failure: Callable[[AnabranchError], None]
) -> None:
    try:
        on_ready(await holder.reload())
    except AnabranchError as error:
        logger.error("nothing can be served: %s", error)
        on_failure(error)


def _json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(to_json(value, SHORT), status, headers, JSON)


async def _refuse(request: Request, error: RequestError) -> Response:
    serving(request).metrics.refused(error.code)
    return _json(error.to_dict(), error.status, error.headers)


async def _no_route(request: Request, error: HTTPException) -> Response:
    """Starlette's own 404 and 405, in our form."""
    allowed = (error.headers or {}).get("Allow", "")
    code, message = {
        404: ("no_such_path", f"there is no {request.url.path!r:.80}; GET /openapi.json lists what there is"),
        405: ("wrong_method", f"{request.url.path} takes {allowed}, not {request.method:.20}"),
    }.get(error.status_code, ("http_error", str(error.detail)))
    return await _refuse(request, RequestError(error.status_code, code, message, headers=error.headers))


class _Counted:
    """Around all of it: counts and times every answer, and makes one of what nobody foresaw."""

    def __init__(self, app: ASGIApp, state: Any, paths: set[str]) -> None:
        self._app, self._state, self._paths = app, state, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status, seconds = time.perf_counter(), 0, 0.0
        connection = (scope.get("extensions") or {}).get(CONNECTION)
        is_beyond = connection is not None and connection.is_beyond and scope["path"] not in OPEN

        async def watched(message: Message) -> None:
            nonlocal status, seconds
            if message["type"] == "http.response.start":
                # How long somebody reads it says nothing of us.
                status, seconds = message["status"], time.perf_counter() - started
                if connection is not None and connection.is_beyond:
                    message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
            await send(message)

        try:
            await (_beyond if is_beyond else self._app)(scope, receive, watched)
        except ClientDisconnect:
            logger.debug("%s %s: the client went away", scope["method"], scope["path"])
        except Exception:
            logger.exception("a bug: %s %s", scope["method"], scope["path"])
            if status:
                raise
            failed = RequestError(500, "bug", "the server failed; its log says how")
            await _json(failed.to_dict(), 500)(scope, receive, watched)
        finally:
            endpoint = scope["path"] if scope["path"] in self._paths else "other"
            self._state.serving.metrics.answered(endpoint, status or 499, seconds or time.perf_counter() - started)


async def _beyond(scope: Scope, receive: Receive, send: Send) -> None:
    """On a connection for which there was no place."""
    message = "too many connections are open, in all or from this address; try again"
    error = RequestError(503, "too_many_connections", message, headers={"Retry-After": RETRY_S})
    scope["app"].state.serving.metrics.refused(error.code)
    await _json(error.to_dict(), error.status, error.headers)(scope, receive, send)


def source_of(request: Request) -> str:
    """The address that a request comes from."""
    return request.client.host if request.client is not None else ""


def full(why: str) -> RequestError:
    """The refusal of a request for which there is no place."""
    return RequestError(429, "busy", f"{why}; try again", headers={"Retry-After": RETRY_S})
