"""Answers: made into text in small steps, the same bytes as at once; counted while they are kept; and sent part by part."""

import asyncio
import json
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.errors import InputError
from anabranch.graph import HNSW, Graph, PowerWalk
from anabranch.graph.names import Names, write_names
from anabranch.graph.serve import Limits, Sources, answer_room, create_app, requests, text
from anabranch.graph.serve.answer_room import AnswerRoom, HeldAnswer
from anabranch.graph.serve.gate import LateError
from anabranch.graph.serve.reach import reachable
from anabranch.graph.serve.requests import RequestError, parse
from anabranch.graph.serve.text import PART, SHORT, Sent, Text
from anabranch.web.json_text import to_json
from anabranch.web.large_json import LARGE
from asgi_sending import Sending
from waiting import until_async

COUNT = 600


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "index.anb"
    index = HNSW(4, M=8, ef_construction=40)
    index.add(np.random.default_rng(0).normal(size=(COUNT, 4)).astype(np.float32), workers=1)
    index.save(path)
    write_names(path, Names([f'n"{number} \u20ac' for number in range(COUNT)]))
    return path


def run(steps):
    count = 0
    for _ in steps:
        count += 1
    return count


# Text

VALUES = st.lists(st.integers() | st.floats() | st.text(st.characters(exclude_categories=()), max_size=4), max_size=9)
ROWS = st.lists(
    st.dictionaries(st.sampled_from(["ids", "distances", "na\u20acmes"]), VALUES | st.integers()), max_size=6
)


@settings(max_examples=60)
@given(ROWS, st.integers(1, 4), st.integers(1, 40))
def test_text_in_steps_is_that_at_once(rows, at_once, part):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "AT_ONCE", at_once)
        patch.setattr(text, "PART", part)
        room = AnswerRoom(1 << 20)
        held = room.enter("a")
        made = Text(held)
        run(made.rows(rows[:2]))
        run(made.rows(rows[2:]))
        made.end(generation=3)
    expected = to_json({"results": rows, "generation": 3}, SHORT)
    assert b"".join(made.parts) == expected
    assert made.num_rows == len(rows)
    assert len(expected) == made.num_bytes == held.num_bytes == room.num_bytes
    assert {len(one) for one in list(made.parts)[:-1]} <= {part}
    assert 0 < len(made.parts[-1]) <= part


def test_no_step_makes_much_text(path, monkeypatch):
    """A call that makes 36 MB of text stops the event loop for most of a second; a body of 8 MB, a tenth."""
    made, read = [], []

    def watched(value, separators=None):
        found = to_json(value, separators)
        made.append(len(found))
        return found

    monkeypatch.setattr(text, "to_json", watched)
    app = create_app(Sources([path]), Limits(k=10_000))
    whole = asyncio.run(asked(app, {"ids": [*range(60)], "k": COUNT, "ef": COUNT}))
    assert len(whole["results"]) == 60
    monkeypatch.setattr(text, "AT_ONCE", 50)
    assert sum(made) > 1 << 20 > 1 << 16 > max(made)
    rows = len(made)
    assert asyncio.run(asked(app, {"ids": [*range(60)], "k": COUNT, "ef": COUNT})) == whole
    assert max(made[rows:]) < 1500

    loads = json.loads
    monkeypatch.setattr(
        requests.json, "loads", lambda text, **others: [read.append(len(text)), loads(text, **others)][1]
    )
    body = {"vectors": np.random.default_rng(0).normal(size=(500, 64)).tolist(), "k": 3}
    raw = json.dumps(body).encode()
    assert len(raw) > 2 * LARGE
    assert parse(raw) == body
    assert max(read) < LARGE
    for wrong, word in ((raw[:-1], "not JSON"), (raw.replace(b"[[", b"[[NaN,"), "NaN"), (raw + b"\xff", "UTF-8")):
        with pytest.raises(RequestError, match=word):
            parse(wrong)


# Room


class Clock:
    now = 10.0

    def __call__(self):
        return self.now


def refused(call, *arguments):
    with pytest.raises(RequestError) as caught:
        call(*arguments)
    return caught.value.status, caught.value.code


def test_one_address_has_half_of_what_others_leave():
    room = AnswerRoom(100)
    first, second, other = room.enter("a"), room.enter("a"), room.enter("b")
    first.more(40)
    assert refused(second.more, 11) == (429, "overloaded")
    second.more(10)
    # One that needs more than anyone may have is told so.
    assert refused(first.more, 11) == (400, "over_limit")
    other.more(25)
    assert refused(other.more, 1) == (429, "overloaded")
    # The first of another is taken where there is room at all.
    room.enter("c").more(25)
    assert refused(room.enter("d").more, 1) == (429, "overloaded")
    first.sent(15)
    room.enter("d").more(15)
    for _ in range(2):
        first.close()
    assert room.num_bytes == 75
    # A change was made: who asked for it is told, whatever there is.
    room.enter("e", is_sure=True).more(1000)
    assert room.num_bytes == 1075


