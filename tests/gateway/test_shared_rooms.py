"""Limits of deployments that processes keep together on a real Redis, and what becomes of them while it is away."""

import asyncio
import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from anabranch.gateway.dispatch import BreakerRules, Deployment, Dispatcher, DispatchRules, Group, Plan
from anabranch.gateway.dispatch.deployment_state import Live
from anabranch.gateway.dispatch.senders import is_own
from anabranch.gateway.dispatch.shared_rooms import Full, attempt_id, mark_of
from anabranch.gateway.dispatch.window import SlidingSum
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.providers.provider import UpstreamError, UpstreamRequest
from anabranch.gateway.shared import leases, rooms
from anabranch.routers.money import Price
from redis_process import end_leases, needs_redis, processes, redis_server


def deployment(name="d", **fields):
    return Deployment(name=name, provider=Mock.Config(model="m"), **fields)


# What Redis counts


@needs_redis
def test_requests_of_a_minute_are_counted_together(server, prefix):
    async def main():
        async with processes(server, prefix, 3) as shared:
            one = deployment(rpm=6)
            found = await asyncio.gather(*(shared[at % 3].rooms.take(one, f"a{at}", 1) for at in range(30)))
            full = [each for each in found if each is not None]
            assert len(full) == 24
            # Until the first of them is a minute old, and the part of it that it lies in.
            assert all(59 < each.wait_s <= 61 and each.tokens == 0 for each in full)
            # Others have their own.
            assert await shared[0].rooms.take(deployment("other", rpm=1), "x", 1) is None

    asyncio.run(main())


@needs_redis
def test_tokens_of_a_minute_are_counted_together_those_that_were_made_among_them(server, prefix):
    async def main():
        async with processes(server, prefix) as shared:
            one, two = (each.rooms for each in shared)
            limited = deployment(tpm=100)
            assert await one.take(limited, "a", 60) is None
            full = await two.take(limited, "b", 60)
            assert (full.tokens, 59 < full.wait_s <= 61) == (60, True)
            # A smaller one has room.
            assert await two.take(limited, "c", 30) is None
            one.spent(limited, 5)
            await one.tell()
            assert await two.take(limited, "d", 6) is not None
            assert await two.take(limited, "e", 5) is None
            # One that never fits is looked at again soon: who has less room may not be alone.
            assert await one.take(limited, "f", 101) == Full(rooms.AGAIN_S, 101)
            # What is not limited by tokens is not counted.
            one.spent(deployment(rpm=1), 5)
            assert not one._untold

    asyncio.run(main())


@needs_redis
def test_a_prompt_that_was_counted_in_as_too_much_or_too_little_is_corrected_for_all(server, prefix):
    async def main():
        async with processes(server, prefix) as shared:
            one, two = (each.rooms for each in shared)
            limited = deployment(tpm=1_000_000)
            assert await one.take(limited, "a", 992_000) is None
            assert await two.take(limited, "b", 20_000) is not None
            one.corrected(limited, -991_990, 0.01)
            await one.tell()
            assert await two.take(limited, "b", 999_980) is None
            # Nothing is taken back that is not there, nor what has passed.
            one.corrected(limited, -(10**6), 30.0)
            one.corrected(limited, -10, 61.0)
            await one.tell()
            assert await two.take(limited, "c", 11) is not None
            one.corrected(limited, -5, 0.0)
            one.corrected(limited, 10, 0.0)
            await one.tell()
            assert await two.take(limited, "d", 6) is not None
            assert await two.take(limited, "e", 5) is None
            one.corrected(deployment(rpm=1), 5, 0.0)
            one.corrected(limited, 0, 0.0)
            assert not one._untold
            one.corrected(limited, 10**40, 0.0)
            await one.tell()
            assert await two.take(limited, "f", 1) is not None

    asyncio.run(main())


@needs_redis
def test_both_limits_are_taken_from_or_none(server, prefix):
    async def main():
        async with processes(server, prefix, 1) as [shared]:
            limited = deployment(rpm=2, tpm=100)
            assert await shared.rooms.take(limited, "a", 101) is not None
            assert await shared.rooms.take(limited, "b", 90) is None
            assert await shared.rooms.take(limited, "c", 90) is not None
            assert await shared.rooms.take(limited, "d", 10) is None
            assert (await shared.rooms.take(limited, "e", 0)).tokens == 0

    asyncio.run(main())


