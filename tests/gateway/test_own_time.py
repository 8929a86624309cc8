"""Time of an upstream stands still while this process holds it up, but that of the request does not."""

import asyncio

import pytest

from anabranch.gateway.dispatch.own_time import OwnTime
from anabranch.gateway.dispatch.virtual_time import run_virtual


def lasts(own_s, all_s, work):
    """Seconds until ``work(time)`` in another task has ended, or the time is up: then with a minus."""

    async def main():
        loop, time = asyncio.get_running_loop(), OwnTime()
        began, task = loop.time(), asyncio.ensure_future(work(time))
        try:
            async with time.limited(own_s, all_s):
                await asyncio.wait((task,))
        except TimeoutError:
            task.cancel()
            await asyncio.wait((task,))
            return began - loop.time()
        return loop.time() - began

    return run_virtual(main)


async def held(time, *steps):
    """Wait, and hold up, and wait, and hold up."""
    for number, seconds in enumerate(steps):
        if number % 2:
            with time.held():
                await asyncio.sleep(seconds)
        else:
            await asyncio.sleep(seconds)


@pytest.mark.parametrize(
    ("steps", "ends_s"),
    [
        ((2,), 2),
        ((4,), -3),
        ((1, 9), 10),
        ((1, 9, 1, 9), 20),
        ((1, 9, 1, 9, 2), -21),
        ((0, 50, 2.5), 52.5),
        ((1, 200), -100),
        ((1, 98, 3), -100),
        ((1, 99.5, 1), -100),
    ],
)
def test_only_its_own_time_counts_up_to_the_end_of_all(steps, ends_s):
    assert lasts(3, 100, lambda time: held(time, *steps)) == pytest.approx(ends_s)


@pytest.mark.parametrize(("own_s", "all_s"), [(0, 5), (5, 0), (-1, 5), (5, -1)])
def test_where_no_time_is_left_it_is_up_at_once(own_s, all_s):
    assert lasts(own_s, all_s, lambda time: held(time, 1)) == pytest.approx(0)


def test_how_long_it_was_held_up_is_known_at_any_time():
    async def main():
        time = OwnTime()
        task = asyncio.ensure_future(held(time, 1, 4, 1, 4))
        seen = []
        for _ in range(5):
            await asyncio.sleep(2)
            seen.append(round(time.held_s, 6))
        await task
        return seen

    # Also behind the end of the block in which it was limited, and without one.
    assert run_virtual(main) == [1, 3, 4, 6, 8]


def test_one_that_is_held_up_when_the_time_of_all_is_up_may_go_on_elsewhere():
    async def main():
        time, gate = OwnTime(), asyncio.Event()

        async def waits():
            with time.held():
                await gate.wait()
            return "read on"

        task = asyncio.ensure_future(waits())
        with pytest.raises(TimeoutError):
            async with time.limited(1, 5):
                await asyncio.wait((task,))
        gate.set()
        return await task, time.held_s

    assert run_virtual(main) == ("read on", pytest.approx(5))


def test_one_that_is_held_up_beyond_the_end_of_the_block_changes_no_limit_of_another():
    """An answer that is read on waits for room when nobody waits for it any more."""

    async def main():
        loop, time, gate = asyncio.get_running_loop(), OwnTime(), asyncio.Event()

        async def waits():
            with time.held():
                await gate.wait()
            return "read on"

        async with time.limited(3, 100):
            task = asyncio.ensure_future(waits())
            await asyncio.sleep(1)
        began, nobody = loop.time(), loop.create_future()
        loop.call_later(2, gate.set)
        with pytest.raises(TimeoutError):
            async with time.limited(3, 100):
                await nobody
        return await task, time.held_s, loop.time() - began

    assert run_virtual(main) == ("read on", pytest.approx(3), pytest.approx(3))
