"""Answers that are kept or under way: who gets them, and what those who wait are owed."""

import asyncio
import dataclasses
import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from anabranch.gateway.cache import Entry
from anabranch.gateway.caches import Caches
from anabranch.gateway.config import CacheConfig
from anabranch.gateway.core import beginning
from anabranch.gateway.core.cached_answers import CachedAnswers
from anabranch.gateway.core.relay import Replayed
from anabranch.gateway.decide import Decided
from anabranch.gateway.dispatch import Attempt, Report
from anabranch.gateway.providers.provider import Answer, Failure, UpstreamError, Usage
from anabranch.gateway.store import KeyRecord
from anabranch.routers.contract.query import Decision, Query
from anabranch.web.api_error import ApiError
from gateway_states import run, services, state_of
from waiting import until_async

ON = CacheConfig(exact=True)


def answer(text="yes", reason="stop"):
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
    return Answer({"object": "chat.completion", "choices": [choice]}, None, Usage(3, 1, 0))


def cached(body=None, lent=None, record=None, **fields):
    state = state_of({"temperature": 0, **(body or {})}, lent=lent, **fields)
    state.record = record
    beginning.read(state)
    state.report = Report(model="small")
    return CachedAnswers(state), state


def misses(state):
    text = state.services.metrics.text().decode()
    return [
        float(line.split()[-1]) for line in text.splitlines() if line.startswith('anabranch_cache_total{result="miss"}')
    ]


def test_an_answer_is_found_by_who_asks_the_same_again_and_by_nobody_else():
    lent, _ = services(cache=ON)

    async def work():
        first, state = cached(lent=lent, record=KeyRecord(id="k"))
        assert await first.look() is None
        assert state.is_cacheable
        assert misses(state) == [1.0]
        first.keep(answer())
        first.end()
        again, _ = cached(lent=lent, record=KeyRecord(id="k"))
        entry, which = await again.look()
        assert (json.loads(entry.body)["choices"][0]["message"]["content"], entry.model, which) == (
            "yes",
            "small",
            "exact",
        )
        # Of another key, of another model, and of one that may not use that model any more.
        for other in (
            cached(lent=lent, record=KeyRecord(id="l")),
            cached({"model": "large"}, lent=lent, record=KeyRecord(id="k")),
            cached(lent=lent, record=KeyRecord(id="k", models=("large",))),
        ):
            assert await other[0].look() is None
            other[0].end()

    run(work)


@pytest.mark.parametrize(
    ("body", "headers", "looks"),
    [
        ({}, {}, True),
        ({"temperature": 1}, {}, False),
        ({"temperature": 1}, {"x-cache": "allow"}, True),
        ({}, {"x-cache": "deny"}, False),
        ({}, {"cache-control": "max-age=0, no-cache"}, False),
    ],
)
def test_what_is_drawn_anew_is_not_looked_for_unless_the_sender_says_so(body, headers, looks):
    async def work():
        held, state = cached(body, services(cache=ON)[0], headers=headers)
        assert await held.look() is None
        held.end()
        return state.is_cacheable

    assert run(work) == looks


def test_those_who_wait_get_the_answer_and_fail_with_it():
    lent, _ = services(cache=ON)

    async def work(end):
        first, _ = cached(lent=lent)
        second, _ = cached(lent=lent)
        assert await first.look() is None
        waiting = asyncio.ensure_future(second.look())
        await asyncio.sleep(0)
        sharing = first.sharing()
        assert (sharing.is_awaited(), sharing.to_the_end, first.wants_streams) == (True, False, True)
        end(first)
        first.end()
        found = await asyncio.wait_for(waiting, 60)
        second.end()
        lent.caches.clear()
        return found

    entry, which = run(work, lambda held: held.keep(answer()))
    assert (entry.model, which) == ("small", "shared")
    with pytest.raises(UpstreamError, match="broken"):
        run(work, lambda held: held.fail(UpstreamError(Failure(kind="server", message="broken"))))
    # One that came only too early fails alone, as one whose client went away: the other is to try.
    late = UpstreamError(Failure(kind="deadline", message="late"))
    assert run(work, lambda held: held.fail(late)) is None
    assert run(work, lambda held: None) is None


