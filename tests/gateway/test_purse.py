"""One request's money: what is held at once never passes what is set aside, and all of it comes back."""

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import BudgetError, InputError
from anabranch.gateway.core.purse import Purse
from anabranch.gateway.store import Reservation


class Till:
    """A store with one budget, for one request: its id is reserved once, and what is set aside only grows."""

    def __init__(self, limit=10**9, wait=None):
        self.limit, self.wait = limit, wait
        self.nano = None
        self.asked = []

    async def _answer(self, nano):
        self.asked.append(nano)
        await (asyncio.sleep(0) if self.wait is None else self.wait.wait())
        if nano > self.limit:
            raise BudgetError(
                "full",
                subject="global",
                period="total",
                limit_nano=self.limit,
                remaining_nano=0,
                resets_s=None,
                retry_after_s=None,
            )
        self.nano = nano
        return Reservation("r", ("global",), nano)

    async def reserve(self, nano):
        assert self.nano is None, "the id is in use"
        return await self._answer(nano)

    async def grow(self, reservation, nano):
        assert nano > self.nano >= reservation.nano
        return await self._answer(nano)

    def purse(self, limit_nano=None):
        return Purse(self.reserve, self.grow, limit_nano)


def test_a_bound_is_a_limit_from_where_it_is_set():
    async def main():
        purse = Till().purse(limit_nano=100)
        purse.end(await purse.hold(30), 20)
        held = await purse.hold(10)
        purse.bound(40, "best_of.max_usd")
        purse.bound(500, "other")
        with pytest.raises(
            BudgetError,
            match=r"may cost \$0\.00000007 in all \(best_of\.max_usd\); this one has \$0\.00000004 of it left",
        ):
            await purse.hold(41)
        await purse.hold(40)
        assert (purse.held_nano, held.nano) == (50, 10)

    asyncio.run(main())


def test_a_purse_by_hand():
    async def main():
        till = Till(limit=100)
        purse = till.purse()
        assert purse.is_empty
        first = await purse.hold(40)
        second = await purse.hold(30)
        assert (till.nano, purse.held_nano, purse.spent_nano) == (70, 70, 0)
        purse.end(first, 10)
        assert (till.nano, purse.held_nano, purse.spent_nano, first.nano, first.most_nano) == (70, 30, 10, 0, 40)
        # 10 spent and 30 held leave 30 of what is set aside already.
        third = await purse.hold(30)
        assert till.asked == [40, 70]
        with pytest.raises(BudgetError):
            await purse.hold(31)
        assert (till.nano, purse.held_nano, purse.spent_nano) == (70, 60, 10)
        assert await purse.can_raise(third, 60)
        assert not await purse.can_raise(third, 61)
        assert await purse.can_raise(third, 5)
        assert (third.nano, third.most_nano, till.nano) == (60, 60, 100)
        purse.lower_to(second, 7)
        purse.lower_to(second, 9)
        assert (second.nano, purse.held_nano) == (7, 67)
        purse.end(second, 7)
        purse.end(third, 0)
        assert (purse.held_nano, purse.spent_nano) == (0, 17)
        settled = []
        purse.close(settled.append)
        assert [one.nano for one in settled] == [100]
        with pytest.raises(InputError, match="over"):
            await purse.hold(1)

    asyncio.run(main())


def test_two_holds_at_once_reserve_the_id_once_and_share_nothing():
    async def main():
        till = Till(limit=100)
        purse = till.purse()
        found = await asyncio.gather(purse.hold(60), purse.hold(60), purse.hold(40), return_exceptions=True)
        assert [isinstance(one, BudgetError) for one in found] == [False, True, False]
        assert till.nano == purse.held_nano == 100

    asyncio.run(main())


def test_the_first_may_be_refused_and_the_next_not():
    async def main():
        till = Till(limit=100)
        purse = till.purse()
        found = await asyncio.gather(purse.hold(101), purse.hold(100), return_exceptions=True)
        assert isinstance(found[0], BudgetError)
        assert till.nano == purse.held_nano == 100

    asyncio.run(main())


