"""Sharing without a Redis: its config, what a dispatcher takes over, a cache that asks others, and what operators are told."""

import asyncio
import json
from types import SimpleNamespace

import pytest

from anabranch.config import to_dict
from anabranch.errors import ConfigError
from anabranch.gateway.cache import Entry
from anabranch.gateway.caches import Caches
from anabranch.gateway.config import CacheConfig, DeploymentConfig, GatewayConfig, ModelConfig, load_config
from anabranch.gateway.config.redact import redacted
from anabranch.gateway.config.shared import SharedConfig
from anabranch.gateway.dispatch import Deployment, Dispatcher, Group
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.http import admin
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.shared import AwayError
from anabranch.web.api_error import ApiError
from gateway_process import mock_config


@pytest.mark.parametrize(
    "url",
    [
        "",
        "redis",
        "redis://",
        "http://user:hush@host/0",
        "redis://:hush@host:x/0",
        "redis://host:99999/0",
        "redis://host/x",
        "redis://host/0/1",
        "rediss://host/-1?db=3",
        "unix://",
        "//host",
        "env:",
    ],
)
def test_what_leads_to_no_redis_is_refused_without_being_shown(url):
    with pytest.raises(ConfigError, match=r"url (must be|cannot be read)") as caught:
        SharedConfig(url=url)
    assert "hush" not in str(caught.value)


def test_what_leads_to_one_is_taken(monkeypatch):
    for url in ("redis://host", "redis://user:word@host:6380/3", "rediss://[::1]:1/0", "unix:///run/redis.sock"):
        assert SharedConfig(url=url).revealed() == url
    by_name = SharedConfig(url="env:SOME_REDIS")
    with pytest.raises(ConfigError, match="SOME_REDIS is not set"):
        by_name.revealed()
    monkeypatch.setenv("SOME_REDIS", "http://user:hush@host")
    with pytest.raises(ConfigError, match="must be redis://") as caught:
        by_name.revealed()
    assert "hush" not in str(caught.value)
    monkeypatch.setenv("SOME_REDIS", "redis://host")
    assert by_name.revealed() == "redis://host"
    for prefix in ("", "a b", "a:b", "*", "x" * 65):
        with pytest.raises(ConfigError, match="prefix is"):
            SharedConfig(url="redis://host", prefix=prefix)


def test_a_password_is_not_shown():
    shown = redacted(to_dict(SharedConfig(url="redis://user:hush@host:1/0")))
    assert "hush" not in json.dumps(shown)
    assert "host" in shown["url"]


def test_a_variable_that_is_not_set_is_told_with_its_line(tmp_path):
    path = mock_config(tmp_path / "gateway.toml", top='require_key = false\n[shared]\nurl = "env:NO_SUCH_REDIS"\n')
    with pytest.raises(
        ConfigError, match=r"gateway\.toml:4: shared\.url: the environment variable NO_SUCH_REDIS is not set"
    ):
        load_config(path)


# Breakers


def dispatcher(now):
    deployments = tuple(Deployment(name=name, provider=Mock.Config(model="m")) for name in "ab")
    return Dispatcher([Group(name="m", deployments=deployments)], clock=lambda: now[0])


def test_what_another_process_says_of_a_deployment_opens_it_and_is_not_said_again():
    now, said = [100.0], []
    made = dispatcher(now)
    made.on_change = lambda live: said.append(live.breaker.phase)
    live, other = made.lives()
    live.told_open(0.0, 1, now[0])
    assert live.breaker.phase == "closed"
    live.told_open(7.0, 3, now[0])
    assert (live.breaker.phase, live.breaker.until, live.breaker.times, other.breaker.phase) == (
        "open",
        107.0,
        3,
        "closed",
    )
    live.told_open(1e9, 9, now[0])
    assert live.breaker.until == 107.0
    assert not live.can_take(106.9, 1)
    assert said == []
    # Its time is up: it is tried, and what comes of that is this process's own to say.
    now[0] = 107.0
    ticket = live.begin(now[0], 1)
    live.end(ticket, "failure", now[0])
    assert said == ["half_open", "open"]
    assert live.breaker.times == 4
    live.told_well(now[0])
    assert live.can_take(now[0], 1)
    live.told_well(now[0])
    assert live.breaker.phase == "open"


def test_nobody_shuts_a_deployment_for_longer_than_the_rules_say():
    now = [0.0]
    made = dispatcher(now)
    [live, _] = made.lives()
    live.told_open(1e12, 1, 0.0)
    assert live.breaker.until == made.rules.breaker.max_open_s


