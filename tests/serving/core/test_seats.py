"""Who gets a place in the steps, and who makes room for it."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.serving.core.batch import Sampled
from anabranch.serving.core.request import Finish, Request, Sampling
from anabranch.serving.core.scheduler import SchedulerConfig
from anabranch.serving.core.seats import Seats
from anabranch.serving.core.state import RequestState
from scheduler_runs import drive, request, to_end


def add(driven, key, count, *, first=0, length=6, **fields):
    for number in range(first, first + count):
        fields.setdefault("max_tokens", 60)
        driven.add(request(f"{key}{number}", length, key=key, start=1 + 40 * number + 1000 * (ord(key) % 50), **fields))


def seats_of(driven):
    return Counter(state.key for state in driven.scheduler._places.running)


def preemptions(driven):
    return driven.scheduler.stats().counters["preemptions"]


def steps_until(driven, is_so, most=1000):
    for step in range(most):
        if is_so():
            return step
        assert driven.step()
    raise AssertionError(f"not within {most} steps")


# By hand


def test_a_key_gets_a_seat_although_another_has_all_of_them():
    driven = drive(max_seqs=4, min_run=8)
    add(driven, "a", 8)
    steps_until(driven, lambda: driven.steps >= 20)
    add(driven, "b", 1, max_tokens=1)
    # a's youngest makes room at once; it was the last of four to be seated.
    assert steps_until(driven, lambda: driven.seen["b0"].finish is Finish.LENGTH) == 1
    assert preemptions(driven) == 1
    steps_until(driven, lambda: len(driven.seen["a3"].tokens) > 21)
    assert driven.seen["a4"].tokens == [], "it goes on before those of its key that came after it"
    to_end(driven)


def test_a_key_gets_a_seat_by_default_too():
    scheduler, told = SchedulerConfig(num_blocks=2000, max_positions=2000).build(), []
    for number in range(32):
        scheduler.add(request(f"a{number}", key="a", max_tokens=1500))
    for step in range(200):
        if step == 50:
            scheduler.add(request("b", key="b", max_tokens=1))
        batch = scheduler.schedule()
        told.append({chunk.id for chunk in batch.chunks})
        scheduler.update(batch, [Sampled(id=chunk.id, token=7) for chunk in batch.chunks if chunk.samples])
    assert [step for step, ids in enumerate(told) if "b" in ids] == [SchedulerConfig.min_run]


def test_nobody_makes_room_before_it_has_run_for_a_while():
    driven = drive(max_seqs=2, min_run=10)
    add(driven, "a", 2)
    steps_until(driven, lambda: driven.steps >= 3)
    add(driven, "b", 1)
    assert steps_until(driven, lambda: seats_of(driven)["b"]) == 10 - 3 + 1
    to_end(driven)


def test_keys_that_want_all_seats_have_as_many():
    driven = drive(max_seqs=6, min_run=4, num_blocks=400)
    add(driven, "a", 12)
    steps_until(driven, lambda: driven.steps >= 10)
    add(driven, "b", 12)
    steps_until(driven, lambda: seats_of(driven)["b"] == 3, most=10)
    add(driven, "c", 12)
    steps_until(driven, lambda: set(seats_of(driven).values()) == {2}, most=12)
    before = preemptions(driven)
    steps_until(driven, lambda: driven.seen["a0"].finish is not None)
    assert preemptions(driven) == before, "then nobody has to make room"
    to_end(driven)


def test_room_is_for_the_key_that_it_was_made_for():
    driven = drive(max_seqs=6, min_run=4, num_blocks=400)
    for key, count in (("a", 2), ("b", 3), ("c", 1)):
        add(driven, key, count)
    steps_until(driven, lambda: driven.steps >= 8)
    # It is a's turn, to which nobody owes a place.
    add(driven, "a", 1, first=2)
    add(driven, "c", 1, first=1)
    driven.step()
    assert seats_of(driven) == {"a": 2, "b": 2, "c": 2}
    to_end(driven)


def test_who_made_room_waits_for_its_turn_as_others_do():
    driven = drive(num_blocks=2000, max_seqs=3, min_run=4, quantum=4)
    add(driven, "a", 1, max_tokens=20)
    add(driven, "a", 2, first=1, max_tokens=150)
    steps_until(driven, lambda: driven.steps >= 8)
    # The first was out of turn and is owed, but both cost less than what a1 has left.
    add(driven, "b", 2, max_tokens=40)
    steps_until(driven, lambda: seats_of(driven) == {"a": 2, "b": 1})
    steps_until(driven, lambda: driven.seen["a0"].finish is not None)
    driven.step()
    assert seats_of(driven) == {"a": 1, "b": 2}
    to_end(driven)


def test_of_more_keys_than_seats_all_get_on():
    driven = drive(max_seqs=2, min_run=5)
    for key in "abcde":
        add(driven, key, 1, max_tokens=60)
    steps_until(driven, lambda: any(seen.finish for seen in driven.seen.values()))
    given_to = [len(seen.tokens) for seen in driven.seen.values()]
    assert min(given_to) >= 60 - 2 * 8
    # Each was in its seat for five steps and more, before another was.
    assert 30 <= preemptions(driven) <= 5 * 60 / 5
    to_end(driven)


def test_more_was_computed_for_a_key_so_it_gets_no_more_seats():
    """Prompts weigh as much as answers: b's seat is all it gets, while a, which has more seats, was given less."""
    driven = drive(num_blocks=2000, max_seqs=6, min_run=4, quantum=16, max_batched_tokens=200)
    add(driven, "a", 12, max_tokens=150)
    steps_until(driven, lambda: driven.steps >= 10)
    add(driven, "b", 30, length=35, max_tokens=2)
    most = 0
    while driven.seen["b29"].finish is None and driven.seen["a0"].finish is None:
        assert driven.step()
        most = max(most, seats_of(driven)["b"])
    assert most < 3
    to_end(driven)


