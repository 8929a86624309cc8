"""Answers of the semantic cache that processes share on a real Redis, by their meaning and for one key alone."""

import asyncio
from contextlib import asynccontextmanager

import numpy as np
import pytest

from anabranch.gateway.cache import Entry, SemanticCache
from anabranch.gateway.cache.abroad import Abroad
from anabranch.gateway.caches import Caches
from anabranch.gateway.config import CacheConfig
from anabranch.gateway.shared import meanings
from redis_process import needs_redis, processes, redis_server

CONTEXT = b"c" * 32


@asynccontextmanager
async def with_caches(server, prefix, num=2, mark=b"", ttl_s=60.0, **fields):
    """Processes, and caches of each."""
    config = CacheConfig(semantic=True, threshold=0.9, ttl_s=ttl_s)
    async with processes(server, prefix, num, **fields) as made:
        yield made, [Caches(config, object(), meanings=one.meanings, mark=mark) for one in made]


def vector(angle, dim=4):
    found = np.zeros(dim, np.float32)
    found[:2] = np.cos(angle), np.sin(angle)
    return found


def entry(body=b'{"a": 1}\n\x00'):
    return Entry(body=body, model="small", prompt_tokens=3, completion_tokens=4, nano=5)


def keep(caches, tenant, angle, made, context=CONTEXT):
    caches.put(tenant, None, (context, "text"), vector(angle), made)


@needs_redis
def test_an_answer_that_one_process_kept_is_there_for_all_of_its_key_and_context_alone(server, prefix):
    async def main():
        async with with_caches(server, prefix) as (shared, (one, two)):
            keep(one, "k", 0.0, entry())
            await shared[0].meanings.close()
            assert await two.alike("k", CONTEXT, vector(0.1)) == entry()
            # As often as it is asked for, and in the one that kept it too.
            assert await two.alike("k", CONTEXT, vector(0.1)) == entry()
            assert await one.alike("k", CONTEXT, vector(0.1)) == entry()
            # That one does not take over what it told itself.
            assert await one.alike("k", CONTEXT, vector(0.6)) is None
            assert (len(one._abroad._index), len(two._abroad._index)) == (0, 1)
            # It means something else, or is another's.
            assert await two.alike("k", CONTEXT, vector(0.6)) is None
            assert await two.alike("other", CONTEXT, vector(0.0)) is None
            assert await two.alike("k", b"d" * 32, vector(0.0)) is None
            # What came later is seen too, and the nearest is given.
            keep(one, "k", 0.2, entry(b"nearer"))
            await shared[0].meanings.close()
            assert (await two.alike("k", CONTEXT, vector(0.15))).body == b"nearer"
            assert await two.alike("k", CONTEXT, vector(-0.05)) == entry()

    asyncio.run(main())


@needs_redis
def test_an_answer_of_another_config_is_not_taken_over(server, prefix):
    async def main():
        async with with_caches(server, prefix, mark=b"a") as (shared, (one, _)):
            other = Caches(CacheConfig(semantic=True), object(), meanings=shared[1].meanings, mark=b"b")
            keep(one, "k", 0.0, entry())
            await shared[0].meanings.close()
            assert await other.alike("k", CONTEXT, vector(0.0)) is None

    asyncio.run(main())


@pytest.mark.parametrize(("now_ms", "left_s"), [(900, 0.5), (1_000, 0.5), (1_200, 0.3), (1_499, 0.001), (1_500, None)])
def test_a_text_is_good_for_what_its_age_leaves_of_it(now_ms, left_s):
    fields = {b"vector": vector(0.0).tobytes(), b"name": b"n", b"ttl_ms": b"500", b"process": b"other"}
    found = meanings.SharedMeanings(None, 1)._text(b"1000-0", fields, now_ms)
    assert (None if found is None else found[2]) == left_s


def test_so_many_answers_are_written_at_a_time_and_no_more(monkeypatch):
    monkeypatch.setattr(meanings, "MOST_WRITES", 3)

    class Slow:
        is_up = True

        def key(self, *parts):
            return ":".join(parts)

        async def run(self, work):
            await asyncio.Event().wait()

    async def main():
        made = meanings.SharedMeanings(Slow(), 1000)
        for _ in range(5):
            made.put("k", CONTEXT, vector(0.0), entry(), 60.0)
        await asyncio.sleep(0)
        writes = list(made._writes)
        for one in writes:
            one.cancel()
        await made.close()
        assert len(writes) == 3
        # Once they have ended there is room for others.
        made.put("k", CONTEXT, vector(0.0), entry(), 60.0)
        [one] = made._writes
        one.cancel()

    asyncio.run(main())


