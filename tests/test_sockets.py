"""Connections whose other end must answer with its network, and addresses."""

import socket

import pytest

from anabranch.errors import InputError
from anabranch.sockets import http_parts, kept_alive, listening


@pytest.mark.parametrize("seconds", [30.0, 2.0])
def test_a_connection_that_nobody_answers_ends_in_time(seconds):
    with socket.socket() as sock:
        assert kept_alive(sock, seconds) is sock
        read = lambda name: sock.getsockopt(socket.IPPROTO_TCP, getattr(socket, name))  # noqa: E731
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        # Idle, then as often as it is asked: in time, but for seconds that are whole.
        asked = read("TCP_KEEPIDLE") + read("TCP_KEEPCNT") * read("TCP_KEEPINTVL")
        assert seconds <= asked <= max(1.1 * seconds, seconds + 4)
        # With something on its way it is not asked, and this counts.
        assert read("TCP_USER_TIMEOUT") == seconds * 1000


def test_where_the_system_has_no_such_settings_it_stays_as_it_was(monkeypatch):
    for name in ("TCP_KEEPIDLE", "TCP_KEEPINTVL", "TCP_KEEPCNT", "TCP_USER_TIMEOUT"):
        monkeypatch.delattr(socket, name)
    with socket.socket() as sock:
        kept_alive(sock, 30.0)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)


def test_an_address_of_another_machine_is_told_as_that():
    """No other port helps there, and it does where the port is taken."""
    # Of a block that is kept for documents, so that no machine has it.
    with pytest.raises(InputError, match=r"192\.0\.2\.7, port 0: .*; use an address of this machine, or 0\.0\.0\.0"):
        with listening("192.0.2.7", 0):
            pass
    with listening("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port}: .*; choose another port"):
            with listening("127.0.0.1", port):
                pass


@pytest.mark.parametrize(
    ("url", "host", "port"),
    [
        ("https://api.openai.com/v1", "api.openai.com", None),
        ("http://[::1]:8000/v1", "::1", 8000),
        ("HTTP://A.b:65535", "a.b", 65_535),
    ],
)
def test_the_parts_of_an_address(url, host, port):
    parts = http_parts(url)
    assert (parts.hostname, parts.port) == (host, port)


@pytest.mark.parametrize(
    "url",
    [
        *("", "a.b", "//a.b", "ftp://a.b", "http://", "http://:80", "http:///v1", "http://a:99999", "http://a:port"),
        *("https://[your-resource].openai.azure.com", "http://[::1:8000/v1", "http://::1]/v1", "http://a\u2100b"),
    ],
)
def test_what_is_no_address_has_no_parts(url):
    assert http_parts(url) is None
