"""Strategies at work in a server: one that is slow, broken or wrong is passed over, and nobody waits for it."""

import asyncio
import itertools
import re
import threading
import time

import numpy as np
import pytest

from anabranch.errors import AnabranchError, BudgetError, ConfigError, InputError, LimitError, RateError
from anabranch.gateway.config import DeploymentConfig, GatewayConfig, ModelConfig, StrategyConfig
from anabranch.gateway.decide import Decider
from anabranch.gateway.decision_checks import BypassError
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.lane import WAITING, Lane
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.providers.openai import OpenAI
from anabranch.routers.contract.ask import Answered
from anabranch.routers.contract.dataset import Recorded
from anabranch.routers.contract.query import Candidate, Decision, Model, Outcome, Pool, Query
from anabranch.routers.contract.strategy import Strategy
from anabranch.routers.embed.hashed import Hashed
from anabranch.routers.money import Price
from anabranch.routers.strategies import make
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


def spent(subject):
    told = {"period": "total", "limit_nano": 1, "remaining_nano": 0, "resets_s": None, "retry_after_s": None}
    return BudgetError("spent", subject=subject, **told)


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


@pytest.mark.parametrize(
    ("error", "does_last"),
    [
        (LimitError("limits.strategy_calls"), True),
        (LimitError("limits.strategy_calls_s", retry_after_s=1.0), False),
        (RateError("full", limit="max_in_flight", retry_after_s=None), False),
        (spent("request"), True),
        (spent("key:k"), False),
        (ValueError("odd"), False),
    ],
)
def test_it_is_known_whether_what_it_is_bypassed_for_lasts(error, does_last):
    async def refuses(*args, **how):
        raise error

    async def main():
        decider = Decider(config(one={}), None, strategies={"one": Asking(None)})
        try:
            return await decider.decide("one", Query(text="hello"), POOL, refuses)
        finally:
            decider.close()

    decided = asyncio.run(main())
    assert (bool(decided.bypassed), decided.lasts) == (True, does_last)


def test_a_slow_strategy_is_bypassed_in_time_and_the_loop_goes_on():
    released = threading.Event()
    ticks = []

    async def main():
        decider = Decider(config(tested={}), None, lambda *_: None, {"tested": Scripted(lambda *_: released.wait(60))})

        async def tick():
            while True:
                ticks.append(1)
                await asyncio.sleep(0.002)

        ticking = asyncio.create_task(tick())
        decided = await decider.decide("tested", Query(text="x"), POOL, unasked)
        again = await decider.decide("tested", Query(text="x"), POOL, unasked)
        ticking.cancel()
        released.set()
        decider.close()
        return decided, again

    decided, again = asyncio.run(main())
    assert decided.bypassed == "it took longer than 50 ms"
    assert again.bypassed == "the call before it has taken longer than 50 ms"  # its thread is stuck: nobody waits again
    assert decided.decision.model == again.decision.model == "large"
    assert len(ticks) > 1


class Clock:
    """Stands for the module ``time`` where time goes on by hand."""

    now = 0.0

    def monotonic(self):
        return self.now


def test_many_at_once_wait_their_turn_without_being_bypassed(monkeypatch):
    """Each takes 5 ms of one thread; 20 of them take longer than the limit of one."""
    clock = Clock()
    monkeypatch.setattr("anabranch.gateway.lane.time", clock)

    def work(query, pool):
        # However long this process does not run, it counts as 5 ms.
        time.sleep(0.005)
        clock.now += 0.005
        return say("small")(query, pool)

    async def main():
        decider = Decider(config(tested={}), None, lambda *_: None, {"tested": Scripted(work)})
        decided = await asyncio.gather(
            *(decider.decide("tested", Query(text=str(at)), POOL, unasked) for at in range(20))
        )
        decider.close()
        return decided

    assert {one.bypassed for one in asyncio.run(main())} == {""}


def held_up():
    """A strategy whose decisions last until they are released, and that learns; who was decided for, or taught, in order."""
    order, released = [], threading.Event()

    class Held(Learning):
        def route(self, query, pool):
            order.append(query.tenant)
            assert released.wait(60)
            return say("small")(query, pool)

        def observe(self, outcome):
            order.append("learns")

    decider = Decider(config(tested={"timeout_s": 10.0}), None, lambda *_: None, {"tested": Held(None)})
    return decider, order, released


async def until(holds):
    async with asyncio.timeout(60):
        while not holds():
            await asyncio.sleep(0.001)