@needs_redis
def test_of_many_all_are_known_up_to_a_bound(server, prefix, monkeypatch):
    monkeypatch.setattr(meanings, "MANY", 7)

    async def main():
        async with with_caches(server, prefix) as (shared, (one, two)):
            angles = np.linspace(0, 6, 13)
            for at, angle in enumerate(angles):
                keep(one, "k", angle, entry(str(at).encode()))
                await shared[0].meanings.close()
            # The last first: it is seen at the first look.
            found = [(await two.alike("k", CONTEXT, vector(angle))).body for angle in reversed(angles)]
            assert found == [str(at).encode() for at in reversed(range(13))]

    asyncio.run(main())


@needs_redis
def test_an_answer_ends_everywhere_when_the_first_one_does(server, prefix):
    async def main():
        async with with_caches(server, prefix, ttl_s=2.0) as (shared, (one, two)):
            keep(one, "k", 0.0, entry())
            await shared[0].meanings.close()
            assert await two.alike("k", CONTEXT, vector(0.0)) == entry()
            while await two.alike("k", CONTEXT, vector(0.0)) is not None:
                await asyncio.sleep(0.02)
            while await one.alike("k", CONTEXT, vector(0.0)) is not None:
                await asyncio.sleep(0.02)
            # Nothing is left there, a moment later: it was written there a moment later.
            while await shared[0].link.run(lambda client: client.keys(shared[0].link.key("*"))):
                await asyncio.sleep(0.02)

    asyncio.run(main())


@needs_redis
@pytest.mark.parametrize("tenant", ["k", None])
def test_what_is_cleared_is_gone_in_all(server, prefix, tenant):
    async def main():
        async with with_caches(server, prefix) as (shared, (one, two)):
            for whose in ("k", "l"):
                keep(one, whose, 0.0, entry())
            await shared[0].meanings.close()
            assert await two.alike("k", CONTEXT, vector(0.0)) == entry()
            # Still being written.
            keep(one, "k", 1.0, entry())
            assert await shared[0].meanings.clear(tenant) == (2 if tenant else 3)
            left = await shared[0].link.run(lambda client: client.keys(shared[0].link.key("*")))
            assert [name.split(b":")[3] for name in left] == ([b"l"] * 2 if tenant else [])
            # Before its order to forget has come, the other finds nothing either.
            assert await two.alike("k", CONTEXT, vector(0.0)) is None
            one.forget(tenant)
            assert await one.alike("k", CONTEXT, vector(0.0)) is None
            assert (await two.alike("l", CONTEXT, vector(0.0)) is None) is (tenant is None)
            # What comes afterwards counts.
            keep(one, "k", 0.0, entry(b"new"))
            await shared[0].meanings.close()
            assert (await two.alike("k", CONTEXT, vector(0.0))).body == b"new"
            two.forget(tenant)

    asyncio.run(main())


@needs_redis
def test_a_long_answer_and_one_while_it_is_away_stay_where_they_are(prefix):
    async def main(server):
        async with with_caches(server, prefix, answer_bytes=400) as (shared, (one, two)):
            keep(one, "k", 0.0, entry(b"x" * 1000))
            await shared[0].meanings.close()
            assert await two.alike("k", CONTEXT, vector(0.0)) is None
            keep(one, "k", 1.0, entry())
            await shared[0].meanings.close()
            server.stop()
            assert await two.alike("k", CONTEXT, vector(1.0)) is None
            assert await one.alike("k", CONTEXT, vector(1.0)) == entry()
            # Its link has not noticed yet, and then has.
            for _ in range(2):
                keep(one, "k", 2.0, entry())
                await shared[0].meanings.close()
            assert not shared[0].link.is_up

    with redis_server() as server:
        asyncio.run(main(server))


ODD = [
    {"vector": b"abc"},
    {"vector": b""},
    {"vector": np.full(4, np.nan, np.float32).tobytes()},
    {"vector": vector(0.0, dim=5).tobytes()},
    {"name": b"a:b"},
    {"name": b""},
    {"name": b"gone"},
    {"ttl_ms": b"soon"},
    {"ttl_ms": b"0"},
    {"ttl_ms": b"9" * 400},
]


@needs_redis
@pytest.mark.parametrize("odd", ODD)
def test_what_is_no_text_of_ours_is_passed_over(server, prefix, odd):
    async def main():
        async with with_caches(server, prefix, 1) as ([shared], [caches]):
            stream = shared.meanings._stream("k", CONTEXT)
            fields = {"vector": vector(0.0).tobytes(), "name": b"n", "ttl_ms": b"60000", "process": b"p", **odd}
            body = b'["small", 3, 4, 5]\n{}'
            await shared.link.run(lambda client: client.set(shared.meanings._answer("k", "n"), body, px=60_000))
            await shared.link.run(lambda client: client.xadd(stream, fields))
            found = await caches.alike("k", CONTEXT, vector(0.0))
            # It is good for longer than anybody keeps it; all others are nothing.
            assert (found is not None) is (len(fields["ttl_ms"]) > 100)
            assert shared.link.is_up
            await shared.link.run(
                lambda client: client.xadd(
                    stream, {**fields, "vector": vector(1.0).tobytes(), "name": b"n", "ttl_ms": b"60000"}
                )
            )
            assert (await caches.alike("k", CONTEXT, vector(1.0))).body == b"{}"

    asyncio.run(main())


