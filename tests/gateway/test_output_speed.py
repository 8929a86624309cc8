"""How fast a deployment is declared to be at most: what that makes of a time, and what whole streams say against it."""

import logging
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway.dispatch.billed import FEW
from anabranch.gateway.dispatch.output_speed import AGAIN, TOLD_S, OutputSpeed


def test_it_makes_tokens_by_the_time_and_by_the_answer():
    speed = OutputSpeed("d", 20.0)
    assert [speed.at_most(*at) for at in ((0.0,), (1.01,), (2.0, 3), (-1.0,))] == [0, 21, 120, 0]


@pytest.mark.parametrize(
    ("tokens", "answers", "is_over"), [(58, 1, False), (59, 1, True), (116, 2, False), (117, 2, True)]
)
def test_a_whole_stream_shows_that_it_is_faster_only_where_one_that_was_left_would_have_cost_too_little(
    tokens, answers, is_over
):
    speed = OutputSpeed("d", 20.0)
    assert speed.at_most(2.5, answers) + FEW * answers in (58, 116)
    speed.told(tokens, 2.0, answers, 0.5, 0.0)
    assert speed.exceeded(1.0) == (pytest.approx(tokens / answers / 2) if is_over else 0.0)


def test_the_log_says_so_and_not_again_until_it_is_much_more(caplog):
    speed = OutputSpeed("slow one", 20.0)
    with caplog.at_level(logging.WARNING):
        for tokens in (1000, 1000, int(1000 * AGAIN) - 1, 900):
            speed.told(tokens, 1.0, 1, 0.0, 5.0)
        assert len(caplog.records) == 1
        assert speed.exceeded(5.0) == int(1000 * AGAIN) - 1
        assert "deployment slow one told 1000 tokens" in caplog.text
        assert "declare output_speed = 1000" in caplog.text
        speed.told(int(1000 * AGAIN), 1.0, 1, 0.0, 5.0)
    assert len(caplog.records) == 2


def test_what_was_shown_is_kept_until_what_is_declared_covers_it(caplog):
    old = OutputSpeed("d", 20.0)
    old.told(1000, 1.0, 1, 0.0, 0.0)
    for declared, exceeded in ((20.0, 1000.0), (2000.0, 0.0)):
        new = OutputSpeed("d", declared)
        new.adopt(old)
        assert new.exceeded(1.0) == exceeded
        # The log has spoken of that, unless it was mended in between.
        caplog.clear()
        new.told(int(3 * declared) * 20, 20.0, 1, 0.0, 1.0)
        assert len(caplog.records) == (declared == 2000.0)


def test_an_answer_out_of_a_cache_ends_the_alarm_for_an_hour_at_most(caplog):
    """One at a million tokens a second hid all that came after it, for ever (F3 of R20c)."""
    speed = OutputSpeed("d", 200.0)
    speed.told(20_000, 0.02, 1, 0.0, 0.0)
    for minute in range(0, 60, 10):
        speed.told(4000 + minute, 10.0, 1, 0.0, 60.0 * minute)
    assert speed.exceeded(TOLD_S - 1) == 1_000_000
    caplog.clear()
    assert speed.exceeded(TOLD_S) == 405
    new = OutputSpeed("d", 403.0)
    new.adopt(speed)
    assert new.exceeded(TOLD_S) == 405
    assert new.exceeded(2 * TOLD_S) == 0.0
    with caplog.at_level(logging.WARNING):
        speed.told(4000, 10.0, 1, 0.0, TOLD_S)
        assert len(caplog.records) == 1
        speed.told(4000, 10.0, 1, 0.0, TOLD_S)
    assert len(caplog.records) == 1
    assert "declare output_speed = 400" in caplog.text


STREAMS = st.lists(st.tuples(st.floats(0, 3000), st.integers(1, 10**6)), max_size=30)


@given(STREAMS, st.floats(0, 2 * TOLD_S))
def test_it_is_the_fastest_of_the_last_hour(streams, later):
    speed, now, told = OutputSpeed("d", 50.0), 0.0, []
    for after, tokens in streams:
        now += after
        speed.told(tokens, 1.0, 1, 0.0, now)
        told.append((now, tokens))
    now += later
    assert speed.exceeded(now) == max((each for at, each in told if now - at < TOLD_S and each > 50 + FEW), default=0)


TOLD = st.tuples(st.integers(0, 10**7), st.floats(0, 1e4), st.integers(1, 128), st.floats(0, 10))


@given(st.floats(0.01, 1e6), st.lists(TOLD, max_size=20), st.floats(0, 1e4), st.integers(1, 128))
def test_no_stream_changes_it(declared, streams, seconds, answers):
    speed = OutputSpeed("d", declared)
    for stream in streams:
        speed.told(*stream, 0.0)
    assert speed.at_most(seconds, answers) == math.ceil(declared * answers * seconds)
