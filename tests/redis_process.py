"""A private Redis to test with, where its program and its client are installed."""

import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from anabranch.gateway.config.shared import SharedConfig
from anabranch.gateway.metrics import Metrics
from anabranch.gateway.shared import Shared

PROGRAM = shutil.which("redis-server") or shutil.which("valkey-server")


def missing():
    """Why there is none; None if there is."""
    if importlib.util.find_spec("redis") is None:
        return "the package redis is not installed (the extra redis)"
    return None if PROGRAM else "no redis-server on this machine"


needs_redis = pytest.mark.skipif(missing() is not None, reason=f"no Redis to test with: {missing()}")


class Redis:
    """A server behind a Unix socket that keeps nothing on disk.

    Attributes:
        url: for clients.
    """

    def __init__(self, folder):
        self._socket, self._process = folder / "s", None
        self.url = f"unix://{self._socket}"

    def start(self):
        """Begin, with nothing in it."""
        command = (
            PROGRAM,
            "--port",
            "0",
            "--unixsocket",
            self._socket,
            "--save",
            "",
            "--appendonly",
            "no",
            "--dir",
            self._socket.parent,
        )
        self._process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 120
        while not self._answers():
            assert time.monotonic() < until, "redis-server does not start"
            assert self._process.poll() is None, "redis-server ended"
            time.sleep(0.01)

    def _answers(self):
        import redis

        try:
            with redis.Redis.from_url(self.url, socket_timeout=5) as client:
                return client.ping()
        except redis.RedisError:
            return False

    def stop(self):
        """End as a crash would."""
        self._process.kill()
        self._process.wait(60)

    def hang(self):
        """Take connections and answer nothing, until `go_on`."""
        os.kill(self._process.pid, signal.SIGSTOP)

    def go_on(self):
        """See `hang`."""
        os.kill(self._process.pid, signal.SIGCONT)


def wait_for_it(shared, timeout_s):
    """Have links wait for an answer for so long from now on: a test of a server that hangs need not be one of how quick it is before."""
    for one in shared:
        one.link._config = one.link._config.replace(timeout_s=timeout_s)


async def end_leases(link, held):
    """Let all leases be over that are there, as if their time had passed."""
    found = await link.run(lambda client: client.zrange(held, 0, -1))
    assert found
    await link.run(lambda client: client.zadd(held, dict.fromkeys(found, 1)))


@contextmanager
def redis_server():
    """One that runs until the end of the block."""
    folder = Path(tempfile.mkdtemp(prefix="rd", dir="/tmp"))  # a short path: sockets allow 107 bytes
    made = Redis(folder)
    try:
        made.start()
        yield made
    finally:
        made.stop()
        shutil.rmtree(folder, ignore_errors=True)


@asynccontextmanager
async def processes(server, prefix="p", num=2, **fields):
    """What so many processes share on a server, each by a link of its own; ``fields`` are the config's."""
    # However busy this machine is, Redis answers in time, unless a test is of how it does not.
    given = {"timeout_s": 5.0, **fields}
    made = [Shared(SharedConfig(url=server.url, prefix=prefix, **given), Metrics()) for _ in range(num)]
    try:
        for one in made:
            await one.start()
        yield made
    finally:
        for one in made:
            await one.close()
