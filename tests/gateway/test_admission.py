"""Who may enter: first by the counts of the process, then by those that processes share; and nothing is counted of who was not let in."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import RateError
from anabranch.gateway.config import LimitsConfig
from anabranch.gateway.core.admission import Admission, Limits, limits_of
from anabranch.gateway.in_flight import InFlight, refusal_of_many
from anabranch.gateway.store import KeyRecord, RateLimits


class Counts:
    """What is asked of shared counts. They refuse the requests whose ids they were told."""

    def __init__(self, refused=()):
        self.refused, self.told = set(refused), []

    async def admit(self, whose, id, tokens, limits):
        await asyncio.sleep(0)
        self.told.append(("admit", whose, id, tokens))
        if id in self.refused:
            raise refusal_of_many(limits.most or 1)
        return limits.tpm is not None

    async def look(self, whose, limits):
        self.told.append(("look", whose))

    def level(self, whose, limit, per_minute):
        return None

    def leave(self, whose, id):
        self.told.append(("leave", whose, id))

    def correct(self, whose, tokens, tpm):
        self.told.append(("correct", whose, tokens, tpm))


def made(shared=None):
    now = [0.0]
    rates, senders = RateLimits(lambda: now[0]), InFlight()
    return Admission(rates, senders, shared), rates, senders


def test_what_others_refuse_has_cost_nothing_here():
    async def main():
        shared = Counts(refused={"b"})
        door, _, senders = made(shared)
        limits = Limits(2, 10, 2)
        await door.enter("k", "a", 4, limits)
        with pytest.raises(RateError):
            await door.enter("k", "b", 6, limits)
        assert senders._counts == {"k": 1}
        await door.enter("k", "c", 6, limits)
        with pytest.raises(RateError, match="2 requests under way"):
            await door.enter("k", "d", 0, limits)
        door.leave("k", "a")
        door.leave("k", "c")
        assert senders._counts == {}
        # Who has no room here is not asked about elsewhere.
        with pytest.raises(RateError, match="2 requests a minute"):
            await door.enter("k", "e", 0, limits)
        assert [told[2] for told in shared.told if told[0] == "admit"] == ["a", "b", "c"]
        assert [told[2] for told in shared.told if told[0] == "leave"] == ["a", "c"]

    asyncio.run(main())


def test_who_leaves_before_an_answer_came_is_not_counted():
    async def main():
        door, _, senders = made(Counts())
        task = asyncio.ensure_future(door.enter("k", "a", 1, Limits(None, None, 1)))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert senders._counts == {}

    asyncio.run(main())


def test_nobody_is_asked_about_a_key_without_limits():
    async def main():
        shared = Counts()
        door, _, _ = made(shared)
        assert not await door.enter("k", "a", 1, Limits(None, None, None))
        await door.look("k", Limits(None, None, None))
        await door.count("k", "f", Limits(None, 5, 5))
        door.correct("k", 7, None, is_shared=True)
        door.correct("k", 7, 100, is_shared=False)
        assert shared.told == []
        door.correct("k", 7, 100, is_shared=True)
        await door.look("k", Limits(1, None, None))
        await door.count("k", "f", Limits(1, 5, 5))
        assert shared.told == [("correct", "k", 7, 100), ("look", "k"), ("admit", "k", "f", 0)]

    asyncio.run(main())


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=30))
def test_giving_back_undoes_taking(steps):
    now = [0.0]
    rates, plain = RateLimits(lambda: now[0]), RateLimits(lambda: now[0])
    for tokens, is_given_back in steps:
        now[0] += 0.5
        try:
            rates.admit("k", tokens, rpm=5, tpm=20)
        except RateError:
            with pytest.raises(RateError):
                plain.admit("k", tokens, rpm=5, tpm=20)
            continue
        if is_given_back:
            rates.give_back("k", tokens, rpm=5, tpm=20)
        else:
            plain.admit("k", tokens, rpm=5, tpm=20)


def test_limits_are_the_keys_own_and_else_the_gateways():
    config = LimitsConfig(rpm=5, max_in_flight=3)
    assert limits_of(None, config) == Limits(5, None, 3)
    assert limits_of(KeyRecord(id="k", rpm=7, tpm=9), config) == Limits(7, 9, 3)
    assert not limits_of(KeyRecord(id="k"), LimitsConfig()).has_any
