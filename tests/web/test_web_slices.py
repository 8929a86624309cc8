"""Long answers are written as they are made: whole, or so that nobody takes a half for one, and for no reader that stands still."""

import asyncio
import socket

import pytest
from aiohttp import web

from anabranch.web.slices import SlowReaderError, send_json, write_within

NUM_PARTS = 5


async def served(handler, work):
    """What ``work(port)`` gives beside a server whose every request ``handler`` answers."""
    server = web.Server(handler)
    listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
    try:
        async with asyncio.timeout(10):
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
    while True:
        await write_within(response, b" " * (1 << 20), stall_s)


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
