"""Answers that are read on though nobody waits: how much room each sender has of it."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway.dispatch import late
from anabranch.gateway.dispatch.late import Late


class Room:
    """What is read on, by name."""

    def __init__(self, most=4):
        self.late, self.tasks, self.ended = Late(60, most), {}, []

    def take(self, name, sender, size=1):
        task = self.tasks[name] = asyncio.ensure_future(asyncio.sleep(60))
        is_taken = self.late.take(task, size, lambda: self.ended.append(name), sender=sender)
        if not is_taken:
            task.cancel()
        return is_taken


def test_one_sender_does_not_keep_another_out():
    async def main():
        room = Room()
        assert [room.take(f"a{at}", "a") for at in range(6)] == [True] * 4 + [False] * 2
        assert room.take("b0", "b")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert (room.ended, len(room.late)) == (["a3"], 4)
        assert not room.take("a6", "a")
        assert room.take("b1", "b")
        # Both have as much now.
        assert not room.take("b2", "b")
        assert not room.take("a7", "a")
        assert room.take("c0", "c")
        await room.late.close()
        assert (len(room.late), sorted(room.ended)) == (0, ["a0", "a1", "a2", "a3", "b0", "b1", "c0"])

    asyncio.run(main())


def test_bytes_are_shared_too(monkeypatch):
    monkeypatch.setattr(late, "MOST_BYTES", 100)

    async def main():
        room = Room(most=50)
        assert [room.take(f"a{at}", "a", 30) for at in range(4)] == [True] * 3 + [False]
        assert not room.take("b0", "b", 101)
        # Nothing is given up for what then has no room all the same.
        assert not room.take("b1", "b", 95)
        assert len(room.late) == 3
        assert room.take("b2", "b", 40)
        await room.late.close()
        assert sorted(room.ended) == ["a0", "a1", "a2", "b2"]

    asyncio.run(main())


@pytest.mark.parametrize("most", [0, 1])
def test_hardly_any_room(most):
    async def main():
        room = Room(most)
        assert room.take("a0", "a") is bool(most)
        assert not room.take("b0", "b")
        await room.late.close()
        assert not room.take("a1", "a")

    asyncio.run(main())


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 40)), max_size=30))
def test_there_is_never_more_than_room_and_each_ends_once(asked):
    async def main():
        room, taken = Room(), []
        for at, (sender, size) in enumerate(asked):
            if room.take(at, sender, size):
                taken.append(at)
            assert len(room.late) <= 4
            await asyncio.sleep(0)
        await room.late.close()
        assert sorted(room.ended) == taken

    asyncio.run(main())
