"""One tenant beside another, over HTTP: whatever the one sends, the other never notices."""

import asyncio
from dataclasses import replace

import aiohttp
import pytest

from anabranch.gateway.config import DeploymentConfig, GatewayConfig, ModelConfig, RetryConfig, StrategyConfig
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.http.app import App
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.providers.scenes import Behaviour, Scene

HTML = {"content-type": "text/html", "retry-after": "300"}
PLAIN = {"content-type": "application/json", "retry-after": "300"}


def config(tmp_path, *providers, **fields):
    providers = providers or (Mock.Config(model="small", tokens=4),)
    deployments = tuple(DeploymentConfig(name=f"small-{at}", provider=one) for at, one in enumerate(providers))
    defaults = {
        "strategies": {"cheapest": StrategyConfig(use="cheapest")},
        "store": str(tmp_path / "g.db"),
        "retries": RetryConfig(base_s=0.0, cap_s=0.0),
    }
    return GatewayConfig(models=(ModelConfig(name="small", deployments=deployments),), **{**defaults, **fields})


def served(config, work):
    """What ``work(gateway, post)`` gives, of a gateway that listens; ``post(key, body)`` gives status, headers and body."""

    async def main():
        async with Gateway(config) as gateway, aiohttp.ClientSession() as session:
            server = App(gateway).server()
            listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
            url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"

            async def post(key, body, path="/v1/chat/completions"):
                headers = {} if key is None else {"authorization": f"Bearer {key}"}
                async with session.post(url + path, json=body, headers=headers) as answer:
                    return answer.status, answer.headers, await answer.read()

            try:
                return await work(gateway, post)
            finally:
                listener.close()
                await server.shutdown(0.1)

    return asyncio.run(main())


def ask(text="hello", **fields):
    return {"model": "small", "messages": [{"role": "user", "content": text}], **fields}


def refuses(monkeypatch, status, body, headers):
    """All mocks answer so to whoever says EVIL, and as ever to everybody else."""
    answer = Behaviour.scene

    def scene(self, path, raw):
        return Scene(status, dict(headers), [(0.0, body)]) if b"EVIL" in raw else answer(self, path, raw)

    monkeypatch.setattr(Behaviour, "scene", scene)


BILLING = b'{"error":{"message":"Invalid schema for function \'get_billing_info\': EVIL","type":"invalid_request_error","code":null}}'


@pytest.mark.parametrize(
    ("status", "body", "headers"),
    [
        (400, BILLING, PLAIN),
        (403, b"<!doctype html><title>403 Forbidden</title> blocked by our firewall", HTML),
        (404, b"{}", PLAIN),
        (409, b"{}", PLAIN),
        (413, b"{}", PLAIN),
        (422, b'{"detail":"insufficient_quota"}', PLAIN),
        (400, b'{"error":{"code":"content_filter","message":"billing"}}', PLAIN),
    ],
)
def test_a_sender_whose_requests_are_refused_stops_nobody(tmp_path, monkeypatch, status, body, headers):
    refuses(monkeypatch, status, body, headers)

    async def work(gateway, post):
        evil, _ = await gateway.store.create_key("evil", team="evil")
        good, _ = await gateway.store.create_key("good", team="good")
        for _ in range(20):  # nobody has been served yet
            assert (await post(evil, ask("EVIL")))[0] in (status, 502)
        for _ in range(100):
            assert (await post(evil, ask("EVIL", stream=True)))[0] in (status, 502)
            answered, found, _ = await post(good, ask())
            assert (answered, found["x-route-attempts"]) == (200, "1")
        assert [state["breaker"] for state in gateway.runtime.dispatcher.states()] == ["closed"]
        assert not gateway.runtime.dispatcher.changes

    served(config(tmp_path), work)


@pytest.mark.parametrize(("status", "headers"), [(500, PLAIN), (429, PLAIN), (503, HTML), (200, HTML)])
def test_a_sender_whose_requests_alone_fail_upstream_stops_nobody(tmp_path, monkeypatch, status, headers):
    """A prompt that crashes a server, or is larger than its account may send in a minute, fails whoever sends it, and nobody else."""
    refuses(monkeypatch, status, b"<html>", headers)

    async def work(gateway, post):
        evil, _ = await gateway.store.create_key("evil")
        good, _ = await gateway.store.create_key("good")
        for _ in range(50):
            answered, found, _ = await post(good, ask())
            assert (answered, found["x-route-attempts"]) == (200, "1")
            assert (await post(evil, ask("EVIL")))[0] in (429, 502)
        assert not gateway.runtime.dispatcher.changes

    served(config(tmp_path), work)


