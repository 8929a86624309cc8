import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway.dispatch.hedge import HedgeDelay
from anabranch.gateway.dispatch.retry import ACTION, DISPUTED, DOUBTED, IN_VAIN, KEPT, OUTCOME, RetryBudget, backoff
from anabranch.gateway.dispatch.window import SlidingSum
from anabranch.gateway.providers.provider import FailureKind, classify, retry_after


def test_every_kind_of_failure_has_its_action_and_says_something_to_the_breaker():
    kinds = set(FailureKind.__args__)
    assert set(ACTION) == kinds
    assert set(OUTCOME) == kinds
    assert {*DISPUTED, *DOUBTED, *IN_VAIN} <= kinds
    assert "request" not in DISPUTED
    assert all(OUTCOME[kind] == "ignored" for kind in DISPUTED)


@given(st.integers(0, 200), st.integers(0, 2**32))
def test_jitter_is_full_and_bounded(retry, seed):
    assert 0 <= backoff(retry, 0.05, 2.0, random.Random(seed)) <= min(2.0, 0.05 * 2**retry)


def test_jitter_is_even():
    rng = random.Random(0)
    waits = [backoff(1, 0.05, 2.0, rng) for _ in range(4000)]
    assert abs(sum(waits) / 4000 - 0.05) < 0.002
    assert max(waits) > 0.098
    assert min(waits) < 0.002


def test_extra_attempts_are_a_share_of_the_requests_in_the_window():
    budget = RetryBudget(0.2, 1, 10.0)
    for _ in range(20):
        budget.request(0.0)
    assert [budget.take(1.0) for _ in range(6)] == [True] * 4 + [False] * 2
    assert budget.take(20.0)  # the least of a quiet window
    assert not budget.take(20.0)


def test_what_is_held_is_not_given_to_others():
    budget = RetryBudget(0.0, 1, 10.0)
    assert budget.hold(0.0)
    assert not budget.take(0.0)
    assert budget.take(0.0, holds=True)
    assert not budget.hold(0.0)


def test_one_sender_does_not_use_up_what_others_need():
    budget = RetryBudget(0.2, 10, 10.0)
    for _ in range(100):
        budget.request(0.0, "flood")
    # Alone it may have all.
    assert sum(budget.take(0.0, sender="flood") for _ in range(50)) == 20
    budget.request(1.0, "other")
    assert [budget.take(1.0, sender="other") for _ in range(7)] == [True] * 5 + [False] * 2
    assert not budget.take(1.0, sender="flood")
    # A fifth of the 31 that it asked for.
    for _ in range(30):
        budget.request(2.0, "other")
    assert [budget.take(2.0, sender="other") for _ in range(3)] == [True, False, False]


def test_many_who_ask_once_share_what_there_is():
    budget = RetryBudget(0.2, 10, 10.0)
    for number in range(100):
        budget.request(0.0, f"u{number}")
    assert sum(budget.take(0.0, sender=f"u{number}") for number in range(100)) == 20
    budget = RetryBudget(0.2, 10, 10.0)
    for number in range(100):
        budget.request(0.0, f"u{number}")
    # One of them alone has a quarter.
    assert sum(budget.take(0.0, sender="u1") for _ in range(100)) == 5


def test_no_budget_is_none():
    budget = RetryBudget(0.0, 0, 10.0)
    for name in "ab" * 100:
        budget.request(0.0, name)
    assert not budget.take(0.0, sender="a")
    assert not budget.hold(0.0, sender="b")


STEPS = st.tuples(st.sampled_from(["ask", "take", "hold", "release", "spend"]), st.sampled_from("abc"), st.floats(0, 2))


@given(st.lists(STEPS, max_size=80), st.sampled_from([0.0, 0.2, 1.0]), st.integers(0, 6))
def test_extra_attempts_are_bounded_and_everybodys_right_holds(steps, share, least):
    budget, now = RetryBudget(share, least, 1000.0), 0.0
    asked, used, held = Counter(), Counter(), Counter()
    for step, name, wait in steps:
        now += wait
        if step == "ask":
            asked[name] += 1
            budget.request(now, name)
        elif step in ("take", "hold"):
            right = max(share * asked[name], least / max(1, len({*asked, name})))
            got = getattr(budget, step)(now, sender=name)
            if len(asked) > 1 and used[name] + held[name] + 1 <= right:
                assert got
            (used if step == "take" else held)[name] += got
        elif held[name]:
            held[name] -= 1
            if step == "spend":
                assert budget.take(now, True, name)
                used[name] += 1
            else:
                budget.release(name)
        assert budget.held == held.total()
        assert used.total() + held.total() <= max(least, share * asked.total()) + least


