"""Turns of requests: work comes in steps, what asks for much makes room for others, and bodies are counted before they are held."""

import asyncio
import json
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
from starlette.testclient import TestClient

from anabranch.errors import InputError
from anabranch.graph import HNSW
from anabranch.graph.names import Names, write_names
from anabranch.graph.serve import Limits, Sources, answers, create_app, gate
from anabranch.graph.serve.gate import FullError, Gate, LateError
from asgi_sending import Sending
from waiting import until, until_async

FOREVER = time.monotonic() + 3600


@pytest.fixture
def one_thread(monkeypatch):
    """A gate of one thread, whose turns end with each step."""
    monkeypatch.setattr(gate, "TURN_S", 0.0)
    made = Gate(Limits(concurrency=1, waiting=2))
    yield made
    made.close()


def test_requests_take_turns_and_each_gets_its_result(one_thread):
    order, both = [], threading.Event()

    def steps(name, count):
        both.wait(60)
        for _ in range(count):
            order.append(name)
            yield
        return name, count

    async def run():
        tasks = [
            asyncio.ensure_future(one_thread.run(lambda name=name, count=count: steps(name, count), FOREVER))
            for name, count in (("long", 5), ("short", 2))
        ]
        await asyncio.sleep(0.02)
        both.set()
        found = await asyncio.gather(*tasks)
        assert one_thread.taken == 0
        return found

    assert asyncio.run(run()) == [("long", 5), ("short", 2)]
    # Alone again, the first goes on without a break.
    assert order == ["long", "short", "long", "short", "long", "long", "long"]


class Clock:
    """Stands for the module ``time`` where time goes on by hand."""

    now = 0.0

    def monotonic(self):
        return self.now


def test_work_ends_at_its_deadline(one_thread, monkeypatch):
    """Between two steps; the thread is free then, and what was begun is closed."""
    begun, closed, clock = [], [], Clock()
    monkeypatch.setattr(gate, "time", clock)

    def steps():
        try:
            while True:
                begun.append(1)
                clock.now += 2.0
                yield
        finally:
            closed.append(1)

    async def run():
        over = []
        with pytest.raises(LateError):
            await one_thread.run(steps, 5.0, lambda: over.append(1))
        await until_async(lambda: over == [1] and one_thread.taken == 0)
        return len(begun)

    assert asyncio.run(run()) == len(begun) == 3
    assert closed == [1]


def test_an_error_of_a_later_step_is_the_answer(one_thread):
    def steps():
        yield
        raise InputError("no")

    async def run():
        over = []
        with pytest.raises(InputError, match="no"):
            await one_thread.run(steps, FOREVER, lambda: over.append(1))
        one_thread.taken = one_thread.room
        with pytest.raises(FullError):
            await one_thread.run(steps, FOREVER, lambda: over.append(1))
        assert over == [1, 1]

    asyncio.run(run())


def test_one_address_leaves_places_to_others():
    gate = Gate(Limits(concurrency=1, waiting=7))
    stay = threading.Event()

    def steps():
        stay.wait(60)
        yield
        return 1

    async def run():
        asked = [asyncio.ensure_future(gate.run(steps, FOREVER, source="a")) for _ in range(6)]
        await asyncio.sleep(0)
        with pytest.raises(FullError, match="6 requests of this address are under way or waiting, of 8 that may be"):
            await gate.run(steps, FOREVER, source="a")
        asked += [asyncio.ensure_future(gate.run(steps, FOREVER, source="b")) for _ in range(2)]
        await asyncio.sleep(0)
        with pytest.raises(FullError, match="8 requests are under way or waiting, which is the limit"):
            await gate.run(steps, FOREVER, source="c")
        stay.set()
        assert await asyncio.gather(*asked) == [1] * 8
        assert gate.why_full("a") is None
        assert not gate._of_source

    asyncio.run(run())
    gate.close()


# Of a server


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("gate") / "index.anb"
    index = HNSW(4, M=8, ef_construction=40)
    index.add(np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32), workers=1)
    index.save(path)
    write_names(path, Names(["long" * 30 if number == 7 else f"n{number}" for number in range(60)]))
    return path


def client_of(path, **limits):
    return TestClient(create_app(Sources([path]), Limits(**limits)))


def wait_until_ready(client):
    while client.get("/readyz").status_code != 200:
        time.sleep(0.01)


REQUESTS = [
    {"vectors": np.eye(4).tolist() * 2, "k": 3},
    {"ids": [5, 1, 7, 3], "k": 4, "filter": {"ids": [*range(20)], "exclude": True}},
    {"names": ["n1", "n2", "n3"], "filter": {"names": ["n5", "n9"]}},
    {"ids": [5, 1, 7], "radius": 1.5},
    {"ids": [5, 1, 7], "radius": 1.5, "exact": True, "k": 2},
]