def test_two_keys_of_one_owner_whose_prompts_take_too_long_stop_nobody(tmp_path, monkeypatch):
    """They belong to no team, so that nobody knows that they are one."""
    answer = Behaviour.scene

    def scene(self, path, raw):
        return Scene(200, dict(PLAIN), [(5.0, b"{}")]) if b"EVIL" in raw else answer(self, path, raw)

    monkeypatch.setattr(Behaviour, "scene", scene)
    made = config(tmp_path, retries=RetryConfig(attempts=1))
    [model] = made.models
    model = replace(model, deployments=(replace(model.deployments[0], timeout_s=1.0),))

    async def work(gateway, post):
        evil = [(await gateway.store.create_key(name))[0] for name in ("one", "two")]
        good, _ = await gateway.store.create_key("good")
        assert (await post(good, ask()))[0] == 200
        for _ in range(2):
            told = await asyncio.gather(*(post(evil[at % 2], ask("EVIL")) for at in range(10)))
            assert {status for status, _, _ in told} == {504}
        assert (await post(good, ask("again")))[0] == 200
        assert not gateway.runtime.dispatcher.changes

    served(replace(made, models=(model,)), work)


def test_one_keys_retries_leave_those_of_another(tmp_path, monkeypatch):
    """A prompt that crashes a server is tried again; who asks so all the time uses up its own part."""
    failing = []
    answer = Behaviour.scene

    def scene(self, path, raw):
        is_unlucky = b"unlucky" in raw and not failing
        if is_unlucky:
            failing.append(raw)
        return (
            Scene(500, {"content-type": "application/json"}, [(0.0, b"{}")])
            if is_unlucky or b"EVIL" in raw
            else answer(self, path, raw)
        )

    monkeypatch.setattr(Behaviour, "scene", scene)

    async def work(gateway, post):
        evil, good = [(await gateway.store.create_key(name))[0] for name in ("evil", "good")]
        assert (await post(good, ask()))[0] == 200
        tried = [int((await post(evil, ask("EVIL")))[1]["x-route-attempts"]) for _ in range(20)]
        assert 20 < sum(tried) < 60
        status, headers, _ = await post(good, ask("unlucky"))
        assert (status, headers["x-route-attempts"]) == (200, "2")

    made = config(tmp_path, retries=RetryConfig(base_s=0.0, cap_s=0.0, attempts=3, window_s=600.0))
    served(made, work)


@pytest.mark.parametrize("least", [0, 10])
def test_a_budget_of_nothing_tries_nothing_again(tmp_path, monkeypatch, least):
    refuses(monkeypatch, 500, b"{}", PLAIN)

    async def work(gateway, post):
        key, _ = await gateway.store.create_key("k")
        return (await post(key, ask("EVIL")))[1]["x-route-attempts"]

    made = config(tmp_path, retries=RetryConfig(base_s=0.0, budget=0.0, least=least))
    assert served(made, work) == "1"


@pytest.mark.parametrize(
    ("status", "body"), [(401, b"{}"), (402, b"{}"), (429, b'{"error":{"code":"insufficient_quota"}}')]
)
def test_a_key_that_is_refused_or_has_no_money_left_shuts_the_deployment_at_once(tmp_path, monkeypatch, status, body):
    refuses(monkeypatch, status, body, {"content-type": "application/json"})

    async def work(gateway, post):
        key, _ = await gateway.store.create_key("one")
        await post(key, ask("EVIL"))
        return [state["breaker"] for state in gateway.runtime.dispatcher.states()]

    assert served(config(tmp_path), work) == ["open"]


def test_refusals_that_several_senders_meet_are_the_deployments(tmp_path, monkeypatch):
    """Our key may not use the model, or the address is wrong: nobody gets an answer."""
    refuses(monkeypatch, 403, b'{"error":{"message":"not allowed"}}', PLAIN)

    async def work(gateway, post):
        keys = [(await gateway.store.create_key(name, team=name if name < "c" else "c"))[0] for name in "abcd"]
        breaker = []
        for key in (keys[0], keys[0], keys[1], keys[1], keys[2]):
            await post(key, ask("EVIL"))
            breaker.append(gateway.runtime.dispatcher.states()[0]["breaker"])
        return breaker

    assert served(config(tmp_path), work) == ["closed"] * 4 + ["open"]


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (
            400,
            b'{"error":{"code":"invalid_function_parameters","type":"invalid_request_error","param":"tools[0].function.parameters"}}',
        ),
        (400, b'{"error":{"message":"You have reached your specified API usage limits"}}'),
        (422, b'{"detail":[{"loc":["body","tools",0],"msg":"field required","type":"missing"}]}'),
    ],
)
def test_the_same_mistake_of_many_senders_is_never_the_deployments(tmp_path, monkeypatch, status, body):
    refuses(monkeypatch, status, body, PLAIN)

    async def work(gateway, post):
        keys = [(await gateway.store.create_key(name))[0] for name in "abcdef"]
        assert {(await post(key, ask("EVIL")))[0] for key in keys * 4} == {status}
        assert (await post(keys[0], ask()))[0] == 200
        return [state["breaker"] for state in gateway.runtime.dispatcher.states()]

    assert served(config(tmp_path), work) == ["closed"]


