"""What lies in Redis and is none of ours, or is of a clock that ran ahead: nothing waits longer for it than a window or a lease."""

import asyncio
import json
import time
from contextlib import asynccontextmanager

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from anabranch.errors import RateError
from anabranch.gateway.cache import Entry
from anabranch.gateway.core.admission import Limits
from anabranch.gateway.dispatch import BreakerRules, Deployment, Dispatcher, Group
from anabranch.gateway.dispatch.deployment_state import MINUTE_S, Live
from anabranch.gateway.dispatch.shared_rooms import Full
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.shared import AwayError, answers, breakers, clears, leases, rooms
from anabranch.routers.money import Price
from redis_process import needs_redis, processes

DAY_S = 86_400.0


@asynccontextmanager
async def on_empty(server, num=1):
    """So many processes on an empty Redis."""
    async with processes(server, num=num) as made:
        await made[0].link.run(lambda client: client.flushall())
        yield made


def deployment(**fields):
    return Deployment(name="d", provider=Mock.Config(model="m"), **fields)


async def refusal(work):
    """The error of a limit; None if there is room."""
    try:
        await work
    except RateError as error:
        return error
    return None


# A clock that ran ahead


@needs_redis
def test_requests_that_were_counted_while_the_clock_was_ahead_are_of_the_last_minute(server, monkeypatch):
    monkeypatch.setattr(rooms, "MINUTE_MS", 400)

    async def main():
        async with on_empty(server) as [shared]:
            rpm, *_ = shared.rooms._keys("d")
            part = int((time.time() + DAY_S) * 1e3 / (400 / 64))
            await shared.link.run(lambda client: client.hset(rpm, mapping={part: 1, part + 1: 1}))
            full = await shared.rooms.take(deployment(rpm=2), "a", 1)
            assert 0 < full.wait_s <= 0.4
            until = time.monotonic() + 120
            while await shared.rooms.take(deployment(rpm=2), "b", 1) is not None:
                assert time.monotonic() < until, "they count for ever"
                await asyncio.sleep(0.02)

    asyncio.run(main())


@needs_redis
@pytest.mark.parametrize("kind", ["rooms", "counts"])
def test_leases_that_were_given_while_the_clock_was_ahead_end_as_new_ones_do(server, monkeypatch, kind):
    monkeypatch.setattr(leases, "LEASE_S", 0.2)

    async def main():
        async with on_empty(server) as [shared]:
            of = getattr(shared, kind)
            held = of._held_key("d")
            await shared.link.run(lambda client: client.zadd(held, {"gone:1": (time.time() + DAY_S) * 1e3, "b": "inf"}))

            async def is_full():
                if kind == "rooms":
                    return await shared.rooms.take(deployment(max_in_flight=1), "a", 1) is not None
                return await refusal(shared.counts.admit("d", "a", 1, Limits(None, None, 1))) is not None

            assert await is_full()
            until = time.monotonic() + 120
            while await is_full():
                assert time.monotonic() < until, "they are held for ever"
                await asyncio.sleep(0.02)

    asyncio.run(main())


@needs_redis
@pytest.mark.parametrize("takes", [True, False])
def test_a_bucket_that_was_written_while_the_clock_was_ahead_fills_up(server, takes):
    async def main():
        async with on_empty(server) as [shared]:
            rpm, *_ = shared.counts._keys("k")
            ahead = {"level": 0, "at": (time.time() + DAY_S) * 1e3}
            await shared.link.run(lambda client: client.hset(rpm, mapping=ahead))
            limits, until = Limits(6000, None, None), time.monotonic() + 120

            def asked():
                return shared.counts.admit("k", "a", 1, limits) if takes else shared.counts.look("k", limits)

            error = await refusal(asked())
            assert 0 < error.retry_after_s <= 0.01
            while await refusal(asked()) is not None:
                assert time.monotonic() < until, "it stays empty"
                await asyncio.sleep(0.005)

    asyncio.run(main())


@pytest.mark.parametrize(("said_s", "until"), [(5.0, 105.0), (1e9, 100.0 + MINUTE_S)])
def test_a_deployment_is_left_alone_for_a_window_at_most(said_s, until):
    live = Live("m", deployment(rpm=2), Price(), BreakerRules(), None, lambda *told: None)
    ticket = live.begin(100.0, 1)
    live.back_out(ticket, 100.0, 1, Full(said_s))
    assert live.full_until == until


@pytest.mark.parametrize(("wait_ms", "wait_s"), [(1, 0.001), (60_000, 60.0), (2**63 - 1, 60.0), (-(2**63), 1.0)])
def test_a_wait_that_is_told_is_a_window_at_most(wait_ms, wait_s):
    assert rooms._full([b"rpm", wait_ms], 1) == Full(wait_s)


