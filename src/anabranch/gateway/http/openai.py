"""The ``/v1`` routes: bytes in, what the gateway says of them out."""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from aiohttp import web

from anabranch.gateway.core.reply import Reply
from anabranch.gateway.forms import parse_form
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.http.cors import for_origin
from anabranch.gateway.media_requests import FORMS
from anabranch.gateway.providers.media import PATHS as MEDIA
from anabranch.gateway.providers.provider import Native
from anabranch.web.answers import SAFE, Route, bearer, json_response, read_body
from anabranch.web.api_error import ApiError
from anabranch.web.body import parse
from anabranch.web.json_size import MOST_PARTS, MOST_VALUES, check_json_size
from anabranch.web.large_json import LARGE, parse_large
from anabranch.web.responses import ResponseStream, to_chat, to_response
from anabranch.web.sse import event, read_data

logger = logging.getLogger(__name__)

# Large bodies are read here, one after another: the more threads want Python's lock, the longer the event loop waits for it.
_READERS = ThreadPoolExecutor(1, "large-body")

# After its deadline a stream that is not read ends.
STALL_S = 5.0


class OpenAIRoutes:
    """What OpenAI's clients call."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def table(self) -> dict[str, dict[str, Route]]:
        """Route by path and method."""
        return {
            "/v1/chat/completions": {"POST": self._endpoint("chat")},
            "/v1/completions": {"POST": self._endpoint("completions")},
            "/v1/embeddings": {"POST": self._endpoint("embeddings")},
            **{f"/v1{path}": {"POST": self._endpoint(endpoint)} for endpoint, path in MEDIA.items()},
            "/v1/responses": {"POST": self._responses},
            "/v1/models": {"GET": self._models},
            "/v1/key": {"GET": self._key},
            "/v1/feedback": {"POST": self._feedback},
        }

    async def model(self, request: web.BaseRequest, name: str) -> web.StreamResponse:
        """``/v1/models/NAME``."""
        return json_response(self._gateway.model_facts(name, await self._gateway.authenticate(bearer(request))))

    def _endpoint(self, endpoint: str) -> Route:
        async def answer(request: web.BaseRequest) -> web.StreamResponse:
            body, num_bytes = await self.read(request, takes_forms=endpoint in FORMS)
            reply = await self._gateway.handle(
                endpoint, body, key=bearer(request), headers=request.headers, num_bytes=num_bytes
            )
            return await self.send(request, reply, reply.stream)

        return answer

    async def _responses(self, request: web.BaseRequest) -> web.StreamResponse:
        body, num_bytes = await self.read(request)
        reply = await self._gateway.handle(
            "chat",
            to_chat(body),
            key=bearer(request),
            headers=request.headers,
            shown_as="responses",
            num_bytes=num_bytes,
            native=Native(body, {}, "responses") if self._has_responses(body.get("model")) else None,
        )
        # Unlike OpenAI's, ours cannot be asked for again; it is said all the same whether its text is kept.
        body = {**body, "store": self._gateway.keeps_texts(body)}
        source = reply.stream
        if reply.stream is not None:
            reply.stream = _as_response(body, reply.stream)
        elif reply.body is not None:
            answer = json.loads(reply.body)
            made = answer.get("responses") or to_response(body, answer)
            reply.body = json.dumps(made, ensure_ascii=False).encode("utf-8", "replace")
        return await self.send(request, reply, source)

    def _has_responses(self, name: Any) -> bool:
        """Whether a model is asked in this form where it is at home."""
        model = (
            self._gateway.runtime.models.get(self._gateway.config.aliases.get(name, name))
            if isinstance(name, str)
            else None
        )
        return model is not None and any(getattr(one.provider, "responses", False) for one in model.deployments)

    async def _models(self, request: web.BaseRequest) -> web.StreamResponse:
        record = await self._gateway.authenticate(bearer(request))
        return json_response({"object": "list", "data": self._gateway.models(record)})

    async def _key(self, request: web.BaseRequest) -> web.StreamResponse:
        """What the key of the request may know of itself."""
        record = await self._gateway.authenticate(bearer(request))
        if record is None:
            raise ApiError(401, "invalid_api_key", "send the key that is asked about: Authorization: Bearer KEY")
        return json_response(await self._gateway.key_facts(record))

    async def _feedback(self, request: web.BaseRequest) -> web.StreamResponse:
        body, _ = await self.read(request)
        return json_response(await self._gateway.feedback(body, key=bearer(request)))

    async def read(self, request: web.BaseRequest, *, takes_forms: bool = False) -> tuple[dict[str, Any], int]:
        """The body and its bytes, of those only who have a key: nobody else may fill the memory. Raises ApiError."""
        try:
            await self._gateway.authenticate(bearer(request))
        except ApiError as error:
            if not request.content.is_eof():
                error.headers["connection"] = "close"
            raise
        kind, limits = request.headers.get("content-type", ""), self._gateway.config.limits
        is_form = kind.lower().startswith("multipart/form-data")
        raw = await read_body(request, limits.body_bytes, limits.body_timeout_s)
        if is_form and not takes_forms:
            message = f"the body is a form (multipart/form-data); {request.path} takes JSON (application/json)"
            raise ApiError(400, "invalid_body", message)
        if is_form:
            return await asyncio.to_thread(parse_form, raw, kind), len(raw)
        # A large one would hold up all other requests.
        if len(raw) <= LARGE:
            return _parsed(raw), len(raw)
        body = await asyncio.get_running_loop().run_in_executor(_READERS, _parsed, raw)
        return body, len(raw)

    async def send(
        self, request: web.BaseRequest, reply: Reply, source: AsyncIterator[bytes] | None
    ) -> web.StreamResponse:
        """Reply as HTTP. A stream is written as fast as it is read on the other side, and ``source``, what it is made of, is closed when
        that goes away, breaks, or does not read on until `STALL_S` after the deadline.
        """
        reply.headers |= {**SAFE, **for_origin(self._gateway.config.cors_origins, request)}
        if reply.stream is None or source is None:
            return web.Response(
                status=reply.status, body=reply.body, content_type=reply.content_type, headers=reply.headers
            )
        headers = {**reply.headers, "cache-control": "no-cache", "x-accel-buffering": "no"}
        response = web.StreamResponse(status=reply.status, headers=headers)
        response.content_type = "text/event-stream"
        try:
            async with asyncio.timeout(self._gateway.config.longest_deadline_s + STALL_S):
                await response.prepare(request)
                async for chunk in reply.stream:
                    await response.write(chunk)
                await response.write_eof()
        except ConnectionError:
            logger.debug("the client went away")
        except Exception as error:
            # The head is out: all that can be done is to break off.
            logger.error(
                "a stream broke: %s", type(error).__name__, exc_info=None if isinstance(error, TimeoutError) else error
            )
            if request.transport is not None:
                request.transport.abort()
        finally:
            for stream in (reply.stream, source):
                # It is being closed already.
                with contextlib.suppress(RuntimeError):
                    await stream.aclose()  # type: ignore[attr-defined]
        return response


def _parsed(raw: bytes) -> dict[str, Any]:
    """The JSON of a body. Raises ApiError."""
    check_json_size(raw, MOST_VALUES, MOST_PARTS)
    return parse(raw) if len(raw) <= LARGE else parse_large(raw)


async def _as_response(body: dict[str, Any], stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """A chat stream as the events of a response. What the stream cannot go on from becomes ``response.failed``."""
    made, has_begun, is_native = ResponseStream(body), False, False
    try:
        async for chunk in stream:
            for data in read_data(chunk):
                native = data.get("responses")
                if isinstance(native, dict):
                    is_native = True
                    yield event(native, str(native.get("type")))
                    continue
                if is_native and not data.get("choices") and not data.get("error"):
                    continue
                if is_native and not data.get("error"):
                    # Another model goes on, whose words have no place in the response that was begun.
                    data = {
                        "error": {
                            "message": "the upstream broke off in the middle of its answer",
                            "code": "upstream_cut",
                        }
                    }
                if not has_begun and not is_native:
                    has_begun = True
                    for piece in made.begin():
                        yield piece
                if data.get("error"):
                    for piece in made.fail(str(data["error"].get("message")), data["error"].get("code")):
                        yield piece
                    return
                for piece in made.add(data):
                    yield piece
        if not is_native:
            for piece in [*(() if has_begun else made.begin()), *made.end()]:
                yield piece
    except (AttributeError, LookupError, TypeError, ValueError):
        for piece in made.fail("the upstream sent chunks that make no answer", "upstream_garbage"):
            yield piece
    finally:
        await stream.aclose()  # type: ignore[attr-defined]
