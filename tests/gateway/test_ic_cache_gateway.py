"""IC-Cache inside the gateway: answers become examples, examples reach the small model, and what may not be kept is not."""

import asyncio

import numpy as np
import pytest

from anabranch.gateway.config import DeploymentConfig, GatewayConfig, LogConfig, ModelConfig, StrategyConfig
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.providers.mock import Mock
from anabranch.routers.embed.hashed import Hashed
from anabranch.routers.ic_cache import ICCache, ICCacheRouting
from anabranch.routers.ic_cache.critic import Critic
from anabranch.routers.ic_cache.router import Router
from anabranch.routers.money import Price

CACHE = ICCache.Config(router=Router.Config(critic=Critic.Config(hidden=(8,)), temperature=0.0, explore=0.0))


def model(name, dollars):
    provider = Mock.Config(model=name, reply=f"{name} says ls")
    deployment = DeploymentConfig(provider=provider)
    return ModelConfig(name=name, price=Price.of_dollars(dollars, dollars), max_tokens=50, deployments=(deployment,))


def run(tmp_path, work, **fields):
    """What ``work(gateway, strategy)`` gives."""
    strategy = ICCacheRouting.Config(**{"cache": CACHE, "domains": ("",), **fields}).build()
    config = GatewayConfig(
        models=(model("small", 1), model("large", 10)),
        require_key=False,
        store=str(tmp_path / "g.db"),
        embedder=Hashed.Config(dim=64),
        strategies={"ic": StrategyConfig(use="ic_cache", timeout_s=5.0)},
        log=LogConfig(prompts=True),
    )

    async def main():
        async with Gateway(config, strategies={"ic": strategy}) as gateway:
            return await work(gateway, strategy)

    return asyncio.run(main())


async def ask(gateway, strategy, text="list the files", **body):
    """The model that answered. Waits until the strategy has learned."""
    answer = await gateway.achat({"model": "auto/ic", "messages": [{"role": "user", "content": text}], **body})
    if body.get("stream"):
        names = [chunk["model"] async for chunk in answer if chunk.get("model")]
        name = names[0]
    else:
        name = answer["model"]
    lane = gateway.runtime.decider.lanes["ic"]
    while lane._waiting:
        await asyncio.sleep(0.001)
    return name


def prefer(strategy, mu):
    strategy.cache.router.critic.utilities = lambda x_I: mu


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_of_the_large_model_becomes_an_example_for_the_small_one(tmp_path, stream):
    async def work(gateway, strategy):
        assert await ask(gateway, strategy, stream=stream) == "large"  # what is unknown goes there
        assert [(e.request, e.response, e.model) for e in strategy.cache.pool] == [
            ("list the files", "large says ls", "large")
        ]
        prefer(strategy, np.array([0.9, 0.1]))
        assert await ask(gateway, strategy, stream=stream) == "small"
        assert len(strategy.cache.pool) == 1  # the small one's answer is not kept
        assert strategy.cache.pool.get(0).uses == 1

    run(tmp_path, work)


@pytest.mark.parametrize(
    ("body", "fields"),
    [({"store": False}, {}), ({}, {"domains": ()}), ({}, {"domains": ("code",)}), ({}, {"trusted": ("small",)})],
)
def test_what_is_not_kept(tmp_path, body, fields):
    async def work(gateway, strategy):
        assert await ask(gateway, strategy, **body) == "large"
        return len(strategy.cache.pool)

    assert run(tmp_path, work, **fields) == 0


def test_feedback_reaches_bandit_and_examples_and_users_can_be_forgotten(tmp_path):
    async def work(gateway, strategy):
        await ask(gateway, strategy, user="ann")
        prefer(strategy, np.array([0.9, 0.1]))
        answer = await gateway.achat({"model": "auto/ic", "messages": [{"role": "user", "content": "list the files"}]})
        assert answer["model"] == "small"
        [(request_id, waited)] = list(gateway.teaching.waiting._by_key[""].items())[-1:]
        assert waited.outcome.answer is None  # the gateway itself does not hold on to it
        await gateway.feedback({"request_id": request_id, "score": 1.0})
        lane = gateway.runtime.decider.lanes["ic"]
        while lane._waiting:
            await asyncio.sleep(0.001)
        assert strategy.cache.pool.get(0).rated == 1
        assert strategy.cache.pool.get(0).user == "ann"
        assert strategy.forget(tenant=strategy.cache.pool.get(0).tenant, user="ann") == 1

    run(tmp_path, work)