def test_an_attempt_of_before_says_nothing_of_a_breaker_that_was_told_to_open():
    now = [0.0]
    [live, _] = dispatcher(now).lives()
    ticket = live.begin(0.0, 1)
    live.told_open(5.0, 1, 0.0)
    live.end(ticket, "success", 1.0)
    assert (live.breaker.phase, live.in_flight) == ("open", 0)


# Answers


class Elsewhere:
    def __init__(self):
        self.held, self.asked = {}, []

    async def get(self, tenant, key):
        self.asked.append((tenant, key))
        await asyncio.sleep(0.01)
        found = self.held.get((tenant, key))
        return None if found is None else (found, 60.0)

    def put(self, tenant, key, entry, ttl_s):
        self.held[tenant, key] = entry
        self.ttl_s = ttl_s


def test_an_answer_of_another_process_is_asked_for_once():
    async def main():
        shared = Elsewhere()
        one = Caches(CacheConfig(ttl_s=60), None, shared=shared)
        entry = Entry(body=b"{}", model="m")
        assert await one.elsewhere("k", b"q") is None
        one.put("k", (one.exact, b"q"), None, None, entry)
        assert (shared.held, shared.ttl_s) == ({("k", b"q"): entry}, 60)
        two = Caches(CacheConfig(), None, shared=shared)
        assert await two.elsewhere("k", b"q") == two.exact.get("k", b"q") == entry
        # Names of requests are of each process.
        two.put("k", (two.named, ("name", b"mark")), None, None, entry)
        assert set(shared.held) == {("k", b"q")}
        assert await Caches(CacheConfig(), None).elsewhere("k", b"q") is None

    asyncio.run(main())


def config(tmp_path, **provider):
    made = DeploymentConfig(provider=Mock.Config(model="small", tokens=4, **provider))
    return GatewayConfig(
        models=(ModelConfig(name="small", deployments=(made,)),), store=str(tmp_path / "g.db"), require_key=False
    )


def test_requests_are_answered_by_what_another_process_kept(tmp_path):
    body = {"model": "small", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}

    async def main():
        async with Gateway(config(tmp_path)) as one, Gateway(config(tmp_path)) as two:
            shared = Elsewhere()
            for gateway in (one, two):
                gateway.caches = Caches(gateway.config.cache, None, shared=shared)
            first = await one.handle("chat", body)
            together = await asyncio.gather(*(two.handle("chat", body) for _ in range(5)))
            assert {reply.body for reply in together} == {first.body}
            assert {reply.headers["x-cache"] for reply in together} <= {"exact", "shared"}
            # One asked for all.
            assert len(shared.asked) == 2
            assert len(two.caches.flights) == 0
            streamed = await two.handle("chat", {**body, "stream": True})
            assert streamed.headers["x-cache"] == "exact"
            async for _ in streamed.stream:
                pass

    asyncio.run(main())


class Away:
    async def clear(self, tenant):
        raise AwayError("away")


class Workers:
    def __init__(self):
        self.asked = []

    async def ask(self, name, of):
        self.asked.append((name, of))
        return {1: b"2"}


def test_an_answer_that_came_out_of_redis_while_it_was_cleared_is_cleared_too(tmp_path):
    """It was taken into the cache of the process that had cleared its own already, and was given for as long as answers are kept."""

    async def main():
        async with Gateway(config(tmp_path)) as gateway:
            caches, workers = gateway.caches, Workers()

            class Slow:
                async def clear(self, tenant):
                    caches.exact.put("k", b"q", Entry(body=b"old", model="m"))

            operators = admin.AdminRoutes(gateway, None, workers)
            for name in ("", "k"):
                caches.exact.put("k", b"q", Entry(body=b"old", model="m"))
                gateway.shared = Slow()
                try:
                    # What is cleared twice counts once.
                    assert await operators._clear(SimpleNamespace(name=name)) == {"deleted": 3}
                finally:
                    gateway.shared = None
                assert caches.exact.get("k", b"q") is None
            assert workers.asked == [("clear", "")] * 2 + [("clear", "k")] * 2

    asyncio.run(main())


def test_who_clears_caches_is_told_where_some_could_not_be(tmp_path):
    async def main():
        async with Gateway(config(tmp_path)) as gateway:
            gateway.shared, workers = Away(), Workers()
            operators = admin.AdminRoutes(gateway, None, workers)
            try:
                with pytest.raises(ApiError) as caught:
                    await operators._clear(SimpleNamespace(name=""))
            finally:
                gateway.shared = None
            assert (caught.value.status, caught.value.code) == (503, "shared_unavailable")
            # Those on this machine are cleared all the same.
            assert workers.asked == [("clear", "")]

    asyncio.run(main())