@needs_redis
def test_what_is_no_stream_is_as_good_as_none(server, prefix):
    async def main():
        async with with_caches(server, prefix, 1) as ([shared], [caches]):
            stream = shared.meanings._stream("k", CONTEXT)
            await shared.link.run(lambda client: client.set(stream, b"x"))
            assert await caches.alike("k", CONTEXT, vector(0.0)) is None
            # Of others it is still asked, and who has something to keep makes one of it.
            assert shared.link.is_up
            keep(caches, "k", 0.0, entry())
            await shared.meanings.close()
            assert await shared.link.run(lambda client: client.type(stream)) == b"stream"

    asyncio.run(main())


LAST = 2**64 - 1


@needs_redis
@pytest.mark.parametrize("id", [f"{LAST}-{LAST}", f"{LAST}-0", f"{10**15}-{LAST}", f"{10**15}-1"])
def test_a_stream_with_an_id_behind_which_nothing_is_found_begins_anew(server, prefix, id):
    async def main():
        async with with_caches(server, prefix) as (shared, (one, two)):
            stream = shared[0].meanings._stream("k", CONTEXT)
            fields = {"vector": vector(0.0).tobytes(), "name": b"n", "ttl_ms": b"60000", "process": b"p"}
            await shared[0].link.run(lambda client: client.xadd(stream, fields, id="7-7"))
            await shared[0].link.run(lambda client: client.xadd(stream, fields, id=id))
            for _ in range(3):
                assert await two.alike("k", CONTEXT, vector(0.0)) is None
            keep(one, "k", 0.0, entry())
            await shared[0].meanings.close()
            assert await two.alike("k", CONTEXT, vector(0.0)) == entry()
            assert shared[0].link.is_up
            assert shared[1].link.is_up

    asyncio.run(main())


@needs_redis
def test_a_stream_outlives_a_redis_without_memory(server, prefix):
    async def main():
        async with with_caches(server, prefix) as (shared, (one, two)):
            run = shared[0].link.run
            keep(one, "k", 0.0, entry())
            await shared[0].meanings.close()
            await run(lambda client: client.config_set("maxmemory", 1))
            try:
                keep(one, "k", 1.0, entry())
                await shared[0].meanings.close()
            finally:
                await run(lambda client: client.config_set("maxmemory", 0))
            assert await two.alike("k", CONTEXT, vector(0.0)) == entry()
            assert shared[0].link.is_up

    asyncio.run(main())


@needs_redis
def test_the_largest_number_of_a_millisecond_is_followed_by_the_next_one(server, prefix):
    async def main():
        async with with_caches(server, prefix) as (shared, (one, two)):
            stream = shared[0].meanings._stream("k", CONTEXT)
            await shared[0].link.run(lambda client: client.xadd(stream, {"a": "b"}, id=f"7-{LAST}"))
            assert await two.alike("k", CONTEXT, vector(0.0)) is None
            keep(one, "k", 0.0, entry())
            await shared[0].meanings.close()
            assert await two.alike("k", CONTEXT, vector(0.0)) == entry()

    asyncio.run(main())


@needs_redis
def test_a_text_of_a_clock_that_was_ahead_is_good_no_longer_than_any(server, prefix):
    async def main():
        async with with_caches(server, prefix, 1) as ([shared], _):
            stream = shared.meanings._stream("k", CONTEXT)
            fields = {"vector": vector(0.0).tobytes(), "name": b"n", "ttl_ms": b"5000", "process": b"p"}
            await shared.link.run(lambda client: client.xadd(stream, fields, id=f"{10**14}-0"))
            _, [(_, name, left_s)] = await shared.meanings.news("k", CONTEXT, "")
            assert (name, left_s) == ("n", 5.0)

    asyncio.run(main())


@needs_redis
def test_where_an_answer_should_be_and_is_none_the_next_one_is_given(server, prefix):
    async def main():
        async with with_caches(server, prefix) as (shared, (one, two)):
            for angle, body in ((0.0, b"first"), (0.1, b"second")):
                keep(one, "k", angle, entry(body))
                await shared[0].meanings.close()
            names = [name for _, name, _ in (await shared[1].meanings.news("k", CONTEXT, ""))[1]]
            answer = shared[0].meanings._answer("k", names[0])
            await shared[0].link.run(lambda client: client.delete(answer))
            await shared[0].link.run(lambda client: client.lpush(answer, b"x"))
            assert (await two.alike("k", CONTEXT, vector(0.0))).body == b"second"
            assert shared[1].link.is_up

    asyncio.run(main())