def test_keys_take_turns_in_a_strategy_s_thread():
    """The decisions of a key that asks twenty times, and what is to be learned, were all made before those of the next one."""

    async def main():
        decider, order, released = held_up()
        many = [decider.decide("tested", Query(text="x", tenant="a"), POOL, unasked) for _ in range(20)]
        asked = [asyncio.ensure_future(one) for one in many]
        await until(lambda: order == ["a"])
        for _ in range(20):
            decider.lanes["tested"].observe(Outcome(query=Query(text="x"), model="small"))
        asked += [
            asyncio.ensure_future(decider.decide("tested", Query(text="x", tenant=whose), POOL, unasked))
            for whose in "bcb"
        ]
        await asyncio.sleep(0)
        released.set()
        decided = await asyncio.gather(*asked)
        await decider.lanes["tested"].alone(lambda: None)
        decider.close()
        return decided, order

    decided, order = asyncio.run(main())
    assert {one.bypassed for one in decided} == {""}
    assert order[:9] == ["a", "a", "learns", "b", "c", "a", "learns", "b", "a"]
    assert order.count("a") == order.count("learns") == 20


def test_so_much_waits_to_be_learned_and_what_touches_nothing_else_comes_behind_it():
    async def main():
        decider, order, released = held_up()
        lane = decider.lanes["tested"]
        asked = asyncio.ensure_future(decider.decide("tested", Query(text="x", tenant="a"), POOL, unasked))
        await until(lambda: order == ["a"])
        for _ in range(WAITING + 50):
            lane.observe(Outcome(query=Query(text="x"), model="small"))
        alone = asyncio.ensure_future(lane.alone(lambda: order.append("alone")))
        await asyncio.sleep(0)
        released.set()
        await asyncio.gather(asked, alone)
        decider.close()
        return order

    assert asyncio.run(main()) == ["a", *["learns"] * WAITING, "alone"]


def test_what_waits_for_a_strategy_s_thread_is_not_decided_once_its_client_has_gone():
    async def main():
        decider, order, released = held_up()
        asked = [
            asyncio.ensure_future(decider.decide("tested", Query(text="x", tenant=whose), POOL, unasked))
            for whose in "abc"
        ]
        await until(lambda: order == ["a"])
        asked[1].cancel()
        await asyncio.wait({asked[1]})
        released.set()
        await asyncio.gather(asked[0], asked[2])
        decider.close()
        return order

    assert asyncio.run(main()) == ["a", "c"]


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
        decide(Scripted(work, sender_knobs=("lambda",)), knobs={"lambda": "x"})
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
    assert strategy.seen[0].vector_D.tolist() == decided.query.vector_D.tolist()
    assert decided.query.vector_D.tolist() == pytest.approx([0.5**0.5] * 2)
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

    async def main():
        decider.lanes["tested"].observe(outcome)
        decider.lanes["safe"].observe(outcome)  # does not learn
        await decider.lanes["tested"].alone(lambda: None)

    asyncio.run(main())
    assert strategy.seen == [outcome]
    decider.close()


def test_a_strategy_that_has_not_learned_is_refused_when_the_config_is_read():
    with pytest.raises(ConfigError, match="learn first"):
        Decider(config(tested={}).replace(strategies={"knn": StrategyConfig(use="knn")}, default_strategy=None), None)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("auto/cheapest?lambda=1", "auto/cheapest has no knob 'lambda'; it has none"),
        ("auto?temperature=1", "auto/cheapest has no knob 'temperature'; it has none"),
        ("router-cheapest-0.5", "auto/cheapest has no knob 'threshold'; it has none"),
        ("auto/mf?lambda=1&top=2", "auto/mf has no knob 'top'; it has lambda, threshold"),
        ("router-mf-0.5?x=1", "there is no model"),
        ("auto/mf?lambda=x", "lambda is 'x'; it must be a number of at least 0"),
    ],
)
def test_a_knob_that_a_strategy_does_not_read_is_the_senders_fault(tmp_path, named, message):
    with pytest.raises(ApiError, match=re.escape(message)) as caught:
        served_by(tmp_path, named)
    assert caught.value.status in (400, 404)
    assert caught.value.param == "model"


def test_routellms_names_do_what_they_say(tmp_path):
    """Its threshold says how often the dear model must win to be asked; all of it through a request."""
    assert [served_by(tmp_path, f"router-mf-{threshold}") for threshold in ("0", "1", "0.5")] == [
        "large",
        "small",
        "large",
    ]
    assert served_by(tmp_path, "auto/mf?threshold=0.99") == "small"
    assert served_by(tmp_path, "auto/mf?lambda=1000000000") == "small"


