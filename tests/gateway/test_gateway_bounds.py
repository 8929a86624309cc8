"""What goes out bounds the bill by what was reserved: each model is told how long an answer may be, as was set aside for it."""

import asyncio
import contextlib
import json
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.gateway.config import (
    DeploymentConfig,
    GatewayConfig,
    LimitsConfig,
    ModelConfig,
    RetryConfig,
)
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.prompt_tokens import PromptCount, room_of
from anabranch.gateway.providers.mock import Mock, MockTransport
from anabranch.gateway.providers.openai import OpenAI
from anabranch.gateway.providers.provider import UpstreamRequest
from anabranch.routers.money import Price
from anabranch.web.api_error import ApiError

PRICE = Price.of_dollars(1, 10)  # 1,000 and 10,000 nano-dollars a token
LIMIT = 4096


@pytest.fixture
def sent(monkeypatch):
    """Bodies that went out."""
    bodies, real = [], MockTransport.open

    async def opened(self, call):
        bodies.append(json.loads(call.body))
        return await real(self, call)

    monkeypatch.setattr(MockTransport, "open", opened)
    return bodies


def model(name, own=None, price=PRICE, **behaviour):
    provider = Mock.Config(model=name, **behaviour)
    return ModelConfig(name=name, price=price, max_tokens=own, deployments=(DeploymentConfig(provider=provider),))


def ends(bodies):
    return {body["model"]: (body.get("max_tokens"), body.get("max_completion_tokens")) for body in bodies}


def test_a_fallback_without_a_limit_does_not_lift_that_of_the_first(tmp_path, sent):
    """200 tokens at 10,000 nano-dollars are reserved and sent; were 4,096 sent, 40,960,000 would be spent of 2,200,000."""
    config = GatewayConfig(
        models=(model("short", 200, tokens=5000), model("open")),
        fallbacks={"short": ("open",)},
        require_key=False,
        store=str(tmp_path / "g.db"),
    )

    async def main():
        async with Gateway(config) as gateway:
            await gateway.store.set_budget("global", 2_200_000)
            await gateway.achat({"model": "short", "messages": [{"role": "user", "content": "hello"}]})
            (budget,) = await gateway.store.budgets()
            assert budget.spent_nano <= budget.limit_nano
            assert (await gateway.store.ledger())[0].completion_tokens == 200

    asyncio.run(main())
    assert ends(sent) == {"short": (200, None)}


def test_each_model_is_told_its_own(tmp_path, sent):
    config = GatewayConfig(
        models=(model("short", 200, fails=1), model("open", fails=1), model("long", 9000)),
        fallbacks={"short": ("open", "long")},
        require_key=False,
        store=str(tmp_path / "g.db"),
        retries=RetryConfig(attempts=1),
    )
    ask = {"model": "short", "messages": [{"role": "user", "content": "hello"}]}

    async def main(**fields):
        async with Gateway(config) as gateway:
            sent.clear()
            await gateway.achat({**ask, **fields})
            return ends(sent)

    assert asyncio.run(main()) == {"short": (200, None), "open": (LIMIT, None), "long": (9000, None)}
    asked = asyncio.run(main(max_completion_tokens=7))
    assert asked == dict.fromkeys(("short", "open", "long"), (None, 7))


def test_a_stream_that_another_goes_on_with_is_bounded_by_that_one_s(tmp_path, sent):
    config = GatewayConfig(
        models=(model("breaks", 200, script=("cut:2",)), model("open")),
        fallbacks={"breaks": ("open",)},
        require_key=False,
        store=str(tmp_path / "g.db"),
        mid_stream="continue",
        retries=RetryConfig(attempts=1),
    )

    async def main():
        async with Gateway(config) as gateway:
            body = {"model": "breaks", "stream": True, "messages": [{"role": "user", "content": "hello"}]}
            async for _ in await gateway.achat(body):
                pass

    asyncio.run(main())
    assert ends(sent) == {"breaks": (200, None), "open": (LIMIT, None)}


POOLS = st.lists(st.tuples(st.none() | st.integers(1, 6000), st.integers(1, 50), st.booleans()), min_size=1, max_size=4)
ASKED = st.fixed_dictionaries(
    {},
    optional={
        "max_tokens": st.none() | st.integers(1, 6000),
        "max_completion_tokens": st.none() | st.integers(1, 6000),
        "n": st.none() | st.integers(1, 4),
    },
)
ENDPOINTS = st.sampled_from(["chat", "stream", "completions", "many", "embeddings"])


@settings(max_examples=15)
@given(pool=POOLS, asked=ASKED, best_of=st.none() | st.integers(1, 3), endpoint=ENDPOINTS, limit=st.integers(1, 5000))
def test_what_goes_out_bounds_the_bill_by_what_was_reserved(pool, asked, best_of, endpoint, limit):
    """Whatever models have limits, whatever is asked for, whoever fails: each call may cost what was held while it was made."""
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(_bounded(folder, pool, asked, best_of, endpoint, limit))


