"""Who does not read is cut off, who reads slowly but steadily is not, and what all of them leave unread is bounded."""

import asyncio
import contextlib
import http.client
import socket
import threading

import pytest
from aiohttp import web

from anabranch.web import readers
from anabranch.web.readers import Readers
from anabranch.web.server import Server


class Transport:
    """A socket of which the other side takes what it is told to."""

    def __init__(self):
        self.size, self.is_closed, self.is_aborted = 0, False, False

    def write(self, data):
        self.size += len(data)

    def writelines(self, parts):
        self.size += sum(map(len, parts))

    def get_write_buffer_size(self):
        return self.size

    def is_closing(self):
        return self.is_closed

    def close(self):
        self.is_closed = True

    def abort(self):
        self.is_closed = self.is_aborted = True
        self.size = 0

    def get_extra_info(self, name):
        return name if name == "peername" else None


class Loop:
    """A loop whose time is what a test says."""

    def __init__(self, monkeypatch):
        self.now, self.timers = 0.0, []
        monkeypatch.setattr(asyncio, "get_running_loop", lambda: self)

    def time(self):
        return self.now

    def call_later(self, delay, call):
        handle = asyncio.TimerHandle(self.now + delay, call, (), self)
        self.timers.append(handle)
        return handle

    def get_debug(self):
        return False

    def _timer_handle_cancelled(self, handle):
        pass

    def call_exception_handler(self, context):
        raise context["exception"]

    def wait(self, seconds):
        end = self.now + seconds
        while due := [handle for handle in self.timers if handle.when() <= end and not handle.cancelled()]:
            first = min(due, key=lambda handle: handle.when())
            self.timers.remove(first)
            self.now = first.when()
            first._run()
        self.now = end


@pytest.fixture
def loop(monkeypatch):
    return Loop(monkeypatch)


def behind(made, address="a", size=100_000):
    watched = made.enter(Transport(), address)
    watched.write(b"x" * size)
    watched.is_behind()
    return watched, watched._transport


def test_one_who_takes_nothing_is_cut_off(loop):
    cut = []
    made = Readers(10.0, 1000, on_cut=cut.append)
    _, transport = behind(made)
    loop.wait(9.9)
    assert not transport.is_aborted
    loop.wait(1.1)
    assert (transport.is_aborted, cut, len(made)) == (True, ["slow"], 0)
    assert all(handle.cancelled() for handle in loop.timers)  # nothing is looked at where nobody is behind


@pytest.mark.parametrize(("taken", "patience"), [(40_000, 30.0), (3_200_000, 40.0)])
@pytest.mark.parametrize("reads", [True, False])
def test_one_whose_large_buffer_is_full_has_time_to_read_a_part_of_it(loop, taken, patience, reads):
    """The window is shut until up to half of what it has taken was read: at 1,000 bytes a second longer than the patience for others."""
    made = Readers(10.0, 1000)
    watched, transport = behind(made, size=taken + 200_000)
    transport.size -= taken
    watched.has_caught_up()
    watched.is_behind()
    for _ in range(3):
        loop.wait(patience - 1.1)
        assert not transport.is_aborted
        if not reads:
            loop.wait(2.2)
            break
        # All that was read at once, as the window opens.
        transport.size -= round(patience * 1100)
        watched.write(b"x" * round(patience * 1100))
        loop.wait(1.0)
    assert transport.is_aborted == (not reads)


@pytest.mark.parametrize(("rate", "is_cut"), [(900, True), (1100, False)])
def test_the_rate_counts_what_is_taken_whatever_else_is_written(loop, rate, is_cut):
    """As much is written as is read: what lies there stays the same, and says nothing of the reader."""
    made = Readers(10.0, 1000)
    watched, transport = behind(made)
    for _ in range(60):
        transport.size -= rate
        watched.writelines([b"y" * (rate // 2), b"z" * (rate - rate // 2)])
        loop.wait(1.0)
        if transport.is_aborted:
            break
    assert transport.is_aborted == is_cut


def test_one_who_has_caught_up_has_all_the_time_again(loop):
    made = Readers(10.0, 1000)
    watched, transport = behind(made)
    for _ in range(5):
        loop.wait(9.0)
        watched.has_caught_up()
        loop.wait(100.0)
        watched.is_behind()
    assert not transport.is_aborted


def test_what_is_closed_with_bytes_left_does_not_wait_for_ever(loop):
    made = Readers(10.0, 1000)
    watched = made.enter(Transport(), "a")
    watched.write(b"x")
    watched.close()
    # Its transport has asked for more: that ends nothing, for nothing more comes.
    watched.has_caught_up()
    loop.wait(11.1)
    assert watched._transport.is_aborted
    whole = made.enter(Transport(), "a")
    whole.close()
    assert (len(made), whole._transport.is_closed) == (0, True)


def test_where_all_hold_too_much_those_with_most_give_way(loop):
    cut = []
    made = Readers(100.0, 0, 250_000, cut.append)
    many = [behind(made, "a", 60_000)[1] for _ in range(3)]
    single, small = behind(made, "b", 90_000)[1], behind(made, "c", 1000)[1]
    loop.wait(1.5)
    # Not yet: they have just begun.
    assert not cut
    loop.wait(2.0)
    # One of the address that holds most is enough.
    assert [transport.is_aborted for transport in (*many, single, small)] == [True, False, False, False, False]
    assert cut == ["room"]


def test_a_connection_that_is_lost_is_forgotten(loop):
    made = Readers(10.0, 1000)
    watched, _ = behind(made)
    watched.is_lost()
    watched.close()
    assert (len(made), watched.get_write_buffer_size()) == (0, 0)
    assert watched.get_extra_info("peername") == "peername"


@contextlib.contextmanager
def serving(handler, stall_s):
    """aiohttp's server with our connections, in a thread; gives its port, and its readers."""
    made, loop, stop = {}, asyncio.new_event_loop(), None

    async def main():
        nonlocal stop
        stop = asyncio.Event()
        server = Server(handler, lambda status, message: web.Response(status=status), 5.0, stall_s=stall_s)
        listener = await loop.create_server(server, "127.0.0.1", 0)
        made.update(port=listener.sockets[0].getsockname()[1], readers=server._readers)
        begun.set()
        await stop.wait()
        listener.close()
        await server.shutdown(0.1)

    begun = threading.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(main()))
    thread.start()
    begun.wait(60)
    try:
        yield made["port"], made["readers"]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(60)
        loop.close()


@pytest.mark.parametrize("close", [False, True])
def test_an_aiohttp_server_lets_go_of_answers_that_nobody_reads(close, monkeypatch):
    """The gateway and ``anabranch serve`` are such servers."""
    monkeypatch.setattr(readers, "TICK_S", 0.05)
    cut, large = threading.Event(), b"x" * (16 << 20)

    async def answer(request):
        response = web.Response(body=large if request.path == "/large" else b"ok")
        if close:
            response.force_close()
        return response

    with serving(answer, 0.4) as (port, made):
        made.on_cut = lambda why: cut.set()
        with socket.socket() as sleeper:
            sleeper.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sleeper.connect(("127.0.0.1", port))
            sleeper.sendall(b"GET /large HTTP/1.1\r\nhost: x\r\n\r\n")
            assert cut.wait(60)
            # Another is answered, and one who reads gets all.
            link = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            for path, body in (("/", b"ok"), ("/large", large)):
                link.request("GET", path)
                assert link.getresponse().read() == body
            link.close()
