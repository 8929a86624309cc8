"""Strategies at work in a server: one that is slow, broken or wrong is passed over, and nobody waits for it."""

import asyncio
import threading
import time

import numpy as np
import pytest

from anabranch.errors import ConfigError, InputError
from anabranch.gateway.config import DeploymentConfig, GatewayConfig, ModelConfig, StrategyConfig
from anabranch.gateway.decide import Decider
from anabranch.gateway.providers.openai import OpenAI
from anabranch.routers.contract.ask import Answered
from anabranch.routers.contract.query import Candidate, Decision, Model, Outcome, Pool, Query
from anabranch.routers.contract.strategy import Strategy
from anabranch.web.api_error import ApiError

POOL = Pool((Model(name="small"), Model(name="large"), Model(name="down", is_available=False)))


class Scripted(Strategy):
    """Does what its test says."""

    def __init__(self, work, **flags):
        super().__init__(None)
        self._work, self.seen = work, []
        for name, value in flags.items():
            setattr(self, name, value)

    def route(self, query, pool):
        self.seen.append(query)
        return self._work(query, pool)


class Learning(Scripted):
    def observe(self, outcome):
        self.seen.append(outcome)


class Asking(Scripted):
    is_async = True

    async def aroute(self, query, pool, ask):
        return say((await ask("small", "which?", max_tokens=1, temperature=0)).text)(query, pool)


async def unasked(*args, **how):
    raise AssertionError("nobody should be asked")


def say(*names):
    def work(query, pool):
        return Decision(candidates=tuple(Candidate(model=name, score=0) for name in names), strategy="s", reason="")

    return work


def config(**strategies):
    deployment = DeploymentConfig(provider=OpenAI.Config(base_url="http://127.0.0.1:1", key_env=None))
    models = tuple(ModelConfig(name=model.name, deployments=(deployment,)) for model in POOL.models)
    named = {name: StrategyConfig(use="static", **fields) for name, fields in strategies.items()}
    return GatewayConfig(
        models=models,
        strategies={**named, "safe": StrategyConfig(use="static", fields={"model": "large"})},
        default_strategy="safe",
    )


def decide(strategy, knobs=None, **fields):
    """What is decided on by ``strategy``, why it was bypassed, and the counted bypasses."""
    counted = []
    decider = Decider(config(tested=fields), None, lambda *seen: counted.append(seen), {"tested": strategy})
    try:
        decided = asyncio.run(decider.decide("tested", Query(text="hello", knobs=knobs or {}), POOL, unasked))
    finally:
        decider.close()
    return decided, counted


@pytest.mark.parametrize("is_fast", [True, False])
def test_a_good_decision_is_taken_as_it_is(is_fast):
    decided, counted = decide(Scripted(say("small", "large"), is_fast=is_fast))
    assert [candidate.model for candidate in decided.decision.candidates] == ["small", "large"]
    assert (decided.bypassed, counted) == ("", [])


def raising(query, pool):
    raise ZeroDivisionError("a very private prompt")


@pytest.mark.parametrize("is_fast", [True, False])
@pytest.mark.parametrize(
    ("work", "why"),
    [
        (raising, "raised"),
        (say("gpt-9"), "unknown_model"),
        (say(), "empty"),
        (lambda *_: None, "empty"),
        (say("small", "small"), "twice"),
    ],
)
def test_what_is_wrong_is_bypassed_to_the_default_and_counted(work, why, is_fast, caplog):
    decided, counted = decide(Scripted(work, is_fast=is_fast))
    assert decided.decision.model == "large"
    assert decided.bypassed
    assert counted == [("tested", why)]
    assert "private" not in decided.bypassed + caplog.text