@pytest.mark.parametrize("is_async", [False, True])
def test_room_in_the_cache_is_made_too(is_async):
    driven = drive(num_blocks=24, max_positions=80, max_seqs=8, min_run=6, is_async=is_async)
    add(driven, "a", 3, length=20, max_tokens=60)
    steps_until(driven, lambda: driven.steps >= 14)
    add(driven, "b", 1, length=40, max_tokens=3)
    assert driven.scheduler.pool.num_free < 11
    assert steps_until(driven, lambda: driven.seen["b0"].tokens) <= 3 + is_async
    to_end(driven)


def test_a_large_request_does_not_wait_for_ever_behind_small_ones():
    driven = drive(num_blocks=20, max_positions=80, max_seqs=8, min_run=6)
    add(driven, "a", 1, length=60, max_tokens=19)
    for number in range(60):
        add(driven, "b", 1, first=number, length=20, max_tokens=12)
    steps_until(driven, lambda: driven.seen["a0"].finish is Finish.LENGTH, most=150)
    assert driven.seen["b59"].finish is None
    to_end(driven)


def test_prompts_of_several_keys_share_a_step():
    driven = drive(max_batched_tokens=32, max_seqs=8)
    add(driven, "a", 5, length=80)
    driven.step()
    add(driven, "b", 1, length=12)
    driven.form()
    found = {chunk.id: len(chunk.tokens) for chunk in driven.formed[0].chunks}
    assert found == {"a0": 32 - 12, "b0": 12}
    driven.finish_step()
    add(driven, "c", 1, length=50)
    driven.form()
    found = {chunk.id: len(chunk.tokens) for chunk in driven.formed[0].chunks}
    # One that decodes, and of 31 a's gets what is over.
    assert found == {"a0": 16, "b0": 1, "c0": 15}
    driven.finish_step()
    to_end(driven)


