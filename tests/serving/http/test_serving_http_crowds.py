"""Many at once against a server process, over sockets, beside a stream of somebody else: bodies that hold up the parser, more of them than
there is room for, senders who come slowly, and more connections than there are places."""

import contextlib
import http.client
import json
import os
import select
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from serving_models import serve_process
from waiting import until

MIB = 1 << 20
KEYS = ("--api-key", "alice=a", "--api-key", "bob=b")
# Two busy processors, and Python's lock, are shared with these clients; 24 bodies used to hold everybody up for six seconds and more.
MOST_S = 3.0


def head(path, length, key="a", host="localhost"):
    lines = (
        f"POST {path} HTTP/1.1",
        f"host: {host}",
        "content-type: application/json",
        f"authorization: Bearer {key}",
        f"content-length: {length}",
        "",
        "",
    )
    return "\r\n".join(lines).encode()


@contextlib.contextmanager
def connected(port, address="127.0.0.1"):
    with socket.socket() as link:
        link.settimeout(60)
        link.bind((address, 0))
        link.connect(("127.0.0.1", port))
        yield link


def answered(link):
    """Status, headers and body of the next answer."""
    answer = http.client.HTTPResponse(link)
    answer.begin()
    return answer.status, answer.headers, answer.read()


def send(port, raw, key="a", path="/v1/completions"):
    """What is said to a body; the server may hang up before it has it all."""
    with connected(port) as link:
        with contextlib.suppress(ConnectionError):
            link.sendall(head(path, len(raw), key) + raw)
        return answered(link)


def lives(port, address="127.0.0.1"):
    """Seconds that ``/health/live`` takes."""
    began = time.monotonic()
    with connected(port, address) as link:
        link.sendall(b"GET /health/live HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
        assert answered(link)[0] == 200
    return time.monotonic() - began


class Innocent:
    """One stream of bob's, as long as the block lasts: its longest time between two events, and the longest to a sign of life."""

    def __init__(self, port):
        self.port, self.gap, self.live, self.events, self.wrong = port, 0.0, 0.0, 0, []

    def __enter__(self):
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._stream), threading.Thread(target=self._look)]
        for thread in self._threads:
            thread.start()
        until(lambda: self.events > 3 or self.wrong)
        self.gap = 0.0
        return self

    def __exit__(self, *_):
        self._is_over.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive()

    def _stream(self):
        body = {"model": "small-moe", "prompt": "hello", "max_tokens": 2000, "ignore_eos": True, "stream": True}
        try:
            while not self._is_over.is_set():
                with connected(self.port) as link:
                    raw = json.dumps(body).encode()
                    link.sendall(head("/v1/completions", len(raw), "b") + raw)
                    answer = http.client.HTTPResponse(link)
                    answer.begin()
                    assert answer.status == 200, answer.read()
                    last = time.monotonic()
                    while not self._is_over.is_set() and (line := answer.readline()):
                        assert b"error" not in line, line
                        if line.startswith(b"data: {"):
                            now = time.monotonic()
                            self.gap, last = max(self.gap, now - last), now
                            self.events += 1
        except Exception as error:
            self.wrong.append(repr(error))

    def _look(self):
        try:
            while not self._is_over.wait(0.02):
                self.live = max(self.live, lives(self.port))
        except Exception as error:
            self.wrong.append(repr(error))

    def is_well(self):
        assert self.wrong == []
        assert self.gap < MOST_S
        assert self.live < MOST_S