GONE = b'{"error":{"message":"The model `gone` does not exist","type":"invalid_request_error","param":null,"code":"model_not_found"}}'


@pytest.mark.parametrize("status", [403, 404])
def test_a_deployment_without_the_model_is_gone_on_from_and_left_alone(tmp_path, monkeypatch, status):
    answer = Behaviour.scene

    def scene(self, path, raw):
        is_gone = b'"model":"gone"' in raw
        return (
            Scene(status, {"content-type": "application/json"}, [(0.0, GONE)]) if is_gone else answer(self, path, raw)
        )

    monkeypatch.setattr(Behaviour, "scene", scene)
    providers = Mock.Config(model="here", tokens=4), Mock.Config(model="gone", tokens=4)

    async def work(gateway, post):
        found = [await post(None, ask(stream=at % 2 == 1)) for at in range(60)]
        assert {status for status, _, _ in found} == {200}
        return [int(headers["x-route-attempts"]) for _, headers, _ in found]

    attempts = served(config(tmp_path, *providers, require_key=False), work)
    assert sum(attempts) <= 60 + 6


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (
            400,
            b'{"type":"error","error":{"type":"invalid_request_error","message":"prompt is too long: 208310 tokens > 200000 maximum"}}',
        ),
        (
            400,
            b'{"type":"error","error":{"type":"invalid_request_error","message":"Your credit balance is too low to access the API."}}',
        ),
        (404, b'{"detail":"Not Found"}'),
    ],
)
def test_another_model_is_asked_where_this_one_says_in_words_that_it_cannot(tmp_path, monkeypatch, status, body):
    """However many do, and long after the extra attempts are used up."""
    answer = Behaviour.scene

    def scene(self, path, raw):
        return (
            Scene(status, {"content-type": "application/json"}, [(0.0, body)])
            if b'"model":"first"' in raw
            else answer(self, path, raw)
        )

    monkeypatch.setattr(Behaviour, "scene", scene)
    models = tuple(
        ModelConfig(name=name, deployments=(DeploymentConfig(provider=Mock.Config(model=name, tokens=4)),))
        for name in ("first", "second")
    )

    async def work(gateway, post):
        found = [await post(None, {**ask(), "model": "first"}) for _ in range(60)]
        assert {(status, headers["x-route-model"]) for status, headers, _ in found} == {(200, "second")}
        assert {one["breaker"] for one in gateway.runtime.dispatcher.states()} == {"closed"}

    cheapest = {"cheapest": StrategyConfig(use="cheapest")}
    fields = {"models": models, "fallbacks": {"first": ("second",)}, "require_key": False, "strategies": cheapest}
    served(GatewayConfig(store=str(tmp_path / "g.db"), **fields), work)


def test_a_deployment_that_fails_everybody_is_left_alone(tmp_path):
    async def work(gateway, post):
        keys = [(await gateway.store.create_key(name))[0] for name in "ab"]
        assert [(await post(key, ask()))[0] for key in keys] == [200, 200]
        assert {(await post(key, ask()))[0] for key in keys * 4} == {502, 503}
        return [state["breaker"] for state in gateway.runtime.dispatcher.states()]

    failing = Mock.Config(model="small", tokens=4, script=("ok", "ok"), fails=1.0)
    assert served(config(tmp_path, failing, retries=RetryConfig(attempts=1, base_s=0.0, cap_s=0.0)), work) == ["open"]


def test_a_refused_key_of_one_deployment_is_tried_at_another(tmp_path):
    """403 may be for the key of the gateway: another deployment has its own. None is asked twice."""

    async def work(gateway, post):
        key, _ = await gateway.store.create_key("one")
        statuses = []
        for _ in range(6):
            status, headers, body = await post(key, ask())
            statuses.append(status)
            assert int(headers["x-route-attempts"]) <= 2, body
        return statuses

    barred, open_ = Mock.Config(model="small", fails=1.0, fail_with="403"), Mock.Config(model="small", tokens=4)
    assert served(config(tmp_path, barred, open_), work) == [200] * 6
    (tmp_path / "both").mkdir()
    assert served(config(tmp_path / "both", barred, barred), work) == [403] * 6
