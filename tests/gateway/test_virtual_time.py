import asyncio

import pytest

from anabranch.errors import InputError
from anabranch.gateway.dispatch.virtual_time import run_virtual, virtual_clock


def test_waits_take_no_time_and_happen_in_order():
    async def work() -> list[tuple[str, float]]:
        seen = []

        async def one(name: str, seconds: float) -> None:
            await asyncio.sleep(seconds)
            seen.append((name, virtual_clock()))

        await asyncio.gather(one("late", 3600.0), one("soon", 1.5), one("between", 60.0))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(100.0):
                await asyncio.Event().wait()
        return [*seen, ("end", virtual_clock())]

    found = run_virtual(work)
    assert [name for name, _ in found] == ["soon", "between", "late", "end"]
    assert [time_s for _, time_s in found] == pytest.approx([1.5, 60.0, 3600.0, 3700.0])


def test_a_wait_for_what_never_comes_is_told():
    async def work() -> None:
        await asyncio.Event().wait()

    with pytest.raises(InputError, match="nothing will ever happen"):
        run_virtual(work)
