"""The operators' interface over HTTP: what it shows, what it takes, and from whom."""

import asyncio
import base64
import json

import aiohttp
import pytest

from anabranch.errors import ConfigError
from anabranch.gateway.config import AdminConfig, DeploymentConfig, GatewayConfig, ModelConfig, StrategyConfig
from anabranch.gateway.config.secret import Secret
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.http import admin
from anabranch.gateway.http.app import App
from anabranch.gateway.http.cors import SENT
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.store import open_store
from anabranch.routers.money import Price
from anabranch.web.turns import Turns

ADMIN = "the-admin-key"
JSON = {"content-type": "application/json"}


@pytest.fixture(autouse=True)
def admin_key(monkeypatch):
    monkeypatch.setenv("ADMIN_TEST_KEY", ADMIN)


def served(tmp_path, work, given=None, **fields):
    """What ``work(call)`` gives; ``call(method, path, body, key, headers)`` gives status and what the JSON says."""
    config = GatewayConfig(
        models=(ModelConfig(name="small", deployments=(DeploymentConfig(provider=Mock.Config(model="small")),)),),
        strategies={"cheapest": StrategyConfig(use="cheapest")},
        admin=AdminConfig(key=Secret("env:ADMIN_TEST_KEY")),
        **{"store": str(tmp_path / "g.db"), **fields},
    )

    async def main():
        async with Gateway(config, given) as gateway, aiohttp.ClientSession() as session:
            server = App(gateway).server()
            listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
            url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"

            async def call(method, path, body=None, key=ADMIN, headers=JSON):
                sent = dict(headers) | ({} if key is None else {"authorization": f"Bearer {key}"})
                sent = {name: value.format(url=url) for name, value in sent.items()}
                data = None if body is None else json.dumps(body)
                skip = () if "content-type" in sent else ("content-type",)
                async with session.request(
                    method, url + path, data=data, headers=sent, skip_auto_headers=skip
                ) as answer:
                    return answer.status, json.loads(await answer.read())

            try:
                return await work(call)
            finally:
                listener.close()
                await server.shutdown(0.1)

    return asyncio.run(main())


def test_long_lists_are_told_some_rows_at_a_time(tmp_path, monkeypatch):
    """They were made and written in one go, while no request went on."""
    slices, run = [], Turns.run

    async def noted(self, whose, work):
        slices.append(await run(self, whose, work))
        return slices[-1]

    monkeypatch.setattr(admin.Turns, "run", noted)

    async def work(call):
        made = [(await call("POST", "/admin/keys", {"name": f"key {number}"}))[1]["key"] for number in range(130)]
        assert not slices
        return made, await call("GET", "/admin/keys")

    made, (status, told) = served(tmp_path, work)
    assert status == 200
    assert sorted(told["keys"], key=lambda key: key["id"]) == sorted(made, key=lambda key: key["id"])
    assert slices.pop() is None
    assert len(slices) > 1
    assert max(map(len, slices)) < 100_000


def test_the_config_is_shown_without_the_password_of_the_store(tmp_path):
    async def work(call):
        status, shown = await call("GET", "/admin/config")
        assert status == 200
        assert shown["store"] == "postgresql://ann:***@db/gateway?sslmode=require"
        assert "Q7" not in json.dumps(shown)
        assert shown["admin"]["key"] == "env:ADMIN_TEST_KEY"
        assert "Q7" not in json.dumps((await call("GET", "/admin/strategies"))[1])

    # The store is given; the config names one that asks for a password.
    store = open_store(str(tmp_path / "g.db"))
    try:
        served(tmp_path, work, given=store, store="postgresql://ann:Q7pw@db/gateway?sslmode=require")
    finally:
        asyncio.run(store.close())


CHANGES = [
    ("POST", "/admin/keys", {"name": "new"}),
    ("PUT", "/admin/budgets", {"subject": "global", "limit_usd": 1}),
    ("PATCH", "/admin/keys/ci", {"team": "ml"}),
    ("POST", "/admin/explain", {"model": "auto", "messages": [{"role": "user", "content": "x"}]}),
]


