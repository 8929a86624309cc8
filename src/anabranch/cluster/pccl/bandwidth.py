"""How fast one peer sends to another: floods over some connections for a while, counted by who receives.

A peer that is being measured answers others with "busy", and they ask again: two floods at once would each measure a half.
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from typing import Any

from anabranch.cluster.pccl.links import LinkError, Place, call_peer
from anabranch.cluster.pccl.times import COUNT_S, DRAIN_S, HANDSHAKE_S, REACH_S
from anabranch.cluster.pccl.wire import Kind, WireError, number, packed, receive_exactly, send_all

_BUFFER = 1 << 20
_COUNT = struct.Struct("!Qd")
MOST_STREAMS = 16
# Mbit/s: a rate of a link is less than it.
MOST_RATE = 1e9
MOST_MS = 60_000
_AGAIN_S = 0.05


class RateServer:
    """The receiving side: one flood at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._who: str | None = None
        self._until = 0.0

    def serve(self, sock: socket.socket, hello: dict[str, Any]) -> None:
        """Count what a caller sends until it stops; tell it bytes and seconds."""
        with sock:
            length_s = number(hello, "ms", MOST_MS) / 1000
            flood = str(hello.get("flood", ""))[:64]
            now = time.monotonic()
            with self._lock:
                is_free = self._who in (None, flood) or now > self._until
                if is_free:
                    self._who, self._until = flood, now + length_s + DRAIN_S
            send_all(sock, packed(Kind.WELCOME, {"busy": not is_free}), now + HANDSHAKE_S)
            if not is_free:
                return
            try:
                count, seconds = _drain(sock, now + length_s + DRAIN_S)
                send_all(sock, _COUNT.pack(count, seconds), time.monotonic() + HANDSHAKE_S)
            finally:
                with self._lock:
                    if self._who == flood:
                        self._who = None


def _drain(sock: socket.socket, deadline: float) -> tuple[int, float]:
    buffer, total, began = bytearray(_BUFFER), 0, time.monotonic()
    while time.monotonic() < deadline:
        sock.settimeout(max(deadline - time.monotonic(), 0.001))
        count = sock.recv_into(buffer)
        if not count:
            return total, time.monotonic() - began
        total += count
    raise WireError("a flood without an end")


def measure(
    place: Place,
    *,
    secret: bytes,
    run: str,
    me: int,
    seconds: float,
    streams: int,
    deadline: float,
    congestion: str | None,
) -> float:
    """Mbit/s to another peer. Raises LinkError, which accuses it; where it stays busy until ``deadline``, nobody."""
    hello = {"purpose": "rate", "run": run, "ms": int(seconds * 1000), "flood": f"{me} {time.monotonic_ns()}"}
    while True:
        sock, welcome = call_peer(place, secret, run, hello, time.monotonic() + REACH_S, congestion)
        if not welcome.get("busy"):
            break
        sock.close()
        if time.monotonic() > deadline:
            raise LinkError(f"peer {place.peer} is busy")
        # Who asks at the same moments would find it busy at the same moments.
        time.sleep(_AGAIN_S * (1 + me % 7 / 7))
    socks = [sock]
    try:
        while len(socks) < streams:
            socks.append(call_peer(place, secret, run, hello, time.monotonic() + REACH_S, congestion)[0])
        return _flood(socks, seconds)
    except (OSError, WireError) as error:
        raise LinkError(f"peer {place.peer} could not be measured: {error}", place.peer) from None
    finally:
        for sock in socks:
            sock.close()


def _flood(socks: list[socket.socket], seconds: float) -> float:
    end = time.monotonic() + seconds
    poured = [0] * len(socks)
    threads = [
        threading.Thread(target=_pour, args=(sock, end, poured, place), daemon=True) for place, sock in enumerate(socks)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds + COUNT_S)
    total, longest = 0, 0.0
    for place, sock in enumerate(socks):
        told = bytearray(_COUNT.size)
        receive_exactly(sock, memoryview(told), time.monotonic() + COUNT_S)
        count, took = _COUNT.unpack(told)
        if count > poured[place] or not 0 < took < 1e6:
            # Whoever says so would have this peer tell the master of a rate that is none.
            raise WireError(f"it counted {count} bytes of {poured[place]} in {took:g} s")
        total, longest = total + count, max(longest, took)
    return min(total * 8 / 1e6 / max(longest, 1e-6), MOST_RATE / 2)


def _pour(sock: socket.socket, end: float, poured: list[int], place: int) -> None:
    data = memoryview(bytes(_BUFFER))
    try:
        while True:
            send_all(sock, data, end + 2 * DRAIN_S)
            poured[place] += len(data)
            # At least once: a thread that is late because the machine is busy would else tell of a link that bears nothing.
            if time.monotonic() >= end:
                break
        sock.shutdown(socket.SHUT_WR)
    except OSError:
        # The count that is then missing tells it to who waits.
        sock.close()
