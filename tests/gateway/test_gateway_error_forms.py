"""Every error of every route that the document has, whatever it comes from, has the status and the form that the document says."""

import asyncio
import json

import aiohttp
import pytest

from anabranch.errors import CapacityError, InputError
from anabranch.gateway.config import AdminConfig, DeploymentConfig, GatewayConfig, LimitsConfig, ModelConfig
from anabranch.gateway.config.secret import Secret
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.http import app as app_module
from anabranch.gateway.http.app import App
from anabranch.gateway.providers.mock import Mock
from anabranch.web.places import Places

jsonschema_rs = pytest.importorskip("jsonschema_rs")

MOST_BYTES = 2_000
# Of no model that there is, in the form of every route.
BODY = {
    "model": "nobody",
    "messages": [{"role": "user", "content": "x"}],
    "prompt": "x",
    "input": "x",
    "max_tokens": 5,
    "request_id": "r",
    "score": 1,
}
FOREIGN = {"origin": "https://evil.example", "x-forwarded-for": "192.0.2.1"}


async def _slow():
    yield b"{"
    await asyncio.sleep(5)


def _raises(error):
    async def route(request):
        raise error

    return route


def _broken(error):
    """A change of an app: what its routes raise."""

    def change(app):
        app._table = {path: {method: _raises(error) for method in methods} for path, methods in app._table.items()}

    return change


class Trouble:
    """What is asked of every route, and how the gateway is.

    Attributes:
        status: that at least one of the routes answers with.
        change: what is different of the app.
        config, app: their fields.
        methods: of the routes that it may happen to.
        other: ask with another method than that of the route.
        sent: of the request.
    """

    def __init__(self, status, *, change=None, config=None, app=None, methods=("get", "post"), other=False, **sent):
        self.status, self.change, self.methods, self.other = status, change, methods, other
        self.config, self.app, self.sent = config or {}, app or {}, sent


TROUBLES = {
    "no JSON": Trouble(400, data=b"{"),
    "no object": Trouble(400, data=b"[]"),
    "no model": Trouble(404, json=BODY),
    "a wrong key": Trouble(401, json=BODY, config={"require_key": True}, headers={"authorization": "Bearer wrong"}),
    "no key": Trouble(401, json=BODY, config={"require_key": True}),
    "another page": Trouble(403, json=BODY, headers=FOREIGN),
    "another host": Trouble(403, json=BODY, headers={"host": "evil.example"}),
    "another method": Trouble(405, other=True),
    "a slow body": Trouble(408, data=_slow, methods=("post",)),
    "a large body": Trouble(413, data=b" " * (MOST_BYTES + 1), methods=("post",)),
    "a compressed body": Trouble(415, data=b"{}", headers={"content-encoding": "br"}, methods=("post",)),
    "a wrong argument": Trouble(400, json=BODY, change=_broken(InputError("no")), methods=("post",)),
    "a bug": Trouble(500, json=BODY, change=_broken(RuntimeError("a bug"))),
    "no room": Trouble(503, json=BODY, change=_broken(CapacityError("full")), methods=("post",)),
    "no place": Trouble(503, json=BODY, app={"places": lambda: Places(0)}),
}


async def _asked(url, document, trouble):
    """(path, status, type, body, headers) of the answer of each route."""

    async def one(session, path, method):
        asked = ("POST" if method == "get" else "GET") if trouble.other else method.upper()
        sent = dict(trouble.sent)
        sent["headers"] = {"content-type": "application/json", **sent.get("headers", {})}
        if callable(sent.get("data")):
            sent["data"] = sent["data"]()
        if asked == "GET":
            sent = {"headers": sent["headers"]}
        async with session.request(asked, url + path, **sent) as answer:
            return path, method, answer.status, answer.content_type, await answer.read(), answer.headers

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
        routes = [
            (path, method)
            for path, methods in document["paths"].items()
            for method in methods
            if method in trouble.methods
        ]
        return await asyncio.gather(*(one(session, *route) for route in routes))


