"""What a provider may have billed: which ends of an attempt cost, and how much a stream can have come to."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway.dispatch import Attempt
from anabranch.gateway.dispatch.billed import FEW, broken_off, may_be_billed, tokens_of, whole_at_most
from anabranch.gateway.dispatch.output_speed import OutputSpeed
from anabranch.gateway.providers.provider import Answer, Failure, HttpCall, Usage

MOST = Usage(100, 50, 0, True)


def attempt(is_sent=True, **fields):
    call = HttpCall("http://nowhere", {}, b"{}", is_sent=is_sent)
    return Attempt(model="m", deployment="d", start_s=0.0, call=call, **fields)


def failed(kind, status=None):
    return Failure(kind=kind, message="no", status=status)


@pytest.mark.parametrize(
    ("failure", "fields", "billed"),
    [
        (None, {}, True),
        (failed("timeout"), {}, True),
        (failed("deadline"), {}, True),
        (failed("cut"), {}, True),
        (failed("garbage"), {"http_status": 200}, True),
        (failed("connect"), {}, False),
        (failed("connect"), {"http_status": 200}, True),
        (failed("garbage", 302), {"http_status": 302}, False),
        (failed("rate_limit", 429), {"http_status": 429}, False),
        (failed("server", 500), {"http_status": 200}, False),
        (failed("server", 500), {"http_status": 200, "has_begun": True}, True),
        (failed("timeout", 408), {"http_status": 408}, True),
        (failed("server", 504), {"http_status": 504}, True),
    ],
)
def test_which_ends_of_an_attempt_may_be_billed(failure, fields, billed):
    assert may_be_billed(attempt(**fields), failure) == billed
    assert not may_be_billed(attempt(is_sent=False, **fields), failure)


def test_an_attempt_that_never_got_to_its_call_costs_nothing():
    assert not may_be_billed(Attempt(model="m", deployment="d", start_s=0.0), None)


def test_tokens_are_counted_rather_more_than_less():
    assert tokens_of(3, 0) == 3
    assert tokens_of(1, 100) == 100
    assert tokens_of(1, 100, 3) == 34
    assert tokens_of(40, 100, 3) == 40


def test_what_a_broken_stream_may_come_to():
    assert broken_off(MOST, None, 5, 0) == Usage(100, 5, 0, True)
    assert broken_off(MOST, None, 5, 11) == Usage(100, 16, 0, True)
    assert broken_off(MOST, None, 5, 990) == Usage(100, 50, 0, True)
    assert broken_off(MOST, None, 5, None) == Usage(100, 50, 0, True)
    assert broken_off(MOST, Usage(20, 1, 3), 0, 10) == Usage(20, 11, 3, True)
    # More than was thought possible was told.
    assert broken_off(MOST, Usage(20, 60), 0, 10) == Usage(20, 60, 0, True)
    # Some say 0 before they know.
    assert broken_off(MOST, Usage(0, 0), 0, 0).prompt == 100


def test_what_was_predicted_may_be_billed():
    predicted = Usage(100, 50, 0, True, predicted=7)
    assert broken_off(predicted, None, 5, 8).completion == 5 + 8 + 7
    answer = Answer({"choices": [{"message": {"content": "abc"}}]}, None, Usage(3, 1, 0, True))
    assert whole_at_most(MOST, answer).completion == 3 + 1 + FEW
    assert whole_at_most(predicted, answer).completion == 3 + 1 + FEW + 7
    # Of best_of answers the best alone is shown.
    assert whole_at_most(MOST, answer, 1.0, 4).completion == 4 * (3 + 1) + FEW
    assert whole_at_most(MOST, answer, 1.0, 4, 15).completion == 4 * (3 + 1) + FEW
    assert whole_at_most(MOST, answer, 1.0, 4, 20).completion == 20 + FEW
    assert whole_at_most(MOST, Answer({}, None, Usage(3, 1, 0, True)), in_time=20).completion == 1


@given(
    seen=st.integers(0, 50),
    declared=st.floats(0.01, 1e6),
    share=st.floats(0, 1),
    silent_s=st.floats(0, 1e4),
    few=st.integers(0, FEW),
)
def test_a_provider_no_faster_than_said_is_never_charged_less_than_it_made(seen, declared, share, silent_s, few):
    made = min(MOST.completion, seen + few + int(declared * share * silent_s))
    unseen = OutputSpeed("d", declared).at_most(silent_s) + FEW
    assert made <= broken_off(MOST, None, seen, unseen).completion <= MOST.completion
