"""Who holds up the others: by hand, and by a naive search over random waits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.cluster.elastic.waiting import Pulse, Standing, Stuck, Watch, held_up

WORKS, WORKS_LONG = Standing(), Standing(is_long=True)


def waits(*ranks, is_long=True):
    return Standing({"ranks": list(ranks)}, is_long)


def nobody(of):
    return ()


def test_the_one_at_the_end_of_a_chain_of_waits_and_not_a_neighbour():
    # 0 waits for 1, which waits for 2, which works on its own.
    standing = {0: waits(1), 1: waits(2, is_long=False), 2: WORKS_LONG, 3: WORKS}
    assert held_up(standing, {0, 1, 2, 3}, nobody) == Stuck(2, by=0)
    # Not while its work is young: it has only just got what it waited for.
    assert held_up({**standing, 2: WORKS}, {0, 1, 2, 3}, nobody) is None
    # Nor while nobody waits long, nor for the sake of one who does not count.
    assert held_up({**standing, 0: waits(1, is_long=False)}, {0, 1, 2, 3}, nobody) is None
    assert held_up(standing, {1, 2, 3}, nobody) is None


def test_a_wait_for_a_word_is_for_those_who_have_not_told():
    standing = {0: Standing({"what": "commit"}, True), 1: Standing({"what": "commit"}), 2: WORKS_LONG}
    assert held_up(standing, {0, 1, 2}, lambda of: [2] if of == {"what": "commit"} else []) == Stuck(2, by=0)


def test_ranks_that_wait_for_each_other_are_none_of_them_stuck():
    standing = {0: waits(1), 1: Standing({"round": "weights"}), 2: WORKS_LONG}
    assert held_up(standing, {0, 1, 2}, lambda of: [0]) == Stuck(None, by=0)


def test_a_wait_that_may_last_holds_up_nobody_and_accuses_nobody():
    assert held_up({0: Standing({}, True), 1: WORKS_LONG}, {0, 1}, nobody) is None


@pytest.mark.parametrize("wrong", [7, [1], {"ranks": 3}, {"ranks": ["a"]}, {"what": 3}, {"whom": "x"}])
def test_a_beat_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError, match="a wait for"):
        Standing.heard(wrong, False)


ONE = st.one_of(
    st.builds(Standing, st.none(), st.booleans()),
    st.builds(
        Standing, st.fixed_dictionaries({"ranks": st.lists(st.integers(0, 5), min_size=1, max_size=3)}), st.booleans()
    ),
)


@given(st.dictionaries(st.integers(0, 5), ONE, max_size=6), st.sets(st.integers(0, 5)))
def test_as_a_naive_search_says(standing, count):
    """Reached from a long wait by waits alone; who works there, and long."""
    found = held_up(standing, count, nobody)
    expected = []
    for waiter in sorted(count & standing.keys()):
        if standing[waiter].waits is None or not standing[waiter].is_long:
            continue
        reached = {waiter}
        for _ in standing:
            for rank in list(reached):
                reached |= set((standing[rank].waits or {}).get("ranks", ())) & standing.keys()
        works = sorted(rank for rank in reached if standing[rank].waits is None)
        if not works or any(standing[rank].is_long for rank in works):
            expected.append(Stuck(next((rank for rank in works if standing[rank].is_long), None), waiter))
    assert found == (expected[0] if expected else None)
    if found is not None and found.rank is not None:
        assert standing[found.rank] == WORKS_LONG


# What is seen over some time


def test_what_one_beat_tells_is_waited_for():
    watch, found = Watch(), Stuck(2, by=0)
    assert watch.sure(found, 0.0) is None
    assert watch.sure(found, 1.0) is None
    assert watch.sure(found, 1.6) == found
    # Somebody else, or nobody in between: from the beginning.
    assert watch.sure(Stuck(1, by=0), 1.7) is None
    assert watch.sure(found, 3.0) is None
    assert watch.sure(None, 4.0) is None
    assert watch.sure(found, 9.0) is None
    watch.has_epoch()
    assert watch.sure(found, 11.0) is None


def test_a_link_that_breaks_once_in_a_while_accuses_nobody():
    """Both ends tell of each break, and training may last for weeks."""
    watch = Watch()
    for now in range(100):
        assert not watch.lost_link(3, 1, float(now))
        assert not watch.lost_link(1, 3, float(now))
        assert watch.links(now + 0.1) == []
        assert watch.links(now + 0.6) == [(1, 3)]
        watch.has_epoch()
        watch.has_stepped((1, 3))


def test_a_link_that_is_not_opened_again_is_given_up():
    watch, found = Watch(), []
    for now in range(4):
        found.append(watch.lost_link(1, 3, float(now)))
        watch.has_epoch()
    # Neither has lost more than the other: who is told of is blamed first.
    assert found == [[], [], [], [3, 1]]


def test_a_link_is_blamed_on_the_one_that_has_lost_more():
    """One with a wrong route accuses all the others, and it is the one."""
    watch = Watch()
    for now in range(3):
        for other in (1, 2):
            assert watch.lost_link(3, other, float(now)) == []
        watch.has_epoch()
    assert watch.lost_link(3, 1, 3.0) == [3, 1]
    assert watch.lost_link(2, 3, 3.0) == [3, 2]
    # What a rank that is gone has lost is nobody's.
    watch.forget(3)
    assert watch.lost_link(2, 1, 4.0) == []


def test_who_has_no_part_in_steps_yet_is_blamed_first_and_what_others_do_is_no_proof_of_it():
    watch = Watch(patience_s=60.0)
    for now in range(4):
        found = watch.lost_link(0, 5, float(now), apart=[5])
        watch.has_epoch()
        watch.has_stepped((0, 1, 2))
    assert found == [5, 0]


def test_between_two_that_make_steps_a_link_may_be_lost_for_as_long_as_silence_may_last():
    watch = Watch(patience_s=10.0)
    for now in range(10):
        assert watch.lost_link(1, 3, float(now)) == []
        watch.has_epoch()
    watch.has_stood_still(5.0)
    assert watch.lost_link(1, 3, 12.0) == []
    watch.has_epoch()
    assert watch.lost_link(1, 3, 15.0) == [3, 1]


def test_while_a_process_stands_still_time_passes_for_nobody():
    pulse = Pulse(0.0)
    assert [pulse.late_s(now) for now in (0.5, 0.9, 5.4, 5.9)] == [0, 0, 4.0, 0]
    watch, found = Watch(), Stuck(2, by=0)
    watch.sure(found, 0.0)
    watch.has_stood_still(4.0)
    assert watch.sure(found, 5.0) is None
    assert watch.sure(found, 5.6) == found


def test_ranks_that_wait_for_each_other_again_and_again_are_given_up():
    watch = Watch()
    assert [watch.knotted() for _ in range(4)] == [False, False, False, True]
    watch.has_stepped((0, 1))
    assert not watch.knotted()
