"""The ``/v1`` routes in OpenAI's form: what the gateway says as it says it, what is known of models and keys, and feedback."""

from aiohttp import web

from anabranch.gateway.gateway import Gateway
from anabranch.gateway.http.exchange import Exchange
from anabranch.gateway.http.paths import deployment_of
from anabranch.gateway.media_requests import FORMS
from anabranch.gateway.providers.media import PATHS as MEDIA
from anabranch.web.answers import Route, json_response
from anabranch.web.api_error import ApiError


class OpenAIRoutes:
    """What OpenAI's clients call."""

    def __init__(self, gateway: Gateway, exchange: Exchange) -> None:
        self._gateway, self._exchange = gateway, exchange

    def table(self) -> dict[str, dict[str, Route]]:
        """Route by path and method."""
        return {
            "/v1/chat/completions": {"POST": self._endpoint("chat")},
            "/v1/completions": {"POST": self._endpoint("completions")},
            "/v1/embeddings": {"POST": self._endpoint("embeddings")},
            **{f"/v1{path}": {"POST": self._endpoint(endpoint)} for endpoint, path in MEDIA.items()},
            "/v1/models": {"GET": self._models},
            "/v1/key": {"GET": self._key},
            "/v1/feedback": {"POST": self._feedback},
        }

    async def model(self, request: web.BaseRequest, name: str) -> web.StreamResponse:
        """``/v1/models/NAME``."""
        key = await self._exchange.key(request)
        return json_response(self._gateway.model_facts(name, key.record))

    def _endpoint(self, endpoint: str) -> Route:
        async def answer(request: web.BaseRequest) -> web.StreamResponse:
            async with self._exchange.read(request, takes_forms=endpoint in FORMS) as received:
                if (named := deployment_of(request.path)) is not None:
                    # Azure's path says whose the request is, whatever its body says. It is read as the routes read it.
                    received.body["model"] = named
                reply = await self._exchange.ask(request, received, endpoint, received.body)
                return await self._exchange.send(request, reply, reply.stream)

        return answer

    async def _models(self, request: web.BaseRequest) -> web.StreamResponse:
        key = await self._exchange.key(request)
        return json_response({"object": "list", "data": self._gateway.models(key.record)})

    async def _key(self, request: web.BaseRequest) -> web.StreamResponse:
        """What the key of the request may know of itself."""
        key = await self._exchange.key(request)
        if key.record is None:
            raise ApiError(401, "invalid_api_key", "send the key that is asked about: Authorization: Bearer KEY")
        return json_response(await self._gateway.key_facts(key.record))

    async def _feedback(self, request: web.BaseRequest) -> web.StreamResponse:
        async with self._exchange.read(request) as received:
            return json_response(await self._gateway.feedback(received.body, key=received.key))
