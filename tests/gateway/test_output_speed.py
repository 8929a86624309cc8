"""How fast a deployment is at most, by what streams told: the fastest of a day, for each tier, and nothing below three of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway.dispatch.output_speed import HEADROOM, HOUR_S, HOURS, LESSONS, MOST_TIERS, Lesson, OutputSpeed


def learned(*lessons, tier="", now=0.0):
    speed = OutputSpeed()
    for lesson in lessons:
        speed.learn(tier, lesson, now)
    return speed


def test_it_is_that_of_the_fastest_once_there_are_three():
    lessons = [Lesson(10.0), Lesson(30.0), Lesson(20.0)]
    assert learned(*lessons[:2]).of("", 0.0) is None
    assert learned(*lessons).of("", 0.0) == HEADROOM * 30.0


def test_slow_ones_take_nothing_back_and_time_does():
    speed = learned(*[Lesson(30.0)] * LESSONS)
    for number in range(10_000):
        speed.learn("", Lesson(1.0), number / 10)
    assert speed.of("", HOURS * HOUR_S - 1) == HEADROOM * 30.0
    speed.learn("", Lesson(1.0), HOURS * HOUR_S)
    assert speed.of("", HOURS * HOUR_S) is None
    assert learned(*[Lesson(30.0)] * LESSONS).of("", HOURS * HOUR_S) is None


def test_those_that_may_be_too_high_count_while_there_are_not_three_others():
    high, exact = Lesson(500.0, is_exact=False), Lesson(30.0)
    assert learned(high, high, exact).of("", 0.0) == HEADROOM * 500.0
    assert learned(*[high] * 9, exact, exact, exact).of("", 0.0) == HEADROOM * 30.0


def test_what_it_was_at_least_is_no_lesson_and_raises_others():
    least = Lesson(None, least=80.0)
    assert learned(*[least] * 9).of("", 0.0) is None
    assert learned(least, *[Lesson(30.0)] * LESSONS).of("", 0.0) == HEADROOM * 80.0


@pytest.mark.parametrize("usual", ["", "auto", "default", "standard", "standard_only"])
def test_each_tier_for_itself(usual):
    speed = learned(*[Lesson(30.0)] * LESSONS, tier=usual)
    assert speed.of("", 0.0) == speed.of("default", 0.0) == HEADROOM * 30.0
    assert speed.of("flex", 0.0) is None


def test_names_that_senders_make_up_fill_nothing():
    speed = learned()
    for number in range(MOST_TIERS * 2):
        for _ in range(LESSONS):
            speed.learn(f"tier {number}", Lesson(5.0), 0.0)
    assert len(speed._hours) == MOST_TIERS
    assert speed.of(f"tier {MOST_TIERS}", 0.0) is None


LESSON = st.builds(Lesson, st.none() | st.floats(0.1, 1e6), st.booleans(), st.floats(0, 1e6))


@given(st.lists(st.tuples(st.floats(0, 5 * HOUR_S), LESSON), max_size=60))
def test_little_is_kept_and_it_is_never_below_what_three_others_told(steps):
    speed, now, told = OutputSpeed(), 0.0, []
    for seconds, lesson in steps:
        now += seconds
        speed.learn("", lesson, now)
        told.append((now, lesson))
        assert len(speed._hours.get("", ())) <= HOURS
        of_late = [one for at, one in told if int(at // HOUR_S) > int(now // HOUR_S) - HOURS and one.speed is not None]
        exact = [one.speed for one in of_late if one.is_exact]
        found = speed.of("", now)
        assert (found is None) == (len(of_late) < LESSONS)
        if found is not None:
            assert found >= HEADROOM * max(exact, default=0.0)
