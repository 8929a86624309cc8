"""What processes share on a real Redis: rates, requests under way, breakers, answers; and what becomes of them while it is away."""

import asyncio
import contextlib
import logging

import numpy as np
import pytest

from anabranch.errors import RateError
from anabranch.gateway.cache import Entry
from anabranch.gateway.caches import Caches
from anabranch.gateway.config import CacheConfig
from anabranch.gateway.config.shared import SharedConfig
from anabranch.gateway.core.admission import Admission, Limits
from anabranch.gateway.dispatch import Deployment, Dispatcher, Group
from anabranch.gateway.in_flight import InFlight
from anabranch.gateway.metrics import Metrics
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.shared import AwayError, clears, leases, link
from anabranch.gateway.store import RateLimits
from redis_process import end_leases, needs_redis, processes, redis_server, wait_for_it

pytestmark = needs_redis

NONE = Limits(None, None, None)


def admissions(shared):
    return [Admission(RateLimits(), InFlight(), one.counts) for one in shared]


async def told(work):
    """The limit that is in the way; "" for none."""
    try:
        await work
    except RateError as error:
        return error.limit
    return ""


# Rates


def test_a_key_has_its_rate_once_however_many_processes_it_asks(server, prefix):
    async def main():
        async with processes(server, prefix, 3) as shared:
            doors = admissions(shared)
            limits = Limits(6, None, None)
            asked = [told(doors[at % 3].enter("k1", f"r{at}", 1, limits)) for at in range(30)]
            found = await asyncio.gather(*asked)
            assert (found.count(""), found.count("rpm")) == (6, 24)
            # Others have theirs.
            assert await told(doors[0].enter("k2", "r", 1, limits)) == ""
            with pytest.raises(RateError, match="may use 6 requests a minute; try again in") as caught:
                await doors[1].enter("k1", "x", 1, limits)
            assert 0 < caught.value.retry_after_s <= 10.5

    asyncio.run(main())


def test_tokens_are_counted_together_and_corrected(server, prefix):
    async def main():
        async with processes(server, prefix) as shared:
            one, two = admissions(shared)
            limits = Limits(None, 100, None)
            await one.enter("k", "a", 60, limits)
            assert await told(two.enter("k", "b", 60, limits)) == "tpm"
            with pytest.raises(RateError, match="more than the 100 a minute") as caught:
                await two.enter("k", "b", 101, limits)
            assert caught.value.retry_after_s is None
            one.correct("k", -60, 100, is_shared=True)
            await shared[0].counts.tell()
            await two.enter("k", "b", 99, limits)
            two.correct("k", 10_000, 100, is_shared=True)
            await shared[1].counts.tell()
            with pytest.raises(RateError) as caught:
                await one.enter("k", "c", 1, limits)
            # It is worked off: a hundred a minute.
            assert 5_900 < caught.value.retry_after_s < 6_100

    asyncio.run(main())


def test_what_is_left_is_what_all_processes_have_left(server, prefix):
    async def main():
        async with processes(server, prefix) as shared:
            one, two = admissions(shared)
            limits = Limits(6, 6000, None)
            for at in range(4):
                await one.enter("k", f"r{at}", 100, limits)
            assert one.left("k", limits)["requests"].remaining == 2
            # It has not been told yet, and learns of it with the next request.
            assert two.left("k", limits)["requests"].remaining == 6
            await two.enter("k", "s", 100, limits)
            left = two.left("k", limits)
            assert left["requests"].remaining == 1
            assert 5500 <= left["tokens"].remaining <= 5600
            two.correct("k", 1000, 6000, is_shared=True)
            assert 4500 <= two.left("k", limits)["tokens"].remaining <= 4600
            await one.enter("k", "t", 0, limits)
            assert await told(two.enter("k", "u", 0, limits)) == "rpm"
            assert two.left("k", limits)["requests"].remaining == 0

    asyncio.run(main())