# What each process makes of it


class Texts:
    """Stands for other processes."""

    def __init__(self):
        self.items, self.held, self.asked, self.after, self.is_away = [], {}, [], [], False

    async def news(self, tenant, context, after):
        self.after.append(after)
        return None if self.items is None else (str(len(self.items)), self.items[int(after or 0) :])

    async def get(self, tenant, name):
        self.asked.append(name)
        return None if self.is_away else (self.held.get(name), 5.0)


def test_each_text_is_read_once_and_an_answer_that_is_gone_gives_way_to_the_next():
    async def main():
        texts = Texts()
        abroad = Abroad(texts, SemanticCache(threshold=0.5, ttl_s=60, size=9), b"")
        texts.items = [(vector(0.0), "a", 5.0), (vector(0.1), "b", 5.0), (vector(0.2), "c", 5.0)]
        texts.held = {"b": entry(b"b"), "c": entry(b"c")}
        found, cosine = await abroad.find("k", CONTEXT, vector(0.0))
        assert (found.body, round(cosine, 4)) == (b"b", round(float(np.cos(0.1)), 4))
        assert (texts.asked, texts.after) == (["a", "b"], [""])
        assert (await abroad.find("k", CONTEXT, vector(0.0)))[0].body == b"b"
        assert (texts.asked, texts.after) == (["a", "b", "b"], ["", "3"])
        # Nobody can be asked: what is known here is of no use without its answer.
        texts.items = None
        assert await abroad.find("k", CONTEXT, vector(0.0)) is None

    asyncio.run(main())


def test_an_answer_that_cannot_be_asked_for_is_not_gone():
    """One blink of Redis made a process forget all names that it knew, one look-up after another."""

    async def main():
        texts = Texts()
        abroad = Abroad(texts, SemanticCache(threshold=0.5, ttl_s=60, size=99), b"")
        texts.items = [(vector(at / 100), str(at), 5.0) for at in range(50)]
        texts.held, texts.is_away = {"0": entry()}, True
        assert await abroad.find("k", CONTEXT, vector(0.0)) is None
        assert texts.asked == ["0"]
        texts.is_away = False
        assert (await abroad.find("k", CONTEXT, vector(0.0)))[0] == entry()
        assert texts.after == ["", "50"]

    asyncio.run(main())


def test_one_request_looks_for_few_answers_that_are_gone():
    async def main():
        texts = Texts()
        abroad = Abroad(texts, SemanticCache(threshold=0.5, ttl_s=60, size=99), b"")
        texts.items = [(vector(at / 100), str(at), 5.0) for at in range(20)]
        texts.held = {"19": entry()}
        found = [await abroad.find("k", CONTEXT, vector(0.0)) for _ in range(3)]
        assert [one and one[0] for one in found] == [None, None, entry()]
        assert texts.asked == [str(at) for at in range(20)]

    asyncio.run(main())


def test_what_could_not_be_asked_and_what_two_ask_at_once_is_taken_in_once():
    async def main():
        texts = Texts()
        abroad = Abroad(texts, SemanticCache(threshold=0.5, ttl_s=60, size=99), b"")
        items = texts.items = [(vector(at / 10), str(at), 5.0) for at in range(3)]
        texts.held = {str(at): entry() for at in range(3)}
        news = texts.news

        async def slow(*given):
            found = await news(*given)
            await asyncio.sleep(0)
            return found

        texts.news = slow
        await asyncio.gather(*(abroad.find("k", CONTEXT, vector(0.0)) for _ in range(3)))
        texts.items = None
        assert await abroad.find("k", CONTEXT, vector(0.0)) is None
        texts.items = items
        assert (await abroad.find("k", CONTEXT, vector(0.0)))[0] == entry()
        assert len(abroad._index) == 3

    asyncio.run(main())


def test_what_is_known_of_contexts_is_bounded():
    async def main():
        texts = Texts()
        abroad = Abroad(texts, SemanticCache(threshold=0.5, ttl_s=60, size=3), b"")
        for at in range(9):
            await abroad.find("k", bytes([at]), vector(0.0))
        assert len(abroad._known) == 3
        # Those of late are.
        for at in (6, 1):
            await abroad.find("k", bytes([at]), vector(0.0))
        assert [context for _, context in abroad._known] == [b"\x08", b"\x06", b"\x01"]

    asyncio.run(main())
