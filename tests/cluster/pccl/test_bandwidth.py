"""Floods of links: what a busy machine makes of them."""

import socket
import threading
import time

from anabranch.cluster.pccl import bandwidth


def test_a_flood_whose_time_is_over_before_it_begins_tells_a_rate():
    """Threads of a busy machine start late: a link was said to bear nothing, and no ring went over it."""
    sender, receiver = socket.socketpair()

    def count() -> None:
        found = bandwidth._drain(receiver, time.monotonic() + 60)
        receiver.sendall(bandwidth._COUNT.pack(*found))

    counting = threading.Thread(target=count, daemon=True)
    counting.start()
    with sender, receiver:
        assert bandwidth._flood([sender], 0.0) > 0
        counting.join(60)
    assert not counting.is_alive()
