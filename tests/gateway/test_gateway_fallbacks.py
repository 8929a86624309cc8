"""Fallbacks that are for long prompts, or for what a filter refused, alone: a dear model is not asked after every 500."""

import asyncio
import json

import pytest

from anabranch.errors import ConfigError
from anabranch.gateway.config import BreakerConfig, DeploymentConfig, GatewayConfig, ModelConfig, RetryConfig
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.providers.mock import Mock, MockTransport
from anabranch.web.api_error import ApiError

NAMES = ("short", "spare", "long", "tame")


def model(name, *script, context=None):
    provider = Mock.Config(model=name, script=script)
    return ModelConfig(name=name, context=context, deployments=(DeploymentConfig(provider=provider),))


def asked(tmp_path, scripts, *, attempts=1, context=None, stream=False, text="hello", **fields):
    """Who was asked, in order; the status if nobody answered."""
    models = tuple(model(name, *scripts.get(name, ()), context=context if name == "short" else None) for name in NAMES)
    tables = {
        "fallbacks": {"short": ("spare",)},
        "context_fallbacks": {"short": ("long",)},
        "filter_fallbacks": {"short": ("tame",)},
    } | fields
    config = GatewayConfig(
        models=models,
        require_key=False,
        store=str(tmp_path / "g.db"),
        retries=RetryConfig(attempts=attempts, base_s=0.0),
        **tables,
    )

    order, real = [], MockTransport.open

    async def opened(self, call):
        order.append(json.loads(call.body)["model"])
        return await real(self, call)

    async def main():
        async with Gateway(config) as gateway:
            body = {"model": "short", "stream": stream, "messages": [{"role": "user", "content": text}]}
            try:
                answer = await gateway.achat(body)
                if stream:
                    async for _ in answer:
                        pass
            except ApiError as error:
                return order, error.status
            return order, None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MockTransport, "open", opened)
        return asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("scripts", "order"),
    [
        ({"short": ("500",)}, ["short", "spare"]),
        ({"short": ("context",)}, ["short", "long"]),
        ({"short": ("filter",)}, ["short", "tame"]),
        ({"short": ("context",), "long": ("500",)}, ["short", "long", "spare"]),
        # What comes later opens what is for it.
        ({"short": ("500",), "spare": ("ok",)}, ["short", "spare"]),
    ],
)
def test_who_is_asked_after_what(tmp_path, scripts, order, stream):
    assert asked(tmp_path, scripts, stream=stream) == (order, None)


def test_the_dear_model_is_not_asked_when_all_others_are_down(tmp_path):
    assert asked(tmp_path, {"short": ("500",), "spare": ("500",)}) == (["short", "spare"], 502)


def test_a_fallback_for_long_prompts_is_tried_again_as_any(tmp_path):
    scripts = {"short": ("context",), "long": ("500", "ok")}
    assert asked(tmp_path, scripts, attempts=2) == (["short", "long", "long"], None)


def test_a_prompt_that_is_known_to_be_too_long_goes_there_at_once(tmp_path):
    long = "word " * 400
    assert asked(tmp_path, {}, context=300, text=long, fallbacks={}) == (["long"], None)


def test_a_model_that_is_both_is_a_fallback_for_all(tmp_path):
    found = asked(tmp_path, {"short": ("500",)}, fallbacks={"short": ("long",)})
    assert found == (["short", "long"], None)


def test_models_that_are_not_there_are_told():
    with pytest.raises(ConfigError, match=r"context_fallbacks.short.0 is 'loong'"):
        GatewayConfig(models=(model("short"), model("long")), context_fallbacks={"short": ("loong",)})
    with pytest.raises(ConfigError, match=r"filter_fallbacks.short.0 is 'short', which was tried before"):
        GatewayConfig(models=(model("short"),), filter_fallbacks={"short": ("short",)})


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize(("step", "asked_again"), [("500", ["short"]), ("context", [])])
def test_the_answer_of_a_fallback_is_not_kept_longer_than_what_it_is_for(tmp_path, step, asked_again, streams):
    models = (model("short", step), model("spare"))
    config = GatewayConfig(
        models=models,
        require_key=False,
        store=str(tmp_path / "g.db"),
        retries=RetryConfig(attempts=1, base_s=0.0),
        fallbacks={"short": ("spare",)},
        # What stands in while the cause may pass is kept for so long.
        breaker=BreakerConfig(failures=100, open_s=0.01),
    )

    async def main():
        async with Gateway(config) as gateway:
            body = {
                "model": "short",
                "stream": streams,
                "temperature": 0,
                "messages": [{"role": "user", "content": "x"}],
            }
            found = []
            for _ in range(3):
                reply = await gateway.handle("chat", body)
                if streams:
                    async for _ in reply.stream:
                        pass
                found.append((reply.headers["x-route-model"], reply.headers.get("x-cache")))
                await asyncio.sleep(0.05)
            return found

    first, second, third = asyncio.run(main())
    assert first == ("spare", "miss")
    assert second == (("short", "miss") if asked_again else ("spare", "exact"))
    assert third == (second[0], "exact")