def test_what_was_not_taken_is_not_given_back(server, prefix):
    """A key had its tokens twice after Redis was away: what it never took was given back to it."""

    async def main():
        async with processes(server, prefix, 1) as [shared]:
            [door], limits = admissions([shared]), Limits(None, 1000, None)
            assert await shared.counts.admit("k", "a", 900, limits)
            shared.link.is_up = False
            is_shared = await door.enter("k", "b", 900, limits)
            assert not is_shared
            shared.link.is_up = True
            door.correct("k", -890, 1000, is_shared=is_shared)
            await shared.counts.tell()
            assert await told(shared.counts.admit("k", "c", 900, limits)) == "tpm"
            # Nor is it charged what came beside it: of all that, Redis knows nothing.
            door.correct("k", 10_000, 1000, is_shared=is_shared)
            await shared.counts.tell()
            assert await told(shared.counts.admit("k", "c", 50, limits)) == ""
            # What was taken is.
            shared.counts.correct("k", -890, 1000)
            await shared.counts.tell()
            assert await told(shared.counts.admit("k", "d", 900, limits)) == ""
            # Of a key without that limit nothing is taken.
            assert not await door.enter("l", "a", 900, Limits(9, None, None))

    asyncio.run(main())


@pytest.mark.parametrize("num_done", [1, 2, 4])
def test_what_is_told_again_counts_once(server, prefix, num_done):
    """What Redis did, but answered too late, is told again: a correction took its tokens twice, or gave them back twice."""

    async def main():
        async with processes(server, prefix, 1) as [shared]:
            limited = Deployment(name="d", provider=Mock.Config(model="m"), tpm=100_000)
            assert await shared.counts.admit("k", "1", 10_000, Limits(None, 100_000, None))
            await shared.rooms.take(limited, "1", 10_000)
            for amount in (30_000, -20_000, 5_000, 1_000):
                shared.counts.correct("k", amount, 100_000)
                shared.rooms.corrected(limited, amount, 0.0)
            for one in (shared.counts, shared.rooms):

                async def lost(client, one=one, some=tuple(one._untold[:num_done])):
                    await one._told(client, some)

                # Done there, and the answer is lost; the same may come once more, even later than all that is told again.
                await shared.link.run(lost)
                await one.tell()
                await shared.link.run(lost)
            level, spent = await shared.link.run(
                lambda client: _levels(client, shared.counts._keys("k")[1], shared.rooms._keys("d")[1])
            )
            # It fills up by 1,667 a second.
            assert 74_000 <= level < 84_000
            assert spent == 26_000
            # Another process has numbers of its own.
            async with processes(server, prefix, 1) as [other]:
                other.rooms.spent(limited, 500)
                await other.rooms.tell()
                _, spent = await shared.link.run(lambda client: _levels(client, "none", shared.rooms._keys("d")[1]))
                assert spent == 26_500

    asyncio.run(main())


async def _levels(client, bucket, sums):
    return float((await client.hget(bucket, "level")) or 0), sum(map(int, await client.hvals(sums)))


def test_what_redis_did_while_it_was_too_slow_to_say_so_is_not_done_again(server, prefix):
    async def main():
        async with processes(server, prefix, 1) as [shared]:
            assert await shared.counts.admit("k", "1", 10, Limits(None, 100_000, None))
            shared.counts.correct("k", 50_000, 100_000)
            server.hang()
            wait_for_it([shared], 0.2)
            try:
                with pytest.raises(AwayError):
                    await shared.counts.tell()
            finally:
                server.go_on()
                wait_for_it([shared], 5.0)
            shared.link._retry_at = 0
            while not shared.link.is_up:
                await shared.link.look()
            await shared.counts.tell()
            level, _ = await shared.link.run(lambda client: _levels(client, shared.counts._keys("k")[1], "none"))
            assert 49_000 < level < 80_000

    asyncio.run(main())