def answers(tmp_path, monkeypatch, trouble):
    """The document, and what each of its routes answers."""
    monkeypatch.setenv("ADMIN_TEST_KEY", "the-admin-key")
    config = GatewayConfig(
        models=(ModelConfig(name="small", deployments=(DeploymentConfig(provider=Mock.Config(model="small")),)),),
        store=str(tmp_path / "g.db"),
        limits=LimitsConfig(body_bytes=MOST_BYTES, body_timeout_s=0.2 if trouble.status == 408 else 60.0),
        **{"require_key": False, "admin": AdminConfig(key=Secret("env:ADMIN_TEST_KEY")), **trouble.config},
    )

    async def main():
        async with Gateway(config) as gateway:
            app = App(gateway, **{name: make() for name, make in trouble.app.items()})
            document = app_module.describe("0", 100)
            if trouble.change is not None:
                trouble.change(app)
            server = app.server()
            listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
            try:
                url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
                return document, await _asked(url, document, trouble)
            finally:
                listener.close()
                await server.shutdown(0.1)

    return asyncio.run(main())


@pytest.mark.parametrize("name", TROUBLES)
def test_every_error_is_as_the_document_says(tmp_path, monkeypatch, name):
    """Of /v1/messages, those from before its route was asked had OpenAI's form: pages of other origins, no place, a bug."""
    trouble = TROUBLES[name]
    document, found = answers(tmp_path, monkeypatch, trouble)
    assert trouble.status in {status for _, _, status, *_ in found}
    for path, method, status, kind, raw, headers in found:
        told = document["paths"][path][method]["responses"]
        if status == 405:
            # It is of no method that the document has: of the form that the path's other errors have.
            told = {"405": told["500"]}
        assert str(status) in told, (path, status, raw)
        content = told[str(status)]["content"]
        assert kind in content, (path, status)
        if status < 400:
            continue
        schema = content[kind]["schema"] | {"components": document["components"]}
        said = json.loads(raw)
        is_of_messages = path.startswith("/v1/messages")
        assert schema["$ref"].endswith("/MessagesError") is is_of_messages
        assert jsonschema_rs.is_valid(schema, said), (path, status, said)
        # One form is not the other: a schema that takes both says nothing.
        other = "Error" if is_of_messages else "MessagesError"
        assert not jsonschema_rs.is_valid({**schema, "$ref": f"#/components/schemas/{other}"}, said)
        assert headers["x-request-id"]
        if is_of_messages:
            assert headers["request-id"] == headers["x-request-id"] == said["request_id"]


def test_the_troubles_are_all_that_come_from_before_a_model_is_asked(tmp_path, monkeypatch):
    assert {trouble.status for trouble in TROUBLES.values()} == {400, 401, 403, 404, 405, 408, 413, 415, 500, 503}


def test_paths_of_the_messages_api_that_there_are_not_have_its_form(tmp_path, monkeypatch):
    trouble = Trouble(404, methods=("post",), json=BODY)
    paths = {path: {"post": {}} for path in ("/v1/messages/batches", "/messages/batches", "/messagesx")}
    monkeypatch.setattr(app_module, "describe", lambda *_: {"paths": paths})
    _, found = answers(tmp_path, monkeypatch, trouble)
    assert {path: (status, json.loads(raw).get("type")) for path, _, status, _, raw, _ in found} == {
        "/v1/messages/batches": (404, "error"),
        "/messages/batches": (404, "error"),
        "/messagesx": (404, None),
    }


@pytest.mark.parametrize(("path", "is_right"), [("Messages", False), ("MessagesCount", True)])
def test_a_count_needs_no_most_tokens(path, is_right):
    """The server, as Anthropic's, takes it without; the document asked for it."""
    document = app_module.describe("0", 100)
    body = {"model": "small", "messages": [{"role": "user", "content": "x"}]}
    schema = {"$ref": f"#/components/schemas/{path}", "components": document["components"]}
    assert jsonschema_rs.is_valid(schema, body) is is_right
    route = document["paths"]["/v1/messages/count_tokens"]["post"]
    assert route["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/MessagesCount")