async def _bounded(folder, pool, asked, best_of, endpoint, limit):
    names = [f"m{at}" for at in range(len(pool))]
    models = tuple(
        model(name, own, Price(input=1_000_000, output=price * 1_000_000), fails=float(fails))
        for name, (own, price, fails) in zip(names, pool, strict=True)
    )
    config = GatewayConfig(
        models=models,
        fallbacks={"m0": tuple(names[1:])} if names[1:] else {},
        require_key=False,
        store=f"{folder}/g.db",
        limits=LimitsConfig(max_tokens=limit),
        retries=RetryConfig(attempts=1),
    )
    body = {"model": "m0", **asked}
    if endpoint in ("chat", "stream"):
        body |= {"messages": [{"role": "user", "content": "hello"}], "stream": endpoint == "stream"}
    elif endpoint == "embeddings":
        body = {"model": "m0", "input": ["a", "b"]}
    else:
        body |= {"prompt": "hello" if endpoint == "completions" else ["hello", "there", "you"], "best_of": best_of}
    calls, real = [], MockTransport.open

    async def opened(self, call):
        held = await gateway.store._read(lambda connection: connection.rows("SELECT sum(nano) FROM reservations"))
        calls.append((json.loads(call.body), held[0][0]))
        return await real(self, call)

    MockTransport.open = opened
    try:
        async with Gateway(config) as gateway:
            kind = {"stream": "chat", "many": "completions"}.get(endpoint, endpoint)
            with contextlib.suppress(ApiError):
                reply = await gateway.handle(kind, body)
                if reply.stream is not None:
                    async for _ in reply.stream:
                        pass
    finally:
        MockTransport.open = real
    assert calls
    for sent_body, held in calls:
        price = next(one.price for one in models if one.name == sent_body["model"])
        prompts = len(body["prompt"]) if endpoint == "many" else 1
        answers = prompts * max(sent_body.get("n") or 1, sent_body.get("best_of") or 1)
        end = max(sent_body.get("max_tokens") or 0, sent_body.get("max_completion_tokens") or 0)
        assert end or endpoint == "embeddings"
        assert price.cost(1, end * answers) <= held


@pytest.mark.parametrize(
    ("name", "is_renamed"),
    [("gpt-5", True), ("openai/gpt-5-mini", True), ("o3", True), ("gpt-4o", False), ("olmo-2", False)],
)
def test_models_that_know_the_newer_name_alone_are_told_under_it(name, is_renamed):
    provider = OpenAI.Config(model=name, key_env=None).build()
    chat = UpstreamRequest("chat", {"model": "x", "messages": []})

    def ends(request):
        body = json.loads(provider.build(request).body)
        return body.get("max_tokens"), body.get("max_completion_tokens")

    assert ends(chat.bounded(7)) == ((None, 7) if is_renamed else (7, None))
    assert ends(chat) == (None, None)
    both = chat.with_body(max_tokens=5, max_completion_tokens=3)
    assert ends(both) == ((None, 5) if is_renamed else (5, 3))
    assert ends(chat.with_body(max_completion_tokens=3)) == (None, 3)


@pytest.mark.parametrize(
    ("most", "context", "prompt", "bound"),
    [
        (4096, None, PromptCount(9000, 36000, True), 4096),
        (4096, 8192, PromptCount(100, 400, True), 4096),
        (4096, 8192, PromptCount(2507, 10007, True), 8192 - 5014),
        (4096, 8192, PromptCount(10, 5000, True), 4096),  # an image: few tokens, many bytes
        (4096, 8192, PromptCount(4000, 16000, True), None),
        (4096, 8192, PromptCount(5000, 5000, False), 8192 - 5116),
        (4096, 8192, PromptCount(8190, 8190, False), 4096),
        (4096, 8192, PromptCount(9000, 9000, False), 4096),
    ],
)
def test_an_end_that_nobody_asked_for_leaves_room_for_the_prompt(most, context, prompt, bound):
    assert room_of(most, context, prompt) == bound


@given(st.integers(1, 9000), st.integers(1, 20000), st.integers(0, 20000), st.integers(0, 80000), st.booleans())
def test_what_is_asked_for_is_never_more_than_allowed_and_never_nothing(most, context, tokens, more, is_estimate):
    bound = room_of(most, context, PromptCount(tokens, tokens + more, is_estimate))
    assert bound is None or 1 <= bound <= most


def test_a_long_prompt_of_a_small_model_is_sent_with_room(tmp_path, sent):
    made = ModelConfig(
        name="small",
        context=8192,
        price=PRICE,
        deployments=(DeploymentConfig(provider=Mock.Config(model="small", tokens=3)),),
    )
    config = GatewayConfig(models=(made,), require_key=False, store=str(tmp_path / "g.db"))

    async def main():
        async with Gateway(config) as gateway:
            for words in (5000, 12_000):
                await gateway.achat({"model": "small", "messages": [{"role": "user", "content": "a " * words}]})

    asyncio.run(main())
    assert 0 < sent[0]["max_tokens"] <= 8192 - 5000
    assert "max_tokens" not in sent[1]
