import contextlib
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from admission_gate import gate, refused, serve
from anabranch.errors import InputError
from anabranch.serving.core.admission import Held
from anabranch.serving.core.overload import REASONS, OverloadError
from anabranch.serving.core.pace import DrainRate, Pace


def test_counts_follow_tickets_and_refusals_are_counted_from_zero():
    admission, _ = gate(max_in_flight=10)
    assert admission.rejections == dict.fromkeys(REASONS, 0)
    first, second = admission.admit(5, "a"), admission.admit(7, "b")
    assert (admission.in_flight, admission.queued, admission.queued_tokens) == (2, 2, 12)
    first.started()
    first.started()
    assert (admission.in_flight, admission.queued, admission.queued_tokens) == (2, 1, 7)
    first.close()
    first.close()
    with second:
        pass
    assert (admission.in_flight, admission.queued, admission.queued_tokens) == (0, 0, 0)
    assert not admission._of_key


def test_each_limit_refuses_the_first_that_is_over_it_and_takes_the_next_when_there_is_room():
    admission, _ = gate(max_in_flight=2)
    one = admission.admit(1)
    admission.admit(1).started()
    assert refused(admission, "in_flight", 1).status == 429
    one.close()
    admission.admit(1)

    admission, _ = gate(max_queued=2)
    one, _two = admission.admit(1), admission.admit(1)
    refused(admission, "queued", 1)
    one.started()
    admission.admit(1)

    admission, _ = gate(max_queued_tokens=10)
    one = admission.admit(4)
    admission.admit(6)
    refused(admission, "queued_tokens", 1)
    one.started()
    refused(admission, "queued_tokens", 5)
    admission.admit(4)

    admission, _ = gate(max_per_key=1)
    one = admission.admit(1, "a")
    admission.admit(1, "b")
    refused(admission, "key_concurrency", 1, "a")
    one.started()
    refused(admission, "key_concurrency", 1, "a")
    one.close()
    admission.admit(1, "a")


def test_a_request_larger_than_the_limit_of_tokens_is_taken_when_nothing_waits():
    admission, _ = gate(max_queued_tokens=10)
    admission.admit(100)
    refused(admission, "queued_tokens", 1)


def test_a_refused_request_leaves_no_trace():
    admission, _ = gate(max_queued=1)
    admission.admit(3, "a")
    for _ in range(5):
        refused(admission, "queued", 4, "b")
    assert (admission.in_flight, admission.queued, admission.queued_tokens) == (1, 1, 3)
    assert admission._of_key == {"a": Held(1, 1, 3, 3)}


def test_the_status_of_a_refusal_can_be_chosen():
    admission, _ = gate(max_in_flight=1, status=503)
    admission.admit(1)
    error = refused(admission, "in_flight", 1)
    assert error.status == 503
    assert error.retry_after_s == 1
    assert "try again in 1 s" in str(error)


def test_when_to_come_back_follows_from_how_fast_the_queue_drains():
    admission, clock = gate(max_queued=3, max_queued_tokens=1000)
    serve(admission, clock, seconds=4.0, tokens=10, count=3)  # 0.25 requests and 2.5 tokens a second
    waiting = [admission.admit(200) for _ in range(3)]
    assert refused(admission, "queued", 1).retry_after_s == 4  # one must start
    waiting.pop().started()
    clock.now += 1e-9
    rate = admission._token_rate.per_s(clock.now)
    # 400 tokens wait; 700 more are 100 over the limit, and the first of those that wait is through as a whole, with its 200.
    assert refused(admission, "queued_tokens", 700).retry_after_s == min(120, math.ceil(200 / rate))


def test_nobody_is_told_to_wait_more_than_two_minutes():
    admission, clock = gate(max_queued=1)
    serve(admission, clock, seconds=1000.0, count=2)
    admission.admit(1)
    assert refused(admission, "queued", 1).retry_after_s == 120


