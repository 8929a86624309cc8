"""A dispatcher against real servers on loopback: the scripted one, and some that break every rule."""

import asyncio
import contextlib
import json
import os

import pytest
from aiohttp import web

from anabranch.gateway.dispatch import Deployment, Dispatcher, DispatchRules, Group, Plan, upstream
from anabranch.gateway.providers.mock import Mock
from anabranch.gateway.providers.mock_server import application
from anabranch.gateway.providers.openai import OpenAI
from anabranch.gateway.providers.provider import HttpCall, UpstreamError, UpstreamRequest
from anabranch.gateway.providers.recorded import Record, Replay, write_answers
from anabranch.routers.money import Price
from paced_time import run_paced

KEY = "sk-test-abcdefghijklmnop"


def chat(**fields):
    return UpstreamRequest("chat", {"model": "auto", "messages": [{"role": "user", "content": "hello"}], **fields})


@contextlib.asynccontextmanager
async def served(app):
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}/v1"
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def raw(*pieces, wait_s=0.0, hangs=False):
    """A server that sends these bytes, whatever is asked."""

    async def answer(reader, writer):
        with contextlib.suppress(ConnectionError, asyncio.CancelledError):
            await reader.readuntil(b"\r\n\r\n")
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(wait_s)
            if hangs:
                await asyncio.sleep(30)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    finally:
        server.close()


def dispatcher_of(url, rules=None, **limits):
    provider = OpenAI.Config(model="m", base_url=url, key_env=None)
    group = Group(
        name="a", deployments=(Deployment(name="a-0", provider=provider, **limits),), price=Price(output=10**9)
    )
    return Dispatcher([group], rules or DispatchRules(retries=0))


async def asked(dispatcher, seconds=5.0, **fields):
    plan = Plan(candidates=("a",), deadline=dispatcher.now() + seconds)
    try:
        if not fields.get("stream"):
            return await dispatcher.complete(plan, chat(**fields))
        stream = await dispatcher.stream(plan, chat(**fields))
        return stream, b"".join([block async for block in stream])
    finally:
        await dispatcher.close()


def text_of(raw_events):
    text = ""
    for line in raw_events.decode().splitlines():
        if line.startswith("data: {"):
            text += "".join(one["delta"].get("content") or "" for one in json.loads(line[6:])["choices"])
    return text


@pytest.mark.parametrize("stream", [False, True])
def test_a_real_upstream_answers(stream):
    async def work():
        async with served(application(Mock.Config(model="m", reply="over a real socket"))) as url:
            answer = await asked(dispatcher_of(url), stream=stream)
        assert (text_of(answer[1]) if stream else answer.text) == "over a real socket"

    run_paced(work())