def test_both_limits_are_taken_from_or_none_and_what_is_refused_is_given_back_here(server, prefix):
    async def main():
        async with processes(server, prefix) as shared:
            one, two = admissions(shared)
            await one.enter("k", "a", 80, Limits(2, 100, None))
            # Refused for its tokens by what the other took: it has cost neither a request nor anything here.
            assert await told(two.enter("k", "b", 80, Limits(2, 100, None))) == "tpm"
            assert await told(two.enter("k", "b", 5, Limits(2, 100, None))) == ""
            assert await told(two.enter("k", "c", 5, Limits(2, 100, None))) == "rpm"

    asyncio.run(main())


def test_a_look_takes_nothing(server, prefix):
    async def main():
        async with processes(server, prefix) as shared:
            one, two = admissions(shared)
            limits = Limits(1, 10, 1)
            for _ in range(5):
                await one.look("k", limits)
            await one.enter("k", "a", 1, limits)
            assert await told(two.look("k", limits)) == "max_in_flight"
            assert await told(two.look("k", Limits(1, 10, None))) == "rpm"
            assert await told(two.count("k", "f", limits)) == "rpm"

    asyncio.run(main())


# Requests under way


def test_requests_under_way_are_counted_together(server, prefix):
    async def main():
        async with processes(server, prefix) as shared:
            one, two = admissions(shared)
            limits = Limits(None, None, 2)
            await one.enter("k", "a", 1, limits)
            await two.enter("k", "a", 1, limits)  # the same id, in another process
            assert (
                await told(one.enter("k", "c", 1, limits))
                == await told(two.enter("k", "c", 1, limits))
                == "max_in_flight"
            )
            two.leave("k", "a")
            await shared[1].counts.tell()
            await one.enter("k", "c", 1, limits)
            assert await told(two.enter("k", "d", 1, limits)) == "max_in_flight"

    asyncio.run(main())


def test_leases_of_a_process_that_is_gone_end_and_those_of_one_that_lives_do_not(server, prefix, monkeypatch):
    monkeypatch.setattr(leases, "RENEW_S", 0.0)

    async def main():
        async with processes(server, prefix) as shared:
            gone, lives = admissions(shared)
            limits = Limits(None, None, 1)
            await gone.enter("k", "a", 1, limits)
            await lives.enter("other", "b", 1, limits)
            assert await told(lives.enter("k", "c", 1, limits)) == "max_in_flight"
            # Of both; whoever lives says so.
            await end_leases(shared[1].link, shared[1].counts._held_key("k"))
            await shared[1].counts.tell()
            assert await told(lives.enter("k", "c", 1, limits)) == ""
            assert await told(gone.enter("other", "d", 1, limits)) == "max_in_flight"

    asyncio.run(main())


def test_a_lease_of_a_process_that_is_gone_ends_beside_those_of_one_that_lives(server, prefix, monkeypatch):
    monkeypatch.setattr(leases, "RENEW_S", 0.0)

    async def main():
        async with processes(server, prefix) as shared:
            gone, lives = admissions(shared)
            limits = Limits(None, None, 2)
            await gone.enter("k", "a", 1, limits)
            await lives.enter("k", "b", 1, limits)
            assert await told(lives.enter("k", "c", 1, limits)) == "max_in_flight"
            # Of both; whoever lives says so.
            await end_leases(shared[1].link, shared[1].counts._held_key("k"))
            await shared[1].counts.tell()
            assert await told(lives.enter("k", "c", 1, limits)) == ""
            assert await told(gone.enter("k", "d", 1, limits)) == "max_in_flight"

    asyncio.run(main())


def test_who_is_cancelled_before_the_answer_has_come_gives_its_place_back(server, prefix):
    async def main():
        async with processes(server, prefix) as shared:
            one, two = admissions(shared)
            limits, script = Limits(None, None, 1), shared[0].link.script

            async def lost(*given):
                await script(*given)
                await asyncio.Event().wait()

            shared[0].link.script = lost
            task = asyncio.ensure_future(one.enter("k", "a", 1, limits))
            while await told(two.look("k", limits)) == "":
                await asyncio.sleep(0.001)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await shared[0].counts.tell()
            await two.enter("k", "b", 1, limits)

    asyncio.run(main())