@pytest.mark.parametrize("body", REQUESTS)
def test_a_search_in_steps_answers_the_same(path, body, monkeypatch):
    with client_of(path) as client:
        wait_until_ready(client)
        whole = client.post("/v1/search", json=body)
        assert whole.status_code == 200, whole.text
        monkeypatch.setattr(answers, "WALKED", 1)
        monkeypatch.setattr(gate, "TURN_S", 0.0)
        assert client.post("/v1/search", json=body).json() == whole.json()


def test_a_large_search_ends_at_the_deadline_and_lets_others_in(path, monkeypatch):
    """Queries of one request are many steps: none is begun when it is too late."""
    monkeypatch.setattr(answers, "WALKED", 1)
    asked, gone, search = [], [0.0], HNSW.search

    def slow(index, queries, *rest, **others):
        asked.append(len(queries))
        # As if three of them took all the time there is.
        gone[0] += 1000.0 * (len(asked) == 3)
        return search(index, queries, *rest, **others)

    with client_of(path, timeout_s=120.0, concurrency=1) as client:
        wait_until_ready(client)
        monkeypatch.setattr(gate, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + gone[0]))
        monkeypatch.setattr(HNSW, "search", slow)
        late = client.post("/v1/search", json={"vectors": [[0, 0, 0, 1]] * 1000, "k": 1})
        assert (late.status_code, late.json()["error"]["code"]) == (503, "timeout")
        turns = client.app.state.serving.gate
        until(lambda: not turns.taken)
        assert len(asked) == 3
        gone[0] = 0.0
        assert client.post("/v1/search", json={"ids": [1], "k": 1}).status_code == 200


def test_names_of_results_have_a_limit(path):
    with client_of(path, answer_names=300) as client:
        wait_until_ready(client)
        one = {"vectors": client.app.state.serving.holder.current.vectors.index.vectors([7]).tolist(), "k": 1}
        assert client.post("/v1/search", json=one).json()["results"][0]["names"] == ["long" * 30]
        many = client.post("/v1/search", json={"vectors": one["vectors"] * 3, "k": 1})
        assert (many.status_code, many.json()["error"]["code"]) == (400, "over_limit")
        assert "over 300 characters" in many.json()["error"]["message"]


def test_bodies_are_counted_as_they_come(path):
    """One address has half of the room at most, others the rest; what is given back can be taken again."""
    limits = Limits(body_bytes=100, bodies_bytes=400, timeout_s=20)

    async def run():
        app = create_app(Sources([path]), limits)
        async with app.router.lifespan_context(app):
            while app.state.serving.holder.current is None:
                await asyncio.sleep(0.01)
            room = app.state.serving.bodies
            first = [Sending(app, "a") for _ in range(3)]
            for one in first:
                await one.send(b" " * 90)
            # Two of 90 are all that one address may have of 400.
            await asyncio.wait_for(first[2].task, 60)
            assert [one.status for one in first] == [None, None, 429]
            assert json.loads(first[2].answer)["error"]["code"] == "overloaded"
            assert room.num_bytes == 180
            # One that says what it has is refused before it comes.
            said = Sending(app, "a", length=90)
            await asyncio.wait_for(said.task, 60)
            assert said.status == 429
            other = Sending(app, "b")
            await other.send(b'{"ids": [1], "k": 1}', more=False)
            await asyncio.wait_for(other.task, 60)
            assert other.status == 200
            for one in first[:2]:
                await one.send(b'{"id":1}', more=False)
                await asyncio.wait_for(one.task, 60)
                assert one.status == 400
            assert room.num_bytes == 0
            # Too large for any: told so, whoever is there.
            large = Sending(app, "a", length=101)
            await asyncio.wait_for(large.task, 60)
            assert (large.status, room.num_bytes) == (413, 0)

    asyncio.run(run())


def test_a_body_that_was_read_takes_no_room(path, monkeypatch):
    begun, go, search = threading.Event(), threading.Event(), HNSW.search

    def slow(index, *rest, **others):
        begun.set()
        assert go.wait(60)
        return search(index, *rest, **others)

    async def run():
        app = create_app(Sources([path]), Limits())
        async with app.router.lifespan_context(app):
            while app.state.serving.holder.current is None:
                await asyncio.sleep(0.01)
            monkeypatch.setattr(HNSW, "search", slow)
            one = Sending(app, "a")
            await one.send(b'{"ids": [1], "k": 1}', more=False)
            while not begun.is_set():
                await asyncio.sleep(0.01)
            serving = app.state.serving
            await until_async(lambda: (serving.gate.taken, serving.bodies.num_bytes) == (1, 0))
            go.set()
            await asyncio.wait_for(one.task, 60)
            assert one.status == 200

    asyncio.run(run())


def test_limits_of_bodies_that_make_no_sense():
    with pytest.raises(InputError, match="four times body_bytes"):
        Limits(body_bytes=100, bodies_bytes=399)
    with pytest.raises(InputError, match="bodies_bytes is 0"):
        Limits(bodies_bytes=0)
    assert Limits(body_bytes=64 << 20).room_for_bodies == 256 << 20
    assert Limits().room_for_bodies == 128 << 20
