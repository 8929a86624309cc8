"""Tokens that are counted here: a key may have those counted of the models that it may ask, and of no others."""

import asyncio

import aiohttp
import pytest

from anabranch.gateway.config import DeploymentConfig, GatewayConfig, ModelConfig
from anabranch.gateway.core.held_body import HeldBody
from anabranch.gateway.core.incoming import KnownKey
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.http.app import App
from anabranch.gateway.http.counting import counted
from anabranch.gateway.http.exchange import Received
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


def test_a_body_takes_its_room_until_its_tokens_are_counted_also_when_nobody_waits(tmp_path):
    class Kept:
        closed = 0

        def close(self):
            self.closed += 1

    class Exchange:
        def __init__(self):
            self.has_begun, self.goes_on = asyncio.Event(), asyncio.Event()

        async def apart(self, key, num_bytes, work):
            self.has_begun.set()
            await self.goes_on.wait()
            return work()

    model = ModelConfig(name="m", deployments=(DeploymentConfig(provider=Mock.Config(model="m")),))

    async def main():
        made = GatewayConfig(models=(model,), store=str(tmp_path / "g.db"), require_key=False)
        async with Gateway(made) as gateway:
            kept, exchange = Kept(), Exchange()
            held, body = HeldBody(kept, None), {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
            task = asyncio.ensure_future(
                counted(gateway, exchange, Received(body, 99, KnownKey(None), held, chat=body))
            )
            await exchange.has_begun.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            # Who read it has gone; the thread that counts has not.
            held.close()
            assert kept.closed == 0
            exchange.goes_on.set()
            while not kept.closed:
                await asyncio.sleep(0)
            assert kept.closed == 1

    asyncio.run(main())
