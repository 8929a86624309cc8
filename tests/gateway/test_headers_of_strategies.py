"""`headers` of a strategy is called where all else of it is: in its thread, and within its time, unless it says that it is fast."""

import asyncio
import itertools
import logging
import threading

import pytest

from anabranch.gateway.config import DeploymentConfig, GatewayConfig, ModelConfig, StrategyConfig
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.providers.mock import Mock
from anabranch.routers.strategies.fixed import Static


class Telling(Static):
    """Has headers of a decision, which it gives once ``gate`` is open."""

    def __init__(self, is_fast, gate=None):
        super().__init__(Static.Config())
        self.is_fast, self.gate, self.threads = is_fast, gate, []

    def headers(self, decision):
        self.threads.append(threading.current_thread())
        assert self.gate is None or self.gate.wait(60)
        return Lazy({"x-told": decision.candidates[0].model, "x-accel-redirect": "/keys"}, self.threads)


class Lazy(dict):
    """Its items are looked for when they are asked for."""

    def __init__(self, given, threads):
        super().__init__(given)
        self.threads = threads

    def items(self):
        self.threads.append(threading.current_thread())
        return super().items()


def settings(tmp_path, **fields):
    deployment = DeploymentConfig(provider=Mock.Config(model="m", tokens=4))
    return GatewayConfig(
        models=(ModelConfig(name="m", max_tokens=10, deployments=(deployment,)),),
        require_key=False,
        store=str(tmp_path / "g.db"),
        **fields,
    )


async def ask(gateway, name):
    return await gateway.handle("chat", {"model": f"auto/{name}", "messages": [{"role": "user", "content": "x"}]})


@pytest.mark.parametrize("is_fast", [False, True])
def test_they_are_made_in_its_thread_unless_it_is_fast_and_go_out(tmp_path, is_fast):
    strategy = Telling(is_fast)

    async def main():
        async with asyncio.timeout(60), Gateway(settings(tmp_path), strategies={"s": strategy}) as gateway:
            return (await ask(gateway, "s")).headers

    headers = asyncio.run(main())
    assert headers["x-told"] == "m"
    assert "x-accel-redirect" not in headers
    assert "x-route-bypassed" not in headers
    assert len(strategy.threads) == 2
    assert {thread is threading.main_thread() for thread in strategy.threads} == {is_fast}


def test_one_that_takes_too_long_has_none_and_holds_up_no_other(tmp_path, caplog):
    gate = threading.Event()
    slow, other = Telling(False, gate), Telling(False)
    config = settings(
        tmp_path, strategies={"slow": StrategyConfig(use="static", timeout_s=0.05)}, default_strategy="slow"
    )

    async def main():
        async with asyncio.timeout(60), Gateway(config, strategies={"slow": slow, "other": other}) as gateway:
            try:
                answering = asyncio.ensure_future(ask(gateway, "slow"))
                # While it is at it.
                assert (await ask(gateway, "other")).headers["x-told"] == "m"
                return (await answering).headers
            finally:
                gate.set()

    with caplog.at_level(logging.WARNING):
        headers = asyncio.run(main())
    assert "x-told" not in headers
    # The decision itself stands.
    assert headers["x-route-strategy"] == "slow"
    assert "x-route-bypassed" not in headers
    assert "strategy slow has no headers to give: it took longer than 50 ms" in caplog.text


def test_a_mapping_without_end_holds_up_nobody(tmp_path):
    class Endless(dict):
        def items(self):
            return ((f"x-{at}", 1) for at in itertools.count())

    class Odd(Static):
        def headers(self, decision):
            return Endless()

    async def main():
        async with asyncio.timeout(60), Gateway(settings(tmp_path), strategies={"s": Odd(Static.Config())}) as gateway:
            return (await ask(gateway, "s")).headers

    assert asyncio.run(main())["x-0"] == "1"
