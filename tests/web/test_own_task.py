"""`OwnTask`: pieces of others' work in one task, whatever becomes of whoever waits for them, and whatever they leave behind."""

import asyncio
import contextvars
import gc

import pytest

from anabranch.web import own_task
from anabranch.web.own_task import OwnTask
from anabranch.web.turns import UnusualError
from odd_errors import LEFT_CANCELLED, UNUSUAL


async def waited(future):
    await asyncio.wait({future})
    return future.result()


def test_pieces_run_one_after_another_in_one_task_and_one_context():
    variable, order = contextvars.ContextVar("variable"), []

    async def sets():
        order.append(asyncio.current_task())
        await asyncio.sleep(0)
        variable.set("set")
        order.append("first")

    async def reads():
        order.append("second")
        order.append(asyncio.current_task())
        return variable.get()

    async def main():
        own = OwnTask()
        own.begin(sets)
        found = await waited(own.begin(reads))
        later = await waited(own.begin(reads))
        own.end()
        await own.ended()
        assert order[0] is order[3] is order[5]
        assert order[0] is not asyncio.current_task()
        return found, later, order[1:3]

    assert asyncio.run(main()) == ("set", "set", ["first", "second"])
    assert not own_task._alive


def test_a_piece_goes_on_where_whoever_waits_is_cancelled():
    async def main():
        own, go = OwnTask(), asyncio.Event()

        async def reads():
            await go.wait()
            return b"piece"

        reading = own.begin(reads)
        for _ in range(3):
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.001):
                    await asyncio.wait({reading})
        go.set()
        found = await waited(reading)
        own.end()
        await own.ended()
        return found

    assert asyncio.run(main()) == b"piece"


@pytest.mark.parametrize("left", LEFT_CANCELLED)
def test_what_a_piece_leaves_cancelled_is_for_nobody(left):
    async def main():
        own = OwnTask()

        async def ends():
            await LEFT_CANCELLED[left]()
            return 7

        async def cancels():
            # It comes at the next wait of the task.
            asyncio.current_task().cancel()
            return 8

        async def counts():
            await asyncio.sleep(0)
            return asyncio.current_task().cancelling()

        assert await waited(own.begin(ends)) == 7
        assert await waited(own.begin(cancels)) == 8
        assert await waited(own.begin(counts)) == 0
        own.end()
        await own.ended()
        assert not asyncio.current_task().cancelling()

    asyncio.run(main())


@pytest.mark.parametrize(
    "error", [ValueError, *(one for one in UNUSUAL if one not in (KeyboardInterrupt, asyncio.CancelledError))]
)
def test_what_a_piece_raises_is_told_and_the_next_is_begun(error):
    async def fails():
        raise error("of its own")

    async def main():
        own = OwnTask()
        with pytest.raises(ValueError if error is ValueError else RuntimeError):
            await waited(own.begin(fails))
        found = await waited(own.begin(lambda: asyncio.sleep(0, 7)))
        own.end()
        await own.ended()
        return found

    assert asyncio.run(main()) == 7


def test_a_piece_that_ends_by_a_cancel_of_its_own_is_the_last():
    done = []

    async def cancels():
        asyncio.current_task().cancel()
        await asyncio.sleep(0)

    async def main():
        own = OwnTask()
        with pytest.raises(UnusualError):
            await waited(own.begin(cancels))
        with pytest.raises(UnusualError, match="has ended"):
            await waited(own.begin(lambda: asyncio.sleep(0)))
        own.end(lambda: done.append("last"))
        await own.ended()

    asyncio.run(main())
    assert done == ["last"]


@pytest.mark.parametrize("when", ["before it began", "idle", "runs", "goes on", "queued"])
def test_the_last_is_done_once_and_nobody_waits_for_ever(when):
    done = []

    async def main():
        own = OwnTask()

        async def waits():
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                done.append("told")
                if when != "goes on":
                    raise
            return "went on"

        reading = None
        if when != "before it began":
            await asyncio.sleep(0)
        if when in ("runs", "goes on", "queued"):
            reading = own.begin(waits)
            await asyncio.sleep(0)
        if when in ("before it began", "queued"):
            queued = own.begin(waits)
        own.end(lambda: done.append("last"))
        await own.ended()
        if when in ("before it began", "queued"):
            with pytest.raises(UnusualError, match="has ended"):
                await waited(queued)
        if when == "goes on":
            assert await waited(reading) == "went on"
        elif reading is not None:
            with pytest.raises(UnusualError):
                await waited(reading)

    asyncio.run(main())
    assert done == (["told", "last"] if when in ("runs", "goes on", "queued") else ["last"])


