"""Streams on their way to clients: who reads slowly, or not at all, holds up nobody else."""

import asyncio
import contextlib
import dataclasses
import json
import socket

import aiohttp
import pytest
from aiohttp import web

from anabranch.gateway.config import DeploymentConfig, GatewayConfig, ModelConfig
from anabranch.gateway.core import relay
from anabranch.gateway.core.relay import Ahead, Relay, Sharing
from anabranch.gateway.gateway import Gateway
from anabranch.gateway.http.app import App
from anabranch.gateway.providers.openai import OpenAI
from anabranch.gateway.providers.provider import Failure, UpstreamError
from paced_time import run_paced
from waiting import until_async


class Source:
    """A stream of a dispatcher: ``pieces``, and then its end or an error."""

    def __init__(self, *pieces, error=None):
        self._pieces, self._error = pieces, error
        self.num_read, self.is_closed = 0, False
        self._events = self._relay()

    async def _relay(self):
        for piece in self._pieces:
            self.num_read += 1
            yield piece
            await asyncio.sleep(0)
        if self._error is not None:
            raise self._error

    def __aiter__(self):
        return self._events

    async def aclose(self):
        await self._events.aclose()
        self.is_closed = True

    def drop(self):
        self.is_closed = True


class Others:
    """Who else wants it."""

    def __init__(self, to_the_end=False, is_awaited=True):
        self.released, self.tasks, self.ends, self.closed = 0, [], [], 0
        self.is_awaited, self.ahead = is_awaited, Ahead()
        self.sharing = Sharing(
            to_the_end=to_the_end,
            is_awaited=lambda: self.is_awaited,
            release=self._release,
            keep=self.tasks.append,
            ahead=self.ahead,
        )

    def _release(self):
        self.released += 1

    def on_end(self, stream, is_cut=False):
        if not self.ends:
            self.ends.append(is_cut)

    def relay(self, source, is_shared=True):
        made = Relay(source, self.on_end, self.sharing if is_shared else None)

        def closed():
            self.closed += 1

        made.on_close = closed
        return made


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(relay, "PATIENCE_S", 0.02)


def test_a_reader_that_stands_still_holds_up_nobody_and_loses_nothing():
    async def main():
        source, others = Source(b"a", b"b", b"c"), Others()
        stream = others.relay(source)
        assert await anext(stream) == b"a"
        await until_async(lambda: (others.ends, others.closed) == ([False], 0))
        assert [piece async for piece in stream] == [b"b", b"c"]
        assert others.closed == 1
        await stream.aclose()
        assert (others.ends, others.closed) == ([False], 1)

    run_paced(main())


def test_a_reader_that_trickles_is_counted_in_all():
    async def main():
        source, others = Source(*[b"x"] * 50), Others()
        stream = others.relay(source)
        for _ in range(8):
            await anext(stream)
            # Each wait alone is short of what is borne.
            await asyncio.sleep(0.008)
        await until_async(lambda: others.ends)
        assert len([piece async for piece in stream]) == 42

    run_paced(main())


def test_where_nobody_else_wants_it_nothing_is_read_ahead():
    async def main():
        source, others = Source(b"a", b"b", b"c"), Others()
        stream = others.relay(source, is_shared=False)
        await anext(stream)
        await asyncio.sleep(0.06)
        assert (source.num_read, others.ends) == (1, [])
        await stream.aclose()
        assert (others.ends, source.is_closed, others.closed) == ([True], True, 1)

    run_paced(main())


def test_what_is_too_long_is_not_read_ahead_and_others_do_without(monkeypatch):
    monkeypatch.setattr(relay, "READ_AHEAD", 10)

    async def main():
        source, others = Source(*[b"12345"] * 100), Others()
        stream = others.relay(source)
        await anext(stream)
        await until_async(lambda: others.released)
        await asyncio.sleep(0.02)
        assert source.num_read <= 5
        assert len([piece async for piece in stream]) == 99
        assert others.ends == [False]

    run_paced(main())


def test_nothing_is_read_ahead_while_nobody_waits():
    async def main():
        source, others = Source(*[b"x"] * 30), Others(is_awaited=False)
        stream = others.relay(source)
        await anext(stream)
        await asyncio.sleep(0.06)
        assert (source.num_read, others.tasks, others.ahead.size) == (1, [], 0)
        others.is_awaited = True
        await until_async(lambda: source.num_read > 3)
        # Who waited has gone.
        others.is_awaited = False
        await asyncio.sleep(0.01)
        read = source.num_read
        await asyncio.sleep(0.03)
        assert source.num_read == read or others.ends
        others.is_awaited = True
        await until_async(lambda: others.ends and others.ahead.size == 29)
        assert len([piece async for piece in stream]) == 29
        assert (others.ahead.size, others.released) == (0, 0)

    run_paced(main())


