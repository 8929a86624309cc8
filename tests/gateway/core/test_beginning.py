"""What is asked, whose it is, and whether there is room for it."""

import asyncio
import threading

import pytest

from anabranch.gateway.config import LimitsConfig, StrategyConfig, Target
from anabranch.gateway.config.ab import ABConfig
from anabranch.gateway.core import beginning
from anabranch.gateway.core.decision_log import Collecting
from anabranch.gateway.store import COLLECT, SHADOW, KeyRecord
from anabranch.web.api_error import ApiError
from anabranch.web.large_json import LARGE
from gateway_states import at_once, begun, config, run, services, state_of


def test_a_request_is_read_into_its_target_its_label_and_its_length():
    state = state_of()
    beginning.read(state)
    assert (state.target.model, state.label, state.strategy) == ("small", "small", "")
    assert state.count.tokens > 0
    chosen = state_of({"model": "auto/cheapest?lambda=2&b=1"})
    beginning.read(chosen)
    assert (chosen.target.model, chosen.label, chosen.strategy) == (None, "auto/cheapest?b=1&lambda=2", "cheapest")


@pytest.mark.parametrize(
    ("body", "endpoint", "status", "param"),
    [
        ({"model": "nobody"}, "chat", 404, "model"),
        ({"messages": "hello"}, "chat", 400, "messages"),
        ({"model": "auto", "input": "a cat"}, "moderations", 400, "model"),
        ({"prompt": 5}, "completions", 400, "prompt"),
        ({"input": None}, "embeddings", 400, "input"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_name(body, endpoint, status, param):
    with pytest.raises(ApiError) as caught:
        beginning.read(state_of(body, endpoint=endpoint))
    assert (caught.value.status, caught.value.param) == (status, param)


def test_a_label_has_its_knobs_in_order():
    target = Target(strategy="cheapest", knobs={"b": "2", "a": "1"})
    assert beginning.label_of(target) == "auto/cheapest?a=1&b=2"
    assert beginning.label_of(Target(model="small")) == "small"
    assert beginning.label_of(Target(strategy="a", test="trial")) == "auto/trial"


def test_a_request_is_its_key_s_its_team_s_and_its_tags():
    key = KeyRecord(id="k0123456789ab", user="ann", team="ml", tags=("x",), rpm=2, tpm=10_000, speaks_for=("tag:y",))
    state = state_of({"user": "bob"}, headers={"x-tags": "y, z"})
    state.record = key
    begun(state)
    assert state.subjects == (
        "global",
        "key:k0123456789ab",
        "team:ml",
        "user:ann",
        "tag:x",
        "tag:y",
        "tag:k0123456789ab/z",
    )
    tags = ("x", "y", "k0123456789ab/z")
    assert (state.user, state.named_user, state.tags, state.tpm, state.is_counted) == ("ann", "ann", tags, 10_000, True)
    assert (state.tenant, state.sender) == ("k0123456789ab", "team:ml")
    assert state_of().sender == ""
    lone = state_of()
    lone.record = KeyRecord(id="k2")
    assert lone.sender == "key:k2"


def test_a_team_a_user_and_a_key_of_one_name_are_three_senders_and_the_gateway_is_a_fourth():
    senders = []
    for fields in ({"id": "k1", "team": "acme"}, {"id": "k2", "user": "acme"}, {"id": "acme"}):
        state = state_of()
        state.record = KeyRecord(**fields)
        senders.append(state.sender)
    assert senders == ["team:acme", "user:acme", "key:acme"]
    # It comes without a key, and is not whoever else does.
    own = [state_of(collecting=Collecting("k", 0, tag)).sender for tag in (COLLECT, SHADOW)]
    assert own == ["gateway:collect", "gateway:shadow"]


def test_tags_of_the_gateway_s_own_are_for_it_alone():
    state = state_of(headers={"x-tags": COLLECT})
    with pytest.raises(ApiError, match="own questions"):
        at_once(beginning.name(state))
    collected = state_of(collecting=Collecting("key", 0))
    at_once(beginning.name(collected))
    assert collected.tags == (COLLECT,)


def test_a_tag_that_may_not_be_is_named():
    with pytest.raises(ApiError) as caught:
        at_once(beginning.name(state_of(headers={"x-tags": "a:b\n"})))
    assert caught.value.param == "x-tags"


def test_the_limits_of_a_key_go_before_those_of_the_config():
    lent, _ = services()
    of = config(limits=LimitsConfig(rpm=1, max_in_flight=5))

    def one(**fields):
        state = state_of(lent=lent, of=of)
        state.record = KeyRecord(id="k", **fields)
        beginning.take_place(state)
        at_once(beginning.admit(state))

    one(rpm=2, max_in_flight=2)
    one(rpm=2, max_in_flight=2)
    with pytest.raises(ApiError, match="2 requests under way"):
        one(rpm=2, max_in_flight=2)
    # Refused by its rate, it has no place either: there is one left.
    with pytest.raises(ApiError, match="a minute"):
        one(rpm=2)
    assert lent.admission._senders._counts == {"k": 2}


def test_a_user_that_a_key_may_not_speak_for_is_its_own():
    state = state_of({"user": "ann"})
    state.record = KeyRecord(id="k0123456789ab")
    begun(state)
    assert (state.user, state.named_user) == ("k0123456789ab/ann", "ann")
    assert state.subjects[-1] == "user:k0123456789ab/ann"
    nobody = state_of({"user": "ann"})
    begun(nobody)
    assert nobody.user == "ann"


def test_a_request_to_a_test_goes_to_the_strategy_of_its_arm():
    strategies = {"cheapest": StrategyConfig(use="cheapest"), "static": StrategyConfig(use="static")}
    of = config(strategies=strategies, ab={"trial": ABConfig(a="cheapest", b="static", share=0.999999)})
    state = state_of({"model": "auto/trial", "user": "ann"}, of=of)
    beginning.read(state)
    beginning.assign(state)
    assert (state.arm.test, state.arm.side, state.strategy, state.label) == ("trial", "b", "static", "auto/trial")
    plain = state_of(of=of)
    beginning.read(plain)
    beginning.assign(plain)
    assert plain.arm is None


def test_the_purse_has_the_limit_of_a_request_and_the_key_s_models():
    of = config(limits=LimitsConfig(request_usd=0.5))

    async def work():
        state = state_of(of=of)
        state.record = KeyRecord(id="k", models=("small",))
        begun(state)
        assert await state.purse.is_limited()
        assert state.purse.is_empty
        await state.purse.hold(7)
        return state

    state = run(work)
    [(id, nano, named)] = state.services.store.reserved
    assert (id, nano, named) == (state.id, 7, {"requested": "small", "strategy": ""})
    assert state.calls.made == []


@pytest.mark.parametrize(("num_bytes", "is_apart"), [(0, False), (LARGE, False), (LARGE + 1, True)])
def test_large_bodies_are_worked_on_in_another_thread(num_bytes, is_apart):
    async def work():
        return await beginning.apart(state_of(num_bytes=num_bytes), threading.current_thread)

    assert (run(work) is not threading.main_thread()) == is_apart


def test_a_sender_of_many_large_bodies_waits_for_itself_and_another_for_one_piece():
    lent, done, gate = services()[0], [], threading.Event()

    def of(whose):
        state = state_of(lent=lent, num_bytes=LARGE + 1)
        state.record = KeyRecord(id=whose)
        return state

    async def work():
        first = asyncio.create_task(beginning.apart(of("hostile"), lambda: gate.wait() and done.append("first")))
        await asyncio.sleep(0)
        rest = [
            asyncio.create_task(beginning.apart(of(whose), lambda whose=whose: done.append(whose)))
            for whose in ["hostile"] * 5 + ["other"]
        ]
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(first, *rest)

    run(work)
    assert done == ["first", "hostile", "other", *["hostile"] * 4]
