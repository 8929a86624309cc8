"""A server's answers without its socket, in front of a scripted engine: the same as over HTTP, and nothing is left of who goes away."""

import asyncio
import json
from types import SimpleNamespace

import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from anabranch.data import ByteTokenizer
from anabranch.errors import CapacityError
from anabranch.serving.config import ServingConfig
from anabranch.serving.core.admission import AdmissionConfig
from anabranch.serving.http import frontend as frontend_module
from anabranch.serving.http.inside import Inside, InsideReply
from anabranch.serving.http.inside_config import InsideConfig
from anabranch.serving.http.reading import Reader
from anabranch.web.api_error import ApiError
from fake_engine import Script
from serving_thread import HELLO, events, serving, streamed
from waiting import until_async

ASKED = {"model": "fake", "messages": HELLO["messages"]}


def inside(script, **fields):
    config = InsideConfig(engine=ServingConfig(model="folder/fake", process=False), **fields)
    return Inside(config, script, lambda: Reader(ByteTokenizer()))


def run(script, work, **fields):
    """What ``work`` gives of one that has started."""

    async def main():
        made = inside(script, **fields)
        await made.start()
        try:
            return await asyncio.wait_for(work(made), 60)
        finally:
            await made.close()

    return asyncio.run(main())


async def read(reply):
    parts = []
    while part := await reply.read_some():
        parts.append(part)
    return b"".join(parts)


async def ask(made, kind="chat", key="", **fields):
    """Status, headers, and the answer: JSON, or bytes of a stream."""
    asked = {"model": "fake", "prompt": "hello"} if kind == "completions" else ASKED
    reply = await made.ask(kind, json.dumps({**asked, **fields}).encode(), key=key)
    raw = await read(reply)
    is_json = "json" in reply.headers["content-type"]
    return reply.status, reply.headers, json.loads(raw) if is_json else raw


def same(answer):
    """Of an answer, what does not differ from one time to the next."""
    return {name: value for name, value in answer.items() if name not in ("id", "created")}


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("embeddings", {"input": ["x"] * 9}),
        ("completions", {"prompt": "x" * 200, "echo": True, "logprobs": 20, "max_tokens": 1}),
    ],
)
def test_a_long_answer_comes_in_slices_as_over_http(kind, fields):
    async def work(made):
        return await ask(made, kind, **fields)

    status, headers, answer = run(Script(width=1_000), work)
    assert (status, headers["content-type"]) == (200, "application/json; charset=utf-8")
    with serving(Script(width=1_000)) as server:
        code, theirs, other = server.ask(f"/v1/{kind}", {"model": "fake", **fields})
    assert (code, theirs["content-type"], theirs["cache-control"]) == (200, headers["content-type"], "no-store")
    # It is written as it is made.
    assert theirs["content-length"] is None
    assert same(answer) == same(other)


@pytest.mark.parametrize(
    ("kind", "path", "fields"),
    [
        ("chat", "chat/completions", {"max_tokens": 5}),
        ("chat", "chat/completions", {"max_tokens": 5, "n": 2, "logprobs": True, "top_logprobs": 1}),
        ("completions", "completions", {"max_tokens": 3, "echo": True}),
        ("chat", "chat/completions", {"max_tokens": -1}),
        ("chat", "chat/completions", {"model": "other"}),
        ("chat", "chat/completions", {"max_tokens": 100_000}),
        ("embeddings", "embeddings", {"input": "x"}),
    ],
)
def test_a_request_gets_what_it_gets_over_http(kind, path, fields):
    status, headers, answer = run(Script(), lambda made: ask(made, kind, **fields))
    base = {"model": "fake", "prompt": "hello"} if kind == "completions" else ASKED
    with serving() as server:
        code, theirs, other = server.ask(f"/v1/{path}", {**base, **fields})
    assert (status, same(answer)) == (code, same(other))
    assert set(headers) >= {"x-request-id", "Content-Type"}
    assert headers.get("x-route-model") == theirs.get("x-route-model")


def test_a_stream_says_what_the_whole_answer_says_and_ends():
    async def work(made):
        _, _, whole = await ask(made, max_tokens=9)
        status, headers, raw = await ask(made, max_tokens=9, stream=True, stream_options={"include_usage": True})
        return whole, status, headers, raw

    whole, status, headers, raw = run(Script(), work)
    assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
    assert streamed(raw) == whole["choices"][0]["message"]["content"]
    assert events(raw)[-1] == "[DONE]"
    assert events(raw)[-2]["usage"] == whole["usage"]