@needs_redis
def test_a_minute_passes(server, prefix, monkeypatch):
    monkeypatch.setattr(rooms, "MINUTE_MS", 320)

    async def main():
        async with processes(server, prefix) as shared:
            limited = deployment(rpm=2, tpm=50)
            for each in shared:
                assert await each.rooms.take(limited, "a", 25) is None
            full = await shared[0].rooms.take(limited, "b", 1)
            assert 0 < full.wait_s <= 0.33
            # Not a moment too late, nor earlier than it says.
            while await shared[0].rooms.take(limited, "b", 50) is not None:
                await asyncio.sleep(full.wait_s / 10)

    asyncio.run(main())


@needs_redis
def test_attempts_under_way_are_counted_together_and_end(server, prefix):
    async def main():
        async with processes(server, prefix) as shared:
            one, two = (each.rooms for each in shared)
            limited = deployment(max_in_flight=2)
            assert [await one.take(limited, "a", 1), await two.take(limited, "a", 1)] == [None, None]
            assert await one.take(limited, "b", 1) == Full(None)
            # What was refused has no lease to be renewed.
            assert one._leased == {"d": {"a"}}
            two.leave("d", "a")
            # Of a deployment of which nothing is under way nothing is held.
            assert two._leased == {}
            two.leave("d", "unknown")
            await two.tell()
            assert await one.take(limited, "b", 1) is None
            assert await two.take(limited, "a", 1) == Full(None)

    asyncio.run(main())


@needs_redis
def test_one_sender_does_not_have_all_places_though_each_process_gives_it_some(server, prefix):
    ids = itertools.count()

    async def begun(where, limited, sender):
        taken = []
        while (full := await where.take(limited, id := attempt_id(next(ids), sender), 1)) is None:
            taken.append(id)
        assert full == Full(None)
        return taken

    async def main():
        async with processes(server, prefix) as shared:
            one, two = (each.rooms for each in shared)
            limited = deployment(max_in_flight=8, key_share=0.75)
            held = await begun(one, limited, "key:a")
            assert (len(held), await begun(two, limited, "key:a")) == (6, [])
            assert len(await begun(two, limited, "key:b")) == 1
            # One more, for whoever comes; what the gateway asks for itself leaves it.
            assert await begun(one, limited, "gateway:shadow") == []
            assert len(await begun(one, limited, "key:c")) == 1
            one.leave("d", held[0])
            await one.tell()
            assert await begun(two, limited, "key:a") == []
            assert len(await begun(two, limited, "")) == 1
            # Nothing is shared out where that is so written, nor among those without a key.
            assert len(await begun(two, deployment("e", max_in_flight=3), "key:a")) == 3
            assert len(await begun(two, deployment("f", max_in_flight=3, key_share=0.5), "")) == 3

    asyncio.run(main())


@given(st.text(min_size=1), st.text(min_size=1), st.integers(0, 10**9))
def test_the_name_of_an_attempt_says_whose_it_is_and_not_who(sender, other, number):
    id = attempt_id(number, sender)
    assert mark_of(id) == mark_of(attempt_id(number + 1, sender)) != ""
    assert id.endswith(mark_of(id))
    assert (mark_of(id) == mark_of(attempt_id(number, other))) is (
        sender == other or (is_own(sender) and is_own(other))
    )
    assert mark_of(attempt_id(number, "")) == ""


@needs_redis
def test_leases_of_a_process_that_is_gone_end_and_those_of_one_that_lives_do_not(server, prefix, monkeypatch):
    monkeypatch.setattr(leases, "RENEW_S", 0.0)

    async def main():
        async with processes(server, prefix) as shared:
            gone, alive = (each.rooms for each in shared)
            limited = deployment(max_in_flight=2)
            await gone.take(limited, "a", 1)
            await alive.take(limited, "b", 1)
            assert await alive.take(limited, "c", 1) == Full(None)
            await end_leases(shared[1].link, alive._held_key("d"))
            # It says that it lives.
            await alive.tell()
            assert await alive.take(limited, "c", 1) is None
            # That of the one that lives is still there.
            await alive.tell()
            assert await gone.take(limited, "d", 1) == Full(None)

    asyncio.run(main())