def test_only_whole_answers_are_kept_unless_they_have_a_name():
    lent, _ = services(cache=ON)

    async def work(headers, **fields):
        held, _ = cached(lent=lent, headers=headers)
        assert await held.look() is None
        held.keep(answer(**fields))
        held.end()
        again, _ = cached(lent=lent, headers=headers)
        found = await again.look()
        again.end()
        return found is not None

    assert not run(work, {}, reason="content_filter")
    assert run(work, {"idempotency-key": "a"}, reason="content_filter")


@pytest.mark.parametrize(
    ("why", "passes_s", "kept_s"),
    [
        ("stopgap", 0.0, 5.0),
        ("stopgap", 40.0, 40.0),
        ("stopgap", 300.0, 60.0),
        ("bypassed", 0.0, 5.0),
        # Of the config or the key.
        ("lasts", 0.0, 3600.0),
        ("", 0.0, 3600.0),
    ],
)
def test_what_stands_in_for_another_answer_is_kept_for_a_while_unless_it_has_a_name(why, passes_s, kept_s):
    """A draft that would not do was given long after the outage it was for; and where none is kept, all who ask in an outage pay."""
    now = [0.0]

    async def work(headers):
        lent, _ = services(cache=ON)
        lent.caches.exact._clock = lent.caches.named._clock = lambda: now[0]
        held, state = cached(lent=lent, headers=headers)
        assert await held.look() is None
        waits = asyncio.ensure_future(cached(lent=lent, headers=headers)[0].look())
        await asyncio.sleep(0.01)
        state.report = Report(model="small", is_stopgap=why == "stopgap", passes_s=passes_s)
        bypassed = why if why in ("bypassed", "lasts") else ""
        decision = Decision(candidates=(), strategy="", reason="")
        state.decided = Decided(decision, bypassed, Query(text=""), why == "lasts")
        held.keep(answer())
        held.end()
        _, which = await waits
        found = []
        for at in (kept_s - 1, kept_s + 1):
            now[0] += at - now[0] % 10_000
            again, _ = cached(lent=lent, headers=headers)
            found.append(await again.look() is not None)
            again.end()
        return which, found

    assert CacheConfig().ttl_s == 3600
    assert run(work, {}) == ("shared", [True, False])
    now[0] = 10_000.0
    assert run(work, {"idempotency-key": "a"}) == ("shared", [True, kept_s < 3600])


def test_what_stands_in_for_another_answer_is_kept_elsewhere_as_briefly_and_for_nobody_who_means_the_same():
    told = []
    shared = SimpleNamespace(put=lambda tenant, key, entry, ttl_s: told.append(ttl_s))
    caches = Caches(ON, None, shared=shared)
    caches.semantic = SimpleNamespace(put=lambda *given: told.append("alike"))
    entry = Entry(body=b"{}", model="small", prompt_tokens=1, completion_tokens=1, nano=1)
    for ttl_s in (5.0, None):
        caches.put("k", (caches.exact, b"key"), (b"context", "text"), [1.0], entry, ttl_s)
    assert told == [5.0, 3600, "alike"]


def test_a_name_is_for_one_request():
    lent, _ = services()

    async def work():
        first, _ = cached(lent=lent, headers={"idempotency-key": "n"})
        assert await first.look() is None
        assert first.is_named
        assert first.sharing().to_the_end
        other, _ = cached({"user": "x", "max_tokens": 3}, lent=lent, headers={"idempotency-key": "n"})
        with pytest.raises(ApiError) as caught:
            await other.look()
        assert (caught.value.status, caught.value.code) == (422, "idempotency_key_reused")
        # Its answer comes after it was given up.
        first.come_late(Attempt(model="small", deployment="small", start_s=0.0, cost=5), answer("late"))
        first.come_late(Attempt(model="small", deployment="small", start_s=0.0, cost=5), answer("later"))
        first.end()
        again, _ = cached(lent=lent, headers={"idempotency-key": "n"})
        entry, which = await again.look()
        assert (b"late" in entry.body, b"later" in entry.body, entry.nano, which) == (True, False, 5, "exact")
        long, _ = cached(lent=lent, headers={"idempotency-key": "n" * 256})
        with pytest.raises(ApiError, match="255 characters"):
            await long.look()

    run(work)