# Anything at all

NUMBERS = st.sampled_from(
    [
        b"nan",
        b"-nan",
        b"inf",
        b"-inf",
        b"1e308",
        b"-1e308",
        b"0x10",
        b"1e400",
        b"",
        b"x",
        b" 7",
        b"7.5",
        b"9" * 15,
        b"-" + b"9" * 14,
        b"9" * 16,
        b"9" * 400,
        b"9223372036854775807",
        b"-9223372036854775808",
        b"0",
        b"-1",
    ]
) | st.integers(-(10**20), 10**20).map(lambda value: str(value).encode())
NOW = int(time.time() * 1e3)
PARTS = NUMBERS | st.integers(-100, 10**6).map(lambda more: str(int(NOW / 937.5) + more).encode())
TIMES = NUMBERS | st.integers(-(10**6), 10**9).map(lambda more: str(NOW + more).encode())
SCORES = st.floats(allow_nan=False) | st.integers(-(10**6), 10**9).map(lambda more: float(NOW + more))


@needs_redis
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_whatever_lies_there_a_wait_is_bounded_and_redis_is_not_away(server, data):
    parts = [data.draw(st.dictionaries(PARTS, NUMBERS, max_size=4)) for _ in range(2)]
    buckets = [data.draw(st.fixed_dictionaries({}, optional={"level": NUMBERS, "at": TIMES})) for _ in range(2)]
    held = data.draw(st.dictionaries(st.text("ab", min_size=1, max_size=3), SCORES, max_size=4))

    async def main():
        async with on_empty(server) as [shared]:
            room_keys, count_keys = shared.rooms._keys("d"), shared.counts._keys("k")

            async def write(client):
                for names, kept in ((room_keys, parts), (count_keys, buckets)):
                    for key, fields in zip(names, kept, strict=False):
                        if fields:
                            await client.hset(key, mapping=fields)
                    if held:
                        await client.zadd(names[2], held)

            await shared.link.run(write)
            for id in "ab":
                full = await shared.rooms.take(deployment(rpm=3, tpm=1000, max_in_flight=3), id, 10)
                assert full is None or full.wait_s is None or 0 < full.wait_s <= MINUTE_S
                error = await refusal(shared.counts.admit("k", id, 10, Limits(3, 1000, 3)))
                assert error is None or error.retry_after_s is None or 0 <= error.retry_after_s <= 1e6
            last = (time.time() + leases.LEASE_S) * 1e3 + 1000
            for names in (room_keys, count_keys):
                kept = await shared.link.run(lambda client, key=names[2]: client.zrange(key, 0, -1, withscores=True))
                assert all(score <= last for _, score in kept)
            shared.counts.correct("k", 5, 1000)
            shared.rooms.spent(deployment(tpm=1000), 5)
            await shared.counts.tell()
            await shared.rooms.tell()
            assert shared.link.is_up
            assert shared.link._metrics.lost._value.get() == 0

    asyncio.run(main())


@needs_redis
@pytest.mark.parametrize("value", [b"9" * 19, b"9223372036854775807", b"nan", b"inf", b"7.5", b"", b"-1e3"])
def test_what_is_no_count_is_let_go_of_and_stops_no_program(server, value):
    async def main():
        async with on_empty(server) as [shared]:
            here = int(time.time() * 1e3 / (rooms.MINUTE_MS / rooms.PARTS))
            rpm, *_ = shared.rooms._keys("d")
            bucket, *_ = shared.counts._keys("k")
            # Also where this takes until the next part has begun.
            parts = {here + more: value for more in range(9)}
            await shared.link.run(lambda client: client.hset(rpm, mapping=parts))
            await shared.link.run(lambda client: client.hset(bucket, mapping={"level": value, "at": value}))
            assert await shared.rooms.take(deployment(rpm=2), "a", 1) is None
            assert await refusal(shared.counts.admit("k", "a", 1, Limits(2, None, None))) is None
            assert shared.link._metrics.refused._value.get() == 0
            assert list((await shared.link.run(lambda client: client.hgetall(rpm))).values()) == [b"1"]
            # From now on they count.
            assert await shared.rooms.take(deployment(rpm=1), "b", 1) is not None
            assert await refusal(shared.counts.admit("k", "b", 1, Limits(2, None, None))) is None
            assert await refusal(shared.counts.admit("k", "c", 1, Limits(2, None, None))) is not None

    asyncio.run(main())


# One command that is refused


