"""Engines in this process: lent to all who ask for the same, and ended when the last gives it back."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.errors import CapacityError
from anabranch.gateway.providers.local_engines import LocalEngines, local_engines


class Fake:
    """Notes its life."""

    def __init__(self, made, *, fails=False, start_s=0.0):
        self.made, self.fails, self.start_s, self.has_failed = made, fails, start_s, False
        self.state = "made"
        made.append(self)

    async def start(self):
        try:
            await asyncio.sleep(self.start_s)
        except asyncio.CancelledError:
            self.state = "stopped"
            raise
        if self.fails:
            raise CapacityError("no memory")
        self.state = "ready"

    async def close(self):
        assert self.state == "ready"
        self.state = "closed"


def test_the_same_is_lent_to_all_and_ended_by_the_last():
    made = []

    async def work():
        engines = local_engines()
        assert local_engines() is engines
        one, other, apart = await asyncio.gather(*(engines.lend(name, lambda: Fake(made)) for name in "aab"))
        assert one is other is not apart
        await engines.give_back("a", one)
        assert one.inside.state == "ready"
        await engines.give_back("a", other)
        assert (one.inside.state, apart.inside.state) == ("closed", "ready")
        assert (await engines.lend("a", lambda: Fake(made))) is not one
        await engines.give_back("b", apart)

    asyncio.run(work())
    assert [one.state for one in made] == ["closed", "closed", "ready"]


def test_each_event_loop_has_its_own():
    async def own():
        return local_engines()

    assert asyncio.run(own()) is not asyncio.run(own())


def test_one_that_cannot_start_tells_all_who_wait_and_is_tried_anew():
    made = []

    async def work():
        engines = LocalEngines()
        told = await asyncio.gather(
            *(engines.lend("a", lambda: Fake(made, fails=True)) for _ in range(3)), return_exceptions=True
        )
        assert [str(one) for one in told] == ["no memory"] * 3
        assert (await engines.lend("a", lambda: Fake(made))).inside.state == "ready"

    asyncio.run(work())
    assert len(made) == 2


def test_who_waits_no_longer_leaves_it_to_others_and_the_last_stops_it():
    made = []

    async def work():
        engines = LocalEngines()
        waits = [asyncio.create_task(engines.lend("a", lambda: Fake(made, start_s=60))) for _ in range(2)]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        waits[0].cancel()
        await asyncio.wait({waits[0]})
        assert made[0].state == "made"
        waits[1].cancel()
        await asyncio.wait({waits[1]})
        assert made[0].state == "stopped"

    asyncio.run(work())


def test_one_that_was_given_up_is_not_lent_again():
    made = []

    async def work():
        engines = LocalEngines()
        old = await engines.lend("a", lambda: Fake(made))
        old.inside.has_failed = True
        new = await engines.lend("a", lambda: Fake(made))
        assert new is not old
        await engines.give_back("a", old)
        assert (await engines.lend("a", lambda: Fake(made))) is new

    asyncio.run(work())
    assert [one.state for one in made] == ["closed", "ready"]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), max_size=40))
def test_as_many_are_there_as_are_lent(steps):
    """Whatever is lent and given back, in whatever order: one of a kind that somebody has, none of others."""
    made = {name: [] for name in "abc"}

    async def work():
        engines, lent = LocalEngines(), {name: [] for name in "abc"}
        for name, is_lent in steps:
            if is_lent:
                lent[name].append(await engines.lend(name, lambda name=name: Fake(made[name])))
            elif lent[name]:
                await engines.give_back(name, lent[name].pop())
            for each in "abc":
                ready = [one for one in made[each] if one.state == "ready"]
                assert len(ready) == bool(lent[each])
                assert all(one.inside is ready[0] for one in lent[each])

    asyncio.run(work())


def test_an_engine_that_others_have_is_not_ended_by_who_could_not_wait():
    made = []

    async def work():
        engines = LocalEngines()
        first = asyncio.create_task(engines.lend("a", lambda: Fake(made, start_s=0.01)))
        second = asyncio.create_task(engines.lend("a", lambda: Fake(made)))
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert (await second).inside.state == "ready"

    asyncio.run(work())