def test_all_streams_together_are_read_ahead_only_so_far(monkeypatch):
    monkeypatch.setattr(relay, "READ_AHEAD_IN_ALL", 20)

    async def main():
        others = Others()
        sources = [Source(*[b"12345"] * 100) for _ in range(8)]
        streams = [others.relay(source) for source in sources]
        for stream in streams:
            await anext(stream)
        # A piece of each is on its way.
        await until_async(lambda: others.released >= 8 and others.ahead.size <= 20 + 5 * 8)
        await streams[0].aclose()
        assert [len([piece async for piece in stream]) for stream in streams[1:]] == [99] * 7
        await until_async(lambda: others.ahead.size == 0)

    run_paced(main())


@pytest.mark.parametrize("is_awaited", [False, True])
@pytest.mark.parametrize("to_the_end", [False, True])
def test_a_reader_that_leaves_takes_it_along_only_if_nobody_else_wants_it(is_awaited, to_the_end):
    async def main():
        source, others = Source(*[b"x"] * 30), Others(to_the_end=to_the_end, is_awaited=is_awaited)
        stream = others.relay(source)
        await anext(stream)
        if stream._task is None:
            stream._read_on()
        await anext(stream)
        await stream.aclose()
        await until_async(lambda: others.closed)
        goes_on = is_awaited or to_the_end
        assert others.ends == [not goes_on]
        assert (source.num_read == 30) is goes_on

    run_paced(main())


def test_what_breaks_while_it_is_read_ahead_ends_it():
    async def main():
        source, others = Source(b"a", b"b", error=UpstreamError(Failure(kind="cut", message="cut"))), Others()
        stream = others.relay(source)
        await anext(stream)
        await until_async(lambda: others.ends)
        assert [piece async for piece in stream] == [b"b"]
        assert (others.ends, others.closed) == ([False], 1)

    run_paced(main())


def test_one_that_nobody_holds_any_more_is_closed():
    async def main():
        source, others = Source(b"a", b"b"), Others()
        others.relay(source)
        await until_async(lambda: others.closed and (others.ends, source.is_closed) == ([True], True))

    run_paced(main())


def test_a_gateway_that_stops_ends_what_is_read_ahead():
    async def main():
        source, others = Source(*[b"x"] * 10**6), Others(to_the_end=True)
        stream = others.relay(source)
        await anext(stream)
        for task in others.tasks:
            task.cancel()
        await asyncio.gather(*others.tasks, return_exceptions=True)
        assert (others.ends, source.is_closed) == ([True], True)
        await stream.aclose()
        assert others.closed == 1

    run_paced(main())


def test_one_slow_reader_fails_nobody_elses_identical_request(tmp_path):
    """Through the front door: a client that reads nothing of a long stream, and another that asks the same."""
    word, count = "w" * 4000, 1500
    calls = []

    async def upstream(request):
        calls.append(await request.json())
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for at in range(count):
            ends = "stop" if at == count - 1 else None
            choice = {"index": 0, "delta": {"content": word}, "finish_reason": ends}
            chunk = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
            await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        await response.write(b"data: [DONE]\n\n")
        return response

    async def main():
        async with served_upstream(upstream) as url:
            provider = OpenAI.Config(model="m", base_url=url, key_env=None)
            model = ModelConfig(name="m", max_tokens=100, deployments=(DeploymentConfig(provider=provider),))
            config = GatewayConfig(models=(model,), require_key=False, store=str(tmp_path / "g.db"))
            async with Gateway(config) as gateway:
                server = App(gateway).server()
                listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
                port = listener.sockets[0].getsockname()[1]
                asked = {"model": "m", "messages": [{"role": "user", "content": "hours?"}], "temperature": 0}
                with stuck_client(port, {**asked, "stream": True}):
                    await until_async(lambda: calls)
                    async with (
                        aiohttp.ClientSession() as client,
                        client.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=asked) as answer,
                    ):
                        text = (await answer.json())["choices"][0]["message"]["content"]
                        assert (answer.status, len(text), len(calls)) == (200, len(word) * count, 1)
                        assert answer.headers["x-cache"] == "shared"
                listener.close()
                await server.shutdown(0.1)

    asyncio.run(main())


