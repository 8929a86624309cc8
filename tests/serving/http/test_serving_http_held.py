"""What answers are made of counts until it has been read: no sender fills the memory with what it does not read."""

import contextlib
import json
import socket
import time

import pytest

from anabranch.serving.http.config import Limits
from anabranch.web import answer_room
from fake_engine import Script
from serving_thread import serving
from waiting import until

KEYS = ("alice=a", "bob=b")
# 17 MB of scores, told four times over: more than the system's buffers take.
SCORES = {"model": "fake", "prompt": ["x" * 800] * 8, "n": 4, "max_tokens": 0, "echo": True, "logprobs": 20}
HELD = 8 * 800 * 21 * 128


@contextlib.contextmanager
def slow_reader(server, key, fields, path="/v1/completions"):
    """A connection on which an answer has begun, and which reads no more."""
    raw = json.dumps(fields).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {key}\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(raw)}\r\n\r\n"
    with socket.socket() as link:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        link.connect(("127.0.0.1", server.port))
        link.sendall(head.encode() + raw)
        link.settimeout(60)
        assert link.recv(12) == b"HTTP/1.1 200"
        yield link


def ask(server, key, **fields):
    asked = {"model": "fake", "prompt": "hello", "max_tokens": 5, **fields}
    return server.ask("/v1/completions", asked, authorization=f"Bearer {key}")


def test_answers_that_are_not_read_count_against_their_sender(monkeypatch):
    monkeypatch.setattr(answer_room, "PATIENCE_S", 60.0)
    with serving(Script(endless=True), api_keys=KEYS, limits=Limits(answers_bytes=24 << 20)) as server:
        answers = server.frontend.answers
        with slow_reader(server, "a", SCORES):
            # Nothing is in the engine, and all of it is still here.
            until(lambda: server.frontend.admission.in_flight == 0)
            until(lambda: answers.num_bytes == HELD)
            before = len(server.script.requests)
            status, headers, told = ask(server, "a", **SCORES)
            assert (status, told["error"]["code"], headers["retry-after"]) == (429, "overloaded", "1")
            assert "answers to this sender" in told["error"]["message"]
            assert len(server.script.requests) == before, "it was refused before anything was computed"
            assert ask(server, "b")[0] == 200
            assert ask(server, "b", **SCORES)[0] == 429
            assert server.metrics()['admission_rejections_total{reason="answers"}'] == 2
            # So is one of which that is seen while it is made, and its place in the engine is free again.
            status, headers, told = ask(server, "b", prompt="x" * 500, logprobs=20, max_tokens=3_500)
            assert (status, told["error"]["code"], headers["retry-after"]) == (429, "overloaded", "1")
            until(lambda: len(server.engine.aborted) == 1)
            assert server.metrics()['aborted_total{reason="room"}'] == 1
            until(lambda: answers.num_bytes == HELD)
        # It has left.
        until(lambda: answers.num_bytes == 0)
        with slow_reader(server, "a", SCORES):
            until(lambda: answers.num_bytes == HELD)


def test_a_slow_reader_makes_room_when_it_is_needed(monkeypatch):
    monkeypatch.setattr(answer_room, "PATIENCE_S", 0.0)
    with serving(api_keys=KEYS, limits=Limits(answers_bytes=24 << 20)) as server:
        with slow_reader(server, "a", SCORES) as link, slow_reader(server, "a", SCORES):
            until(lambda: server.frontend.answers.num_bytes == HELD)
            last = b""
            with contextlib.suppress(ConnectionError):
                while part := link.recv(1 << 16):
                    last = part
            assert not last.endswith(b"0\r\n\r\n"), "half an answer must not look like one"
        until(lambda: server.frontend.answers.num_bytes == 0)


def test_a_reader_that_is_too_slow_is_cut_however_little_it_waits_for_each_slice(monkeypatch):
    monkeypatch.setattr("anabranch.web.slices.SLOWEST", 1 << 40)
    with serving(limits=Limits(stall_s=0.5)) as server:
        with slow_reader(server, "", SCORES) as link:
            taken = 0
            while server.app.under_way and taken < 1 << 20:
                with contextlib.suppress(ConnectionError):
                    taken += len(link.recv(4096))
                time.sleep(0.02)
            assert taken < 1 << 20
        until(lambda: server.frontend.answers.num_bytes == 0)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_an_answer_that_grows_beyond_what_there_ever_is_is_refused_and_leaves_the_engine(path):
    what = {"logprobs": 20} if path == "/v1/completions" else {"logprobs": True, "top_logprobs": 20}
    asked = {"prompt": "hello"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "hi"}]}
    with serving(Script(say="y", endless=True), limits=Limits(answers_bytes=1 << 20)) as server:
        status, _, told = server.ask(path, {"model": "fake", "max_tokens": 2000, **asked, **what})
        assert (status, told["error"]["code"]) == (400, "over_limit")
        until(lambda: len(server.engine.aborted) == 1)
        until(lambda: server.frontend.answers.num_bytes == 0)
        assert server.metrics()['aborted_total{reason="room"}'] == 1
        # Its text alone has room.
        assert server.ask(path, {"model": "fake", "max_tokens": 2000, **asked})[0] == 200
        until(lambda: server.frontend.answers.num_bytes == 0)


def test_vectors_and_tokens_count_too():
    with serving(Script(width=1024), limits=Limits(answers_bytes=1 << 20)) as server:
        status, _, told = server.ask("/v1/embeddings", {"model": "fake", "input": ["x"] * 300})
        assert (status, told["error"]["code"]) == (400, "over_limit")
        assert server.script.requests == []
        assert server.ask("/v1/embeddings", {"model": "fake", "input": ["x"] * 150})[0] == 200
        assert server.ask("/tokenize", {"prompt": "x" * 40_000})[0] == 400
        assert server.ask("/tokenize", {"prompt": "x" * 10_000})[0] == 200
        assert server.ask("/detokenize", {"tokens": [97] * 300_000})[0] == 400
        until(lambda: server.frontend.answers.num_bytes == 0)


def test_a_stream_lets_go_of_scores_that_have_been_told():
    fields = {"model": "fake", "prompt": "x" * 300, "echo": True, "logprobs": 5, "max_tokens": 3000, "stream": True}
    with serving(Script(delay_s=0.05, endless=True)) as server:
        with slow_reader(server, "", fields) as link:
            raw = b""
            while b"text_offset" not in raw:
                raw += link.recv(1 << 16)
            # More of it comes.
            until(lambda: (server.frontend.answers.num_bytes, server.frontend.admission.in_flight) == (0, 1))


def test_so_many_scores_are_told_in_one_answer_at_most():
    with serving(Script(say="y", positions=8_192)) as server:
        fields = {"logprobs": True, "top_logprobs": 20, "n": 16}
        status, _, told = server.chat(**fields, max_tokens=7_000)
        assert (status, told["error"]["code"], told["error"]["param"]) == (400, "too_many_scores", "max_tokens")
        assert "2,352,000" in told["error"]["message"]
        assert server.script.requests == []
        # Who names no number gets as many as there is room for, and a stream any.
        assert server.chat(**fields)[0] == 200
        assert {request.sampling.max_tokens for request in server.script.requests} == {2**21 // (21 * 16)}
        server.script.requests.clear()
        assert server.chat(**fields, max_tokens=7_000, stream=True)[0] == 200
        status, _, told = server.complete(prompt=["x"] * 128, max_tokens=1000, logprobs=20)
        assert (status, told["error"]["param"]) == (400, "max_tokens")