@pytest.mark.parametrize(("method", "path", "body"), CHANGES)
def test_what_changes_something_is_json_and_no_other_page_sends_it(tmp_path, method, path, body):
    async def work(call):
        await call("POST", "/admin/keys", {"name": "ci"})
        for kind in (
            "text/plain",
            "application/x-www-form-urlencoded",
            "multipart/form-data; boundary=x",
            "application/jsonx",
            "",
        ):
            assert (await call(method, path, body, headers={"content-type": kind}))[0] == 415, kind
        assert (await call(method, path, body, headers={}))[0] == 415
        for headers in (
            {"origin": "https://evil.example"},
            {"origin": "null"},
            {"origin": "http://127.0.0.1:1"},
            {"sec-fetch-site": "cross-site"},
            {"sec-fetch-site": "same-site"},
        ):
            status, told = await call(method, path, body, headers=JSON | headers)
            assert (status, told["error"]["code"]) == (403, "foreign_origin"), headers
        for headers in (
            {},
            {"origin": "{url}"},
            {"origin": "{url}", "sec-fetch-site": "same-origin"},
            {"sec-fetch-site": "none"},
        ):
            assert (await call(method, path, body, headers=JSON | headers))[0] in (200, 400), headers
        typed = {"content-type": "Application/JSON; charset=utf-8"}
        assert (await call(method, path, {**body, "no": 1}, headers=typed))[0] in (200, 400)

    served(tmp_path, work)


@pytest.mark.parametrize(
    ("method", "path"), [("DELETE", "/admin/cache"), ("POST", "/admin/reload"), ("POST", "/admin/keys/ci/rotate")]
)
def test_what_has_no_body_needs_no_type_but_is_of_this_host_too(tmp_path, method, path):
    async def work(call):
        await call("POST", "/admin/keys", {"name": "ci"})
        assert (await call(method, path, headers={"origin": "https://evil.example"}))[0] == 403
        assert (await call(method, path, headers={}))[0] in (200, 409)

    served(tmp_path, work)


def test_a_page_that_knows_the_password_by_a_browser_is_asked_where_it_is_from(tmp_path):
    basic = {"authorization": "Basic " + base64.b64encode(f"me:{ADMIN}".encode()).decode()}

    async def work(call):
        assert (await call("GET", "/admin/keys", key=None, headers=basic))[0] == 200
        form = basic | {"content-type": "text/plain", "origin": "https://evil.example"}
        assert (await call("POST", "/admin/keys", {"is_admin": True}, key=None, headers=form))[0] == 403
        assert (await call("GET", "/admin/keys"))[1]["keys"] == []

    served(tmp_path, work)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("models", "gpt-4o"),
        ("tags", "prod"),
        ("models", {"gpt-4o": 1}),
        ("tags", [1]),
        ("name", 5),
        ("rpm", "5"),
        ("rpm", 0),
        ("tpm", 1.5),
        ("expires_s", "soon"),
        ("is_admin", "yes"),
        ("team", None),
        ("nme", "x"),
    ],
)
def test_a_field_of_a_key_that_may_not_be_is_a_400_that_names_it(tmp_path, field, value):
    async def work(call):
        await call("POST", "/admin/keys", {"name": "ci"})
        for method, path in (("POST", "/admin/keys"), ("PATCH", "/admin/keys/ci")):
            status, told = await call(method, path, {field: value})
            assert (status, told["error"]["param"]) == (400, field), told
            assert field in told["error"]["message"]
        assert len((await call("GET", "/admin/keys"))[1]["keys"]) == 1

    served(tmp_path, work)


