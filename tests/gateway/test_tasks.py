"""What goes on in the background ends with the gateway, and says what it failed with."""

import asyncio
import logging

from anabranch.gateway.tasks import Tasks


def test_all_end_with_it_and_what_fails_is_in_the_log(caplog):
    ended = []

    async def forever(name):
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(name)

    async def fails():
        raise KeyError("x")

    async def work():
        held = Tasks()
        held.spawn(forever("spawned"))
        held.spawn(fails())
        kept = asyncio.ensure_future(forever("kept"))
        held.keep(kept)
        quick = asyncio.ensure_future(asyncio.sleep(0))
        held.keep(quick)
        await quick
        await asyncio.sleep(0.01)
        assert (len(held._tasks), ended) == (2, [])
        await held.stop()
        assert (sorted(ended), kept.cancelled(), held._tasks) == (["kept", "spawned"], True, set())

    with caplog.at_level(logging.ERROR):
        asyncio.run(work())
    assert [record.message for record in caplog.records] == ["a task of the gateway failed: KeyError"]
