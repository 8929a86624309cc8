"""What is said of answers takes no more room and time than the answers do: within the key's rate, once for each request and key."""

import asyncio

import pytest

from anabranch.errors import InputError
from anabranch.gateway.config import DeploymentConfig, GatewayConfig, LimitsConfig, ModelConfig
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.store import open_store, subjects_of
from anabranch.gateway.store.records import LedgerRow
from anabranch.web.api_error import ApiError

BODY = {"model": "small", "messages": [{"role": "user", "content": "hello"}]}


def config(tmp_path, **fields):
    provider = Mock.Config(model="small", tokens=4)
    model = ModelConfig(name="small", max_tokens=50, deployments=(DeploymentConfig(provider=provider),))
    return GatewayConfig(models=(model,), store=str(tmp_path / "g.db"), **fields)


async def answered(gateway, key=None):
    """The id of a request."""
    reply = await gateway.handle("chat", BODY, key=key)
    return reply.headers["x-request-id"]


async def refusal(work):
    with pytest.raises(ApiError) as caught:
        await work
    return caught.value.status, caught.value.code, "Retry-After" in caught.value.headers


def test_feedback_is_within_the_rate_of_its_key(tmp_path):
    async def main():
        async with Gateway(config(tmp_path)) as gateway:
            secret, _ = await gateway.store.create_key("k", rpm=3)
            other, _ = await gateway.store.create_key("other", rpm=3)
            id = await answered(gateway, secret)
            said = {"request_id": id, "score": 1.0}
            await gateway.feedback(said, key=secret)
            # A guess of what others have asked counts too.
            assert await refusal(gateway.feedback({**said, "request_id": "x"}, key=secret)) == (
                404,
                "unknown_request",
                False,
            )
            limited = (429, "rate_limit_exceeded", True)
            for _ in range(20):
                assert await refusal(gateway.feedback(said, key=secret)) == limited
            assert await refusal(gateway.handle("chat", BODY, key=secret)) == limited
            await answered(gateway, other)
            assert len(await gateway.store.feedbacks()) == 1

    asyncio.run(main())


def test_the_gateway_s_own_rate_holds_where_there_is_no_key(tmp_path):
    async def main():
        async with Gateway(config(tmp_path, require_key=False, limits=LimitsConfig(rpm=2))) as gateway:
            said = {"request_id": await answered(gateway), "score": 1.0}
            await gateway.feedback(said)
            assert await refusal(gateway.feedback(said)) == (429, "rate_limit_exceeded", True)

    asyncio.run(main())


def test_the_last_word_of_a_key_counts(url):
    """Of a request: one row for its key, one for operators; the mean is of these."""

    async def main():
        async with open_store(url) as store:
            _, key = await store.create_key("k")
            held = await store.reserve("r", subjects_of(key), 1)
            store.settle(held, LedgerRow(request_id="r", cost_nano=1))
            for score in (0.0, 0.25, 1.0):
                await store.feedback("r", score, key_id=key.id, comment=f"it is {score}")
            await store.feedback("r", 0.0)
            await store.feedback("r", 0.5)
            with pytest.raises(InputError):
                await store.feedback("r", 0.0, key_id="another")
            assert [(one.key_id, one.score, one.comment) for one in await store.feedbacks("r")] == [
                ("", 0.5, ""),
                (key.id, 1.0, "it is 1.0"),
            ]
            assert (await store.ledger())[0].quality == 0.75

    asyncio.run(main())


def test_many_words_at_once_through_two_replicas_are_one_row(url):
    async def main():
        async with open_store(url) as one, open_store(url) as other:
            await one.append(LedgerRow(request_id="r"))
            await asyncio.gather(*((one, other)[at % 2].feedback("r", at / 40, comment="x" * 2000) for at in range(40)))
            assert len(await one.feedbacks("r")) == 1

    asyncio.run(main())
