"""Where peers and the master are: ``host:port`` in text, IPv4 and IPv6, and sockets that listen there."""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator

from anabranch.bounds import shown
from anabranch.errors import InputError
from anabranch.sockets import MOST_PORT, listening

_BACKLOG = 128


def parse_address(text: str, port: int) -> tuple[str, int]:
    """Host and port of ``host:port``, ``host``, ``:port`` or ``[v6]:port``; ``port`` where it says none. Raises InputError for others."""
    head, colon, tail = text.rpartition(":")
    if text.startswith("[") and text.endswith("]"):
        head, colon, tail = text, "", ""
    elif not colon:
        head, tail = text, ""
    elif ":" in head and not head.startswith("["):
        raise InputError(f"the address {shown(text)} is not clear; write an IPv6 address in brackets: [::1]:{port}")
    if colon and not (tail.isascii() and tail.isdigit() and len(tail) <= 5 and int(tail) <= MOST_PORT):
        raise InputError(f"the address {shown(text)} has no port; write host:port, a port is 0 to {MOST_PORT}")
    host = head[1:-1] if head.startswith("[") and head.endswith("]") else head
    if not (is_host(host) if host else colon):
        raise InputError(f"the address {shown(text)} is none; write host:port")
    return host, int(tail) if colon else port


def is_host(text: str) -> bool:
    """Whether this can be a name or a number of a host, so that a call there can fail in no other way than by not reaching it."""
    try:
        text.encode("idna")
    except UnicodeError:
        return False
    return 0 < len(text) <= 255 and all(letter.isprintable() and not letter.isspace() for letter in text)


@contextlib.contextmanager
def listen_at(host: str, port: int) -> Iterator[socket.socket]:
    """A socket that listens; an empty host is every address of this machine, of IPv4 and IPv6. Raises InputError where it cannot be had."""
    both = None if host else _both_kinds(port)
    if both is not None:
        with both:
            yield both
        return
    with listening(host or "0.0.0.0", port) as sock:
        sock.listen(_BACKLOG)
        yield sock


def _both_kinds(port: int) -> socket.socket | None:
    """A socket at every address of IPv4 and IPv6; None where this machine has no IPv6."""
    if not socket.has_dualstack_ipv6():
        return None
    try:
        return socket.create_server(("", port), family=socket.AF_INET6, backlog=_BACKLOG, dualstack_ipv6=True)
    except OSError as error:
        if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
            return None
        reason = (error.strerror or str(error)).lower()
        raise InputError(f"cannot listen at port {port}: {reason}; choose another port") from None


def tuned(sock: socket.socket, congestion: str | None = None) -> socket.socket:
    """The socket of a link: what is written goes at once. Buffers stay the kernel's, which knows their right size better.

    Args:
        sock: to be set.
        congestion: control of Linux, such as ``bbr``; None for the machine's own.

    Raises InputError for a congestion control that this machine does not have.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if congestion is not None:
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_CONGESTION, congestion.encode())
        except (OSError, AttributeError):
            raise InputError(
                f"congestion is {shown(congestion)}, which this machine does not have; leave it out"
            ) from None
    return sock
