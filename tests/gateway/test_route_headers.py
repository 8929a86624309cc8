"""What answers say in their headers of how a router came to its model."""

import asyncio

from anabranch.gateway.config import DeploymentConfig, GatewayConfig, ModelConfig, StrategyConfig
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.providers.mock import Mock
from anabranch.routers import strategies
from anabranch.routers.contract.query import Model
from anabranch.routers.embed.hashed import Hashed
from anabranch.routers.fitted import FittedRouter
from anabranch.routers.money import Price
from made_outcomes import MODELS, made_outcomes


def test_the_category_of_a_prompt_is_told(tmp_path):
    embedder, data = Hashed.Config(dim=64).build(), made_outcomes(150)
    made = strategies.make("coe", head="knn").fit(data.with_vectors(embedder.embed(data.query)))
    FittedRouter(strategy=made, models=tuple(Model(name=name) for name in MODELS), embedder=embedder).save(
        tmp_path / "coe.safetensors"
    )
    deployed = {name: (DeploymentConfig(provider=Mock.Config(model=name, reply=name)),) for name in MODELS}
    config = GatewayConfig(
        models=tuple(ModelConfig(name=name, price=Price(), deployments=one) for name, one in deployed.items()),
        strategies={"coe": StrategyConfig(router=str(tmp_path / "coe.safetensors"), timeout_s=5.0)},
        require_key=False,
        store=str(tmp_path / "g.db"),
    )

    async def work():
        async with Gateway(config) as gateway:
            found = []
            for text in ("add the numbers 7", "write verses about 8"):
                for model in ("auto/coe", "small"):
                    body = {"model": model, "messages": [{"role": "user", "content": text}]}
                    headers = (await gateway.handle("chat", body)).headers
                    found.append((headers.get("x-route-category"), float(headers.get("x-route-confidence", 0)) > 0.5))
            return found

    assert asyncio.run(work()) == [("maths", True), (None, False), ("poetry", True), (None, False)]
