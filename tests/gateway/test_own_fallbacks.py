"""Fallbacks for what is a request's own: whoever needs them has them, and nobody uses them to take what others ask."""

import asyncio
import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.gateway.dispatch import Deployment, Dispatcher, DispatchRules, Group, Plan
from anabranch.gateway.dispatch.own_fallbacks import FURTHER, LEAST, SETTLED_S, WINDOW_S, OwnFallbacks
from anabranch.gateway.dispatch.virtual_time import run_virtual, virtual_clock
from anabranch.gateway.providers.mock import MockReply
from anabranch.gateway.providers.openai import OpenAI
from anabranch.gateway.providers.provider import UpstreamError, UpstreamRequest
from anabranch.gateway.providers.scenes import Scene
from anabranch.routers.money import Price
from gateway_upstream import ANSWER

# What `m0` and, if ``bad``, all others say of a prompt.
ERRORS = {
    "code": {"message": "no", "code": "context_length_exceeded"},
    "filter": {"message": "no", "code": "content_filter"},
    "words": {"message": "prompt is too long: 9 > 8", "type": "invalid_request_error"},
    "quoted": {"message": "Invalid value: 'prompt is too long: 9'", "code": "invalid_value"},
    "down": {"message": "down"},
}
CHAIN = tuple(f"m{at}" for at in range(8))
RPM = 60


class Upstream:
    """Refuses at `m0` each prompt that names an error, and everywhere those that are ``bad`` too."""

    def __init__(self, answer_s, refuse_s):
        self.asked, self.answer_s, self.refuse_s = Counter(), answer_s, refuse_s

    async def open(self, call):
        body = json.loads(call.body)
        name, _, how = body["messages"][0]["content"].partition(" ")
        self.asked[body["model"]] += 1
        await asyncio.sleep(0.1)
        if name not in ERRORS or (body["model"] != "m0" and how != "bad"):
            await asyncio.sleep(self.answer_s)
            return MockReply(Scene(parts=[(0.0, json.dumps(ANSWER).encode())]))
        if body["model"] != "m0":
            await asyncio.sleep(self.refuse_s)
        # What is bad may be an outage only at whoever is asked in its place.
        error = ERRORS["code" if name == "down" and body["model"] == "m0" else name]
        status = 500 if error["message"] == "down" else 400
        return MockReply(Scene(status=status, parts=[(0.0, json.dumps({"error": error}).encode())]))


