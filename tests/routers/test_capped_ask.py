"""An `Ask` with a cap: whatever calls cost, fail and overlap, their sum stays below it."""

import asyncio
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import BackendError, LimitError
from anabranch.routers import Answered
from anabranch.routers.contract.ask import Arm, Said, Spent
from anabranch.routers.contract.query import Model, Pool
from anabranch.routers.money import Price
from anabranch.routers.strategies.capped_ask import CappedAsk

POOL = Pool((Model(name="small", price=Price.of_dollars(1, 2)),))
TEXT = "How many are there?"


class Paid:
    """Calls that take a moment and cost what they are told, in millionths; one of None fails, and one of text has no room."""

    def __init__(self, *costs):
        self.costs, self.asked, self.failed, self.total, self.left = list(costs), 0, 0, 0.0, math.inf

    async def __call__(self, arm, messages, **how):
        cost = self.costs[min(self.asked, len(self.costs) - 1)]
        self.asked += 1
        await asyncio.sleep(0)
        if isinstance(cost, str):
            raise LimitError(cost)
        if cost is None:
            self.failed += 1
            raise BackendError("down")
        self.total += cost * 1e-6
        return Answered.saying("4", cost=cost * 1e-6)


class Told(Paid):
    """One that knows what a call costs at most, and what all have cost: each that failed 5 millionths."""

    bounds: tuple = ()

    async def most(self, arm, messages, **how):
        return 20e-6

    def bound(self, usd, name):
        self.bounds = (*self.bounds, (usd, name))

    @property
    def spent(self):
        return Spent(cost=1.0 + self.total + self.failed * 5e-6)


def made(ask, cap):
    return CappedAsk(ask, cap, "best_of.max_usd", POOL)


def called(capped, count, **how):
    """What became of so many calls at once: an answer's cost in millionths, or a kind of error."""

    async def all_of_them():
        calls = (capped("small", TEXT, **{"max_tokens": 10, **how}) for _ in range(count))
        return await asyncio.gather(*calls, return_exceptions=True)

    return [
        type(one).__name__ if isinstance(one, Exception) else round(one.cost * 1e6)
        for one in asyncio.run(all_of_them())
    ]


def test_the_most_that_a_call_may_cost():
    capped = made(Paid(1), 1.0)
    most = asyncio.run(capped.most("small", TEXT, max_tokens=10))
    # No more tokens than bytes, and an end of ten tokens at two millionths each.
    assert len(TEXT) * 1e-6 + 20e-6 < most < 300e-6
    longer = asyncio.run(capped.most(Arm("small", {"max_completion_tokens": 30}), TEXT + "x" * 100))
    assert longer > most + 100e-6 + 30e-6
    assert asyncio.run(capped.most("other", TEXT)) == math.inf
    assert asyncio.run(made(Paid(1), None).most("other", TEXT)) == 0.0


def test_those_under_way_count_with_the_most_that_they_may_cost():
    ask = Told(8)
    capped = made(ask, 65e-6)
    # Three at 20 fit, whatever they turn out to cost; then 41 are left for two more.
    assert called(capped, 5) == [8, 8, 8, "BudgetError", "BudgetError"]
    assert capped.spent == pytest.approx(24e-6)
    assert called(capped, 3) == [8, 8, "BudgetError"]
    assert capped.room == pytest.approx(25e-6)
    assert ask.bounds == ((65e-6, "best_of.max_usd"),)
    assert called(capped, 1) == [8]
    said = r"best_of\.max_usd is \$6\.5e-05, of which \$1\.7e-05 is left, and what comes next may cost \$2e-05"
    with pytest.raises(LimitError, match=said):
        asyncio.run(capped("small", TEXT))


def test_calls_that_fail_cost_what_is_known_of_them():
    # One that knows says it; of one that does not, the most is taken.
    capped = made(Told(None), 65e-6)
    assert called(capped, 2) == ["BackendError"] * 2
    assert capped.spent == pytest.approx(10e-6)
    capped = made(Paid(None), 65e-5)
    most = asyncio.run(capped.most("small", TEXT, max_tokens=10))
    assert called(capped, 1) == ["BackendError"]
    assert capped.spent == most
    # What was not made has cost nothing.
    capped = made(Paid("no room"), 65e-5)
    assert called(capped, 1) == ["LimitError"]
    assert capped.spent == 0.0


def streamed(capped, **how):
    async def all_of_it():
        return [piece async for piece in capped.stream("small", TEXT, purpose="answer", **how)]

    return asyncio.run(all_of_it())


def test_an_answer_that_is_streamed_is_a_call_like_others():
    class Streams(Paid):
        async def stream(self, arm, messages, **how):
            assert how.pop("purpose") == "answer"
            found = await self(arm, messages, **how)
            yield Said("4")
            yield found

    ask = Streams(100)
    capped = made(ask, 400e-6)
    assert [type(piece).__name__ for piece in streamed(capped, max_tokens=10)] == ["Said", "Answered"]
    assert (capped.spent, ask.asked) == (pytest.approx(100e-6), 1)
    with pytest.raises(LimitError, match=r"best_of\.max_usd is"):
        streamed(capped, max_tokens=1000)
    assert ask.asked == 1
    # One that fails cost what it may have, and one whose reader goes away too.
    failing = made(Streams(None), 400e-6)
    most = asyncio.run(failing.most("small", TEXT, max_tokens=10))
    with pytest.raises(BackendError):
        streamed(failing, max_tokens=10)
    assert failing.spent == most

    async def leaves():
        pieces = left.stream("small", TEXT, max_tokens=10, purpose="answer")
        await anext(pieces)
        held = left.spent
        await pieces.aclose()
        return held

    left = made(Streams(100), 400e-6)
    assert asyncio.run(leaves()) == left.spent == most


def test_without_a_cap_nobody_is_held_back():
    ask = Told(None, 3)
    capped = made(ask, None)
    assert called(capped, 9) == ["BackendError"] + [3] * 8
    assert ask.bounds == ()
    assert capped.spent == pytest.approx(29e-6)


@given(
    costs=st.lists(st.integers(0, 20) | st.none(), min_size=1, max_size=40),
    batches=st.lists(st.integers(1, 6), min_size=1, max_size=8),
    cap=st.integers(1, 300),
)
def test_the_sum_never_passes_the_cap(costs, batches, cap):
    ask = Told(*costs)
    capped = made(ask, cap * 1e-6)
    for count in batches:
        called(capped, count)
        assert ask.spent.cost - 1.0 <= cap * 1e-6 + 1e-12
        assert capped.spent == pytest.approx(ask.spent.cost - 1.0, abs=1e-12)
