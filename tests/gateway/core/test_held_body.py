"""What a body takes is given back once, when its last holder has done with it, and its place by whoever has it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway.core.held_body import HeldBody
from anabranch.web.body_room import BodyRoom


class Left:
    """Stands for the time that a body has."""


def made(*, is_large=True):
    room, left = BodyRoom(100, 0.5, 429), []
    return room, left, HeldBody(room.enter("a", 10), (lambda: left.append(1)) if is_large else None)


def test_a_large_body_is_counted_until_its_last_holder_has_done_with_it():
    room, left, held = made()
    held.more(10, Left())
    held.is_whole()
    held.share()
    held.close()
    assert (room.num_bytes, left) == (10, [])
    held.close()
    assert (room.num_bytes, left) == (0, [1])


def test_a_small_one_only_while_it_comes():
    room, left, held = made(is_large=False)
    held.more(10, Left())
    assert room.num_bytes == 10
    held.is_whole()
    assert room.num_bytes == 0
    assert not held.take_place()
    held.close()
    assert left == []


@given(st.lists(st.sampled_from(["share", "close", "take"]), max_size=12))
def test_the_place_is_left_once_or_taken_once(steps):
    room, left, held = made()
    held.more(10, Left())
    holders, taken = 1, 0
    for step in steps:
        if not holders:
            # It came too late: the place is gone, and a request takes one as any does.
            assert not held.take_place()
            break
        if step == "take":
            taken += held.take_place()
        else:
            holders += 1 if step == "share" else -1
            held.share() if step == "share" else held.close()
    for _ in range(holders):
        held.close()
    assert (taken + len(left), room.num_bytes) == (1, 0)


def test_bytes_without_room_are_refused():
    _, _, held = made()
    with pytest.raises(Exception, match="overloaded"):
        held.more(101, Left())
