"""Large bodies that come, at a gateway as users start it: beside a key that sends too many others are served, and all is given back."""

import contextlib
import http.client
import json
import select
import socket
import time

import pytest

from gateway_process import call, mock_config, served

LIMITS = """
[admin]
key = "env:ADMIN"
[limits]
body_bytes = 1_000_000
bodies_bytes = 4_000_000
body_timeout_s = {timeout_s}
"""
SIZE = 900_000
BODY = json.dumps({"model": "small", "messages": [{"role": "user", "content": "x" * SIZE}]}).encode()


def written(folder, timeout_s):
    return mock_config(folder / "gateway.toml", top=LIMITS.format(timeout_s=timeout_s))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("bodies")


@pytest.fixture(scope="module")
def server(folder):
    with served("--config", written(folder, 60), environment={"ADMIN": "admin"}) as running:
        yield running
        assert running.process.poll() is None


def key(server, name, **limits):
    status, made, _ = call(server.url, "POST", "/admin/keys", {"name": name, **limits}, "admin")
    assert status in (200, 201), made
    return made["secret"]


def post(server, secret, body=BODY, path="/v1/chat/completions"):
    """Status and error code of the answer."""
    link = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        link.request("POST", path, body, {"content-type": "application/json", "authorization": f"Bearer {secret}"})
        answer = link.getresponse()
        said = json.loads(answer.read())
        return answer.status, said.get("error", {}).get("code")
    finally:
        link.close()


def begun(server, secret, *, path="/v1/chat/completions", body=BODY, num_bytes=SIZE):
    """A connection on which so much of a body has been sent, and the rest never comes."""
    link = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {secret}\r\ncontent-type: application/json\r\n"
    # One that is refused at its head is closed while the rest is sent.
    with contextlib.suppress(ConnectionError):
        link.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body[:num_bytes])
    return link


def answered(links, least):
    """Those that were answered, once they are so many, and the others."""
    deadline = time.monotonic() + 120
    while len(ready := select.select(links, [], [], 0.05)[0]) < least:
        assert time.monotonic() < deadline, f"{len(ready)} of {len(links)} were answered"
    return ready, [link for link in links if link not in ready]


def closed(links):
    for link in links:
        link.close()


def until_there_is_room(server, secret):
    deadline = time.monotonic() + 120
    while (said := post(server, secret))[0] == 429:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert said == (200, None)


@pytest.mark.parametrize("path", ["chat/completions", "messages", "messages/count_tokens", "responses", "feedback"])
def test_unfinished_bodies_are_requests_of_their_key_and_end_with_their_clients(server, path):
    hostile, other = key(server, f"h {path}", max_in_flight=1), key(server, f"o {path}", max_in_flight=1)
    links = [begun(server, hostile, path=f"/v1/{path}", num_bytes=1000) for _ in range(6)]
    refused, (left,) = answered(links, 5)
    assert all(link.recv(20).startswith(b"HTTP/1.1 429") for link in refused)
    assert post(server, hostile) == (429, "rate_limit_exceeded")
    assert post(server, other) == (200, None)
    left.close()
    until_there_is_room(server, hostile)
    closed(refused)


def test_whatever_a_large_body_comes_to_its_place_is_free_when_that_is_told(server):
    secret = key(server, "ends", max_in_flight=1)
    for body, path, status in [
        (BODY, "chat/completions", 200),
        (b"{" + BODY, "chat/completions", 400),
        (BODY.replace(b"small", b"nobody"), "chat/completions", 404),
        (BODY + b" " * 200_000, "chat/completions", 413),
        (BODY, "messages/count_tokens", 200),
        (BODY, "feedback", 400),
    ]:
        assert post(server, secret, body, f"/v1/{path}")[0] == status
    assert post(server, secret)[0] == 200


def test_a_key_that_fills_its_part_of_the_room_keeps_no_other_out(server):
    hostile, other = key(server, "fills"), key(server, "beside")
    # Half of the room holds two, without their last bytes.
    links = [begun(server, hostile) for _ in range(12)]
    refused, others = answered(links, 10)
    assert all(b"overloaded" in link.recv(4096) for link in refused)
    assert post(server, other) == (200, None)
    closed(others)
    until_there_is_room(server, hostile)
    closed(refused)


def test_small_bodies_take_room_while_they_come(server):
    secret, other = key(server, "small ones"), key(server, "beside small ones")
    small = json.dumps({"model": "small", "messages": [{"role": "user", "content": "x" * 190_000}]}).encode()
    # Half of the room holds ten.
    links = [begun(server, secret, body=small, num_bytes=189_000) for _ in range(14)]
    refused, others = answered(links, 4)
    assert all(link.recv(20).startswith(b"HTTP/1.1 429") for link in refused)
    assert post(server, other) == (200, None)
    said = []
    for link in others:
        # One that was refused just now is closed.
        with contextlib.suppress(ConnectionError):
            link.sendall(small[189_000:])
            said.append(link.recv(20))
    assert any(one.startswith(b"HTTP/1.1 200") for one in said)
    closed(links)


def test_a_body_that_takes_too_long_has_its_place_no_more(server, folder):
    secret = key(server, "slow", max_in_flight=1)
    for timeout_s in (0.3, 60):
        written(folder, timeout_s)
        assert call(server.url, "POST", "/admin/reload", key="admin")[0] == 200
        if timeout_s < 1:
            link = begun(server, secret, num_bytes=1000)
            assert link.recv(20).startswith(b"HTTP/1.1 408")
    assert post(server, secret) == (200, None)
    link.close()
