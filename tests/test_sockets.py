"""Connections whose other end must answer with its network."""

import socket

import pytest

from anabranch.errors import InputError
from anabranch.sockets import kept_alive, listening


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
