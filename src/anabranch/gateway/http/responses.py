"""``/v1/responses``: OpenAI's newer form, in front of any model."""

from collections.abc import Iterator
from typing import Any

from aiohttp import web

from anabranch.gateway.gateway import Gateway
from anabranch.gateway.http.chat_form import ChatForm
from anabranch.gateway.http.counting import counted
from anabranch.gateway.http.exchange import Exchange
from anabranch.gateway.providers.provider import Native
from anabranch.web.answers import Route, json_response
from anabranch.web.responses import ResponseStream, to_chat, to_response
from anabranch.web.sse import event_slices


class ResponsesRoutes:
    """What OpenAI's clients call for responses."""

    def __init__(self, gateway: Gateway, exchange: Exchange) -> None:
        self._gateway, self._exchange = gateway, exchange

    def table(self) -> dict[str, dict[str, Route]]:
        """Route by path and method."""
        return {
            "/v1/responses": {"POST": self._responses},
            "/v1/responses/input_tokens": {"POST": self._count},
        }

    async def _count(self, request: web.BaseRequest) -> web.StreamResponse:
        """Tokens of a prompt; see `counted`."""
        async with self._exchange.read(request, lambda body: to_chat(body)) as received:
            is_native = self._has_responses(received.body.get("model"))
            tokens = await counted(self._gateway, self._exchange, received, is_native=is_native)
            return json_response({"object": "response.input_tokens", "input_tokens": tokens})

    async def _responses(self, request: web.BaseRequest) -> web.StreamResponse:
        async with self._exchange.read(request, lambda body: to_chat(body)) as received:
            asked, chat = received.body, received.chat
            native = Native(asked, {}, "responses") if self._has_responses(asked.get("model")) else None
            reply = await self._exchange.ask(request, received, "chat", chat, shown_as="responses", native=native)
            # Unlike OpenAI's, ours cannot be asked for again; it is said all the same whether its text is kept.
            body = {**asked, "store": self._gateway.keeps_texts(asked)}
            return await self._exchange.tell(
                request,
                received,
                reply,
                lambda: ResponseForm(body),
                lambda answer: answer.get("responses") or to_response(body, answer),
            )

    def _has_responses(self, name: Any) -> bool:
        """Whether a model is asked in this form where it is at home."""
        gateway = self._gateway
        model = gateway.runtime.models.get(gateway.config.aliases.get(name, name)) if isinstance(name, str) else None
        return model is not None and any(getattr(one.provider, "responses", False) for one in model.deployments)


class _InSlices:
    """The events of a response in slices: the last of them say all of it once more, with all log probabilities."""

    def __init__(self, events: ResponseStream) -> None:
        self._events = events

    def add(self, chunk: dict[str, Any]) -> Iterator[bytes]:
        """See `Events`."""
        return self._events.add(chunk, in_slices=True)

    def end(self) -> Iterator[bytes]:
        """See `Events`."""
        return self._events.end(in_slices=True)

    def fail(self, message: str, code: str | None) -> Iterator[bytes]:
        """See `Events`."""
        return self._events.fail(message, code, in_slices=True)


class ResponseForm(ChatForm):
    """The events of a response: of a model that is at home in this form, as they came.

    Args:
        body: of the request.
    """

    def __init__(self, body: dict[str, Any]) -> None:
        self._events = ResponseStream(body)
        super().__init__(_InSlices(self._events))
        self._has_begun = self._is_native = False

    def take(self, chunk: dict[str, Any]) -> Iterator[bytes]:
        """The events that a chunk makes."""
        native = chunk.get("responses")
        if isinstance(native, dict):
            self._is_native = True
            yield from event_slices(native, str(native.get("type")))
            return
        if self._is_native and not chunk.get("error"):
            if not chunk.get("choices"):
                return
            # Another model goes on, whose words have no place in the response that was begun.
            broken = {"message": "the upstream broke off in the middle of its answer", "code": "upstream_cut"}
            chunk = {"error": broken}
        yield from self._begun()
        yield from super().take(chunk)

    def end(self) -> Iterator[bytes]:
        """The last events of a whole answer."""
        if not self._is_native:
            yield from self._begun()
            yield from super().end()

    def _begun(self) -> Iterator[bytes]:
        if not self._has_begun and not self._is_native:
            self._has_begun = True
            yield from self._events.begin()