def test_keys_are_made_edited_renewed_and_ended(tmp_path):
    async def work(call):
        _, made = await call("POST", "/admin/keys", {"name": "ci", "team": "ml", "models": ["small"]})
        id, old = made["key"]["id"], made["secret"]
        assert (await call("POST", "/admin/keys", {"name": "ci"}))[0] == 400
        status, edited = await call("PATCH", f"/admin/keys/{id}", {"team": "research", "rpm": 50, "models": []})
        assert (status, edited["key"]["team"], edited["key"]["rpm"], edited["key"]["models"]) == (
            200,
            "research",
            50,
            [],
        )
        status, renewed = await call("POST", f"/admin/keys/{id}/rotate")
        assert (status, renewed["key"]["id"]) == (200, id)
        assert (await call("GET", "/v1/models", key=old))[0] == 401
        assert (await call("GET", "/v1/models", key=renewed["secret"]))[0] == 200
        for path in ("/admin/keys/x", f"/admin/keys/{id}/renew", "/admin/keys//rotate"):
            assert (await call("POST", path, {}))[0] == 404, path
        assert (await call("POST", "/admin/keys/nobody/rotate"))[0] == 404
        assert (await call("PATCH", "/admin/keys/nobody", {"team": "x"}))[0] == 404
        status, told = await call("PATCH", f"/admin/keys/{id}", {})
        assert (status, told["error"]["param"]) == (400, "body")
        assert "give one of name" in told["error"]["message"]
        await call("PUT", "/admin/budgets", {"subject": "team:research", "limit_usd": 0})
        body = {"model": "small", "messages": [{"role": "user", "content": "x"}]}
        assert (await call("POST", "/v1/chat/completions", body, key=renewed["secret"]))[
            0
        ] == 200  # it costs nothing here
        assert (await call("DELETE", "/admin/keys/ci"))[1]["key"]["revoked_us"]
        assert (await call("GET", "/v1/models", key=renewed["secret"]))[0] == 401

    served(tmp_path, work)


def test_where_no_key_is_needed_a_wrong_one_is_refused_once_there_are_keys(tmp_path):
    body = {"model": "small", "messages": [{"role": "user", "content": "x"}]}

    async def work(call):
        async def ask(key):
            return (await call("POST", "/v1/chat/completions", body, key=key))[0]

        assert [await ask(key) for key in (None, "none", "sk-ab-wrong")] == [200, 200, 200]
        _, made = await call("POST", "/admin/keys", {"name": "ci"})
        assert [await ask(key) for key in (None, "none", "sk-ab-wrong", made["secret"])] == [200, 401, 401, 200]
        await call("DELETE", "/admin/keys/ci")
        assert [await ask(key) for key in (None, made["secret"])] == [200, 401]
        assert (await call("GET", "/v1/models", key="wrong"))[0] == 401

    served(tmp_path, work, require_key=False)


def test_a_budget_for_the_name_of_a_key_applies_to_it_and_one_for_nobody_is_refused(tmp_path):
    async def work(call):
        _, made = await call("POST", "/admin/keys", {"name": "k0"})
        id = made["key"]["id"]
        for named in ("k0", id, id[:8]):
            status, budget = await call("PUT", "/admin/budgets", {"subject": f"key:{named}", "limit_usd": 2})
            assert (status, budget["subject"]) == (200, f"key:{id}")
        status, told = await call("PUT", "/admin/budgets", {"subject": "key:doesnotexist", "limit_usd": 2})
        assert (status, told["error"]["code"]) == (404, "unknown_key")
        assert [one["subject"] for one in (await call("GET", "/admin/budgets"))[1]["budgets"]] == [f"key:{id}"]
        assert (await call("DELETE", "/admin/budgets/key:nobody"))[0] == 404
        assert (await call("DELETE", "/admin/budgets/key:k0?period=day"))[1] == {"removed": False}
        assert (await call("DELETE", "/admin/budgets/key:k0"))[1] == {"removed": True}

    served(tmp_path, work)


def test_a_key_is_made_and_edited_with_its_budget(tmp_path):
    async def work(call):
        status, made = await call("POST", "/admin/keys", {"name": "ci", "budget_usd": 25, "period": "month"})
        assert status == 200
        assert (made["budget"]["subject"], made["budget"]["limit_usd"]) == (f"key:{made['key']['id']}", 25)
        _, edited = await call("PATCH", "/admin/keys/ci", {"budget_usd": "0.5", "period": "month"})
        assert (edited["budget"]["limit_usd"], edited["budget"]["period"]) == (0.5, "month")
        for body, field in (
            ({"budget_usd": "much"}, "budget_usd"),
            ({"budget_usd": True}, "budget_usd"),
            ({"budget_usd": -1}, "budget_usd"),
            ({"period": "day"}, "period"),
            ({"budget_usd": 1, "period": "year"}, "period"),
            ({"budget_usd": 1, "period": []}, "period"),
        ):
            for method, path in (("POST", "/admin/keys"), ("PATCH", "/admin/keys/ci")):
                status, told = await call(method, path, {"name": "other", **body})
                assert (status, told["error"]["param"]) == (400, field)
        assert [one["name"] for one in (await call("GET", "/admin/keys"))[1]["keys"]] == ["ci"]
        assert len((await call("GET", "/admin/budgets"))[1]["budgets"]) == 1

    served(tmp_path, work)