@pytest.mark.parametrize("first", [20, 200])
def test_who_asked_first_may_go_and_the_request_keeps_its_id(first):
    """A strategy runs out of time while its money is being set aside, or refused; the request has to go on."""

    async def main():
        till = Till(limit=100, wait=asyncio.Event())
        purse = till.purse()
        one = asyncio.create_task(purse.hold(first))
        await asyncio.sleep(0)
        other = asyncio.create_task(purse.hold(50))
        await asyncio.sleep(0)
        one.cancel()
        await asyncio.wait({one})
        assert one.cancelled()
        assert not purse.is_empty
        till.wait.set()
        hold = await other
        assert (hold.nano, purse.held_nano, till.nano) == (50, 50, 50)
        assert till.asked == [first, 50]

    asyncio.run(main())


@pytest.mark.parametrize("limit", [100, 10])
def test_what_is_set_aside_as_the_request_ends_is_settled_too(limit):
    async def main():
        till = Till(limit=limit, wait=asyncio.Event())
        purse, settled = till.purse(), []
        one = asyncio.create_task(purse.hold(20))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        purse.close(settled.append)
        assert settled == []
        till.wait.set()
        with pytest.raises(InputError if limit == 100 else BudgetError):
            await one
        assert [None if held is None else held.nano for held in settled] == [20 if limit == 100 else None]
        assert purse.held_nano == 0

    asyncio.run(main())


def test_a_purse_that_nobody_used_settles_nothing():
    async def main():
        settled = []
        Till().purse().close(settled.append)
        assert settled == [None]

    asyncio.run(main())


def test_what_costs_nothing_is_set_aside_all_the_same():
    """Its reservation is what a gateway that dies leaves of it."""

    async def main():
        till = Till(limit=0)
        await till.purse().hold(0)
        assert till.asked == [0]

    asyncio.run(main())


def test_a_request_has_a_limit_of_its_own():
    async def main():
        till = Till()
        purse = till.purse(limit_nano=1_000)
        hold = await purse.hold(600)
        purse.end(hold, 300)
        with pytest.raises(BudgetError) as refused:
            await purse.hold(701)
        assert str(refused.value) == (
            "a request may cost $0.000001 in all (limits.request_usd); this one has $0.0000007 of it left, and what comes next may "
            "cost $0.000000701"
        )
        assert (refused.value.limit_nano, refused.value.remaining_nano) == (1_000, 700)
        await purse.hold(700)
        assert till.asked == [600, 1_000]

    asyncio.run(main())


def test_a_block_gives_back_what_it_did_not_need_however_it_ends():
    async def main():
        purse = Till().purse()

        async def call():
            async with purse.holding(50) as hold:
                hold.cost_nano = 8
                raise RuntimeError("broke")

        with pytest.raises(RuntimeError):
            await call()
        assert (purse.held_nano, purse.spent_nano) == (0, 8)

    asyncio.run(main())


CALLS = st.lists(
    st.tuples(st.integers(0, 50), st.integers(0, 50), st.integers(0, 3), st.booleans(), st.booleans()), max_size=12
)


@settings(max_examples=60, deadline=None)
@given(CALLS, st.integers(0, 200), st.none() | st.integers(0, 200), st.integers(0, 2**32))
def test_held_and_spent_never_pass_what_is_set_aside(calls, limit, own, seed):
    """Random calls at once, which are raised, fail, and are cancelled at any moment."""
    draw = random.Random(seed)

    async def main():
        till = Till(limit)
        purse = till.purse(own)

        def check():
            assert purse.held_nano + purse.spent_nano <= (till.nano or 0) <= limit
            assert purse.held_nano + purse.spent_nano <= (limit if own is None else own)

        async def call(nano, cost, waits, raises, fails):
            async with purse.holding(nano) as hold:
                check()
                for _ in range(waits):
                    await asyncio.sleep(0)
                    check()
                if raises:
                    await purse.can_raise(hold, nano * 2)
                    check()
                hold.cost_nano = min(cost, hold.nano)
                if fails:
                    raise RuntimeError("broke")

        tasks = [asyncio.create_task(call(*one)) for one in calls]
        for _ in range(draw.randrange(12)):
            await asyncio.sleep(0)
            check()
        for task in tasks:
            if draw.random() < 0.2:
                task.cancel()
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(one is None or isinstance(one, BudgetError | RuntimeError | asyncio.CancelledError) for one in found)
        settled = []
        purse.close(settled.append)
        for _ in range(10):
            await asyncio.sleep(0)
        assert purse.held_nano == 0
        assert [None if one is None else one.nano for one in settled] == [till.nano]

    asyncio.run(main())
