"""How many of a deployment's places (`max_in_flight`) are for one sender."""

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.gateway.config import DeploymentConfig, GatewayConfig, LimitsConfig, ModelConfig
from anabranch.gateway.dispatch import Deployment, Dispatcher, DispatchRules, Group, Plan
from anabranch.gateway.dispatch.breaker import BreakerRules
from anabranch.gateway.dispatch.deployment_state import Live
from anabranch.gateway.dispatch.virtual_time import run_virtual, virtual_clock
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.providers.provider import UpstreamError, UpstreamRequest
from anabranch.routers.money import Price
from anabranch.web.api_error import ApiError

SHARED = {"max_in_flight": 4, "key_share": 0.75}
RULES = DispatchRules(retries=2, backoff_s=0.01, min_extra=1000)


def live(**fields):
    deployment = Deployment(name="m", provider=Mock.Config(model="m"), **{**SHARED, **fields})
    return Live("m", deployment, Price(), BreakerRules(), None, lambda *change: None)


def begun(one, sender):
    """Begin as many as are let in at once: their tickets."""
    tickets = []
    while one.can_take(0.0, 1, sender):
        tickets.append(one.begin(0.0, 1, sender))
    return tickets


def group(name, *configs, **shared):
    deployments = tuple(
        Deployment(name=f"{name}-{at}", provider=Mock.Config(model=name, **config), **{**SHARED, **shared})
        for at, config in enumerate(configs)
    )
    return Group(name=name, deployments=deployments)


def chat(**fields):
    return UpstreamRequest("chat", {"model": "m", "messages": [{"role": "user", "content": "hello"}], **fields})


def plan(dispatcher, sender, *candidates, **fields):
    return Plan(candidates=candidates or ("m",), deadline=dispatcher.now() + 60, sender=sender, **fields)


def test_one_sender_leaves_a_place_for_another():
    one = live()
    tickets = begun(one, "key:a")
    assert (len(tickets), one.in_flight) == (3, 3)
    # There is room; for whoever has none of it.
    assert one.can_take(0.0, 1)
    assert one.can_take(0.0, 1, "key:b")
    assert len(begun(one, "key:b")) == 1
    assert not one.can_take(0.0, 1)
    assert not one.can_take(0.0, 1, "key:c")
    # What ends is there for who has none, not for who has the most.
    one.end(tickets.pop(), "success", 0.0, sender="key:a")
    assert (one.can_take(0.0, 1, "key:a"), one.can_take(0.0, 1, "key:c")) == (False, True)


@pytest.mark.parametrize(
    ("fields", "places"), [({"key_share": 1.0}, 4), ({"max_in_flight": 1}, 1), ({"max_in_flight": 2}, 1)]
)
def test_what_a_lone_sender_has(fields, places):
    assert len(begun(live(**fields), "key:a")) == places


def test_without_keys_nothing_is_shared_out():
    one = live()
    assert len(begun(one, "")) == 4


def test_what_the_gateway_asks_for_itself_is_one_sender_that_leaves_a_place():
    one = live(max_in_flight=8)
    assert len(begun(one, "gateway:shadow")) == 6
    assert not one.can_take(0.0, 1, "gateway:learning")
    # Nor does it have senders without keys held to a part.
    assert len(begun(one, "")) == 2
    busy = live(max_in_flight=8)
    assert (len(begun(busy, "key:a")), len(begun(busy, "key:b"))) == (6, 1)
    # The last one is for whoever comes.
    assert not busy.can_take(0.0, 1, "gateway:shadow")
    assert busy.can_take(0.0, 1, "key:c")
    assert len(begun(live(max_in_flight=1), "gateway:shadow")) == 1


@given(
    st.lists(
        st.tuples(st.sampled_from(["", "key:a", "key:b", "gateway:shadow", "gateway:judge"]), st.booleans()),
        max_size=60,
    ),
    st.integers(1, 9),
)
def test_whoever_has_none_finds_each_free_place_and_all_is_given_back(steps, most):
    one, held = live(max_in_flight=most), []
    for sender, begins in steps:
        if begins and one.can_take(0.0, 1, sender):
            held.append((one.begin(0.0, 1, sender), sender))
        elif not begins and held:
            ticket, whose = held.pop(0)
            one.end(ticket, "ignored", 0.0, sender=whose)
        assert one.in_flight == len(held) <= most
        assert one.can_take(0.0, 1, "key:new") is (len(held) < most)
    for ticket, whose in held:
        one.end(ticket, "ignored", 0.0, sender=whose)
    assert one._parts._counts == {}


