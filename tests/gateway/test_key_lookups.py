"""A key is looked up once a request, before its body is read; and what is answered without a model has room beside its requests."""

import asyncio

import aiohttp
import pytest

from anabranch.errors import CapacityError, ConfigError
from anabranch.gateway.config import DeploymentConfig, GatewayConfig, LimitsConfig, ModelConfig
from anabranch.gateway.core.admission import Admission
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.http.app import App
from anabranch.gateway.in_flight import InFlight
from anabranch.gateway.key_admission import KeyAdmission
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.store import KeyRecord, RateLimits, Store
from anabranch.web.api_error import ApiError

MESSAGES = [{"role": "user", "content": "hello"}]
CHAT = {"model": "small", "messages": MESSAGES}


def config(tmp_path, **fields):
    model = ModelConfig(name="small", deployments=(DeploymentConfig(provider=Mock.Config(model="m")),))
    return GatewayConfig(models=(model,), store=str(tmp_path / "g.db"), **fields)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", CHAT),
        ("chat/completions", {**CHAT, "stream": True}),
        ("completions", {"model": "small", "prompt": "hello"}),
        ("embeddings", {"model": "small", "input": "hello"}),
        ("responses", {"model": "small", "input": "hello"}),
        ("messages", {**CHAT, "max_tokens": 5}),
        ("messages/count_tokens", CHAT),
        ("feedback", {"request_id": "nobody", "score": 1}),
        ("models", None),
        ("models/small", None),
        ("key", None),
    ],
)
def test_a_request_looks_its_key_up_once(tmp_path, monkeypatch, path, body):
    looked, inner = [], Store.key_of

    async def key_of(self, secret):
        looked.append(secret)
        return await inner(self, secret)

    monkeypatch.setattr(Store, "key_of", key_of)

    async def work():
        async with Gateway(config(tmp_path)) as gateway, aiohttp.ClientSession() as session:
            secret, record = await gateway.store.create_key("k")
            server = App(gateway).server()
            listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
            url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}/v1/{path}"
            headers = {"authorization": f"Bearer {secret}"}
            method = "GET" if body is None else "POST"
            try:
                async with session.request(method, url, json=body, headers=headers) as answer:
                    await answer.read()
                    assert answer.status == (404 if path == "feedback" else 200)
                await gateway.settled()
                # It is the key's request all the same.
                assert {row.key_id for row in await gateway.store.ledger()} <= {record.id}
            finally:
                listener.close()
                await server.shutdown(0.1)
        return secret

    secret = asyncio.run(work())
    assert looked == [secret]


class Keys:
    """A store of one key, which may not answer."""

    def __init__(self, *, has_keys=False, trouble=False):
        self.record, self._has_keys, self._trouble = KeyRecord(id="k", rpm=1, max_in_flight=1), has_keys, trouble

    async def key_of(self, secret):
        if self._trouble:
            raise CapacityError("gone")
        return self.record if secret == "right" else None

    async def has_keys(self):
        return self._has_keys


refused = []


def admission(keys, **fields):
    of = GatewayConfig(
        models=(ModelConfig(name="m", deployments=(DeploymentConfig(provider=Mock.Config(model="m")),)),), **fields
    )
    return KeyAdmission(lambda: keys, lambda: of, Admission(RateLimits(), InFlight()), refused.append)


@pytest.mark.parametrize(
    ("secret", "require_key", "has_keys", "found"),
    [
        ("right", True, True, "k"),
        ("right", False, True, "k"),
        (None, False, True, None),
        (None, True, False, "is missing"),
        ("wrong", True, False, "is not known"),
        # It is hardly meant, once there are keys.
        ("wrong", False, True, "is not known"),
        ("wrong", False, False, None),
    ],
)
def test_who_needs_a_key_and_whose_is_wrong(secret, require_key, has_keys, found):
    async def work():
        record = await admission(Keys(has_keys=has_keys), require_key=require_key).authenticate(secret)
        return None if record is None else record.id

    if found in ("k", None):
        assert asyncio.run(work()) == found
    else:
        with pytest.raises(ApiError, match=found) as caught:
            asyncio.run(work())
        assert (caught.value.status, caught.value.headers["WWW-Authenticate"]) == (401, "Bearer")


