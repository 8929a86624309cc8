"""Headers of an answer: where it went, what it cost, and nothing that a header may not hold."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway.core import choice
from anabranch.gateway.core.response_headers import headers_of, overhead_s, safe
from anabranch.gateway.dispatch import Attempt, Report
from gateway_states import begun, run, state_of


async def decided(body=None):
    state = state_of(body)
    begun(state)
    await choice.decide(state)
    return state


def attempt(**fields):
    given = {"model": "small", "deployment": "s/1", "start_s": 0.0, "status": "ok", "total_s": 1.0, "cost": 5, **fields}
    return Attempt(**given)


def test_headers_of_a_whole_answer():
    state = run(decided, {"model": "auto/cheapest"})
    state.is_cacheable = True
    state.decided = replace(
        state.decided, decision=replace(state.decided.decision, reason="só\n" * 100, confidence=0.5)
    )
    found = headers_of(state, Report(attempts=[attempt()], model="small", deployment="s/1", is_stitched=True))
    assert (found["x-request-id"], found["x-route-model"], found["x-route-deployment"]) == (state.id, "small", "s/1")
    assert (found["x-route-attempts"], found["x-cost-usd"], found["x-cache"]) == ("1", "0.000000005", "miss")
    assert (found["x-route-strategy"], found["x-route-confidence"], found["x-stitched"]) == (
        "cheapest",
        "0.500",
        "true",
    )
    assert (len(found["x-route-reason"]), found["x-route-reason"][:4]) == (200, "s??s")
    state.decided = replace(state.decided, bypassed="it took longer than 1 s")
    assert headers_of(state, Report())["x-route-bypassed"] == "it took longer than 1 s"


def test_headers_of_a_stream_say_who_is_answering_and_no_cost():
    state = run(decided, {"stream": True})
    found = headers_of(state, Report(attempts=[attempt(status="open", first_token_s=0.1, total_s=None)]))
    assert (found["x-route-model"], found["x-route-deployment"]) == ("small", "s/1")
    assert not {"x-cost-usd", "x-cache", "x-route-strategy", "x-route-calls", "x-route-arm"} & found.keys()


def test_a_program_s_calls_are_its_cost():
    state = run(decided)
    state.program = SimpleNamespace(first_s=None, spare="")
    state.calls.made.append(SimpleNamespace(report=Report(attempts=[attempt(cost=7)])))
    found = headers_of(state, Report(attempts=[attempt(cost=5)]))
    assert (found["x-route-calls"], found["x-cost-usd"]) == ("1", "0.000000007")
    assert "x-route-spare" not in found
    state.program.spare = "time\r\nx-evil: 1" + "x" * 999
    assert headers_of(state, Report())["x-route-spare"] == "time??x-evil: 1" + "x" * 185


def test_overhead_is_all_but_the_span_of_the_attempts():
    state = run(decided)
    state.elapsed = lambda: 3.0
    first, second = attempt(start_s=0.5, total_s=1.0), attempt(start_s=1.0, total_s=None, first_token_s=1.5)
    assert overhead_s(state, Report(attempts=[first])) == 2.0
    assert overhead_s(state, Report(attempts=[first, second])) == 1.0
    assert overhead_s(state, Report()) == 3.0
    state.program = SimpleNamespace()
    state.calls = SimpleNamespace(busy_s=2.5)
    assert overhead_s(state, Report()) == 0.5


@given(st.text())
def test_a_header_holds_one_line_of_ascii(value):
    found = safe(value)
    assert len(found) == len(value)
    assert found.isascii()
    assert found.isprintable()


@pytest.mark.parametrize(
    ("value", "expected"), [("as it is", "as it is"), ("a\r\nx-evil: 1", "a??x-evil: 1"), ("ü", "?")]
)
def test_what_a_header_may_not_hold_is_a_question_mark(value, expected):
    assert safe(value) == expected