def test_one_key_alone_makes_room_for_nobody():
    driven = drive(max_seqs=2, min_run=1)
    add(driven, "a", 9, max_tokens=20)
    to_end(driven)
    assert preemptions(driven) == 0
    assert driven.started == [f"a{number}" for number in range(9)]


def test_nobody_makes_room_for_what_is_less_urgent():
    driven = drive(max_seqs=2, min_run=1)
    add(driven, "a", 2, max_tokens=30)
    add(driven, "b", 1, priority=1)
    steps_until(driven, lambda: driven.seen["a1"].finish is not None)
    assert (preemptions(driven), driven.seen["b0"].tokens) == (0, [])
    to_end(driven)


def test_what_is_less_urgent_makes_room():
    driven = drive(max_seqs=2, min_run=1)
    add(driven, "a", 2, max_tokens=30, priority=1)
    steps_until(driven, lambda: driven.steps >= 4)
    add(driven, "b", 1, max_tokens=2)
    assert steps_until(driven, lambda: driven.seen["b0"].finish is not None) == 2
    to_end(driven)


def test_one_that_made_room_may_be_paused_and_ended_where_it_waits():
    driven = drive(max_seqs=2, min_run=2)
    add(driven, "a", 3, max_tokens=30)
    steps_until(driven, lambda: driven.steps >= 5)
    add(driven, "b", 1, max_tokens=30)
    driven.step()
    assert seats_of(driven) == {"a": 1, "b": 1}
    driven.pause("a1")
    driven.step()
    driven.resume("a1")
    driven.step()
    driven.abort("a1")
    to_end(driven)


# Seats alone


def state(id, key, *, serial, ahead_since=0, blocks=1, priority=0):
    made = RequestState(
        Request(id=id, key=key, prompt=(1,), priority=priority, sampling=Sampling(max_tokens=5)),
        serial=serial,
        now=1.0,
        stop_tokens=frozenset(),
        max_positions=9,
    )
    made.ahead_since, made.blocks = ahead_since, [0] * blocks
    return made


def seated(*states, waits="w"):
    seats = Seats(4, 100)
    for one in states:
        seats.come(one.key)
        seats.sit(one.key)
    seats.come(waits)
    return seats, state("w", waits, serial=99)


def test_the_last_in_rank_of_the_key_with_most_seats_makes_room():
    running = [
        state("a0", "a", serial=0),
        state("b0", "b", serial=1),
        state("a1", "a", serial=2),
        state("c", "c", serial=3),
    ]
    seats, waits = seated(*running)
    assert seats.who_rises("seat", waits, running, 4) is running[2]
    # It has begun to get on a step later.
    running[2].ahead_since = 1
    assert seats.who_rises("seat", waits, running, 4) is running[0]
    running[0].ahead_since = -1
    assert seats.who_rises("seat", waits, running, 4) is None, "no key gives its last seat while one has two"


def test_a_last_seat_is_given_where_no_key_has_two():
    running = [state("a", "a", serial=0), state("b", "b", serial=1)]
    seats, waits = seated(*running)
    seats.computed({"a": 3})
    assert seats.who_rises("seat", waits, running, 4) is running[0], "more was computed for it"


def test_for_room_in_the_cache_the_key_with_most_blocks_gives_some():
    running = [state("a0", "a", serial=0), state("a1", "a", serial=1), state("b", "b", serial=2, blocks=3)]
    seats, waits = seated(*running)
    assert seats.who_rises("room", waits, running, 4, short=2) is running[2]


def test_a_last_seat_is_not_given_for_room_that_others_can_make():
    running = [state("a0", "a", serial=0), state("a1", "a", serial=1), state("b", "b", serial=2, blocks=9)]
    seats, waits = seated(*running)
    assert seats.who_rises("room", waits, running, 4, short=1) is running[1]
    # If not nobody makes room in vain.
    assert seats.who_rises("room", waits, running, 4, short=2) is running[2]