def test_who_closes_a_stream_ends_its_row_and_leaves_its_place():
    script = Script(endless=True, delay_s=0.001)

    async def work(made):
        first = await made.ask("chat", json.dumps({**ASKED, "stream": True, "max_tokens": 3000}).encode())
        assert await first.read_some()
        status, headers, refused = await ask(made, key="other", max_tokens=1)
        assert (status, refused["error"]["code"], headers["Retry-After"]) == (429, "overloaded", "1")
        first.close()
        await until_async(lambda: not made.frontend.admission.in_flight and len(script.made[0].aborted) == 1)
        return (await ask(made, key="other", max_tokens=1))[0]

    assert run(script, work, admission=AdmissionConfig(max_in_flight=1)) == 200


def test_who_stops_waiting_for_a_whole_answer_ends_its_row():
    script = Script(endless=True, delay_s=0.001)

    async def work(made):
        task = asyncio.create_task(made.ask("chat", json.dumps({**ASKED, "max_tokens": 3000}).encode()))
        while not script.made[0].running:
            await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await until_async(lambda: not made._answering and not made.frontend.admission.in_flight)
        return script.made[0].aborted, made.frontend.metrics.requests.labels("chat", "499")._value.get()

    aborted, gone = run(script, work)
    assert (len(aborted), gone) == (1, 1)


def test_one_that_is_given_up_before_it_begins_holds_nobody_up():
    async def work(made):
        task = asyncio.create_task(made.ask("chat", b"{}"))
        await asyncio.sleep(0)
        for answering in made._answering:
            answering.cancel()
        reply = await task
        return reply.status, json.loads(await read(reply))["error"]["code"]

    assert run(Script(), work) == (503, "shutting_down")


def test_a_slow_reader_holds_its_own_stream_back_and_nobody_else():
    script = Script(endless=True)

    async def work(made):
        slow = await made.ask("chat", json.dumps({**ASKED, "stream": True, "max_tokens": 2000}).encode())
        await slow.read_some()
        for _ in range(20):
            assert (await ask(made, key="other", max_tokens=9))[0] == 200
        # Of what is made, one block is before the reader, the rest waits in bounded buffers.
        assert len(slow._held) < 5_000
        rest = await read(slow)
        assert events(rest)[-1] == "[DONE]"
        return rest.count(b"data: ")

    assert run(script, work) > 100


def test_a_row_that_fails_says_why_and_the_others_go_on():
    script = Script(bad="bad", delay_s=0.001)

    async def work(made):
        before = made.frontend._engine_request
        made.frontend._engine_request = lambda request, id, key, at: before(request, f"{key}{id}", key, at)
        return await asyncio.gather(*(ask(made, key=key, max_tokens=5) for key in ("bad", "a", "b")))

    (status, headers, failed), *others = run(script, work)
    assert (status, failed["error"]["code"], failed["error"]["message"]) == (500, "request_failed", "not a number")
    assert headers["x-should-retry"] == "false"
    assert [status for status, _, _ in others] == [200, 200]


def test_an_engine_that_dies_is_started_again_and_given_up_after_so_many_times(monkeypatch):
    monkeypatch.setattr(frontend_module, "AGAIN_S", 0.001)
    monkeypatch.setattr(frontend_module, "WATCH_S", 0.001)
    script = Script(delay_s=0.001)

    async def work(made):
        reply = await made.ask("chat", json.dumps({**ASKED, "stream": True}).encode())
        script.made[0]._left = 0
        last = events(await read(reply))[-2]["error"]["code"]
        while len(script.made) < 2 or made.frontend.state != "ready":
            await asyncio.sleep(0.001)
        assert (await ask(made, max_tokens=1))[0] == 200
        script.made[1].kill()
        while not made.has_failed:
            await asyncio.sleep(0.001)
        return last, await ask(made, max_tokens=1)

    last, (status, _, answer) = run(script, work, restarts=1)
    assert last == "engine_failed"
    assert (status, answer["error"]["code"]) == (503, "failed")
    assert answer["error"]["message"] == "the engine died more than 1 times"


def test_the_end_cuts_short_what_is_under_way_and_says_so():
    async def work():
        made = inside(Script(endless=True, delay_s=0.001))
        await made.start()
        stream = await made.ask("chat", json.dumps({**ASKED, "stream": True, "max_tokens": 3000}).encode())
        await stream.read_some()
        whole = asyncio.create_task(ask(made, max_tokens=3000))
        while made.frontend.admission.in_flight < 2:
            await asyncio.sleep(0.001)
        closing = asyncio.create_task(made.close())
        raw, (status, _, answer) = await read(stream), await whole
        await closing
        assert (status, answer["error"]["code"]) == (503, "shutting_down")
        assert [one["error"]["code"] for one in events(raw) if "error" in one] == ["shutting_down"]
        assert not made._answering
        later = await ask(made)
        assert (later[0], later[2]["error"]["code"]) == (503, "draining")

    asyncio.run(work())