def test_what_waits_to_be_told_is_bounded(monkeypatch):
    monkeypatch.setattr(leases, "MOST_UNTOLD", 2)
    woken = []
    found = rooms.RedisRooms(None, lambda: woken.append(1))
    for at in range(4):
        found.spent(deployment(tpm=9), at + 1)
    assert [(kind, whose, tokens) for kind, whose, tokens, *_ in found._untold] == [
        ("spent", "d", "1"),
        ("spent", "d", "2"),
    ]
    assert len(woken) == 2


@needs_redis
@pytest.mark.parametrize(("tokens", "parts_ago"), [(11, 9), (70, 9), (71, 5), (90, 5), (91, 2), (100, 2)])
def test_a_wait_ends_when_enough_of_what_is_in_the_way_has_passed(server, prefix, tokens, parts_ago):
    """Of 100 there are 60 of nine parts of a minute ago, 20 of five, and 10 of two."""
    grain_s = rooms.MINUTE_MS / rooms.PARTS / 1e3

    async def main():
        async with processes(server, prefix, 1) as [shared]:
            here = int(time.time() / grain_s)
            parts = {here - 9: 60, here - 5: 20, here - 2: 10}
            await shared.link.run(lambda client: client.hset(shared.rooms._keys("d")[1], mapping=parts))
            full = await shared.rooms.take(deployment(tpm=100), "a", tokens)
            # Until all of that part is older than a minute; the next part may have begun meanwhile.
            until_s = 60 - (parts_ago - 1) * grain_s
            assert until_s - 2 * grain_s < full.wait_s <= until_s + 0.001

    asyncio.run(main())


def test_leases_are_renewed_when_it_is_time_and_not_all_the_time():
    class Told:
        def __init__(self):
            self.renewed = 0

        def key(self, *parts):
            return ":".join(parts)

        async def script(self, script, keys, values, read):
            self.renewed += script is leases.RENEW

    async def main():
        link, now_s = Told(), [0.0]
        found = rooms.RedisRooms(link, lambda: None, lambda: now_s[0])
        found._hold("d", "a")
        for seconds in (0.0, 1.0, leases.RENEW_S, leases.RENEW_S + 1, 2 * leases.RENEW_S):
            now_s[0] = seconds
            await found.tell()
        assert link.renewed == 2

    asyncio.run(main())


@needs_redis
def test_while_it_is_away_there_is_room_and_what_began_is_counted_afterwards(prefix, monkeypatch):
    monkeypatch.setattr(leases, "RENEW_S", 0.0)

    async def main(server):
        async with processes(server, prefix) as shared:
            one, two = (each.rooms for each in shared)
            limited = deployment(max_in_flight=1, rpm=1)
            server.stop()
            assert [await one.take(limited, str(at), 1) for at in range(3)] == [None] * 3
            one.leave("d", "0")
            server.start()
            for each in shared:
                each.link._retry_at = 0.0
                await each.link.look()
            await one.tell()
            assert await two.take(limited, "x", 1) == Full(None)

    with redis_server() as server:
        asyncio.run(main(server))


@pytest.mark.parametrize("found", [None, b"OK", [b"rpm"], [b"rpm", b"5"], [b"rps", 5], ["rpm", 5], [b"rpm", 5, 5]])
def test_an_answer_that_is_none_of_the_programs_is_as_good_as_none(found):
    with pytest.raises(ValueError, match="none of the program's"):
        rooms._full(found, 1)


# What a dispatcher does with it


class Rooms:
    """Says what a test wrote, and notes what it is told."""

    def __init__(self, *said):
        self.said, self.taken, self.left, self.made = list(said), [], [], []
        self.corrections = []

    async def take(self, deployment, id, tokens):
        self.taken.append((deployment.name, tokens))
        await asyncio.sleep(0)
        said = self.said.pop(0) if self.said else None
        if isinstance(said, BaseException):
            raise said
        return said

    def leave(self, whose, id):
        self.left.append(whose)

    def spent(self, deployment, tokens):
        self.made.append((deployment.name, tokens))

    def corrected(self, deployment, by, ago_s):
        self.corrections.append((deployment.name, by, ago_s >= 0))