@pytest.mark.parametrize(
    ("step", "kind"),
    [
        ("500", "server"),
        ("429:3", "rate_limit"),
        ("401", "auth"),
        ("402", "credit"),
        ("404", "not_found"),
        ("garbage", "garbage"),
        ("html", "garbage"),
        ("short", "garbage"),
        ("context", "context"),
        ("filter", "filter"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_how_a_real_upstream_fails(step, kind, stream):
    async def work():
        async with served(application(Mock.Config(model="m", script=(step,)))) as url:
            if step == "short" and stream:
                return  # an event stream has no length
            with pytest.raises(UpstreamError) as caught:
                await asked(dispatcher_of(url), stream=stream)
        assert caught.value.failure.kind == kind
        if step == "429:3":
            assert caught.value.failure.retry_after_s == 3.0

    run_paced(work())


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"


def said(text):
    return (
        b"data: "
        + json.dumps({"choices": [{"index": 0, "delta": {"content": text}}]}, ensure_ascii=False).encode()
        + b"\n\n"
    )


END = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'


def test_a_character_cut_in_half_is_whole_again():
    async def work():
        whole = said("Grüße 🦊") + END
        at = whole.index("🦊".encode()) + 2
        async with raw(HEAD, whole[:at], whole[at:], wait_s=0.02) as url:
            _, events = await asked(dispatcher_of(url), stream=True)
        assert text_of(events) == "Grüße 🦊"
        assert events.endswith(b"data: [DONE]\n\n")

    run_paced(work())


@pytest.mark.parametrize(
    ("pieces", "kind"),
    [
        ((HEAD + b"this is no event\n\n",), "garbage"),
        ((HEAD + b"data: {no json}\n\n",), "garbage"),
        ((HEAD + b"data: [1, 2]\n\n",), "garbage"),
        ((HEAD,), "cut"),
        ((HEAD + b'data: {"error":{"message":"busy"}}\n\n',), "server"),
        ((b"HTTP/1.1 200 OK\r\ncontent-length: 50\r\ncontent-type: application/json\r\n\r\n{}",), "garbage"),
        ((b"\x00\x01\x02 no http at all\r\n\r\n",), "garbage"),
        ((b"HTTP/1.1 302 Found\r\nlocation: http://169.254.169.254/\r\ncontent-length: 0\r\n\r\n",), "garbage"),
        ((b"HTTP/1.1 307 Found\r\nlocation: http://169.254.169.254/\r\ncontent-length: 0\r\n\r\n",), "garbage"),
    ],
)
def test_upstreams_that_break_the_rules(pieces, kind):
    async def work():
        async with raw(*pieces) as url:
            with pytest.raises(UpstreamError) as caught:
                await asked(dispatcher_of(url), stream=True)
        assert caught.value.failure.kind == kind

    run_paced(work())


def test_garbage_in_the_middle_of_a_stream_ends_it_with_an_error():
    async def work():
        async with raw(HEAD, said("so"), b"garbage\n\n", wait_s=0.02) as url:
            stream, events = await asked(dispatcher_of(url), stream=True)
        assert stream.failure.kind == "garbage"
        assert b"garbage" not in events.split(b'"error"')[0]

    run_paced(work())


def test_one_byte_at_a_time_is_read_and_one_byte_a_second_is_given_up_on():
    async def work():
        whole = said("slow") + END
        async with raw(HEAD, *(whole[at : at + 1] for at in range(len(whole)))) as url:
            _, events = await asked(dispatcher_of(url), stream=True)
        assert text_of(events) == "slow"
        async with raw(HEAD, said("x"), *(whole[at : at + 1] for at in range(len(whole))), wait_s=0.05) as url:
            stream, _ = await asked(dispatcher_of(url, timeout_s=0.3), stream=True)
        assert stream.failure.kind == "timeout"

    run_paced(work())


@pytest.mark.parametrize("stream", [False, True])
def test_an_upstream_that_hangs_costs_no_more_than_the_deadline(stream):
    async def work():
        async with raw(b"", hangs=True) as url:
            dispatcher = dispatcher_of(url)
            dispatcher.now = asyncio.get_running_loop().time
            began = dispatcher.now()
            with pytest.raises(UpstreamError) as caught:
                await asked(dispatcher, seconds=0.2, stream=stream)
            assert dispatcher.now() - began <= 0.2 + 0.05
        assert caught.value.status == 504

    run_paced(work())


def test_nobody_listens():
    async def work():
        with pytest.raises(UpstreamError) as caught:
            await asked(dispatcher_of("http://127.0.0.1:9/v1"))
        assert (caught.value.failure.kind, caught.value.status) == ("connect", 502)

    run_paced(work())


def test_a_reader_who_leaves_ends_the_connection_of_the_upstream():
    async def work():
        ended = asyncio.Event()

        async def answer(request):
            response = web.StreamResponse(headers={"content-type": "text/event-stream"})
            await response.prepare(request)
            try:
                while True:
                    await response.write(said("more"))
                    await asyncio.sleep(0.01)
            finally:
                ended.set()

        app = web.Application()
        app.router.add_post("/v1/chat/completions", answer)
        async with served(app) as url:
            dispatcher = dispatcher_of(url)
            stream = await dispatcher.stream(Plan(candidates=("a",), deadline=dispatcher.now() + 60), chat(stream=True))
            async for _ in stream:
                break
            await stream.aclose()
            await asyncio.wait_for(ended.wait(), 60)
            await dispatcher.close()

    run_paced(work())


def test_a_slow_reader_slows_the_upstream():
    async def work():
        sent = [0]

        async def answer(request):
            response = web.StreamResponse(headers={"content-type": "text/event-stream"})
            await response.prepare(request)
            for _ in range(4000):
                await response.write(said("x" * 16_000))
                sent[0] += 1
            return response

        app = web.Application()
        app.router.add_post("/v1/chat/completions", answer)
        async with served(app) as url:
            dispatcher = dispatcher_of(url)
            stream = await dispatcher.stream(Plan(candidates=("a",), deadline=dispatcher.now() + 60), chat(stream=True))
            async for _ in stream:
                break
            await asyncio.sleep(0.3)
            assert sent[0] < 2000  # 32 of 64 MB: what sockets buffer, not what we do
            await stream.aclose()
            await dispatcher.close()

    run_paced(work())


def test_keys_go_to_the_upstream_and_nowhere_else(monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)

    async def work():
        seen = []

        async def answer(request):
            seen.append(request.headers.get("authorization"))
            return web.json_response({"error": {"message": f"the key {KEY} is wrong"}}, status=401)

        app = web.Application()
        app.router.add_post("/v1/chat/completions", answer)
        async with served(app) as url:
            provider = OpenAI.Config(model="m", base_url=url, key_env="TEST_KEY")
            dispatcher = Dispatcher([Group(name="a", deployments=(Deployment(name="a-0", provider=provider),))])
            with pytest.raises(UpstreamError) as caught:
                await asked(dispatcher)
        assert seen == [f"Bearer {KEY}"]
        assert KEY not in str(caught.value) + repr(caught.value.report) + repr(dispatcher.states())

    run_paced(work())


def test_what_was_recorded_is_replayed(tmp_path):
    path = str(tmp_path / "traffic.jsonl")

    async def work():
        async with served(application(Mock.Config(model="m", reply="once said"))) as url:
            inner = OpenAI.Config(model="m", base_url=url, key_env=None)
            for fields in ({}, {"stream": True}):
                provider = Record.Config(provider=inner, path=path)
                dispatcher = Dispatcher([Group(name="a", deployments=(Deployment(name="a-0", provider=provider),))])
                await asked(dispatcher, **fields)
        player = Deployment(name="p", provider=Replay.Config(path=path))
        answer = await asked(Dispatcher([Group(name="a", deployments=(player,))]))
        assert answer.text == "once said"
        _, events = await asked(Dispatcher([Group(name="a", deployments=(player,))]), stream=True)
        assert text_of(events) == "once said"
        with pytest.raises(UpstreamError, match="not recorded"):
            await asked(Dispatcher([Group(name="a", deployments=(player,))]), temperature=0.5)

    run_paced(work())
    assert oct(os.stat(path).st_mode)[-3:] == "600"


def test_recorded_outcomes_can_be_replayed(tmp_path):
    path = tmp_path / "answers.jsonl"
    write_answers(path, {"hello": "as recorded"}, {"hello": (11, 7)})

    async def work():
        player = Deployment(name="p", provider=Replay.Config(path=str(path)))
        answer = await asked(Dispatcher([Group(name="a", deployments=(player,))]))
        assert (answer.text, answer.usage.prompt, answer.usage.completion) == ("as recorded", 11, 7)

    run_paced(work())


@contextlib.asynccontextmanager
async def trap():
    """A server that nobody may call."""
    called = []

    async def answer(request):
        called.append(request.path)
        return web.json_response({"choices": [{"message": {"content": "trapped"}}]})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    async with served(app) as url:
        yield url, called


def moved(target, status=307):
    async def answer(request):
        return web.Response(status=status, headers={"location": target})

    return answer


@pytest.mark.parametrize("status", [301, 302, 307, 308])
@pytest.mark.parametrize("stream", [False, True])
def test_a_redirect_to_another_host_is_not_followed(status, stream):
    async def work():
        async with trap() as (other, called):
            app = web.Application()
            app.router.add_post("/v1/chat/completions", moved(f"{other}/chat/completions", status))
            async with served(app) as url:
                with pytest.raises(UpstreamError) as caught:
                    await asked(dispatcher_of(url), stream=stream)
        assert (caught.value.failure.kind, called) == ("garbage", [])

    run_paced(work())


def test_a_redirect_within_the_host_is_followed_but_not_for_ever():
    async def work():
        async def answer(request):
            assert (await request.json())["messages"]
            return web.json_response({"choices": [{"message": {"content": "over here"}}]})

        app = web.Application()
        app.router.add_post("/v1/chat/completions", moved("/v2"))
        app.router.add_post("/v2", answer)
        async with served(app) as url:
            assert (await asked(dispatcher_of(url))).text == "over here"
        app = web.Application()
        app.router.add_post("/v1/chat/completions", moved("/v1/chat/completions"))
        async with served(app) as url:
            with pytest.raises(UpstreamError):
                await asked(dispatcher_of(url))

    run_paced(work())


def test_proxies_of_the_environment_are_not_used(monkeypatch):
    async def work():
        async with trap() as (proxy, called), served(application(Mock.Config(model="m", reply="direct"))) as url:
            for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
                monkeypatch.setenv(name, proxy.removesuffix("/v1"))
            assert (await asked(dispatcher_of(url))).text == "direct"
        assert called == []

    run_paced(work())


@pytest.mark.parametrize("most", [None, 0, 5, upstream.WRITE_BYTES, upstream.WRITE_BYTES + 1, 10**9])
@pytest.mark.parametrize("size", [0, 1, upstream.WRITE_BYTES, 2 * upstream.WRITE_BYTES + 3])
def test_a_body_goes_out_by_pieces_without_being_copied(size, most):
    call = HttpCall("http://nowhere", {}, os.urandom(size))
    pieces, turns = [], []

    class Writer:
        async def write(self, piece):
            assert call.is_sent
            pieces.append(piece)
            turns.append(len(others))

    others = []

    async def other():
        while True:
            others.append(1)
            await asyncio.sleep(0)

    async def main():
        body, task = upstream._Body(call), asyncio.ensure_future(other())
        assert (body.size, body.decode("latin-1").encode("latin-1"), call.is_sent) == (size, call.body, False)
        await (body.write(Writer()) if most is None else body.write_with_length(Writer(), most))
        task.cancel()

    asyncio.run(main())
    assert b"".join(pieces) == call.body[:most]
    assert all(piece.obj is call.body and 0 < len(piece) <= upstream.WRITE_BYTES for piece in pieces)
    # Between two of them others have their turn.
    assert len(set(turns)) == len(turns)
    assert call.is_sent
