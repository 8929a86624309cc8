"""One odd vector of an embedder of others is the affair of one request: what a router learned, for all senders, stays as it was."""

import asyncio

import numpy as np
import pytest

from anabranch.errors import InputError
from anabranch.gateway.config import DeploymentConfig, GatewayConfig, LogConfig, ModelConfig, StrategyConfig
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.providers.mock import Mock
from anabranch.routers.embed.hashed import Hashed
from anabranch.routers.money import Price
from waiting import until_async

KINDS = ("linucb", "thompson", "eps_greedy")
SCORES = {"good": 1.0, "bad": 0.0}


def poisoned(monkeypatch, given):
    """An embedder that gives of each text one of eight directions; of one text what it is told to give."""

    def embed(self, texts):
        if "poison" not in texts[0]:
            return np.stack([np.eye(8, dtype=np.float32)[len(text) % 8] for text in texts])
        if isinstance(given, Exception):
            raise given
        return [given]

    monkeypatch.setattr(Hashed, "embed", embed)


def settings(tmp_path, kind):
    def deployment(name):
        return (DeploymentConfig(provider=Mock.Config(model=name, reply=name)),)

    price = Price.of_dollars(1, 1)
    return GatewayConfig(
        models=tuple(ModelConfig(name=name, price=price, deployments=deployment(name)) for name in SCORES),
        strategies={"s": StrategyConfig(use=kind)},
        embedder=Hashed.Config(dim=8),
        require_key=False,
        store=str(tmp_path / "g.db"),
        log=LogConfig(prompts=True),
    )


async def ask(gateway, text, *, model="auto/s", learns=True):
    answer = await gateway.handle("chat", {"model": model, "messages": [{"role": "user", "content": text}]})
    if learns:
        score = SCORES[answer.headers["x-route-model"]]
        await gateway.feedback({"request_id": answer.headers["x-request-id"], "score": score})
    return answer


def learned(gateway):
    strategy = gateway.runtime.decider.lanes["s"].strategy
    return strategy.steps, dict(zip(strategy.models, strategy.theta_MD, strict=True))


ODD = {
    "another length": np.zeros(3, np.float32),
    "no length": np.zeros(0, np.float32),
    "not finite": np.full(8, np.nan),
    "overflow": np.full(8, np.inf),
    "two dimensions": np.eye(8),
    "text": "vector",
    "an error": InputError("of the embedder"),
}


@pytest.mark.parametrize("what", ODD)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_vector_teaches_nothing_not_even_how_long_vectors_are(tmp_path, monkeypatch, kind, what):
    poisoned(monkeypatch, ODD[what])
    config = settings(tmp_path, kind)

    async def main():
        async with asyncio.timeout(60), Gateway(config) as gateway:
            # The very first one.
            first = await ask(gateway, "poison")
            assert first.headers["x-route-bypassed"]
            for number in range(12):
                assert "x-route-bypassed" not in (await ask(gateway, "q" * number)).headers
            await until_async(lambda: learned(gateway)[0] == 12)
            # A sender's knob is not to blame.
            again = await ask(gateway, "poison", model="auto/s?lambda=0.5", learns=False)
            assert again.headers["x-route-bypassed"]
            return learned(gateway)

    steps, _ = asyncio.run(main())
    assert steps == 12


@pytest.mark.parametrize("size", [3e38, 1e20, 1e9])
@pytest.mark.parametrize("kind", KINDS)
def test_a_huge_vector_weighs_as_much_as_any_and_what_was_learned_is_there_at_the_next_start(
    tmp_path, monkeypatch, kind, size
):
    poisoned(monkeypatch, np.full(8, size))
    config = settings(tmp_path, kind)

    async def main():
        async with asyncio.timeout(60), Gateway(config) as gateway:
            for number in range(16):
                await ask(gateway, "q" * number)
            await ask(gateway, "poison")
            for number in range(16):
                await ask(gateway, "q" * number)
            await until_async(lambda: learned(gateway)[0] == 33)
            lane = gateway.runtime.decider.lanes["s"]
            await gateway.kept.save([lane], at_once=True)
            before = learned(gateway)
        async with asyncio.timeout(60), Gateway(config) as gateway:
            return before, learned(gateway)

    (steps, theta), (steps_after, theta_after) = asyncio.run(main())
    assert steps_after == steps == 33
    for name, theta_D in theta.items():
        assert theta_after[name] == pytest.approx(theta_D, abs=1e-9)
        # Qualities are between 0 and 1: so is what is believed of the usual directions.
        assert (np.abs(theta_D) < 3).all()
