"""Token buckets and periods by hand, and that no one ever gets more than a limit says."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import InputError, RateError
from anabranch.gateway.store import Bucket, RateLimits, refill, take, window
from anabranch.gateway.store.period import check_period, iso


def test_a_bucket_by_hand():
    """60 a minute is one a second: 60 at once, then one per second."""
    bucket, wait = take(None, 60, 60, 100.0)
    assert (bucket, wait) == (Bucket(0.0, 100.0), 0.0)
    bucket, wait = take(bucket, 1, 60, 100.25)
    assert wait == 0.75
    bucket, wait = take(bucket, 1, 60, 101.0)
    assert (bucket, wait) == (Bucket(0.0, 101.0), 0.0)
    assert refill(bucket, 60, 1000.0) == Bucket(60.0, 1000.0)  # never more than a minute's
    assert refill(Bucket(5.0, 10.0), 60, 9.0) == Bucket(5.0, 10.0)  # a clock that ran back gives nothing
    assert take(None, 61, 60, 0.0) == (Bucket(60.0, 0.0), None)


TIMES = st.lists(st.tuples(st.floats(0, 40), st.integers(0, 50)), max_size=60)


@given(per_minute=st.integers(1, 100), asked=TIMES)
def test_no_span_gets_more_than_its_share(per_minute, asked):
    bucket, now, taken = None, 0.0, []
    for gap, amount in asked:
        now += gap
        bucket, wait = take(bucket, amount, per_minute, now)
        if wait == 0.0:
            taken.append((now, amount))
    for first, (start, _) in enumerate(taken):
        total = 0
        for end, amount in taken[first:]:
            total += amount
            assert total <= per_minute * (1 + (end - start) / 60) + 1e-6


@given(per_minute=st.integers(1, 1000), level=st.floats(-100, 1000), amount=st.integers(1, 1000))
def test_the_wait_is_exact(per_minute, level, amount):
    bucket = Bucket(min(level, per_minute), 0.0)
    same, wait = take(bucket, amount, per_minute, 0.0)
    if wait is None:
        assert amount > per_minute
    elif wait > 0:
        assert same == bucket
        assert take(bucket, amount, per_minute, wait + 1e-6)[1] == 0.0
        assert take(bucket, amount, per_minute, wait * 0.99 - 1e-3)[1] != 0.0


def test_both_limits_or_none():
    now = [0.0]
    limits = RateLimits(clock=lambda: now[0])
    limits.admit("a", 90, rpm=2, tpm=100)
    with pytest.raises(RateError, match=r"100 tokens a minute; try again in 6.0 s") as refused:
        limits.admit("a", 20, rpm=2, tpm=100)
    assert (refused.value.limit, refused.value.retry_after_s) == ("tpm", 6.0)
    limits.admit("a", 10, rpm=2, tpm=100)  # the refused one took no request
    with pytest.raises(RateError, match=r"2 requests a minute; try again in 30.0 s") as refused:
        limits.admit("a", 0, rpm=2, tpm=100)
    assert refused.value.limit == "rpm"
    limits.admit("b", 100, rpm=2, tpm=100)
    limits.admit("a", 10**9, rpm=None, tpm=None)
    with pytest.raises(RateError, match="101 tokens is more than the 100 a minute") as refused:
        limits.admit("c", 101, rpm=None, tpm=100)
    assert refused.value.retry_after_s is None


def test_what_was_used_beyond_the_estimate_is_worked_off():
    now = [0.0]
    limits = RateLimits(clock=lambda: now[0])
    limits.admit("a", 10, rpm=None, tpm=60)
    limits.correct("a", 80, tpm=60)  # 50 - 80 = -30
    with pytest.raises(RateError) as refused:
        limits.admit("a", 1, rpm=None, tpm=60)
    assert refused.value.retry_after_s == 31.0
    limits.correct("a", -1000, tpm=60)
    limits.admit("a", 60, rpm=None, tpm=60)


def us(*moment):
    return int(datetime(*moment, tzinfo=UTC).timestamp()) * 10**6


@pytest.mark.parametrize(
    ("period", "now", "start", "end"),
    [
        ("total", us(2026, 5, 5), 0, None),
        ("hour", us(2026, 5, 5, 7, 59, 59), us(2026, 5, 5, 7), us(2026, 5, 5, 8)),
        ("day", us(2026, 12, 31, 23), us(2026, 12, 31), us(2027, 1, 1)),
        ("week", us(2026, 11, 25, 3), us(2026, 11, 23), us(2026, 11, 30)),  # a Wednesday
        ("week", us(2026, 11, 23), us(2026, 11, 23), us(2026, 11, 30)),  # Monday, 0:00
        ("week", us(2026, 11, 23) - 1, us(2026, 11, 16), us(2026, 11, 23)),
        ("month", us(2026, 12, 31, 23), us(2026, 12, 1), us(2027, 1, 1)),
        ("month", us(2028, 2, 29), us(2028, 2, 1), us(2028, 3, 1)),
        ("month", us(2026, 3, 1), us(2026, 3, 1), us(2026, 4, 1)),
        ("month", us(2026, 3, 1) - 1, us(2026, 2, 1), us(2026, 3, 1)),
    ],
)
def test_windows_by_hand(period, now, start, end):
    assert window(period, now) == (start, end)


@given(st.sampled_from(["hour", "day", "week", "month"]), st.integers(0, 4 * 10**15))
def test_windows_tile_time(period, now):
    start, end = window(period, now)
    assert start <= now < end
    assert window(period, start) == (start, end) == window(period, end - 1)
    assert window(period, end)[0] == end


def test_words_of_periods():
    assert check_period("week") == "week"
    assert iso(us(2026, 1, 2, 3, 4, 5) + 6) == "2026-01-02T03:04:05Z"
    with pytest.raises(InputError, match="use one of total, hour"):
        check_period("weekly")