def test_what_does_not_end_is_left_behind_and_the_last_is_done_beside_it(monkeypatch, caplog):
    """Some end only when what they read from is closed."""
    monkeypatch.setattr(own_task, "GRACE_S", 0.01)
    done = []

    async def main():
        own, go = OwnTask(), asyncio.Event()

        async def stubborn():
            while not go.is_set():
                try:
                    await go.wait()
                except asyncio.CancelledError:
                    continue

        def last():
            done.append("last")
            go.set()

        reading = own.begin(stubborn)
        await asyncio.sleep(0)
        own.end(last)
        async with asyncio.timeout(60):
            while not done:
                await own_task.all_ended()
        await waited(reading)
        await own.ended()
        await own_task.all_ended()

    asyncio.run(main())
    assert done == ["last"]
    assert not own_task._ending
    assert "left behind" in caplog.text


@pytest.mark.parametrize("is_idle", [False, True])
def test_the_end_of_the_loop_ends_it(is_idle):
    """And its last, if it has one; nobody is held up."""

    async def main():
        own = OwnTask()
        if not is_idle:
            own.begin(lambda: asyncio.Event().wait())
        await asyncio.sleep(0.001)

    asyncio.run(main())
    gc.collect()
    assert not own_task._alive


def test_the_last_is_done_where_the_loop_ends_before_it_began():
    done = []

    async def main():
        OwnTask().end(lambda: done.append("last"))

    asyncio.run(main())
    assert done == ["last"]


def test_what_was_told_to_end_is_waited_for():
    done = []

    async def tidies_up():
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            done.append("tidied up")

    async def main():
        idle, own = OwnTask(), OwnTask()
        own.begin(tidies_up)
        await asyncio.sleep(0)
        own.end(lambda: done.append("last"))
        await own_task.all_ended()
        done.append("others")
        idle.end()

    asyncio.run(main())
    assert done == ["tidied up", "last", "others"]


def test_what_has_not_begun_is_withdrawn_and_nothing_else():
    async def main():
        own = OwnTask()
        first, second = own.begin(lambda: asyncio.sleep(0, 1)), own.begin(lambda: asyncio.sleep(0, 2))
        assert own.withdraw(first)
        with pytest.raises(UnusualError):
            await waited(first)
        assert not own.withdraw(first)
        assert await waited(second) == 2
        assert not own.withdraw(second)
        own.end()

    asyncio.run(main())


@pytest.mark.parametrize("when", ["queued", "runs"])
def test_no_error_is_told_to_nobody(when, caplog):
    """As asyncio does of what nobody has asked for: each client that goes away would be one."""

    async def main():
        own = OwnTask()
        own.begin(lambda: asyncio.Event().wait())
        if when == "runs":
            await asyncio.sleep(0)
        own.end()
        await own.ended()
        own.begin(lambda: asyncio.Event().wait())
        gc.collect()

    asyncio.run(main())
    gc.collect()
    assert caplog.text == ""


@pytest.mark.parametrize("waits", [False, True])
def test_the_last_may_wait_for_what_does_not_end(monkeypatch, waits):
    monkeypatch.setattr(own_task, "GRACE_S", 0.01)
    done = []

    async def main():
        own, go = OwnTask(), asyncio.Event()

        async def stubborn():
            while not go.is_set():
                try:
                    await go.wait()
                except asyncio.CancelledError:
                    continue
            done.append("ended")

        own.begin(stubborn)
        await asyncio.sleep(0)
        own.end(lambda: done.append("last"), waits=waits)
        await own.ended()
        await asyncio.sleep(0.01)
        go.set()
        await own.ended()

    asyncio.run(main())
    assert done == (["ended", "last"] if waits else ["last", "ended"])