def test_whoever_sends_a_name_again_waits_while_its_answer_is_read_on():
    lent, _ = services()

    async def work():
        first, state = cached(lent=lent, headers={"idempotency-key": "n"})
        assert await first.look() is None
        attempt = Attempt(model="small", deployment="small", start_s=0.0, is_late=True)
        state.report = Report(attempts=[attempt])
        first.fail(UpstreamError(Failure(kind="server", message="broken")))
        first.end()
        again, _ = cached(lent=lent, headers={"idempotency-key": "n"})
        waiting = asyncio.ensure_future(again.look())
        await asyncio.sleep(0.01)
        assert not waiting.done()
        attempt.is_late = False
        state.report.now_known()
        # None came: it is to ask.
        assert await asyncio.wait_for(waiting, 60) is None
        again.end()

    run(work)


def test_an_answer_is_replayed_as_the_sender_wants_it():
    lent, _ = services(cache=ON)

    async def work():
        first, _ = cached(lent=lent)
        await first.look()
        first.keep(answer())
        first.end()
        again, state = cached({"stream": True, "stream_options": {"include_usage": True}}, lent=lent)
        entry, which = await again.look()
        reply = await again.reply(entry, which)
        assert reply.headers["x-cost-usd"] == "0.000000000"
        assert (reply.headers["x-request-id"], reply.headers["x-cache"]) == (state.id, "exact")
        streamed = b"".join([piece async for piece in reply.stream])
        assert (b"yes" in streamed, streamed.endswith(b"data: [DONE]\n\n")) == (True, True)
        plain, _ = cached(lent=lent)
        reply = await plain.reply(*await plain.look())
        assert (reply.stream, json.loads(reply.body)["choices"][0]["message"]["content"]) == (None, "yes")

    run(work)


def test_many_who_come_at_once_for_a_long_answer_have_it_put_together_once(monkeypatch):
    """Each had it done anew when it was his turn, though the first had just done it."""
    lent, _ = services(cache=ON)
    made, gate, real = [], threading.Event(), Replayed.chunks_of

    def chunks_of(*asked):
        made.append(asked)
        assert gate.wait(60)
        return real(*asked)

    monkeypatch.setattr(Replayed, "chunks_of", staticmethod(chunks_of))

    async def work():
        first, _ = cached(lent=lent)
        await first.look()
        first.keep(answer("word " * 100_000))
        first.end()

        async def replayed():
            again, _ = cached({"stream": True}, lent=lent)
            return await again.reply(*await again.look())

        asking = [asyncio.ensure_future(replayed()) for _ in range(12)]
        # One is at it, and the others wait for their turns.
        await until_async(lambda: made and sum(map(len, lent.turns._waiting.values())) == 11)
        gate.set()
        replies = await asyncio.gather(*asking)
        assert len(made) == 1
        told = [[piece async for piece in reply.stream] for reply in replies]
        assert all(one == told[0] for one in told)
        assert len({id(piece) for one in told for piece in one}) == len(told[0])

    asyncio.run(work())


class Elsewhere:
    """Another process, which keeps one answer."""

    def __init__(self):
        self.body = answer().data

    async def get(self, tenant, key):
        return Entry(body=bytes(bytearray(self.body)), model="small"), 60.0

    async def news(self, tenant, context, after):
        return "1", [] if after else [(np.ones(4, np.float32), "a", 60.0)]


@pytest.mark.parametrize("stream", [False, True])
def test_all_who_read_an_answer_that_another_process_keeps_have_the_same(stream):
    """A process held it once for each reader."""
    embedder = SimpleNamespace(embed=lambda texts: np.ones((1, 4), np.float32))
    caches = Caches(CacheConfig(semantic=True), embedder, meanings=Elsewhere())
    lent = dataclasses.replace(services()[0], caches=caches)

    async def work():
        read, replies = [], []
        for _ in range(3):
            asked, _ = cached({"stream": stream, "temperature": 1}, lent=lent)
            entry, which = await asked.look()
            assert which == "semantic"
            replies.append(await asked.reply(entry, which))
            # What is held of it: by the request while it is streamed, by the reply where it is whole.
            read.append(entry if stream else replies[-1].kept)
            assert replies[-1].body is (None if stream else read[-1].body)
        assert len({id(one) for one in read}) == 1

    run(work)


def test_what_is_too_large_to_be_kept_here_too_is_the_same_for_all():
    async def work():
        caches = Caches(CacheConfig(exact=True, max_bytes=1), None, shared=Elsewhere())
        one, two = [await caches.elsewhere("k", b"q") for _ in range(2)]
        assert (len(caches.exact), one is two) == (0, True)

    run(work)
