"""The simulator: events by hand, and schedules against the formulas of their papers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.cluster import Durations, schedule, simulate
from anabranch.cluster.events import Interval, Task, run_tasks
from anabranch.errors import InputError


def test_tasks_by_hand():
    done = run_tasks([Task("a", 2.0), Task("link", 0.5, (0,), 0.25), Task("b", 2.0, (1,)), Task("a", 1.0)])
    assert done == [Interval(0, 2), Interval(2.25, 2.75), Interval(2.75, 4.75), Interval(2, 3)]


def test_a_resource_in_order_waits_and_another_does_not():
    tasks = [Task("x", 3.0), Task("y", 1.0, (0,)), Task("y", 1.0)]
    assert run_tasks(tasks)[2] == Interval(0, 1)
    assert run_tasks(tasks, in_order=["y"])[2] == Interval(4, 5)


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([Task("a", -1.0)], "task 0 takes -1.0 s"),
        ([Task("a", float("nan"))], "give finite numbers"),
        ([Task("a", 1.0, (3,))], "tasks are 0 to 0"),
        ([Task("a", 1.0, (1,)), Task("b", 1.0, (0,))], "task 0 on 'a' never begins"),
    ],
)
def test_wrong_tasks_are_told(tasks, message):
    with pytest.raises(InputError, match=message):
        run_tasks(tasks)


@given(st.integers(1, 5), st.integers(1, 9), st.floats(0.1, 5), st.floats(0.1, 5))
def test_gpipe_takes_what_its_formula_says(stages, micro_batches, forward, backward):
    """(M + K - 1)(F + B), with the idle share (K - 1) / (M + K - 1)."""
    table = schedule("gpipe", stages=stages, micro_batches=micro_batches)
    found = simulate(table, Durations.even(stages, forward_s=forward, backward_s=backward))
    assert found.step_s == pytest.approx((micro_batches + stages - 1) * (forward + backward))
    assert found.idle == pytest.approx((stages - 1) / (micro_batches + stages - 1), abs=1e-9)


def test_recomputation_is_part_of_the_backward():
    table = schedule("gpipe", stages=1, micro_batches=4)
    taken = {
        mode: simulate(table, Durations.even(1, forward_s=1, recomputes=mode)).step_s
        for mode in ("never", "except_last", "always")
    }
    # 4 (1 + 2), and 3 or 4 forwards more.
    assert taken == {"never": 12, "except_last": 15, "always": 16}


def test_a_recomputation_does_not_wait_for_the_gradient():
    table = schedule("gpipe", stages=2, micro_batches=1)
    found = simulate(table, Durations.even(2, forward_s=1, recomputes="always"))
    # Forward 1 + 1; stage 1 again 1 and backward 2, stage 0 does its forward again meanwhile; backward 2.
    assert found.step_s == 7
    assert [(bar.slot.stage, bar.start_s) for bar in found.bars if bar.is_again] == [(1, 2), (0, 1)]
    assert {bar["kind"] for bar in found.to_dict()["bars"]} == {"forward", "backward", "again"}


def test_sends_take_time_and_overlap_with_work():
    table = schedule("gpipe", stages=2, micro_batches=2)
    free = simulate(table, Durations.even(2, forward_s=1))
    paid = simulate(table, Durations.even(2, forward_s=1, send_C=(0.5, 9.0), latency_s=0.1))
    # One send on the way forward and one on the way back stand alone; the others are hidden behind work.
    assert paid.step_s == pytest.approx(free.step_s + 2 * 0.6)
    assert len(paid.sends) == 4
    assert {send[:2] for send in paid.sends} == {(0, 1), (1, 0)}


def test_zero_bubble_beats_1f1b_and_that_gpipe_in_nothing_but_memory():
    even = {"forward_s": 1.0, "backward_s": 2.0}
    taken = {
        name: simulate(schedule(name, stages=4, micro_batches=8), Durations.even(4, **even)).step_s
        for name in ("gpipe", "1f1b", "zero-bubble")
    }
    assert taken["gpipe"] == taken["1f1b"] == 33
    # 8 x 3, and a bubble of (K - 1)(F + B - W) = 3 in place of 9.
    assert taken["zero-bubble"] == 27


@pytest.mark.parametrize(
    ("durations", "message"),
    [
        (Durations.even(3, forward_s=1), "forward_C has 3 durations, and the schedule has 2 chunks"),
        (Durations.even(2, forward_s=1, recomputes="often"), "recomputes is 'often'"),
        (Durations.even(2, forward_s=1, weight_C=(9, 9)), "weight_C of chunk 0 is 9, more than"),
    ],
)
def test_wrong_durations_are_told(durations, message):
    with pytest.raises(InputError, match=message):
        simulate(schedule("zero-bubble", stages=2, micro_batches=2), durations)