def test_who_is_cancelled_while_it_is_asked_holds_no_place_and_no_answer_reaches_another(server, prefix):
    async def main():
        async with processes(server, prefix) as shared:
            one, two = admissions(shared)
            limits = Limits(None, None, 1)
            for number in range(60):
                task = asyncio.ensure_future(one.enter("k", f"r{number}", 1, limits))
                for _ in range(number % 12):
                    await asyncio.sleep(0)
                if not task.cancel():
                    await task
                await asyncio.gather(task, return_exceptions=True)
                if not task.cancelled() and task.exception() is None:
                    one.leave("k", f"r{number}")
                await shared[0].counts.tell()
                # What comes is what was asked for.
                word = f"e{number}"
                assert await shared[0].link.run(lambda client, word=word: client.echo(word)) == word.encode()
            assert await told(two.enter("k", "x", 1, limits)) == ""

    asyncio.run(main())


# Away


@pytest.mark.parametrize("how", ["hang", "stop"])
def test_while_it_is_away_each_goes_on_with_its_own_and_says_so_once(prefix, caplog, monkeypatch, how):
    monkeypatch.setattr(link, "RETRY_S", 0.0)

    async def main(server):
        async with processes(server, prefix) as shared:
            one, two = admissions(shared)
            limits = Limits(2, None, 3)
            await one.enter("k", "a", 1, limits)
            getattr(server, how)()
            wait_for_it(shared, 0.1)
            asked = [told(door.enter("k", f"{at}", 1, limits)) for at in range(4) for door in (one, two)]
            found = await asyncio.gather(*asked)
            # What each has let in itself counts on.
            assert [found[0::2].count(""), found[1::2].count("")] == [1, 2]
            for one_shared in shared:
                assert not one_shared.link.is_up
                await one_shared.link.look()
                with pytest.raises(AwayError):
                    await one_shared.counts.tell() or await one_shared.link.run(lambda client: client.ping())
                assert await one_shared.answers.get("k", b"x") is None
            text = shared[0].link._metrics
            assert (text.up._value.get(), text.lost._value.get() > 0) == (0, True)
            server.go_on() if how == "hang" else server.start()
            wait_for_it(shared, 5.0)
            while not all(one_shared.link.is_up for one_shared in shared):
                for one_shared in shared:
                    await one_shared.link.look()
            assert text.up._value.get() == 1
            # And what was not told is told now: only those requests that are under way count.
            for door in (one, two):
                for id in [*"a0123"]:
                    door._shared.leave("k", id)
            for one_shared in shared:
                await one_shared.counts.tell()
            assert await told(shared[0].counts.admit("k", "z", 1, Limits(None, None, 1))) == ""

    with redis_server() as server, caplog.at_level(logging.WARNING):
        asyncio.run(main(server))
    said = [record.message for record in caplog.records if "Redis" in record.message]
    assert [line.startswith("Redis is away") for line in said] == [True, True, False, False]
    assert "each process goes on with limits, breakers and answers of its own" in said[0]


def test_it_is_looked_for_more_and_more_rarely_however_many_asked():
    """A name that cannot be resolved holds a thread for seconds each time."""

    async def main():
        clock, tries = Clock(), []
        made = link.Link(SharedConfig(url="redis://127.0.0.1:1/0"), Metrics(), clock)

        async def fails(client):
            raise OSError("away")

        await made.start()
        clock.now = 200.0
        made.is_up = True  # and a hundred requests find that it is not
        await asyncio.gather(*(made.run(fails) for _ in range(100)), return_exceptions=True)
        made._within = lambda work: tries.append(clock.now) or fails_as_away()

        async def fails_as_away():
            raise AwayError("away")

        for _ in range(600):
            clock.now += 0.1
            await made.look()
        waits = [after - before for before, after in zip([200.0, *tries], tries, strict=False)]
        assert [round(wait) for wait in waits] == [1, 1, 2, 4, 8, 15, 15]

    asyncio.run(main())


