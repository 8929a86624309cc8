"""Calls over a socket: which failures are those of a moment, and which of them nobody bills."""

import socket
import threading
from contextlib import contextmanager

import pytest

from anabranch.errors import DataError
from anabranch.web.endpoint import Endpoint

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"


@contextmanager
def saying(*parts):
    """The address of who reads one request, writes this, and leaves."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer():
            there, _ = server.accept()
            with there:
                head = b""
                while not head.endswith(b"{}"):
                    head += there.recv(1 << 16)
                there.sendall(b"".join(parts))

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        thread.join(60)


@pytest.mark.parametrize(
    "parts",
    [
        (),
        (HEAD, b"content-length: 100\r\n\r\n"),
        (HEAD, b'content-length: 100\r\n\r\n{"a": 1'),
        # A part that is an object itself.
        (HEAD, b'content-length: 100\r\n\r\n{"a": 1}'),
        (CHUNKED,),
        (CHUNKED, b'5\r\n{"a":\r\n'),
        (CHUNKED, b'8\r\n{"a":'),
        (CHUNKED, b'8\r\n{"a": 1}\r\n'),
    ],
)
def test_an_answer_that_breaks_off_is_one_of_a_moment_and_may_have_been_billed(parts):
    """One whose body ended early was no JSON, or was taken for whole, and was not asked for again."""
    with saying(*parts) as url:
        with pytest.raises(DataError, match=r"cannot reach|broke off in the midst of its answer") as raised:
            Endpoint(url, "m", timeout_s=30).post("/chat/completions", {})
    assert (raised.value.is_transient, raised.value.is_free) == (True, False)


@pytest.mark.parametrize(
    "parts",
    [
        (HEAD, b'content-length: 8\r\n\r\n{"a": 1}'),
        (HEAD, b'\r\n{"a": 1}'),
        (CHUNKED, b'8\r\n{"a": 1}\r\n0\r\n\r\n'),
    ],
)
def test_a_whole_answer(parts):
    with saying(*parts) as url:
        assert Endpoint(url, "m", timeout_s=30).post("/chat/completions", {}) == {"a": 1}


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ((b"SSH-2.0\r\n\r\n",), "does not speak HTTP"),
        ((HEAD, b"content-length: 3\r\n\r\nNaN"), "does not answer /chat/completions with a JSON object"),
        ((HEAD, b"content-length: 0\r\n\r\n"), "does not answer /chat/completions with a JSON object"),
    ],
)
def test_what_is_no_answer_is_none_of_a_moment(parts, why):
    with saying(*parts) as url:
        with pytest.raises(DataError, match=why) as raised:
            Endpoint(url, "m", timeout_s=30).post("/chat/completions", {})
    assert (raised.value.is_transient, raised.value.is_free) == (False, False)