def test_a_queue_that_stands_still_makes_the_wait_longer():
    admission, clock = gate(max_queued=1)
    serve(admission, clock, seconds=1.0, count=20)
    admission.admit(1)
    waits = []
    for _ in range(5):
        waits.append(refused(admission, "queued", 1).retry_after_s)
        clock.now += 60
    assert waits[0] == 1
    assert waits == sorted(waits)
    assert waits[-1] == 120


def test_a_key_waits_for_its_share_of_what_ends():
    admission, clock = gate(max_per_key=2)
    serve(admission, clock, seconds=1.0, count=30)  # of all requests one ends a second
    for key in ("a", "a", "b", "b", "c", "c", "d", "d"):
        admission.admit(1, key).started()
    assert refused(admission, "key_concurrency", 1, "a").retry_after_s == 4  # a quarter of what is in flight is its own


def test_a_deadline_that_cannot_be_met_is_refused_early():
    admission, clock = gate(max_in_flight=100)
    assert admission.expected_first_token_s(10**6) is None
    admission.admit(10**6, deadline_s=0.001).close()  # nothing is known yet
    for _ in range(20):  # 0.2 s a request and 0.01 s a token
        serve(admission, clock, seconds=0.7, tokens=50, count=1)
        serve(admission, clock, seconds=1.7, tokens=150, count=1)
    assert admission.expected_first_token_s(100) == pytest.approx(1.2)
    admission.admit(900)
    assert admission.expected_first_token_s(100) == pytest.approx(10.4)
    error = refused(admission, "deadline", 100, deadline_s=6.5)
    assert error.retry_after_s == 4  # in 3.9 s the queue is short enough
    assert "the first token is expected in 10.4 s" in str(error)
    admission.admit(100, deadline_s=10.5)


def test_a_long_prompt_is_not_refused_for_what_short_ones_took():
    admission, clock = gate(max_in_flight=100)
    serve(admission, clock, seconds=0.1, tokens=10, count=50)
    assert admission.expected_first_token_s(10_000) == pytest.approx(0.1)
    for _ in range(9):
        admission.admit(10)
    assert admission.expected_first_token_s(10) == pytest.approx(1.0)


def test_what_is_expected_grows_while_nothing_starts():
    admission, clock = gate(max_in_flight=100)
    serve(admission, clock, seconds=0.5, count=50)
    admission.admit(10)
    clock.now += 0.5
    assert admission.expected_first_token_s(10) == pytest.approx(1.0)
    clock.now += 30
    assert admission.expected_first_token_s(10) > 4.0
    clock.now += 1e6
    assert admission.expected_first_token_s(10) > 1e6


@pytest.mark.parametrize(
    ("per_request", "per_token", "as_request", "as_token"),
    [
        (0.3, 0.02, 0.3, 0.02),
        (0.0, 0.02, 0.0, 0.02),
        (0.3, 0.0, 0.3, 0.0),
        (3.0, -0.01, None, 0.0),
        (-0.1, 0.02, 0.0, None),
    ],
)
def test_pace_tells_requests_from_tokens_and_neither_is_negative(per_request, per_token, as_request, as_token):
    pace, rng = Pace(30.0), random.Random(0)
    assert pace.expected_s(1, 1) is None
    for _ in range(300):
        tokens = rng.randint(10, 100)
        pace.took(tokens, per_request + per_token * tokens)
    request = pace.expected_s(1, 0)
    token = pace.expected_s(1, 1) - request
    assert as_request is None or request == pytest.approx(as_request, abs=1e-9)
    assert as_token is None or token == pytest.approx(as_token, abs=1e-9)
    assert request >= 0
    assert token >= -1e-12


def test_those_who_go_away_do_not_count_as_served():
    admission, clock = gate(max_in_flight=100)
    serve(admission, clock, seconds=1.0, tokens=10, count=50)
    before = admission.expected_first_token_s(1000)
    for _ in range(50):
        admission.admit(10_000).close()
    assert admission.expected_first_token_s(1000) == pytest.approx(before)


