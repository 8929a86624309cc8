"""What clients send that they should not: each gets a clear answer or is dropped, and the gateway goes on."""

import contextlib
import gzip
import http.client
import json
import socket
import time

import pytest

from gateway_process import served
from waiting import PATIENCE_S, until

CONFIG = """
require_key = false
store = "hostile.db"
[limits]
body_bytes = 12_000_000
header_timeout_s = {header_s}
body_timeout_s = {body_s}
[strategies.cheapest]
kind = "cheapest"
[[models]]
name = "small"
deployments = [{{ provider = {{ kind = "mock" }} }}]
"""
LINE = b"GET /health HTTP/1.1\r\nhost: localhost\r\n"
HELLO = {"model": "small", "messages": [{"role": "user", "content": "hello"}]}


@contextlib.contextmanager
def serving(folder, **times):
    config = folder / "gateway.toml"
    config.write_text(CONFIG.format(**times))
    with served("--config", str(config)) as running:
        yield running
        assert running.process.poll() is None


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """One that waits for what it is sent for as long as a busy machine may need to send it."""
    with serving(tmp_path_factory.mktemp("hostile"), header_s=2 * PATIENCE_S, body_s=2 * PATIENCE_S) as running:
        yield running


@pytest.fixture(scope="module")
def hasty(tmp_path_factory):
    """One that waits for nobody."""
    with serving(tmp_path_factory.mktemp("hasty"), header_s=0.6, body_s=1.5) as running:
        yield running


@pytest.fixture(autouse=True)
def still_well(server):
    """Whatever a test did, the next request is answered."""
    yield
    status, _, body = post(server, json.dumps(HELLO).encode())
    assert status == 200, body


def post(server, body, path="/v1/chat/completions", method="POST", headers=None):
    link = http.client.HTTPConnection("127.0.0.1", server.port, timeout=PATIENCE_S)
    try:
        link.request(method, path, body, {"content-type": "application/json", **(headers or {})})
        answer = link.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        link.close()


