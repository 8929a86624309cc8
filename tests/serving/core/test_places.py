"""Who runs, who waits and who is paused, by hand: seats, blocks, queued tokens and order after each move."""

import pytest

from anabranch.serving.core.places import Places
from anabranch.serving.core.request import Request, Sampling
from anabranch.serving.core.state import RequestState
from anabranch.serving.core.tables import BlockTables


class Hand:
    """Places with two seats and eight blocks of four tokens, of which requests take some."""

    def __init__(self):
        self.tables = BlockTables(8, 4, has_prefixes=False)
        self.under_way = {}
        self.places = Places(self.tables, self.under_way, most_running=2, quantum=100, min_run=1)
        self.serial = 0

    def come(self, id, length=5, key="", priority=0):
        request = Request(
            id=id, prompt=tuple(range(length)), sampling=Sampling(max_tokens=3), key=key, priority=priority
        )
        state = RequestState(request, serial=self.serial, now=0.0, stop_tokens=frozenset(), max_positions=100)
        self.serial += 1
        self.places.come(state)
        return state

    def run(self, state):
        self.places.waiting.take(state)
        self.tables.begin(state, [[]])
        assert self.tables.grow(state, len(state.tokens))
        self.places.run(state)

    @property
    def waiting(self):
        return [state.request.id for state in self.places.waiting]

    @property
    def running(self):
        return [state.request.id for state in self.places.running]


def test_a_request_waits_runs_and_is_gone():
    hand = Hand()
    state = hand.come("a")
    assert (hand.waiting, hand.running, hand.places.queued_tokens) == (["a"], [], 5)
    hand.run(state)
    assert (hand.waiting, hand.running, hand.places.queued_tokens) == ([], ["a"], 0)
    assert hand.tables.pool.num_free == 6
    hand.places.go(state)
    assert (hand.waiting, hand.running, hand.tables.pool.num_free) == ([], [], 8)
    assert not hand.places.seats._keys


def test_those_that_run_are_in_order_of_rank_and_no_more_than_there_are_seats():
    hand = Hand()
    first, second = hand.come("a"), hand.come("b", priority=-1)
    hand.run(first)
    assert not hand.places.is_full
    hand.run(second)
    assert hand.running == ["b", "a"]
    assert hand.places.is_full


def test_who_was_sent_back_goes_before_those_that_came_after_it():
    hand = Hand()
    state = hand.come("a")
    hand.run(state)
    hand.come("b")
    hand.places.send_back(state)
    assert (hand.running, hand.places.queued_tokens, hand.places.preemptions) == ([], 10, 1)
    assert hand.places.waiting.peek() is state
    assert (state.blocks, state.epoch, hand.tables.pool.num_free) == ([], 1, 8)


def test_who_made_way_waits_as_one_that_comes_anew_with_what_it_has_left():
    hand = Hand()
    state = hand.come("a", key="x")
    hand.run(state)
    state.tokens.append(7)
    hand.come("b", key="x")
    hand.places.make_way(state)
    # Of three new tokens one is there.
    assert (state.cost, hand.places.queued_tokens, hand.places.preemptions) == (2, 10, 1)
    # Before those of its own key that came after it, and with its turn charged for what is left alone.
    assert hand.places.waiting.peek() is state
    assert not hand.places.seats.has_seat("x")


@pytest.mark.parametrize("is_known", [False, True])
def test_a_pause_of_one_that_waits_takes_it_out_and_its_end_puts_it_back(is_known):
    hand = Hand()
    other, state = hand.come("b"), hand.come("a")
    state.is_known = is_known
    hand.places.pause(state)
    assert (hand.waiting, hand.places.queued_tokens) == (["b"], 5)
    hand.places.resume(state)
    assert (len(hand.places.waiting), hand.places.queued_tokens) == (2, 10)
    # To the front only if it ran before.
    assert hand.places.waiting.peek() is (state if is_known else other)


def test_a_paused_request_gives_its_place_up_only_where_somebody_waits():
    hand = Hand()
    state = hand.come("a")
    hand.run(state)
    hand.places.pause(state)
    assert hand.places.set_aside() == []
    assert hand.running == ["a"]
    hand.come("b")
    assert hand.places.set_aside() == []
    # It neither runs nor waits.
    assert (hand.running, hand.waiting, hand.places.queued_tokens) == ([], ["b"], 5)
    hand.places.go(state)
    assert (hand.places.paused, hand.waiting) == ({}, ["b"])


def test_blocks_of_a_step_under_way_are_free_when_it_has_run():
    hand = Hand()
    state = hand.come("a")
    hand.run(state)
    state.last_step = 4
    hand.under_way[4] = []
    hand.places.go(state)
    assert hand.tables.pool.num_free == 6
    hand.tables.ran(4)
    assert hand.tables.pool.num_free == 8