def test_what_will_be_made_has_room_from_the_beginning():
    room = AnswerRoom(100)
    first, second, other = room.enter("a"), room.enter("a"), room.enter("b")
    first.reserve(30)
    second.reserve(20)
    # Before anything is computed.
    assert refused(room.enter("a").reserve, 1) == (429, "overloaded")
    other.reserve(25)
    assert room.num_bytes == 75
    first.more(10)
    first.more(15)
    assert (first.num_bytes, first.reserved, room.num_bytes) == (25, 5, 75)
    # More than was thought: what was let in first has it, beyond the share of its address; what came later has not.
    first.more(15)
    assert (first.num_bytes, first.reserved, room.num_bytes) == (40, 0, 85)
    second.more(20)
    assert refused(second.more, 1) == (429, "overloaded")
    # Nor beyond what anyone may have, or than there is.
    assert refused(first.more, 11) == (400, "over_limit")
    other.more(26)
    assert refused(room.enter("c").more, 15) == (429, "overloaded")
    second.close()
    assert room.num_bytes == 66
    # What is not needed is given back, and all that is left once it is made.
    third = room.enter("c")
    third.reserve(17)
    third.keep_reserved(20)
    third.keep_reserved(12)
    assert (third.reserved, room.num_bytes) == (12, 78)
    third.more(2)
    third.is_whole(lambda: None)
    assert (third.num_bytes, third.reserved, room.num_bytes) == (2, 0, 68)
    for held in (first, other, third):
        held.close()
    assert room.num_bytes == len(room._of_source) == len(room._made) == 0
    # One alone is not refused because it may become too large.
    alone = room.enter("a")
    alone.reserve(1000)
    assert room.num_bytes == 50
    alone.close()
    with pytest.raises(LateError):
        alone.reserve(1)


def test_who_reads_slowly_gives_way_while_others_wait():
    clock, cut = Clock(), []
    room = AnswerRoom(100, lambda: cut.append("counted"), clock)
    slow, quick, made = room.enter("a"), room.enter("b"), room.enter("c")
    slow.more(50)
    quick.more(25)
    made.more(12)
    slow.is_whole(lambda: cut.append("slow"))
    clock.now += 2.1
    quick.is_whole(lambda: cut.append("quick"))
    # Its own address has too much, and nobody else gives way to that.
    assert refused(made.more, 2) == (429, "overloaded")
    assert not cut
    room.enter("d").more(14)
    assert cut == ["counted", "slow"]
    assert (slow.num_bytes, slow.is_closed, room.num_bytes) == (0, True, 51)
    slow.sent(50)
    slow.close()
    assert room.num_bytes == 51
    # What is still made is not cut off, and may have what the other left.
    made.more(2)


def test_an_answer_whose_time_was_over_is_made_no_further():
    room = AnswerRoom(100)
    held = room.enter("a")
    held.close()
    with pytest.raises(LateError):
        held.more(1)
    assert room.num_bytes == 0


