"""Where peers and the master are: ``host:port`` in text, IPv4 and IPv6, and sockets that listen there."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import queue
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from anabranch.bounds import shown
from anabranch.cluster.pccl.times import ADDRESS_S
from anabranch.errors import InputError
from anabranch.sockets import MOST_PORT, listening

_BACKLOG = 128
# Names that are looked up at a time: a resolver cannot be stopped, and each has a thread until it answers.
_MOST_LOOKUPS = 64
_lookups = threading.Semaphore(_MOST_LOOKUPS)


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


def connected(host: str, port: int, deadline: float) -> socket.socket:
    """A connection, before ``deadline`` of the monotonic clock: finding the name's addresses and trying each of them included.

    Raises OSError where there is none, ValueError and OverflowError for what is no host or port.
    """
    found = _addresses(host, port, deadline)
    told: OSError = OSError("the name has no address")
    for place, (family, kind, protocol, _, address) in enumerate(found):
        left = deadline - time.monotonic()
        if left <= 0 and place:
            break
        # The first may be a dead end, and the next are not for that unreached.
        share = min(left / (len(found) - place), ADDRESS_S)
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(max(share, 0.001))
            sock.connect(address)
        except OSError as error:
            told = error
            sock.close()
        except BaseException:
            sock.close()
            raise
        else:
            return sock
    raise told


def _addresses(host: str, port: int, deadline: float) -> list[tuple[Any, ...]]:
    if _is_number(host):
        return _looked_up(host, port)
    places = _lookups
    if not places.acquire(blocking=False):
        raise OSError(f"{_MOST_LOOKUPS} names are being looked up")
    answer: queue.SimpleQueue[list[tuple[Any, ...]] | Exception] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            answer.put(_looked_up(host, port))
        except Exception as error:
            answer.put(error)
        finally:
            places.release()

    # A resolver whose servers do not answer waits for longer than anybody here would, and there is no end to ask it for.
    threading.Thread(target=look_up, name="pccl name", daemon=True).start()
    try:
        found = answer.get(timeout=max(deadline - time.monotonic(), 0.001))
    except queue.Empty:
        raise TimeoutError("its name was not resolved in time") from None
    if isinstance(found, Exception):
        raise found
    return found


def _looked_up(host: str, port: int) -> list[tuple[Any, ...]]:
    return list(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))


def _is_number(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


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
