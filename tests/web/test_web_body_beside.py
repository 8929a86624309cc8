"""Large bodies that are read from their sockets in another thread: whole, in time, within their room, and nobody else's bytes."""

import asyncio
import contextlib
import errno
import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from aiohttp import web

from anabranch.web import body_beside
from anabranch.web.answers import error_response, read_parts
from anabranch.web.api_error import ApiError
from anabranch.web.body_beside import BESIDE_BYTES, TAKEN, BodyBeside, _threads
from waiting import until_async

uvloop = pytest.importorskip("uvloop")
LARGE = os.urandom(BESIDE_BYTES) * 3 + b"end"


def head(size, more=""):
    return f"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: {size}\r\n{more}\r\n".encode()


class Served:
    """What a server has read, and how that ended; it answers with the size."""

    def __init__(self, most=1 << 30, timeout_s=20.0, keep=None):
        self.most, self.timeout_s, self.keep = most, timeout_s, keep
        self.bodies, self.taken, self.errors = [], [], []

    async def answer(self, request):
        try:
            parts = await read_parts(request, self.most, self.timeout_s, self.keep, is_beside=True)
        except ApiError as error:
            self.errors.append(error)
            response = error_response(error)
            response.force_close()
            return response
        except BaseException as error:
            self.errors.append(error)
            raise
        self.bodies.append(b"".join(parts))
        self.taken.append(bool(request.get(TAKEN)))
        response = web.Response(text=str(len(self.bodies[-1])))
        if request.get(TAKEN):
            response.force_close()
        return response


def run(work, *, runner=asyncio.run, **fields):
    """What ``work`` gives of a server and a connection to it."""

    async def main():
        made = Served(**fields)
        server = web.Server(made.answer, handler_cancellation=True, lingering_time=0.2)
        listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
        reader, writer = await asyncio.open_connection(*listener.sockets[0].getsockname()[:2])
        try:
            return await asyncio.wait_for(work(made, reader, writer), 60)
        finally:
            writer.close()
            listener.close()
            await server.shutdown(0.1)

    return runner(main())


async def status(reader):
    return int((await reader.readline()).split()[1])


@pytest.mark.parametrize("runner", [asyncio.run, uvloop.run])
@pytest.mark.parametrize("first", [0, 100, BESIDE_BYTES + 1])
def test_a_large_body_comes_whole_and_its_connection_is_closed(runner, first):
    async def work(made, reader, writer):
        writer.write(head(len(LARGE)) + LARGE[:first])
        await writer.drain()
        await asyncio.sleep(0.02)
        writer.write(LARGE[first:])
        await writer.drain()
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert b"connection: close" in answer.lower()
        assert answer.endswith(str(len(LARGE)).encode())
        assert made.bodies == [LARGE]
        assert made.taken == [True]

    run(work, runner=runner)


@pytest.mark.parametrize("runner", [asyncio.run, uvloop.run])
def test_what_comes_behind_it_is_no_request(runner):
    async def work(made, reader, writer):
        writer.write(head(len(LARGE)) + LARGE + head(3) + b"abc")
        with contextlib.suppress(ConnectionResetError):
            await reader.read()
        assert made.bodies == [LARGE]

    run(work, runner=runner)


@pytest.mark.parametrize(
    "sent",
    [
        head(5) + b"hello",
        head(BESIDE_BYTES) + b"x" * BESIDE_BYTES,
        b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n400000\r\n"
        + b"x" * 0x400000
        + b"\r\n0\r\n\r\n",
    ],
)
def test_others_are_read_as_ever_and_their_connection_stays(sent):
    async def work(made, reader, writer):
        for _ in range(2):
            writer.write(sent)
            await writer.drain()
            assert await status(reader) == 200
            await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(len(str(len(made.bodies[-1]))))
        assert made.taken == [False, False]

    run(work)