def test_a_key_sees_its_own_limits_and_spend_and_the_models_that_it_may_use(tmp_path):
    body = {"model": "small", "messages": [{"role": "user", "content": "x"}]}

    async def work(call):
        _, made = await call(
            "POST", "/admin/keys", {"name": "ci", "team": "ml", "rpm": 50, "models": ["small"], "budget_usd": 2}
        )
        await call("PUT", "/admin/budgets", {"subject": "team:ml", "limit_usd": 9})
        secret = made["secret"]
        for _ in range(2):
            assert (await call("POST", "/v1/chat/completions", body, key=secret))[0] == 200
        status, seen = await call("GET", "/v1/key", key=secret)
        assert status == 200
        assert (seen["name"], seen["rpm"], seen["models"]) == ("ci", 50, ["small"])
        assert seen["last_30_days"]["requests"] == 2
        # What its team may spend, and has spent, is not its own to see.
        assert [(one["limit_usd"], one["period"]) for one in seen["budgets"]] == [(2, "total")]
        for key in (None, "wrong"):
            assert (await call("GET", "/v1/key", key=key))[0] == 401
        _, other = await call("POST", "/admin/keys", {"models": ["none-of-them"]})
        listed = (await call("GET", "/v1/models", key=other["secret"]))[1]["data"]
        assert "small" not in [one["id"] for one in listed]
        assert (await call("GET", "/v1/models/small", key=other["secret"]))[0] == 404
        assert (await call("GET", "/v1/models/small", key=secret))[0] == 200

    served(tmp_path, work)


def test_an_answer_says_what_it_cost_and_a_look_at_heads_alone_is_answered(tmp_path):
    async def main():
        made = GatewayConfig(
            models=(
                ModelConfig(
                    name="small",
                    price=Price.of_dollars(10, 20),
                    deployments=(DeploymentConfig(provider=Mock.Config(model="small")),),
                ),
            ),
            strategies={"cheapest": StrategyConfig(use="cheapest")},
            require_key=False,
            store=str(tmp_path / "g.db"),
        )
        async with Gateway(made) as gateway, aiohttp.ClientSession() as session:
            server = App(gateway).server()
            listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
            url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
            body = {"model": "small", "messages": [{"role": "user", "content": "x"}], "temperature": 0}
            costs = []
            for _ in range(2):
                async with session.post(f"{url}/v1/chat/completions", json=body) as answer:
                    costs.append(answer.headers["x-cost-usd"])
            [row, again] = await gateway.store.ledger()
            assert costs[0] == f"{(row.cost_nano or again.cost_nano) / 1e9:.9f}" > "0.000000000"
            assert costs[1] == "0.000000000"  # from the cache
            for path in ("/ui", "/ui/", "/ui/page.css", "/health", "/v1/models"):
                async with session.head(url + path) as answer:
                    assert (answer.status, await answer.read()) == (200, b""), path
            async with session.head(f"{url}/v1/chat/completions") as answer:
                assert answer.status == 405
            listener.close()
            await server.shutdown(0.1)

    asyncio.run(main())


def test_paths_may_end_in_a_slash_or_leave_out_the_version(tmp_path):
    body = {"model": "small", "messages": [{"role": "user", "content": "x"}]}

    async def work(call):
        _, made = await call("POST", "/admin/keys", {"name": "ci"})
        for path in ("/v1/chat/completions/", "/chat/completions", "/chat/completions/"):
            assert (await call("POST", path, body, key=made["secret"]))[0] == 200, path
        assert (await call("GET", "/models", key=made["secret"]))[0] == 200
        assert (await call("GET", "/v1/health"))[0] == 404
        assert (await call("GET", "/metrics2"))[0] == 404

    served(tmp_path, work)