@pytest.mark.parametrize("waited_s", [60, 150, 240, 86_400])
def test_what_one_that_went_away_has_waited_for_is_forgotten(waited_s):
    admission, clock = gate(max_in_flight=100)
    serve(admission, clock, seconds=0.1, tokens=20, count=20)
    admission.admit(20, "running").started()
    before = admission.expected_first_token_s(20)
    alone = admission.admit(20, "a")
    clock.now += waited_s
    alone.close()
    assert admission.expected_first_token_s(20) == pytest.approx(before)
    # With another beside it, that one's wait counts.
    gone = admission.admit(20, "a")
    clock.now += waited_s
    stays = admission.admit(20, "b")
    clock.now += 0.05
    gone.close()
    assert admission.expected_first_token_s(20) == pytest.approx(2 * before)
    clock.now += 30
    assert admission.expected_first_token_s(20) > 4.0
    stays.close()


def test_a_request_of_several_sequences_is_let_in_to_an_idle_engine_whole_and_refused_whole():
    admission, clock = gate(max_in_flight=4)
    serve(admission, clock, seconds=300.0, count=3)
    tickets = admission.admit_all([10] * 4, "a", 600.0)
    assert admission.in_flight == 4
    for ticket in tickets:
        ticket.close()
    with admission.admit(10), pytest.raises(OverloadError):
        admission.admit_all([10] * 4, "a", 1e9)
    assert (admission.in_flight, admission.queued) == (0, 0)


def greedy(admission, key, tokens=1, is_started=False):
    """As many as are let in of a key that asks without end."""
    for taken in range(1000):
        try:
            ticket = admission.admit(tokens, key)
        except OverloadError:
            return taken
        if is_started:
            ticket.started()
    raise AssertionError("nothing is refused")


@pytest.mark.parametrize("limit", ["max_queued", "max_in_flight"])
def test_each_of_several_keys_leaves_the_others_as_much_as_it_has(limit):
    admission, _ = gate(is_shared=True, **{limit: 128})
    assert [greedy(admission, key, is_started=limit == "max_in_flight") for key in "abc"] == [64, 32, 16]
    assert refused(admission, "key_share", 1, "a").retry_after_s == 1
    admission.admit(1, "new")


def test_prompt_tokens_are_shared_too_and_a_long_prompt_of_a_key_without_any_is_taken():
    admission, _ = gate(is_shared=True, max_queued_tokens=1000)
    assert greedy(admission, "a", tokens=100) == 5
    admission.admit(450, "b")
    refused(admission, "key_share", 10, "b")
    admission.admit(50, "c")


def test_a_key_that_has_more_than_its_share_waits_until_it_has_less():
    admission, _ = gate(is_shared=True, max_queued=12)
    own = [admission.admit(1, "a") for _ in range(6)]
    assert greedy(admission, "b") == 3
    # A share of half of 9 is 4.
    for ticket in own[:2]:
        ticket.started()
        refused(admission, "key_share", 1, "a")
    own[2].started()
    admission.admit(1, "a")
    refused(admission, "key_share", 1, "a")


def test_a_key_alone_or_with_a_share_of_all_may_take_everything():
    assert greedy(gate(max_queued=128)[0], "a") == 128
    assert greedy(gate(max_queued=128, is_shared=True, key_share=1.0)[0], "a") == 128
    # The only place there is can be had.
    assert greedy(gate(max_queued=1, is_shared=True)[0], "a") == 1


def test_the_queue_of_another_key_is_no_reason_to_refuse_a_deadline():
    admission, clock = gate(is_shared=True)
    serve(admission, clock, seconds=1.0, count=30)
    for _ in range(1000):
        admission.admit(10, "a")
    assert admission.expected_first_token_s(10, "b") == pytest.approx(2.0)
    admission.admit(10, "b", deadline_s=2.5)
    assert admission.expected_first_token_s(10, "b") == pytest.approx(4.0)
    assert admission.expected_first_token_s(10, "a") == pytest.approx(1002.0)
    refused(admission, "deadline", 10, "a", deadline_s=600.0)