def test_a_password_is_in_no_log(caplog):
    async def main():
        async with processes(Fake("redis://user:hush@127.0.0.1:1/0"), "x", 1) as [shared]:
            assert not shared.link.is_up

    class Fake:
        def __init__(self, url):
            self.url = url

    with caplog.at_level(logging.DEBUG):
        asyncio.run(main())
    assert "Redis is away" in caplog.text
    assert "hush" not in caplog.text


# Breakers


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


def dispatcher(shared, clock):
    groups = [
        Group(name="m", deployments=tuple(Deployment(name=name, provider=Mock.Config(model="m")) for name in "ab"))
    ]
    made = Dispatcher(groups, clock=clock)
    made.on_change = shared.breakers.changed
    return made


def fail(live, clock, outcome="fatal"):
    live.end(live.begin(clock.now, 1), outcome, clock.now)


def test_a_breaker_that_opens_in_one_process_is_open_in_all_for_as_long(server, prefix):
    async def main():
        clocks = [Clock(), Clock()]
        clocks[1].now = 5_000.0
        async with processes(server, prefix) as shared:
            one, two = (dispatcher(each, clock) for each, clock in zip(shared, clocks, strict=True))

            async def exchange():
                for each, made in zip(shared, (one, two), strict=True):
                    await each.breakers.exchange(made.lives(), made.now())

            await exchange()
            here, there = one.lives()[0], two.lives()[0]
            fail(here, clocks[0])
            assert here.breaker.phase == "open"
            await exchange()
            assert (there.breaker.phase, two.lives()[1].breaker.phase) == ("open", "closed")
            assert 0 < there.breaker.until - clocks[1].now <= here.breaker.until - clocks[0].now
            assert [change["why"] for change in two.changes] == ["another process said so"]
            await exchange()
            assert len(two.changes) == 1
            # Here it is well again, and there the next request may try.
            clocks[0].now += 6
            for _ in range(2):
                fail(here, clocks[0], "success")
            assert here.breaker.phase == "closed"
            assert not there.can_take(clocks[1].now, 1)
            await exchange()
            assert there.can_take(clocks[1].now, 1)
            fail(there, clocks[1], "success")
            fail(there, clocks[1], "success")
            await exchange()
            assert (here.breaker.phase, there.breaker.phase) == ("closed", "closed")

    asyncio.run(main())


def test_a_breaker_is_told_later_where_it_cannot_be_told_now(prefix, monkeypatch):
    monkeypatch.setattr(link, "RETRY_S", 0.0)

    async def main(server):
        clock = Clock()
        async with processes(server, prefix) as shared:
            one, two = (dispatcher(each, clock) for each in shared)
            server.stop()
            fail(one.lives()[0], clock)
            with pytest.raises(AwayError):
                await shared[0].breakers.exchange(one.lives(), clock.now)
            server.start()
            for each, made in zip(shared, (one, two), strict=True):
                while not each.link.is_up:
                    await each.link.look()
                await each.breakers.exchange(made.lives(), clock.now)
            assert two.lives()[0].breaker.phase == "open"

    with redis_server() as server:
        asyncio.run(main(server))


def test_what_others_wrote_is_taken_with_care(server, prefix):
    async def main():
        clock = Clock()
        async with processes(server, prefix, 1) as [shared]:
            made = dispatcher(shared, clock)
            for body in ("", "x", "{}", '{"times": -5}', '{"times": 1e99}', "[]"):
                await shared.link.run(
                    lambda client, body=body: client.set(shared.link.key("breaker", "a"), body, px=10**12)
                )
                await shared.breakers.exchange(made.lives(), clock.now)
                breaker = made.lives()[0].breaker
                assert (breaker.phase, breaker.times) == ("open", 1)
                assert breaker.until - clock.now <= made.rules.breaker.max_open_s

    asyncio.run(main())


# Answers


def entry(body=b'{"a": 1}\n\x00', **fields):
    return Entry(body=body, model="small", prompt_tokens=3, completion_tokens=4, nano=5, **fields)