def test_one_that_cannot_start_says_why_and_leaves_nothing():
    script = Script(start_fails=1)

    async def work():
        made = inside(script)
        with pytest.raises(CapacityError, match="no memory"):
            await made.start()
        return await ask(made)

    status, _, answer = asyncio.run(work())
    assert (status, answer["error"]["code"]) == (503, "loading")


@pytest.mark.parametrize(
    ("took_s", "since_s", "told"),
    [(0, 0, "2"), (30, 0, "30"), (30, 12.4, "18"), (30, 29, "2"), (30, 500, "2"), (400, 5, "60")],
)
def test_who_asks_while_it_loads_is_told_to_come_when_it_will_be_there(took_s, since_s, told, monkeypatch):
    """By how long the last start took, and no more than a minute, which clients heed."""
    now = [100.0]
    monkeypatch.setattr(frontend_module, "time", SimpleNamespace(monotonic=lambda: now[0]))

    async def work():
        made = inside(Script())
        start = made.frontend._make_engine

        def slow():
            now[0] += took_s
            return start()

        made.frontend._make_engine = slow
        await made.start()
        now[0] += 1000
        made.frontend._become("loading")
        now[0] += since_s
        try:
            return await ask(made)
        finally:
            await made.close()

    status, headers, answer = asyncio.run(work())
    assert (status, answer["error"]["code"], headers["Retry-After"]) == (503, "loading", told)


@pytest.mark.parametrize(("default", "made"), [(None, 5), (3, 3), (100_000, 5)])
def test_an_answer_without_an_end_has_so_many_tokens_as_it_may_and_there_is_room_for(default, made):
    async def work(inside):
        reply = await inside.ask("completions", b'{"model": "fake", "prompt": "hello"}', default_tokens=default)
        return reply.status, json.loads(await read(reply))["usage"]["completion_tokens"]

    assert run(Script(), work) == (200, made)


def test_keys_take_turns_and_share_no_prefixes():
    script = Script()

    async def work(made):
        await asyncio.gather(*(ask(made, key=key, max_tokens=1) for key in ("a", "b", "")))
        return made.frontend.admission._is_shared

    assert run(script, work)
    assert {request.key: request.cache_salt for request in script.requests} == {"a": "1 a ", "b": "1 b ", "": ""}


def test_whoever_has_no_key_cannot_spell_the_salt_of_one():
    script = Script()

    async def work(made):
        return await asyncio.gather(ask(made, key="a", max_tokens=1), ask(made, cache_salt="1 a ", max_tokens=1))

    assert run(script, work)
    assert {request.key: request.cache_salt for request in script.requests} == {"a": "1 a ", "": "0  1 a "}


FIELD = st.sampled_from(
    ["model", "messages", "stream", "max_tokens", "n", "stop", "tools", "response_format", "prompt", "input", "x"]
)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 5) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELD | st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
BODY = st.binary(max_size=30) | st.dictionaries(FIELD, VALUE, max_size=5).map(
    lambda fields: json.dumps({**ASKED, **fields}).encode()
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["chat", "completions", "embeddings"]), BODY), min_size=1, max_size=8))
def test_whatever_is_asked_gets_an_answer_and_leaves_nothing(asked):
    async def work(made):
        for kind, body in asked:
            reply = await made.ask(kind, body)
            raw = await asyncio.wait_for(read(reply), 60)
            assert reply.status in (200, 400, 404, 501), raw
            if reply.status != 200:
                assert json.loads(raw)["error"]["message"]
        assert not made._answering
        assert not made.frontend.admission.in_flight

    run(Script(), work)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 12), st.integers(1, 40)), min_size=1, max_size=10),
    st.integers(1, 4),
)
def test_whoever_goes_away_whenever_leaves_nothing_and_holds_nobody_up(asked, slots):
    """Requests that are closed after so many turns of the loop, streamed or not, among some that are read to their end."""
    script = Script(slots=slots, endless=True)

    async def work(made):
        async def one(is_stream, turns, length):
            body = json.dumps({**ASKED, "stream": is_stream, "max_tokens": length}).encode()
            asking = asyncio.create_task(made.ask("chat", body, key=str(length % 3)))
            for _ in range(turns):
                await asyncio.sleep(0)
            if turns % 3 == 0:
                return len(await read(await asking)) > 0
            if asking.done():
                asking.result().close()
            else:
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
            return True

        assert all(await asyncio.gather(*(one(*each) for each in asked)))
        await until_async(lambda: not (made._answering or made.frontend.admission.in_flight or made.frontend._live))
        await until_async(lambda: not script.made[0].running)
        assert (await ask(made, max_tokens=2))[0] == 200

    run(script, work)


