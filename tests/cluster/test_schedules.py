"""Tables of schedules: by hand, what every one of them keeps, and what `check` finds."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.cluster import SCHEDULES, Slot, schedule
from anabranch.errors import InputError


def test_gpipe_by_hand():
    table = schedule("gpipe", stages=3, micro_batches=2)
    assert str(table).splitlines() == [
        "0: F0 F1             B1 B0",
        "1:    F0 F1       B1 B0",
        "2:       F0 F1 B1 B0",
    ]
    assert table.num_clocks == 2 * (2 + 3 - 1)
    assert table.most_in_flight == 2
    # (K - 1) / (M + K - 1), section 2.3 of the paper.
    assert table.idle == pytest.approx(2 / 4)


def test_1f1b_by_hand():
    table = schedule("1f1b", stages=2, micro_batches=3)
    assert str(table).splitlines() == ["0: F0 F1    B0 F2 B1    B2", "1:    F0 B0 F1 B1 F2 B2"]
    assert table.most_in_flight == 2


def test_zero_bubble_has_the_bubble_of_the_paper():
    # ZB-H1: (K - 1)(F + B - W) where 1F1B has (K - 1)(F + B + W); all are 1 here.
    for stages in (1, 2, 3, 4, 6):
        for micro_batches in (2 * stages, 3 * stages + 1):
            table = schedule("zero-bubble", stages=stages, micro_batches=micro_batches)
            assert table.num_clocks == 3 * micro_batches + stages - 1
            assert table.most_in_flight <= stages


@given(st.sampled_from(SCHEDULES), st.integers(1, 6), st.integers(1, 13), st.integers(2, 3))
def test_every_table_is_whole_and_in_order(name, stages, micro_batches, visits):
    visits = visits if name == "interleaved" else 1
    table = schedule(name, stages=stages, micro_batches=micro_batches, visits=visits)
    table.check()
    kinds = 3 if name == "zero-bubble" else 2
    assert len(table.slots) == kinds * stages * micro_batches * visits
    assert 0 <= table.idle < 1
    if name == "gpipe":
        assert table.num_clocks == 2 * (micro_batches + stages - 1)
        assert table.idle == pytest.approx((stages - 1) / (micro_batches + stages - 1))
    if name == "1f1b":
        assert table.most_in_flight == min(stages, micro_batches)
    assert table.to_dict()["clocks"] == table.num_clocks


def test_interleaving_halves_the_bubble():
    plain = schedule("1f1b", stages=4, micro_batches=8)
    twice = schedule("interleaved", stages=4, micro_batches=8, visits=2)
    # In clocks of half a stage's work.
    assert twice.num_clocks < 2 * plain.num_clocks
    assert twice.idle < plain.idle


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda slots: slots[1:], "forward of micro-batch 0 at stage 0 is not in the table"),
        (lambda slots: (*slots, slots[0]), "is in the table 2 times"),
        (lambda slots: (*slots, Slot(99, 5, 0, "forward")), "there is no such work"),
        (lambda slots: (*slots[:-1], replace(slots[-1], clock=0)), "stage 0 does 2 things at clock 0"),
        (lambda slots: tuple(replace(slot, clock=9 - slot.clock) for slot in slots), "which it needs, at"),
    ],
)
def test_a_wrong_table_is_told_from_a_right_one(change, message):
    table = schedule("gpipe", stages=2, micro_batches=2)
    with pytest.raises(InputError, match=message):
        replace(table, slots=change(table.slots)).check()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pipedream", {}, "schedule is 'pipedream'; use one of gpipe, 1f1b"),
        ("gpipe", {"stages": 0}, "stages is 0"),
        ("gpipe", {"micro_batches": 1.5}, "micro_batches is 1.5"),
        ("gpipe", {"visits": 2}, "gpipe makes 1 visit"),
        ("interleaved", {"visits": 1}, "at least 2 visits"),
        ("gpipe", {"stages": 2000, "micro_batches": 2000}, "too large"),
    ],
)
def test_what_is_refused(name, options, message):
    with pytest.raises(InputError, match=message):
        schedule(name, **{"stages": 2, "micro_batches": 2, **options})