def test_beyond_its_part_a_sender_is_sent_elsewhere_and_else_told_so():
    async def work():
        dispatcher = Dispatcher([group("m", {"tokens_per_s": 1.0}), group("n", {})], RULES, clock=virtual_clock)
        streams = [await dispatcher.stream(plan(dispatcher, "key:a"), chat(stream=True)) for _ in range(3)]
        answer = await dispatcher.complete(plan(dispatcher, "key:a", "m", "n"), chat())
        assert (answer.report.model, answer.report.is_stopgap) == ("n", True)
        assert answer.report.skipped == [("m", "this sender has its part of what its deployments take")]
        with pytest.raises(UpstreamError, match="this sender has its part") as caught:
            await dispatcher.complete(plan(dispatcher, "key:a"), chat())
        assert (caught.value.failure.kind, caught.value.failure.is_crowded) == ("unavailable", True)
        other = await dispatcher.stream(plan(dispatcher, "key:b"), chat(stream=True))
        with pytest.raises(UpstreamError, match="no deployment takes requests"):
            await dispatcher.complete(plan(dispatcher, "key:c"), chat())
        for stream in (*streams, other):
            await stream.aclose()
        assert dispatcher.lives()[0]._parts._counts == {}
        assert (await dispatcher.complete(plan(dispatcher, "key:a"), chat())).report.model == "m"

    run_virtual(work)


def test_a_hedge_is_within_the_part_too():
    async def work():
        rules = DispatchRules(hedge=True, hedge_samples=1, min_extra=1000)
        dispatcher = Dispatcher(
            [group("m", {"latency_s": 9.0}), group("n", {"latency_s": 9.0})], rules, clock=virtual_clock
        )
        dispatcher.groups["m"].hedge_whole.observe(0.1)
        slow, beside = dispatcher.lives()
        tasks = [asyncio.ensure_future(dispatcher.complete(plan(dispatcher, "key:a", "n"), chat())) for _ in range(3)]
        await asyncio.sleep(0.1)
        assert beside.in_flight == 3
        report = (await dispatcher.complete(plan(dispatcher, "key:a", "m", "n"), chat())).report
        assert [(one.deployment, one.is_hedge) for one in report.attempts] == [("m-0", False)]
        await asyncio.gather(*tasks)
        assert slow._parts._counts == beside._parts._counts == {}

    run_virtual(work)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
def test_whatever_becomes_of_attempts_their_places_are_given_back(seed):
    """Answers, streams, retries, hedges, failures, timeouts, and senders who leave."""
    draw = random.Random(seed)
    steps = ("ok", "500", "429", "hang", "reset", "cut:0", "cut:3", "garbage", "402", "422")

    def config():
        script = tuple(draw.choice(steps) for _ in range(12))
        return {"latency_s": draw.random(), "tokens_per_s": 20.0, "script": script}

    async def one(dispatcher, sender, stream):
        asked = plan(dispatcher, sender, "m", "n")
        if not stream:
            await dispatcher.complete(asked, chat())
            return
        made = await dispatcher.stream(asked, chat(stream=True))
        try:
            async for _ in made:
                pass
        finally:
            await made.aclose()

    async def work():
        rules = DispatchRules(
            retries=2, backoff_s=0.01, min_extra=1000, hedge=True, hedge_samples=1, mid_stream="continue"
        )
        groups = [group("m", config(), config(), timeout_s=3.0), group("n", config(), timeout_s=3.0)]
        dispatcher = Dispatcher(groups, rules, clock=virtual_clock, seed=seed)
        tasks = []
        for _ in range(25):
            sender = draw.choice(["", "key:a", "key:a", "key:b", "gateway:shadow"])
            task = asyncio.ensure_future(one(dispatcher, sender, draw.random() < 0.5))
            if draw.random() < 0.3:
                asyncio.get_running_loop().call_later(draw.random() * 2, task.cancel)
            tasks.append(task)
            await asyncio.sleep(draw.random() * 0.1)
            for live in dispatcher.lives():
                counts = live._parts._counts
                assert sum(counts.values()) == live.in_flight <= 4
                assert counts.get("key:a", 0) <= 3
        await asyncio.gather(*tasks, return_exceptions=True)
        await dispatcher.close()
        assert [(live.in_flight, live._parts._counts) for live in dispatcher.lives()] == [(0, {})] * 3

    run_virtual(work)


def test_a_key_that_takes_all_it_can_leaves_other_keys_a_place(tmp_path):
    """A deployment's four places were one key's, and another was told 503 until one of its requests ended."""

    async def main():
        made = GatewayConfig(
            models=(
                ModelConfig(
                    name="m",
                    deployments=(
                        DeploymentConfig(
                            provider=Mock.Config(model="m", tokens_per_s=50.0, tokens=100_000), max_in_flight=4
                        ),
                    ),
                ),
            ),
            limits=LimitsConfig(key_share=0.75),
            store=str(tmp_path / "g.db"),
        )
        body = {"model": "m", "messages": [{"role": "user", "content": "hello"}], "stream": True}
        async with Gateway(made) as gateway:
            greedy, _ = await gateway.store.create_key("greedy")
            other, _ = await gateway.store.create_key("other")
            replies = [await gateway.handle("chat", dict(body), key=greedy) for _ in range(3)]
            with pytest.raises(ApiError) as caught:
                await gateway.handle("chat", dict(body), key=greedy)
            assert (caught.value.status, caught.value.code) == (503, "upstream_unavailable")
            assert "this sender has its part" in str(caught.value)
            replies.append(await gateway.handle("chat", dict(body), key=other))
            for reply in replies:
                await reply.stream.aclose()
            await gateway.settled()
            assert gateway.runtime.dispatcher.lives()[0]._parts._counts == {}

    asyncio.run(main())