def dispatcher(*limits, said=(), rules=None, **mock):
    """A model of deployments a, b, ... with such limits."""
    made = tuple(
        Deployment(name="abc"[at], provider=Mock.Config(model="m", tokens=4, **mock), weight=10.0**-at, **own)
        for at, own in enumerate(limits)
    )
    found = Dispatcher([Group(name="m", deployments=made, balance="weighted")], rules or DispatchRules(), seed=0)
    found.rooms = Rooms(*said)
    return found


def chat(**fields):
    return UpstreamRequest("chat", {"messages": [{"role": "user", "content": "hi"}], **fields}, prompt_tokens=7)


def plan(made, **fields):
    return Plan(candidates=("m",), deadline=made.now() + 5, **fields)


LIMITED = {"rpm": 10, "tpm": 1000, "max_in_flight": 10}


@pytest.mark.parametrize("stream", [False, True])
def test_an_attempt_is_counted_in_and_out_and_what_it_made_told(stream):
    async def main():
        made = dispatcher(LIMITED)
        if stream:
            left = [list(made.rooms.left) async for _ in await made.stream(plan(made), chat(stream=True))]
            assert left[0] == []
        else:
            await made.complete(plan(made), chat())
        assert (made.rooms.taken, made.rooms.left) == ([("a", 7)], ["a"])
        [(name, tokens)] = made.rooms.made
        assert (name, tokens > 0) == ("a", True)

    asyncio.run(main())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("claimed", [900, 3])
def test_a_prompt_counts_as_its_upstream_says_once_it_has(stream, claimed):
    async def main():
        made = dispatcher(LIMITED)
        request = UpstreamRequest("chat", chat(stream=stream).body, prompt_tokens=claimed)
        if stream:
            request = UpstreamRequest(
                "chat", {**request.body, "stream_options": {"include_usage": True}}, prompt_tokens=claimed
            )
            answer = await made.stream(plan(made), request)
            async for _ in answer:
                pass
        else:
            answer = await made.complete(plan(made), request)
        [attempt] = answer.report.attempts
        assert not attempt.usage.is_estimated
        [live] = made.lives()
        assert live.tokens.at(made.now()) == attempt.usage.prompt + attempt.usage.completion
        assert made.rooms.corrections == [("a", attempt.usage.prompt - claimed, True)]

    asyncio.run(main())


def test_a_deployment_without_limits_is_not_asked_for():
    async def main():
        made = dispatcher({})
        await made.complete(plan(made), chat())
        assert (made.rooms.taken, made.rooms.left) == ([], [])

    asyncio.run(main())


@pytest.mark.parametrize("full", [Full(30.0), Full(30.0, 7), Full(None)])
def test_where_there_is_no_room_another_is_asked_and_no_attempt_was_made(full):
    async def main():
        made = dispatcher(LIMITED, LIMITED, said=[full], rules=DispatchRules(retries=0, extra=0, min_extra=0))
        answer = await made.complete(plan(made, max_attempts=1), chat())
        assert [one.deployment for one in answer.report.attempts] == ["b"]
        assert (made.rooms.taken, made.rooms.left) == ([("a", 7), ("b", 7)], ["b"])
        here = made.lives()[0]
        now = made.now()
        assert (here.in_flight, here.waiting, here.requests.at(now), here.tokens.at(now)) == (0, 0, 0, 0)
        assert here._parts._counts == {}
        # Nobody is sent there in vain, as long as that is known.
        assert here.can_take(now, 7) is (full.wait_s is None)
        assert here.can_take(now, 6) is (full.wait_s is None or full.tokens > 0)
        assert here.failing == 0

    asyncio.run(main())


def test_where_no_deployment_has_room_that_is_said_with_when_it_will():
    async def main():
        made = dispatcher(LIMITED, said=[Full(30.0)])
        with pytest.raises(UpstreamError, match="no deployment takes requests") as caught:
            await made.complete(plan(made), chat())
        assert caught.value.failure.kind == "unavailable"
        assert 29 < caught.value.failure.retry_after_s <= 30
        assert caught.value.report.attempts == []
        made = dispatcher(LIMITED, said=[Full(None)])
        with pytest.raises(UpstreamError, match="no deployment takes requests"):
            await made.complete(plan(made), chat())

    asyncio.run(main())


