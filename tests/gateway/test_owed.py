"""Orders that a strategy fails at keep no other from it, whatever comes in which order."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway import owed as module
from anabranch.gateway.owed import Owed


def order(tenant):
    return {"tenant": tenant, "user": None, "decision": None}


class Forgets:
    """A strategy that fails at orders of some tenants, and takes as long as it is told for those of others."""

    def __init__(self):
        self.failing, self.told, self.slow = set(), [], {}

    async def __call__(self, order):
        tenant = order["tenant"]
        self.told.append(tenant)
        if tenant in self.slow:
            await self.slow[tenant].wait()
        if tenant in self.failing:
            raise ValueError(tenant)
        return 1


def owing(*tenants, failing=()):
    """What owes orders of tenants, which the strategy fails at by now only of some."""
    forgets = Forgets()
    owed, forgets.failing = Owed(forgets), set(tenants)

    async def fill():
        for tenant in tenants:
            with pytest.raises(ValueError, match=tenant):
                await owed.tell(order(tenant), 5)
        forgets.failing, forgets.told = set(failing), []

    return owed, forgets, fill


STEPS = st.lists(st.tuples(st.sampled_from(["tell", "again", "turn"]), st.sampled_from("abcd")), max_size=30)


@given(STEPS)
def test_what_is_owed_is_what_the_strategy_failed_at_last_and_each_round_tells_all_of_it(steps):
    async def main():
        forgets = Forgets()
        owed, expected = Owed(forgets), set()
        for step, tenant in steps:
            forgets.told = []
            if step == "turn":
                forgets.failing ^= {tenant}
            elif step == "tell":
                try:
                    assert await owed.tell(order(tenant), 5) == 1
                    expected.discard(tenant)
                except ValueError:
                    expected.add(tenant)
                assert forgets.told == [tenant]
            else:
                failed = []
                count = await owed.tell_again(5, failed.append)
                assert sorted(forgets.told) == sorted(expected)
                assert (count, len(failed)) == (len(expected - forgets.failing), len(expected & forgets.failing))
                expected &= forgets.failing
            assert {one for one in "abcd" if order(one) in owed} == expected
            assert (len(owed), bool(owed)) == (len(expected), bool(expected))

    asyncio.run(main())


def test_it_owes_no_more_than_so_many_and_is_told_of_more_all_the_same(monkeypatch):
    monkeypatch.setattr(module, "MOST", 2)
    owed, forgets, fill = owing("a", "b", failing="abc")

    async def main():
        await fill()
        assert await owed.tell(order("d"), 5) == 1
        assert not owed.is_over
        with pytest.raises(ValueError, match="c"):
            await owed.tell(order("c"), 5)
        assert (len(owed), owed.is_over) == (2, True)
        forgets.failing = set()
        assert await owed.tell_again(5, pytest.fail) == 2
        # Nobody knows what it was not told of again.
        assert (len(owed), bool(owed)) == (0, True)

    asyncio.run(main())


def test_what_takes_long_is_obeyed_in_the_end_and_once():
    async def main():
        forgets = Forgets()
        owed, forgets.slow["a"] = Owed(forgets), asyncio.Event()
        for _ in range(2):
            with pytest.raises(TimeoutError):
                await owed.tell_again(0.01, _raised) if owed else await owed.tell(order("a"), 0.01)
        assert forgets.told == ["a"]
        # One that comes now knows of what came since the first was begun.
        again = asyncio.ensure_future(owed.tell(order("a"), 5))
        await asyncio.sleep(0.01)
        assert forgets.told == ["a", "a"]
        forgets.slow["a"].set()
        assert await again == 1
        assert not owed

    asyncio.run(main())


def _raised(error):
    raise error


def test_a_round_lasts_so_long_and_the_next_begins_with_what_it_had_no_time_for():
    owed, forgets, fill = owing("a", "b", "c")

    async def main():
        await fill()
        forgets.slow["a"] = asyncio.Event()
        failed = []
        assert await owed.tell_again(0.05, failed.append) == 0
        assert [type(one) for one in failed] == [TimeoutError]
        assert forgets.told == ["a"]
        forgets.failing = {"a"}
        forgets.slow["a"].set()
        await asyncio.sleep(0.01)
        forgets.told = []
        assert await owed.tell_again(5, failed.append) == 2
        assert forgets.told == ["b", "c", "a"]

    asyncio.run(main())


def test_without_time_it_is_owed_and_not_begun():
    async def main():
        forgets = Forgets()
        owed = Owed(forgets)
        with pytest.raises(TimeoutError):
            await owed.tell(order("a"), 0)
        assert (forgets.told, len(owed)) == ([], 1)

    asyncio.run(main())


def test_what_another_owes_is_taken_over_once():
    owed, _, fill = owing("a", "b")
    other, _, fill_other = owing("b", "c")

    async def main():
        await fill()
        await fill_other()
        owed.take_over(other)
        assert len(owed) == 3

    asyncio.run(main())
    assert order("c") in owed


def test_of_what_another_owes_no_more_is_taken_over_than_it_may_owe(monkeypatch):
    monkeypatch.setattr(module, "MOST", 3)
    owed, _, fill = owing("a", "b")
    other, _, fill_other = owing("b", "c", "d")

    async def main():
        await fill()
        await fill_other()
        owed.take_over(other)

    asyncio.run(main())
    assert [order(tenant) in owed for tenant in "abcd"] == [True, True, True, False]


def test_an_order_that_is_obeyed_while_a_round_goes_on_counts_once():
    owed, forgets, fill = owing("a", "b")

    async def main():
        await fill()
        forgets.slow["a"] = asyncio.Event()
        going_on = asyncio.ensure_future(owed.tell_again(60, pytest.fail))
        await asyncio.sleep(0)
        assert await owed.tell(order("b"), 60) == 1
        forgets.slow["a"].set()
        # That of a.
        assert await going_on == 1
        assert sorted(forgets.told) == ["a", "b"]
        assert not owed

    asyncio.run(main())