def test_an_answer_that_one_process_kept_is_there_for_all_of_its_key_alone(server, prefix):
    async def main():
        async with processes(server, prefix, answer_bytes=1000) as shared:
            one, two = (each.answers for each in shared)
            one.put("k1", b"q", entry(), 60)
            one.put("k1", b"long", entry(b"x" * 1000), 60)
            one.put("", b"q", entry(b"nobody's"), 60)
            one.put("k12", b"q", entry(), 60)
            one.put("k3", b"q", entry(spare="time"), 60)
            await one.close()
            assert (await two.get("k3", b"q"))[0] == entry(spare="time")
            assert await two.clear("k3") == 1
            found, left_s = await two.get("k1", b"q")
            assert found == entry()
            assert 0 < left_s <= 60
            assert await two.get("k1", b"long") is await two.get("k2", b"q") is None
            assert (await two.get("", b"q"))[0].body == b"nobody's"
            assert await two.clear("k1") == 1
            assert await one.get("k1", b"q") is None
            assert (await one.get("k12", b"q"))[0] == entry()
            assert await two.clear() == 2
            one.put("k1", b"short", entry(), 0.001)
            await one.close()
            await asyncio.sleep(0.01)
            assert await two.get("k1", b"short") is None

    asyncio.run(main())


ODD = [b"", b"x", b"[]\nbody", b'["m", 1, 2, -3]\nbody', b'["m", 1, 2, 3]\n', b"[1, 1, 2, 3]\nbody", b"\xff\n\xff"]
ODD += [b'["m", 1, 2, 3, 4]\nbody', b'["m", 1, 2, 3, "a", "b"]\nbody']


@pytest.mark.parametrize("raw", ODD)
def test_what_is_no_answer_of_ours_is_none(server, prefix, raw):
    async def main():
        async with processes(server, prefix, 1) as [shared]:
            name = shared.answers._key("k", b"q")
            await shared.link.run(lambda client: client.set(name, raw, px=60_000))
            return await shared.answers.get("k", b"q")

    assert asyncio.run(main()) is None


def test_an_answer_without_an_end_is_none_of_ours(server, prefix):
    async def main():
        async with processes(server, prefix, 1) as [shared]:
            shared.answers.put("k", b"q", entry(), 60)
            await shared.answers.close()
            name = shared.answers._key("k", b"q")
            assert (await shared.answers.get("k", b"q"))[0] == entry()
            await shared.link.run(lambda client: client.persist(name))
            assert await shared.answers.get("k", b"q") is None

    asyncio.run(main())


def test_an_answer_taken_over_ends_when_the_first_one_does(server, prefix):
    """It lived up to twice as long: its time began anew where it was taken over."""

    async def main():
        async with processes(server, prefix) as shared:
            one, two = (Caches(CacheConfig(ttl_s=60), None, shared=each.answers) for each in shared)
            one.put("k", (one.exact, b"q"), None, None, entry())
            await shared[0].answers.close()
            # Most of its time has passed.
            name = shared[0].answers._key("k", b"q")
            await shared[0].link.run(lambda client: client.pexpire(name, 10_000))
            clock = Clock()
            two.exact._clock = clock
            assert await two.elsewhere("k", b"q") == entry()
            clock.now += 9
            assert two.exact.get("k", b"q") == entry()
            clock.now += 1.001
            assert two.exact.get("k", b"q") is None

    asyncio.run(main())


def test_an_answer_of_another_config_is_not_taken_over(server, prefix):
    async def main():
        async with processes(server, prefix) as shared:
            one, two, same = (
                Caches(CacheConfig(), None, shared=each.answers, mark=mark)
                for each, mark in zip((*shared, shared[1]), (b"old", b"new", b"old"), strict=True)
            )
            one.put("k", (one.exact, b"q"), None, None, entry())
            await shared[0].answers.close()
            assert await two.elsewhere("k", b"q") is None
            assert await same.elsewhere("k", b"q") == entry()
            # An operator clears those of all configs.
            assert await shared[1].answers.clear("k") == 1

    asyncio.run(main())


