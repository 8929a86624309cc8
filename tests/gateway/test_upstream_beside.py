"""Calls with a large body go out from an event loop of their own: the same answers and errors, and nothing is left of who goes away."""

import asyncio
import contextlib
import threading

import pytest
from aiohttp import web

from anabranch.gateway.dispatch.upstream_beside import BESIDE_BYTES, UpstreamBeside, _Loop, _ReplyBeside, _Work
from anabranch.gateway.providers.http_call import read_all
from anabranch.gateway.providers.provider import HttpCall, UpstreamError

LARGE = b"x" * (BESIDE_BYTES + 1)
NAME = "anabranch-large-calls"


def threads():
    return sum(thread.name == NAME for thread in threading.enumerate())


@contextlib.asynccontextmanager
async def served(answer):
    app = web.Application(client_max_size=1 << 26)
    app.router.add_post("/", answer)
    runner = web.AppRunner(app, handler_cancellation=True)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{site._server.sockets[0].getsockname()[1]}/"
    finally:
        await runner.cleanup()


def run(answer, work):
    async def main():
        async with served(answer) as url:
            transport = UpstreamBeside()
            try:
                return await asyncio.wait_for(work(transport, url), 60)
            finally:
                await transport.close()
                assert threads() == 0

    return asyncio.run(main())


async def size(request):
    return web.Response(text=str(len(await request.read())), headers={"x-own": "yes"}, status=201)


def test_large_bodies_go_out_elsewhere_and_small_ones_here():
    async def work(transport, url):
        found = []
        for body in (b"small", LARGE, LARGE, b"x" * BESIDE_BYTES):
            call = HttpCall(url, {"content-type": "x/y"}, body)
            reply = await transport.open(call)
            assert (reply.status, reply.headers["x-own"], call.is_sent) == (201, "yes", True)
            found.append((int(await read_all(reply)), threads()))
            assert await reply.read_some() == b""
        return found

    assert run(size, work) == [(5, 0), (len(LARGE), 1), (len(LARGE), 1), (BESIDE_BYTES, 1)]


def test_an_answer_is_read_as_it_comes_and_a_reading_that_is_cancelled_loses_nothing():
    goes_on = asyncio.Event()

    async def answer(request):
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"one ")
        await goes_on.wait()
        await response.write(b"two")
        return response

    async def work(transport, url):
        reply = await transport.open(HttpCall(url, {}, LARGE))
        assert await reply.read_some() == b"one "
        assert reply.read_ready() == b""
        for _ in range(2):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(reply.read_some(), 0.01)
        goes_on.set()
        assert await read_all(reply) == b"two"

    run(answer, work)


def test_what_came_when_nobody_waited_is_given_with_all_that_came_since():
    """The stream it is of is charged by when its bytes were read: old ones alone would say that nothing came since."""
    goes_on, is_out = asyncio.Event(), asyncio.Event()

    async def answer(request):
        await request.read()
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"one ")
        await goes_on.wait()
        for part in (b"two ", b"three"):
            await response.write(part)
            await asyncio.sleep(0.05)
        is_out.set()
        await asyncio.sleep(20)
        return response

    async def work(transport, url):
        reply = await transport.open(HttpCall(url, {}, LARGE))
        assert await reply.read_some() == b"one "
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reply.read_some(), 0.01)
        goes_on.set()
        await is_out.wait()
        # Whoever gives up once more loses nothing of it.
        for _ in range(3):
            task = asyncio.ensure_future(reply.read_some())
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await asyncio.sleep(0.01)
        assert await reply.read_some() == b"two three"
        reply.close()

    run(answer, work)


class NeverRead:
    """An answer of a loop that has ended."""

    status, headers = 200, {}

    async def read_some(self):
        raise AssertionError

    def close(self):
        raise AssertionError


def test_a_reading_that_is_cancelled_in_the_moment_of_its_end_loses_nothing():
    class Reply:
        status, headers = 200, {}
        parts = iter((b"one", b""))

        async def read_some(self):
            return next(self.parts)

        def read_ready(self):
            return b""

    async def main():
        loop = _Loop()
        try:
            reply = _ReplyBeside(Reply(), loop)
            task = asyncio.ensure_future(reply.read_some())
            await asyncio.sleep(0)
            reply._reading.done.add_done_callback(lambda _: task.cancel())
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await reply.read_some() == b"one"
            assert await reply.read_some() == b""
        finally:
            loop.end()

    asyncio.run(main())