NESTED = b'{"model": "small-moe", "prompt": [' + b",".join([b"[" * 150 + b"]" * 150] * (8 * MIB // 302)) + b"]}"
DEAR = {
    "lists": NESTED,
    "names": b'{"a":1' + b"".join(b',"%07x":1' % number for number in range(690_000)) + b"}",
    "numbers": b'{"prompt": [' + b",".join([b"1.23456789012345678901e-300"] * 290_000) + b"]}",
    "long numbers": b'{"prompt": [' + b",".join([b"9" * 4290] * 1900) + b"]}",
}


@pytest.mark.slow
def test_a_crowd_is_kept_within_bounds():
    """All in turn at one server, since its start takes most of the time."""
    settings = (
        "http.limits.connections=60",
        f"http.limits.bodies_bytes={96 * MIB}",
        "http.limits.body_timeout_s=8",
        "http.admission.max_in_flight=40",
        "engine.kv_memory=64MiB",
    )
    settings = [word for setting in settings for word in ("--set", setting)]
    with serve_process(*KEYS, *settings) as server:
        for check in (dear_bodies, more_bodies_than_there_is_room_for, slow_senders, connections):
            with Innocent(server.port) as innocent:
                check(server)
            innocent.is_well()
        assert "a bug:" not in server.log.read_text()


def dear_bodies(server):
    """Nothing is made of bodies that a parser would make too much of, and 24 at once hold nobody up."""
    with ThreadPoolExecutor(24) as pool:
        for raw in DEAR.values():
            for status, _, body in pool.map(lambda _, raw=raw: send(server.port, raw), range(24)):
                code = json.loads(body)["error"]["code"]
                assert (status, code) in ((400, "too_many_values"), (429, "overloaded")), body
        raw = json.dumps({"model": "small-moe", "prompt": [7] * 250_000}).encode()
        assert {answer[0] for answer in pool.map(lambda _: send(server.port, raw), range(8))} <= {400, 429}


def resident(server):
    return int(Path(f"/proc/{server.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def more_bodies_than_there_is_room_for(server):
    """Alice's bodies take no more than her part: the rest is refused before it is read, and bob's are taken."""
    raw = json.dumps({"model": "no", "prompt": "x" * (8 * MIB - 100)}).encode()
    before, most = resident(server), 0
    with contextlib.ExitStack() as stack:
        links = [stack.enter_context(connected(server.port)) for _ in range(20)]
        for link in links:
            # The last byte is missing: all that came would have to be kept.
            with contextlib.suppress(ConnectionError):
                link.sendall(head("/v1/completions", len(raw)) + raw[:-1])
            most = max(most, resident(server))
        small = json.dumps({"model": "small-moe", "prompt": "x", "max_tokens": 1}).encode()
        assert send(server.port, small, "b")[0] == 200
        status, headers, body = send(server.port, raw)
        assert (status, json.loads(body)["error"]["code"], headers["retry-after"]) == (429, "overloaded", "1")
        kept = len(links) - len(select.select(links, [], [], 0)[0])
        assert 4 <= kept <= 6
        # Of alice's bodies there may be 48 MiB; what a connection has not handed on yet is in its buffers.
        assert most - before < 48 * MIB + 40 * MIB
    until(lambda: send(server.port, small)[0] == 200)


def slow_senders(server):
    """Alice's slow senders take all her part, with a byte now and then; after two seconds her next body is let in, and they are told."""
    raw = json.dumps({"model": "no", "prompt": "x" * (7 * MIB)}).encode()
    with contextlib.ExitStack() as stack:
        links = [stack.enter_context(connected(server.port)) for _ in range(6)]
        for link in links:
            link.sendall(head("/v1/completions", len(raw)) + raw[:-100])
        assert send(server.port, raw)[0] == 429
        time.sleep(2.2)
        for link in links:
            link.sendall(b"x")
        # That there is no such model is found out when a body was read.
        assert send(server.port, raw)[0] == 404
        assert [answered(link)[0] for link in links] == [408] * 6


def connections(server):
    """A crowd at one address takes half of the places, idle ones make place; beyond them one is told, and the server is seen to live."""
    port = server.port
    small = json.dumps({"model": "small-moe", "prompt": "x", "max_tokens": 1}).encode()
    with contextlib.ExitStack() as stack:
        # None has said all, so none is idle.
        holders = [stack.enter_context(connected(port, "127.0.0.2")) for _ in range(100)]
        for link in holders:
            with contextlib.suppress(ConnectionError):
                link.sendall(head("/v1/completions", 1000) + b"{")
        time.sleep(0.2)
        with connected(port, "127.0.0.2") as link:
            link.sendall(head("/v1/completions", len(small), "b") + small)
            status, headers, body = answered(link)
            assert (status, json.loads(body)["error"]["code"]) == (503, "too_many_connections")
            assert (headers["retry-after"], headers["connection"]) == ("1", "close")
        assert lives(port, "127.0.0.2") < MOST_S
        # Others have places still.
        assert send(port, small, "b")[0] == 200
        with connected(port, "127.0.0.3") as link:
            link.sendall(b"GET /v1/models HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer b\r\n\r\n")
            assert answered(link)[0] == 200
    until(lambda: send(port, small, "b")[0] == 200)