def test_what_is_being_written_is_cleared_too(server, prefix):
    async def main():
        async with processes(server, prefix, 1) as [shared]:
            shared.answers.put("k", b"q", entry(), 60)
            assert await shared.answers.clear("k") == 1

    asyncio.run(main())


@pytest.mark.parametrize("name", ["*", "k?", "k[12]", "\\k1", "k1*", "k1:*", "[^x]1"])
def test_a_name_is_no_pattern(server, prefix, name):
    """To clear the answers of ``*`` cleared those of all keys."""

    async def main():
        async with processes(server, prefix, 1) as [shared]:
            for tenant in ("k1", "k2", ""):
                shared.answers.put(tenant, b"q", entry(), 60)
                shared.meanings.put(tenant, b"c", np.ones(2, np.float32), entry(), 60)
            await shared.clear(name)
            assert await shared.clears.news() == []
            for tenant in ("k1", "k2", ""):
                assert await shared.answers.get(tenant, b"q") is not None
            # As what it is, it goes.
            shared.answers.put(name, b"q", entry(), 60)
            assert await shared.answers.clear(name) == 1
            assert await shared.answers.clear() == 3
            assert await shared.meanings.clear() == 3

    asyncio.run(main())


def test_what_came_out_of_redis_before_it_was_cleared_is_not_kept_here_afterwards():
    class Slow:
        """Has an answer, and gives it once it is told to."""

        def __init__(self):
            self.may_answer = asyncio.Event()

        async def get(self, tenant, key):
            await self.may_answer.wait()
            return entry(), 60.0

    async def main():
        for tenant in (None, "k"):
            shared = Slow()
            caches = Caches(CacheConfig(), None, shared=shared)
            asked = asyncio.ensure_future(caches.elsewhere("k", b"q"))
            await asyncio.sleep(0)
            caches.forget(tenant)
            shared.may_answer.set()
            assert await asked == entry()
            assert caches.exact.get("k", b"q") is None
            # Nothing was cleared meanwhile.
            assert await caches.elsewhere("k", b"q") == entry()
            assert caches.exact.get("k", b"q") == entry()

    asyncio.run(main())


# Orders to clear


def test_an_order_to_clear_reaches_all_others_once_and_in_its_turn(server, prefix):
    async def main():
        async with processes(server, prefix, 3) as (one, two, three):
            await one.clear("k1")
            await one.clear()
            await two.clear("")
            assert await one.clears.news() == [""]
            assert await two.clears.news() == ["k1", None]
            assert await three.clears.news() == ["k1", None, ""]
            assert [await each.clears.news() for each in (one, two, three)] == [[], [], []]
            await three.clear("k2")
            assert [await each.clears.news() for each in (one, two, three)] == [["k2"], ["k2"], []]
            # Who comes later has kept nothing of before.
            async with processes(server, prefix, 1) as [late]:
                assert await late.clears.news() == []
                await one.clear("k3")
                assert await late.clears.news() == ["k3"]

    asyncio.run(main())


def test_who_missed_more_orders_than_are_held_forgets_everything(server, prefix, monkeypatch):
    monkeypatch.setattr(clears, "MOST", 3)

    async def main():
        async with processes(server, prefix) as (one, two):
            for count, wanted in ((1, ["k0"]), (3, [None]), (4, [None]), (2, ["k0", "k1"])):
                for number in range(count):
                    await one.clear(f"k{number}")
                assert await two.clears.news() == wanted
            assert await one.link.run(lambda client: client.llen(one.link.key("clears"))) == 3
            assert 0 < await one.link.run(lambda client: client.ttl(one.link.key("clears"))) <= clears.KEPT_S

    asyncio.run(main())


@pytest.mark.parametrize("raw", [b"", b"x", b"[]", b"[1, 2]", b'["a", 2]', b"{}", b"7", b"\xff"])
def test_an_order_that_is_none_of_ours_clears_nothing(server, prefix, raw):
    async def main():
        async with processes(server, prefix) as (one, two):
            await one.link.run(lambda client: client.lpush(one.link.key("clears"), raw))
            await one.clear("k")
            assert await two.clears.news() == ["k"]

    asyncio.run(main())


