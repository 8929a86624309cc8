"""How many connections a gateway keeps open: a crowd at one address keeps nobody else out."""

import contextlib
import dataclasses
import http.client
import json
import logging
import socket

import pytest

from anabranch.errors import ConfigError
from anabranch.gateway.config import LimitsConfig, default_config
from anabranch.gateway.http import run
from gateway_process import served
from waiting import until

CONFIG = """
require_key = false
store = "{store}"
[limits]
connections = 20
header_timeout_s = 30
[[models]]
name = "small"
deployments = [{{ provider = {{ kind = "mock", tokens = 60, tokens_per_s = 40 }} }}]
"""
CROWD, OTHER = "127.0.0.2", "127.0.0.1"
HELLO = {"model": "small", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}


@contextlib.contextmanager
def connected(port, address):
    with socket.socket() as link:
        link.settimeout(60)
        link.bind((address, 0))
        link.connect(("127.0.0.1", port))
        yield link


def head(path, length=None):
    sized = "" if length is None else f"content-type: application/json\r\ncontent-length: {length}\r\n"
    return f"{'GET' if length is None else 'POST'} {path} HTTP/1.1\r\nhost: localhost\r\n{sized}\r\n".encode()


def answered(link):
    """Status, headers and body of the next answer."""
    answer = http.client.HTTPResponse(link)
    answer.begin()
    return answer.status, answer.headers, answer.read()


def send(port, address, path, body=None):
    """The answer on a connection of its own."""
    raw = b"" if body is None else json.dumps(body).encode()
    with connected(port, address) as link:
        with contextlib.suppress(ConnectionError):
            link.sendall(head(path, None if body is None else len(raw)) + raw)
        return answered(link)


def refused(port):
    _, _, text = send(port, OTHER, "/metrics")
    return sum(float(line.split()[-1]) for line in text.decode().splitlines() if 'code="too_many_connections"' in line)


def test_a_crowd_at_one_address_keeps_nobody_else_out(tmp_path):
    path = tmp_path / "gateway.toml"
    path.write_text(CONFIG.format(store=tmp_path / "gateway.db"))
    with served("--config", str(path)) as server, contextlib.ExitStack() as stack:
        port = server.port
        # Somebody is being served.
        stream = stack.enter_context(connected(port, OTHER))
        raw = json.dumps({**HELLO, "max_tokens": 60, "stream": True}).encode()
        stream.sendall(head("/v1/chat/completions", len(raw)) + raw)
        with contextlib.ExitStack() as crowd:

            def one_more():
                """It has said that more comes, so it is not idle."""
                link = crowd.enter_context(connected(port, CROWD))
                with contextlib.suppress(ConnectionError):
                    link.sendall(head("/v1/chat/completions", 1_000) + b"{")

            for _ in range(100):
                one_more()

            def told():
                # A place that was free as this came may have been its own.
                one_more()
                found = send(port, CROWD, "/v1/chat/completions", HELLO)
                return found if found[0] != 200 else None

            status, headers, body = until(told)
            assert (status, json.loads(body)["error"]["code"]) == (503, "too_many_connections")
            assert (headers["retry-after"], headers["connection"]) == ("1", "close")
            assert send(port, CROWD, "/ready")[0] == 503
            # That it lives is told to all, and others are answered.
            for alive in ("/health", "/health/liveliness", "/health/liveness"):
                status, headers, _ = send(port, CROWD, alive)
                assert (status, headers["connection"]) == (200, "close")
            assert send(port, OTHER, "/v1/chat/completions", HELLO)[0] == 200
            assert send(port, "127.0.0.3", "/v1/models")[0] == 200
            assert refused(port) >= 2
            status, _, body = answered(stream)
            assert (status, body.endswith(b"data: [DONE]\n\n")) == (200, True)
        until(lambda: send(port, CROWD, "/v1/chat/completions", HELLO)[0] == 200)
        # Those who say nothing whole, or wait between two requests, give way.
        for begin in (b"GET /heal", head("/health")):
            with contextlib.ExitStack() as crowd:
                for _ in range(40):
                    link = crowd.enter_context(connected(port, CROWD))
                    with contextlib.suppress(ConnectionError):
                        link.sendall(begin)
                until(lambda: send(port, CROWD, "/v1/models")[0] == 200)


def limited(**limits):
    return dataclasses.replace(default_config(), limits=LimitsConfig(**limits))


@pytest.mark.parametrize(
    ("room", "limits", "connections"),
    [
        (10**6, {}, 2_048),
        (10**6, {"connections": 7}, 7),
        # Requests that are under way have connections to providers, too.
        (2_128, {"in_flight": 500}, 1_500),
        # Where there are few, as many of these as of those.
        (628, {}, 250),
        (1, {}, 1),
    ],
)
def test_there_are_as_many_places_as_files_may_be_open(monkeypatch, caplog, room, limits, connections):
    asked = []
    monkeypatch.setattr(run, "room_for_files", lambda count: asked.append(count) or min(count, room))
    config = limited(**limits)
    with caplog.at_level(logging.WARNING):
        places = run._places(config)
    assert asked == [config.limits.connections + config.limits.in_flight + run.OPERATORS]
    assert places._limit == connections
    assert ("limits.connections is" in caplog.text) == (connections < config.limits.connections)


@pytest.mark.parametrize("fields", [{"connections": 0}, {"address_share": 0.0}, {"address_share": 1.1}])
def test_no_places_at_all_are_refused(fields):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        LimitsConfig(**fields)
