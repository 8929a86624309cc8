"""What one task makes and another reads: all of it, in order, and no further than it is read."""

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.gateway.core.pieces import drained


async def read(numbers, waits, *, size=2, beat_s=None, most=None):
    pieces, made, got = asyncio.Queue(size), [], []

    async def make():
        for number, wait in zip(numbers, waits, strict=True):
            for _ in range(wait):
                await asyncio.sleep(0)
            await pieces.put(number)
            made.append(number)

    maker = asyncio.ensure_future(make())
    coming = drained(pieces, maker, beat_s)
    async for piece in coming:
        if piece is not None:
            got.append(piece)
        if most is not None and len(got) == most:
            await coming.aclose()
            break
    return got, made, maker


@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 3)), max_size=12), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_all_pieces_come_in_their_order(steps, size):
    numbers, waits = [number for number, _ in steps], [wait for _, wait in steps]
    got, _, maker = asyncio.run(read(numbers, waits, size=size))
    assert got == numbers
    assert maker.done()


def test_no_more_is_made_ahead_than_there_is_room_for_and_a_reader_who_leaves_ends_it():
    got, made, maker = asyncio.run(read(range(9), [0] * 9, most=1))
    assert (got, maker.cancelled()) == ([0], True)
    assert len(made) <= 4


def test_where_nothing_comes_there_is_a_sign_of_life():
    async def work():
        pieces, go = asyncio.Queue(), asyncio.Event()

        async def make():
            await go.wait()
            await pieces.put("late")

        seen = []
        async for piece in drained(pieces, asyncio.ensure_future(make()), 0.001):
            seen.append(piece)
            if len(seen) == 2:
                go.set()
        return seen

    seen = asyncio.run(work())
    assert (seen[:2], seen[-1], seen.count("late")) == ([None, None], "late", 1)


def test_what_the_maker_fails_with_is_told_by_its_task_alone():
    async def work():
        pieces = asyncio.Queue()

        async def make():
            await pieces.put(1)
            raise KeyError("x")

        maker = asyncio.ensure_future(make())
        assert [piece async for piece in drained(pieces, maker)] == [1]
        with pytest.raises(KeyError):
            maker.result()

    asyncio.run(work())
