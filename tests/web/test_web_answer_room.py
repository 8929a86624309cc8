"""The room for answers: never more than there is, a part for each, and slow readers give way while others wait."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.web.answer_room import AnswerRoom
from anabranch.web.api_error import ApiError
from anabranch.web.room import PATIENCE_S


class Clock:
    now = 10.0

    def __call__(self):
        return self.now


def room_of(limit=100, share=0.5):
    told, clock = [], Clock()
    return AnswerRoom(limit, share, 429, lambda: told.append(1), clock), clock, told


def refused(held, num_bytes):
    with pytest.raises(ApiError) as caught:
        held.more(num_bytes)
    assert (caught.value.status, caught.value.code) == (429, "overloaded")
    assert caught.value.headers == {"Retry-After": "1", "x-should-retry": "true"}
    return str(caught.value)


def nobody():
    raise AssertionError("nobody is to be cut")


def test_an_answer_counts_until_it_is_closed_not_until_it_is_made():
    room, _, told = room_of()
    held = room.enter("a", nobody)
    held.more(30)
    held.more(20)
    held.is_read()
    assert room.num_bytes == held.num_bytes == 50
    with room.enter("a", nobody) as other:
        assert "answers to this sender take their part" in refused(other, 1)
    assert told == [1]
    held.close()
    held.close()
    assert room.num_bytes == 0
    room.enter("a", nobody).more(51)


def test_of_what_is_made_the_first_is_looked_at_as_if_it_were_alone_and_what_is_read_is_made():
    room, _, told = room_of()
    read, first, second = (room.enter("a", nobody) for _ in range(3))
    read.more(10)
    read.is_read()
    first.more(20)
    second.more(15)
    # More than the part with the second, not without it.
    first.more(15)
    assert "this sender" in refused(second, 1)
    assert (room.num_bytes, told) == (60, [1])
    assert "this sender" in refused(first, 6)


def test_what_comes_first_of_a_source_may_be_more_than_its_part_and_leaves_room_for_others():
    room, _, _ = room_of()
    large = room.enter("a", nobody)
    for _ in range(75):
        large.more(1)
    # Three quarters of all. Another has half of what is left, and so on.
    others = [room.enter(source, nobody) for source in "bc"]
    others[0].more(12)
    assert "answers to this sender" in refused(others[0], 1)
    others[1].more(6)
    large.close()
    # Beside others that much has to stay free.
    again = room.enter("a", nobody)
    again.more(57)
    assert "answers to this sender" in refused(again, 1)


def test_who_is_over_its_part_cuts_nobody_else():
    room, clock, _ = room_of(24)
    cut = []
    reads = room.enter("c", lambda: cut.append("c"))
    reads.more(7)
    reads.is_read()
    clock.now += 2 * PATIENCE_S
    asks = room.enter("a", nobody)
    assert "answers to this sender" in refused(asks, 17)
    asks.more(8)
    for _ in range(3):
        asks.more(1)
    assert "answers to this sender" in refused(asks, 1)
    assert (cut, room.num_bytes) == ([], 18)
    room.enter("b", nobody).more(3)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.integers(1, 75)), max_size=60))
def test_whatever_others_ask_for_there_is_room_for_one_more_and_its_readers_are_not_cut(moves):
    room, clock, _ = room_of(1000)
    reads = room.enter("d", lambda: pytest.fail("it is cut for others"))
    reads.more(100)
    reads.is_read()
    held = {source: [] for source in "abc"}
    for source, is_new, size in moves:
        clock.now += 1.0
        if is_new or not held[source]:
            held[source].append(room.enter(source, lambda: None))
        try:
            held[source][-1].more(10 * size)
        except ApiError:
            held[source][-1].is_read()
        room.enter("e", nobody).close()
    room.enter("e", nobody).more(25)


def test_what_never_has_room_is_not_to_be_asked_for_again():
    room, _, told = room_of()
    held = room.enter("a", nobody)
    held.more(60)
    with pytest.raises(ApiError, match="over 75 bytes") as caught:
        held.more(16)
    assert (caught.value.status, caught.value.code, caught.value.headers) == (400, "over_limit", {})
    assert (room.num_bytes, told) == (60, [1])


def test_the_first_that_is_made_of_a_source_is_not_held_up_by_those_behind_it():
    room, _, _ = room_of()
    first, second = room.enter("a", nobody), room.enter("a", nobody)
    first.more(10)
    second.more(39)
    refused(second, 2)
    # Up to what one answer may leave free.
    first.more(26)
    assert "answers to this sender" in refused(first, 1)
    first.is_read()
    # What waits to be read counts against all of them.
    assert "answers to this sender" in refused(second, 1)


def test_slow_readers_make_room_for_those_of_their_source_that_lacks_its_part():
    room, clock, _ = room_of()
    cut = []
    slow, others = room.enter("a", lambda: cut.append("slow")), room.enter("b", nobody)
    slow.more(50)
    slow.is_read()
    others.more(20)
    others.is_read()
    clock.now += PATIENCE_S
    new = room.enter("a", nobody)
    refused(new, 10)
    clock.now += 0.1
    new.more(10)
    assert (cut, slow.num_bytes, room.num_bytes) == (["slow"], 0, 30)


def test_where_all_lack_room_the_source_with_most_makes_some():
    room, clock, _ = room_of(share=1.0)
    cut = []
    for name, source, size in (("b", "b", 10), ("a1", "a", 40), ("a2", "a", 5)):
        held = room.enter(source, lambda name=name: cut.append(name))
        held.more(size)
        held.is_read()
        clock.now += 0.1
    clock.now += PATIENCE_S
    room.enter("c", nobody).more(60)
    assert (cut, room.num_bytes) == (["a1"], 75)


def test_who_is_being_answered_is_not_cut():
    room, clock, _ = room_of(share=1.0)
    room.enter("a", nobody).more(90)
    clock.now += 100
    refused(room.enter("b", nobody), 20)


moves = st.tuples(st.sampled_from(["enter", "more", "read", "close", "wait"]), st.integers(0, 7), st.integers(1, 60))


@given(st.lists(moves, max_size=80), st.sampled_from([0.5, 1.0]))
def test_whatever_comes_there_is_never_more_and_nothing_is_left(moves, share):
    room, clock, _ = room_of(share=share)
    held: list = []
    for move, place, size in moves:
        one = held[place % len(held)] if held else None
        if move == "enter":
            held.append(room.enter("abc"[place % 3], lambda: None))
        elif move == "wait":
            clock.now += size / 20
        elif one is None:
            continue
        elif move == "more":
            try:
                one.more(size)
            except ApiError:
                pass
        elif move == "read":
            one.is_read()
        else:
            one.close()
            held.remove(one)
        assert room.num_bytes == sum(each.num_bytes for each in held) <= 100
        assert {source: count for source, count in room._of_source.items() if count} == {
            source: total
            for source in "abc"
            if (total := sum(each.num_bytes for each in held if each.source == source))
        }
    for one in held:
        one.close()
    assert (room.num_bytes, dict(room._of_source), room._made, room._read) == (0, {}, {}, {})