def test_a_short_wait_is_waited_for():
    async def main():
        made = dispatcher(LIMITED, said=[Full(0.01), Full(0.01)])
        answer = await made.complete(plan(made), chat())
        assert len(answer.report.attempts) == 1
        assert len(made.rooms.taken) == 3

    asyncio.run(main())


def test_who_is_cancelled_while_it_is_asked_is_counted_out_here():
    async def main():
        made = dispatcher(LIMITED, said=[asyncio.CancelledError()])
        with pytest.raises(asyncio.CancelledError):
            await made.complete(plan(made), chat())
        assert (made.lives()[0].in_flight, made.rooms.left) == (0, [])

    asyncio.run(main())


def test_a_hedge_without_room_leaves_the_first_attempt_alone():
    async def main():
        rules = DispatchRules(hedge=True, hedge_samples=1, min_extra=10)
        made = dispatcher(LIMITED, LIMITED, said=[None, Full(30.0)], rules=rules, latency_s=0.05)
        made.groups["m"].hedge_whole.observe(0.001)
        answer = await made.complete(plan(made), chat())
        assert [one.deployment for one in answer.report.attempts] == ["a"]
        assert (len(made.rooms.taken), made.rooms.left) == (2, ["a"])

    asyncio.run(main())


def live(**limits):
    return Live("m", deployment(**limits), Price(), BreakerRules(), object(), lambda *_: None)


def test_what_is_known_of_limits_outlives_a_reload():
    old, new = live(rpm=5), live(rpm=5)
    old.back_out(old.begin(0.0, 7), 0.0, 7, Full(30.0, 7))
    new.adopt(old)
    assert (new.can_take(1.0, 7), new.can_take(1.0, 6), new.can_take(31.0, 7)) == (False, True, True)
    assert (new.free_in_s(1.0, 7), new.free_in_s(1.0, 6)) == (29.0, 0.0)


@given(st.lists(st.tuples(st.floats(1, 20), st.integers(1, 9), st.integers(0, 9)), max_size=40), st.floats(0, 90))
def test_what_is_taken_back_is_of_its_own_time(steps, later_s):
    window, now, kept = SlidingSum(60.0), 0.0, []
    for seconds, amount, back in steps:
        now += seconds
        window.add(now, amount)
        kept.append((now, amount, back))
    now += later_s
    window.at(now)
    for since, _, back in kept:
        window.take_back(since, back)
    assert window.at(now) == sum(max(0, amount - back) for since, amount, back in kept if since > now - 60.0)


def test_what_has_passed_is_not_taken_back_from_others():
    window = SlidingSum(60.0)
    window.add(0.0, 100)
    window.add(50.0, 7)
    assert window.at(61.0) == 7
    window.take_back(0.0, 90)
    assert window.at(61.0) == 7
    window.take_back(50.0, 5)
    window.take_back(50.0, 5)
    assert window.at(61.0) == 0
    window.take_back(70.0, 5)
    assert window.at(61.0) == 0


def test_a_claim_is_corrected_in_the_limit_of_a_deployment():
    one = live(tpm=1_000_000)
    one.begin(0.0, 992_000)
    assert not one.can_take(1.0, 20_000)
    one.corrected(1.0, 0.0, -991_990)
    assert one.tokens.at(1.0) == 10
    assert one.can_take(1.0, 20_000)
    one.corrected(2.0, 0.0, 10**30)
    assert one.tokens.at(2.0) == 1_000_010
    unlimited = live(rpm=1)
    unlimited.corrected(1.0, 0.0, 5)
    assert unlimited.tokens.at(1.0) == 0


@given(st.lists(st.tuples(st.floats(0, 5), st.integers(1, 9), st.booleans()), max_size=40))
def test_what_is_given_back_was_never_there(steps):
    window, kept, now = SlidingSum(60.0), 0, 0.0
    for seconds, amount, is_kept in steps:
        now += seconds / 10
        window.add(now, amount)
        if is_kept:
            kept += amount
        else:
            window.give_back(amount)
        assert window.at(now) == kept
    assert window.at(now + 61) == 0