def test_a_key_with_seats_gets_another_of_one_with_two_more_and_no_less_computed():
    running = [state(f"a{n}", "a", serial=n) for n in range(3)] + [state("w0", "w", serial=3)]
    seats, waits = seated(*running)
    assert seats.who_rises("seat", waits, running, 4) is running[2]
    assert seats.passed_over({"a", "w"}) == {"a"}
    seats.computed({"w": 1})
    assert seats.who_rises("seat", waits, running, 4) is None
    assert seats.passed_over({"a", "w"}) == set()
    seats.computed({"a": 1})
    seats.rise("a")
    assert seats.who_rises("seat", waits, running[:2] + running[3:], 4) is None, "then they would have to change again"


def test_the_key_without_a_seat_for_longest_is_first():
    seats = Seats(1, 10**6)
    for key in "abc":
        seats.come(key)
    assert seats.longest_without({"c", "b"}) == "b"
    seats.sit("b")
    seats.rise("b")
    assert seats.longest_without({"c", "b"}) == "c"
    seats.sit("c")
    seats.sit("b")
    assert seats.longest_without({"c", "b"}) is None


def test_who_comes_owes_nothing_to_those_who_were_here():
    seats = Seats(1, 10**6)
    seats.come("a")
    seats.computed({"a": 1000})
    seats.come("b")
    for _ in range(3):
        seats.sit("a")
    assert seats.passed_over({"a", "b"}) == {"a"}
    for _ in range(6):
        seats.sit("b")
    assert seats.passed_over({"a", "b"}) == {"b"}, "what was computed for a before does not count"


def test_who_comes_begins_as_who_has_least():
    seats = Seats(1, 100)
    for key in "ab":
        seats.come(key)
        seats.computed({key: 10 if key == "a" else 50})
    seats.come("c")
    seats.sit("c")
    seats.sit("c")
    seats.sit("c")
    # As many as a, and fewer than b.
    assert seats.passed_over({"a", "c"}) == {"c"}
    assert seats.passed_over({"b", "c"}) == set()


def test_who_has_fewest_seats_is_who_others_owe_some():
    seats = Seats(1, 100)
    for key, count in (("p", 1), ("q", 3), ("r", 3)):
        seats.come(key)
        for _ in range(count):
            seats.sit(key)
    seats.computed({"p": 50, "q": 10, "r": 60})
    assert seats.passed_over({"p", "q", "r"}) == {"r"}


def test_nobody_is_further_behind_than_a_turn_of_all_seats():
    seats = Seats(4, 5)
    for key in "ab":
        seats.come(key)
    for _ in range(3):
        seats.sit("b")
    for _ in range(100):
        seats.computed({"a": 10})
    seats.computed({"b": 19})
    assert seats.passed_over({"a", "b"}) == set()
    seats.computed({"b": 1})
    assert seats.passed_over({"a", "b"}) == {"b"}


def test_a_key_that_asked_for_little_for_long_soon_has_no_more_than_others():
    """What was computed for others before pinned them to one seat, for as long as the key had been there."""
    driven = drive(num_blocks=4000, max_positions=4000, max_seqs=8, min_run=8)
    add(driven, "b", 1, max_tokens=3000)
    driven.step()
    driven.pause("b0")
    serial = 0

    def clients():
        nonlocal serial
        while sum(one.key == "a" for one in driven.scheduler.states()) < 5:
            add(driven, "a", 1, first=serial, max_tokens=12 + serial % 5)
            serial += 1

    for _ in range(400):
        clients()
        driven.step()
    add(driven, "b", 20, first=1, max_tokens=900)
    had = []
    for _ in range(160):
        clients()
        driven.step()
        had.append(seats_of(driven)["a"])
    assert sum(had[40:]) / len(had[40:]) > 3
    for id in list(driven.scheduler._states):
        driven.abort(id)