@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.integers(1, 40), st.sampled_from(("admit", "start", "close")))),
    st.integers(16, 40),
)
@settings(max_examples=100, deadline=None)
def test_whatever_up_to_three_neighbours_do_another_key_is_let_in(steps, limit):
    admission, _ = gate(is_shared=True, max_in_flight=limit, max_queued=limit, max_queued_tokens=limit * 40)
    live = []
    for key, tokens, step in steps:
        if step == "admit" and key != "d":
            with contextlib.suppress(OverloadError):
                live.append(admission.admit(tokens, key))
        elif step == "start" and live:
            live[tokens % len(live)].started()
        elif step == "close" and live:
            live.pop(tokens % len(live)).close()
    for key in "abc":
        greedy(admission, key, tokens=40)
        greedy(admission, key, tokens=1, is_started=True)
    admission.admit(40, "d").close()


def test_the_only_prompt_of_a_key_however_long_counts_for_its_part():
    admission, _ = gate(is_shared=True, max_queued_tokens=1000)
    first = admission.admit(3_000_000, "a")
    refused(admission, "key_share", 1, "a")
    admission.admit(1, "b")
    admission.admit(4000, "c")
    admission.admit(1, "d")
    assert admission.queued_tokens == 3_004_002
    assert admission.counted_tokens == 500 + 1 + 249 + 1
    first.started()
    admission.admit(1, "a")
    # Among those who are one, it has the queue to itself.
    alone, _ = gate(max_queued_tokens=1000)
    alone.admit(3_000_000, "a")
    refused(alone, "queued_tokens", 1, "b")


@given(
    st.lists(st.tuples(st.integers(1, 10**7), st.integers(1, 4), st.sampled_from(("admit", "start", "close")))),
    st.integers(2, 40),
    st.sampled_from((0.25, 0.5, 0.9)),
)
@settings(max_examples=150, deadline=None)
def test_whatever_one_key_asks_for_a_small_request_of_another_is_let_in(steps, limit, share):
    limits = {"max_in_flight": limit, "max_queued": limit, "max_queued_tokens": limit * 100, "key_share": share}
    admission, _ = gate(is_shared=True, **limits)
    live = []
    for number, count, step in steps:
        if step == "admit":
            with contextlib.suppress(OverloadError, InputError):
                live += admission.admit_all([number] * count, "a")
        elif step == "start" and live:
            live[number % len(live)].started()
        elif live:
            live.pop(number % len(live)).close()
        before = admission.queued_tokens
        with admission.admit(10, "b"):
            assert admission.queued_tokens == before + 10
        assert admission.queued_tokens == before


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=10), st.integers(1, 2000))
@settings(max_examples=100, deadline=None)
def test_who_comes_back_when_told_is_let_in(waiting, tokens):
    """Where the queue drains as fast as it has, one token a second here."""
    admission, clock = gate(max_queued_tokens=2000, window_s=1e9)
    serve(admission, clock, seconds=100.0, tokens=100, count=3)
    tickets = []
    for number in waiting:
        with contextlib.suppress(OverloadError):
            tickets.append(admission.admit(number))
    if admission.has_room(tokens):
        return
    told_s = refused(admission, "queued_tokens", tokens).retry_after_s
    passed_s = 0
    for ticket in tickets:
        if admission.has_room(tokens):
            break
        passed_s += ticket.num_tokens
        ticket.started()
    assert told_s == min(max(passed_s, 1), 120)


def test_what_is_in_no_hurry_leaves_a_part_of_each_limit_and_counts_no_refusal():
    for limits, most in (({"max_in_flight": 8}, 4), ({"max_queued": 9}, 4), ({"max_queued_tokens": 100}, 5)):
        admission, _ = gate(**limits)
        for _ in range(most):
            assert admission.has_spare(10)
            admission.admit(10)
        assert not admission.has_spare(10)
        admission.admit(10)
        assert not any(admission.rejections.values())
    assert gate()[0].has_spare(10**9)
    admission, _ = gate(max_per_key=1)
    admission.admit(1, "a")
    assert not admission.has_spare(1, "a")
    assert admission.has_spare(1, "b")
    assert not any(admission.rejections.values())