def test_a_fault_of_ours_is_told_as_one(monkeypatch, caplog):
    async def work(made):
        async def broken(*given):
            raise KeyError("secret")

        monkeypatch.setattr(made._generate, "answer", broken)
        return await ask(made)

    status, _, answer = run(Script(), work)
    assert (status, answer["error"]["code"]) == (500, "internal_error")
    assert "secret" not in json.dumps(answer)
    assert "a bug: chat inside" in caplog.text


LONG = {
    "completions": {"prompt": "x" * 200, "echo": True, "logprobs": 20, "max_tokens": 1},
    "embeddings": {"input": ["x"] * 9},
}


async def cut_for_room(made, kind, **fields):
    """A long answer that is cut for the room of others once some of it is there: its reply, and what was there."""
    body = {"model": "fake", **LONG[kind], **fields}
    reply = await made.ask(kind, json.dumps(body).encode())
    await until_async(lambda: reply._held)
    [held] = made.frontend.answers._read
    held.cut_off()
    return reply, reply.read_ready()


@pytest.mark.parametrize(
    ("kind", "fields"), [("embeddings", {}), ("completions", {}), ("completions", {"stream": True})]
)
def test_an_answer_that_is_cut_for_room_breaks_off_and_says_why(kind, fields):
    """It ended with "the engine was stopped", as an event behind half a whole answer, or in the middle of another event."""

    async def work(made):
        reply, raw = await cut_for_room(made, kind, **fields)
        assert reply.status == 200
        # Half of an object, or of an event, and no error in the midst of it.
        assert not raw.endswith(b"\n\n")
        assert raw.count(b"{") > raw.count(b"}")
        assert b'"error"' not in raw
        for _ in range(2):
            with pytest.raises(ApiError, match="others need the room") as caught:
                await reply.read_some()
            assert (caught.value.status, caught.value.code) == (429, "overloaded")
            assert caught.value.headers["Retry-After"] == "1"
        await until_async(lambda: not made._answering)
        assert (made.frontend.answers.num_bytes, reply.read_ready()) == (0, b"")
        told = made.frontend.metrics.requests.labels(kind, "429")._value.get()
        return told, (await ask(made, max_tokens=1))[0]

    assert run(Script(width=1_000), work) == (1, 200)


def told(error):
    return b"data: " + json.dumps(error.to_dict()).encode() + b"\n\ndata: [DONE]\n\n"


WHY = ApiError(429, "overloaded", "why")


def test_before_its_status_is_known_an_answer_that_fails_is_the_error():
    async def work():
        reply = InsideReply()
        reply.fail(WHY)
        assert reply.begun.is_set()
        assert (reply.status, json.loads(await read(reply))) == (429, WHY.to_dict())

    asyncio.run(work())


@pytest.mark.parametrize("is_read", [False, True])
def test_a_stream_that_fails_between_two_events_ends_with_one_that_says_so(is_read):
    async def work():
        reply = InsideReply()
        reply.begin(200, {}, told)
        await reply.put(b"data: 1\n\n")
        first = reply.read_ready() if is_read else b""
        reply.fail(WHY)
        # Who makes it may not know of that.
        await reply.put(b"data: 2\n\n")
        reply.end(web.StreamResponse())
        assert first + await read(reply) == b"data: 1\n\n" + told(WHY)

    asyncio.run(work())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 30), max_size=12), st.booleans(), st.integers(0, 12))
def test_whenever_an_answer_fails_what_came_of_it_is_followed_by_nothing_else_or_by_one_whole_event(
    sizes, is_stream, after
):
    body = b"".join(b'data: {"n": %d}\n\n' % n for n in range(12)) if is_stream else bytes(range(97, 123)) * 12

    async def work():
        reply, at = InsideReply(), 0
        reply.begin(200, {}, told if is_stream else None)

        async def make():
            nonlocal at
            for number, size in enumerate(sizes):
                if number == after:
                    break
                await reply.put(body[at : at + size])
                at += size
            reply.fail(WHY)

        making, parts, error = asyncio.create_task(make()), [], None
        try:
            while part := await reply.read_some():
                parts.append(part)
        except ApiError as broken:
            error = broken
        await making
        is_between = is_stream and (not at or body[:at].endswith(b"\n\n"))
        assert error is (None if is_between else WHY)
        assert b"".join(parts) == body[:at] + (told(WHY) if is_between else b"")

    asyncio.run(work())