def served_by(tmp_path, named):
    """The model that answers a request for ``named``, of a gateway whose strategy learned that the dear one is usually better."""
    embedder = Hashed.Config(dim=16)
    texts = [f"question {number} of {'abc'[number % 3]}" for number in range(60)]
    vector_ND = embedder.build().embed(texts)
    score_NM = np.stack([np.arange(60) % 3 == 0, np.arange(60) % 5 != 0], 1).astype(float)
    cost_NM = np.broadcast_to([0.001, 0.01], (60, 2)).copy()
    data = Recorded(
        query=tuple(texts), models=("small", "large"), score_NM=score_NM, cost_NM=cost_NM, vector_ND=vector_ND
    )
    models = tuple(
        ModelConfig(
            name=name,
            price=Price.of_dollars(usd, usd),
            max_tokens=10,
            deployments=(DeploymentConfig(provider=Mock.Config(model=name)),),
        )
        for name, usd in (("small", 1), ("large", 10))
    )
    config = GatewayConfig(
        models=models,
        strategies={"cheapest": StrategyConfig(use="cheapest"), "mf": StrategyConfig(use="mf", timeout_s=5.0)},
        default_strategy="cheapest",
        embedder=embedder,
        require_key=False,
        store=str(tmp_path / "g.db"),
    )

    async def main():
        async with Gateway(config, strategies={"mf": make("mf", dim=4, epochs=5).fit(data)}) as gateway:
            body = {"model": named, "messages": [{"role": "user", "content": texts[1]}]}
            return (await gateway.handle("chat", body)).headers["x-route-model"]

    return asyncio.run(main())


# Lanes that go on with one another


def lanes(count, work, timeout_s):
    """So many lanes of one strategy, each of which has gone on with the one before."""
    strategy = Learning(work, is_fast=False)
    made = [Lane("s", StrategyConfig(use="static", timeout_s=timeout_s), strategy, None) for _ in range(count)]
    for old, new in itertools.pairwise(made):
        assert new.follows(old)
        new.succeed(old)
    return made


def test_what_is_given_up_before_its_turn_is_not_begun():
    gate, began, done = threading.Event(), threading.Event(), []

    async def main():
        (lane,) = lanes(1, say("small"), 60.0)
        first = asyncio.ensure_future(lane.alone(lambda: began.set() or gate.wait()))
        await asyncio.to_thread(began.wait)
        second = asyncio.ensure_future(lane.alone(lambda: done.append("given up")))
        await asyncio.sleep(0)
        second.cancel()
        await asyncio.wait((second,))
        gate.set()
        assert await first
        await lane.alone(lambda: done.append("wanted"))
        assert (second.cancelled(), done) == (True, ["wanted"])
        lane.close()

    try:
        asyncio.run(main())
    finally:
        gate.set()


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_thread_of_a_strategy_ends_with_the_last_of_its_lanes_and_drops_nothing_before(order):
    """The lane in the middle of two reloads ended the thread in which requests of the first still waited."""
    gate, began = threading.Event(), threading.Event()

    async def main():
        made = lanes(3, lambda query, pool: began.set() or (gate.wait() and say("small")(query, pool)), 60.0)
        thread = made[0]._thread
        assert all(lane._thread is thread for lane in made)
        waiting = [
            asyncio.ensure_future(lane.decide(Query(text="q"), POOL, unasked)) for lane in made for _ in range(3)
        ]
        alone = asyncio.ensure_future(made[0].alone(lambda: "erased"))
        await asyncio.to_thread(began.wait)
        for at in order:
            made[at].close()
            made[at].close()
        gate.set()
        decided = await asyncio.gather(*waiting)
        assert [one[0].candidates[0].model for one in decided] == ["small"] * 9
        assert await alone == "erased"
        # Who comes later is told so, and is decided for elsewhere.
        with pytest.raises(BypassError, match="ended"):
            await made[0].decide(Query(text="q"), POOL, unasked)
        # Nor is a round of all strategies cancelled by one that is gone: a reload ended upkeep and errands for good.
        with pytest.raises(AnabranchError, match="the thread of strategy s has ended"):
            await made[0].alone(lambda: "never")
        assert thread._users == 0

    asyncio.run(main())


def test_a_lane_does_not_wait_for_what_the_one_before_it_began_and_never_ended():
    gate, began = threading.Event(), threading.Event()

    async def main():
        old, new = lanes(2, lambda query, pool: began.set() or (gate.wait() and say("small")(query, pool)), 0.05)
        with pytest.raises(BypassError, match="took longer"):
            await old.decide(Query(text="q"), POOL, unasked)
        await asyncio.to_thread(began.wait)
        with pytest.raises(BypassError, match="longer"):
            await asyncio.wait_for(new.decide(Query(text="q"), POOL, unasked), 60)
        old.close()
        new.close()

    try:
        asyncio.run(main())
    finally:
        gate.set()


def test_who_is_cancelled_while_alone_with_a_strategy_is_cancelled_and_leaves_nothing():
    gate, began = threading.Event(), threading.Event()

    async def main():
        [lane] = lanes(1, lambda query, pool: began.set() or (gate.wait() and say("small")(query, pool)), 60.0)
        asked = asyncio.ensure_future(lane.decide(Query(text="q"), POOL, unasked))
        await asyncio.to_thread(began.wait)
        ran = []
        alone = asyncio.ensure_future(lane.alone(lambda: ran.append(1)))
        await asyncio.sleep(0)
        alone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await alone
        gate.set()
        await asked
        lane.close()
        assert ran == []
        assert lane._thread._users == 0

    asyncio.run(main())