def test_a_page_of_another_host_may_call_what_the_config_lets_it_and_nothing_of_the_operators(tmp_path):
    async def main():
        made = GatewayConfig(
            models=(ModelConfig(name="small", deployments=(DeploymentConfig(provider=Mock.Config(model="small")),)),),
            strategies={
                "cheapest": StrategyConfig(use="cheapest"),
                "twice": StrategyConfig(use="consistency", fields={"models": ("small",), "samples": 2}),
            },
            require_key=False,
            store=str(tmp_path / "g.db"),
            cors_origins=("https://app.example",),
        )
        async with Gateway(made) as gateway, aiohttp.ClientSession() as session:
            server = App(gateway).server()
            listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
            url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"

            async def told(method, path, origin="https://app.example", **options):
                headers = {"origin": origin, "access-control-request-method": "POST"}
                async with session.request(method, url + path, headers=headers, **options) as answer:
                    await answer.read()
                    return answer.status, answer.headers.get("access-control-allow-origin"), answer.headers

            chat = {"model": "small", "messages": [{"role": "user", "content": "x"}]}
            status, allowed, headers = await told("OPTIONS", "/v1/chat/completions")
            assert (status, allowed) == (204, "https://app.example")
            assert "authorization" in headers["access-control-allow-headers"]
            assert "access-control-allow-credentials" not in headers
            # Whatever clients send of their own, and nothing that is no list of names.
            names = "x-api-key,anthropic-version, anthropic-dangerous-direct-browser-access,x-stainless-lang"
            for asked, allowed in ((names, names), ("a b", None), ("a,,b", None), ("a" * 129, None), ("*:", None)):
                more = {"origin": "https://app.example", "access-control-request-method": "POST"}
                more["access-control-request-headers"] = asked
                async with session.options(url + "/v1/messages", headers=more) as answer:
                    assert answer.headers["access-control-allow-headers"] == (allowed or SENT), asked
            for stream in (False, True):
                for asked in ({**chat, "stream": stream}, {**chat, "model": "auto/twice", "stream": stream}):
                    found = await told("POST", "/v1/chat/completions", json=asked)
                    assert found[:2] == (200, "https://app.example")
                    ours = {name.lower() for name in found[2] if name.lower().startswith("x-")}
                    # A header that a page may not read is none to it.
                    assert ours >= {"x-request-id", "x-route-model"}
                    assert ("x-route-calls" in ours) == (asked["model"] == "auto/twice")
                    assert ours - {"x-accel-buffering"} <= set(found[2]["access-control-expose-headers"].split(", "))
            # An error is to be read too.
            assert (await told("POST", "/v1/chat/completions", json={}))[:2] == (400, "https://app.example")
            assert (await told("GET", "/v1/models/small"))[:2] == (200, "https://app.example")
            for path in ("/admin/keys", "/ui", "/ui/parts", "/ui/label", "/metrics"):
                assert (await told("OPTIONS", path))[1] is None, path
                assert (await told("GET", path))[1] is None, path
            assert (await told("OPTIONS", "/v1/chat/completions", origin="https://evil.example"))[:2] == (403, None)
            assert (await told("POST", "/v1/chat/completions", origin="https://app.example.evil", json=chat))[1] is None
            listener.close()
            await server.shutdown(0.1)

    asyncio.run(main())


@pytest.mark.parametrize("origin", ["app.example", "https://app.example/", "https://*.example", "null", ""])
def test_an_origin_is_written_as_browsers_send_it(origin):
    with pytest.raises(ConfigError, match=r"cors_origins\.0 is"):
        GatewayConfig(
            models=(ModelConfig(name="small", deployments=(DeploymentConfig(provider=Mock.Config(model="small")),)),),
            strategies={"cheapest": StrategyConfig(use="cheapest")},
            cors_origins=(origin,),
        )


def test_half_of_a_surrogate_pair_comes_back_as_json_has_it(tmp_path):
    half = "a \ud800 b"

    async def work(call):
        asked = {"model": "small", "input": "x", "instructions": half, "metadata": {half: half}}
        status, told = await call("POST", "/v1/responses", asked, key=None)
        assert (status, told["instructions"], told["metadata"]) == (200, half, {half: half})
        status, told = await call("POST", "/v1/messages", {"model": half, "messages": []}, key=None)
        assert (status, told["type"]) == (400, "error")
        status, told = await call("POST", "/admin/explain", {"model": half, "messages": [{"role": half}]})
        assert status == 400
        assert told["error"]["message"]

    served(tmp_path, work, require_key=False)