def test_a_sender_may_take_its_time_but_not_more_than_there_is():
    async def slowly(made, reader, writer):
        writer.write(head(len(LARGE)))
        for at in range(0, len(LARGE), step := len(LARGE) // 12):
            writer.write(LARGE[at : at + step])
            await writer.drain()
            await asyncio.sleep(0.005)
        assert await status(reader) == 200
        assert made.bodies == [LARGE]

    run(slowly)

    async def never(made, reader, writer):
        writer.write(head(len(LARGE)) + LARGE[:-1])
        await writer.drain()
        assert await status(reader) == 408
        assert made.errors[0].code == "slow_body"

    run(never, timeout_s=0.1)


class Trickle:
    """A socket on which there is always one more byte; what happens as each is read."""

    def __init__(self, then):
        self.count, self.then, (self.sock, self.other) = 0, then, socket.socketpair()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.sock.close()
        self.other.close()

    def fileno(self):
        return self.sock.fileno()

    def recv(self, most):
        self.count += 1
        assert self.count < 1000
        self.then(self.count)
        return b"x"


def test_a_body_that_trickles_has_a_thread_for_a_turn_only(monkeypatch):
    now = [5.0]
    monkeypatch.setattr(body_beside, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def pass_time(count):
        now[0] += 0.001

    with Trickle(pass_time) as one:
        found, has_ended = body_beside._taken(one, 1 << 20, threading.Event())
    assert 45 < one.count < 55
    assert (len(found), has_ended) == (one.count, False)


def test_a_body_that_nobody_waits_for_is_read_no_further():
    over = threading.Event()
    with Trickle(lambda count: over.set()) as one:
        assert body_beside._taken(one, 1 << 20, over) == ([b"x"], False)
        assert body_beside._taken(one, 1 << 20, over) == ([], False)
    assert one.count == 1


def test_when_it_ends_its_thread_is_told():
    class Request:
        protocol = SimpleNamespace(resume_reading=lambda resume_parser: None)

    ours, theirs = socket.socketpair()
    one = BodyBeside(Request(), ours, 100)
    one.__exit__(None, None, None)
    assert one._is_over.is_set()
    theirs.close()


def test_each_part_is_told_of_before_it_is_kept_and_may_be_refused():
    told = []

    def keep(num_bytes, left):
        told.append(num_bytes)
        if sum(told) > 2 * BESIDE_BYTES:
            raise ApiError(429, "overloaded", "no room")

    async def work(made, reader, writer):
        writer.write(head(len(LARGE)) + LARGE)
        assert await status(reader) == 429
        await reader.read()
        assert 2 * BESIDE_BYTES < sum(told) < len(LARGE)

    run(work, keep=keep)


def test_where_no_more_files_may_be_open_it_is_read_as_any_other(monkeypatch):
    def full(fd):
        raise OSError(errno.EMFILE, "too many open files")

    async def work(made, reader, writer):
        with monkeypatch.context() as patched:
            patched.setattr(socket, "dup", full)
            writer.write(head(len(LARGE)) + LARGE[: 2 * BESIDE_BYTES])
            await writer.drain()
            await asyncio.sleep(0.02)
            writer.write(LARGE[2 * BESIDE_BYTES :])
            assert await status(reader) == 200
        assert made.bodies == [LARGE]
        assert made.taken == [False]

    run(work)


def test_bodies_are_read_in_threads_of_their_own():
    """Whatever keeps those of the loop busy, and none but theirs."""

    async def work(made, reader, writer):
        go = threading.Event()
        pool = ThreadPoolExecutor(1)
        asyncio.get_running_loop().set_default_executor(pool)
        blocked = asyncio.get_running_loop().run_in_executor(None, go.wait)
        try:
            writer.write(head(len(LARGE)) + LARGE)
            assert await status(reader) == 200
        finally:
            go.set()
            await blocked
        assert made.bodies == [LARGE]
        assert any(thread.name.startswith("anabranch-bodies") for thread in threading.enumerate())

    run(work)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_of_a_process_that_has_read_bodies_reads_them_too():
    async def work(made, reader, writer):
        writer.write(head(len(LARGE)) + LARGE)
        assert await status(reader) == 200

    run(work)
    # None of it is there in the child.
    at_fork = _threads()
    ours, theirs = os.pipe()
    child = os.fork()
    if not child:
        os.write(theirs, b"new" if _threads() is not at_fork else b"old")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(ours, 9) == b"new"
    os.close(ours)
    os.close(theirs)


CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
EXPECT = "expect: 100-Continue\r\n"


@pytest.mark.parametrize("size", [5, len(LARGE)])
def test_who_waits_to_hear_that_the_body_is_wanted_hears_it(size):
    async def work(made, reader, writer):
        writer.write(head(size, EXPECT))
        assert await reader.readexactly(len(CONTINUE)) == CONTINUE
        writer.write(LARGE[:size])
        assert await status(reader) == 200
        assert made.bodies == [LARGE[:size]]

    run(work)


@pytest.mark.parametrize(
    ("sent", "told"),
    [
        # Refused by its head.
        (head(10_000, EXPECT), 413),
        (head(5, EXPECT + "content-encoding: gzip\r\n"), 415),
        # It did not wait.
        (head(5, EXPECT) + b"hello", 200),
        (head(500, EXPECT) + b"x" * 499, 408),
        # It knows no such answer, expects another, or nothing.
        (head(5, EXPECT).replace(b"HTTP/1.1", b"HTTP/1.0"), 408),
        (head(5, "expect: much\r\n"), 408),
        (head(5), 408),
    ],
)
def test_nobody_else_hears_of_it(sent, told):
    async def work(made, reader, writer):
        writer.write(sent)
        assert await status(reader) == told

    run(work, most=1000, timeout_s=0.05 if told == 408 else 60.0)


def open_sockets():
    found = 0
    for one in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found += os.readlink(f"/proc/self/fd/{one}").startswith("socket:")
    return found


@pytest.mark.parametrize("is_reset", [False, True])
def test_who_goes_away_in_the_middle_is_noticed_and_nothing_is_left(is_reset):
    async def work(made, reader, writer):
        before = open_sockets()
        writer.write(head(len(LARGE)) + LARGE[:-100])
        await writer.drain()
        if is_reset:
            sock = writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
            writer.transport.abort()
        writer.close()
        while not made.errors:
            await asyncio.sleep(0.001)
        assert isinstance(made.errors[0], ConnectionResetError | asyncio.CancelledError)
        await until_async(lambda: open_sockets() < before)

    run(work)


def test_a_reading_that_is_cancelled_leaves_its_socket_to_the_thread_that_has_it():
    async def main():
        ours, theirs = socket.socketpair()
        ours.setblocking(False)

        class Protocol:
            def resume_reading(self, resume_parser):
                assert not resume_parser

        class Request:
            protocol = Protocol()

        one = BodyBeside(Request(), ours, 100)
        task = asyncio.ensure_future(one.some())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        one.__exit__(None, None, None)
        while ours.fileno() >= 0:
            await asyncio.sleep(0.001)
        theirs.close()

    asyncio.run(main())


def test_a_reading_that_outlives_its_loop_leaves_no_socket_open(monkeypatch):
    """Its socket was closed by the loop alone, and where that had ended, by nobody: "unclosed socket"."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    threads, goes_on = ThreadPoolExecutor(1), threading.Event()
    monkeypatch.setattr(body_beside, "_threads", lambda: threads)
    # The one thread has other things to do until the loop is gone.
    threads.submit(goes_on.wait)

    async def main():
        request = SimpleNamespace(protocol=SimpleNamespace(resume_reading=lambda resume_parser: None))
        one = BodyBeside(request, ours, 100)
        task = asyncio.ensure_future(one.some())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        one.__exit__(None, None, None)
        assert ours.fileno() >= 0

    try:
        asyncio.run(main())
    finally:
        goes_on.set()
        threads.shutdown()
    assert ours.fileno() == -1
    theirs.close()