def test_senders_are_counted_apart_within_bounds():
    budget = RetryBudget(0.2, 10, 10.0)
    for number in range(3 * KEPT):
        budget.request(0.0, str(number))
    assert len(budget._senders) == KEPT


@given(st.lists(st.tuples(st.floats(0, 5), st.integers(1, 9)), max_size=60))
def test_a_sliding_sum_is_never_short_and_little_long(steps):
    window, seen, now = SlidingSum(10.0), [], 0.0
    for wait, amount in steps:
        now += wait
        window.add(now, amount)
        seen.append((now, amount))
        exact = sum(amount for time, amount in seen if time > now - 10.0)
        slack = sum(amount for time, amount in seen if time > now - 10.0 - 10.0 / 64)
        assert exact <= window.at(now) <= slack


def test_a_hedge_waits_for_the_95th_percentile():
    delay = HedgeDelay()
    for at in range(19):
        delay.observe(float(at))
    assert delay.delay_s is None
    delay.observe(19.0)
    assert delay.delay_s == 19.0
    for _ in range(400):
        delay.observe(1.0)
    assert delay.delay_s == 1.0


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (400, b'{"error":{"message":"no","code":"context_length_exceeded"}}', "context"),
        (413, b"", "context"),
        (400, b'{"error":{"message":"no","code":"content_filter"}}', "filter"),
        (400, b'{"error":{"message":"no","type":"billing_error"}}', "credit"),
        (400, b'{"error":{"message":"bad"}}', "request"),
        (401, b"", "auth"),
        (402, b"", "credit"),
        (403, b"", "forbidden"),
        (404, b"{}", "not_found"),
        (408, b"", "timeout"),
        (409, b"", "conflict"),
        (422, b"[]", "request"),
        (429, b"{}", "rate_limit"),
        (429, b'{"error":{"code":"insufficient_quota"}}', "credit"),
        (500, b"", "server"),
        (529, b"<html>", "server"),
        (302, b"", "garbage"),
    ],
)
def test_what_a_status_means(status, body, kind):
    assert classify(status, {}, body).kind == kind


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "2"}, 2.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after-ms": "1500"}, 1.5),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "Mon, 01 Jan 99999999999999999999 00:00:00 GMT"}, None),
        ({"retry-after": "Mon, 01 Jan 2024 00:00:00 +99999999999999"}, None),
        ({"retry-after": "Mon, 01 Jan 2024 99999999999999999999:00:00 GMT"}, None),
        ({"retry-after": "Mon, 01 Jan 0001 00:00:00 +2359"}, 0.0),
        ({"retry-after": "Fri, 31 Dec 9999 23:59:59 -2359"}, 300.0),
        ({"retry-after": "9" * 5000}, 300.0),
        ({"retry-after-ms": "1e999"}, 300.0),
        ({"retry-after": "1e9"}, 300.0),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
    ],
)
def test_retry_after_in_all_its_forms(headers, seconds):
    assert retry_after(headers) == seconds


DATE = st.tuples(
    st.sampled_from(["Mon, ", "", "Mon"]),
    st.integers() | st.integers(1, 31),
    st.sampled_from(["Jan", "Dec", "", "x"]),
    st.integers() | st.integers(0, 9999),
    st.integers() | st.integers(0, 23),
    st.sampled_from(["GMT", "", "Z", "+", "-"]),
    st.integers(),
).map(lambda parts: "{}{} {} {} {}:59:00 {}{}".format(*parts))


@given(st.text(max_size=20) | DATE | st.floats().map(str))
def test_whatever_an_upstream_says_of_its_return_is_a_time_or_nothing(said):
    seconds = retry_after({"retry-after": said})
    assert seconds is None or 0 <= seconds <= 300


def test_a_hedge_waits_as_the_operator_says():
    delay = HedgeDelay(quantile=0.5, min_s=0.2, samples=3)
    delay.observe(0.1)
    delay.observe(0.1)
    assert delay.delay_s is None
    delay.observe(0.1)
    assert delay.delay_s == 0.2
    slow = HedgeDelay(quantile=0.5, samples=4)
    for seconds in (4.0, 1.0, 3.0, 2.0):
        slow.observe(seconds)
    assert slow.delay_s == 3.0
