"""One odd vector of an embedder of others is the affair of one request: what a router learned, for all senders, stays as it was."""

import asyncio

import numpy as np
import pytest

from anabranch.errors import ConfigError, InputError
from anabranch.gateway.config import DeploymentConfig, GatewayConfig, LogConfig, ModelConfig, StrategyConfig
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.providers.mock import Mock
from anabranch.routers.contract.query import Model, Outcome, Query
from anabranch.routers.embed.hashed import Hashed
from anabranch.routers.fitted import FittedRouter
from anabranch.routers.money import Price
from anabranch.routers.strategies import make
from anabranch.routers.strategies.shared_bandit import Pooled
from made_outcomes import made_outcomes
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


def odd_part(kind, size, rounds=40):
    """What a process observed that took a huge vector of one model for one, as earlier versions did."""
    strategy = make(kind)
    strategy.hear({}, {})
    teach(strategy, rounds)
    huge = Query(text="q", vector_D=np.full(8, size, np.float32))
    strategy.observe(Outcome(query=huge, model="good", quality=1.0, cost=0.5))
    return strategy.part()


def teach(strategy, rounds):
    for number in range(rounds):
        query = Query(text="q", vector_D=np.eye(8, dtype=np.float32)[number % 8])
        for name, score in SCORES.items():
            strategy.observe(Outcome(query=query, model=name, quality=score, cost=0.5))


def of_models(strategy):
    return dict(zip(strategy.models, strategy.theta_MD, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_huge_vector_has_drowned_is_let_go_and_what_is_learned_since_counts(kind, caplog):
    stored = [odd_part(kind, 1e20)]
    alone = make(kind)
    for start in range(3):
        strategy = make(kind)
        caplog.clear()
        for _ in range(2):
            # As often as others write.
            strategy.hear(*strategy.joined(stored))
        assert [line.getMessage() for line in caplog.records] == [
            f"{kind}: the sums of good in what was stored (41 scores) are singular or not finite; they are let go, and what is learned "
            "since counts"
        ]
        # Of the other model all is there, and what both cost.
        assert strategy.steps == 40 + 80 * start
        assert dict(zip(strategy.models, strategy.calls_M, strict=True)) == {
            "good": 41 + 40 * start,
            "bad": 40 + 40 * start,
        }
        if start:
            np.testing.assert_allclose(of_models(strategy)["good"], of_models(alone)["good"], atol=1e-12)
        teach(strategy, 40)
        teach(alone, 40)
        stored.append(strategy.part())


def test_the_store_is_rid_of_it_with_the_first_process_that_ends(tmp_path, monkeypatch, caplog):
    poisoned(monkeypatch, np.full(8, 1e20))
    config = settings(tmp_path, "linucb")

    async def life(*texts):
        caplog.clear()
        async with asyncio.timeout(60), Gateway(config) as gateway:
            begun = learned(gateway)
            for text in texts:
                await ask(gateway, text)
            await until_async(lambda: learned(gateway)[0] == begun[0] + len(texts))
            return begun, learned(gateway), [line for line in caplog.messages if "let go" in line]

    with monkeypatch.context() as before:
        # An earlier version, which looked at none, and kept all sums.
        before.setattr(Pooled, "_usable", lambda self, part: part)
        before.setattr("anabranch.gateway.lane.unit_vectors", lambda embedder, texts: np.asarray(embedder.embed(texts)))
        asyncio.run(life("q", "poison"))
    usual = ["q" * number for number in range(16)]
    _, after, said = asyncio.run(life(*usual))
    assert len(said) == 1
    begun, _, said = asyncio.run(life())
    assert not said
    assert begun[0] == after[0] >= 16
    for name, theta_D in after[1].items():
        np.testing.assert_allclose(begun[1][name], theta_D, atol=1e-9)
    assert any(np.abs(theta_D).max() > 0.1 for theta_D in begun[1].values())


@pytest.mark.parametrize("where", ["file", "given"])
def test_a_strategy_that_learned_from_vectors_of_other_dimensions_is_refused_at_the_start(tmp_path, where):
    """A router without an embedder of its own is given that of the config; every request was passed over for it."""
    data = made_outcomes(40)
    fitted = make("knn").fit(data.with_vectors(Hashed.Config(dim=16).build().embed(data.query)))
    router = FittedRouter(strategy=fitted, models=tuple(Model(name=name) for name in data.models))
    router.save(tmp_path / "knn.safetensors")
    wanted = StrategyConfig(router=str(tmp_path / "knn.safetensors"))
    price = Price.of_dollars(1, 1)
    models = tuple(
        ModelConfig(name=name, price=price, deployments=(DeploymentConfig(provider=Mock.Config(model=name)),))
        for name in data.models
    )

    def settings_of(dim):
        return GatewayConfig(
            models=models,
            strategies={"knn": wanted},
            embedder=Hashed.Config(dim=dim),
            require_key=False,
            store=str(tmp_path / "g.db"),
        )

    strategies = {"knn": fitted} if where == "given" else {}
    said = (
        r"strategies\.knn: knn learned from vectors of 16 dimensions, and embedder 'hashed' gives 8; use the embedder"
    )

    async def main():
        with pytest.raises(ConfigError, match=said):
            async with Gateway(settings_of(8), strategies=strategies):
                pass
        async with asyncio.timeout(60), Gateway(settings_of(16), strategies=strategies) as gateway:
            with pytest.raises(ConfigError, match=said):
                await gateway.reload(settings_of(8))
            return (await ask(gateway, "add 1", model="auto/knn", learns=False)).headers["x-route-strategy"]

    assert asyncio.run(main()) == "knn"