STEPS = st.lists(
    st.tuples(
        st.sampled_from(("admit", "start", "close")), st.floats(0, 1e5), st.integers(0, 5000), st.sampled_from("ab")
    ),
    max_size=40,
)


@given(STEPS, st.floats(1e-3, 1e3), st.integers(0, 10**5), st.integers(1, 3))
@settings(max_examples=150, deadline=None)
def test_an_idle_server_admits_whatever_was_before(steps, deadline_s, tokens, count):
    admission, clock = gate(max_in_flight=8, max_queued=4, max_queued_tokens=9000, max_per_key=5)
    live = []
    for step, seconds, number, key in steps:
        clock.now += seconds
        if step == "admit":
            with contextlib.suppress(OverloadError):
                live.append(admission.admit(number, key, 600.0))
        elif live:
            ticket = live[number % len(live)]
            if step == "start":
                ticket.started()
            else:
                ticket.close()
                live.remove(ticket)
    for ticket in live:
        ticket.close()
    assert (admission.in_flight, admission.queued, admission.queued_tokens) == (0, 0, 0)
    assert not admission._line.waiting
    assert not any(line.waiting for line in admission._owed.values())
    admission.admit(tokens, "c", deadline_s).close()
    for ticket in admission.admit_all([10] * count, "c", deadline_s):
        ticket.close()


def test_a_slow_start_refuses_deadlines_no_longer_than_a_window():
    admission, clock = gate()
    ticket = admission.admit(10)
    clock.now += 40
    ticket.started()
    refused(admission, "deadline", 10, deadline_s=10.0)
    # It answers for hours.
    clock.now += 31
    admission.admit(10, deadline_s=10.0)


def test_the_drain_rate_is_that_of_busy_time():
    rate = DrainRate(10.0)
    assert rate.per_s(0.0) is None
    now = 0.0
    for _ in range(2000):
        rate.resume(now)
        now += 0.01
        rate.drained(3, now)
        rate.pause(now)
        now += 5.0  # idle: of no account
    assert rate.per_s(now) == pytest.approx(300, rel=0.001)


def test_the_drain_rate_follows_a_change_within_its_window():
    rate = DrainRate(10.0)
    rate.resume(0.0)
    for step in range(1, 10_001):
        rate.drained(1, step * 0.01)
    assert rate.per_s(100.0) == pytest.approx(100, rel=0.01)
    for step in range(1, 101):
        rate.drained(1, 100 + step * 0.1)
    # After one window the past has e^-1 of its weight.
    assert rate.per_s(110.0) == pytest.approx(10 + 90 * math.exp(-1), rel=0.02)


def test_any_order_of_events_keeps_the_books():
    for seed in range(50):
        rng = random.Random(seed)
        admission, clock = gate(max_in_flight=6, max_queued=4, max_queued_tokens=60, max_per_key=3)
        live, queued, waits = [], set(), []
        for _ in range(200):
            clock.now += rng.random()
            move = rng.random()
            if move < 0.5:
                try:
                    ticket = admission.admit(rng.randint(1, 30), rng.choice("abc"), rng.choice([None, 5.0]))
                except OverloadError as error:
                    waits.append(error.retry_after_s)
                else:
                    live.append(ticket)
                    queued.add(ticket)
            elif live:
                ticket = rng.choice(live)
                if move < 0.75:
                    ticket.started()
                else:
                    ticket.close()
                    live.remove(ticket)
                queued.discard(ticket)
            assert admission.in_flight == len(live) <= 6
            assert admission.queued == len(queued) <= 4
            assert admission.queued_tokens == sum(ticket.num_tokens for ticket in queued)
            assert all(sum(ticket.key == key for ticket in live) <= 3 for key in "abc")
        assert all(1 <= wait <= 120 for wait in waits)