@pytest.mark.parametrize("reader", ["stays", "leaves", "has left"])
@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
@pytest.mark.parametrize("to_the_end", [False, True])
def test_what_came_whole_is_whole_whichever_of_its_tasks_a_gateway_that_stops_cancels_first(
    reader, begun, order, to_the_end
):
    """It was told as cancelled, and nobody who came back for it by its name had it, where that of reading was the first."""

    async def main():
        prepared, tasks, others = [], [], Others(to_the_end=to_the_end)

        async def prepare(stream):
            prepared.append(stream)
            await asyncio.Event().wait()

        source = Source(b"a", b"b")
        stream = Relay(source, others.on_end, others.sharing if to_the_end else None, prepare, tasks.append)
        reading = None if to_the_end else asyncio.ensure_future(_all_of(stream))
        if to_the_end and reader == "has left":
            await stream.aclose()
        while not (prepared if begun else tasks):
            await asyncio.sleep(0)
        # That which reads, be it ahead or for its reader, and that which tells.
        both = [*(others.tasks if to_the_end else [reading]), *tasks]
        assert (len(both), len(prepared)) == (2, begun)
        for at in order:
            both[at].cancel()
        if reader == "leaves":
            await stream.aclose()
        await asyncio.gather(*both, return_exceptions=True)
        await asyncio.sleep(0)
        await stream.aclose()
        assert others.ends[0] is False

    asyncio.run(main())


async def _all_of(stream):
    return [piece async for piece in stream]


@contextlib.asynccontextmanager
async def served_upstream(handler):
    app = web.Application()
    app.router.add_post("/v1/chat/completions", handler)
    runner = web.AppRunner(app, shutdown_timeout=0.2)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    await runner.cleanup()


def stuck_client(port, body):
    """Has sent a request, and reads nothing."""
    data = json.dumps(body).encode()
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", port))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(data)}"
    client.sendall(head.encode() + b"\r\n\r\n" + data)
    return client


def test_what_a_stream_that_is_over_needs_is_made_before_its_end_is_told_whoever_goes_away():
    class Ready(Others):
        def __init__(self, waits=False):
            super().__init__()
            self.prepared, self._waits, self.gate = [], waits, asyncio.Event()

        async def prepare(self, stream):
            assert not self.ends
            self.prepared.append(stream)
            if self._waits:
                await self.gate.wait()

    async def main():
        whole, broken = Ready(), Ready()
        source = Source(b"a", b"b")
        read = Relay(source, whole.on_end, None, whole.prepare)
        assert [piece async for piece in read] == [b"a", b"b"]
        assert (whole.prepared, whole.ends) == ([source], [False])
        # Of what broke nothing is made.
        made = Relay(
            Source(b"a", error=UpstreamError(Failure(kind="cut", message="x"))), broken.on_end, None, broken.prepare
        )
        assert [piece async for piece in made] == [b"a"]
        assert (broken.prepared, broken.ends) == ([], [False])
        # It was whole, and is so for whoever is sent away while it is put together: which is not done anew where all others wait for it.
        for is_shared in (False, True):
            late, kept, closes = Ready(waits=True), [], []
            late.is_awaited = False
            sharing = dataclasses.replace(late.sharing, to_the_end=False) if is_shared else None
            made = Relay(Source(b"a"), late.on_end, sharing, late.prepare, kept.append)
            made.on_close = lambda closes=closes: closes.append(1)
            if is_shared:
                made._read_on()
            assert await anext(made) == b"a"
            end = asyncio.ensure_future(anext(made))
            await until_async(lambda late=late: late.prepared)
            end.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await end
            await made.aclose()
            assert (late.ends, closes, len(kept)) == ([], [], 1)
            late.gate.set()
            await asyncio.gather(*kept, *late.tasks)
            await asyncio.sleep(0)
            assert (late.ends, len(late.prepared), closes) == ([False], 1, [1])
        # Likewise where somebody else wants it, and it is read on.
        shared = Ready()
        shared.sharing = dataclasses.replace(shared.sharing, to_the_end=True)
        made = Relay(Source(b"a"), shared.on_end, shared.sharing, shared.prepare)
        await made.aclose()
        await asyncio.gather(*shared.tasks)
        assert (len(shared.prepared), shared.ends) == (1, [False])

    asyncio.run(main())
