"""Ports of this machine that nobody else gets."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def held_port() -> Iterator[int]:
    """A port at 127.0.0.1 that the system gives to nobody while this lasts; whoever is told of it may listen there.

    A port that was found free and let go of may be another's a moment later. Who calls it while nobody listens is refused.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]
