"""Waiting for requests whose row is still to be written."""

import asyncio

from anabranch.gateway.core.unsettled import Unsettled


def test_each_waits_for_its_own_and_one_for_all():
    async def main():
        held, ended = Unsettled(), []
        await asyncio.wait_for(held.wait(), 60)
        held.add("a")
        held.add("b")
        held.add("a")
        assert (len(held), "a" in held, "c" in held) == (2, True, False)

        async def wait(name):
            await held.wait(name)
            ended.append(name)

        waits = [asyncio.create_task(wait(name)) for name in ("a", "b", None, "c")]
        for gone, expected in (("unknown", ["c"]), ("b", ["c", "b"]), ("b", ["c", "b"]), ("a", None)):
            held.discard(gone)
            for _ in range(5):
                await asyncio.sleep(0)
            assert expected is None or ended == expected
        await asyncio.wait_for(asyncio.gather(*waits), 60)
        assert set(ended) == {"a", "b", "c", None}
        assert len(held) == 0

    asyncio.run(main())
