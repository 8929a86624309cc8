"""What one stream tells of how fast it was made, by when its text came."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway.dispatch.stream_pace import (
    MOMENT_S,
    MOST_GAPS,
    PAUSE_S,
    TELLING_GAPS,
    TELLING_S,
    WAITED_SHARE,
    Pace,
)


class Stream:
    """One whose upstream is waited for all the time, unless told otherwise."""

    def __init__(self, wait_s=0.5):
        self.now = 10.0
        self.pace = Pace(self.now)
        self.texts = self.size = self.beside = 0
        self.waited_s = 0.0
        self.came(wait_s)

    def came(self, after_s, tokens=1, *, token_bytes=5, waited=1.0, thoughts=0, is_behind=False):
        self.now += after_s
        self.waited_s += waited * after_s
        self.texts += tokens > 0
        self.size += tokens * token_bytes
        self.beside += thoughts
        self.pace.took(self.now, self.texts, self.size, self.beside, self.waited_s, is_behind)
        return self

    def lesson(self, told, thought=0, answers=1):
        return self.pace.lesson(self.now, told, thought, self.size, answers)


def steady(gaps=20, gap_s=0.1, tokens=10, wait_s=0.5, **how):
    stream = Stream(wait_s)
    for _ in range(gaps):
        stream.came(gap_s, tokens, **how)
    return stream


def test_what_came_between_moments_was_made_in_that_time():
    lesson = steady().lesson(201)
    assert (lesson.speed, lesson.is_exact) == (pytest.approx(100.0), True)
    assert lesson.least == pytest.approx(201 / 2.5)


def test_what_came_at_one_moment_came_at_one_moment():
    stream = Stream()
    for _ in range(20):
        stream.came(0.1, 4).came(MOMENT_S / 3, 3).came(MOMENT_S / 3, 3)
    assert stream.lesson(201).speed == pytest.approx(100 / (1 + 2 * MOMENT_S / 3 / 0.1), rel=0.05)


@pytest.mark.parametrize(
    "odd",
    [
        {"after_s": PAUSE_S * 1.1, "tokens": 40},
        {"after_s": 0.7, "tokens": 40},
        {"after_s": 0.1, "tokens": 300, "waited": WAITED_SHARE * 0.9},
        {"after_s": 0.1, "tokens": 300, "is_behind": True},
        {"after_s": 0.2, "tokens": 1, "thoughts": 1},
    ],
)
def test_what_may_have_been_made_at_another_time_tells_nothing(odd):
    stream = steady(15)
    stream.came(**odd)
    if odd.get("is_behind"):
        # Nor does what lay behind that.
        stream.came(0.1, 300)
    for _ in range(15):
        stream.came(0.1, 10)
    lesson = stream.lesson(stream.size // 5)
    assert (lesson.speed, lesson.is_exact) == (pytest.approx(100.0), True)


@pytest.mark.parametrize(
    "stream",
    [
        steady(TELLING_GAPS - 1, 0.5),
        steady(9, TELLING_S / 10),
        steady(30, 0.1, 10, waited=0.5),
        steady(20, PAUSE_S * 1.2),
        steady(15, 0.1, 1),
        # More than a third of the time were pauses.
        steady(12).came(PAUSE_S * 2),
    ],
    ids=["few gaps", "short", "a slow reader", "pauses", "few tokens", "a long pause"],
)
def test_too_little_tells_nothing(stream):
    assert stream.lesson(stream.size // 5).speed is None


def test_several_answers_tell_how_fast_one_was_at_least():
    lesson = steady().lesson(8 * 200, answers=8)
    assert (lesson.speed, lesson.least) == (None, pytest.approx(200 / 2.5))
    assert steady(3).lesson(8 * 3, answers=8).least == 0.0


def test_thoughts_that_were_told_are_no_part_of_what_came():
    assert steady().lesson(5201, thought=5000).speed == pytest.approx(100.0)


def test_what_was_told_and_cannot_have_been_shown_may_be_too_high():
    lesson = steady(wait_s=30.0).lesson(5201)
    assert not lesson.is_exact
    # No more than its bytes, whatever was told.
    assert lesson.speed == pytest.approx(500.0)
    assert lesson.least == pytest.approx(5201 / 32)
    # All of it in so short a time was made as fast as that.
    assert steady().lesson(5201).is_exact
    assert steady(wait_s=30.0).lesson(301).speed == pytest.approx(150.0, rel=0.05)


def test_an_upstream_that_never_tells_is_as_fast_as_its_bytes():
    lesson = steady().lesson(None)
    assert (lesson.speed, lesson.is_exact, lesson.least) == (pytest.approx(500.0), False, 0.0)
    stream = steady()
    assert stream.pace.lesson(stream.now, None, 0, stream.size, 1, 4.0).speed == pytest.approx(125.0)
    assert steady(3).lesson(None).speed is None


STEPS = st.lists(
    st.tuples(st.floats(0, 2), st.integers(0, 50), st.booleans(), st.integers(0, 1), st.booleans()), max_size=200
)


@given(STEPS)
def test_what_it_keeps_is_bounded_and_a_lesson_is_no_faster_than_its_bytes(steps):
    stream = Stream()
    for after_s, tokens, waited, thoughts, is_behind in steps:
        stream.came(after_s, tokens, waited=float(waited), thoughts=thoughts, is_behind=is_behind)
    pace = stream.pace
    assert len(pace._gap_s) == len(pace._gap_texts) == len(pace._gap_bytes) <= MOST_GAPS
    lesson = stream.lesson(stream.size)
    if lesson.speed is not None:
        assert 0 < lesson.speed <= stream.size / TELLING_S * 1.001
    assert lesson.least <= stream.size / TELLING_S
