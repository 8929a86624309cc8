import random
from collections import Counter

import pytest

from anabranch.gateway.dispatch.balance import pick
from anabranch.gateway.dispatch.breaker import BreakerRules
from anabranch.gateway.dispatch.deployment_state import Live
from anabranch.gateway.dispatch.deployments import Deployment
from anabranch.gateway.providers.mock import Mock
from anabranch.routers.money import Price


def live(name: str, price: int = 1, **fields) -> Live:
    deployment = Deployment(name=name, provider=Mock.Config(model="m"), **fields)
    return Live("m", deployment, Price(input=price), BreakerRules(), None, lambda *change: None)


def drawn(policy, choices, times=4000, seed=0):
    rng = random.Random(seed)
    return Counter(pick(policy, choices, 0.0, rng).name for _ in range(times))


def test_weights_are_shares():
    counts = drawn("weighted", [live("a", weight=3.0), live("b", weight=1.0), live("c", weight=0.0)])
    assert abs(counts["a"] / 4000 - 0.75) < 0.03
    assert counts["c"] == 0
    assert drawn("weighted", [live("a", weight=0.0), live("b", weight=0.0)])["b"] > 1800


def test_what_fails_gets_less():
    failing = live("a")
    failing.failing = 0.9
    assert drawn("weighted", [failing, live("b")])["a"] < 600


def test_the_less_busy_of_two():
    busy = live("a")
    busy.in_flight = 3
    assert drawn("least_in_flight", [busy, live("b")]) == {"b": 4000}
    counts = drawn("least_in_flight", [busy, live("b"), live("c")])
    assert counts["a"] == 0
    assert abs(counts["b"] / 4000 - 0.5) < 0.05


def test_the_quicker_and_the_unknown_first():
    slow, quick = live("slow"), live("quick")
    slow.timed(2.0)
    quick.timed(0.5)
    assert drawn("latency", [slow, quick]) == {"quick": 4000}
    assert drawn("latency", [slow, quick, live("new")]) == {"new": 4000}
    quick.in_flight = 9  # ten would wait there
    assert drawn("latency", [slow, quick]) == {"slow": 4000}


def test_how_fast_it_is_is_learned_from_the_time_in_which_it_was_waited_for():
    one = live("a")
    one.timed(11.0, 1.0, 101, waited_s=7.4)
    assert (one.first_token_s, one.token_s, one.latency_s) == (1.0, None, None)
    one.timed(11.0, 1.0, 101, waited_s=8.0)
    assert (one.token_s, one.latency_s) == (0.08, 9.0)
    # A slow reader takes nothing back.
    one.timed(101.0, 1.0, 101, waited_s=10.0)
    assert (one.token_s, one.latency_s) == (0.08, 9.0)


def test_the_most_tokens_left():
    low, high = live("low", tpm=100), live("high", tpm=1000)
    assert drawn("tpm", [low, high]) == {"high": 4000}
    high.spent(0.0, 950)
    assert drawn("tpm", [low, high]) == {"low": 4000}
    assert drawn("tpm", [low, high, live("free")]) == {"free": 4000}


def test_the_cheapest():
    counts = drawn("price", [live("dear", 5), live("a", 1), live("b", 1)])
    assert counts["dear"] == 0
    assert abs(counts["a"] / 4000 - 0.5) < 0.05


@pytest.mark.parametrize(("fields", "takes"), [({"rpm": 2}, 2), ({"max_in_flight": 3}, 3), ({"tpm": 45}, 4), ({}, 10)])
def test_limits_of_a_deployment(fields, takes):
    one = live("a", **fields)
    taken = 0
    for _ in range(10):
        if one.can_take(0.0, 10):
            one.begin(0.0, 10)
            taken += 1
    assert taken == takes
    if "rpm" in fields or "tpm" in fields:
        assert 0 < one.free_in_s(0.0, 10) <= 61
        assert one.can_take(61.0, 10)


def test_what_has_no_price_is_not_the_cheapest():
    unknown = live("unknown", 0, is_priced=False)
    assert drawn("price", [unknown, live("dear", 9)], 100) == {"dear": 100}