class Gate:
    """A dispatcher before it, whose clock costs no time."""

    def __init__(self, *, answer_s=0.0, refuse_s=0.0, rpm=RPM, **rules):
        self.upstream = Upstream(answer_s, refuse_s)
        groups = [self._group(name, rpm) for name in CHAIN]
        rules = DispatchRules(retries=0, backoff_s=0.0, **rules)
        self.dispatcher = Dispatcher(groups, rules, http=self.upstream, clock=virtual_clock)

    def _group(self, name, rpm):
        provider = OpenAI.Config(model=name, base_url="http://127.0.0.1:9/v1", key_env=None)
        deployment = Deployment(name=f"{name}-0", provider=provider, rpm=None if name == "m0" else rpm)
        return Group(name=name, deployments=(deployment,), price=Price(input=1, output=1))

    async def ask(self, sender, text, *chain, seconds=30.0):
        request = UpstreamRequest("chat", {"model": "auto", "messages": [{"role": "user", "content": text}]})
        plan = Plan(candidates=chain, deadline=virtual_clock() + seconds, sender=sender)
        try:
            return (await self.dispatcher.complete(plan, request)).report.model
        except UpstreamError as error:
            return error.failure.kind

    async def many(self, count, at_once, *given):
        if at_once:
            return Counter(await asyncio.gather(*(self.ask(*given) for _ in range(count))))
        return Counter([await self.ask(*given) for _ in range(count)])


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(sorted(ERRORS)), st.booleans(), st.integers(1, 7), st.sampled_from([0.0, 0.2]), st.integers(1, 120)
)
def test_a_neighbour_whose_requests_come_to_nothing_takes_little_of_what_others_ask(name, at_once, more, extra, count):
    async def work():
        gate = Gate(extra=extra, min_extra=10 if extra else 0)
        await gate.many(count, at_once, "a", f"{name} bad", *CHAIN[: more + 1])
        asked = gate.upstream.asked
        # Of a request one, of it alone; the others as many as after outages, and a few.
        paid = max(10, extra * count) if extra else 0
        free = LEAST * (1 if name in ("words", "quoted") else FURTHER)
        assert asked["m0"] == count
        assert asked.total() <= count + free + paid
        # The same models are there for others: directly, and for what is their own.
        found = await gate.many(15, True, "b", "hello", "m1")
        assert found == {"m1": 15} or name == "down"
        assert await gate.many(15, False, "b", "code", "m0", "m7") == {"m7": 15}

    run_virtual(work)


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(["code", "filter", "words"]), st.booleans(), st.integers(1, RPM))
def test_whoever_is_answered_has_as_many_as_are_needed(name, at_once, count):
    async def work():
        gate = Gate(extra=0.0, min_extra=0)
        assert await gate.many(count, at_once, "a", name, "m0", "m1") == {"m1": count}
        assert gate.upstream.asked == {"m0": count, "m1": count}
        # Some that come to nothing among them end it for none of the others.
        await gate.many(LEAST + count // 2, at_once, "a", f"{name} bad", "m0", "m2")
        assert await gate.ask("a", name, "m0", "m3") == "m3"

    run_virtual(work)


def test_who_sends_no_key_ends_it_for_nobody():
    async def work():
        gate = Gate(extra=0.0, min_extra=0)
        await gate.many(3 * LEAST, True, "", "code bad", "m0", "m1")
        assert await gate.ask("", "code", "m0", "m2") == "m2"

    run_virtual(work)


def test_after_a_minute_more_may_be_tried():
    async def work():
        gate = Gate(extra=0.0, min_extra=0)
        await gate.many(2 * LEAST, False, "a", "code bad", "m0", "m1")
        assert gate.upstream.asked["m1"] == LEAST
        assert await gate.ask("a", "code", "m0", "m1") == "context"
        await asyncio.sleep(WINDOW_S * 1.1)
        assert await gate.ask("a", "code", "m0", "m1") == "m1"

    run_virtual(work)


@pytest.mark.parametrize("how", ["gone", "late"])
def test_whoever_leaves_before_the_answer_has_had_one_too(how):
    async def work():
        gate = Gate(extra=0.0, min_extra=0)
        for _ in range(3 * LEAST):
            if how == "late":
                await gate.ask("a", "code", "m0", "m1", seconds=0.15)
                continue
            task = asyncio.ensure_future(gate.ask("a", "code", "m0", "m1"))
            await asyncio.sleep(0.15)
            task.cancel()
            await asyncio.wait((task,))
        assert gate.upstream.asked["m1"] == LEAST

    run_virtual(work)


@pytest.mark.parametrize(
    ("count", "answer_s", "seconds"), [(100, 4.5, 12.0), (1000, 45.0, 120.0), (300, 1.9, 15.0), (30, 100.0, 120.0)]
)
def test_a_batch_is_answered_however_long_its_answers_take(count, answer_s, seconds):
    async def work():
        gate = Gate(answer_s=answer_s, rpm=None, extra=0.0, min_extra=0)
        asked = [gate.ask("a", "code", "m0", "m1", seconds=seconds) for _ in range(count)]
        assert Counter(await asyncio.gather(*asked)) == {"m1": count}
        # Nor does what comes after it find that too many came to nothing.
        assert await gate.ask("a", "code", "m0", "m1", seconds=answer_s + 1) == "m1"

    run_virtual(work)


@pytest.mark.parametrize(("refuse_s", "most"), [(0.5, LEAST), (3.0, 8 * LEAST), (5.0, 12 * LEAST)])
def test_what_is_refused_late_goes_on_until_the_first_refusals(refuse_s, most):
    async def work():
        gate = Gate(refuse_s=refuse_s, rpm=None, extra=0.0, min_extra=0)
        asked = []
        for _ in range(600):
            asked.append(asyncio.ensure_future(gate.ask("a", "filter bad", "m0", "m1")))
            await asyncio.sleep(0.05)
        await asyncio.gather(*asked)
        # Some are asked of it alone, as the first has its part of theirs under way.
        assert LEAST <= gate.upstream.asked.total() - len(asked) <= most

    run_virtual(work)


@pytest.mark.parametrize("refuse_s", [0.5, 5.0, 10.0, 40.0])
@pytest.mark.parametrize("leaves", [False, True])
def test_what_is_refused_late_leaves_others_their_part_of_a_minute(refuse_s, leaves):
    async def work():
        gate = Gate(refuse_s=300.0 if leaves else refuse_s, extra=0.0, min_extra=0)
        found, seconds, asked = Counter(), refuse_s if leaves else 120.0, []
        for number in range(300):
            chain = ("m0", "m1") if number % 2 else ("m0", "m2", "m1")
            asked.append(asyncio.ensure_future(gate.ask("a", "code bad", *chain, seconds=seconds)))
            await asyncio.sleep(0.2)
            if number % 10 == 0:
                found[await gate.ask("b", "hello", "m1")] += 1
        assert found == {"m1": 30}
        for task in asked:
            task.cancel()
        await asyncio.wait(asked)

    run_virtual(work)


def test_those_under_way_for_long_give_way_to_others_until_they_come_to_nothing():
    async def work():
        own = OwnFallbacks()
        begun = [await own.enter(virtual_clock) for _ in range(LEAST)]
        waiting = asyncio.ensure_future(own.enter(virtual_clock))
        await asyncio.sleep(SETTLED_S * 0.9)
        assert not waiting.done()
        await asyncio.sleep(SETTLED_S * 0.3)
        assert waiting.done()
        for since in (*begun, await waiting):
            own.leave(since, virtual_clock(), False)
        assert await own.enter(virtual_clock) is None

    run_virtual(work)


def test_who_waits_goes_on_when_what_came_to_nothing_is_forgotten():
    async def work():
        own = OwnFallbacks()
        for _ in range(LEAST - 1):
            own.leave(await own.enter(virtual_clock), virtual_clock(), False)
        await asyncio.sleep(WINDOW_S - 1)
        assert await own.enter(virtual_clock)
        began = virtual_clock()
        assert await own.enter(virtual_clock)
        assert virtual_clock() - began < 2

    run_virtual(work)


@pytest.mark.parametrize("is_answered", [True, False])
def test_those_that_wait_go_on_as_others_are_answered_and_end_where_they_are_not(is_answered):
    async def work():
        own = OwnFallbacks()
        begun = [await own.enter(virtual_clock) for _ in range(LEAST)]
        assert None not in begun
        waiting = [asyncio.ensure_future(own.enter(virtual_clock)) for _ in range(LEAST)]
        await asyncio.sleep(1.0)
        assert not any(task.done() for task in waiting)
        for since in begun:
            own.leave(since, virtual_clock(), is_answered)
        assert [since is not None for since in await asyncio.gather(*waiting)] == [is_answered] * LEAST

    run_virtual(work)
