"""Refusals of requests: what a client is told, in whole seconds that it will wait."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import LimitError
from anabranch.serving.core.overload import REASONS, OverloadError, overloaded, seconds_until


@pytest.mark.parametrize(
    ("wait_s", "told_s"),
    [(0.0, 1), (0.2, 1), (1.0, 1), (1.01, 2), (119.5, 120), (120.0, 120), (1e9, 120), (math.inf, 120), (-5.0, 1)],
)
def test_the_wait_is_in_whole_seconds_that_a_client_accepts(wait_s, told_s):
    error = overloaded("queued", "300 requests wait", wait_s, 503)
    assert (error.retry_after_s, error.reason, error.status) == (told_s, "queued", 503)
    assert str(error) == f"overloaded: 300 requests wait; try again in {told_s} s"


def test_whoever_catches_limits_catches_it():
    assert issubclass(OverloadError, LimitError)
    with pytest.raises(LimitError):
        raise overloaded(REASONS[0], "full", 1.0, 429)


def test_an_amount_drains_at_its_pace():
    assert seconds_until(30, 10) == 3.0
    assert seconds_until(0, 0) == 0.0
    assert seconds_until(-1, 5) == 0.0
    # Before anything was measured: try again soon.
    assert seconds_until(30, None) == 0.0
    assert seconds_until(30, 0) == math.inf
    assert seconds_until(30, -1) == math.inf


@given(st.floats(0, 1e12), st.none() | st.floats(0, 1e9))
def test_whatever_waits_the_header_is_a_small_whole_number(amount, rate):
    told = overloaded("queued_tokens", "full", seconds_until(amount, rate), 503).retry_after_s
    assert 1 <= told <= 120
    assert told == int(told)
