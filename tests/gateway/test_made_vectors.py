"""A vector belongs to the embedder that made it: a strategy is given none of another's, however long it is, and a text is embedded once."""

import asyncio

import numpy as np
import pytest

from anabranch.gateway.config import CacheConfig, DeploymentConfig, GatewayConfig, ModelConfig, StrategyConfig
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.made_vectors import MadeVectors
from anabranch.gateway.providers.mock import Mock
from anabranch.routers import strategies
from anabranch.routers.contract.query import Candidate, Decision, Model
from anabranch.routers.contract.strategy import Strategy
from anabranch.routers.embed import unit_vectors
from anabranch.routers.embed.hashed import Hashed
from anabranch.routers.fitted import FittedRouter
from anabranch.routers.money import Price
from made_outcomes import MODELS, made_outcomes

TEXTS = [f"{text} please" for text in made_outcomes(30, 7).query]
PRICE = Price.of_dollars(1, 1)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Routers: one whose embedder has learned which words are rare, and one whose embedder is as its config makes it."""
    folder, data = tmp_path_factory.mktemp("routers"), made_outcomes(150)
    models = tuple(Model(name=name, price=PRICE) for name in MODELS)
    for name, embedder in (
        ("learned", Hashed(Hashed.Config(dim=64)).fit(data.query)),
        ("plain", Hashed(Hashed.Config(dim=64))),
    ):
        strategy = strategies.make("knn").fit(data.with_vectors(embedder.embed(data.query)))
        FittedRouter(strategy=strategy, models=models, embedder=embedder).save(folder / f"{name}.safetensors")
    return folder


def settings(tmp_path, strategies, *, semantic, dim=64, **fields):
    def deployments(name):
        return (DeploymentConfig(provider=Mock.Config(model=name, reply=name)),)

    return GatewayConfig(
        models=tuple(ModelConfig(name=name, price=PRICE, deployments=deployments(name)) for name in MODELS),
        strategies=strategies,
        embedder=Hashed.Config(dim=dim),
        # Only the very same text means the same.
        cache=CacheConfig(exact=False, semantic=semantic, threshold=1.0),
        require_key=False,
        store=str(tmp_path / f"{semantic}-{dim}.db"),
        **fields,
    )


async def ask(gateway, text, model="auto/s"):
    body = {"model": model, "temperature": 0, "messages": [{"role": "user", "content": text}]}
    return await gateway.handle("chat", body)


def decided(config, texts=TEXTS):
    """Of each text the model, why, and whether the strategy was passed over."""

    async def main():
        async with asyncio.timeout(120), Gateway(config) as gateway:
            answers = [await ask(gateway, text) for text in texts]
            return [
                tuple(answer.headers.get(f"x-route-{name}") for name in ("model", "reason", "bypassed"))
                for answer in answers
            ]

    return asyncio.run(main())


@pytest.mark.parametrize("dim", [64, 96])
def test_a_fitted_router_decides_as_before_beside_a_semantic_cache_of_another_embedder(tmp_path, place, dim):
    routed = {"s": StrategyConfig(router=str(place / "learned.safetensors"))}
    alone = decided(settings(tmp_path, routed, semantic=False))
    assert not any(bypassed for _, _, bypassed in alone)
    assert decided(settings(tmp_path, routed, semantic=True, dim=dim)) == alone


@pytest.mark.parametrize(
    ("use", "count"), [({"use": "linucb"}, 1), ({"router": "plain"}, 1), ({"router": "learned"}, 2)]
)
def test_a_text_is_embedded_once_by_each_embedder(tmp_path, place, monkeypatch, use, count):
    asked, embed = [], Hashed.embed

    def counting(self, texts):
        asked.extend(texts)
        return embed(self, texts)

    use = {name: str(place / f"{value}.safetensors") if name == "router" else value for name, value in use.items()}
    config = settings(tmp_path, {"s": StrategyConfig(**use)}, semantic=True)
    monkeypatch.setattr(Hashed, "embed", counting)
    decided(config, ["write verses"])
    assert asked == ["write verses"] * count


class Passed(Strategy):
    """Cannot decide; judges answers and learns."""

    needs_vector = learns = reads_answers = True

    def __init__(self):
        super().__init__(None)
        self.judged, self.observed = [], []

    def route(self, query, pool):
        raise RuntimeError("not today")

    def accept(self, query, model, answer, details):
        self.judged.append(query.vector_D)
        return True

    def observe(self, outcome):
        self.observed.append(outcome.query.vector_D)


@pytest.mark.parametrize("semantic", [False, True])
def test_a_strategy_that_was_passed_over_judges_and_learns_by_its_own_vector(tmp_path, place, semantic):
    own, text = Passed(), "write verses"
    routed = {"passed": StrategyConfig(use="linucb"), "s": StrategyConfig(router=str(place / "learned.safetensors"))}
    config = settings(tmp_path, routed, semantic=semantic, dim=48, default_strategy="s")

    async def main():
        async with asyncio.timeout(60), Gateway(config, strategies={"passed": own}) as gateway:
            answer = await ask(gateway, text, "auto/passed")
            assert answer.headers["x-route-bypassed"]
            assert answer.headers["x-route-reason"].startswith("knn")
            await gateway.feedback({"request_id": answer.headers["x-request-id"], "score": 1.0})

    asyncio.run(main())
    due_D = unit_vectors(Hashed(Hashed.Config(dim=48)), [text])[0]
    assert own.judged
    assert own.observed
    for vector_D in (*own.judged, *own.observed):
        np.testing.assert_array_equal(vector_D, due_D)


class Looking(Strategy):
    """Needs no vector."""

    seen = None

    def route(self, query, pool):
        self.seen = query
        return Decision(candidates=(Candidate(model="small", score=0.0),), strategy="looking", reason="so")


def test_who_needs_no_vector_is_given_none_whatever_the_cache_has_made(tmp_path):
    looking = Looking(None)
    config = settings(tmp_path, {"s": StrategyConfig(use="cheapest")}, semantic=True)

    async def main():
        async with asyncio.timeout(60), Gateway(config, strategies={"s": looking}) as gateway:
            await ask(gateway, "write verses")

    asyncio.run(main())
    assert (looking.seen.text, looking.seen.vector_D) == ("write verses", None)


def test_vectors_are_found_by_their_very_embedder_and_text():
    one, twin = Hashed(Hashed.Config(dim=2)), Hashed(Hashed.Config(dim=2))
    made, vector_D = MadeVectors(), np.array([0.6, 0.8], np.float32)
    made.put(one, "a", vector_D)
    assert made.get(one, "a") is vector_D
    assert made.get(one, "b") is None
    # What it has learned since is not looked at: another object may be anything.
    assert made.get(twin, "a") is None
