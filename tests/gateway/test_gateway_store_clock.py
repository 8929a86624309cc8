"""Clocks that are wrong for a while: budgets are those of the period of now, and what was spent is forgotten by none."""

import asyncio
from datetime import UTC, datetime

import pytest

from anabranch.errors import BudgetError
from anabranch.gateway.store import LedgerRow, open_store
from anabranch.gateway.store.period import PERIODS

NOON = datetime(2026, 1, 31, 12, 10, tzinfo=UTC).timestamp()
MINUTE, HOUR, DAY, YEAR = 60.0, 3600.0, 86_400.0, 365 * 86_400.0


class Clock:
    def __init__(self, now=NOON):
        self.now = now

    def __call__(self):
        return self.now


async def spend(store, name, nano, cost=None):
    held = await store.reserve(name, ["global"], nano)
    await store.settle(held, LedgerRow(request_id=name, cost_nano=nano if cost is None else cost))


async def stands(store):
    return {one.period: (one.spent_nano, one.reserved_nano) for one in await store.budgets()}


@pytest.mark.parametrize("leap_s", [HOUR, DAY, 40 * DAY, 4 * YEAR])
def test_a_clock_that_ran_ahead_once_shuts_nothing(url, leap_s):
    """10 were spent this hour, 60 by the clock that ran ahead: of 100 an hour 30 are left, and 100 in the next one."""

    async def main():
        clock = Clock()
        async with open_store(url, clock=clock) as store:
            for period in PERIODS:
                await store.set_budget("global", 100 if period == "hour" else 10_000, period)
            await spend(store, "before", 10)
            clock.now += leap_s
            await spend(store, "ahead", 60)
            held = await store.reserve("held", ["global"], 5)
            clock.now = NOON + MINUTE
            assert await stands(store) == dict.fromkeys(PERIODS, (70, 5))
            with pytest.raises(BudgetError) as refused:
                await store.reserve("too much", ["global"], 26)
            assert refused.value.resets_s == NOON + 50 * MINUTE
            await spend(store, "fits", 25)
            await store.settle(held, LedgerRow(request_id="held", cost_nano=5))
            assert await stands(store) == dict.fromkeys(PERIODS, (100, 0))
            clock.now = NOON + 55 * MINUTE
            assert (await stands(store))["hour"] == (60 if leap_s == HOUR else 0, 0)
            await spend(store, "next hour", 40)
            clock.now = NOON + 110 * MINUTE
            await spend(store, "the hour after", 100)

    asyncio.run(main())


def test_a_limit_that_is_set_while_the_period_lies_ahead_is_of_now(url):
    async def main():
        clock = Clock()
        async with open_store(url, clock=clock) as store:
            await store.set_budget("global", 100, "day")
            clock.now += YEAR
            await spend(store, "ahead", 60)
            clock.now = NOON
            budget = await store.set_budget("global", 200, "day")
            assert (budget.limit_nano, budget.spent_nano, budget.window_us) == (
                200,
                60,
                int((NOON - 730 * MINUTE) * 1e6),
            )

    asyncio.run(main())


def test_a_clock_that_ran_behind_once_forgets_nothing(url):
    """Of 100 a day 70 are spent; then the clock is a day back, and right again: 30 are left."""

    async def main():
        clock = Clock()
        async with open_store(url, clock=clock) as store:
            await store.set_budget("global", 100, "day")
            await spend(store, "today", 70)
            clock.now -= DAY
            with pytest.raises(BudgetError):
                await spend(store, "too much", 31)
            await spend(store, "yesterday, it says", 20)
            clock.now = NOON
            assert await stands(store) == {"day": (70, 0)}
            with pytest.raises(BudgetError):
                await spend(store, "still too much", 31)

    asyncio.run(main())


@pytest.mark.parametrize("apart_s", [2 * MINUTE, 20 * MINUTE])
def test_replicas_whose_clocks_differ_do_not_make_each_other_forget(url, apart_s):
    """Around the end of an hour, one is in the next already: together they spend no more than two hours' worth."""

    async def main():
        late = Clock(NOON + 40 * MINUTE)
        early = Clock(late.now + apart_s)
        async with open_store(url, clock=late) as one, open_store(url, clock=early) as two:
            await one.set_budget("global", 100, "hour")
            granted = 0
            for number in range(60):
                for store in (one, two):
                    try:
                        await spend(store, f"{id(store)}-{number}", 10)
                        granted += 10
                    except BudgetError:
                        pass
                late.now += MINUTE / 3
                early.now += MINUTE / 3
            assert 100 < granted <= 200

    asyncio.run(main())


def test_the_clock_of_a_key_s_end_is_that_of_now(url):
    async def main():
        clock = Clock()
        async with open_store(url, clock=clock) as store:
            secret, _ = await store.create_key("k", expires_s=NOON + HOUR)
            clock.now += YEAR
            assert await store.key_of(secret) is None
            clock.now = NOON
            assert await store.key_of(secret) is not None

    asyncio.run(main())