def test_who_was_away_reads_an_order_when_it_is_back(server, prefix):
    async def main():
        async with processes(server, prefix) as (one, two):
            two.link.is_up = False
            await one.clear("k")
            with pytest.raises(AwayError):
                await two.clears.news()
            two.link.is_up = True
            assert await two.clears.news() == ["k"]

    asyncio.run(main())


# Others at the other end


class Odd:
    """A server that greets as Redis does and answers ``reply`` to everything else, and to PING too if ``is_deaf``."""

    def __init__(self, reply, is_deaf=False):
        self.reply, self.is_deaf = reply, is_deaf

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"redis://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/0"
        return self

    async def __aexit__(self, *_):
        self._server.close()

    async def _serve(self, reader, writer):
        while line := await reader.readline():
            words = [await reader.readexactly(int((await reader.readline())[1:]) + 2) for _ in range(int(line[1:]))]
            word = words[0].strip().upper()
            greets = {b"PING": b"+PONG\r\n", b"HELLO": b"-ERR unknown command\r\n", b"CLIENT": b"+OK\r\n"}
            if self.is_deaf:
                del greets[b"PING"]
            writer.write(greets.get(word, self.reply))
        writer.close()


REPLIES = [
    b":7\r\n",
    b"+OK\r\n",
    b"$-1\r\n",
    b"*2\r\n:1\r\n$1\r\nx\r\n",
    b"*2\r\n$3\r\nrpm\r\n$1\r\nx\r\n",
    b"*2\r\n$4\r\nwhat\r\n:1\r\n",
    b"*1\r\n:-5\r\n",
    b"*2\r\n$3\r\ntpm\r\n:1\r\n",
    b"?what\r\n",
    b"$1\r\n\xff\r\n",
]


@pytest.mark.parametrize("reply", REPLIES)
def test_an_answer_of_an_unexpected_kind_is_as_good_as_none(reply):
    """It was a 500 for every request of a key with limits."""

    async def main():
        async with Odd(reply) as server, processes(server, "x", 1) as [shared]:
            [door] = admissions([shared])
            limits = Limits(3, None, 2)

            async def again():
                shared.link.is_up = True

            await again()
            assert await told(door.enter("k", "a", 1, limits)) == ""
            await again()
            assert await told(door.look("k", limits)) == ""
            await again()
            assert await shared.answers.get("k", b"q") is None
            made = dispatcher(shared, Clock())
            for work in (
                lambda: shared.answers.clear("k"),
                lambda: shared.breakers.exchange(made.lives(), 0.0),
                shared.clears.news,
            ):
                await again()
                with contextlib.suppress(AwayError):
                    await work()
            door.leave("k", "a")
            with contextlib.suppress(AwayError):
                await shared.counts.tell()

    asyncio.run(main())


def test_one_that_does_not_know_the_newer_protocol_will_do():
    """Redis 5 does not; the client asked for it by itself from its release 8 on."""

    async def main():
        async with Odd(b"*0\r\n") as server, processes(server, "x", 1) as [shared]:
            assert shared.link.is_up

    asyncio.run(main())


def test_who_answers_something_else_to_a_ping_is_not_redis():
    async def main():
        async with Odd(b"*0\r\n", is_deaf=True) as server, processes(server, "x", 1) as [shared]:
            assert not shared.link.is_up

    asyncio.run(main())


def test_the_program_of_a_limit_is_sent_again_to_a_redis_that_was_started_anew(prefix, monkeypatch):
    monkeypatch.setattr(link, "RETRY_S", 0.0)

    async def main(server):
        async with processes(server, prefix, 1) as [shared]:
            await shared.counts.admit("k", "a", 1, Limits(1, None, None))
            await shared.link.run(lambda client: client.script_flush())
            assert await told(shared.counts.admit("k", "b", 1, Limits(1, None, None))) == "rpm"

    with redis_server() as server:
        asyncio.run(main(server))
