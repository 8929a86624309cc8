"""``/v1/messages``: Anthropic's form, in front of any model."""

from functools import partial
from typing import Any

from aiohttp import web

from anabranch.gateway.gateway import Gateway
from anabranch.gateway.http.chat_form import ChatForm
from anabranch.gateway.http.counting import counted
from anabranch.gateway.http.exchange import Exchange
from anabranch.gateway.providers.provider import Native
from anabranch.gateway.validate import check_depth
from anabranch.web.answers import JSON, SAFE, Route, json_response
from anabranch.web.api_error import ApiError
from anabranch.web.ids import new_id
from anabranch.web.json_text import to_json
from anabranch.web.messages import MessageEvents, to_chat, to_error, to_message
from anabranch.web.sse import event

PING = event({"type": "ping"}, "ping")

# Headers of this form that models of Anthropic are sent along.
_ALONG = ("anthropic-beta",)


class MessagesRoutes:
    """What Anthropic's clients call."""

    def __init__(self, gateway: Gateway, exchange: Exchange) -> None:
        self._gateway, self._exchange = gateway, exchange

    def table(self) -> dict[str, dict[str, Route]]:
        """Route by path and method."""
        return {
            "/v1/messages": {"POST": self._messages},
            "/v1/messages/count_tokens": {"POST": self._count},
        }

    async def _messages(self, request: web.BaseRequest) -> web.StreamResponse:
        along = {name: request.headers[name] for name in _ALONG if name in request.headers}
        async with self._exchange.read(request, _as_chat) as received:
            body, chat = received.body, received.chat
            native = Native(body, along)
            reply = await self._exchange.ask(request, received, "chat", chat, shown_as="messages", native=native)
            reply.headers["request-id"] = reply.headers.get("x-request-id", "")
            return await self._exchange.tell(
                request, received, reply, lambda: MessageForm(body), lambda answer: to_message(body, answer)
            )

    async def _count(self, request: web.BaseRequest) -> web.StreamResponse:
        """Tokens of a prompt; see `counted`."""
        async with self._exchange.read(request, partial(_as_chat, counts=True)) as received:
            return json_response({"input_tokens": await counted(self._gateway, self._exchange, received)})


def _as_chat(body: dict[str, Any], *, counts: bool = False) -> dict[str, Any]:
    """A request as a chat. Raises ApiError."""
    check_depth(body)
    return to_chat(body, counts=counts)


class MessageForm(ChatForm):
    """The events of a message.

    Args:
        body: of the request.
    """

    beat = PING

    def __init__(self, body: dict[str, Any]) -> None:
        super().__init__(MessageEvents(body))


def messages_error(error: ApiError) -> web.Response:
    """Anthropic's form of an error, which all those of its routes have."""
    id = error.headers.get("x-request-id") or new_id()
    headers = {**SAFE, **error.headers, "x-request-id": id, "request-id": id}
    return web.Response(status=error.status, body=to_json(to_error(error, id)), content_type=JSON, headers=headers)
