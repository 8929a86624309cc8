"""Connections of a real server: how many there are, and that who is silent or does not read is let go of."""

import contextlib
import http.client
import json
import socket
import time

import numpy as np
import pytest

from anabranch.graph import HNSW
from anabranch.graph.serve import Limits
from anabranch.graph.serve.connections import Bounds
from server_process import started
from waiting import until

COUNT, DIM, CONNECTIONS = 3000, 4, 8
LARGE = {"ids": [*range(500)], "k": 1000, "ef": 1000}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("connections") / "index.anb"
    index = HNSW(DIM, M=8, ef_construction=40)
    index.add(np.random.default_rng(0).normal(size=(COUNT, DIM)).astype(np.float32))
    index.save(path)
    return path


def serving(path, stall_s):
    return started(
        *[
            "graph",
            "serve",
            str(path),
            "--read-only",
            "--stall",
            str(stall_s),
            "--connections",
            str(CONNECTIONS),
            "--quiet",
        ]
    )


@pytest.fixture(scope="module")
def server(path):
    """One that waits for nobody."""
    with serving(path, 1) as server:
        yield server


@pytest.fixture(scope="module")
def patient(path):
    """One that waits for as long as a busy machine may need to send something."""
    with serving(path, 120) as server:
        yield server


@contextlib.contextmanager
def connected(server, receive=None):
    with socket.socket() as made:
        if receive is not None:
            made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive)
        made.settimeout(60)
        made.connect(("127.0.0.1", server.port))
        yield made


def head(path, body=b"", method="POST"):
    return (
        f"{method} {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    ).encode() + body


def ask(server, path, body=None):
    link = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        link.request(
            "GET" if body is None else "POST",
            path,
            None if body is None else json.dumps(body),
            {"content-type": "application/json"},
        )
        answer = link.getresponse()
        return answer.status, answer.read()
    finally:
        link.close()


def metric(server, name):
    """A number of ``/metrics``; 0 for one that is not there yet."""
    status, text = ask(server, "/metrics")
    assert status == 200
    lines = [line for line in text.decode().splitlines() if line.startswith(name + " ")]
    return float(lines[0].split()[-1]) if lines else 0.0


SLOW = 'anabranch_cut_off_total{reason="slow"}'


def test_answers_that_nobody_reads_are_let_go_of(server):
    before = metric(server, SLOW)
    request = head("/search", json.dumps(LARGE).encode())
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(connected(server, 4096)).sendall(request)
        until(lambda: metric(server, SLOW) == before + 2)
        until(lambda: metric(server, "anabranch_answer_bytes") == 0.0)
        assert ask(server, "/search", {"ids": [1], "k": 3})[0] == 200
    until(lambda: metric(server, "anabranch_connections") == 1)


def test_one_who_reads_gets_all_of_it(server):
    status, text = ask(server, "/search", LARGE)
    assert (status, len(text) > 10 << 20) == (200, True)
    results = json.loads(text)["results"]
    assert [len(row["ids"]) for row in results] == [1000] * 500


@pytest.mark.slow
def test_a_slow_reader_gets_all_of_it(server):
    """More than the system keeps for it, over a time longer than ``--stall``."""
    body = {**LARGE, "ids": [*range(400)]}
    cut = metric(server, SLOW)
    with connected(server, 1 << 16) as made:
        made.sendall(head("/search", json.dumps(body).encode()))
        found = bytearray(made.recv(1 << 16))
        length = int(found.partition(b"content-length: ")[2].split()[0])
        # Within this machine the system tells of it in pieces of 64 KiB.
        for _ in range(120):
            found += made.recv(1 << 13)
            time.sleep(0.03)
        while len(found) < length:
            part = made.recv(1 << 20)
            assert part, "cut off"
            found += part
    assert len(json.loads(found.partition(b"\r\n\r\n")[2])["results"]) == 400
    assert metric(server, SLOW) == cut


@pytest.mark.parametrize(
    "said",
    [b"", b"POST /search HT", head("/healthz", method="GET") + b"GET /he"],
    ids=["nothing", "half a head", "half of the next"],
)
def test_who_is_silent_is_let_go_of(server, said):
    with connected(server) as made:
        made.sendall(said)
        heard = b""
        while part := made.recv(1 << 16):
            heard += part
    assert (b" 200 OK" in heard) == (b"healthz" in said)


@pytest.mark.parametrize("is_first", [True, False])
def test_one_who_drips_a_head_is_let_go_of(server, is_first):
    with connected(server) as made:
        if not is_first:
            made.sendall(head("/healthz", method="GET"))
            assert b" 200 OK" in made.recv(1 << 16)
        made.sendall(b"GET /healthz HTTP/1.1\r\n")

        def drip():
            made.sendall(b"x: y\r\n")
            time.sleep(0.1)

        with pytest.raises(OSError, match=r"reset|[Bb]roken"):
            until(drip)


def test_beyond_the_limit_only_whether_it_lives_is_told(patient):
    """One address has three quarters of the places; idle ones give way."""
    working = head("/search", b"x" * 10)[:-5]
    with contextlib.ExitStack() as stack:
        # Requests under way: their bodies do not come.
        held = [stack.enter_context(connected(patient)) for _ in range(CONNECTIONS * 3 // 4)]
        for one in held:
            one.sendall(working)
        until(lambda: ask(patient, "/search", {"ids": [1]})[0] == 503)
        status, text = ask(patient, "/search", {"ids": [1]})
        assert (status, json.loads(text)["error"]["code"]) == (503, "too_many_connections")
        assert ask(patient, "/healthz")[0] == 200
    until(lambda: ask(patient, "/search", {"ids": [1]})[0] == 200)
    assert metric(patient, 'anabranch_refused_total{reason="too_many_connections"}') >= 2
    with contextlib.ExitStack() as stack:
        # Kept alive, with nothing under way: the oldest makes place.
        for _ in range(CONNECTIONS):
            one = stack.enter_context(connected(patient))
            one.sendall(head("/healthz", method="GET"))
            assert b" 200 OK" in one.recv(1 << 16)
        assert ask(patient, "/search", {"ids": [1]})[0] == 200


def test_no_more_connections_than_files(monkeypatch):
    asked = []
    monkeypatch.setattr("anabranch.graph.serve.connections.room_for_files", lambda most: [asked.append(most), 5][1])
    bounds = Bounds(Limits(connections=7, stall_s=3.0, answers_bytes=2 << 20))
    assert (asked, bounds.places._limit) == ([7], 5)
    assert (bounds.readers.patience_s, bounds.readers.rate, bounds.readers.most_bytes) == (3.0, 4096, 2 << 20)


def test_who_waits_until_the_body_is_wanted_is_told_so(patient):
    whole = head("/v1/search", json.dumps({"ids": [1]}).encode())
    before, body = whole.split(b"\r\n\r\n")
    with connected(patient) as link:
        link.sendall(before + b"\r\nexpect: 100-continue\r\n\r\n")
        assert b" 100 Continue\r\n" in link.recv(65536)
        link.sendall(body)
        assert link.recv(65536).startswith(b"HTTP/1.1 200")