@needs_redis
def test_a_name_under_which_something_else_lies_is_that_ones_trouble_alone(server, monkeypatch, caplog):
    monkeypatch.setattr(leases, "RENEW_S", 0.0)

    async def main():
        async with on_empty(server) as [shared]:
            link, limits = shared.link, Limits(3, 1000, 3)
            both = tuple(Deployment(name=name, provider=Mock.Config(model="m")) for name in "de")
            lives = Dispatcher([Group(name="m", deployments=both)]).lives()
            odd = [
                *shared.rooms._keys("d"),
                *shared.counts._keys("k"),
                link.key("breaker", "d"),
                link.key("clears"),
                shared.answers._key("k", b"q"),
                shared.meanings._answer("k", "n"),
            ]

            async def write(client):
                for name in odd:
                    await client.xadd(name, {"a": "b"})
                await client.set(link.key("breaker", "e"), json.dumps({"times": 2}), px=9000)

            await link.run(write)
            limited = deployment(rpm=3, tpm=1000, max_in_flight=3)
            # Each process goes on with its own counts of this one.
            assert await shared.rooms.take(limited, "a", 1) is None
            assert await refusal(shared.counts.admit("k", "a", 1, limits)) is None
            assert await shared.answers.get("k", b"q") is None
            assert await shared.meanings.get("k", "n") == (None, 0.0)
            # What is told of others reaches them.
            other = Deployment(name="e", provider=limited.provider, rpm=3, tpm=1000, max_in_flight=3)
            assert await shared.rooms.take(other, "a", 1) is None
            shared.rooms.spent(limited, 7)
            shared.rooms.spent(other, 7)
            shared.rooms.leave("d", "a")
            shared.rooms._hold("d", "b")
            shared.rooms._hold("e", "b")
            await shared.rooms.tell()
            assert shared.rooms._untold == []
            _, tpm, held = shared.rooms._keys("e")
            assert sum(map(int, await link.run(lambda client: client.hvals(tpm)))) == 8
            assert await link.run(lambda client: client.zcard(held)) == 2

            class Made:
                def lives(self):
                    return lives

                def now(self):
                    return 0.0

            await shared._exchange(Made(), lambda tenant: None)
            assert [live.breaker.phase for live in lives] == ["closed", "open"]
            # Nor does it say that one is well again.
            ends = lives[1].breaker.until
            await link.run(lambda client: client.delete(link.key("breaker", "e")))
            await link.run(lambda client: client.xadd(link.key("breaker", "e"), {"a": "b"}))
            await shared._exchange(Made(), lambda tenant: None)
            assert lives[1].breaker.until == ends > 0
            with pytest.raises(AwayError):
                await shared.clears.news()
            assert link.is_up
            text = link._metrics
            assert (text.up._value.get(), text.lost._value.get(), text.refused._value.get() > 5) == (1, 0, True)

    asyncio.run(main())
    assert caplog.text.count("Redis refuses a command (ResponseError: WRONGTYPE") == 1
    assert "Redis is away" not in caplog.text


# Bodies

BODIES = [
    b"[" * 100_000,
    b"null",
    b"[NaN,1,1,1]",
    b'["m",1,1,1e999]',
    b'["m",-1,1,1]',
    b'["m",true,1,1]',
    b"{}",
    b"",
    b'["m",1,1,%d]' % 10**23,
    b'["m",%d,1,1]' % 10**23,
    b'["m",1,%d,1]' % (10**7 + 1),
    b'["m",1,1,%d]' % (2**53 + 1),
    b'["a\\ud800",1,1,1]',
    b'["a\\r\\nb",1,1,1]',
    b"[" + b"9" * 5000 + b"]",
]


@pytest.mark.parametrize("head", BODIES, ids=lambda head: head[:20].decode())
def test_the_head_of_an_answer_that_is_none_of_ours(head):
    assert answers.entry_of(head + b"\nx") is None
    assert clears._order(head) is None
    assert breakers._times(head) == 1


@given(st.binary(max_size=40) | st.text('[]{}",:019eE-.nulltrfas\\ud\n').map(str.encode))
def test_no_body_raises(raw):
    entry, order = answers.entry_of(raw), clears._order(raw)
    assert entry is None or entry.body == raw.partition(b"\n")[2]
    assert order is None or isinstance(order[0], str)
    assert breakers._times(raw) >= 1


def test_the_largest_counts_that_a_call_can_have_are_kept():
    entry = Entry(body=b"x", model="Größe/m:1", prompt_tokens=10**7, completion_tokens=10**7, nano=2**53)
    assert answers.entry_of(answers.written(entry)) == entry