def test_a_slow_strategy_is_bypassed_in_time_and_the_loop_goes_on():
    released = threading.Event()
    ticks = []

    async def main():
        decider = Decider(config(tested={}), None, lambda *_: None, {"tested": Scripted(lambda *_: released.wait(5))})

        async def tick():
            while True:
                ticks.append(time.monotonic())
                await asyncio.sleep(0.002)

        ticking = asyncio.create_task(tick())
        begin = time.monotonic()
        decided = await decider.decide("tested", Query(text="x"), POOL, unasked)
        first = time.monotonic() - begin
        begin = time.monotonic()
        again = await decider.decide("tested", Query(text="x"), POOL, unasked)
        second = time.monotonic() - begin
        ticking.cancel()
        released.set()
        decider.close()
        return decided, first, again, second

    decided, first, again, second = asyncio.run(main())
    assert "50 ms" in decided.bypassed
    assert decided.decision.model == again.decision.model == "large"
    assert 0.04 < first < 0.4
    assert second < 0.02  # its thread is stuck: nobody waits again
    assert len(ticks) > 4


def test_many_at_once_wait_their_turn_without_being_bypassed():
    """Each takes 5 ms of one thread; 20 of them take longer than the limit of one."""

    def work(query, pool):
        time.sleep(0.005)
        return say("small")(query, pool)

    async def main():
        decider = Decider(config(tested={}), None, lambda *_: None, {"tested": Scripted(work)})
        decided = await asyncio.gather(
            *(decider.decide("tested", Query(text=str(at)), POOL, unasked) for at in range(20))
        )
        decider.close()
        return decided

    assert {one.bypassed for one in asyncio.run(main())} == {""}


def test_without_any_strategy_the_order_of_the_config_decides():
    broken = Scripted(raising)
    counted = []
    decider = Decider(config(tested={}), None, lambda *seen: counted.append(seen), {"tested": broken, "safe": broken})
    decided = asyncio.run(decider.decide("tested", Query(text="x"), POOL, unasked))
    decider.close()
    assert [candidate.model for candidate in decided.decision.candidates] == ["small", "large", "down"]
    assert counted == [("tested", "raised"), ("safe", "raised")]


def test_a_subset_of_models_narrows_the_pool():
    seen = []

    def work(query, pool):
        seen.extend(pool.names)
        return say("small")(query, pool)

    decided, _ = decide(Scripted(work), models=("large",))
    assert seen == ["large"]
    assert decided.bypassed  # small is not among them


def test_knobs_the_sender_set_wrong_are_the_senders_fault():
    def work(query, pool):
        raise InputError("lambda is 'x'; it must be a number")

    with pytest.raises(ApiError, match="lambda") as caught:
        decide(Scripted(work), knobs={"lambda": "x"})
    assert caught.value.status == 400
    assert decide(Scripted(work))[0].bypassed  # without knobs it is the strategy's


def test_vectors_are_made_in_a_thread():
    class Embedder:
        def embed(self, texts):
            assert threading.current_thread() is not threading.main_thread()
            return np.ones((len(texts), 2), np.float32)

    strategy = Scripted(say("small"), needs_vector=True, is_fast=True)
    decider = Decider(config(tested={}), Embedder(), lambda *_: None, {"tested": strategy})
    decided = asyncio.run(decider.decide("tested", Query(text="x"), POOL, unasked))
    decider.close()
    assert strategy.seen[0].vector_D.tolist() == decided.query.vector_D.tolist() == [1, 1]
    with pytest.raises(ConfigError, match="embedder"):
        Decider(config(tested={}), None, strategies={"tested": strategy})


def test_a_strategy_may_ask_models_itself():
    async def large(arm, messages, *, max_tokens, temperature):
        return Answered.saying("large")

    decider = Decider(config(tested={}), None, lambda *_: None, {"tested": Asking(None)})
    assert asyncio.run(decider.decide("tested", Query(text="x"), POOL, large)).decision.model == "large"
    decider.close()


def test_learning_happens_off_the_loop_and_never_raises():
    strategy = Learning(say("small"))
    decider = Decider(config(tested={}), None, strategies={"tested": strategy})
    outcome = Outcome(query=Query(text="x"), model="small")
    decider.lanes["tested"].observe(outcome)
    decider.lanes["safe"].observe(outcome)  # does not learn
    decider.lanes["tested"]._threads.shutdown(wait=True)
    assert strategy.seen == [outcome]
    decider.close()


def test_a_strategy_that_has_not_learned_is_refused_when_the_config_is_read():
    with pytest.raises(ConfigError, match="learn first"):
        Decider(config(tested={}).replace(strategies={"knn": StrategyConfig(use="knn")}, default_strategy=None), None)