def test_work_for_a_loop_that_has_ended_fails_and_is_no_bug():
    async def main():
        transport = UpstreamBeside()
        loop = transport._started()
        under_way = _Work(loop, asyncio.sleep(20))
        await transport.close()
        late = _ReplyBeside(NeverRead(), loop)
        for failing in (under_way.done, late.read_some()):
            with pytest.raises(UpstreamError):
                await asyncio.wait_for(failing, 60)
        late.close()
        transport._loop = loop
        with pytest.raises(UpstreamError) as caught:
            await asyncio.wait_for(transport.open(HttpCall("http://127.0.0.1:9/", {}, LARGE)), 60)
        # It never went out: nobody bills it.
        assert caught.value.failure.kind == "connect"
        transport._loop = None

    asyncio.run(main())


def test_work_that_is_posted_while_the_loop_stops_ends_too():
    async def main():
        loop = _Loop()
        inner, posted = loop._loop.stop, threading.Event()

        def stop():
            posted.wait(60)
            inner()

        loop._loop.stop = stop
        ending = asyncio.ensure_future(asyncio.to_thread(loop.end))
        await asyncio.sleep(0.02)
        work = _Work(loop, asyncio.sleep(20))
        posted.set()
        with pytest.raises(UpstreamError):
            await asyncio.wait_for(work.done, 60)
        await ending
        assert threads() == 0

    asyncio.run(main())


def test_errors_are_those_of_any_call():
    async def cut(request):
        request.transport.abort()
        await asyncio.sleep(1)

    async def work(transport, url):
        kinds = []
        for where in (url, "http://127.0.0.1:9/"):
            with pytest.raises(UpstreamError) as caught:
                await transport.open(HttpCall(where, {}, LARGE))
            kinds.append(caught.value.failure.kind)
        return kinds

    assert run(cut, work) == ["cut", "connect"]


@pytest.mark.parametrize("is_answering", [False, True])
def test_who_goes_away_ends_the_connection(is_answering):
    begun, gone = asyncio.Event(), asyncio.Event()

    async def answer(request):
        try:
            await request.read()
            response = web.StreamResponse()
            if is_answering:
                await response.prepare(request)
                await response.write(b"one")
            begun.set()
            await asyncio.sleep(20)
        except asyncio.CancelledError:
            gone.set()
            raise

    async def work(transport, url):
        task = asyncio.ensure_future(transport.open(HttpCall(url, {}, LARGE)))
        await begun.wait()
        if is_answering:
            reply = await task
            assert await reply.read_some() == b"one"
            reading = asyncio.ensure_future(reply.read_some())
            await asyncio.sleep(0.01)
            reading.cancel()
            reply.close()
        else:
            task.cancel()
        await gone.wait()
        await asyncio.gather(task, return_exceptions=True)

    run(answer, work)


def test_an_answer_that_nobody_waits_for_any_more_is_closed():
    gone = asyncio.Event()

    async def answer(request):
        response = web.StreamResponse()
        try:
            await request.read()
            await response.prepare(request)
            await response.write(b"one")
            await asyncio.sleep(20)
        except asyncio.CancelledError:
            gone.set()
            raise
        return response

    async def work(transport, url):
        opened = threading.Event()
        inner = transport._there.open

        async def late(call):
            reply = await inner(call)
            opened.set()
            # Whoever asked is told no more: it has come.
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.2)
            return reply

        transport._there.open = late
        task = asyncio.ensure_future(transport.open(HttpCall(url, {}, LARGE)))
        await asyncio.to_thread(opened.wait)
        task.cancel()
        await gone.wait()
        assert task.cancelled()

    run(answer, work)


def test_what_is_under_way_ends_with_the_transport():
    async def answer(request):
        await request.read()
        await asyncio.sleep(20)

    async def main():
        async with served(answer) as url:
            transport = UpstreamBeside()
            tasks = [asyncio.ensure_future(transport.open(HttpCall(url, {}, LARGE))) for _ in range(3)]
            await asyncio.sleep(0.1)
            await transport.close()
            assert threads() == 0
            found = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 60)
            assert all(isinstance(one, UpstreamError) for one in found)
            # It begins anew.
            with pytest.raises(UpstreamError):
                await transport.open(HttpCall("http://127.0.0.1:9/", {}, LARGE))
            await transport.close()

    asyncio.run(main())
