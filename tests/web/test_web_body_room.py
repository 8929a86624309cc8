"""The room for bodies: never more than there is, a part for each, and slow senders give way while others wait."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.web.api_error import ApiError
from anabranch.web.body_room import PATIENCE_S, BodyRoom


class Clock:
    now = 10.0

    def __call__(self):
        return self.now


class Left:
    """Stands for `asyncio.Timeout`."""

    is_cut = False

    def reschedule(self, when):
        self.is_cut = True


def refused(call, *arguments):
    with pytest.raises(ApiError) as caught:
        call(*arguments)
    assert (caught.value.status, caught.value.code) == (429, "overloaded")
    assert caught.value.headers == {"Retry-After": "1", "x-should-retry": "true", "connection": "close"}
    return str(caught.value)


def test_what_has_come_counts_not_what_is_said_to_come():
    told = []
    room = BodyRoom(100, 1.0, 429, lambda: told.append(1))
    kept = [room.enter(source, 90) for source in "abc"]
    assert room.num_bytes == 0
    kept[0].more(90, Left())
    assert "bodies of other requests" in refused(room.enter, "d", 11)
    assert told == [1]
    assert room.enter("d", 10)
    refused(kept[1].more, 11, Left())
    kept[1].more(10, Left())
    kept[0].close()
    kept[0].close()
    assert room.num_bytes == 10


def test_a_source_has_its_part_of_what_the_others_leave():
    room = BodyRoom(100, 0.5, 429)
    first, second = room.enter("a", 50), room.enter("a", None)
    first.more(50, Left())
    assert "this sender's bodies" in refused(second.more, 1, Left())
    assert "this sender's bodies" in refused(room.enter, "a", None)
    # One that has nothing is let in where there is room.
    room.enter("b", 50).more(50, Left())


def test_whoever_comes_slowly_gives_way():
    async def run():
        clock = Clock()
        room = BodyRoom(100, 1.0, 429, clock=clock)
        slow, whole, left = room.enter("a", 100), room.enter("b", 40), Left()
        slow.more(60, left)
        whole.more(40, Left())
        whole.is_whole()
        clock.now += PATIENCE_S - 0.1
        refused(room.enter, "c", 1)
        clock.now += 0.2
        quick = room.enter("c", 60)
        assert not left.is_cut
        quick.more(60, Left())
        assert left.is_cut
        assert room.num_bytes == 100
        # What has come waits its turn, however long.
        clock.now += 100
        refused(room.enter, "d", 61)

    asyncio.run(run())


def test_one_with_too_much_cuts_off_nobody_else():
    async def run():
        clock = Clock()
        room = BodyRoom(100, 0.5, 429, clock=clock)
        other, own, left = room.enter("b", 30), room.enter("a", 30), Left()
        other.more(30, left)
        own.more(30, Left())
        own.is_whole()
        clock.now += PATIENCE_S + 1
        refused(room.enter("a", 1).more, 10, Left())
        assert not left.is_cut

    asyncio.run(run())


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["enter", "more", "whole", "close", "wait"]), st.sampled_from("abc"), st.integers(1, 60)
        ),
        max_size=80,
    ),
    st.floats(0.1, 1),
)
def test_the_books_are_right_whatever_comes(steps, share):
    async def run():
        clock, kept = Clock(), []
        room = BodyRoom(100, share, 429, clock=clock)
        for what, source, number in steps:
            each = kept[number % len(kept)] if kept else None
            try:
                if what == "enter":
                    kept.append(room.enter(source, number))
                elif what == "wait":
                    clock.now += number / 20
                elif each is not None and what == "more":
                    each.more(number, Left())
                elif each is not None:
                    getattr(each, {"whole": "is_whole", "close": "close"}[what])()
            except ApiError:
                pass
            assert room.num_bytes == sum(each.num_bytes for each in kept) <= 100
        for each in kept:
            each.close()
        assert room.num_bytes == 0
        assert not room._coming
        assert not room._of_source

    asyncio.run(run())