def test_counts_of_many_threads():
    room = AnswerRoom(10_000)

    def work(source):
        for _ in range(200):
            held = room.enter(source)
            held.reserve(5)
            held.more(3)
            held.keep_reserved(1)
            held.more(4)
            held.is_whole(lambda: None)
            held.sent(3)
            held.close()

    threads = [threading.Thread(target=work, args=(source,)) for source in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert room.num_bytes == len(room._of_source) == len(room._read) == 0


# Sending


class Unread(Sending):
    """A request of one who reads so many parts of the answer, and then nothing."""

    def __init__(self, app, host, reads):
        self.reads, self.go, self.parts = reads, asyncio.Event(), 0
        super().__init__(app, host)

    async def _send(self, message):
        if message["type"] == "http.response.body":
            if self.parts >= self.reads:
                await self.go.wait()
            self.parts += 1
        await super()._send(message)


async def ready(app):
    while app.state.serving.holder.current is None:
        await asyncio.sleep(0.01)
    return app.state.serving.answers


async def asked(app, body):
    async with app.router.lifespan_context(app):
        await ready(app)
        one = Sending(app, "a")
        await one.send(json.dumps(body).encode(), more=False)
        await asyncio.wait_for(one.task, 60)
        assert one.status == 200, one.answer
        return json.loads(one.answer)


def test_answers_that_nobody_reads_are_counted_and_give_way(path, monkeypatch):
    monkeypatch.setattr(answer_room, "PATIENCE_S", 0.0)
    large = json.dumps({"ids": [*range(20)], "k": COUNT - 1, "ef": COUNT}).encode()
    small = json.dumps({"ids": [1], "k": 3}).encode()

    async def main():
        app = create_app(Sources([path]), Limits(answers_bytes=1 << 20))
        async with app.router.lifespan_context(app):
            room = await ready(app)
            first = Unread(app, "a", 2)
            await first.send(large, more=False)
            await until_async(lambda: first.parts == 2)
            size = room.num_bytes
            assert 4 * PART < size < 1 << 19
            assert b"anabranch_answer_bytes %.1f" % size in app.state.serving.metrics.text()
            # Whoever reads is answered beside it.
            for host in "ab":
                one = Sending(app, host)
                await one.send(small, more=False)
                await asyncio.wait_for(one.task, 60)
                assert one.status == 200
            # The next of the same address needs the room.
            second = Unread(app, "a", 0)
            await second.send(large, more=False)
            await until_async(lambda: second.status == 200 and room.num_bytes == size + 2 * PART)
            assert b'anabranch_cut_off_total{reason="room"} 1.0' in app.state.serving.metrics.text()
            second.go.set()
            await asyncio.wait_for(second.task, 60)
            assert len(json.loads(second.answer)["results"]) == 20
            first.go.set()
            await asyncio.wait_for(first.task, 60)
            # It got no more than what was on its way.
            assert first.parts == 3
            assert room.num_bytes == 0
            more = Sending(app, "a")
            await more.send(json.dumps({"ids": [*range(30)], "k": COUNT - 1, "ef": COUNT}).encode(), more=False)
            await asyncio.wait_for(more.task, 60)
            assert (more.status, json.loads(more.answer)["error"]["code"]) == (400, "over_limit")
            assert room.num_bytes == 0

    asyncio.run(main())


def test_nothing_is_computed_for_an_answer_that_finds_no_room(path, monkeypatch):
    large = json.dumps({"ids": [*range(20)], "k": COUNT - 1, "ef": COUNT}).encode()

    async def main():
        app = create_app(Sources([path]), Limits(answers_bytes=1 << 20))
        async with app.router.lifespan_context(app):
            room = await ready(app)
            first = Unread(app, "a", 0)
            await first.send(large, more=False)
            await until_async(lambda: first.status == 200)
            size, searches, search = room.num_bytes, [], HNSW.search
            monkeypatch.setattr(HNSW, "search", lambda *all, **other: searches.append(1) or search(*all, **other))
            for _ in range(3):
                one = Sending(app, "a")
                await one.send(large, more=False)
                await asyncio.wait_for(one.task, 60)
                assert (one.status, json.loads(one.answer)["error"]["code"]) == (429, "overloaded")
            assert not searches
            assert room.num_bytes == size
            first.go.set()
            await asyncio.wait_for(first.task, 60)
            # What is thought of it beforehand is near what it is.
            reserved, reserve = [], HeldAnswer.reserve
            monkeypatch.setattr(HeldAnswer, "reserve", lambda self, more: reserved.append(more) or reserve(self, more))
            one = Sending(app, "a")
            await one.send(large, more=False)
            await asyncio.wait_for(one.task, 60)
            assert 0.8 * size < reserved[0] < 1.3 * size
            assert room.num_bytes == 0

    asyncio.run(main())


def test_an_answer_that_comes_too_late_leaves_nothing(path, monkeypatch):
    go, search = threading.Event(), HNSW.search

    def slow(*arguments, **others):
        assert go.wait(60)
        return search(*arguments, **others)

    async def main():
        app = create_app(Sources([path]), Limits(timeout_s=1.0))
        async with app.router.lifespan_context(app):
            room = await ready(app)
            monkeypatch.setattr(HNSW, "search", slow)
            one = Sending(app, "a")
            await one.send(b'{"ids": [1], "k": 3}', more=False)
            await asyncio.wait_for(one.task, 60)
            assert one.status == 503
            go.set()
            await until_async(lambda: app.state.serving.gate.taken == room.num_bytes == 0)

    asyncio.run(main())


def test_who_goes_away_leaves_nothing():
    room = AnswerRoom(1 << 20)
    held = room.enter("a")
    made = Text(held)
    made.whole({"x": "y" * 3 * PART})

    async def broken(message):
        if message["type"] == "http.response.body":
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        asyncio.run(Sent(made, held)({"type": "http"}, None, broken))
    assert room.num_bytes == len(made.parts) == 0


def test_limits_of_answers_that_make_no_sense():
    for changes in ({"answers_bytes": 1000}, {"connections": 0}, {"stall_s": 0.0}):
        with pytest.raises(InputError, match=next(iter(changes))):
            Limits(**changes)


# What is kept for an answer before it is made


def reserved_by(app, body, monkeypatch, route="/v1/search"):
    """Bytes that were kept for an answer, and the answer."""
    kept, reserve = [], HeldAnswer.reserve
    with monkeypatch.context() as patched:
        patched.setattr(HeldAnswer, "reserve", lambda self, more: kept.append(more) or reserve(self, more))

        async def main():
            async with app.router.lifespan_context(app):
                await ready(app)
                one = Sending(app, "a", path=route)
                await one.send(json.dumps(body).encode(), more=False)
                await asyncio.wait_for(one.task, 60)
                assert one.status == 200, one.answer
                return one.answer

        answer = asyncio.run(main())
    assert len(kept) == 1
    return kept[0], answer


@pytest.mark.parametrize(
    "filter",
    [
        {"ids": [1, 2, 3]},
        {"ids": [3, 1, 2, 2, 10**12]},
        {"names": [f'n"{number} \u20ac' for number in (1, 2, 3)]},
        {"ids": [0, *range(4, COUNT)], "exclude": True},
    ],
)
def test_no_more_is_kept_than_a_filter_lets_through(path, filter, monkeypatch):
    app = create_app(Sources([path]), Limits(answers_bytes=1 << 20))
    # All of 500 x 599 hits would be over the limit.
    kept, answer = reserved_by(app, {"ids": [*range(500)], "k": COUNT - 1, "filter": filter}, monkeypatch)
    assert all(len(row["ids"]) <= 3 for row in json.loads(answer)["results"])
    assert 0.5 * len(answer) < kept < 2 * len(answer)
    whole, _ = reserved_by(app, {"ids": [0], "k": 50}, monkeypatch)
    outside, answer = reserved_by(app, {"ids": [0], "k": 50, "filter": {"ids": [10**12], "exclude": True}}, monkeypatch)
    assert whole == outside


@pytest.mark.parametrize("walks", [False, True])
def test_no_more_is_kept_than_nodes_that_seeds_reach(tmp_path, walks, monkeypatch):
    # Pairs of nodes, and one ring of 300.
    ring = np.arange(300)
    graph = Graph.from_edges(
        np.r_[ring, 300 + 2 * ring[:100]], np.r_[(ring + 1) % 300, 301 + 2 * ring[:100]], num_nodes=500
    )
    graph.save(tmp_path / "graph.anb")
    paths = [tmp_path / "graph.anb"]
    if walks:
        PowerWalk(walks=200, seed=1).build(graph).save(tmp_path / "walks.anb")
        paths = [tmp_path / "walks.anb", tmp_path / "graph.anb"]
    app = create_app(Sources(paths), Limits())
    pairs = {"seeds": [300, 301, 302], "k": 400}
    kept, answer = reserved_by(app, pairs, monkeypatch, "/v1/ppr")
    assert len(json.loads(answer)["results"][0]["ids"]) == 4
    assert kept < 300
    kept, answer = reserved_by(app, {"seeds": [0], "k": 400}, monkeypatch, "/v1/ppr")
    assert kept >= 300 * 20


def test_a_short_look_never_finds_too_few():
    for seed in range(20):
        rng = np.random.default_rng(seed)
        graph = Graph.from_edges(*rng.integers(0, 40, (2, 30)), directed=bool(seed % 2), num_nodes=40)
        reach = np.linalg.matrix_power(np.eye(40) + graph.to_scipy().toarray(), 40) > 0
        ids = rng.integers(0, 40, 2)
        for most in (1, 5, 40):
            assert reachable(graph, ids, most) == min(reach[ids].any(0).sum(), most)
    star = Graph.from_edges(np.zeros(99, int), np.arange(1, 100))
    assert [reachable(star, np.array([5]), most) for most in (1, 10, 100)] == [1, 10, 100]
    # A clique below what is asked for has more edges than are looked at.
    clique = Graph.from_edges(*np.triu_indices(60, 1), num_nodes=200)
    assert reachable(clique, np.array([0]), 60) == 60
    assert reachable(clique, np.array([0]), 61) == 61
    assert reachable(clique, np.array([70]), 61) == 1


def test_results_of_unlike_sizes_give_back_what_they_do_not_need():
    room = AnswerRoom(1_000_000)
    made = Text(room.enter("a"))
    made.expect([1000, 50_000, 100])
    assert room.num_bytes == 51_100 + text.HEAD
    left = []
    for number in range(3):
        run(made.rows([{"ids": [number]}]))
        left.append(room.num_bytes - made.num_bytes)
    assert left == [50_100 + text.HEAD, 100 + text.HEAD, text.HEAD]