def test_a_store_that_does_not_answer_is_unavailable():
    with pytest.raises(ApiError) as caught:
        asyncio.run(admission(Keys(trouble=True)).authenticate("right"))
    assert caught.value.status == 503


def test_what_is_answered_here_alone_counts_as_a_request_of_its_key():
    async def work():
        held, record = admission(Keys(), limits=LimitsConfig(rpm=2)), Keys().record

        async def counted(says):
            with pytest.raises(ApiError, match=says):
                async with held.counted(record):
                    pass

        async with held.counted(record):
            await counted("under way")
        # It was counted out though it was refused.
        for _ in range(2):
            await counted("a minute")
        refused.clear()
        with pytest.raises(ApiError, match="a minute"):
            await held.hold(record, None)
        assert refused == ["rate_limit_exceeded"]
        for _ in range(2):
            await held.admit(None)
        with pytest.raises(ApiError) as caught:
            await held.admit(None)
        assert caught.value.status == 429

    asyncio.run(work())


MB = 1 << 20


def test_a_large_body_is_a_request_of_its_key_before_it_has_come():
    async def work():
        door, record = admission(Keys(), limits=LimitsConfig(rpm=9)), KeyRecord(id="k", max_in_flight=1)
        coming = await door.hold(record, MB)
        for large in (MB, None):
            with pytest.raises(ApiError, match="under way") as caught:
                await door.hold(record, large)
            assert (caught.value.status, caught.value.headers["Retry-After"]) == (429, "1")
        # Small ones are not, and neither are those of others kept out.
        (await door.hold(record, 1000)).close()
        (await door.hold(KeyRecord(id="other", max_in_flight=1), MB)).close()
        coming.close()
        # Its request has the place that it had, and leaves it.
        coming = await door.hold(record, MB)
        async with door.counted(record, coming):
            with pytest.raises(ApiError, match="under way"):
                await door.hold(record, MB)
        (await door.hold(record, MB)).close()
        coming.close()
        async with door.counted(record):
            pass

    asyncio.run(work())


def test_a_key_that_takes_all_it_may_leaves_room_for_a_body_of_another():
    """Of any size that there may be, in the least room that may be configured."""
    limits = LimitsConfig(body_bytes=MB, bodies_bytes=4 * MB)

    async def work():
        door, hostile, num_refused = admission(Keys(), limits=limits), KeyRecord(id="h", max_in_flight=1000), 0
        refused.clear()
        told = set()
        # As many as it likes, all begun before any has come.
        for body in [await door.hold(hostile, MB) for _ in range(50)]:
            try:
                for _ in range(64):
                    body.more(MB // 64, None)
                body.is_whole()
            except ApiError as error:
                told.add((error.status, error.code, error.headers["Retry-After"]))
                num_refused += 1
                body.close()
        assert (num_refused, told) == (48, {(429, "overloaded", "1")})
        with pytest.raises(ApiError, match="this sender"):
            await door.hold(hostile, MB)
        with pytest.raises(ApiError, match="this sender"):
            await door.hold(hostile, 1000)
        assert refused == ["overloaded"] * 50
        other = await door.hold(KeyRecord(id="o"), MB)
        for _ in range(64):
            other.more(MB // 64, None)
        other.close()
        # What was refused for its bytes has no place among the requests either.
        assert door._admission._senders._counts == {"h": 2}

    asyncio.run(work())


def test_a_new_limit_of_bodies_holds_from_the_next_one_on():
    of = [LimitsConfig(body_bytes=MB, bodies_bytes=4 * MB)]

    class Config:
        @property
        def limits(self):
            return of[0]

    async def work():
        door = KeyAdmission(Keys, Config, Admission(RateLimits(), InFlight()), refused.append)
        with pytest.raises(ApiError, match="overloaded"):
            await door.hold(None, 5 * MB)
        of[0] = LimitsConfig(body_bytes=MB, bodies_bytes=8 * MB)
        (await door.hold(None, 5 * MB)).close()

    asyncio.run(work())


def test_the_room_for_bodies_is_enough_for_one_beside_a_greedy_key():
    assert LimitsConfig().room_for_bodies == 256 * MB
    assert LimitsConfig(body_bytes=100 * MB).room_for_bodies == 400 * MB
    with pytest.raises(ConfigError, match=r"bodies_bytes is 67,108,863; it needs at least 67,108,864"):
        LimitsConfig(bodies_bytes=64 * MB - 1)
