"""Up to when a stream has been read: what a slow reader found at once says nothing of what was made since."""

from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway.dispatch.stream_lag import AHEAD_BYTES, CAUGHT_UP_S, MOMENT_S, Lag


class Clock:
    def __init__(self):
        self.now = 10.0

    def __call__(self):
        return self.now


def lag():
    clock = Clock()
    return clock, Lag(clock, clock.now)


def test_while_little_is_found_at_once_all_of_it_has_been_read():
    clock, one = lag()
    for at in (11.0, 19.0):
        clock.now = at
        one.took(AHEAD_BYTES, int(at), 5)
        assert (one.known_at, one.texts, one.text_bytes) == (at, int(at), 5)


def test_once_much_was_found_there_may_be_more_until_the_reader_has_waited():
    clock, one = lag()
    one.waited(CAUGHT_UP_S * 5)
    one.took(10, 1, 1)
    clock.now = 15.0
    one.took(AHEAD_BYTES + 1, 7, 7)
    one.took(0, 8, 8)
    one.waited(CAUGHT_UP_S * 0.75)
    one.took(100, 9, 9)
    assert (one.known_at, one.texts, one.text_bytes) == (10.0, 1, 1)
    # What was waited before much was found again counts for nothing.
    one.took(AHEAD_BYTES + 1, 10, 10)
    one.waited(CAUGHT_UP_S * 0.75)
    one.took(100, 11, 11)
    assert one.known_at == 10.0
    one.waited(CAUGHT_UP_S * 0.25)
    one.took(100, 12, 12)
    assert (one.known_at, one.texts, one.text_bytes) == (15.0, 12, 12)


def test_what_comes_within_a_moment_of_another_was_held_back_as_long():
    clock, one = lag()
    for at, before_at in ((11.0, 10.0), (11.0 + MOMENT_S, 10.0), (13.0, 11.0 + MOMENT_S), (13.09, 11.0 + MOMENT_S)):
        clock.now = at
        one.took(10, int(at * 100), 5)
        assert (one.known_at, one.before_at) == (at, before_at)
    # Bytes every few milliseconds: little more than a moment is behind the last.
    for step in range(500):
        clock.now = 14 + step * 0.005
        one.took(10, 2000 + step, 5)
    assert 0.0 < one.known_at - one.before_at <= MOMENT_S + 0.01


STEPS = st.lists(
    st.tuples(
        st.floats(0, 3), st.sampled_from([1, AHEAD_BYTES, AHEAD_BYTES + 1]), st.sampled_from(["", "text", "told"])
    ),
    max_size=20,
)


@given(STEPS)
def test_it_is_known_no_later_than_what_was_read_without_a_wait_behind_it(steps):
    clock, one = lag()
    behind_since, waited, texts, told, grew_at, is_new = None, 0.0, 0, 0, clock.now, False
    for seconds, size, grown in steps:
        clock.now += seconds
        one.waited(seconds)
        before = one.known_at
        texts, told, is_new = texts + (grown == "text"), told + (grown == "told"), is_new or grown != ""
        one.took(size, texts, texts, (told, False))
        waited = 0.0 if size > AHEAD_BYTES else waited + seconds
        if size > AHEAD_BYTES:
            behind_since = before if behind_since is None else behind_since
        elif waited >= CAUGHT_UP_S:
            behind_since = None
        if behind_since is None and is_new:
            grew_at, is_new = clock.now, False
        assert one.known_at == (grew_at if behind_since is None else behind_since)


def test_what_comes_beside_the_answer_tells_nothing_of_what_was_made():
    clock, one = lag()
    for at, texts, told, known_at in (
        (10.5, 0, (0, False), 10.0),
        (11.0, 0, (0, False), 10.0),
        (12.0, 2, (0, False), 12.0),
        (13.0, 2, (9, False), 13.0),
        (14.0, 2, (9, False), 13.0),
        (15.0, 2, (9, True), 15.0),
    ):
        clock.now = at
        one.took(10, texts, texts, told)
        assert (one.known_at, one.texts) == (known_at, texts)
    assert (one.first_at, one.ended_at) == (12.0, 15.0)


def test_what_came_last_may_be_as_late_as_the_first_text_and_held_back_beside_that():
    clock, one = lag()
    clock.now = 11.0
    # So many tokens are told, and none is there.
    one.took(10, 0, 0, (1, False))
    assert one.held_s == 2.0
    for at, held_s in ((14.0, 3.0 + 4.0), (14.5, 0.5 + 4.0), (16.5, 2.0 + 4.0)):
        clock.now = at
        one.took(10, int(at * 10), 5, (1, False))
        assert one.held_s == held_s


def test_the_end_is_read_when_it_is_there_though_more_may_lie_behind_it():
    clock, one = lag()
    clock.now = 20.0
    one.took(AHEAD_BYTES + 1, 7, 7, (0, True))
    clock.now = 30.0
    one.took(1, 7, 7, (9, True))
    assert (one.known_at, one.first_at, one.ended_at) == (10.0, 20.0, 20.0)