@pytest.mark.parametrize("owned", [(1, 1, 4), (2, 3, 3), (0, 4, 4), (0, 1, 1)])
def test_keys_that_wait_in_vain_are_those_for_which_nobody_rises(owned):
    running = [
        state(f"{key}{n}", key, serial=10 * at + n, ahead_since=at)
        for at, key in enumerate("abc")
        for n in range(owned[at])
    ]
    seats = Seats(4, 100)
    for key in "abc":
        seats.come(key)
    for one in running:
        seats.sit(one.key)
    for step in range(9):
        vain = seats.in_vain({"a", "b", "c"}, running, step)
        assert vain == {
            key for key in "abc" if seats.who_rises("seat", state("w", key, serial=99), running, step) is None
        }


# Whatever comes


@st.composite
def crowds(draw):
    """Limits, and of each key when it comes and with which requests (length of the prompt, new tokens)."""
    limits = {
        "max_seqs": draw(st.integers(1, 5)),
        "min_run": draw(st.integers(1, 9)),
        "max_batched_tokens": draw(st.sampled_from([6, 16, 64])),
        "prefix_cache": draw(st.booleans()),
        "is_async": draw(st.booleans()),
        "quantum": draw(st.sampled_from([1, 20, 500])),
    }
    asked = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 60)), min_size=1, max_size=6)
    return limits, draw(st.lists(st.tuples(st.integers(0, 60), asked), min_size=2, max_size=6))


@settings(deadline=None, max_examples=25)
@given(crowds())
def test_a_key_that_waits_has_a_seat_within_a_bound(crowd):
    limits, keys = crowd
    driven = drive(num_blocks=1200, max_positions=100, **limits)
    scheduler, places = driven.scheduler, driven.scheduler._places
    coming = sorted((at, f"k{number}", asked) for number, (at, asked) in enumerate(keys))
    make_way, made_way = places.make_way, Counter()

    def spy(one):
        # It has got on since it was last asked to make room, and then ran on.
        assert one.computed > one.furthest
        assert scheduler._step - one.ahead_since >= limits["min_run"]
        made_way[one.request.id] += 1
        make_way(one)

    places.make_way = spy
    invitation, invited = scheduler._parts.invitation, []
    renew = invitation.renew

    def noted(step):
        renew(step)
        if invitation.state is not None and not places.seats.has_seat(invitation.state.key):
            invited.append((invitation.state, step))

    invitation.renew = noted
    seats = min(limits["max_seqs"], limits["max_batched_tokens"])
    # Until all of a key's that run are where they were: what decodes leave of a step is shared among the keys.
    share = max(1, (limits["max_batched_tokens"] - seats) // seats)
    back = seats * (100 // share + 1) if not limits["prefix_cache"] else seats * 5
    waits_since: dict[str, int] = {}
    while coming or scheduler.has_work:
        while coming and (coming[0][0] <= driven.steps or not scheduler.has_work):
            _, key, asked = coming.pop(0)
            for number, (length, new) in enumerate(asked):
                driven.add(request(f"{key}-{number}", length, max_tokens=new, key=key))
        driven.step()
        while invited:
            one, step = invited.pop()
            assert one.last_step >= step, "the way that was cleared for it was another's"
        here, have = {one.key for one in scheduler.states()}, seats_of(driven)
        for key in here:
            if have[key] or not any(one.key == key for one in places.waiting):
                waits_since.pop(key, None)
                continue
            since = waits_since.setdefault(key, driven.steps)
            changes = -(-len(keys) // seats)
            assert driven.steps - since <= changes * (limits["min_run"] + back + 1) + len(keys)
    driven.check_end()
    for id, count in made_way.items():
        asked_for = driven.requests[id]
        assert count <= len(asked_for.prompt) + asked_for.sampling.max_tokens, "each time it had got on"
