"""Long answers are written as they are made: whole, or so that nobody takes a half for one, and for no reader that stands still."""

import asyncio
import socket

import pytest
from aiohttp import web

from anabranch.web.large_json import TOGETHER
from anabranch.web.slices import SlowReaderError, Writing, send_json, told
from anabranch.web.turns import Turns
from paced_time import run_paced

NUM_PARTS = 5


async def served(handler, work):
    """What ``work(port)`` gives beside a server whose every request ``handler`` answers."""
    server = web.Server(handler)
    listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
    try:
        async with asyncio.timeout(60):
            return await work(listener.sockets[0].getsockname()[1])
    finally:
        listener.close()
        await server.shutdown(0.1)


async def parts(breaks_at=None):
    for number in range(NUM_PARTS):
        if number == breaks_at:
            raise ValueError("a bug")
        yield b"[1]" if number == 0 else b" "
        # What came before is on its way.
        await asyncio.sleep(0.02)


async def ask(port, version):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"GET / HTTP/{version}\r\nhost: x\r\n\r\n".encode())
    return reader, writer


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_half_an_answer_looks_like_none(version):
    """Nothing comes behind it: neither what ends an answer, nor the error that it was, which a reader would take for its rest."""

    async def handler(request):
        try:
            return await send_json(request, {}, parts(breaks_at=3), 5.0)
        except ValueError:
            # As servers do with what they did not foresee.
            return web.Response(status=500)

    async def work(port):
        reader, writer = await ask(port, version)
        raw = await reader.read()
        writer.close()
        return raw

    raw = asyncio.run(served(handler, work))
    head, _, body = raw.partition(b"\r\n\r\n")
    assert b"200 OK" in head
    assert body == (b"[1]  " if version == "1.0" else b"3\r\n[1]\r\n1\r\n \r\n1\r\n \r\n")


def test_what_breaks_before_anything_is_written_is_an_error_as_any():
    async def handler(request):
        try:
            return await send_json(request, {}, parts(breaks_at=0), 5.0)
        except ValueError:
            response = web.Response(status=500, text="none")
            response.force_close()
            return response

    async def work(port):
        reader, writer = await ask(port, "1.1")
        raw = await reader.read()
        writer.close()
        return raw

    raw = asyncio.run(served(handler, work))
    assert raw.startswith(b"HTTP/1.1 500")
    assert raw.endswith(b"none")


async def _json(request, stall_s):
    async def much():
        while True:
            yield b" " * (1 << 20)

    return await send_json(request, {}, much(), stall_s)


async def _stream(request, stall_s):
    response = web.StreamResponse()
    await response.prepare(request)
    writing = Writing(response, stall_s)
    while True:
        await writing.write(b" " * (1 << 20))


@pytest.mark.parametrize("write", [_json, _stream])
def test_a_reader_who_stands_still_is_given_up(write):
    async def main():
        ended = asyncio.get_running_loop().create_future()

        async def handler(request):
            try:
                return await write(request, 0.1)
            except BaseException as error:
                ended.set_result(error)
                raise ConnectionResetError from None

        async def work(port):
            link = socket.create_connection(("127.0.0.1", port))
            with link:
                link.sendall(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
                return await ended

        return await served(handler, work)

    assert isinstance(asyncio.run(main()), SlowReaderError)


class Slow:
    """A response whose reader takes a hundredth of a second for each write."""

    def __init__(self):
        self.taken = b""

    async def write(self, data):
        await asyncio.sleep(0.01)
        self.taken += data


def written(slowest, stall_s=0.2, most=200):
    """Writes of ten bytes until the reader is given up."""

    async def main():
        writing = Writing(Slow(), stall_s, slowest)
        for number in range(most):
            try:
                await writing.write(b"0123456789")
            except SlowReaderError:
                return number
        return most

    return run_paced(main())


def test_a_reader_of_a_whole_answer_has_to_keep_up():
    """It took a slice within the time that one may take, over and over, and kept all that the answer was made of for hours."""
    assert written(10_000) < 25
    # At a byte a second each write brings ten seconds more.
    assert written(1, stall_s=5.0, most=30) == 30
    assert written(None, stall_s=5.0, most=30) == 30


def test_what_waits_for_something_else_does_not_count():
    async def main():
        writing = Writing(reader := Slow(), 0.2, 1_000_000)
        for _ in range(3):
            await asyncio.sleep(0.15)
            await writing.write(b"0")
        return reader.taken

    assert run_paced(main()) == b"000"


def broken(*pieces):
    """Pieces, behind which making one fails."""
    yield from pieces
    raise ValueError("a bug")


@pytest.mark.parametrize(
    "pieces", [(), (b"a", b"b"), (b"a" * TOGETHER,), (b"a" * TOGETHER, b"b"), (b"a" * TOGETHER, b"b" * TOGETHER, b"c")]
)
@pytest.mark.parametrize("is_broken", [False, True])
def test_all_that_was_made_is_told_also_where_the_rest_cannot_be(pieces, is_broken):
    got, ticks, turns = [], [], Turns()

    async def tick():
        while True:
            ticks.append(len(got))
            await asyncio.sleep(0)

    async def work():
        ticking = asyncio.create_task(tick())
        await asyncio.sleep(0)
        try:
            async for one in told(turns, "a", broken(*pieces) if is_broken else iter(pieces)):
                got.append(one)  # noqa: PERF401
        finally:
            ticking.cancel()

    if is_broken:
        with pytest.raises(ValueError, match="a bug"):
            asyncio.run(work())
    else:
        asyncio.run(work())
    assert b"".join(got) == b"".join(pieces)
    # The loop had its turn behind each slice but the last, and none where all is short.
    assert set(range(1, len(got))) <= set(ticks)
    if sum(map(len, pieces)) < TOGETHER:
        assert len(ticks) == 1
