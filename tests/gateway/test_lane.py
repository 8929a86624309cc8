"""`Lane`: what strategies of others raise, and how long they take, is theirs alone."""

import asyncio
import threading
import time

import pytest

from anabranch.gateway.config import DeploymentConfig, GatewayConfig, ModelConfig, StrategyConfig
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.providers.mock import Mock
from anabranch.routers.contract.query import Candidate, Decision
from anabranch.routers.contract.strategy import Strategy
from odd_errors import UNUSUAL


class Odd(Strategy):
    """Raises once, or waits, where its test says."""

    learns = True

    def __init__(self, where="", error=None, *, is_fast=False, waits=None):
        super().__init__(None)
        self.where, self.error, self.is_fast, self.waits = where, error, is_fast, waits
        self.upkept = 0

    def _at(self, where):
        if where != self.where:
            return
        if self.waits is not None:
            self.waits.wait(60)
        error, self.error = self.error, None
        if error is not None:
            raise error

    def route(self, query, pool):
        self._at("route")
        return Decision(candidates=(Candidate(model="m", score=0.0),), strategy="odd", reason="so")

    def observe(self, outcome):
        self._at("observe")

    def upkeep(self, pool):
        self.upkept += 1
        self._at("upkeep")

    async def errands(self, errands):
        self._at("errands")


def config(tmp_path, timeout_s=30.0):
    deployment = DeploymentConfig(provider=Mock.Config(model="m", tokens=4))
    return GatewayConfig(
        models=(ModelConfig(name="m", max_tokens=10, deployments=(deployment,)),),
        strategies={
            "odd": StrategyConfig(use="static", timeout_s=timeout_s),
            "cheapest": StrategyConfig(use="cheapest"),
        },
        default_strategy="cheapest",
        require_key=False,
        store=str(tmp_path / "g.db"),
    )


ASK = {"model": "auto/odd", "messages": [{"role": "user", "content": "hello"}]}


def run(tmp_path, strategy, work, **fields):
    async def main():
        async with asyncio.timeout(100), Gateway(config(tmp_path, **fields), strategies={"odd": strategy}) as gateway:
            return await work(gateway)

    return asyncio.run(main())


@pytest.mark.parametrize("is_fast", [False, True])
@pytest.mark.parametrize("error", [one for one in UNUSUAL if one is not KeyboardInterrupt])
@pytest.mark.parametrize("where", ["route", "observe", "upkeep", "errands"])
def test_what_a_strategy_raises_ends_neither_its_thread_nor_rounds_nor_the_gateway(tmp_path, where, error, is_fast):
    """One StopIteration hung all requests to it, all rounds and each reload; SystemExit ended the gateway; CancelledError the rounds."""
    strategy = Odd(where, error("by the strategy"), is_fast=is_fast)

    async def work(gateway):
        first = await gateway.handle("chat", ASK)
        await gateway.errands.once()
        await gateway.errands.once()
        second = await gateway.handle("chat", ASK)
        await gateway.reload(config(tmp_path))
        return [answer.headers.get("x-route-bypassed") for answer in (first, second)]

    said = run(tmp_path, strategy, work)
    assert said == [f"{error.__name__} in the strategy" if where == "route" else None, None]
    assert strategy.upkept >= 2


@pytest.mark.parametrize("where", ["observe", "upkeep"])
def test_a_request_waits_for_what_is_learned_no_longer_than_for_its_strategy(tmp_path, where):
    """It waited for as long as that took."""
    released = threading.Event()
    strategy = Odd(where, waits=released)

    async def work(gateway):
        first = await gateway.handle("chat", ASK)
        round_ = asyncio.ensure_future(gateway.errands.once())
        try:
            begun = time.monotonic()
            while gateway.runtime.decider.lanes["odd"]._thread.began is None and time.monotonic() < begun + 60:
                await asyncio.sleep(0.01)
            second = await gateway.handle("chat", ASK)
        finally:
            released.set()
        await round_
        return [answer.headers.get("x-route-bypassed") for answer in (first, second)]

    [first, second] = run(tmp_path, strategy, work, timeout_s=0.2)
    assert first is None
    assert "longer than 200 ms" in second
