"""Tokens that are counted here: a key may have those counted of the models that it may ask, and of no others."""

import asyncio

import aiohttp
import pytest

from anabranch.gateway.config import DeploymentConfig, GatewayConfig, ModelConfig
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.http.app import App
from anabranch.gateway.providers.mock import Mock

PATHS = {
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "hello"}]},
    "/v1/responses/input_tokens": {"input": "hello"},
}


@pytest.mark.parametrize("path", PATHS)
def test_a_key_has_tokens_counted_of_models_that_it_may_ask(tmp_path, path):
    models = tuple(
        ModelConfig(name=name, deployments=(DeploymentConfig(provider=Mock.Config(model=name)),))
        for name in ("small", "large")
    )

    async def main():
        made = GatewayConfig(models=models, store=str(tmp_path / "g.db"), require_key=False)
        async with Gateway(made) as gateway, aiohttp.ClientSession() as session:
            keys = {"none": None}
            for name, allowed in (("some", ("small",)), ("all", ())):
                keys[name] = (await gateway.store.create_key(name, models=allowed))[0]
            listener = await asyncio.get_running_loop().create_server(App(gateway).server(), "127.0.0.1", 0)
            url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}{path}"

            async def status(key, model):
                headers = {} if key is None else {"authorization": f"Bearer {key}"}
                async with session.post(url, json={"model": model, **PATHS[path]}, headers=headers) as answer:
                    told = await answer.json()
                    assert answer.status == 403 or told["input_tokens"] > 0
                    return answer.status

            told = {name: [await status(key, model) for model in ("small", "large")] for name, key in keys.items()}
            listener.close()
            return told

    assert asyncio.run(main()) == {"none": [200, 200], "some": [200, 403], "all": [200, 200]}