def raw(server, data, then=b""):
    """What comes back for these bytes until the other side closes, which it has to."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as link:
        link.sendall(data)
        if then:
            time.sleep(0.05)
            link.sendall(then)
        parts = []
        try:
            while part := link.recv(65536):
                parts.append(part)
        except ConnectionError:
            pass
    return b"".join(parts)


def error_of(body):
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "code", "param"}
    return error


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b"\xff\xfe",
        b'{"model": "small", "messages": [{"content": "\xff"}]}',
        b"[" * 50_000,
        b'{"model": NaN}',
        json.dumps({**HELLO, "max_tokens": -5}).encode(),
        json.dumps({**HELLO, "messages": {"role": "user"}}).encode(),
        json.dumps({**HELLO, "model": ["small"]}).encode(),
        json.dumps({"messages": HELLO["messages"]}).encode(),
    ],
)
def test_a_wrong_body_is_a_400(server, body):
    status, headers, answer = post(server, body)
    assert status == 400
    assert error_of(answer)["message"]
    assert headers["x-request-id"].startswith("req_")


def test_an_unknown_model_is_a_404_with_near_names(server):
    status, _, answer = post(server, json.dumps({**HELLO, "model": "smal"}).encode())
    assert status == 404
    assert "small" in error_of(answer)["message"]


def test_a_prompt_of_ten_megabytes_is_answered_or_refused(server):
    body = json.dumps({**HELLO, "messages": [{"role": "user", "content": "river " * 1_700_000}]}).encode()
    status, _, answer = post(server, body)
    assert status in (200, 400), answer


def test_a_body_over_the_limit_is_a_413(server):
    answer = raw(server, b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 99999999\r\n\r\n{")
    assert answer.startswith(b"HTTP/1.1 413")
    assert error_of(answer.split(b"\r\n\r\n", 1)[1])["code"] == "request_too_large"


def test_a_body_that_takes_long_to_parse_is_a_400(server):
    status, _, answer = post(server, json.dumps(HELLO).encode()[:-1] + b', "x": [' + b"[]," * 70_000 + b"[]]}")
    assert (status, error_of(answer)["code"]) == (400, "too_many_values")


def test_a_chunked_body_over_the_limit_is_a_413(server):
    chunk = b"%x\r\n" % 1_000_000 + b" " * 1_000_000 + b"\r\n"
    answer = raw(
        server,
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n" + chunk * 12,
        then=chunk,
    )
    assert answer.startswith(b"HTTP/1.1 413")


def test_a_chunked_body_is_read(server):
    body = json.dumps(HELLO).encode()
    half = len(body) // 2
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (body[:half], body[half:])) + b"0\r\n\r\n"
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n"
    assert raw(server, head, then=chunks).startswith(b"HTTP/1.1 200")


def test_broken_chunks_are_a_400(hasty):
    # Or the end of a body that the server goes on to wait for.
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n"
    answer = raw(hasty, head, then=b"zz\r\nhello\r\n")
    assert answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 408"))


def test_a_slow_body_is_a_408(hasty):
    head = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 500\r\n\r\n{"
    answer = raw(hasty, head)
    assert answer.startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("size", [20, 3 << 20])
def test_who_waits_until_the_body_is_wanted_is_told_so(server, size):
    said = json.dumps({**HELLO, "messages": [{"role": "user", "content": "x" * size}]}).encode()
    head = f"POST {{}} HTTP/1.1\r\nhost: localhost\r\nexpect: 100-continue\r\ncontent-length: {len(said)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as link:
        link.sendall(head.format("/v1/chat/completions").encode())
        assert link.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        link.sendall(said)
        assert link.recv(65536).startswith(b"HTTP/1.1 200")
    # Not so a body that nobody would read.
    assert raw(server, head.format("/v1/none").encode()).startswith(b"HTTP/1.1 404")


@pytest.mark.parametrize("begin", [b"", b"POST /v1/chat", b"POST / HTTP/1.1\r\nhost: localhost\r\nx-a: "])
def test_slow_headers_are_dropped(hasty, begin):
    """Slowloris: a connection that never finishes its headers is closed, byte by byte or not at all."""
    link = socket.create_connection(("127.0.0.1", hasty.port), timeout=PATIENCE_S)
    link.sendall(begin)
    link.setblocking(False)

    def is_closed():
        time.sleep(0.1)
        try:
            link.sendall(b"x")
            return link.recv(10) == b""
        except BlockingIOError:
            return False
        except ConnectionError:
            return True

    until(is_closed)
    link.close()


@pytest.mark.parametrize(
    "head",
    [
        LINE + b"x-big: " + b"a" * 70_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n",
        LINE + b"".join(b"x-%d: 1\r\n" % at for at in range(500)) + b"\r\n",
        b"\x00\x01\x02\r\n\r\n",
        b"GET /health HTTP/9.9\r\n\r\n",
        LINE + b"bad header\r\n\r\n",
        LINE + b"content-length: -1\r\n\r\n",
        LINE + b"content-length: 3\r\ntransfer-encoding: chunked\r\n\r\nabc",
    ],
)
def test_what_is_no_http_or_too_much_of_it_is_refused(server, head):
    answer = raw(server, head)
    assert answer == b"" or answer.split(b" ")[1] in (b"400", b"413", b"414", b"431", b"505"), answer[:200]
    if answer:
        error_of(answer.split(b"\r\n\r\n", 1)[1])


def test_a_compressed_body_is_refused(server):
    status, _, answer = post(server, gzip.compress(json.dumps(HELLO).encode()), headers={"content-encoding": "gzip"})
    assert status == 415
    assert "uncompressed" in error_of(answer)["message"]


@pytest.mark.parametrize(
    "path",
    [
        "/ui/../../etc/passwd",
        "/ui/%2e%2e/%2e%2e/etc/passwd",
        "/ui/..%2f..%2fetc%2fpasswd",
        "/ui/page.css/../../x",
        "//etc/passwd",
        "/ui/page.py",
        "/.git/config",
    ],
)
def test_no_path_leads_to_a_file(server, path):
    answer = raw(server, f"GET {path} HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n".encode())
    assert answer.startswith((b"HTTP/1.1 404", b"HTTP/1.1 400"))
    assert b"root:" not in answer


def test_other_methods_are_a_405(server):
    for method in ("GET", "PUT", "DELETE", "PATCH"):
        status, headers, answer = post(server, None, method=method)
        assert status == 405
        assert headers["allow"] == "POST"
        error_of(answer)


@pytest.mark.parametrize("text", ["a\r\nx-injected: yes", "a\nx-injected: yes", "a\u2028b", "a\x00b"])
def test_names_cannot_inject_headers(server, text):
    status, headers, answer = post(server, json.dumps({**HELLO, "model": text}).encode())
    assert status in (400, 404)
    assert "x-injected" not in headers
    error_of(answer)
    status, headers, _ = post(server, json.dumps({**HELLO, "model": f"auto/cheapest?knob={text}"}).encode())
    assert "x-injected" not in headers


def test_pipelined_requests_are_answered_in_order(server):
    one = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
    last = b"GET /ready HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
    answer = raw(server, one * 5 + last)
    assert answer.count(b"HTTP/1.1 200") == 6
    assert answer.rindex(b"ready") > answer.rindex(b'"ok"')


def test_hints_of_other_hosts_are_not_followed(server):
    """No field of a request says where the gateway goes."""
    for name in ("base_url", "api_base", "endpoint", "url", "proxy"):
        status, _, _ = post(server, json.dumps({**HELLO, name: "http://127.0.0.1:1/"}).encode())
        assert status == 200
    status, _, _ = post(
        server,
        json.dumps(HELLO).encode(),
        headers={"x-portkey-custom-host": "http://127.0.0.1:1/", "x-forwarded-host": "127.0.0.1:1"},
    )
    assert status == 200
