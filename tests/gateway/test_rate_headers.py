"""What a key has left of its own limits, as OpenAI's clients read it: on answers, streams and refusals, and of nobody else."""

import asyncio

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway.config import DeploymentConfig, GatewayConfig, LimitsConfig, ModelConfig
from anabranch.gateway.core.admission import Admission, Left, Limits
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.http.app import App
from anabranch.gateway.http.rate_headers import duration, headers_of
from anabranch.gateway.in_flight import InFlight
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.shared.counts import RedisCounts
from anabranch.gateway.store import RateLimits
from anabranch.gateway.store.limits import Bucket

CHAT = {"model": "small", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
PAGE = "https://app.example"


def served(tmp_path, work, **fields):
    """What ``await work(store, ask)`` gives; ``ask(key, body, path)`` gives the status and the headers that tell of limits, of HTTP."""
    provider = Mock.Config(model="small", tokens=4, tokens_per_s=10_000)
    model = ModelConfig(name="small", deployments=(DeploymentConfig(provider=provider),))
    config = GatewayConfig(models=(model,), store=str(tmp_path / "g.db"), cors_origins=(PAGE,), **fields)

    async def main():
        async with Gateway(config) as gateway, aiohttp.ClientSession() as session:
            # Nothing fills up again while this runs.
            gateway.rates._clock = lambda: 0.0
            server = App(gateway).server()
            listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
            url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"

            async def ask(key, body=CHAT, path="/v1/chat/completions", **headers):
                headers |= {} if key is None else {"authorization": f"Bearer {key}"}
                method = "GET" if body is None else "POST"
                async with session.request(method, url + path, json=body, headers=headers) as answer:
                    await answer.read()
                    return answer.status, {
                        name.lower().removeprefix("x-ratelimit-"): value
                        for name, value in answer.headers.items()
                        if name.lower().startswith(("x-ratelimit-", "retry-after", "access-control-expose"))
                    }

            try:
                return await work(gateway.store, ask)
            finally:
                listener.close()
                await server.shutdown(0.1)

    return asyncio.run(main())


def test_each_answer_and_refusal_tells_what_is_left_of_the_key_s_own(tmp_path):
    async def work(store, ask):
        key, _ = await store.create_key("a", rpm=3, tpm=100_000)
        found = [await ask(key), await ask(key, CHAT | {"stream": True}), await ask(key), await ask(key)]
        assert [status for status, _ in found] == [200, 200, 200, 429]
        assert [told["remaining-requests"] for _, told in found] == ["2", "1", "0", "0"]
        for _, told in found:
            assert (told["limit-requests"], told["limit-tokens"]) == ("3", "100000")
            assert 99_900 < int(told["remaining-tokens"]) < 100_000
        # All three are there again in a minute, the next one in a third of it.
        assert [told["reset-requests"] for _, told in found] == ["20s", "40s", "1m0s", "1m0s"]
        assert found[3][1]["retry-after"] == "20"

    served(tmp_path, work)


def test_nothing_is_told_of_limits_that_there_are_not_or_of_others(tmp_path):
    async def work(store, ask):
        busy, _ = await store.create_key("busy", rpm=5)
        still, _ = await store.create_key("still", rpm=5)
        free, _ = await store.create_key("free")
        for _ in range(4):
            _, told = await ask(busy)
        assert set(told) == {"limit-requests", "remaining-requests", "reset-requests"}
        assert told["remaining-requests"] == "1"
        assert (await ask(still))[1]["remaining-requests"] == "4"
        for key in (free, None, "sk-wrong"):
            assert (await ask(key))[1] == {}

    served(tmp_path, work, require_key=False)


def test_limits_that_the_config_gives_each_key_are_the_key_s_and_who_has_none_is_told_nothing(tmp_path):
    async def work(store, ask):
        # They share theirs with all that come without a key.
        assert (await ask(None))[1] == {}
        key, _ = await store.create_key("a")
        assert (await ask(key))[1]["remaining-requests"] == "8"

    served(tmp_path, work, require_key=False, limits=LimitsConfig(rpm=9))


def test_other_routes_and_errors_tell_it_too_and_pages_may_read_it(tmp_path):
    async def work(store, ask):
        key, _ = await store.create_key("a", rpm=9)
        assert (await ask(key, CHAT | {"model": "none"}))[0] == 404
        assert (await ask(key, CHAT | {"n": "x"}))[1]["limit-requests"] == "9"
        status, told = await ask(key, CHAT, "/v1/messages")
        assert (status, told["limit-requests"]) == (200, "9")
        assert (await ask(key, None, "/v1/models"))[1]["limit-requests"] == "9"
        for body in (CHAT, CHAT | {"stream": True}):
            _, told = await ask(key, body, origin=PAGE)
            assert "x-ratelimit-remaining-requests" in told["access-control-expose-headers"]

    served(tmp_path, work)


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (0, "0s"),
        (-1, "0s"),
        (0.02, "20ms"),
        (0.0001, "1ms"),
        (1, "1s"),
        (8.64, "8.64s"),
        (86.4, "1m26.4s"),
        (360, "6m0s"),
        (3603, "1h0m3s"),
    ],
)
def test_times_are_written_as_openai_writes_them(seconds, told):
    assert duration(seconds) == told


@given(st.floats(0, 1e6))
def test_a_time_is_never_told_too_short(seconds):
    parts = duration(seconds)
    total = 0.0
    for unit, factor in (("h", 3600), ("m", 60)):
        if unit in parts.removesuffix("ms"):
            head, parts = parts.split(unit, 1)
            total += int(head) * factor
    total += float(parts[:-2]) / 1000 if parts.endswith("ms") else float(parts.removesuffix("s"))
    assert seconds - 2e-6 <= total <= seconds + 1.1e-3


def test_what_is_left_fills_up_evenly_and_never_falls_below_nothing():
    now = [0.0]
    door = Admission(RateLimits(lambda: now[0]), InFlight())
    limits = Limits(60, 600, None)

    async def main():
        await door.enter("k", "a", 90, limits)
        assert door.left("k", limits) == {"requests": Left(60, 59, 1.0), "tokens": Left(600, 510, 9.0)}
        door.correct("k", 1000, 600, is_shared=False)
        assert door.left("k", limits)["tokens"] == Left(600, 0, 109.0)
        now[0] = 0.5
        # Half a request is none.
        assert door.left("k", limits)["requests"] == Left(60, 59, 0.5)
        now[0] = 200.0
        assert door.left("k", limits) == {"requests": Left(60, 60, 0.0), "tokens": Left(600, 600, 0.0)}
        assert door.left("k", Limits(None, None, 5)) == {}

    asyncio.run(main())
    assert headers_of({}) == {}


def test_what_redis_told_last_fills_up_again_meanwhile():
    now = [0.0]
    counts = RedisCounts(None, lambda: None, clock=lambda: now[0])
    counts._levels["k", "rpm"] = Bucket(10.0, 0.0)
    found = []
    for now[0] in (0.0, 15.0, 30.0, 3600.0):
        found.append(counts.level("k", "rpm", 60))
    assert found == [10.0, 25.0, 40.0, 60.0]
    assert counts.level("k", "tpm", 60) is None
